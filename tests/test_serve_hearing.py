"""Spoken turns that are settled while they come in: the LLM takes in what is settled, and the answer is that to the samples."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import hearing, is_idle, running, settled_answer, settling_model
from test_serve_voice import speak, spoken, text_of, ticket
from torch import Tensor
from websockets.sync.client import connect

from x2l.assistant import Assistant
from x2l.data.media import decode_audio
from x2l.encoders.moonshine import RATE
from x2l.modalities.growing import GrowingEncoder
from x2l.modalities.hearing import STEP
from x2l.past import Past
from x2l.serve import voice
from x2l.serve.answer import Decode, RequestError
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.job import Job
from x2l.serve.voice import VoiceTurn, wav
from x2l.types import Part, user


@pytest.fixture(scope="module")
def model(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return settling_model(llm_folder, tmp_path_factory.mktemp("speech"))


def test_a_spoken_turn_that_settles(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, however the sound comes; the LLM knows what is settled before the end."""
    monkeypatch.setattr(voice, "WORTHWHILE", 8)
    pcm = spoken(6.6, seed=8)
    expected = settled_answer(model, wav(pcm), 1.0, 12)
    with running(model) as up:
        for size in (3_200, 60_000):
            up.engine.prefixes.clear()
            with connect(ticket(up, lookahead=1.0)) as socket:
                frames = speak(socket, pcm, size)
            assert frames[0] == {"type": "end", "samples": len(pcm) // 2}
            assert text_of(frames) == expected
        slow = ticket(up, lookahead=0.5)
        up.engine.prefixes.clear()
        with connect(slow) as socket:
            for at in range(0, len(pcm), 16_000):
                socket.send(pcm[at : at + 16_000])
                requests = up.engine.stats.requests
                for _ in range(200):
                    if up.engine.stats.requests > requests and up.engine.load[0] == 0:
                        break
                    time.sleep(0.01)
            frames = speak(socket, b"")
        assert text_of(frames) == settled_answer(model, wav(pcm), 0.5, 12)
        details = frames[-1]["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] > details["audio_tokens"] // 2, "the LLM has read what is settled already"


class Turn:
    """A spoken turn on an engine of its own, and what its encoder was given; ``before`` is called ahead of each read."""

    def __init__(self, model: Assistant, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] = lambda samples: None):
        self.engine, self.reads, self.workers = Engine(model), list[int](), ThreadPoolExecutor(2)
        encode = GrowingEncoder.__call__

        def counting(encoder: GrowingEncoder, wave: Tensor, past: Past) -> Tensor:
            before(len(wave))
            self.reads.append(len(wave))
            return encode(encoder, wave, past)

        monkeypatch.setattr(GrowingEncoder, "__call__", counting)

    def run(self, scene: Callable[[VoiceTurn], Coroutine[Any, Any, Any]]) -> Any:
        async def played() -> Any:
            turn = VoiceTurn(self.engine, [VOICE], 0, Decode(12), "", self.workers, lookahead=0.5)
            await turn.begin()
            while self.engine.load[1]:
                await asyncio.sleep(0.01)
            return await scene(turn)

        try:
            return asyncio.run(asyncio.wait_for(played(), 60))
        finally:
            self.engine.close()


VOICE = user(Part("speech", bytes=b""))


async def said(turn: VoiceTurn) -> str:
    return "".join([piece async for piece in await turn.answer()])


async def settled(turn: VoiceTurn) -> None:
    while turn._settling is not None and not turn._settling.done():
        await asyncio.sleep(0.01)


def test_a_turn_opens_the_interface_before_anything_is_said(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on with what came meanwhile, though no more comes; once it is open, the next turn does not."""
    opened = set[voice.Kind]()

    async def scene(turn: VoiceTurn) -> None:
        for _ in range(2):
            turn.open(opened)
            await settled(turn)
        turn.hear(spoken(1.2, seed=1))
        await settled(turn)

    turns = Turn(model, monkeypatch)
    speech: Any = turns.engine.growing_speech
    assert not speech._made
    turns.run(scene)
    assert speech._made
    assert turns.reads[-2:] == [STEP, 2 * STEP]
    silence = turns.reads[:-2]
    assert len(silence) == len(set(silence)) > 10
    assert opened == {(turns.engine, voice.EarlyEar)}


def test_an_interface_that_did_not_open_is_opened_again(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next turn of its kind, over HTTP; then no more."""
    tries, done, opens = list[type](), threading.Semaphore(0), VoiceTurn._open

    def opening(ear: voice.Ear) -> None:
        tries.append(type(ear))
        if len(tries) == 1:
            raise OSError("the weights cannot be fetched now")

    async def opened(turn: VoiceTurn, kinds: set[voice.Kind]) -> None:
        try:
            await opens(turn, kinds)
        finally:
            done.release()

    monkeypatch.setattr(voice.Ear, "open", opening)
    monkeypatch.setattr(voice.EarlyEar, "open", opening)
    monkeypatch.setattr(VoiceTurn, "_open", opened)
    with running(model) as up:
        for lookahead, opens_it in ((1.0, True), (2.0, True), (None, True), (None, False), (0.5, False)):
            ticket(up, lookahead=lookahead)
            assert not opens_it or done.acquire(timeout=30)
    assert tries == [voice.EarlyEar, voice.EarlyEar, voice.Ear]


def test_what_is_settled_is_not_computed_twice(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a person speaks each step is read once; the end reads the rest alone."""
    turns, pcm = Turn(model, monkeypatch), spoken(2.2, seed=11)

    async def scene(turn: VoiceTurn) -> str:
        for at in range(0, len(pcm), 8_000):
            turn.hear(pcm[at : at + 8_000])
            await settled(turn)
        return await said(turn)

    assert turns.run(scene)
    assert turns.reads == [*range(STEP, 4 * STEP + 1, STEP), int(2.2 * RATE)]


def test_a_busy_server_settles_and_the_llm_waits(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(VoiceTurn, "_has_room", lambda self: False)
    monkeypatch.setattr(voice, "WORTHWHILE", 1)

    async def scene(turn: VoiceTurn) -> int:
        requests = turns.engine.stats.requests
        turn.hear(spoken(2.2, seed=11))
        await settled(turn)
        assert turns.engine.stats.requests == requests
        reads = len(turns.reads)
        await said(turn)
        return reads

    assert turns.run(scene) == 4
    assert len(turns.reads) == 5


def test_a_turn_that_is_left_stops_after_the_step_in_work(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the person speaks, and when the end has come and all is still to be read."""
    for ended in (False, True):
        reading = threading.Event()
        turns = Turn(model, monkeypatch, lambda _, reading=reading: (reading.set(), time.sleep(0.1)))  # type: ignore[misc]

        async def scene(turn: VoiceTurn, ended: bool = ended, reading: threading.Event = reading) -> None:
            for seed in range(4):
                turn.hear(spoken(5.0, seed=seed))
            answer = asyncio.ensure_future(said(turn)) if ended else None
            while not reading.is_set():
                await asyncio.sleep(0.01)
            if answer is not None:
                answer.cancel()
            turn.close()
            await asyncio.sleep(1.0)

        turns.run(scene)
        assert len(turns.reads) <= 2
        assert is_idle(turns.engine)


async def taken_in_late(turns: Turn, turn: VoiceTurn, pcm: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, threading.Event]:
    """What the LLM is to take in of ``pcm``: it waits behind another prompt until the event is set."""
    go_on, lay_out = threading.Event(), Job.lay_out

    def waiting(job: Job, *args: Any) -> None:
        assert go_on.wait(60)
        lay_out(job, *args)

    monkeypatch.setattr(Job, "lay_out", waiting)
    turns.engine.submit([user("Hi")], Decode(max_new_tokens=1))
    while turns.engine._waiting:
        await asyncio.sleep(0.01)
    turn.hear(pcm)
    while not (turns.engine._waiting and turn._num_mine):
        await asyncio.sleep(0.01)
    (job,) = turns.engine._waiting
    return job, go_on


def test_what_the_llm_was_given_in_advance_is_dropped_with_the_turn(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(voice, "WORTHWHILE", 1)

    async def scene(turn: VoiceTurn) -> None:
        job, go_on = await taken_in_late(turns, turn, spoken(3.0, seed=3), monkeypatch)
        turn.close()
        while not job.answer.cancelled:
            await asyncio.sleep(0.01)
        go_on.set()

    turns.run(scene)


def test_an_answer_in_advance_takes_the_place_of_what_the_llm_takes_in(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for one more alone; if the person goes on, the answer is that to all that was said."""
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(voice, "WORTHWHILE", 8)
    monkeypatch.setattr(turns.engine, "config", EngineConfig(max_batch=4))
    pcm = spoken(3.0, seed=3) + bytes(2 * RATE) + spoken(4.0, seed=5)

    async def scene(turn: VoiceTurn) -> str:
        job, go_on = await taken_in_late(turns, turn, pcm[: 6 * RATE], monkeypatch)
        turn.hear(pcm[6 * RATE : 7 * RATE])
        while len(turns.engine._waiting) < 2 or not job.answer.cancelled:
            await asyncio.sleep(0.01)
        assert turn.ahead
        turn.hear(pcm[7 * RATE :])
        assert not turn.ahead
        go_on.set()
        return await said(turn)

    answer = turns.run(scene)
    monkeypatch.undo()
    assert answer == settled_answer(model, wav(pcm), 0.5, 12)


def test_one_turn_takes_one_worker(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, one of which a step of one turn holds: another turn is read all the same."""
    held, go_on = threading.Event(), threading.Event()

    def before(samples: int) -> None:
        if samples == 3 * STEP:
            held.set()
            assert go_on.wait(60)

    turns, pcm = Turn(model, monkeypatch, before), spoken(0.4, seed=2)

    async def scene(turn: VoiceTurn) -> tuple[str, str]:
        turn.hear(spoken(1.6, seed=1))
        while not held.is_set():
            await asyncio.sleep(0.01)
        first = asyncio.ensure_future(said(turn))
        await asyncio.sleep(0.2)
        other = VoiceTurn(turns.engine, [VOICE], 0, Decode(12), "", turns.workers, lookahead=0.5)
        other.hear(pcm)
        second = await said(other)
        go_on.set()
        return await first, second

    answers = turns.run(scene)
    monkeypatch.undo()
    assert answers == tuple(settled_answer(model, wav(each), 0.5, 12) for each in (spoken(1.6, seed=1), pcm))


def test_a_step_that_fails_is_told_and_tried_again(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("out of memory"), None])

    def before(samples: int) -> None:
        if error := next(failures, None):
            raise error

    pcm, turns = spoken(2.2, seed=6), Turn(model, monkeypatch, before)

    async def scene(turn: VoiceTurn) -> str:
        turn.hear(pcm)
        await settled(turn)
        return await said(turn)

    answer = turns.run(scene)
    monkeypatch.undo()
    assert "not read in advance: RuntimeError('out of memory')" in caplog.text
    assert answer == settled_answer(model, wav(pcm), 0.5, 12)


def test_recordings_that_begin_alike_are_told_apart(model: Assistant) -> None:
    """Two ends, of as many embeddings each, after the same beginning: the states of one are not taken for the other's."""
    modality: Any = model.model.modalities["speech"]

    def answer(pcm: bytes) -> str:
        return settled_answer(model, wav(pcm), 0.5, 12)

    def alike() -> tuple[bytes, bytes]:
        for seed in range(40):
            beginning, seen = spoken(2.0, seed=seed), dict[int, bytes]()
            for end in range(100, 104):
                pcm = beginning + spoken(0.4, seed=end)  # shorter than a step: nothing of it is settled
                settled, rest = hearing(modality, 0.5).read(torch.from_numpy(decode_audio(wav(pcm))))
                first = seen.setdefault(len(rest), pcm)
                if settled and answer(pcm) != answer(first):
                    return first, pcm
        raise AssertionError("all of them have the same answer")

    first, second = alike()
    with running(model) as up:
        answers = []
        for pcm in (first, second):
            with connect(ticket(up, lookahead=0.5)) as socket:
                answers.append(text_of(speak(socket, pcm)))
    assert answers == [answer(first), answer(second)]


def test_what_the_interface_cannot_read_is_the_requests_error(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(samples: int) -> None:
        raise ValueError("too long")

    async def scene(turn: VoiceTurn) -> str:
        turn.hear(spoken(1.2, seed=6))
        return await said(turn)

    with pytest.raises(RequestError, match=r"cannot read this recording of 1\.2 s"):
        Turn(model, monkeypatch, before).run(scene)


def test_a_recording_in_pieces_is_one_recording_to_the_template(llm_folder: Path, tmp_path: Path) -> None:
    """The paper's prompt marks where one begins and ends; and no cache is needed."""
    paper = settling_model(llm_folder, tmp_path, template={"name": "paper"})
    pcm = spoken(2.7, seed=5)
    with running(paper, EngineConfig(embedding_bytes=0)) as up, connect(ticket(up, lookahead=0.5)) as socket:
        frames = speak(socket, pcm)
    assert text_of(frames) == settled_answer(paper, wav(pcm), 0.5, 12)
