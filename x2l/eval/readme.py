"""The results table of a README, made from stored records, with the command and the commit behind it.

The scores that it shows are kept as JSON too, so that tests can hold the README to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from x2l.eval import records
from x2l.eval.report import commits_of, group, markdown, scores_of

BEGIN, END = "<!-- scoreboard -->", "<!-- /scoreboard -->"
Board = dict[str, Any]


def remember(out: Path, command: str, runs: Sequence[Path], left_out: Sequence[str]) -> None:
    """Store beside the runs what made them."""
    names = [run.relative_to(out).as_posix() for run in runs]
    records.write_json(out / "scoreboard.json", {"command": command, "runs": names, "left_out": list(left_out)})


def collect(out: Path) -> Board:
    """The scores of the scoreboard in folder ``out``, no model needed: ``command``, ``commits``, ``left_out``, ``tasks``.

    Raises:
        ValueError: no scoreboard there, one without a run, or runs of two models.
    """
    made = records.read_json(out / "scoreboard.json")
    runs = [out / name for name in made["runs"]]
    tasks = {task: scores_of(by_control) for task, by_control in group(runs).items()}
    _check_one_model(runs, made["command"])
    return {"command": made["command"], "commits": commits_of(runs), "left_out": made["left_out"], "tasks": tasks}


def _check_one_model(runs: Sequence[Path], command: str) -> None:
    """A run names the part of the model that it reads; parts that two runs name must be the same.

    Raises:
        ValueError: they differ.
    """
    known: dict[str, str] = {}
    for run in runs:
        model = records.read_json(run / "run.json")["model"]
        parts = {f"interface {name}": digest for name, digest in model.get("interfaces", {}).items()}
        parts[f"recipe of {'+'.join(parts)}"] = records.sha256(model)
        for part, digest in parts.items():
            if known.setdefault(part, digest) != digest:
                raise ValueError(f"{run} is of another model ({part}): give each its own folder and run {command!r} again")


def render(board: Board) -> str:
    """A board as Markdown: a table for each task, what was left out and why, and what made it."""
    tables = [markdown(task, scored) for task, scored in board["tasks"].items()]
    left_out = "\n".join(f"- Left out: {line}" for line in board["left_out"])
    made = f"Made by `{board['command']}` at commit {board['commits']}; [..] = 95 % interval, resampled by image or speaker."
    return "\n\n".join([*tables, *filter(None, [left_out]), made])


def write(readme: Path, board: Board) -> None:
    """Put the tables between the marks of ``readme``, the rest untouched, and the scores into docs/scoreboard.json beside it.

    Raises:
        ValueError: the file has not exactly one pair of marks in this order.
    """
    before, after = _around(readme)
    readme.write_text(f"{before}{BEGIN}\n\n{render(board)}\n\n{END}{after}", encoding="utf-8")
    kept = readme.parent / "docs" / "scoreboard.json"
    kept.parent.mkdir(exist_ok=True)
    records.write_json(kept, board)


def _around(readme: Path) -> tuple[str, str]:
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs one line {BEGIN} and, below it, one line {END}: the tables go between them")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
