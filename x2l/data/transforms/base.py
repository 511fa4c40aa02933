"""What a transform is, and the note that it leaves in every record."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from x2l.data.sources import Record

PROVENANCE = "provenance"  # the field that lists, oldest first, what was done to a record


class Skipped(NamedTuple):
    """A row without a result: ``bad`` when something failed, else dropped on purpose (a filter, a duplicate)."""

    key: str
    reason: str
    bad: bool = True


@dataclass
class Done:
    """The results of some rows, in their order, and what was counted on the way (calls, tokens, retries, ...)."""

    rows: list[Record | Skipped]
    counts: Counter[str] = field(default_factory=Counter)


class Transform(Protocol):
    """A function of rows alone: the same rows and settings give the same results, whatever ran before.

    It is pickled to workers, so whatever it loads is loaded on first use. Threads may call it at the same time.

    Attributes:
        name: as in ``x2l data transform``.
        version: changes when the same settings no longer give the same results.
        batch: rows a call; a call is what an interrupted run repeats.
    """

    name: str
    version: str
    batch: int

    def settings(self) -> dict[str, Any]:
        """All that decides the results, as JSON; never a key or a machine's path."""

    def __call__(self, rows: Sequence[Record]) -> Done:
        """One result a row."""


def noted(
    record: Record, transform: Transform, fields: dict[str, Any], media: dict[str, bytes] | None = None, **facts: Any
) -> Record:
    """A copy of the record with new fields and media, and a note of the transform, its settings and these facts."""
    note = {"transform": transform.name, "version": transform.version, **transform.settings(), **facts}
    history = [*record.fields.get(PROVENANCE, []), note]
    return Record(record.key, record.fields | fields | {PROVENANCE: history}, record.media | (media or {}))


def rng_of(seed: int, key: str) -> random.Random:
    """A generator that depends on the seed and the row alone, so that order, batch and worker do not matter."""
    return random.Random(hashlib.sha256(f"{seed}/{key}".encode()).digest())
