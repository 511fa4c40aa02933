"""Scores as pure functions of texts: captions, error rates, matches, relative scores. No model, no files.

Everywhere a missing hypothesis is an empty one: it costs, and the coverage says how many there were.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jiwer
import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from x2l.eval.bootstrap import Score, Stat, mean, mean_of

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_CAPTION_TOKEN = re.compile(rf"[{_HAN}]|[^\W{_HAN}_]+(?:-[^\W{_HAN}_]+)*")
_MIXED_TOKEN = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")


def caption_tokens(text: str) -> list[str]:
    """Lower case, punctuation stripped: runs of letters and digits, inner hyphens kept, each Han character alone.

    An apostrophe ends a token (``children's`` -> ``children s``), so that tokenised references (Flickr8k writes
    ``children 's``) and plain hypotheses meet. It stands in for the PTB tokeniser, which needs Java.
    """
    return _CAPTION_TOKEN.findall(text.lower())


def caption_stats(hypotheses: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, Stat]:
    """BLEU-1..4 and ROUGE-L in points of 100, CIDEr in the toolkit's unit (1.0 is what papers print as 100).

    The scorers are pycocoevalcap's, on :func:`caption_tokens`. CIDEr's document frequencies are those of all
    references given, so its value on a subset is not comparable with that on the whole.

    Raises:
        ValueError: no samples, or a sample without a reference.
    """
    hyps = [" ".join(caption_tokens(text or "")) for text in hypotheses]
    refs = [[" ".join(caption_tokens(text)) for text in texts] for texts in references]
    if not hyps or len(hyps) != len(refs):
        raise ValueError(f"captions need one hypothesis for each list of references: got {len(hyps)} and {len(refs)}")
    for i, texts in enumerate(refs):
        if not any(texts):
            raise ValueError(f"sample {i} has no reference caption: {list(references[i])!r}")
    gts, res = dict(enumerate(refs)), {i: [text] for i, text in enumerate(hyps)}
    return {
        **_bleu(hyps, refs),
        "CIDEr": mean_of(Cider().compute_score(gts, res)[1]),
        "ROUGE-L": mean_of(100 * Rouge().compute_score(gts, res)[1]),
    }


def meteor(hypotheses: Sequence[str | None], references: Sequence[Sequence[str]]) -> float | None:
    """METEOR 1.5 in points of 100 by pycocoevalcap; None where there is no Java to run it."""
    if shutil.which("java") is None:
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    gts = {i: [" ".join(caption_tokens(text)) for text in texts] for i, texts in enumerate(references)}
    res = {i: [" ".join(caption_tokens(text or ""))] for i, text in enumerate(hypotheses)}
    return 100 * float(Meteor().compute_score(gts, res)[0])


def _bleu(hyps: list[str], refs: list[list[str]]) -> dict[str, Stat]:
    scorer = BleuScorer(n=4)
    for hyp, texts in zip(hyps, refs, strict=True):
        scorer += (hyp, texts)
    rows = np.array(
        [[*c["correct"], *c["guess"], c["testlen"], min((abs(n - c["testlen"]), n) for n in c["reflen"])[1]] for c in scorer.ctest],
        dtype=np.float64,
    )
    return {f"BLEU-{n}": Stat(rows, partial(_bleu_of_sums, n=n)) for n in (1, 2, 3, 4)}


def _bleu_of_sums(sums: np.ndarray, n: int) -> np.ndarray:
    """Corpus BLEU-n (Papineni et al., 2002) of (correct x 4, guessed x 4, hypothesis and closest reference length)."""
    small, tiny = 1e-9, 1e-15  # the smoothing of pycocoevalcap, so that values agree to the last digit
    precisions = (sums[..., :n] + tiny) / (sums[..., 4 : 4 + n] + small)
    ratio = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    return 100 * precisions.prod(-1) ** (1 / n) * np.exp(np.minimum(0.0, 1 - 1 / ratio))


class ErrorCounts(NamedTuple):
    """Everything needed to judge an error rate."""

    num_units: int  # N: words or characters of the references
    substitutions: int
    deletions: int
    insertions: int
    num_utterances: int
    coverage: float  # share of utterances that have a hypothesis at all
    num_above_100: int  # utterances with more errors than units


def units(text: str, unit: str) -> list[str]:
    """Split normalised text into ``word``s, ``char``acters (spaces dropped), or ``mixed``: Han characters and words."""
    if unit == "word":
        return text.split()
    if unit == "char":
        return list("".join(text.split()))
    if unit == "mixed":
        return _MIXED_TOKEN.findall(text)
    raise ValueError(f"unknown unit {unit!r}: use word (WER), char (CER) or mixed (characters and words)")


def error_counts(hypotheses: Sequence[str | None], references: Sequence[str], unit: str) -> np.ndarray:
    """(N, 4) counts of each utterance: substitutions, deletions, insertions, reference units; aligned by jiwer."""
    counts = np.zeros((len(references), 4))
    for row, hyp, ref in zip(counts, hypotheses, references, strict=True):
        hyp_units, ref_units = units(hyp or "", unit), units(ref, unit)
        if not ref_units:  # jiwer takes no empty reference: everything said is an insertion
            row[:] = 0, 0, len(hyp_units), 0
            continue
        aligned = jiwer.process_words(" ".join(ref_units), " ".join(hyp_units))
        row[:] = aligned.substitutions, aligned.deletions, aligned.insertions, len(ref_units)
    return counts


def _error_of_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * sums[..., :3].sum(-1) / sums[..., 3]


def error_rate(counts: np.ndarray) -> Stat:
    """WER or CER in percent, pooled over the corpus: 100 (S + D + I) / N of :func:`error_counts`.

    Raises:
        ValueError: references without a single unit.
    """
    if not counts[:, 3].sum():
        raise ValueError(f"the {len(counts)} references hold no word or character at all: check the normaliser")
    return Stat(counts, _error_of_sums)


def summarise_errors(counts: np.ndarray, hypotheses: Sequence[str | None]) -> ErrorCounts:
    """The totals of :func:`error_counts`, coverage, and the utterances above 100 %."""
    substitutions, deletions, insertions, num_units = counts.sum(0).astype(int).tolist()
    return ErrorCounts(
        num_units,
        substitutions,
        deletions,
        insertions,
        num_utterances=len(counts),
        coverage=sum(hyp is not None for hyp in hypotheses) / len(counts),
        num_above_100=int((counts[:, :3].sum(1) > counts[:, 3]).sum()),
    )


def overlap(train: Iterable[str], test: Sequence[str]) -> float:
    """Share of (normalised) test texts that also occur in training: what was seen, not understood."""
    seen = set(train)
    return sum(text in seen for text in test) / len(test)


# Published test sets by name: (samples, reference characters; None: not counted). A part must not carry the name.
TEST_SETS: dict[str, tuple[int, int | None]] = {"AISHELL-2 test": (5000, 49527), "Flickr8k test": (1000, None)}


OVERLAP_FIRST, OVERLAP_LETTERS, OVERLAP_ENOUGH = 32, 4, 0.5


def word_overlap(answer: str, reference: str) -> float:
    """F1 of the sets of long words (four letters and more) among the first 32 words of each; 1 where neither has one."""
    a, b = (
        {word for word in re.findall(r"[\w']+", text.lower())[:OVERLAP_FIRST] if len(word) >= OVERLAP_LETTERS}
        for text in (answer, reference)
    )
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def check_label(label: str | None, num_samples: int, num_units: int | None = None) -> None:
    """Refuse the name of a published test set for anything that is not the whole of it.

    Raises:
        ValueError: the counts differ from the published ones.
    """
    samples, characters = TEST_SETS.get(label or "", (num_samples, None))
    if num_samples != samples or (characters is not None and num_units != characters):
        expected = f"{samples} samples" + (f" and {characters} characters" if characters is not None else "")
        raise ValueError(f"{label!r} means {expected}, this run has {num_samples} and {num_units}: give it another name")


def accuracy(hypotheses: Sequence[str | None], references: Sequence[Sequence[str]]) -> Stat:
    """Percent of hypotheses that equal one of their references; both sides are expected normalised."""
    return mean_of([100.0 * (hyp is not None and hyp in refs) for hyp, refs in zip(hypotheses, references, strict=True)])


def yes_no(hypotheses: Sequence[str | None], references: Sequence[str]) -> dict[str, Stat]:
    """POPE's scores in percent; "yes" is the positive class, an answer that is neither counts as wrong."""
    pairs = [(hyp or "", ref) for hyp, ref in zip(hypotheses, references, strict=True)]
    rows = np.array(
        [[hyp == ref, hyp == ref == "yes", hyp == "yes", ref == "yes", hyp == "", 1] for hyp, ref in pairs], dtype=float
    )

    def share(above: int, below: int) -> Stat:
        return Stat(rows, lambda sums: 100 * sums[..., above] / np.maximum(sums[..., below], 1e-9))

    f1 = Stat(rows, lambda sums: 200 * sums[..., 1] / np.maximum(sums[..., 2] + sums[..., 3], 1e-9))
    return {
        "accuracy": share(0, 5),
        "precision": share(1, 2),
        "recall": share(1, 3),
        "F1": f1,
        "says yes": share(2, 5),
        "neither": share(4, 5),
    }


def relative_score(candidate: Sequence[float], reference: Sequence[float]) -> Stat:
    """LLaVA-Bench: 100 x mean judged score of the candidate / mean judged score of the reference answer."""
    return Stat(np.stack([100 * np.asarray(candidate, float), np.asarray(reference, float)], 1), mean)


def to_json(value: Any) -> Any:
    """Scores and counts as plain dictionaries, for JSON."""
    if isinstance(value, (Score, ErrorCounts)):
        return {name: to_json(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return value
