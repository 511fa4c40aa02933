"""Multimodal ASR: do pictures help to write down speech? The same clips and instruction, and four kinds of picture.

S alone, S + its image, S + another's, S + a grey one: a model that reads pictures for what they show is best with the right
one, and no worse with a grey one than with none. Differences are paired, and resample photos.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from x2l.eval import tasks
from x2l.eval.report import format_score

CONDITIONS = {"S": "no-image", "S + image": None, "S + wrong image": "wrong-image", "S + blank image": "blank"}


def table(runs: Mapping[str | None, Path]) -> str:
    """Error rates of the conditions, a run each by its control, and the paired difference of each from S alone, as Markdown.

    Raises:
        ValueError: a condition has no run, or the runs hold other clips.
    """
    missing = [name for name, control in CONDITIONS.items() if control not in runs]
    if missing:
        raise ValueError(f"no run of {', '.join(missing)}: predict the entry masr with all its controls")
    (rate,) = tasks.stored_score(runs["no-image"])["scores"]
    lines = [["", "n", rate, "minus S alone", "p", "counts", "coverage"], ["---"] * 7]
    for name, control in CONDITIONS.items():
        result = tasks.stored_score(runs[control])
        against = tasks.compare(runs[control], runs["no-image"])[rate]
        paired = ["–", "–"] if name == "S" else [format_score(against), f"{against['p']:.3f}"]
        counts = format_score(result["details"][f"{rate} counts"])
        value = format_score(result["scores"][rate])
        lines.append([name, str(result["num_samples"]), value, *paired, counts, f"{result['coverage']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
