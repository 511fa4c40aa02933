"""The process that opens untrusted media: one job at a time on stdin, plain arrays on stdout, nothing else.

    {"decoder": "image", "size": 1234, "options": {"max_pixels": 1000}}\\n + 1234 bytes
    {"items": [{"shape": [2, 3, 3], "dtype": "uint8", "picture": true}], "list": false}\\n + the arrays
    {"error": "why"}\\n

No pickle crosses the pipe, so that a decoder that was taken over gains nothing in the server.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from x2l.data.media import DECODERS

MEMORY = 1536 << 20  # address space, libraries included


def main() -> None:
    """Serve jobs until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it never writes a file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up in the protocol
    sink.write(b'{"ready": true}\n')
    sink.flush()
    while line := source.readline():
        job = json.loads(line)
        _answer(sink, job["decoder"], source.read(job["size"]), job["options"])


def _answer(sink: BinaryIO, name: str, blob: bytes, options: dict[str, Any]) -> None:
    head: dict[str, Any]
    arrays: list[np.ndarray] = []
    try:
        decoded = _decoder(name)(blob, **options)
        sequence = decoded if isinstance(decoded, list) else [decoded]
        distinct = list({id(item): item for item in sequence}.values())  # a frame that is held is the same object several times
        place = {id(item): i for i, item in enumerate(distinct)}
        arrays = [np.ascontiguousarray(item) for item in distinct]
        items = [
            {"shape": array.shape, "dtype": str(array.dtype), "picture": isinstance(item, Image.Image)}
            for array, item in zip(arrays, distinct, strict=True)
        ]
        head = {"items": items, "list": [place[id(item)] for item in sequence] if isinstance(decoded, list) else None}
    except MemoryError:
        head, arrays = {"error": "the file needs too much memory"}, []
    except ValueError as error:  # MediaError, whose message is fit for a stranger
        head, arrays = {"error": str(error)}, []
    sink.write(json.dumps(head).encode() + b"\n")
    for array in arrays:
        sink.write(array.data.cast("B") if array.size else b"")
    sink.flush()


def _decoder(name: str) -> Callable[..., Any]:
    """An entry of the table, or what a recipe names by ``package.module:function``."""
    module, colon, function = name.partition(":")
    return getattr(importlib.import_module(module), function) if colon else DECODERS[name]


if __name__ == "__main__":
    main()
