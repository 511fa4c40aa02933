"""Rows of Hugging Face ``datasets`` folders, read with pyarrow alone: ``save_to_disk`` folders and Parquet files.

A column of structs with ``bytes`` (and ``path``), as the features Image and Audio store them, becomes a media file; all other
columns are fields. Audio that only names a path outside of the folder has no bytes and makes the row a bad one.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.sources import DataError, Issues, Record, Row

# the first bytes of a file -> extension, for media that carry no file name
MAGIC = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3",
    b"\xff\xfb": "mp3", b"\x1a\x45\xdf\xa3": "mkv",
}  # fmt: skip


class ArrowRow(NamedTuple):
    """Row ``place`` of record batch (or Parquet row group) ``batch``."""

    key: str
    path: str
    batch: int
    place: int

    def read(self) -> Record:
        columns = _batch(self.path, self.batch)
        row = {name: column[self.place].as_py() for name, column in zip(columns.schema.names, columns.columns, strict=True)}
        media: dict[str, bytes] = {}
        for name in list(row):
            if isinstance(row[name], dict) and "bytes" in row[name]:
                blob, file_name = row[name]["bytes"], row.pop(name).get("path")
                if blob is None:
                    raise DataError(f"column {name!r} names {file_name!r} and holds no bytes: embed the files in the data set")
                media[_extension(blob, file_name)] = blob
        return Record(str(row.get("id", self.key)), row, media)


def index_saved(folder: str, issues: Issues) -> list[Row]:
    """The rows of a ``Dataset.save_to_disk`` folder, in its order."""
    state = json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))
    return [row for file in state["_data_files"] for row in index_arrow(str(Path(folder) / file["filename"]), issues)]


def index_arrow(path: str, issues: Issues) -> list[Row]:
    """The rows of one Arrow stream or Parquet file; a damaged file is one issue."""
    try:
        sizes = _batch_sizes(path)
    except (OSError, ValueError) as error:
        issues.add(path, f"not a readable {Path(path).suffix} file: {error}")
        return []
    name = Path(path).name
    starts = [sum(sizes[:batch]) for batch in range(len(sizes))]
    return [ArrowRow(f"{name}:{starts[b] + i}", path, b, i) for b, size in enumerate(sizes) for i in range(size)]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Hugging Face data sets need pyarrow: pip install pyarrow") from error
    return pyarrow


def _batch_sizes(path: str) -> list[int]:
    pa = _pyarrow()
    if path.endswith(".parquet"):
        meta = pa.parquet.ParquetFile(path).metadata
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return [batch.num_rows for batch in pa.ipc.open_stream(pa.memory_map(path))]


@lru_cache(maxsize=4)
def _batch(path: str, number: int) -> Any:
    pa = _pyarrow()
    if path.endswith(".parquet"):
        return pa.parquet.ParquetFile(path).read_row_group(number).combine_chunks()
    return next(batch for i, batch in enumerate(pa.ipc.open_stream(pa.memory_map(path))) if i == number)


def _extension(blob: bytes, file_name: str | None) -> str:
    suffix = Path(file_name or "").suffix[1:].lower()
    if suffix:
        return suffix
    if blob[:4] == b"RIFF":
        return "webp" if blob[8:12] == b"WEBP" else "wav"
    return next((ext for magic, ext in MAGIC.items() if blob.startswith(magic)), "bin")
