"""Read the weights of a CTranslate2 ``model.bin`` (binary version 6), as speech packages ship Whisper."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 6
# Quantised weights (int8) are not read.
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 2: np.dtype("<i2"), 4: np.dtype("<f2")}


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
