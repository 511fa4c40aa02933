"""Tasks: how the raw output of each becomes scores. Scoring reads stored records alone, so it needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from x2l.eval import bootstrap, events, metrics, normalize, pope, records, refusal
from x2l.eval.bootstrap import Stat

Row = dict[str, Any]
Hypotheses = Sequence[str | None]
LOWER_IS_BETTER = ("WER", "CER")
NOT_SKILLS = ("says yes", "neither", "no class")  # described beside the scores, neither good nor bad
FIRST_SCORE = {"caption": "CIDEr", "qa": "contains"}  # by which samples are ranked; elsewhere the first one of the task
EASIER = ("typed",)  # controls that leave all there is to see
CHANCE = {"pope": 50.0}  # what the first score of a balanced task is for whoever does not look


class Task(NamedTuple):
    """How a task is read and scored.

    ``normalise(raw, meta)`` gives the text that is stored beside the raw output and scored. ``stats`` gives what each
    score is made of, a row for every sample; ``details`` what has no interval. A missing hypothesis is None.
    """

    normalise: Callable[[str, Row], str]
    stats: Callable[[Hypotheses, Sequence[Row]], dict[str, Stat]]
    details: Callable[[Hypotheses, Sequence[Row]], Row] = lambda hypotheses, rows: {}


def _caption_text(raw: str, meta: Row) -> str:
    return " ".join(metrics.caption_tokens(raw))


def _caption_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    return metrics.caption_stats(hypotheses, [row["references"] for row in rows])


def _normaliser(meta: Row) -> normalize.Normalizer:
    return normalize.preset(meta.get("normalizer") or meta.get("lang", "en"))


def _for_language(name: str, row: Row) -> str:
    own, lang = normalize.preset(name).language, row["meta"].get("lang", "en")
    if own != lang:
        raise ValueError(f"normaliser {name!r} is for {own!r}, sample {row['id']} is {lang!r}: score the languages apart")
    return name


def _spoken_text(raw: str, meta: Row) -> str:
    return _normaliser(meta)(raw)


UNITS = {"en": ("WER", "word"), "zh": ("CER", "char")}  # rates in different units are never pooled


def _error_counts(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, tuple[list[int], np.ndarray]]:
    """Rate name -> (indices of the rows in its language, their counts)."""
    found = {}
    for lang, (name, unit) in UNITS.items():
        index = [i for i, row in enumerate(rows) if row["meta"].get("lang", "en") == lang]
        if index:
            references = [_spoken_text(rows[i]["references"][0], rows[i]["meta"]) for i in index]
            found[name] = (index, metrics.error_counts([hypotheses[i] for i in index], references, unit))
    return found


def _asr_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    stats = {}
    for name, (index, counts) in _error_counts(hypotheses, rows).items():
        every = np.zeros((len(rows), 4))  # utterances in another language add nothing to this rate
        every[index] = counts
        stats[name] = metrics.error_rate(every)
    return stats


def _asr_details(hypotheses: Hypotheses, rows: Sequence[Row]) -> Row:
    details: Row = {
        f"{name} counts": metrics.summarise_errors(counts, [hypotheses[i] for i in index])
        for name, (index, counts) in _error_counts(hypotheses, rows).items()
    }
    return details | {"normalisers": sorted({_normaliser(row["meta"]).name for row in rows})}


def _short_answer(raw: str, meta: Row) -> str:
    return " ".join(word for word in _spoken_text(raw, meta).split() if word not in ("a", "an", "the"))


def _match_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    """Exact match, and whether a reference stands in the answer as whole words."""
    references = [[_short_answer(text, row["meta"]) for text in row["references"]] for row in rows]
    pairs = list(zip(hypotheses, references, strict=True))
    contains = [100.0 * any(f" {ref} " in f" {hyp or ''} " for ref in refs) for hyp, refs in pairs]
    return {"exact match": metrics.accuracy(hypotheses, references), "contains": bootstrap.mean_of(contains)}


def _sound_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    """Percent right, and percent of answers that name no class, or several."""
    pairs = list(zip(hypotheses, rows, strict=True))
    right = [100.0 * (hyp == row["references"][0]) for hyp, row in pairs]
    return {"accuracy": bootstrap.mean_of(right), "no class": bootstrap.mean_of([100.0 * (not hyp) for hyp, _ in pairs])}


def _spoken_question_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    """Percent of answers that agree with the answer to the typed question, and how many of their words they share."""
    shared = [metrics.word_overlap(hyp or "", row["references"][0]) for hyp, row in zip(hypotheses, rows, strict=True)]
    agree = [100.0 * (value >= metrics.OVERLAP_ENOUGH) for value in shared]
    return {"agreement": bootstrap.mean_of(agree), "word overlap": bootstrap.mean_of([100.0 * value for value in shared])}


def _yes_no_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    return metrics.yes_no(hypotheses, [row["references"][0] for row in rows])


def _refusal_stats(hypotheses: Hypotheses, rows: Sequence[Row]) -> dict[str, Stat]:
    """Percent right of each kind: declined what should be, answered what should be."""
    right = [100.0 * (hyp == row["references"][0]) for hyp, row in zip(hypotheses, rows, strict=True)]
    stats = {}
    for kind in refusal.REQUESTS:
        of_kind = [float(row["meta"]["kind"] == kind) for row in rows]
        if any(of_kind):
            stats[kind] = Stat(np.stack([np.multiply(right, of_kind), of_kind], 1), bootstrap.mean)
    return stats


TASKS: dict[str, Task] = {
    "caption": Task(_caption_text, _caption_stats),
    "asr": Task(_spoken_text, _asr_stats, _asr_details),
    "qa": Task(_short_answer, _match_stats),
    "sound": Task(lambda raw, meta: events.read_answer(raw, meta["classes"]), _sound_stats),
    "lips": Task(_spoken_text, _asr_stats, _asr_details),
    "pope": Task(lambda raw, meta: pope.read_answer(raw), _yes_no_stats),
    "spoken": Task(lambda raw, meta: raw.strip(), _spoken_question_stats),
    "open": Task(lambda raw, meta: raw.strip(), lambda hypotheses, rows: {}),  # scored by a judge, eval/judge.py
    "refusal": Task(lambda raw, meta: refusal.read_answer(raw), _refusal_stats),
}


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


def score(run_dir: str | Path, seed: int = 0, meteor: bool = False, normalizer: str | None = None) -> Row:
    """Score a run from its records, write ``scores.json`` beside them, and return it.

    The result holds ``task``, ``control``, ``dataset``, ``langs``, ``num_samples``, ``coverage`` (share of samples with
    an answer; the missing ones count as empty), ``scores`` with intervals and ``details``. Raw outputs are normalised
    anew, so a better normaliser needs no new run. ``meteor`` adds METEOR to the details of captions (needs Java);
    ``normalizer`` is a preset in place of the language's own.

    Raises:
        ValueError: no run there, one that carries the name of a published test set without being all of it, or a normaliser
            of another language.
    """
    run_dir = Path(run_dir)
    manifest, rows = records.read_json(run_dir / "run.json"), results(run_dir)
    if normalizer is not None:
        rows = [{**row, "meta": {**row["meta"], "normalizer": _for_language(normalizer, row)}} for row in rows]
    task, hypotheses = find(manifest["task"]), _hypotheses(manifest["task"], rows)
    clusters = [row["cluster"] for row in rows]
    details = task.details(hypotheses, rows)
    if meteor and task is TASKS["caption"]:
        details["METEOR"] = metrics.meteor(hypotheses, [row["references"] for row in rows])
    counts = [value.num_units for value in details.values() if isinstance(value, metrics.ErrorCounts)]
    metrics.check_label(manifest["dataset"], len(rows), sum(counts) if counts else None)
    result = {
        **{key: manifest[key] for key in ("task", "control", "dataset")},
        "langs": sorted({row["meta"].get("lang", "en") for row in rows}),
        "num_samples": len(rows),
        "coverage": sum(text is not None for text in hypotheses) / len(rows),
        "scores": {
            name: metrics.to_json(bootstrap.score(stat, clusters, seed)) for name, stat in task.stats(hypotheses, rows).items()
        },
        "details": metrics.to_json(details),
        "records_sha256": _records_sha256(run_dir),
    }
    records.write_json(run_dir / "scores.json", result)
    return result


def stored_score(run_dir: str | Path) -> Row:
    """``scores.json`` if it was made from the records as they are now, else a new :func:`score`."""
    path = Path(run_dir) / "scores.json"
    if path.exists():
        stored: Row = records.read_json(path)
        if stored["records_sha256"] == _records_sha256(Path(run_dir)):
            return stored
    return score(run_dir)


def per_sample(run_dir: str | Path) -> tuple[str, np.ndarray]:
    """The score by which samples are ranked, and its value for each sample alone (NaN: none); "" for a task without."""
    rows = results(run_dir)
    name = records.read_json(Path(run_dir) / "run.json")["task"]
    stats = find(name).stats(_hypotheses(name, rows), rows)
    first = first_score(name, stats)
    return first, stats[first].statistic(stats[first].rows) if first else np.full(len(rows), np.nan)


def first_score(task: str, scores: Mapping[str, Any]) -> str:
    """The score that stands for a task; "" where it has none."""
    return FIRST_SCORE.get(task) or next(iter(scores), "")


def compare(run_a: str | Path, run_b: str | Path, seed: int = 0) -> dict[str, Row]:
    """Paired differences a - b of every score on the samples that both runs answered or missed, with p-values.

    Raises:
        ValueError: two tasks, or two sets of samples.
    """
    names = [records.read_json(Path(run) / "run.json")["task"] for run in (run_a, run_b)]
    rows_a, by_id = results(run_a), {row["id"]: row for row in results(run_b)}
    if len(set(names)) > 1 or {row["id"] for row in rows_a} != by_id.keys():
        raise ValueError(f"{run_a} and {run_b} differ in task or samples ({names[0]}, {names[1]}): compare like with like")
    rows_b = [by_id[row["id"]] for row in rows_a]
    stats_a, stats_b = [find(names[0]).stats(_hypotheses(names[0], rows), rows) for rows in (rows_a, rows_b)]
    clusters = [row["cluster"] for row in rows_a]
    compared = {}
    for name, stat in stats_a.items():
        difference, p_value = bootstrap.paired_difference(stat, stats_b[name], clusters, seed)
        compared[name] = {**difference._asdict(), "p": p_value}
    return compared


def solved_blind(plain: Row, control: Row) -> list[str]:
    """The scores that a control run reaches to within the interval of the plain run: not earned by looking.

    Of ``asr`` none is: what is said needs no picture, and the controls tell whether one helps or hinders.
    """
    if plain.get("task") == "asr" or control.get("control") in EASIER:
        return []
    blind = []
    for name, value in plain["scores"].items():
        if name in NOT_SKILLS:
            continue
        other = control["scores"][name]["value"]
        if other <= value["high"] if name in LOWER_IS_BETTER else other >= value["low"]:
            blind.append(name)
    return blind


def no_skill(plain: Row) -> str:
    """Why the run's first score shows nothing that was solved, blind or seeing, where that is known; else empty."""
    if not plain["scores"]:  # of answers that are kept to be read, not scored
        return ""
    first = first_score(plain["task"], plain["scores"])
    value = plain["scores"][first]
    if first in LOWER_IS_BETTER and value["high"] >= 100:
        return f"No better than silence, whose {first} is 100."
    if plain["task"] in CHANCE and value["low"] <= CHANCE[plain["task"]]:
        return f"No better than guessing: {CHANCE[plain['task']]:g} % are right without looking."
    return ""


def exit_code(result: Row, min_coverage: float = 1.0) -> int:
    """0, or 3 where too many answers are missing to stand behind the number (a strict run allows none)."""
    return 0 if result["coverage"] >= min_coverage else 3


def _hypotheses(task: str, rows: Sequence[Row]) -> list[str | None]:
    normalise = find(task).normalise
    return [None if row["raw"] is None else normalise(row["raw"], row["meta"]) for row in rows]


def _records_sha256(run_dir: Path) -> str:
    return records.sha256([records.read(run_dir / name) for name in ("task.jsonl", "records.jsonl")])
