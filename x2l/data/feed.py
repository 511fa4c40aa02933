"""An endless, exactly resumable order of records: what stands at step k is a function of the seed and k alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
        bucket: batches hold media of similar size, which saves padding: within each run of this many batches of the
            permutation, records are sorted by the bytes of their media, and the batches shuffled. 0 = no such order.
    """

    def __init__(self, streams: Sequence[Stream], batch_size: int, seed: int, max_bad: float = 0.01, bucket: int = 0):
        self.batch_size, self.seed, self.bucket = batch_size, seed, bucket
        self.index = [(stream, i) for stream in streams for i in range(len(stream.records))]
        if not self.index:
            raise DataError("the mixture holds no record")
        self.issues = Issues(total=len(self.index), max_fraction=max_bad)
        self._order: tuple[int, list[int]] = (-1, [])
        self._sizes = [self._size(*at) for at in self.index] if bucket else []

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
            rng = random.Random(f"{self.seed}/{epoch}")
            rng.shuffle(order)
            self._order = epoch, self._bucketed(order, epoch, rng) if self.bucket else order
        return self._order[1]

    def _bucketed(self, order: list[int], epoch: int, rng: random.Random) -> list[int]:
        first = -epoch * len(order) % self.batch_size  # these complete the last batch of the epoch before
        run = self.bucket * self.batch_size
        parts = [sorted(order[i : i + run], key=self._sizes.__getitem__) for i in range(first, len(order), run)]
        batches = [part[i : i + self.batch_size] for part in parts for i in range(0, len(part), self.batch_size)]
        short = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        return [*order[:first], *(i for batch in batches for i in batch), *short]

    def _size(self, stream: Stream, i: int) -> int:
        try:
            return sum(map(len, stream.records[i].media.values()))
        except DataError:  # counted when its turn comes
            return 0


def open_feed(sources: Sequence[Any], root: str, batch_size: int, seed: int, bucket: int = 0) -> Feed:
    """The feed of a recipe's sources (``path``, ``tasks``), their paths relative to ``root``."""
    streams = []
    for source in sources:
        globs = [source.path] if isinstance(source.path, str) else source.path
        records: Sequence[Record] = read_source([str(Path(root) / glob) for glob in globs])
        if source.where:
            records = subset(records, partial(holds, source.where))
        if source.holdout:
            records = subset(records, partial(in_part, source.holdout))
        streams.append(Stream(records, source.tasks))
    return Feed(streams, batch_size, seed, bucket=bucket)


class Subset(Sequence[Record]):
    """The records at some indices."""

    def __init__(self, records: Sequence[Record], chosen: Sequence[int]):
        self.records, self.chosen = records, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: Any) -> Any:
        return self.records[self.chosen[i]]


def subset(records: Sequence[Record], wanted: Callable[[Record], bool]) -> Subset:
    """The records that are ``wanted``; unreadable ones stay, and are counted when their turn comes."""
    chosen = []
    for i in range(len(records)):
        try:
            record = records[i]
        except DataError:
            chosen.append(i)
            continue
        if wanted(record):
            chosen.append(i)
    return Subset(records, chosen)


def holds(fields: Mapping[str, Any], record: Record) -> bool:
    """Whether a record has these values."""
    return all(record.fields.get(name) == value for name, value in fields.items())


def in_part(split: Any, record: Record) -> bool:
    """Whether a record is in the part of a split (``field``, ``percent``, ``part``)."""
    return held_out(record, split.field, split.percent) == (split.part == "held_out")


def held_out(record: Record, field: str, percent: int) -> bool:
    """Whether a record is in the held-out part: its value of ``field`` decides, by hash.

    Raises:
        DataError: the record has no such field.
    """
    if field not in record.fields:
        raise DataError(f"{record.key}: no field {field!r} to split by, it has {', '.join(record.fields)}")
    return int.from_bytes(hashlib.sha256(str(record.fields[field]).encode()).digest()[:4]) % 100 < percent
