"""The runner: kill -9 and go on, bad rows, foreign journals; Ray with a killed worker."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from conftest import picture, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l.data.sources import DataError, Record, read_source
from x2l.data.tools import validate, write_shards
from x2l.data.transforms.base import Done, Skipped, noted
from x2l.data.transforms.journal import packed
from x2l.data.transforms.runner import Summary, run

NUM_ROWS = 23


class Shout:
    """Upper case; it logs each row that it is called for, and may wait or die."""

    name, version = "shout", "1"

    def __init__(self, log: Path, batch: int = 2, wait: float = 0.0, die_once: Path | None = None, mark: str = "!") -> None:
        self.log, self.batch, self.wait, self.die_once, self.mark = log, batch, wait, die_once, mark

    def settings(self) -> dict[str, Any]:
        return {"mark": self.mark}

    def __call__(self, rows: Sequence[Record]) -> Done:
        if self.die_once is not None and any(row.key == "row07" for row in rows) and not self.die_once.exists():
            self.die_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.wait)
        with self.log.open("a") as log:
            log.write("".join(f"{row.key}\n" for row in rows))
        return Done([self._row(row) for row in rows], Counter(calls=1))

    def _row(self, row: Record) -> Record | Skipped:
        if row.fields["text"] == "bad":
            return Skipped(row.key, "it said bad")
        if row.fields["text"] == "dull":
            return Skipped(row.key, "dull", bad=False)
        return noted(row, self, {"text": row.fields["text"].upper() + self.mark}, length=len(row.fields["text"]))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    files = {f"row{i:02d}": {"png": picture((i, 0, 0)), "json": b'{"text": "text %d"}' % i} for i in range(NUM_ROWS)}
    files["row03"]["json"] = b'{"text": "dull"}'
    files["row05"]["json"] = b"\xff{"
    return write_shard(tmp_path / "rows.tar", files)


def digests(folder: Path) -> dict[str, str]:
    written = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


def shouted(rows: Path, out: Path, log: Path, **options: Any) -> Summary:
    return run(Shout(log), read_source(str(rows)), out, rows_per_shard=8, progress=False, **options)


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_keep_their_order_and_media(rows: Path, tmp_path: Path, workers: int) -> None:
    summary = shouted(rows, tmp_path / "out", tmp_path / "log", workers=workers)
    assert len(summary.shards) == 3
    found = list(read_source(str(tmp_path / "out" / "*.tar")))
    expected = [i for i in range(NUM_ROWS) if i not in (3, 5)]
    assert [record.key for record in found] == [f"row{i:02d}" for i in expected]
    assert [record.fields["text"] for record in found] == [f"TEXT {i}!" for i in expected]
    assert [record.media["png"] for record in found] == [picture((i, 0, 0)) for i in expected]
    assert found[0].fields["provenance"] == [{"transform": "shout", "version": "1", "mark": "!", "length": 6}]
    assert {(row.key, row.bad) for row in summary.skipped} == {("row03", False), ("row05", True)}
    assert validate(str(tmp_path / "out" / "*.tar"), progress=False).issues.reasons == {}
    assert summary.counts == {"calls": 12}
    assert summary.rows_a_second > 0


def test_a_finished_run_calls_nothing_again(rows: Path, tmp_path: Path) -> None:
    shouted(rows, tmp_path / "out", tmp_path / "log")
    before, calls = digests(tmp_path / "out"), (tmp_path / "log").read_text()
    again = shouted(rows, tmp_path / "out", tmp_path / "log")
    assert (digests(tmp_path / "out"), (tmp_path / "log").read_text()) == (before, calls)
    assert again.kept == NUM_ROWS - 2


def test_kill_9_then_the_same_bytes_and_no_second_call(rows: Path, tmp_path: Path) -> None:
    shouted(rows, tmp_path / "whole", tmp_path / "whole.log")
    log, journal = tmp_path / "log", tmp_path / "out" / "data.journal"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_data_transforms import Shout\n"
        "from x2l.data.sources import read_source\nfrom x2l.data.transforms.runner import run\n"
        f"run(Shout(Path({str(log)!r}), wait=0.1), read_source({str(rows)!r}), {str(tmp_path / 'out')!r}, "
        "workers=2, rows_per_shard=8, progress=False)"
    )
    for least in (2, 6):  # rounds of calls before each kill
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if log.exists() and len(log.read_text().split()) >= 2 * least:
                process.kill()
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL
    finished, before = set(numbers(journal)), Counter(log.read_text().split())
    assert finished
    assert shouted(rows, tmp_path / "out", log).kept == NUM_ROWS - 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    after = Counter(log.read_text().split())
    assert all(after[f"row{i:02d}"] == before[f"row{i:02d}"] for i in range(NUM_ROWS) if i // 2 in finished)


def numbers(path: Path) -> list[int]:
    with sqlite3.connect(path) as database:
        return [number for (number,) in database.execute("select number from chunks")]


def test_another_run_is_refused(rows: Path, tmp_path: Path) -> None:
    shouted(rows, tmp_path / "out", tmp_path / "log")
    with pytest.raises(DataError, match=r"settings: {'mark': '!'} there, {'mark': '\?'} now"):
        run(Shout(tmp_path / "log", mark="?"), read_source(str(rows)), tmp_path / "out", rows_per_shard=8, progress=False)
    (tmp_path / "out" / "data-0001.tar").unlink()
    with pytest.raises(DataError, match="is gone"):
        shouted(rows, tmp_path / "out", tmp_path / "log")
    (tmp_path / "out" / "data.journal").unlink()
    with pytest.raises(DataError, match="has no journal"):
        shouted(rows, tmp_path / "out", tmp_path / "log")


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    files = {f"r{i}": {"png": picture((i, 0, 0)), "json": b'{"text": "bad"}'} for i in range(20)}
    source = read_source(str(write_shard(tmp_path / "bad.tar", files)))
    with pytest.raises(DataError, match="it said bad"):
        run(Shout(tmp_path / "log"), source, tmp_path / "out", progress=False)


def test_workers_run_at_the_same_time(rows: Path, tmp_path: Path) -> None:
    barrier = Barrier(2, timeout=60)

    class Meeting(Shout):
        def __call__(self, rows: Sequence[Record]) -> Done:
            if any(row.key in ("row00", "row02") for row in rows):
                barrier.wait()  # passes only when two workers are here
            return super().__call__(rows)

    run(Meeting(tmp_path / "log"), read_source(str(rows)), tmp_path / "out", workers=2, progress=False)


@settings(deadline=None)  # it writes files
@given(st.lists(st.tuples(st.text(max_size=40), st.binary(max_size=700)), min_size=1, max_size=6), st.integers(1, 5))
def test_joined_chunks_are_what_tarfile_writes(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[str, bytes]], size: int
) -> None:
    records = [Record(f"k{i}", {"text": text}, {"bin": blob}) for i, (text, blob) in enumerate(found)]
    (expected,) = write_shards(records, tmp_path_factory.mktemp("packed"), "a")
    joined = b"".join(packed(records[i : i + size]) for i in range(0, len(records), size))
    assert expected.read_bytes().startswith(joined)
    assert not any(expected.read_bytes()[len(joined) :])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_ray_survives_a_killed_worker(rows: Path, tmp_path: Path) -> None:
    import ray

    from x2l.data.transforms.ray import on_ray

    shouted(rows, tmp_path / "whole", tmp_path / "whole.log")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        died = tmp_path / "died"
        transform = Shout(tmp_path / "log", die_once=died)
        source = read_source(str(rows))
        summary = run(transform, source, tmp_path / "out", workers=2, engine=on_ray, rows_per_shard=8, progress=False)
    finally:
        ray.shutdown()
    assert died.exists()
    assert summary.kept == NUM_ROWS - 2
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
