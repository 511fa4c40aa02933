"""What builders yield, and how they read the tables of official releases."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.sources import DataError


class Entry(NamedTuple):
    """A row to be: its key, its JSON object, and where its media files lie, by extension."""

    key: str
    fields: dict[str, Any]
    files: dict[str, Path]


class Bad(NamedTuple):
    """A row of the release that says nothing usable."""

    key: str
    reason: str


Entries = Iterator[Entry | Bad]


def need(path: Path) -> Path:
    """The path, if it exists; else an error that names what the release should hold."""
    if not path.exists():
        raise DataError(f"{path} is missing: is this the root of the unpacked release?")
    return path


def read_json(path: Path) -> Any:
    """A whole JSON file; one that is broken stops the build, as no row of it can be trusted."""
    try:
        return json.loads(need(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(name of the line, text) of a UTF-8 file; undecodable bytes become U+FFFD, which ``checked`` refuses."""
    with need(path).open(encoding="utf-8", errors="replace", newline=None) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path.name}:{number}", line.rstrip("\n")


def read_pairs(path: Path) -> Iterator[tuple[str, str] | Bad]:
    """(first word, rest) of each line, as in the tables of Kaldi and of Flickr captions."""
    for name, line in read_lines(path):
        first, *rest = line.split(maxsplit=1)
        yield (first, rest[0].strip()) if rest and checked(rest[0]) else Bad(name, f"expected '<id> <text>', got {line[:80]!r}")


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header line."""
    with need(path).open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file)


def checked(text: object) -> bool:
    """Whether it is a text with something in it, read without loss."""
    return isinstance(text, str) and bool(text.strip()) and "\ufffd" not in text


def grouped(pairs: Iterable[tuple[str, str] | Bad]) -> tuple[dict[str, list[str]], list[Bad]]:
    """Texts by id, ids in the order of their first appearance; and the bad lines."""
    groups: dict[str, list[str]] = defaultdict(list)
    bad = []
    for pair in pairs:
        if isinstance(pair, Bad):
            bad.append(pair)
        else:
            groups[pair[0]].append(pair[1])
    return groups, bad


def key_of(file_name: str) -> str:
    """A shard key from a file name: its stem, with the dots that would end a key replaced."""
    return Path(file_name).stem.replace(".", "_")


def shuffled(entries: Iterable[Entry | Bad], seed: int = 0) -> list[Entry | Bad]:
    """All rows in a random order, so that a shard is a fair sample of the corpus."""
    rows = list(entries)
    random.Random(seed).shuffle(rows)
    return rows
