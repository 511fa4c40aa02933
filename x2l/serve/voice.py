"""A spoken turn: the sound arrives while the person speaks, and the answer is ready, or nearly, when they have finished.

Encoder, listener and C-Former look at the whole recording, so that every new sound may change every embedding: nothing
that is computed before the end is certain. What runs ahead is therefore

- what stands before the recording (instructions, earlier turns, media): its states, from the first moment;
- windows of the encoder that are complete (`MoonshineEncoder.grow`): final, whatever comes;
- in each pause, the answer to what was said so far. If nothing more is said it is the answer; else it is dropped.

The recording ends ``TAIL`` after the last voice in it, so that the answer begun in the last pause is the answer to the very
same samples: equal to that of a recorded file by construction, since it is computed from the same bytes by the same code.
"""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from x2l.assistant import Assistant
from x2l.serve.answer import Answer, Decode, RequestError
from x2l.serve.chat import abandon, submit
from x2l.serve.engine import Engine
from x2l.serve.job import content_key
from x2l.serve.pauses import RATE, Pauses
from x2l.types import Features, Media, Message, Part

TAIL = RATE // 5  # samples that are kept after the last voice; a pause that long starts an answer


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

    def __init__(self, assistant: Assistant):
        self._modality: Any = assistant.model.modalities["speech"]
        self._processor = assistant.collator.processors["speech"]
        self._done: list[np.ndarray] = []  # features of windows that are complete

    @torch.inference_mode()
    def __call__(self, pcm: bytes) -> Tensor:
        """Embeddings (U, D) of the recording so far, which must begin with what earlier calls were given.

        Raises:
            RequestError: it is longer than the interface can take.
        """
        sound = np.frombuffer(pcm, "<i2").astype(np.float32) / 32_768
        try:
            if grow := getattr(self._modality.encoder, "grow", None):
                media = Media(features=grow(sound, self._done))
            else:
                media = Media(inputs=self._processor([sound]))
            read: Features = self._modality(media)
        except ValueError as error:
            raise RequestError(f"the model cannot read this recording of {len(sound) / RATE:.1f} s") from error
        return read.x[0, : int(read.lengths[0])].clone()


class VoiceTurn:
    """A conversation whose last message has a recording that is still being made.

    Args:
        engine: computes the answer.
        messages: the conversation; ``place`` is the index, in the last message, of the part that the recording becomes.
        decode: how to answer.
        owner: whoever asks.
        workers: run the speech interface.
        end_silence: seconds of silence that end the speech, if anything but the client does.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Sequence[Message],
        place: int,
        decode: Decode,
        owner: str,
        workers: Executor,
        end_silence: float | None,
    ):
        self.engine, self.messages, self.decode, self.owner = engine, list(messages), decode, owner
        self.place, self.pauses = place, Pauses(end_silence)
        self.num_bytes = sum(len(part.bytes or b"") for message in messages for part in message.content)
        self._workers, self._ear, self._pcm = workers, Ear(engine.assistant), bytearray()
        self._ahead: tuple[int, asyncio.Task[Answer]] | None = None  # samples, and the answer to them

    @property
    def samples(self) -> int:
        """How many samples count: up to `TAIL` after the last voice, or all where there is none."""
        heard, voiced = self.pauses.samples, self.pauses.voiced_until
        return min(heard, voiced + TAIL) if voiced else heard

    @property
    def ahead(self) -> bool:
        """Whether the answer to what counts is in work already."""
        return self._ahead is not None and self._ahead[0] == self.samples

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
            self._ahead = self.samples, asyncio.ensure_future(self._answer(self.samples))

    async def answer(self) -> Answer:
        """The answer, when nothing more is said.

        Raises:
            RequestError: nothing was said, or as `Engine.submit`.
        """
        if not self.samples:
            raise RequestError("no sound has arrived: send 16-bit samples before the end")
        if self._ahead is not None and self.ahead:
            task = self._ahead[1]
            await asyncio.wait({task})
            if task.exception() is None:  # an error may have been the moment's, such as a full queue
                return task.result()
        return await self._answer(self.samples)

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

    async def _answer(self, samples: int) -> Answer:
        pcm = bytes(self._pcm[: 2 * samples])
        blob = wav(pcm)
        key = content_key("speech", blob)
        if self.engine.embeddings.get(key) is None:
            embeds = await asyncio.get_running_loop().run_in_executor(self._workers, self._ear, pcm)
            self.engine.embeddings.put(key, embeds)
        *before, last = self.messages
        parts = list(last.content)
        parts[self.place] = Part("speech", bytes=blob)
        return await submit(self.engine, [*before, replace(last, content=tuple(parts))], self.decode, self.owner)
