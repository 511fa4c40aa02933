"""Official corpora -> shards. A builder is a function ``(root, split) -> entries`` and one line in ``BUILDERS``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from x2l.data.builders import captions, dialogues, speech, videos
from x2l.data.builders.entry import Bad, Entries, Entry, shuffled
from x2l.data.sources import DataError, Issues, Record, Source
from x2l.data.transforms.base import Done
from x2l.data.transforms.runner import ROWS_A_SHARD, Summary, run

BUILDERS: dict[str, Callable[[Path, str], Entries]] = {
    "ai_challenger": captions.ai_challenger,
    "cc3m": captions.cc3m,
    "coco": captions.coco,
    "flickr30k": captions.flickr30k,
    "flickr8k": captions.flickr8k,
    "sbu": captions.sbu,
    "visual_genome": captions.visual_genome,
    "wukong": captions.wukong,
    "activitynet": videos.activitynet,
    "msrvtt": videos.msrvtt,
    "aishell1": speech.aishell1,
    "aishell2": speech.aishell2,
    "esc10": speech.esc10,
    "esc50": speech.esc50,
    "speechocean762": speech.speechocean762,
    "llava_instruct": dialogues.llava_instruct,
    "minigpt4": dialogues.minigpt4,
    "visdial": dialogues.visdial,
}


class _Build:
    """The transform that changes nothing: rows are entries, and reading one decodes its media."""

    name, version, batch = "build", "1", 16

    def __init__(self, corpus: str, split: str, entries: Sequence[Entry]) -> None:
        self.corpus, self.split, self.digest = corpus, split, _digest(entries)

    def settings(self) -> dict[str, Any]:
        return {"corpus": self.corpus, "split": self.split, "entries": self.digest}

    def __call__(self, rows: Sequence[Record]) -> Done:
        return Done(list(rows))


def _digest(entries: Sequence[Entry]) -> str:
    """Of all texts and file names, so that a build goes on with the release that it began with or not at all."""
    digest = hashlib.sha256()
    for entry in entries:
        names = {ext: path.name for ext, path in entry.files.items()}
        digest.update(json.dumps([entry.key, entry.fields, names]).encode())
    return digest.hexdigest()


def build(
    name: str, root: str | Path, split: str, out: str | Path, max_bad: float = 0.01, workers: int = 1,
    rows_per_shard: int = ROWS_A_SHARD, progress: bool = True,
) -> Summary:  # fmt: skip
    """Turn an unpacked release into shards ``<out>/<split>-0000.tar``, rows in a random but fixed order.

    Every image and sound is decoded once, by ``workers`` threads; rows with broken or missing media, or without text, are
    counted and left out. A build that was interrupted goes on where it was.

    Raises:
        DataError: unknown corpus, not its layout, no usable row, or more than ``max_bad`` of the rows are bad.
    """
    if name not in BUILDERS:
        raise DataError(f"no builder for {name!r}; there are: {', '.join(sorted(BUILDERS))}")
    rows = shuffled(BUILDERS[name](Path(root), split))
    issues = Issues(total=len(rows), max_fraction=max_bad)
    entries: dict[str, Entry] = {}
    for row in rows:
        if isinstance(row, Bad):
            issues.add(row.key, row.reason)
        elif row.key in entries:
            issues.add(f"{row.key} (again)", "the key is taken by an earlier row")
        else:
            entries[row.key] = row
    source = Source(list(entries.values()), issues)
    transform = _Build(name, split, list(entries.values()))
    summary = run(transform, source, out, split, workers, rows_per_shard=rows_per_shard, max_bad=max_bad, progress=progress)
    if not summary.shards:
        raise DataError(f"{root} holds not one usable row of the split {split!r}:\n{summary}")
    return summary
