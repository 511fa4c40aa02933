"""A spoken turn: the sound arrives while the person speaks, and the answer is ready, or nearly, when they have finished.

Encoder, listener and C-Former look at a whole recording, so that every new sound may change every embedding of it: nothing
that is computed before its end is certain. What runs ahead is therefore

- what stands before the recording (instructions, earlier turns, media): its states, from the first moment;
- windows of the encoder that are complete (`MoonshineEncoder.grow`): final, whatever comes;
- in each pause, the answer to what was said so far. If nothing more is said it is the answer; else it is dropped.

The recording ends `TAIL` after the last voice in it, so that the answer begun in the last pause is the answer to the very
same samples: equal to that of a recorded file by construction, since it is computed from the same bytes by the same code.

With a ``lookahead`` what was heard so long ago is settled (`x2l.modalities.hearing`): the LLM takes its embeddings in while the
person goes on, and at the end little is left to read. The answer then depends on the samples alone, too, but it is that of a
model which understands early: not always what it would say to the recorded file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import logging
import wave
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from x2l.modalities.hearing import STEP, Hearing
from x2l.serve.answer import Answer, Decode, RequestError
from x2l.serve.chat import abandon, submit
from x2l.serve.engine import Engine
from x2l.serve.job import EarlyPart, Piece, content_key
from x2l.serve.pauses import RATE, TAIL, Pauses
from x2l.serve.schema import MAX_LOOKAHEAD
from x2l.types import Features, Media, Message, Part

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST = Decode(max_new_tokens=1)  # enough to compute a prompt
WORTHWHILE = 32  # embeddings that the LLM takes in at a time: a pass over fewer, or over so many more at the end, costs little but
# the reading of its weights, and whoever ends while it is in work has no use for it


def wav(pcm: bytes) -> bytes:
    """The WAV file of 16-bit mono samples at 16 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm)
    return buffer.getvalue()


def _sound(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / 32_768


class Ear:
    """The speech interface on one growing recording, outside the engine's thread; a recording begins with what earlier calls were
    given."""

    settled: EarlyPart | None = None  # what is settled of it

    def __init__(self, engine: Engine):
        self._engine = engine
        self._modality: Any = engine.model.modalities["speech"]
        self._done: list[np.ndarray] = []  # features of the encoder's windows that are complete

    def open(self) -> None:
        """Read a moment of silence, so that all is there that the interface makes or fetches when it first hears something."""
        self._read(np.zeros(STEP, np.float32), [])

    def due(self, samples: int) -> bool:
        """Whether a `step` should be taken of a recording of so many samples."""
        return False

    def step(self, pcm: bytes) -> None:
        """Settle a little more."""

    def read(self, pcm: bytes) -> Part:
        """The recording so far, read as its file would be; its embeddings are put among the engine's.

        Raises:
            RequestError: it is longer than the interface can take.
        """
        blob = wav(pcm)
        key = content_key("speech", blob)
        if self._engine.embeddings.get(key) is None:
            with _refusing(pcm):
                self._engine.embeddings.put(key, self._read(_sound(pcm), self._done))
        return Part("speech", bytes=blob)

    @torch.inference_mode()
    def _read(self, sound: np.ndarray, done: list[np.ndarray]) -> Tensor:
        if grow := getattr(self._modality.encoder, "grow", None):
            media = Media(features=grow(sound, done))
        else:
            media = Media(inputs=self._engine.assistant.collator.processors["speech"]([sound]))
        read: Features = self._modality(media)
        return read.x[0, : int(read.lengths[0])].clone()


class EarlyEar(Ear):
    """An `Ear` for which what was heard ``lookahead`` seconds ago is settled.

    Raises:
        RequestError: the model's speech interface reads whole recordings only.
    """

    def __init__(self, engine: Engine, lookahead: float):
        super().__init__(engine)
        if engine.growing_speech is None:
            raise RequestError(f"this model's speech interface reads whole recordings only: leave out lookahead ({lookahead:g})")
        self._hearing = Hearing(engine.growing_speech, lookahead)
        self._sha = hashlib.sha256(f"after {self._hearing.lookahead} samples".encode())  # of all that it has settled
        self._pieces: list[Piece] = []

    def open(self) -> None:
        """As `Ear.open`, of what settles, for turns of any lookahead."""
        self._hearing.speech.open(MAX_LOOKAHEAD)

    def due(self, samples: int) -> bool:
        """Whether a `step` should be taken of a recording of so many samples."""
        return samples - self._hearing.samples >= STEP

    def step(self, pcm: bytes) -> None:
        """Settle a little more, if that is still due."""
        if not self.due(len(pcm) // 2):
            return
        before = self._hearing.samples
        with _refusing(pcm):
            self._hearing.step(torch.from_numpy(_sound(pcm)))
        self._sha.update(pcm[2 * before : 2 * self._hearing.samples])
        if len(self._hearing.settled) > len(self._pieces):
            self._pieces.append((f"speech settled:{self._sha.hexdigest()}", self._hearing.settled[-1]))
            self.settled = EarlyPart("speech", pieces=tuple(self._pieces))

    def read(self, pcm: bytes) -> Part:
        """The recording so far, of which no `step` is due: what is settled, and the rest."""
        with _refusing(pcm):
            _, rest = self._hearing.read(torch.from_numpy(_sound(pcm)))
        sha = self._sha.copy()
        sha.update(pcm[2 * self._hearing.samples :])
        return EarlyPart("speech", pieces=(*self._pieces, (f"speech rest:{sha.hexdigest()}", rest)))


Kind = tuple[Engine, type[Ear]]  # whose interface reads, and how


def _in_advance(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that may fail: the answer itself will say it, if it is still so."""

    def tell(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a spoken turn was not read in advance: %r", error)

    task = asyncio.ensure_future(work)
    task.add_done_callback(tell)
    return task


@contextlib.contextmanager
def _refusing(pcm: bytes) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RequestError(f"the model cannot read this recording of {len(pcm) / 2 / RATE:.1f} s") from error


class VoiceTurn:
    """A conversation whose last message has a recording that is still being made.

    Args:
        engine: computes the answer.
        messages: the conversation; ``place`` is the index, in the last message, of the part that the recording becomes.
        decode: how to answer.
        owner: whoever asks.
        workers: run the speech interface.
        end_silence: seconds of silence that end the speech, if anything but the client does.
        lookahead: seconds of sound after which what was heard is settled, if it is at all.

    Raises:
        RequestError: with a ``lookahead``, the model's speech interface reads whole recordings only.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Sequence[Message],
        place: int,
        decode: Decode,
        owner: str,
        workers: Executor,
        end_silence: float | None = None,
        lookahead: float | None = None,
    ):
        self.engine, self.messages, self.decode, self.owner = engine, list(messages), decode, owner
        self.place, self.pauses = place, Pauses(end_silence)
        self.num_bytes = sum(len(part.bytes or b"") for message in messages for part in message.content)
        self._workers, self._pcm = workers, bytearray()
        self._ear = Ear(engine) if lookahead is None else EarlyEar(engine, lookahead)
        self._reading = asyncio.Lock()  # one worker at most is at work for a turn
        self._ahead: tuple[int, asyncio.Task[Answer]] | None = None  # samples of a recording, and the answer to it
        self._settling: asyncio.Task[None] | None = None
        self._taking_in: asyncio.Task[None] | None = None  # what is settled, by the LLM
        self._num_taken_in = 0  # embeddings
        self._num_mine = 0  # prompts in the engine that the answer's takes the place of

    @property
    def ahead(self) -> bool:
        """Whether the answer to what was said is in work already."""
        return self._ahead is not None and self._ahead[0] == self.pauses.kept

    async def begin(self) -> None:
        """Read the media and compute what stands before the recording.

        Raises:
            as `Engine.submit`.
        """
        last = self.messages[-1]
        await submit(self.engine, self.messages, FIRST, self.owner, last.content[self.place])

    def open(self, opened: set[Kind]) -> None:
        """Begin to make what an interface has not until it first hears something, before anything is said, unless its kind of
        reading is among ``opened``; it is added to them."""
        if (self.engine, type(self._ear)) not in opened:
            self._settling = _in_advance(self._open(opened))

    def hear(self, pcm: bytes) -> None:
        """The next samples; may start an answer, or drop one that is out of date."""
        self._pcm += pcm
        self.pauses.push(np.frombuffer(pcm, "<i2"))
        if self._ahead is not None and not self.ahead:
            self._drop()
        if self._ear.due(self.pauses.kept) and (self._settling is None or self._settling.done()):
            self._settling = _in_advance(self._settle())
        paused = 0 < self.pauses.voiced_until <= self.pauses.samples - TAIL
        if paused and self._ahead is None and self._has_room():
            self._stop_taking_in()  # it would be waited for, and the answer's prompt has all of it
            self._ahead = self.pauses.kept, asyncio.ensure_future(self._answer(self.pauses.kept))

    async def answer(self) -> Answer:
        """The answer, when nothing more is said.

        Raises:
            RequestError: nothing was said, or as `Engine.submit`.
        """
        if not self.pauses.samples:
            raise RequestError("no sound has arrived: send 16-bit samples before the end")
        if self._ahead is not None and self.ahead:
            task = self._ahead[1]
            await asyncio.wait({task})
            if task.exception() is None:  # an error may have been the moment's, such as a full queue
                return task.result()
        self._stop_settling()  # the answer's own prompt is computed at once
        return await self._answer(self.pauses.kept)

    def close(self) -> None:
        """Let go of what is in work."""
        self._drop()
        self._stop_settling()

    def _has_room(self) -> bool:
        """What may be dropped must not take the place of another's answer."""
        return 2 * (self.engine.load[1] - self._num_mine) < self.engine.config.max_batch

    def _drop(self) -> None:
        if self._ahead is not None:
            _, task = self._ahead
            self._ahead = None
            task.add_done_callback(abandon)
            task.cancel()

    async def _open(self, opened: set[Kind]) -> None:
        await self._run(lambda _: self._ear.open(), 0)
        opened.add((self.engine, type(self._ear)))
        await self._settle()

    async def _settle(self) -> None:
        """Settle what is due, and let the LLM take it in while nobody waits for it."""
        while self._ear.due(self.pauses.kept):
            await self._run(self._ear.step, self.pauses.kept)
            settled = self._ear.settled
            idle = self._ahead is None and (self._taking_in is None or self._taking_in.done())
            if settled is not None and settled.num_embeds - self._num_taken_in >= WORTHWHILE and idle and self._has_room():
                self._taking_in = _in_advance(self._take_in(settled))

    async def _take_in(self, settled: EarlyPart) -> None:
        prompt = await submit(self.engine, self._with(settled), FIRST, self.owner, settled)
        self._num_mine = 1
        try:
            async for _ in prompt:
                pass
            self._num_taken_in = settled.num_embeds
        finally:
            self._num_mine = 0
            prompt.cancel()

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        self._stop_taking_in()

    def _stop_taking_in(self) -> None:
        if self._taking_in is not None:
            self._taking_in.cancel()

    async def _answer(self, samples: int) -> Answer:
        while self._ear.due(samples):
            await self._run(self._ear.step, samples)
        recording = await self._run(self._ear.read, samples)
        return await submit(self.engine, self._with(recording), self.decode, self.owner)

    async def _run(self, read: Callable[[bytes], T], samples: int) -> T:
        """What a worker makes of the recording so far; cancelled, it still waits for the worker."""
        pcm = bytes(self._pcm[: 2 * samples])
        async with self._reading:
            work = asyncio.get_running_loop().run_in_executor(self._workers, read, pcm)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait({work})
                raise

    def _with(self, recording: Part) -> list[Message]:
        """The conversation with the recording in it."""
        *before, last = self.messages
        content = (*last.content[: self.place], recording, *last.content[self.place + 1 :])
        return [*before, replace(last, content=content)]
