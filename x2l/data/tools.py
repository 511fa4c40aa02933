"""What ``x2l data`` does with a data set: validate, stats, shard, split, view."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import os
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from x2l.data.media import MediaError, decode_audio, decode_image
from x2l.data.sources import DataError, Issues, Record, Row, Source, read_source
from x2l.data.tasks import EXTENSIONS, HAN
from x2l.data.video import check_video

SHARD_BYTES = 256 << 20


def check_media(media: dict[str, bytes]) -> dict[str, tuple[float, ...]]:
    """Decode every image and sound, and one frame of every video.

    Returns:
        By extension: (width, height) of an image in pixels, (seconds,) of a sound.

    Raises:
        MediaError: one of them is broken.
    """
    sizes: dict[str, tuple[float, ...]] = {}
    for ext, blob in media.items():
        try:
            if ext in EXTENSIONS["image"]:
                sizes[ext] = decode_image(blob).size
            elif ext in EXTENSIONS["sound"]:
                sizes[ext] = (len(decode_audio(blob)) / 16_000,)
            elif ext in EXTENSIONS["video"]:
                check_video(blob)
        except MediaError as error:
            raise MediaError(f"{ext}: {error}") from error
    return sizes


def texts_of(fields: dict[str, Any]) -> list[str]:
    """Every text of a row: captions, transcript, messages."""
    texts = []
    for name in ("text", "en", "zh"):
        value = fields.get(name, [])
        texts += [str(text) for text in (value if isinstance(value, list) else [value])]
    for message in fields.get("messages", []):
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content if part.get("type") == "text"]
    return texts


def language(text: str) -> str:
    """The code "zh" with a Chinese character in it, "en" with another letter, else "-"."""
    return "zh" if HAN.search(text) else "en" if re.search(r"[^\W\d_]", text) else "-"


@dataclass
class Report:
    """What ``validate`` found. ``issues`` lists unreadable rows, broken media and empty texts; duplicates are not errors."""

    rows: int = 0
    issues: Issues = field(default_factory=Issues)
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # (row, the earlier row with the same media)
    media: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {number}" for name, number in counter.most_common()) or "none"

        lines = [
            f"rows       {self.rows}, of which bad: {len(self.issues)}",
            f"media      {counts(self.media)}",
            f"languages  {counts(self.languages)} (texts)",
            f"licences   {counts(self.licences)}",
            f"duplicates {len(self.duplicates)} rows with media of an earlier row",
        ]
        return "\n".join(lines + [f"  {row} = {earlier}" for row, earlier in self.duplicates[:20]] + [str(self.issues)])


def validate(spec: str | Sequence[str], progress: bool = True) -> Report:
    """Read every row, decode all media, look for repeated media, empty texts, languages and licences; never fatal."""
    source = read_source(spec, max_bad=1.0)
    report = Report(rows=len(source) + len(source.issues), issues=source.issues)
    first: dict[str, str] = {}
    for record in tqdm(source, total=len(source), disable=not progress, unit="row"):
        try:
            check_media(record.media)
            texts = texts_of(record.fields)
        except (MediaError, TypeError, KeyError, AttributeError) as error:
            report.issues.add(record.key, error)
            continue
        if not texts or not all(text.strip() for text in texts):
            report.issues.add(record.key, "an empty text" if texts else "no text")
        digest = _digest(record)
        if record.media and first.setdefault(digest, record.key) != record.key:
            report.duplicates.append((record.key, first[digest]))
        report.media.update(list(record.media))
        report.languages.update(language(text) for text in texts)
        report.licences[str(record.fields.get("licence", "not stated"))] += 1
    return report


def stats(spec: str | Sequence[str], plot: str | Path | None = None) -> dict[str, dict[str, float]]:
    """Distributions over a data set: characters a text by language, texts a row, seconds, pixels.

    Args:
        spec: as for ``read_source``.
        plot: a PNG file for one histogram each.

    Returns:
        By quantity: num, min, mean, median, max.
    """
    values: dict[str, list[float]] = defaultdict(list)
    source = read_source(spec)
    for record in tqdm(source, total=len(source), desc="stats", unit="row"):
        try:
            sizes, texts = check_media(record.media), texts_of(record.fields)
        except MediaError as error:
            source.issues.add(record.key, error)
            continue
        values["texts a row"].append(len(texts))
        for text in texts:
            values[f"characters a text ({language(text)})"].append(len(text))
        for size in sizes.values():
            values["seconds" if len(size) == 1 else "pixels"].append(size[0] if len(size) == 1 else size[0] * size[1])
    if plot is not None:
        _histograms(values, Path(plot))
    return {name: _summary(numbers) for name, numbers in sorted(values.items())}


def _summary(numbers: list[float]) -> dict[str, float]:
    ordered, num = sorted(numbers), len(numbers)
    return {"num": num, "min": ordered[0], "mean": sum(ordered) / num, "median": ordered[num // 2], "max": ordered[-1]}


def _histograms(values: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    figure = Figure(figsize=(6, 2.5 * len(values)), layout="constrained")
    for axes, (name, numbers) in zip(figure.subplots(len(values), squeeze=False)[:, 0], sorted(values.items()), strict=True):
        axes.hist(numbers, bins=40)
        axes.ticklabel_format(axis="x", useOffset=False, style="plain")
        axes.set_ylabel("number", fontsize=8)
        axes.set_title(name, fontsize=9)
    figure.savefig(path)


def write_shards(records: Iterable[Record], out: Path, name: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write records as ``<out>/<name>-0000.tar`` and so on; the same records give the same bytes.

    A shard appears under its name only when it is complete.

    Raises:
        DataError: such shards exist already, or there is no record.
    """
    out.mkdir(parents=True, exist_ok=True)
    if existing := sorted(out.glob(f"{name}-[0-9]*.tar")):
        raise DataError(f"{existing[0]} exists: remove it, or choose another folder or name")
    paths: list[Path] = []
    rest = iter(tqdm(records, desc=name, unit="row", mininterval=1))
    for number, record in enumerate(rest):
        path = out / f"{name}-{number:04d}.tar"
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            current: Record | None = record
            while current is not None:
                add_member(tar, current)
                current = next(rest, None) if tar.offset < shard_bytes else None
        os.replace(partial, path)
        paths.append(path)
    if not paths:
        raise DataError(f"nothing to write into {out}: not one usable row")
    return paths


def add_member(tar: tarfile.TarFile, record: Record) -> None:
    """Append the record's files to an open shard; a record without media says so."""
    fields = record.fields if record.media else record.fields | {"media": {}}
    blobs = record.media | {"json": json.dumps(fields, ensure_ascii=False).encode()}
    for ext, blob in blobs.items():
        info = tarfile.TarInfo(f"{record.key}.{ext}")
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))


def shard(spec: str | Sequence[str], out: str | Path, name: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Rewrite any source as shards."""
    return write_shards(read_source(spec), Path(out), name, shard_bytes)


def split(spec: str | Sequence[str], out: str | Path, by: str, fractions: dict[str, float], seed: int = 0) -> dict[str, list[Path]]:
    """Divide a source into disjoint parts, never separating rows of one group.

    Args:
        spec: as for ``read_source``.
        out: folder for the shards of each part.
        by: a field ("spk", "concept"), or "image": rows with the same media bytes are one group.
        fractions: part -> share of the groups, summing to 1. A group's part depends on the seed and the group alone, so
            that growing data keeps its parts.
        seed: chooses another division.

    Raises:
        DataError: a row lacks the field, the fractions do not sum to 1, or a part stays empty.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise DataError(f"fractions must sum to 1, got {fractions}")
    source = read_source(spec)
    parts: dict[str, list[Row]] = {part: [] for part in fractions}
    for row, record in readable(source):
        group = _digest(record) if by == "image" else record.fields.get(by)
        if group is None:
            raise DataError(f"{record.key} has no field {by!r} to split by, only {', '.join(record.fields)}")
        parts[_part(f"{seed}/{group}", fractions)].append(row)
    if empty := [part for part, rows in parts.items() if not rows]:
        raise DataError(f"nothing falls into {', '.join(empty)}: too few groups of {by!r} for such fractions")
    return {part: write_shards((row.read() for row in rows), Path(out), part) for part, rows in parts.items()}


def readable(source: Source) -> Iterator[tuple[Row, Record]]:
    """Rows with what they hold; those that cannot be read are counted in ``source.issues``."""
    for row in source.rows:
        try:
            yield row, row.read()
        except DataError as error:
            source.issues.add(row.key, error)


def _part(group: str, fractions: dict[str, float]) -> str:
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    edges = itertools.accumulate(fractions.values())
    return next((part for part, edge in zip(fractions, edges, strict=True) if place < edge), list(fractions)[-1])


def _digest(record: Record) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(blob).digest() for _, blob in sorted(record.media.items()))).hexdigest()


def view(spec: str | Sequence[str], out: str | Path, num: int = 24, seed: int = 0) -> Path:
    """Write a self-contained HTML page with ``num`` random rows: thumbnails, players, and all fields as text."""
    source = read_source(spec)
    chosen = random.Random(seed).sample(range(len(source)), min(num, len(source)))
    cards = []
    for i in sorted(chosen):
        try:
            record = source[i]
            shown = "".join(_player(ext, blob) for ext, blob in record.media.items())
            shown += _told(record.fields)
        except (DataError, MediaError, LookupError, TypeError, AttributeError) as error:
            shown, record = f"<p>bad row: {html.escape(str(error))}</p>", Record(source.rows[i].key, {})
        cards.append(f"<figure><figcaption>{html.escape(record.key)}</figcaption>{shown}</figure>")
    Path(out).write_text(PAGE.format(title=html.escape(str(spec)), cards="\n".join(cards)), encoding="utf-8")
    return Path(out)


def _told(fields: dict[str, Any]) -> str:
    """What is said in a row, turn by turn, and its other fields; how they were made is folded."""
    lines = []
    for message in fields.get("messages", []):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = " ".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)
        lines.append(f"<p><b>{html.escape(message['role'])}</b> {html.escape(said)}</p>")
    rest = {name: value for name, value in fields.items() if name not in ("messages", "provenance")}
    lines.append(f"<pre>{html.escape(json.dumps(rest, ensure_ascii=False, indent=1))}</pre>")
    if "provenance" in fields:
        made = html.escape(json.dumps(fields["provenance"], ensure_ascii=False, indent=1))
        lines.append(f"<details><summary>provenance</summary><pre>{made}</pre></details>")
    return "".join(lines)


MIME = {"opus": "ogg", "oga": "ogg", "mp3": "mpeg", "m4a": "mp4", "mkv": "webm"}  # where browsers have another name for it


def _player(ext: str, blob: bytes) -> str:
    kind = next((kind for kind, known in EXTENSIONS.items() if ext in known), None)
    if kind == "image":
        picture = decode_image(blob)
        picture.thumbnail((256, 256))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    if kind is None or len(blob) > 4 << 20:
        return f"<p>{html.escape(ext)}, {len(blob)} bytes</p>"
    tag = {"sound": "audio", "video": "video"}[kind]
    return f'<{tag} controls src="data:{tag}/{MIME.get(ext, ext)};base64,{base64.b64encode(blob).decode()}"></{tag}>'


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;display:flex;flex-wrap:wrap;gap:12px}}figure{{width:270px;margin:0;border:1px solid #ccc;
padding:6px}}p{{margin:4px 0}}pre{{white-space:pre-wrap;font-size:12px}}audio,video{{width:100%}}</style>
{cards}
"""
