"""A model that is ready to talk: messages in, text out, streamed or whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from x2l.build import Built, build, split_importer
from x2l.checkpoint import sha256
from x2l.config import digest, load_model_config
from x2l.data.collate import Collator, raw
from x2l.data.media import SAMPLE_RATE
from x2l.recognizer import in_pieces
from x2l.types import Message, Part, Sample
from x2l.weights import resolve

log = logging.getLogger(__name__)


class Assistant:
    """Chat, captioning and evaluation on one loaded model.

    >>> assistant = Assistant.load("tiny")
    >>> for piece in assistant.stream([user(Part("image", path="photo.jpg"), "What is happening here?")]):
    ...     print(piece, end="")
    """

    def __init__(self, built: Built):
        self.model = built.model.eval()
        self.config = built.config
        self.renderer = built.renderer
        self.tokenizer = built.renderer.tokenizer
        self.collator = Collator(built.renderer, built.processors, built.decoders, built.decode)

    @classmethod
    def load(cls, name: str = "tiny", overrides: Sequence[str] = ()) -> Assistant:
        """Build a model recipe by shipped name or path, fetching its frozen weights on first use.

        Modalities without trained weights are left out, for untrained interfaces tell the LLM nothing; the log names them.
        """
        config = load_model_config(name, overrides)
        trained = {modality: part for modality, part in config.modalities.items() if part.weights}
        if untrained := config.modalities.keys() - trained.keys():
            log.warning("%s reads no %s: no weights of a trained interface are given", name, " and no ".join(sorted(untrained)))
        return cls(build(config.model_copy(update={"modalities": trained})))

    @property
    def reads(self) -> list[str]:
        """The modalities that this model takes."""
        return list(self.model.modalities)

    def stream(self, messages: Sequence[Message], max_new_tokens: int = 128, **sampling: Any) -> Iterator[str]:
        """The answer to a conversation, in pieces of text as they are decoded; their concatenation is the answer.

        ``sampling`` holds temperature, top_p and generator of `XLLM.stream`.
        """
        batch, ids, sent = self.collator.prompt([messages]), [], ""
        for (token,) in self.model.stream(batch, max_new_tokens, eos=self.eos, **sampling):
            if token is None:
                break
            ids.append(token)
            text = self.decode(ids)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(sent) :]
                sent = text
        yield self.decode(ids)[len(sent) :]

    def generate_text(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 128,
        tokens_a_second: float | None = None,
        piece_seconds: float | None = None,
        **decode: Any,
    ) -> list[str]:
        """One whole answer for each sample's messages, as a batch.

        Args:
            tokens_a_second: of the speech in a sample; what is written down has no more, against endless repetition.
            piece_seconds: a longer recording is cut into pieces, each is answered alone, and the answers are joined; for what
                is written down, of samples with one recording.
            decode: as in `XLLM.generate`.

        Raises:
            ValueError: with ``piece_seconds``, a sample has not one recording.
        """
        if piece_seconds is not None:
            cut = [self._cut_up(sample, piece_seconds) for sample in samples]
            written = iter(self.generate_text([piece for each in cut for piece in each], max_new_tokens, tokens_a_second, **decode))
            return [" ".join(next(written) for _ in each) for each in cut]
        limits: int | list[int] = max_new_tokens
        if tokens_a_second is not None:
            limits = [min(max_new_tokens, max(1, int(self._seconds(sample) * tokens_a_second))) for sample in samples]
        batch = self.collator.prompt([sample.messages for sample in samples])
        answers = self.model.generate(batch, limits, eos=self.eos, pad=self.renderer.eos, **decode)
        return [self.decode(ids).strip() for ids in answers]

    def _seconds(self, sample: Sample) -> float:
        return sum(len(self.collator.decode("speech", raw(part))) for part in sample.media if part.type == "speech") / SAMPLE_RATE

    def _cut_up(self, sample: Sample, seconds: float) -> list[Sample]:
        recordings = [part for part in sample.media if part.type == "speech"]
        if len(recordings) != 1:
            raise ValueError(f"{sample.id}: {len(recordings)} recordings, to be cut into pieces it takes one")
        wave = self.collator.decode("speech", raw(recordings[0]))
        if len(wave) <= seconds * SAMPLE_RATE:
            return [sample]

        def with_piece(blob: bytes) -> Sample:
            part = Part("speech", bytes=blob)
            changed = (tuple(part if each is recordings[0] else each for each in message.content) for message in sample.messages)
            return replace(sample, messages=tuple(map(Message, (m.role for m in sample.messages), changed)))

        return [with_piece(blob) for blob, _ in in_pieces(wave, seconds)]

    def render(self, sample: Sample) -> str:
        """The prompt as the model reads it, each media item as ``<type>``."""
        names = {sentinel: f"<{name}>" for name, sentinel in self.model.sentinels.items()}
        ids = self.renderer.prompt(sample.messages).ids
        runs = [(key, list(run)) for key, run in groupby(ids, key=lambda i: i if i < 0 else 0)]
        return "".join(names[key] * len(run) if key else self.tokenizer.decode(run) for key, run in runs)

    def info(self, reads: Sequence[str] | None = None) -> dict[str, Any]:
        """What identifies this model in a record: recipe hash, hashes of the trained interfaces, device and dtype.

        ``reads``: the modalities that answers depend on, all by default.
        """
        parts = {name: part for name, part in self.config.modalities.items() if reads is None or name in reads}
        return {
            "checkpoint": digest(self.config.model_copy(update={"modalities": parts})),
            "interfaces": {name: sha256(resolve(split_importer(part.weights)[1])) for name, part in parts.items() if part.weights},
            "device": str(self.model.device),
            "dtype": str(self.model.llm.dtype),
        }

    @property
    def eos(self) -> list[int]:
        """Ids that end an answer."""
        configured = self.model.llm.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return sorted({self.renderer.eos, *(i for i in more if i is not None)})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
