"""Evaluation questions from raw records: one fixed instruction a task, all references together, stable ids."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from x2l.data.caption_qa import QA, question_answers
from x2l.data.prompts import instructions
from x2l.data.sources import Record
from x2l.data.tasks import HAN, dictated, media_part, tidy
from x2l.eval import pope as yes_no
from x2l.eval.llava_bench import Question
from x2l.eval.refusal import REQUESTS
from x2l.types import Part, Sample, user


def caption(records: Iterable[Record], lang: str = "en", instruction: str | None = None) -> list[Sample]:
    """One question an image, all captions of ``record.fields[lang]`` as references."""
    text = instruction or instructions("caption", lang)[0]
    return [
        Sample(
            f"{record.key}/caption-{lang}",
            (user(media_part(record, "image"), text),),
            {"lang": lang, "references": list(record.fields[lang])},
        )
        for record in records
    ]


def asr(records: Iterable[Record], instruction: str | None = None, cluster: str | None = None) -> list[Sample]:
    """One transcription an utterance; ``cluster`` names the field (speaker) whose utterances are resampled together."""
    samples = []
    for record in records:
        text = record.fields["text"]
        lang = record.fields.get("lang") or ("zh" if HAN.search(text) else "en")
        meta = {"lang": lang, "references": [text]}
        if cluster is not None:
            meta["cluster"] = record.fields[cluster]
        question = instruction or instructions("asr", lang)[0]
        samples.append(Sample(f"{record.key}/asr", (dictated(media_part(record, "speech"), question),), meta))
    return samples


def sound(records: Iterable[Record], lang: str = "en", instruction: str | None = None) -> list[Sample]:
    """Audio events: which of the classes that occur in the set is heard; ``{classes}`` in an instruction lists them."""
    records = list(records)
    classes = sorted({record.fields[lang] for record in records})
    text = (instruction or instructions("sound", lang)[0]).replace("{classes}", ", ".join(classes))
    return [
        Sample(
            f"{record.key}/sound-{lang}",
            (user(media_part(record, "audio"), text),),
            {"lang": lang, "classes": classes, "references": [record.fields[lang]]},
        )
        for record in records
    ]


def spoken_vqa(records: Iterable[Record], lang: str = "en", seed: int = 0) -> list[Sample]:
    """Spoken questions about photos whose answer is a word or two, rows of `x2l.data.builders.vsdial`.

    Balanced and scored as `qa`; the control ``typed`` asks the same in writing.
    """
    samples = [
        Sample(
            f"{record.key}/spoken-vqa",
            (user(media_part(record, "image"), media_part(record, "speech")),),
            {"lang": lang, "kind": record.fields["kind"], "references": _short(_qa_of(record)), "typed": record.fields["text"]},
        )
        for record in records
        if record.fields["lang"] == lang and record.fields["kind"] in SHORT_KINDS
    ]
    return _balanced(samples, seed)


def _qa_of(record: Record) -> QA:
    return QA(record.fields["kind"], record.fields["text"], record.fields["messages"][-1]["content"])


def masr(records: Iterable[Record], lang: str = "en", instruction: str | None = None) -> list[Sample]:
    """Multimodal ASR: write down what is said about a photo that is seen, rows of `x2l.data.builders.vsdial`.

    The instruction is the same with the controls ``wrong-image``, ``blank`` and ``no-image``; intervals resample photos.
    """
    text = instruction or instructions("asr", lang)[0]
    return [
        Sample(
            f"{record.key}/masr",
            (dictated(media_part(record, "speech"), text, media_part(record, "image")),),
            {"lang": lang, "references": [record.fields["text"]]},
        )
        for record in records
        if record.fields["lang"] == lang
    ]


def lips(records: Iterable[Record]) -> list[Sample]:
    """What a speaker says in a silent video."""
    return [
        Sample(
            f"{record.key}/lips",
            (user(media_part(record, "video"), instructions("lips", "en")[0]),),
            {"lang": "en", "references": [record.fields["text"]]},
        )
        for record in records
    ]


def pope(records: Iterable[Record], per_object: int = 20, seed: int = 0) -> list[Sample]:
    """Yes/no questions about objects that the English captions name, or do not; balanced object by object."""
    records = list(records)
    return [
        Sample(
            f"{records[asked.image].key}/pope-{asked.name}",
            (user(media_part(records[asked.image], "image"), f"{asked.text} Answer yes or no."),),
            {"lang": "en", "references": [asked.answer]},
        )
        for asked in yes_no.ask([record.fields["en"] for record in records], per_object, seed)
    ]


SETTINGS = (["indoors", "inside", "indoor"], ["outdoors", "outside", "outdoor"])
FILLERS = frozenset("a an the is are it this was taken photo there they see i and only person people".split())
SHORT_KINDS = ("colour", "clothes colour", "count", "sport", "setting")  # their answers are a word or two
COUNTS = "one two three four five six seven eight nine ten".split()


def qa(records: Iterable[Record], seed: int = 0) -> list[Sample]:
    """Open questions, at most one of a kind about a photo, that its English captions answer (``data/caption_qa.py``).

    Balanced, so that it takes the photo to answer: of each kind no answer stands more often than the third most frequent
    one (of two kinds of place, the rarer). Animals are left out, for nearly all of them are dogs. The reference is what the
    derived answer adds to its question ("What colour is the dog?" -> "brown"); score ``contains``.
    """
    samples = []
    for record in records:
        captions = [tidy(text, "en") for text in record.fields["en"]]
        pairs = question_answers(captions, random.Random(f"{seed}/{record.key}"), num_pairs=20)
        first = {pair.kind: pair for pair in reversed(pairs) if pair.kind in SHORT_KINDS}
        for kind, pair in first.items():
            meta = {"lang": "en", "kind": kind, "references": _short(pair)}
            samples.append(Sample(f"{record.key}/qa-{kind}", (user(media_part(record, "image"), pair.question),), meta))
    return _balanced(samples, seed)


def _balanced(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """Of each kind no answer more often than its third most frequent one; nothing of a kind with one answer only."""
    by_kind: dict[str, dict[str, list[Sample]]] = {kind: {} for kind in SHORT_KINDS}
    for sample in samples:
        by_kind[sample.meta["kind"]].setdefault(sample.meta["references"][0], []).append(sample)
    chosen: list[Sample] = []
    for by_answer in by_kind.values():
        sizes = sorted(map(len, by_answer.values()), reverse=True)[:3]
        if len(sizes) > 1:
            chosen += [sample for same in by_answer.values() for sample in draw(same, sizes[-1], seed)]
    return sorted(chosen, key=lambda sample: sample.id)


def _short(pair: QA) -> list[str]:
    """What an answer adds to its question, function words left out; a number for a count, for a setting all its names."""
    words = re.findall(r"[a-z]+", pair.answer.lower())
    if pair.kind == "setting":
        return next(names for names in SETTINGS if any(name in words for name in names))
    if pair.kind == "count":
        return [word for word in words if word in COUNTS][:1] or [pair.answer]
    known = {*re.findall(r"[a-z]+", pair.question.lower())} | FILLERS
    new = [i for i, word in enumerate(words) if word not in known]
    inside = range(min(new), max(new) + 1) if new else []  # "black and white" keeps its "and"
    return [" ".join(words[i] for i in inside if i in new or words[i] == "and") or pair.answer]


def refusal() -> list[Sample]:
    """The fixed requests of ``eval/refusal.py``."""
    return [
        Sample(
            f"refusal-{kind}-{i}",
            (user(text),),
            {"kind": kind, "references": ["answered" if kind == "harmless" else "declined"]},
        )
        for kind, texts in REQUESTS.items()
        for i, text in enumerate(texts)
    ]


def llava_bench(questions: Iterable[Question], images: Path, translations: Mapping[int, str] | None = None) -> list[Sample]:
    """The 90 questions about COCO val2014 photos; ``translations`` by question id replace the English text.

    Raises:
        ValueError: a photo is not in the folder ``images``, under its own name or COCO's full one.
    """
    samples = []
    for question in questions:
        names = (question.image, f"COCO_val2014_{question.image}")
        path = next((images / name for name in names if (images / name).exists()), None)
        if path is None:
            raise ValueError(f"question {question.id}: no {question.image} in {images}: put COCO val2014 photos there")
        text = translations[question.id] if translations else question.text
        meta = {"question_id": question.id, "cluster": question.image, "references": [""]}
        samples.append(Sample(f"llava-bench-{question.id}", (user(Part("image", path=str(path)), text),), meta))
    return samples


QUESTIONS: dict[str, Callable[..., list[Sample]]] = {
    "caption": caption,
    "asr": asr,
    "sound": sound,
    "lips": lips,
    "spoken_vqa": spoken_vqa,
    "masr": masr,
    "pope": pope,
    "qa": qa,
}


def draw(samples: list[Sample], num: int, seed: int = 0) -> list[Sample]:
    """A random subset in the original order: what a quick look should use instead of the first rows."""
    if num >= len(samples):
        return samples
    chosen = sorted(random.Random(seed).sample(range(len(samples)), num))
    return [samples[i] for i in chosen]
