"""Where samples come from: one indexable, deterministic reader of tar shards, JSONL and Hugging Face data sets (arrow.py).

A shard follows the WebDataset convention: ``<key>.json`` beside ``<key>.<ext>`` for each media file. A JSONL row is a
sample (its parts name files by ``path``) or any object whose ``media`` maps an extension to a file; paths are relative
to the JSONL file. Reading opens, seeks and closes, so a source can be pickled and shared by workers.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec

MAX_ROW_BYTES = 16 << 20  # one JSON object
MAX_MEDIA_BYTES = 512 << 20  # one media file
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and extension: the name is cut at its first dot


class DataError(ValueError):
    """A row that cannot be used, or a source with too many of them."""


@dataclass
class Record:
    """One raw row: its key, its JSON object, and the bytes of its media by extension ("jpg", "opus", ...)."""

    key: str
    fields: dict[str, Any]
    media: dict[str, bytes] = field(default_factory=dict)


class Issues:
    """Rows that were skipped, by id and reason; too many of them stop the run.

    Args:
        total: rows in the data; None while that is unknown, when nothing stops the run.
        max_fraction: bad rows tolerated, as a fraction of ``total`` (of 1000 for a smaller set; 0 tolerates none).
    """

    def __init__(self, total: int | None = None, max_fraction: float = 0.01) -> None:
        self.total = total
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, row: str, reason: object) -> None:
        """Count a bad row once, however often it is met.

        Raises:
            DataError: there are more bad rows than ``max_fraction`` allows.
        """
        self.reasons.setdefault(row, str(reason))
        if self.total is not None and len(self) > self.max_fraction * max(self.total, 1000):
            limit = f"more than {self.max_fraction:.1%}"
            raise DataError(f"{len(self)} of {self.total} rows are bad, {limit}: repair or allow more.\n{self}")

    def __str__(self) -> str:
        listed = [f"  {row}: {reason}" for row, reason in list(self.reasons.items())[:20]]
        return "\n".join(listed + ([f"  ... and {len(self) - 20} more"] if len(self) > 20 else []))


class Row(Protocol):
    """A row that is known but not read."""

    @property
    def key(self) -> str:
        """What issues are listed under."""

    def read(self) -> Record:
        """Load it, or raise DataError."""


class TarRow(NamedTuple):
    """The members of one key in a shard: (extension, offset, size) each."""

    key: str
    path: str
    members: tuple[tuple[str, int, int], ...]

    def read(self) -> Record:
        with open(self.path, "rb") as file:
            blobs = {ext: _read_at(file, offset, size) for ext, offset, size in self.members}
        fields = _parse(blobs.pop("json"))
        text_only = fields.get("media") == {}  # it says so; otherwise its media are lost
        if not blobs and not text_only and "messages" not in fields:
            raise DataError("no media beside its json")
        if text_only:
            del fields["media"]
        return Record(self.key, fields, blobs)


class JsonlRow(NamedTuple):
    """One line of a JSONL file."""

    key: str
    path: str
    offset: int
    size: int

    def read(self) -> Record:
        with open(self.path, "rb") as file:
            fields = _parse(_read_at(file, self.offset, self.size))
        base = Path(self.path).parent
        try:
            media = {ext: read_file(base / name) for ext, name in fields.pop("media", {}).items()}
            for part in _parts(fields):
                part["path"] = str(base / part["path"])
        except (AttributeError, TypeError) as error:
            raise DataError(f"'media' maps extensions to file names, 'messages' is a list of objects: {error}") from error
        return Record(str(fields.get("id", fields.get("key", self.key))), fields, media)


class Source(Sequence[Record]):
    """Rows in a fixed order: shards by name, rows as they lie in them.

    ``source[i]`` raises DataError for a bad row; iteration counts it in ``source.issues`` and goes on. ``len`` counts
    the rows that the index holds, so bad ones that only reading reveals are among them.
    """

    def __init__(self, rows: Sequence[Row], issues: Issues) -> None:
        self.rows = rows
        self.issues = issues

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        row = self.rows[index]
        try:
            return row.read()
        except DataError as error:
            raise DataError(f"{row.key}: {error}") from error

    def __iter__(self) -> Iterator[Record]:
        found = 0
        for row in self.rows:
            try:
                record = row.read()
            except DataError as error:
                self.issues.add(row.key, error)
                continue
            found += 1
            yield record
        if not found:
            raise DataError(f"not one of {len(self.rows)} rows can be used:\n{self.issues}")


def read_source(spec: str | Path | Sequence[str | Path], max_bad: float = 0.01) -> Source:
    """Index tar shards, JSONL files and Hugging Face data sets.

    Args:
        spec: a path or a glob, or several; each ends in ``.tar`` or ``.jsonl``. Matches are read in the order of their
        names. max_bad: the fraction of bad rows that is tolerated, see ``Issues``.

    Raises:
        DataError: nothing matches, a format is unknown, no row was found, or too many rows are bad.
    """
    patterns = [spec] if isinstance(spec, str | Path) else spec
    paths = [path for pattern in patterns for path in _expand(str(pattern))]
    issues = Issues(max_fraction=max_bad)
    rows: list[Row] = []
    for path in paths:
        rows.extend(_reader(path)(path, issues))
    rows = _drop_repeated(rows, issues)
    if not rows:
        raise DataError(f"no row in {', '.join(paths)}\n{issues}")
    issues.total = len(rows) + len(issues)
    if issues.reasons:
        issues.add(*next(iter(issues.reasons.items())))  # the total is known only now
    return Source(rows, issues)


def index_tar(path: str, issues: Issues) -> list[Row]:
    """Group the members of one uncompressed shard by key; no media is read.

    A key without json, or with a member twice, too large or cut off, goes to ``issues`` and never lends its media to
    another.
    """
    size = Path(path).stat().st_size
    members: dict[str, dict[str, tuple[str, int, int]]] = {}
    bad: dict[str, str] = {}
    for member in _members(path, issues):
        match = MEMBER.fullmatch(member.name.removeprefix("./"))
        if match is None or not member.isreg():
            continue
        key, ext = match[1], match[2].lower()
        end, limit = member.offset_data + member.size, MAX_ROW_BYTES if ext == "json" else MAX_MEDIA_BYTES
        if ext in members.setdefault(key, {}):
            bad[key] = f"two members {key}.{ext} in one shard"
        elif member.size > limit:
            bad[key] = f"{key}.{ext} has {member.size} bytes, the limit is {limit}"
        elif end > size:
            bad[key] = f"{key}.{ext} is cut off"
        members[key][ext] = (ext, member.offset_data, member.size)
    bad |= {key: "no json beside its media" for key, found in members.items() if "json" not in found and key not in bad}
    for key, reason in bad.items():
        issues.add(key, reason)
    return [TarRow(key, path, tuple(found.values())) for key, found in members.items() if key not in bad]


def _members(path: str, issues: Issues) -> Iterator[tarfile.TarInfo]:
    """Headers in order; damage ends the shard and is counted (``tarfile`` itself takes a bad header for the end)."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in iter(tar.next, None):
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has met
            with open(path, "rb") as file:
                end = _read_at(file, tar.offset, min(512, max(0, Path(path).stat().st_size - tar.offset)))
            if len(end) < 512 or any(end):
                issues.add(path, f"the shard is cut off or damaged at byte {tar.offset}, the rest is skipped")
    except (tarfile.TarError, OSError, ValueError) as error:
        issues.add(path, f"the shard cannot be read to its end: {error}")


def index_jsonl(path: str, issues: Issues) -> list[Row]:
    """Find the lines of a JSONL file; blank ones are left out."""
    rows: list[Row] = []
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            key = f"{Path(path).name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                issues.add(key, f"a line of {len(line)} bytes, the limit is {MAX_ROW_BYTES}")
            elif line.strip():
                rows.append(JsonlRow(key, path, offset, len(line)))
            offset += len(line)
    return rows


def _reader(path: str) -> Callable[[str, Issues], list[Row]]:
    from x2l.data import arrow  # it imports this module

    if Path(path).is_dir() and not (Path(path) / "state.json").exists():
        raise DataError(f"{path} is a folder, and not one of datasets' save_to_disk: name its files, {path}/*.tar")
    readers = {
        ".tar": index_tar, ".jsonl": index_jsonl, ".parquet": arrow.index_arrow, ".arrow": arrow.index_arrow,
    }  # fmt: skip
    reader = arrow.index_saved if Path(path).is_dir() else readers.get(Path(path).suffix)
    if reader is None:
        raise DataError(f"cannot read {path!r}: expected one of {', '.join(readers)}, or a save_to_disk folder")
    return reader


def _drop_repeated(rows: Iterable[Row], issues: Issues) -> list[Row]:
    seen: set[str] = set()
    kept = []
    for row in rows:
        if row.key in seen and isinstance(row, TarRow):
            issues.add(f"{row.key} in {row.path}", "the key is in an earlier shard, too")
            continue
        seen.add(row.key)
        kept.append(row)
    return kept


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        return _fetched(pattern)
    paths = sorted(glob.glob(pattern)) or ([pattern] if Path(pattern).exists() else [])
    if not paths:
        raise DataError(f"no file matches {pattern!r}")
    return paths


def _fetched(pattern: str) -> list[str]:
    """Local copies of remote files under ``$X2L_CACHE/data``, made once for each version of them: a folder of ``datasets``
    comes whole, a JSONL file with the media that its rows name."""
    cache = Path(os.environ.get("X2L_CACHE") or "~/.cache/x2l").expanduser() / "data"
    cache.mkdir(parents=True, exist_ok=True)
    copies = []
    try:
        system, root = fsspec.core.url_to_fs(pattern)
        for remote in sorted(system.glob(root)) or [root]:
            files = sorted(system.find(remote)) if system.isdir(remote) else [remote]
            version = hashlib.sha256(f"{pattern}/{[(file, system.ukey(file)) for file in files]}".encode()).hexdigest()[:16]
            place = cache / version
            if not place.exists():
                partial = place.with_name(f"{version}.{os.getpid()}.partial")
                _fetch(system, remote, files, partial)
                with contextlib.suppress(OSError):  # another process was first
                    partial.rename(place)
            copies.append(str(place / Path(remote).name))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot fetch {pattern!r}: {error}") from error
    return copies


def _fetch(system: Any, remote: str, files: list[str], place: Path) -> None:
    base = Path(remote).parent
    for file in files:
        local = place / Path(file).relative_to(base)
        local.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(file, str(local))
        for name in _media_names(local) if local.suffix == ".jsonl" else ():
            target = local.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # a file that is not there makes a bad row when it is read
                system.get_file(str(Path(file).parent / name), str(target))


def _media_names(path: Path) -> set[str]:
    """The files beside it that a JSONL file's rows name; none that lies elsewhere."""
    names: set[str] = set()
    with path.open("rb") as lines:
        for line in lines:
            try:
                fields = _parse(line)
                names |= {str(name) for name in fields.get("media", {}).values()} | {str(part["path"]) for part in _parts(fields)}
            except (DataError, AttributeError, TypeError):
                continue  # a bad row, which is listed when it is read
    return {name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts}


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts of a sample that name a file by its path."""
    for message in fields.get("messages", []):
        content = message.get("content", [])
        yield from (part for part in content if isinstance(part, dict) and "path" in part)


def _parse(blob: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(blob.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"expected a JSON object, got {str(fields)[:80]!r}")
    return fields


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    blob: bytes = file.read(size)
    if len(blob) != size:
        raise DataError(f"cut off: {len(blob)} of {size} bytes at {offset}")
    return blob


def read_file(path: Path) -> bytes:
    """A media file of bounded size, or DataError."""
    try:
        with path.open("rb") as file:
            blob = file.read(MAX_MEDIA_BYTES + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(blob) > MAX_MEDIA_BYTES:
        raise DataError(f"{path} is larger than {MAX_MEDIA_BYTES} bytes")
    return blob
