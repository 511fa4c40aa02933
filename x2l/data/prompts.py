"""Pools of paraphrased instructions, one text file a task and language, one instruction a line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

POOLS = Path(__file__).parent / "prompts"


@cache
def instructions(task: str, lang: str) -> tuple[str, ...]:
    """The paraphrases of a task's instruction; the first is the plain one that evaluation uses.

    Raises:
        ValueError: there is no such pool; the message lists those that exist.
    """
    path = POOLS / f"{task}.{lang}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in POOLS.glob("*.txt")))
        raise ValueError(f"no instructions for task {task!r} in language {lang!r}; there are: {known}")
    return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


@cache
def phrasings(task: str, lang: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Questions and answers of each section of ``<task>.<lang>.txt``: ``# section``, then lines "Q ..." and "A ..."."""
    sections: dict[str, tuple[list[str], list[str]]] = {}
    for line in instructions(task, lang):
        mark, _, text = line.partition(" ")
        if mark == "#":
            questions, answers = sections.setdefault(text, ([], []))
        else:
            {"Q": questions, "A": answers}[mark].append(text)
    return {name: (tuple(questions), tuple(answers)) for name, (questions, answers) in sections.items()}
