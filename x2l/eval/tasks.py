"""Tasks: how the raw output of each becomes a score. Scoring reads stored records alone, so it needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from x2l.eval import metrics, records

Row = dict[str, Any]
Hypotheses = Sequence[str | None]


class Task(NamedTuple):
    """``normalise(raw, meta)`` gives the text that is stored beside the raw output and scored; None is never passed."""

    normalise: Callable[[str, Row], str]
    score: Callable[[Hypotheses, Sequence[Row]], Row]


def _caption_text(raw: str, meta: Row) -> str:
    return " ".join(metrics.caption_tokens(raw))


def _caption(hypotheses: Hypotheses, rows: Sequence[Row]) -> Row:
    references = [row["references"] for row in rows]
    scores: Row = dict(metrics.caption_scores(hypotheses, references, [row["cluster"] for row in rows]))
    scores["METEOR"] = metrics.meteor(hypotheses, references)
    return scores


TASKS: dict[str, Task] = {"caption": Task(_caption_text, _caption)}


def find(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: use one of {sorted(TASKS)}")
    return TASKS[name]


def results(run_dir: str | Path) -> list[Row]:
    """Every planned sample with its record's ``raw`` and ``output``, both None where the answer is missing."""
    run_dir = Path(run_dir)
    answers = {row["request_sha256"]: row for row in records.read(run_dir / "records.jsonl")}
    plan = records.read(run_dir / "task.jsonl")
    if not plan:
        raise ValueError(f"{run_dir} holds no planned samples: is it the directory of a prediction run?")
    empty: Row = {"raw": None, "output": None}
    return [{**row, **{k: answers.get(row["request_sha256"], empty)[k] for k in empty}} for row in plan]


def stored_score(run_dir: str | Path) -> Row:
    """``scores.json`` if it was made from the records as they are now, else a new :func:`score`."""
    path = Path(run_dir) / "scores.json"
    if path.exists():
        stored: Row = records.read_json(path)
        if stored["records_sha256"] == _records_sha256(Path(run_dir)):
            return stored
    return score(run_dir)


def _records_sha256(run_dir: Path) -> str:
    return records.sha256([records.read(run_dir / name) for name in ("task.jsonl", "records.jsonl")])


def score(run_dir: str | Path) -> Row:
    """Score a run from its records, write ``scores.json`` beside them, and return it.

    The result holds ``task``, ``control``, ``num_samples``, ``coverage`` (share of samples with an answer; the missing
    ones count as empty) and ``scores``. Raw outputs are normalised anew, so a better normaliser needs no new run.
    """
    run_dir = Path(run_dir)
    manifest, rows = records.read_json(run_dir / "run.json"), results(run_dir)
    task = find(manifest["task"])
    hypotheses = [None if row["raw"] is None else task.normalise(row["raw"], row["meta"]) for row in rows]
    answered = sum(text is not None for text in hypotheses)
    result = {
        "task": manifest["task"],
        "control": manifest["control"],
        "num_samples": len(rows),
        "coverage": answered / len(rows),
        "scores": metrics.to_json(task.score(hypotheses, rows)),
        "records_sha256": _records_sha256(run_dir),
    }
    records.write_json(run_dir / "scores.json", result)
    return result
