"""What builders yield, and how they read the tables of official releases."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.media import MediaError
from x2l.data.sources import DataError, Record, read_file
from x2l.data.tools import check_media


class Entry(NamedTuple):
    """A row to be: its key, its JSON object, and where its media files lie, by extension."""

    key: str
    fields: dict[str, Any]
    files: dict[str, Path]

    def read(self) -> Record:
        """Load and decode its media; DataError when one is missing or broken."""
        media = {ext: read_file(path) for ext, path in self.files.items()}
        try:
            check_media(media)
        except MediaError as error:
            raise DataError(str(error)) from error
        return Record(self.key, self.fields, media)


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
    """A whole JSON file; one that does not parse stops the build, as no row of it can be trusted.

    Undecodable bytes become U+FFFD, which ``checked`` refuses, so that they cost their row alone.
    """
    try:
        return json.loads(need(path).read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def rows_at(table: Any, *places: str) -> list[Any]:
    """The list at a place of a JSON file, as ``rows_at(table, "data", "dialogs")``.

    Raises:
        DataError: there is none.
    """
    for place in places:
        table = table.get(place) if isinstance(table, dict) else None
    if not isinstance(table, list):
        raise DataError(
            f"expected a list of rows {'at ' + '.'.join(places) if places else 'as the whole file'}, got {str(table)[:80]!r}"
        )
    return table


def each(rows: Iterable[Any], name: str, make: Callable[[Any], Iterable[Entry | Bad]]) -> Entries:
    """What ``make`` gives for each row; a row that is not of the release's shape is a bad one, called by name and number."""
    for number, row in enumerate(rows):
        try:
            made = list(make(row))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            made = [Bad(f"{name} {number}", f"not of the release's format ({error!r}): {str(row)[:80]}")]
        yield from made


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
        yield (first, rest[0].strip()) if rest and checked(line) else Bad(name, f"expected '<id> <text>', got {line[:80]!r}")


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
