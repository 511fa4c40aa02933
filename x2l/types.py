"""The plain data that flows through X2L: samples on the text side, tensors on the model side.

Shape letters, used everywhere: B rows, S input length, L spliced length, N media items, F frames or patches,
Q queries, E encoder width, D LLM width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

IGNORE_INDEX = -100  # a label that carries no loss (the convention of torch and transformers)


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the code; users see the message without a traceback."""


SOURCES = ("path", "url", "bytes", "key", "features")


@dataclass(frozen=True)
class Part:
    """One piece of a message: text, or one media item given by exactly one source.

    ``type`` is ``"text"`` or the name of a modality (``"image"``, ``"video"``, ``"speech"``, ``"audio"``, ...).
    """

    type: str
    text: str | None = None
    path: str | None = None
    url: str | None = None
    bytes: bytes | None = None
    key: str | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if self.type == "text":
            if self.text is None or given:
                raise ValueError(f"a text part carries 'text' alone, got text={self.text!r} and {given}")
        elif len(given) != 1 or self.text is not None:
            raise ValueError(f"a {self.type} part carries exactly one of {SOURCES}, got {given or 'none of them'}")


@dataclass(frozen=True)
class Message:
    """One turn. ``role`` is ``system``, ``user`` or ``assistant``; content is an ordered tuple of parts."""

    role: str
    content: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {self.role!r}: use system, user or assistant")
        if self.role != "user" and any(part.type != "text" for part in self.content):
            raise ValueError(f"media may stand in user messages only, not in a {self.role} message")

    @property
    def text(self) -> str:
        """All text of the message, media left out."""
        return "".join(part.text or "" for part in self.content)


@dataclass(frozen=True)
class Sample:
    """One conversation, in the one shape that training, evaluation and chat share (docs/data_format.md)."""

    id: str
    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> list[Part]:
        """Every media part, in reading order."""
        return [part for message in self.messages for part in message.content if part.type != "text"]

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Sample:
        """Build a sample from its JSON form; a string as content is one text part.

        Raises:
            ValueError: a field is missing, unknown, or of the wrong type; the message names it.
        """
        try:
            messages = tuple(_message(m) for m in row["messages"])
            meta = row.get("meta", {})
            if not isinstance(meta, dict):
                raise ValueError(f"meta must be an object, got {meta!r}")
            return cls(id=str(row["id"]), messages=messages, meta=meta)
        except (KeyError, TypeError) as error:
            raise ValueError(f"sample {str(row)[:200]}: {error!r}") from error


def _message(row: dict[str, Any]) -> Message:
    content = row["content"]
    if isinstance(content, str):
        return Message(row["role"], (Part("text", text=content),))
    return Message(row["role"], tuple(Part(**part) for part in content))


def user(*content: str | Part) -> Message:
    """A user message from strings and media parts, in reading order."""
    return Message("user", tuple(Part("text", text=c) if isinstance(c, str) else c for c in content))


def assistant(text: str) -> Message:
    """An assistant message."""
    return Message("assistant", (Part("text", text=text),))


class Features(NamedTuple):
    """Variable-length sequences: the only currency between encoder, interface and LLM."""

    x: Tensor  # (N, F, E), right-padded
    lengths: Tensor  # (N,) int64, valid frames of each item


@dataclass
class Media:
    """All items of one modality in a batch, in reading order: processed inputs, or cached encoder features."""

    inputs: dict[str, Tensor] | None = None
    features: Features | None = None


@dataclass
class Batch:
    """Token rows with one negative sentinel id for each media item.

    ``reach`` says who sees whom: the token at position k may be attended to by positions q with k <= q < reach[k].
    A plain row has reach = its length, a packed row the end of each sample, and rows that share a prefix (several
    answers about one photo) the end of each branch; 0 marks padding.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE_INDEX outside the answers
    reach: Tensor  # (B, S) int64
    media: dict[str, Media]


@dataclass
class Output:
    """What a training step needs: a sum and its count, so that any number of ranks and micro-batches add up."""

    loss_sum: Tensor  # scalar, summed cross-entropy (nats) over supervised tokens
    num_tokens: int
    logs: dict[str, float] = field(default_factory=dict)
