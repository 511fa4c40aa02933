"""Conversations on their way in: checked, rendered, their media decoded, in the thread of whoever asks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from x2l.assistant import Assistant
from x2l.data.collate import Decoder, raw
from x2l.serve.answer import Answer, Decode, RequestError
from x2l.serve.job import EarlyPart, Item, Job, content_key
from x2l.serve.store import EmbeddingStore
from x2l.serve.text import TextStream
from x2l.types import Message, Part

log = logging.getLogger(__name__)
DecodeMedia = Callable[[Decoder, bytes, Mapping[str, Any]], Any]  # decoder, file, options -> what a processor takes


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine; bytes are bytes, times seconds."""

    max_batch: int = 8
    max_queue: int = 64
    max_new_tokens: int = 1024  # of one answer
    max_text_chars: int = 1_000_000  # of one conversation, before it is tokenised
    prefill_chunk: int = 512  # positions of prompts that are computed between two tokens of the answers in progress
    kv_bytes: int = 2 << 30  # states of all answers in progress
    prefix_bytes: int = 512 << 20
    embedding_bytes: int = 256 << 20
    packed_bytes: int = 3 << 29  # of weights in a layout for few rows; a larger LLM, or one unlike LLaMA, goes without
    weight_bits: int = 16  # of the LLM's weights in that layout: 8 or 4, of an LLM in bfloat16; 16: as they are
    request_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.weight_bits not in (16, 8, 4):
            raise ValueError(f"weight bits must be 16, 8 or 4, got {self.weight_bits}")
        for name, least in {"max_batch": 1, "max_queue": 0, "max_new_tokens": 1, "prefill_chunk": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")


@dataclass
class Stats:
    """Counts since the start."""

    requests: int = 0
    completed: int = 0
    cancelled: int = 0
    refused: int = 0
    errors: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    embedding_hits: int = 0
    embedding_misses: int = 0


class Intake:
    """Makes jobs of conversations.

    Args:
        assistant: the loaded model.
        config: its bounds.
        embeddings: of media that are known.
        stats: counts how many were.
        decode_media: opens media files; by default they are trusted and opened in this process.
    """

    def __init__(
        self,
        assistant: Assistant,
        config: EngineConfig,
        embeddings: EmbeddingStore,
        stats: Stats,
        decode_media: DecodeMedia | None = None,
    ):
        self.assistant, self.config, self.embeddings, self.stats = assistant, config, embeddings, stats
        self._decode_media = decode_media
        self.context: int = getattr(assistant.model.llm.config, "max_position_embeddings", None) or 1 << 20
        self._tokenizer = threading.Lock()  # it switches between scaffold and content: two threads would mix them up

    def job(self, messages: Sequence[Message], decode: Decode, owner: str = "", upto: Part | None = None) -> Job:
        """A conversation, ready for the engine; ``upto`` as in `Engine.submit`.

        Raises:
            RequestError: the model does not read a modality, a file is broken, or the text alone exceeds the context.
        """
        reads = self.assistant.reads
        parts = [part for message in messages for part in message.content]
        chars = sum(len(part.text or "") for part in parts)
        if chars > self.config.max_text_chars:
            raise RequestError(f"the conversation has {chars} characters, the limit is {self.config.max_text_chars}")
        for part in parts:
            if part.type != "text" and part.type not in reads:
                raise RequestError(f"this model reads text{''.join(f', {name}' for name in reads)}; it cannot read {part.type}")
        try:
            with self._tokenizer:
                row = self.assistant.renderer.prompt(messages)
            row = row if upto is None else row.upto(upto, isinstance(upto, EarlyPart))
        except (ValueError, TemplateError) as error:
            raise RequestError(f"the model's chat template refuses this conversation: {error}") from error
        limit = min(decode.max_new_tokens or self.config.max_new_tokens, self.config.max_new_tokens)
        self.check_context(row.text_length, decode)
        items = [self._item(part) for part in row.media]
        generator = torch.Generator(device=self.assistant.model.device)
        if decode.seed is None:
            generator.seed()
        else:
            generator.manual_seed(decode.seed)
        deadline = time.monotonic() + self.config.request_seconds
        job = Job(Answer(), row, items, decode, owner, limit, generator, TextStream(self._text, decode.stop), deadline)
        job.mark()
        return job

    def check_context(self, length: int, decode: Decode) -> None:
        """Refuse a prompt of ``length`` positions that leaves no room for its answer.

        Raises:
            RequestError: with the counts.
        """
        new = decode.max_new_tokens or 1
        if length + new > self.context:
            raise RequestError(
                f"{length} tokens of prompt and media + {new} of answer exceed the context of {self.context}; shorten the "
                "conversation, use fewer media or a smaller max_tokens"
            )

    def decoded(self, modality: str, blob: bytes) -> Any:
        """A file as the modality's processor takes it, decoded within the server's bounds.

        Raises:
            MediaError: it is broken or too large.
        """
        collator = self.assistant.collator
        if self._decode_media is None:
            return collator.decode(modality, blob)
        return self._decode_media(collator.decoders[modality], blob, collator.options.get(modality, {}))

    def _text(self, ids: Sequence[int]) -> str:
        with self._tokenizer:
            return self.assistant.decode(ids)

    def _item(self, part: Part) -> Item:
        modality = part.type
        if isinstance(part, EarlyPart):
            return Item(modality, "", embeds=torch.cat([embeds for _, embeds in part.pieces]), pieces=part.pieces)
        blob = raw(part)
        key = content_key(modality, blob)
        if (known := self.embeddings.get(key)) is not None:
            self.stats.embedding_hits += 1
            return Item(modality, key, embeds=known)
        self.stats.embedding_misses += 1
        decoded = self.decoded(modality, blob)
        try:
            return Item(modality, key, self.assistant.collator.processors[modality]([decoded]))
        except ValueError as error:
            log.warning("a processor refused a %s: %s", modality, error)
            raise RequestError(f"this {modality} is of a kind or length that the model cannot read") from error
