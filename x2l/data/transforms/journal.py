"""What a run has finished: an SQLite file that survives a kill at any moment, and shards that appear whole."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.sources import DataError, Record
from x2l.data.tools import add_member
from x2l.data.transforms.base import Skipped

TABLES = """
create table if not exists run (identity text not null);
create table if not exists chunks (number integer primary key, kept integer, skipped text, counts text, members blob);
"""


class Finished(NamedTuple):
    """A chunk of rows that is done: the tar members of its results, and what was left out."""

    number: int
    kept: int
    skipped: list[Skipped]
    counts: dict[str, int]
    members: bytes


def packed(records: Iterable[Record]) -> bytes:
    """Tar members of the records, without an end mark, so that chunks can be joined."""
    buffer = io.BytesIO()
    tar = tarfile.open(fileobj=buffer, mode="w")  # noqa: SIM115 closing would write the end mark
    for record in records:
        add_member(tar, record)
    return buffer.getvalue()


class Journal:
    """Finished chunks by number. A second run must have the same identity (transform, settings, source)."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self._db = sqlite3.connect(path)
        self._db.execute("pragma journal_mode=wal")
        self._db.executescript(TABLES)
        known = self._db.execute("select identity from run").fetchone()
        if known is None:
            with self._db:
                self._db.execute("insert into run values (?)", (json.dumps(identity, ensure_ascii=False),))
        elif differing := _difference(json.loads(known[0]), identity):
            raise DataError(f"{path} is the journal of another run ({differing}): remove it with its shards, or write elsewhere")

    def add(self, done: Finished) -> None:
        """Keep a chunk for good."""
        skipped, counts = (json.dumps(value, ensure_ascii=False) for value in (done.skipped, done.counts))
        with self._db:
            self._db.execute("insert into chunks values (?, ?, ?, ?, ?)", (done.number, done.kept, skipped, counts, done.members))

    def numbers(self) -> set[int]:
        return {number for (number,) in self._db.execute("select number from chunks")}

    def outcome(self) -> tuple[int, list[Skipped], Counter[str]]:
        """(rows kept, rows left out, counts) of all finished chunks, in the order of the rows."""
        kept, skipped, counts = 0, [], Counter[str]()
        for number, left, counted in self._db.execute("select kept, skipped, counts from chunks order by number"):
            kept += number
            skipped += [Skipped(*row) for row in json.loads(left)]
            counts.update(json.loads(counted))
        return kept, skipped, counts

    def write_shard(self, path: Path, chunks: range) -> None:
        """Join finished chunks to a shard that appears whole; none is written where nothing was kept.

        The chunks keep their numbers and give up their bytes. A shard that vanished afterwards is an error of ``lost``.
        """
        where = (chunks.start, chunks.stop - 1)
        kept, unwritten = self._db.execute(
            "select sum(kept), count(members) from chunks where number between ? and ?", where
        ).fetchone()
        if not unwritten:
            return
        if kept:
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                for (members,) in self._db.execute(
                    "select members from chunks where number between ? and ? order by number", where
                ):
                    file.write(members)
                file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark, padded as tarfile does
                file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        with self._db:
            self._db.execute("update chunks set members = null where number between ? and ?", where)

    def lost(self, path: Path, chunks: range) -> bool:
        """Whether a shard was written and is no longer there."""
        where = (chunks.start, chunks.stop - 1)
        row = "select 1 from chunks where kept > 0 and members is null and number between ? and ?"
        return not path.exists() and self._db.execute(row, where).fetchone() is not None

    def close(self) -> None:
        self._db.close()


def _difference(known: dict[str, Any], asked: dict[str, Any]) -> str:
    return ", ".join(_changes(known, asked))


def _changes(known: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    for name in sorted(known.keys() | asked.keys()):
        if known.get(name) != asked.get(name):
            yield f"{name}: {known.get(name)!r} there, {asked.get(name)!r} now"
