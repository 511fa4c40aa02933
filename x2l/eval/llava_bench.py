"""LLaVA-Bench-COCO: 30 COCO images, 90 questions, answers judged against text-only GPT-4 (X-LLM, Table 1).

Two modes. ``paper`` is the original protocol to the byte: its message, its parser, its mean that keeps unparsable
judgements as (-1, -1), its pairing of files by line that stops at the shortest. ``robust`` asks in both orders, several
times, accepts what a reader would accept, leaves failures out and says how many, and gives intervals over images.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from x2l.eval import bootstrap
from x2l.eval.metrics import relative_score
from x2l.eval.tasks import results

CATEGORIES = ("conv", "detail", "complex")
ORDERS = ("reference-first", "candidate-first")  # LLaVA's, and that of the X-LLM authors
MIN_COVERAGE = 0.98
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question with everything the judge is shown beside the two answers."""

    id: int
    image: str
    text: str
    category: str
    captions: tuple[str, ...]
    boxes: tuple[tuple[str, tuple[float, ...]], ...]
    role: str
    rule: str


def load_questions(folder: str | Path) -> list[Question]:
    """The 90 questions in file order, from the folder with LLaVA's published files.

    Raises:
        ValueError: a file is missing, or a question's image or category has no entry.
    """
    folder = Path(folder)
    contexts = {row["image"]: row for row in _rows(folder / "caps_boxes_coco2014_val_80.jsonl")}
    rules = _load(folder / "rule.json")
    questions = []
    for row in _rows(folder / "qa90_questions.jsonl"):
        if row["image"] not in contexts or row["category"] not in rules:
            raise ValueError(f"question {row['question_id']}: no context for {row['image']} or rule {row['category']}")
        context, rule = contexts[row["image"]], rules[row["category"]]
        boxes = tuple((box["category"], tuple(box["bbox"])) for box in context["instances"])
        questions.append(
            Question(
                row["question_id"], row["image"], row["text"], row["category"],
                tuple(context["captions"]), boxes, rule["role"], rule["prompt"],
            )
        )  # fmt: skip
    return questions


def load_answers(path: str | Path, field: str = "text") -> dict[int, str]:
    """Answers by question id, in file order: a run folder, JSONL, or a JSON list of ``question_id`` and ``field``."""
    path = Path(path)
    if path.is_dir():
        return {row["meta"]["question_id"]: row["raw"] or "" for row in results(path)}
    return {row["question_id"]: row[field] for row in _rows(path)}


def judge_message(question: Question, first: str, second: str) -> str:
    """The user message of the judge, byte for byte as LLaVA sends it."""
    boxes = "\n".join(f"{name}: {list(box)}" for name, box in question.boxes)
    answers = "".join(f"[{question.role} {i}]\n{text}\n\n[End of {question.role} {i}]\n\n" for i, text in ((1, first), (2, second)))
    captions = "\n".join(question.captions)
    return f"[Context]\n{captions}\n\n{boxes}\n\n[Question]\n{question.text}\n\n{answers}[System]\n{question.rule}\n\n"


class Parsed(NamedTuple):
    """The two scores in the order of the message, or None, and why."""

    scores: tuple[float, float] | None
    status: str


def parse_paper(reply: str) -> Parsed:
    """LLaVA's rule: first line, commas to spaces, split on single spaces, exactly two fields that Python reads."""
    fields = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        if len(fields) == 2:
            return Parsed((float(fields[0]), float(fields[1])), "ok")
    except ValueError:
        pass
    return Parsed(None, "unreadable")


def parse_robust(reply: str) -> Parsed:
    """The first line with text must be two numbers from 1 to 10; marks, labels and ``/10`` around them are ignored.

    Sentences are refused: two numbers somewhere in prose need not be the scores.
    """
    line = next((line for line in reply.splitlines() if line.strip()), "")
    line = re.sub(r"[*_`#>()\[\]]|Assistant [12]\s*:|/\s*10\b", " ", line)
    fields = [field for field in re.split(r"[\s,;|]+", line) if field]
    if len(fields) != 2:
        return Parsed(None, "unreadable")
    if any(re.fullmatch(r"[+-]?(nan|inf(inity)?)", field, re.IGNORECASE) for field in fields):
        return Parsed(None, "not finite")
    if not all(re.fullmatch(r"[+-]?\d{1,9}(\.\d{1,9})?", field, re.ASCII) for field in fields):
        return Parsed(None, "unreadable")
    first, second = map(float, fields)
    if not (1 <= first <= 10 and 1 <= second <= 10):
        return Parsed(None, "out of range")
    return Parsed((first, second), "ok")


class Mode(NamedTuple):
    """How a mode asks and reads."""

    orders: tuple[str, ...]
    draws: int
    parse: Callable[[str], Parsed]


MODES = {"paper": Mode(ORDERS[:1], 1, parse_paper), "robust": Mode(ORDERS, 3, parse_robust)}


def find_mode(name: str) -> Mode:
    """The mode of a name.

    Raises:
        ValueError: no such mode.
    """
    if name not in MODES:
        raise ValueError(f"unknown mode {name!r}: use paper or robust")
    return MODES[name]


def summarise(judgements: Sequence[Row], mode: str, seed: int = 0) -> Row:
    """Relative scores from judgements, each with ``question_id, image, category, order, reply`` (None: no reply).

    Returns:
        ``scores`` for all and for each category (percent), ``coverage`` (share of judgements that could be read),
        ``num_questions`` scored, the ``parse`` table, and ``position_bias``: mean score of the answer shown first minus
        that of the other one (None with a single order, where bias and quality cannot be told apart).

    Raises:
        ValueError: no judgements.
    """
    parse = find_mode(mode).parse
    if not judgements:
        raise ValueError("no judgements to summarise")
    parsed = [Parsed(None, "missing") if row["reply"] is None else parse(row["reply"]) for row in judgements]
    if mode == "paper":
        kept = [(row, result.scores or (-1.0, -1.0)) for row, result in zip(judgements, parsed, strict=True)]
        rows = [(row["category"], row["image"], *_by_role(row["order"], pair)) for row, pair in kept]
    else:
        rows = _balanced(judgements, parsed)
    groups = {name: [row for row in rows if row[0] == name] for name in CATEGORIES} | {"all": rows}
    relative = _original_mean if mode == "paper" else _interval
    table = Counter(result.status for result in parsed)
    return {
        "mode": mode,
        "scores": {name: relative(group, seed) for name, group in groups.items() if group},
        "coverage": table["ok"] / len(parsed),
        "num_judgements": len(parsed),
        "num_questions": len(rows),
        "parse": dict(table),
        "position_bias": _position_bias(judgements, parsed),
    }


def _by_role(order: str, pair: tuple[float, float]) -> tuple[float, float]:
    """(reference, candidate) of the scores (first, second)."""
    return pair if order == "reference-first" else (pair[1], pair[0])


def _balanced(judgements: Sequence[Row], parsed: Sequence[Parsed]) -> list[tuple[str, str, float, float]]:
    """One row a question: the mean over draws in each order, then over orders; a question needs every order once."""
    found: dict[int, dict[str, list[tuple[float, float]]]] = {}
    about: dict[int, tuple[str, str]] = {}
    orders = {row["order"] for row in judgements}
    for row, result in zip(judgements, parsed, strict=True):
        about[row["question_id"]] = (row["category"], row["image"])
        if result.scores is not None:
            by_order = found.setdefault(row["question_id"], {})
            by_order.setdefault(row["order"], []).append(_by_role(row["order"], result.scores))
    rows = []
    for question_id, by_order in found.items():
        if by_order.keys() == orders:
            reference, candidate = np.mean([np.mean(pairs, 0) for pairs in by_order.values()], 0).tolist()
            rows.append((*about[question_id], reference, candidate))
    return rows


def _original_mean(rows: Sequence[tuple[str, str, float, float]], seed: int) -> Row:
    reference, candidate = np.mean([row[2:] for row in rows], 0).round(3)  # the original rounds both means first
    return {"value": float(candidate / reference * 100), "n": len(rows)}


def _interval(rows: Sequence[tuple[str, str, float, float]], seed: int) -> Row:
    images = [row[1] for row in rows]
    stat = relative_score([row[3] for row in rows], [row[2] for row in rows])
    value = bootstrap.score(stat, images, seed)
    return {**value._asdict(), "n": len(rows)}


def _position_bias(judgements: Sequence[Row], parsed: Sequence[Parsed]) -> float | None:
    gaps: dict[str, list[float]] = {order: [] for order in ORDERS}
    for row, result in zip(judgements, parsed, strict=True):
        if result.scores is not None:
            gaps[row["order"]].append(result.scores[0] - result.scores[1])
    if not all(gaps.values()):
        return None
    return float(np.mean([np.mean(values) for values in gaps.values()]))


def format_summary(summary: Row) -> str:
    """The summary as lines of text; coverage always among them."""
    lines = []
    for name, score in summary["scores"].items():
        interval = f" [{score['low']:.1f}, {score['high']:.1f}]" if "low" in score else ""
        lines.append(f"{name:8} {score['value']:6.1f}{interval}  ({score['n']} questions)")
    bias = summary["position_bias"]
    lines.append(f"coverage {summary['coverage']:.2f} of {summary['num_judgements']} judgements, {summary['parse']}")
    lines.append(f"position bias {'not measured: one order' if bias is None else format(bias, '+.2f')}")
    return "\n".join(lines)


def load_reviews(path: str | Path, order: str) -> list[Row]:
    """Published judgements (LLaVA's ``text`` and ``score``, or ``content`` and ``tuple``) as judgements to summarise.

    ``published`` keeps the stored pair. A file without images makes each question its own cluster.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: use one of {ORDERS}")
    return [
        {
            "question_id": row["question_id"],
            "image": row.get("image", str(row["question_id"])),
            "category": row.get("category", "general"),
            "order": order,
            "reply": row["content"] if "content" in row else row["text"],
            "published": row["tuple"] if "tuple" in row else row["score"],
        }
        for row in _rows(Path(path))
    ]


def replay(reviews: Sequence[Row]) -> dict[str, float]:
    """Relative scores from the stored pairs by the original mean: what the authors of a review file published."""
    rows = [(row["category"], row["image"], *_by_role(row["order"], tuple(row["published"]))) for row in reviews]
    groups = {name: [row for row in rows if row[0] == name] for name in CATEGORIES} | {"all": rows}
    return {name: _original_mean(group, 0)["value"] for name, group in groups.items() if group}


# What to do with a judgement that cannot be read: the three ways found in one published table.
FAILURE_RULES: dict[str, tuple[float, float] | None] = {
    "keep as (-1, -1)": (-1.0, -1.0),
    "impute candidate 1, reference 9": (9.0, 1.0),  # (reference, candidate)
    "leave out": None,
}


def one_rule_report(files: Mapping[str, str | Path], order: str = "candidate-first") -> str:
    """What authors' own review files say when every row gets the same failure rule, as a Markdown table.

    Args:
        files: the name of each system and its review file; the order is that of the files, X-LLM's by default.
    """
    lines = ["| system | failed judgements | rule | conv | detail | complex | all |", "|---|---|---|---|---|---|---|"]
    for system, path in files.items():
        reviews = load_reviews(path, order)
        failed = sum(parse_paper(row["reply"]).scores is None for row in reviews)
        variants = {"as stored": replay(reviews)}
        for rule, pair in FAILURE_RULES.items():
            variants[rule] = replay(_apply(reviews, pair))
        for rule, scores in variants.items():
            cells = " | ".join(f"{scores[name]:.1f}" for name in (*CATEGORIES, "all"))
            lines.append(f"| {system} | {failed} of {len(reviews)} | {rule} | {cells} |")
    return "\n".join(lines)


def _apply(reviews: Sequence[Row], pair: tuple[float, float] | None) -> list[Row]:
    """Reviews with the scores read anew by the original parser and one rule for those it cannot read."""
    rows = []
    for row in reviews:
        scores = parse_paper(row["reply"]).scores
        if scores is None and pair is not None:
            scores = _by_role(row["order"], pair)
        if scores is not None:
            rows.append({**row, "published": scores})
    return rows


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _rows(path: Path) -> list[Row]:
    if path.suffix == ".json":
        rows: list[Row] = _load(path)
        return rows
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
