"""Untrusted media are opened in a few small processes that may be killed at any time."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from x2l.data.collate import Decoder
from x2l.data.media import MediaError

log = logging.getLogger(__name__)
KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")  # of the environment: no keys, no tokens
START_SECONDS = 120.0  # a process imports its libraries once; on a busy machine that takes long
MAX_HEAD = 1 << 16
DTYPES = ("uint8", "float32")


class _Died(Exception):
    """The process is gone, or says what it should not."""


class _Worker:
    """One decoder process."""

    def __init__(self) -> None:
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "x2l.serve.decoder_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,  # Ctrl-C is the server's; the end of stdin ends the worker whatever happens to it
        )
        self.ready = False

    def run(self, job: dict[str, Any], blob: bytes, max_bytes: int) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if not self.ready:
                if json.loads(stdout.readline(MAX_HEAD)) != {"ready": True}:
                    raise _Died
                self.ready = True
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.write(blob)
            stdin.flush()
            head = json.loads(stdout.readline(MAX_HEAD))
            if "error" in head:
                raise MediaError(str(head["error"]))
            sizes = [_size(item) for item in head["items"]]
            if sum(sizes) > max_bytes:
                self.process.kill()  # what it sends is not read
                raise MediaError(f"decoded, the file takes {sum(sizes)} bytes, the limit is {max_bytes}")
            items = [_item(item, stdout.read(size), size) for item, size in zip(head["items"], sizes, strict=True)]
            return items[0] if head["list"] is None else [items[i] for i in head["list"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, MediaError):
                raise
            raise _Died from error

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _size(item: dict[str, Any]) -> int:
    if item["dtype"] not in DTYPES or min(item["shape"], default=1) < 0:
        raise _Died
    return math.prod(map(int, item["shape"])) * np.dtype(item["dtype"]).itemsize


def _item(item: dict[str, Any], data: bytes, size: int) -> Any:
    if len(data) != size:
        raise _Died
    array = np.frombuffer(bytearray(data), item["dtype"]).reshape(item["shape"])  # bytearray: torch wants writable memory
    return Image.fromarray(array) if item["picture"] else array


class DecoderPool:
    """Decodes media, each file in another process and within bounds.

    Args:
        num_workers: processes; as many files are decoded at a time, others wait.
        seconds: time for one file, waiting not counted.
        bounds: decoder -> what its options are extended by, such as ``{"image": {"max_pixels": 1000}}``.
        max_bytes: of a decoded file.
    """

    def __init__(self, num_workers: int = 2, seconds: float = 20.0, bounds: Mapping[str, Mapping[str, Any]] | None = None,
                 max_bytes: int = 256 << 20):  # fmt: skip
        self.seconds, self.bounds, self.max_bytes = seconds, bounds or {}, max_bytes
        self.restarts = 0
        self._closed, self._lock = False, threading.Lock()
        self._workers = [_Worker() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def __call__(self, decoder: Decoder, blob: bytes, options: Mapping[str, Any]) -> Any:
        """The decoded file; a process that dies is replaced, and the file tried once more.

        Args:
            decoder: a key of `x2l.data.media.DECODERS`, or a function at the top of a module.
            options: its keyword arguments.

        Raises:
            MediaError: the file is broken or too large, takes too long, or kills its decoder twice.
        """
        name = decoder if isinstance(decoder, str) else f"{decoder.__module__}:{decoder.__qualname__}"
        job = {"decoder": name, "size": len(blob), "options": {**options, **self.bounds.get(name, {})}}
        with self._worker() as slot:
            for _ in range(2):
                late = threading.Event()
                timer = threading.Timer(self.seconds + (0 if slot[0].ready else START_SECONDS), self._expire, (slot[0], late))
                timer.start()
                try:
                    return slot[0].run(job, blob, self.max_bytes)
                except _Died:
                    slot[0] = self._replace(slot[0])
                    if late.is_set():
                        raise MediaError(f"the file takes longer than {self.seconds:g} s to decode") from None
                finally:
                    timer.cancel()
        raise MediaError("the file cannot be decoded: its decoder failed on it twice")

    def close(self) -> None:
        """Kill the processes."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()

    @contextlib.contextmanager
    def _worker(self) -> Iterator[list[_Worker]]:
        slot = [self._idle.get()]
        try:
            yield slot
        finally:
            self._idle.put(slot[0])

    def _expire(self, worker: _Worker, late: threading.Event) -> None:
        late.set()
        worker.process.kill()

    def _replace(self, dead: _Worker) -> _Worker:
        dead.kill()
        with self._lock:
            if self._closed:
                raise MediaError("the server is stopping")
            self.restarts += 1
            log.warning("a media decoder (pid %d) died; another one takes over", dead.process.pid)
            new = _Worker()
            self._workers[self._workers.index(dead)] = new
            return new
