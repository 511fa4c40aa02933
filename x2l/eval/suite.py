"""The scoreboard: every number of the project from one command, each beside its controls.

An entry is a YAML file in ``board/``, or anybody's by its path.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from x2l.config import Strict
from x2l.data.sources import read_source
from x2l.eval.controls import CONTROLS
from x2l.eval.predict import Generator, Render, predict, prompt_of
from x2l.eval.questions import QUESTIONS, draw, refusal
from x2l.eval.tasks import find
from x2l.types import Sample

BOARD = Path(str(resources.files("x2l") / "eval" / "board"))
SCOREBOARD = (
    "caption-en", "caption-zh", "pope", "qa", "spoken-vqa", "asr-speechocean", "asr-aishell", "asr-digits", "masr", "sound",
    "lips", "refusal",
)  # fmt: skip


class Entry(Strict):
    """One measurement: questions of a kind about a set, with the controls that would expose a blind model.

    Attributes:
        task: how answers are read and scored, a key of `x2l.eval.tasks.TASKS`.
        dataset: the label that is printed.
        lang: of questions and answers; a model that does not speak it need not be asked.
        data: a glob below a data root; empty for questions without media.
        reads: the modalities without which the entry is left out.
        questions: a key of `x2l.eval.questions.QUESTIONS`; the task's own by default. ``options`` are its arguments.
        num: at most so many samples, drawn by seed.
        decode: arguments of ``generate_text``.
    """

    task: str
    dataset: str
    lang: str = "en"
    data: str = ""
    reads: tuple[str, ...] = ()
    questions: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    controls: tuple[str, ...] = ()
    num: int = Field(10_000, gt=0)
    decode: dict[str, Any] = Field(default_factory=lambda: {"max_new_tokens": 48})

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        find(name)
        return name

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in CONTROLS]
        if unknown:
            raise ValueError(f"unknown control {unknown[0]!r}: use one of {sorted(CONTROLS)}")
        return names

    def ask(self, path: str) -> list[Sample]:
        """All questions about the set at ``path``, one of `find_data`."""
        if not self.data:
            return refusal()
        return QUESTIONS[self.questions or self.task](read_source(path), **self.options)


def load(name: str) -> Entry:
    """An entry by its name in ``board/``, or by the path of its YAML file.

    Raises:
        ValueError: no such entry, or one with an unknown key, task or control.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else BOARD / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no entry {name!r}: use one of {', '.join(SCOREBOARD)}, or the path of a YAML file")
    try:
        return Entry.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from error


def find_data(entry: Entry, roots: Sequence[str | Path]) -> str | None:
    """The entry's glob below the first root where it matches a file; "" where it needs none, None where there is none."""
    if not entry.data:
        return ""
    return next((pattern for root in roots if glob.glob(pattern := str(Path(root) / entry.data))), None)


def _left_out(entry: Entry, reads: Sequence[str], roots: Sequence[str | Path], langs: Sequence[str]) -> str:
    """Why the entry cannot be asked; "" where it can."""
    if entry.lang not in langs:
        return f"not asked for; --lang {entry.lang} does"
    if lacking := sorted(set(entry.reads) - set(reads)):
        return f"the model reads no {' and '.join(lacking)}"
    return "" if find_data(entry, roots) is not None else f"no {entry.data} in {', '.join(map(str, roots))}"


def run(
    model: Generator,
    reads: Sequence[str],
    roots: Sequence[str | Path],
    out: str | Path,
    *,
    info: Callable[[Sequence[str]], dict[str, Any]],
    render: Render = prompt_of,
    entries: Sequence[Entry],
    langs: Sequence[str] = ("en",),
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[list[Path], list[str]]:
    """Predict every entry that the model and the data allow; a second call goes on where the first one stopped.

    Args:
        reads: the modalities of the model. roots: folders that hold the sets.
        info: what identifies the model in a record, of the modalities that an entry reads.
        langs: entries in other languages are left out.
        limit: at most so many samples an entry, drawn by ``seed``.

    Returns:
        The run directories, and a line for each entry left out with its reason.
    """
    runs, left_out = [], []
    for entry in entries:
        path, reason = find_data(entry, roots), _left_out(entry, reads, roots, langs)
        if path is None or reason:
            left_out.append(f"{entry.task} {entry.dataset}: {reason}")
            continue
        asked = draw(entry.ask(path), min(entry.num, limit or entry.num), seed)
        for control in (None, *entry.controls):
            name = "".join(char if char.isalnum() else "-" for char in f"{entry.task} {entry.dataset} {control or ''}")
            folder = predict(
                model, asked, Path(out) / name.strip("-"), task=entry.task, dataset=entry.dataset, control=control,
                model_info=info(entry.reads), decode=entry.decode, seed=seed, batch_size=batch_size, render=render,
            )  # fmt: skip
            runs.append(folder)
    return runs, left_out
