"""Run a transform over a source: parallel, with progress, and resumable after a kill at any moment.

Rows are worked in chunks of ``transform.batch`` whose borders never move. A finished chunk goes to the journal at once; the
chunks of a shard are joined, in the order of the rows, when the last of them is finished. So an interrupted run that is
started again calls nothing twice for a finished row and ends with the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from x2l.data.sources import DataError, Issues, Record, Source
from x2l.data.transforms.base import Skipped, Transform
from x2l.data.transforms.journal import Finished, Journal, packed

ROWS_A_SHARD = 1000
Work = Callable[[int], Finished]
Engine = Callable[[Work, list[int], int], Iterator[Finished]]


@dataclass
class Summary:
    """What a whole run gave, earlier parts of it included; ``rows_a_second`` is of the last part alone."""

    shards: list[Path]
    kept: int
    skipped: list[Skipped]
    counts: Counter[str]
    rows_a_second: float

    def __str__(self) -> str:
        bad = [row for row in self.skipped if row.bad]
        lines = [f"{self.kept} rows kept, {len(self.skipped) - len(bad)} dropped, {len(bad)} bad; {self.rows_a_second:.2f} rows/s"]
        lines += [f"{name}: {number}" for name, number in sorted(self.counts.items())]
        return "\n".join(lines + [f"  {row.key}: {row.reason}" for row in bad[:20]])


def local(work: Work, todo: list[int], workers: int) -> Iterator[Finished]:
    """Threads of this process: what transforms wait for (onnxruntime, CTranslate2, torch, other programs, endpoints)
    runs outside Python's lock."""
    rest = iter(todo)
    errors: list[BaseException] = []
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(work, number) for number in itertools.islice(rest, 2 * workers)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished if future.exception() is None)
                errors += [error for future in finished if (error := future.exception()) is not None]
                if errors:  # what is in work may be paid for: it is kept before the run stops
                    running = {future for future in running if not future.cancel()}
                else:
                    running |= {pool.submit(work, number) for number in itertools.islice(rest, len(finished))}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if errors:
        raise errors[0]


def run(
    transform: Transform,
    source: Source,
    out: str | Path,
    name: str = "data",
    workers: int = 1,
    engine: Engine = local,
    rows_per_shard: int = ROWS_A_SHARD,
    max_bad: float = 0.01,
    progress: bool = True,
) -> Summary:
    """Transform a source into shards ``<out>/<name>-0000.tar``, numbered by the rows that they come from.

    Beside them lie ``<name>.journal`` (SQLite) and, when all is done, ``<name>.json``: settings, counts, and each row that
    was left out with the reason.

    Args:
        transform: what is done; see ``Transform``.
        source: rows; those that cannot be read are counted as bad.
        out: folder.
        workers: chunks in work at a time.
        engine: ``local``, or ``ray.on_ray`` for a cluster.
        rows_per_shard: input rows a shard, rounded up to whole chunks.
        max_bad: the fraction of bad rows that is tolerated.

    Raises:
        DataError: too many bad rows, or ``out`` holds another run under this name, or is in use.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{name}.lock", timeout=0):
            return _run(transform, source, folder, name, workers, engine, rows_per_shard, max_bad, progress)
    except Timeout:
        raise DataError(f"{folder}/{name} is being written by another process") from None


def _run(
    transform: Transform, source: Source, folder: Path, name: str, workers: int, engine: Engine, rows_per_shard: int,
    max_bad: float, progress: bool,
) -> Summary:  # fmt: skip
    per_shard = -(-rows_per_shard // transform.batch)
    num_chunks = -(-len(source) // transform.batch)
    shards = [range(first, min(first + per_shard, num_chunks)) for first in range(0, num_chunks, per_shard)]
    paths = [folder / f"{name}-{number:04d}.tar" for number in range(len(shards))]
    journal = Journal(folder / f"{name}.journal", _identity(transform, source, per_shard))
    try:
        for path, chunks in zip(paths, shards, strict=True):
            if journal.lost(path, chunks):
                raise DataError(f"{path} was written and is gone: restore it, or remove {journal.path} to begin anew")
        _refuse_foreign(journal, paths)
        finished = journal.numbers()
        issues = _issues(source, journal, max_bad)
        todo = [number for number in range(num_chunks) if number not in finished]
        started = time.monotonic()
        work = functools.partial(_work, transform, source)
        bar = tqdm(
            total=len(source), initial=_num_rows(finished, transform, source), desc=transform.name, unit="row",
            disable=not progress,
        )  # fmt: skip
        with bar:
            for done in engine(work, todo, workers):
                journal.add(done)
                finished.add(done.number)
                bar.update(_num_rows({done.number}, transform, source))
                _count_bad(issues, done.skipped)
                shard = done.number // per_shard
                if finished.issuperset(shards[shard]):
                    journal.write_shard(paths[shard], shards[shard])
        for path, chunks in zip(paths, shards, strict=True):  # a kill may fall between the last chunk and its shard
            journal.write_shard(path, chunks)
        rate = _num_rows(set(todo), transform, source) / max(time.monotonic() - started, 1e-9)
        kept, skipped, counts = journal.outcome()
    finally:
        journal.close()
    skipped = [Skipped(key, reason) for key, reason in source.issues.reasons.items()] + skipped
    summary = Summary([path for path in paths if path.exists()], kept, skipped, counts, rate)
    _write_report(folder / f"{name}.json", transform, summary)
    return summary


def _work(transform: Transform, source: Source, number: int) -> Finished:
    """Read and transform a chunk; a row that cannot be read lends nothing to its neighbours."""
    rows: list[Record] = []
    skipped: list[Skipped] = []
    for index in range(number * transform.batch, min((number + 1) * transform.batch, len(source))):
        try:
            rows.append(source.rows[index].read())
        except DataError as error:
            skipped.append(Skipped(source.rows[index].key, str(error)))
    done = transform(rows)
    assert len(done.rows) == len(rows), f"{transform.name} gave {len(done.rows)} results for {len(rows)} rows"
    kept = [row for row in done.rows if isinstance(row, Record)]
    skipped += [row for row in done.rows if isinstance(row, Skipped)]
    return Finished(number, len(kept), skipped, dict(done.counts), packed(kept))


def _identity(transform: Transform, source: Source, per_shard: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in source.rows:
        path = getattr(row, "path", "")
        place = (row.key, Path(path).name, *(getattr(row, name, None) for name in ("members", "offset", "size")))
        digest.update(json.dumps(place).encode())
    what = {"transform": transform.name, "version": transform.version, "settings": transform.settings(), "batch": transform.batch}
    return json.loads(json.dumps(what | {"source": digest.hexdigest(), "chunks a shard": per_shard}))


def _refuse_foreign(journal: Journal, paths: Iterable[Path]) -> None:
    if not journal.numbers() and (existing := [path for path in paths if path.exists()]):
        raise DataError(f"{existing[0]} exists and has no journal: remove it, or choose another folder or name")


def _issues(source: Source, journal: Journal, max_bad: float) -> Issues:
    issues = Issues(total=len(source) + len(source.issues), max_fraction=max_bad)
    issues.reasons = dict(source.issues.reasons)
    _count_bad(issues, journal.outcome()[1])
    return issues


def _count_bad(issues: Issues, skipped: Iterable[Skipped]) -> None:
    for row in skipped:
        if row.bad:
            issues.add(row.key, row.reason)


def _num_rows(chunks: set[int], transform: Transform, source: Source) -> int:
    return sum(min(transform.batch, len(source) - number * transform.batch) for number in chunks)


def _write_report(path: Path, transform: Transform, summary: Summary) -> None:
    report = {
        "transform": transform.name, "version": transform.version, "settings": transform.settings(), "kept": summary.kept,
        "counts": dict(sorted(summary.counts.items())), "skipped": [row._asdict() for row in summary.skipped],
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
