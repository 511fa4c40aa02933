"""The scoreboard: every number of the project from one command, each beside its controls."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from x2l.data.sources import read_source
from x2l.eval.predict import Generator, Render, predict, prompt_of
from x2l.eval.questions import QUESTIONS, draw, refusal


@dataclass(frozen=True)
class Entry:
    """One measurement: questions of a kind about a set, with the controls that would expose a blind model.

    Attributes:
        dataset: the label that is printed; ``data`` is a glob below the data root, empty for questions without media.
        reads: the modalities without which the entry is left out.
        num: at most so many samples, drawn by seed.
    """

    task: str
    dataset: str
    data: str = ""
    reads: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    num: int = 10_000
    decode: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 48})


BEAMS = {"max_new_tokens": 40, "num_beams": 3}
SCOREBOARD = (
    Entry("caption", "Flickr8k (en), part of test", "flickr8k/test-*.tar", ("image",),
          controls=("wrong-image", "blank"), decode=BEAMS),
    Entry("caption", "Flickr8k (zh), part of test", "flickr8k/test-*.tar", ("image",), {"lang": "zh"},
          controls=("wrong-image",), num=200, decode=BEAMS),
    Entry("pope", "objects in Flickr8k captions", "flickr8k/test-*.tar", ("image",),
          controls=("wrong-image",), decode={"max_new_tokens": 8}),
    Entry("qa", "short questions from Flickr8k captions", "flickr8k/test-*.tar", ("image",),
          controls=("wrong-image",), decode={"max_new_tokens": 24}),
    Entry("asr", "speechocean762 (en)", "speechocean762/test-*.tar", ("speech",), {"cluster": "spk"}, num=300),
    Entry("asr", "AISHELL-1 sample (zh)", "aishell-sample/test-*.tar", ("speech",)),
    Entry("asr", "spoken digits (en)", "fsdd/test-*.tar", ("speech",), decode={"max_new_tokens": 8}),
    Entry("sound", "ESC-10, fold 5", "esc10/test-*.tar", ("audio",),
          controls=("wrong-sound", "silence"), decode={"max_new_tokens": 16}),
    Entry("lips", "GRID, speaker 1, without sound", "grid-s1/test-*.tar", ("video",),
          controls=("wrong-video",), decode={"max_new_tokens": 24}),
    Entry("refusal", "requests to decline"),
)  # fmt: skip


def run(
    model: Generator,
    reads: Sequence[str],
    data_root: str | Path,
    out: str | Path,
    *,
    model_info: dict[str, Any],
    render: Render = prompt_of,
    entries: Sequence[Entry] = SCOREBOARD,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[list[Path], list[str]]:
    """Predict every entry that the model and the data allow; a second call goes on where the first one stopped.

    Args:
        reads: the modalities of the model.
        limit: at most so many samples an entry, drawn by ``seed``.

    Returns:
        The run directories, and a line for each entry left out with its reason.
    """
    runs, left_out = [], []
    for entry in entries:
        lacking = sorted(set(entry.reads) - set(reads))
        pattern = str(Path(data_root) / entry.data)
        if lacking or (entry.data and not glob.glob(pattern)):
            reason = f"the model reads no {' and '.join(lacking)}" if lacking else f"no data at {pattern}"
            left_out.append(f"{entry.task} {entry.dataset}: {reason}")
            continue
        asked = QUESTIONS[entry.task](read_source(pattern), **entry.options) if entry.data else refusal()
        asked = draw(asked, min(entry.num, limit or entry.num), seed)
        for control in (None, *entry.controls):
            name = "".join(char if char.isalnum() else "-" for char in f"{entry.task} {entry.dataset} {control or ''}")
            folder = predict(
                model, asked, Path(out) / name.strip("-"), task=entry.task, dataset=entry.dataset, control=control,
                model_info=model_info, decode=entry.decode, seed=seed,
                batch_size=batch_size, render=render,
            )  # fmt: skip
            runs.append(folder)
    return runs, left_out
