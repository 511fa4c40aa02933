"""A spoken turn: the sound arrives while the person speaks, and the answer is ready, or nearly, when they have finished.

Encoder, listener and C-Former look at a whole recording, so that every new sound may change every embedding of it: nothing
that is computed before its end is certain. What runs ahead is therefore

- what stands before the recording (instructions, earlier turns, media): its states, from the first moment;
- windows of the encoder that are complete (`MoonshineEncoder.grow`): final, whatever comes;
- in each pause, the answer to what was said so far. If nothing more is said it is the answer; else it is dropped.

The recording ends `TAIL` after the last voice in it, so that the answer begun in the last pause is the answer to the very
same samples: equal to that of a recorded file by construction, since it is computed from the same bytes by the same code.

With ``phrases`` each phrase is a recording of its own, so that all but the last one are read, and taken in by the LLM, while
the person goes on: the answer is then that to the phrases' files, side by side in one message.
"""

from __future__ import annotations

import asyncio
import io
import wave
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from x2l.serve.answer import Answer, Decode, RequestError
from x2l.serve.chat import abandon, submit
from x2l.serve.engine import Engine
from x2l.serve.job import content_key
from x2l.serve.pauses import RATE, TAIL, Clip, Pauses
from x2l.types import Features, Media, Message, Part


def wav(pcm: bytes) -> bytes:
    """The WAV file of 16-bit mono samples at 16 kHz."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm)
    return buffer.getvalue()


class Ear:
    """The speech interface on one growing recording, outside the engine's thread."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._modality: Any = engine.model.modalities["speech"]
        self._done: list[np.ndarray] = []  # features of the encoder's windows that are complete

    @torch.inference_mode()
    def read(self, pcm: bytes, key: str) -> None:
        """Put the embeddings of the recording so far, which begins with what earlier calls were given, among the engine's.

        Raises:
            RequestError: it is longer than the interface can take.
        """
        sound = np.frombuffer(pcm, "<i2").astype(np.float32) / 32_768
        try:
            if grow := getattr(self._modality.encoder, "grow", None):
                media = Media(features=grow(sound, self._done))
            else:
                media = Media(inputs=self._engine.assistant.collator.processors["speech"]([sound]))
            read: Features = self._modality(media)
        except ValueError as error:
            raise RequestError(f"the model cannot read this recording of {len(sound) / RATE:.1f} s") from error
        self._engine.embeddings.put(key, read.x[0, : int(read.lengths[0])].clone())


class VoiceTurn:
    """A conversation whose last message has a recording that is still being made.

    Args:
        engine: computes the answer.
        messages: the conversation; ``place`` is the index, in the last message, of the part that the recording becomes.
        decode: how to answer.
        owner: whoever asks.
        workers: run the speech interface.
        end_silence: seconds of silence that end the speech, if anything but the client does.
        phrases: whether each phrase is a recording of its own.
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
        phrases: bool = False,
    ):
        self.engine, self.messages, self.decode, self.owner = engine, list(messages), decode, owner
        self.place, self.pauses = place, Pauses(end_silence)
        self.num_bytes = sum(len(part.bytes or b"") for message in messages for part in message.content)
        self._by_phrase, self._workers, self._pcm = phrases, workers, bytearray()
        self._ears: defaultdict[int, Ear] = defaultdict(lambda: Ear(engine))  # by where their clip begins
        self._ahead: tuple[list[Clip], asyncio.Task[Answer]] | None = None  # clips, and the answer to them

    @property
    def clips(self) -> list[Clip]:
        """What counts as the person's recordings, if nothing more is said."""
        return self.pauses.phrases if self._by_phrase else [self.pauses.whole]

    @property
    def ahead(self) -> bool:
        """Whether the answer to what counts is in work already."""
        return self._ahead is not None and self._ahead[0] == self.clips

    async def begin(self) -> None:
        """Read the media and compute what stands before the recording.

        Raises:
            as `Engine.submit`.
        """
        last = self.messages[-1]
        await submit(self.engine, self.messages, Decode(max_new_tokens=1), self.owner, last.content[self.place])

    def hear(self, pcm: bytes) -> None:
        """The next samples; may start an answer, or drop one that is out of date."""
        self._pcm += pcm
        self.pauses.push(np.frombuffer(pcm, "<i2"))
        if self._ahead is not None and not self.ahead:
            self._drop()
        paused = 0 < self.pauses.voiced_until <= self.pauses.samples - TAIL
        if paused and self._ahead is None and self._has_room():
            self._ahead = self.clips, asyncio.ensure_future(self._answer(self.clips))

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
        return await self._answer(self.clips)

    def close(self) -> None:
        """Let go of what is in work."""
        self._drop()

    def _has_room(self) -> bool:
        """An answer that may be dropped must not take the place of another's."""
        return 2 * self.engine.load[1] < self.engine.config.max_batch

    def _drop(self) -> None:
        if self._ahead is not None:
            _, task = self._ahead
            self._ahead = None
            task.add_done_callback(abandon)
            task.cancel()

    async def _answer(self, clips: list[Clip]) -> Answer:
        recordings = []
        for begin, end in clips:
            pcm = bytes(self._pcm[2 * begin : 2 * end])
            blob = wav(pcm)
            key = content_key("speech", blob)
            if self.engine.embeddings.get(key) is None:
                await asyncio.get_running_loop().run_in_executor(self._workers, self._ears[begin].read, pcm, key)
            recordings.append(Part("speech", bytes=blob))
        *before, last = self.messages
        content = (*last.content[: self.place], *recordings, *last.content[self.place + 1 :])
        return await submit(self.engine, [*before, replace(last, content=content)], self.decode, self.owner)
