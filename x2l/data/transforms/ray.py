"""The runner's engine for more than one machine: Ray Data, with the same function; the driver alone writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from x2l.data.sources import DataError
from x2l.data.transforms.base import Skipped
from x2l.data.transforms.journal import Finished
from x2l.data.transforms.runner import Work


class _Worker:
    """An actor: it keeps what the transform has loaded from chunk to chunk."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, kept, skipped, counts, members = self.work(int(row["number"]))
        return {"number": number, "kept": kept, "notes": json.dumps([skipped, counts]), "members": members}


def on_ray(work: Work, todo: list[int], workers: int) -> Iterator[Finished]:
    """Chunks through ``workers`` actors of the cluster that ``RAY_ADDRESS`` names, else of a local one.

    Ray replaces a worker that dies and gives its chunk to another; each result reaches the driver once. Files of the source
    must lie at the same path on every machine.

    Raises:
        DataError: ray is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise DataError("the engine ray needs an extra: pip install 'x2l[ray]'") from error
    if not todo:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"number": number} for number in todo], override_num_blocks=len(todo))
    worker: Any = _Worker  # ray makes one of each actor and calls it
    results = rows.map(worker, fn_constructor_args=(work,), concurrency=workers)
    for row in results.iter_rows():
        skipped, counts = json.loads(row["notes"])
        yield Finished(row["number"], row["kept"], [Skipped(*each) for each in skipped], counts, row["members"])
