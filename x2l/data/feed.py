"""An endless, exactly resumable order of records: what stands at step k is a function of the seed and k alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.sources import DataError, Issues, Record, read_source
from x2l.data.tasks import TASKS
from x2l.types import Sample


class Stream(NamedTuple):
    """Records of one source with the tasks that turn them into samples."""

    records: Sequence[Record]
    tasks: Mapping[str, Mapping[str, Any]]


class Feed:
    """Batches of samples; every epoch is a fresh permutation of all records of all streams.

    Args:
        streams: the mixture; a stream's share is its number of records.
        batch_size: records a batch.
        seed: of order and of the tasks' random choices.
        max_bad: fraction of unreadable records that is tolerated.
    """

    def __init__(self, streams: Sequence[Stream], batch_size: int, seed: int, max_bad: float = 0.01):
        self.batch_size, self.seed = batch_size, seed
        self.index = [(stream, i) for stream in streams for i in range(len(stream.records))]
        if not self.index:
            raise DataError("the mixture holds no record")
        self.issues = Issues(total=len(self.index), max_fraction=max_bad)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches an epoch."""
        return max(1, len(self.index) // self.batch_size)

    def batch(self, step: int) -> list[list[Sample]]:
        """The samples of each record of micro-batch ``step``; unreadable records are counted and left out."""
        families = [self._samples(step * self.batch_size + i) for i in range(self.batch_size)]
        return [family for family in families if family]

    def _samples(self, at: int) -> list[Sample]:
        epoch, place = divmod(at, len(self.index))
        stream, i = self.index[self._permutation(epoch)[place]]
        try:
            record = stream.records[i]
            rng = random.Random(hashlib.sha256(f"{self.seed}/{epoch}/{record.key}".encode()).digest())
            return [s for name, options in stream.tasks.items() for s in TASKS[name](record, rng, **options)]
        except DataError as error:
            self.issues.add(f"row {i} of {len(stream.records)}", error)
            return []

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.index)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1]


def open_feed(sources: Sequence[Any], root: str, batch_size: int, seed: int) -> Feed:
    """The feed of a recipe's sources (``path``, ``tasks``), their paths relative to ``root``."""
    streams = []
    for source in sources:
        globs = [source.path] if isinstance(source.path, str) else source.path
        streams.append(Stream(read_source([str(Path(root) / glob) for glob in globs]), source.tasks))
    return Feed(streams, batch_size, seed)
