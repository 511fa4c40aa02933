"""Does a spoken question get the answer of the same question typed? By a fixed rule about words, no model's judgement.

Two answers agree when their words overlap by half (`x2l.eval.metrics.word_overlap`). The LLM's answer to the typed question
is the reference. How often the typed question without capitals and punctuation, as it sounds, agrees with it is what speech
could reach at best; how often the answer to another question does is what chance reaches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from x2l.data.sources import Record
from x2l.data.tasks import media_part
from x2l.eval import tasks
from x2l.eval.predict import Generator, Render, predict
from x2l.eval.report import format_score
from x2l.types import Message, Sample, user
from x2l.vocabulary import spoken_form


def compare(
    model: Generator, records: Iterable[Record], out: Path, *, dataset: str, model_info: dict[str, Any], render: Render,
    max_new_tokens: int = 40, batch_size: int = 8,
) -> dict[str, Path]:  # fmt: skip
    """Ask every question (``record.fields["text"]``, and its sound) in each form; the runs by form, scored."""
    rows = list(records)
    decode = {"max_new_tokens": max_new_tokens}
    typed = [(user(record.fields["text"]),) for record in rows]
    answers = [
        answer
        for at in range(0, len(rows), batch_size)
        for answer in model.generate_text([Sample("typed", turn) for turn in typed[at : at + batch_size]], **decode)
    ]
    runs = {}
    for form, asked, references in (
        ("spoken", [(user(media_part(record, "speech")),) for record in rows], answers),
        ("as it sounds, typed", [(user(spoken_form(record.fields["text"])),) for record in rows], answers),
        ("another question, spoken", [(user(media_part(record, "speech")),) for record in rows], answers[1:] + answers[:1]),
    ):
        samples = [_sample(*each) for each in zip(rows, asked, references, strict=True)]
        runs[form] = predict(
            model, samples, out / re.sub(r"\W+", "-", form), task="spoken", dataset=f"{dataset}, {form}",
            model_info=model_info, decode=decode, batch_size=batch_size, render=render,
        )  # fmt: skip
        tasks.score(runs[form])
    return runs


def _sample(record: Record, messages: tuple[Message, ...], reference: str) -> Sample:
    return Sample(f"{record.key}/spoken", messages, {"lang": "en", "question": record.fields["text"], "references": [reference]})


def table(runs: dict[str, Path]) -> str:
    """Agreement with the answer to the typed question, by form, as a Markdown table."""
    scored = {form: tasks.stored_score(run) for form, run in runs.items()}
    names = list(next(iter(scored.values()))["scores"])
    lines = [["question", "n", *names], ["---"] * (2 + len(names))]
    lines += [[form, str(s["num_samples"]), *(format_score(s["scores"][name]) for name in names)] for form, s in scored.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
