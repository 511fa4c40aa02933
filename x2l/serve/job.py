"""One conversation on its way through the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from x2l.data.collate import stack
from x2l.model import XLLM
from x2l.serve.answer import Answer, Decode
from x2l.serve.store import Symbols, common
from x2l.serve.text import TextStream
from x2l.splice import splice
from x2l.template import Row
from x2l.types import Part


def content_key(modality: str, blob: bytes) -> str:
    """What identifies a media file's embeddings."""
    return f"{modality}:{hashlib.sha256(blob).hexdigest()}"


Piece = tuple[str, Tensor]  # embeddings (U, D), and what identifies them


@dataclass(frozen=True, eq=False)
class EarlyPart(Part):
    """A media item whose embeddings are known, in pieces; prompts that begin with the same pieces share their states."""

    pieces: tuple[Piece, ...] = ()

    def __post_init__(self) -> None:
        """It has no source but these."""

    @property
    def num_embeds(self) -> int:
        return sum(len(embeds) for _, embeds in self.pieces)


@dataclass
class Item:
    """A media item; ``key`` is its `content_key`, ``inputs`` the encoder's (None when embeddings are known)."""

    modality: str
    key: str
    inputs: dict[str, Tensor] | None = None
    embeds: Tensor | None = None  # (U, D)
    pieces: tuple[Piece, ...] = ()  # of which they consist; else they are one

    @property
    def marks(self) -> list[tuple[tuple[str, int], int]]:
        """Symbols for the embeddings, and how many each stands for."""
        assert self.embeds is not None
        return [((key, len(embeds)), len(embeds)) for key, embeds in self.pieces or [(self.key, self.embeds)]]


@dataclass(eq=False)
class Job:
    """A request, and how far it is."""

    answer: Answer
    row: Row
    items: list[Item]  # in reading order
    decode: Decode
    owner: str
    limit: int  # tokens of the answer
    generator: torch.Generator
    text: TextStream
    deadline: float  # time.monotonic()
    ids: list[int] = field(default_factory=list)  # the answer
    symbols: Symbols = ()  # what stands in the prompt, by content; the first one is the owner, of no width
    widths: tuple[int, ...] = ()  # positions that each symbol takes
    embeds: Tensor | None = None  # (1, L, D)
    prompt_length: int = 0
    cache: Any = None
    length: int = 0  # positions of the prompt that ``cache`` holds

    def over(self, now: float) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.answer.cancelled or now > self.deadline

    def shared(self, other: Job) -> int:
        """Positions that both prompts begin with, as far as both are marked."""
        return sum(self.widths[: common(self.symbols, other.symbols)])

    def mark(self) -> None:
        """Say what stands in the prompt, up to the first item whose embeddings are not known; sets symbols and widths."""
        items, marks = iter(self.items), list[tuple[Hashable, int]]()
        for i in self.row.ids:
            item = next(items) if i < 0 else None
            if item is not None and item.embeds is None:
                break
            marks += [(i, 1)] if item is None else item.marks
        self.symbols, self.widths = (self.owner, *(m[0] for m in marks)), (0, *(m[1] for m in marks))

    def lay_out(self, model: XLLM) -> None:
        """Splice the items' embeddings into the prompt's; sets embeds and the answer's counts, too."""
        self.mark()
        ids = torch.tensor([self.row.ids], device=model.device)
        text = model.llm.get_input_embeddings()(ids.clamp_min(0))
        by_name: dict[str, list[Tensor]] = {}
        for item in self.items:
            assert item.embeds is not None
            by_name.setdefault(item.modality, []).append(item.embeds)
        media = {model.sentinels[name]: stack(embeds) for name, embeds in by_name.items()}
        reach = torch.full_like(ids, ids.shape[1])
        self.embeds = splice(ids, ids, reach, text, media).embeds
        self.prompt_length = self.answer.usage.prompt = self.embeds.shape[1]
        self.answer.usage.media = {name: sum(map(len, embeds)) for name, embeds in by_name.items()}
