"""Visual spoken dialogue (arXiv 2305.04160, appendix A.1): a photo, a spoken question about it, a written answer.

Questions come from dialogues (VisDial, translated by ``x2l data transform translate``), or from human captions by the rules of
``caption_qa``. Equal questions are spoken once for each of ``takes``. The picture is the visual context, a caption the
linguistic one. Test questions are chosen by a hash of their words, so that no test question is heard in training, however
the data grow; test voices are others, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from x2l.data.caption_qa import Wanted, question_answers
from x2l.data.caption_qa_zh import question_answers_zh
from x2l.data.sources import DataError, Record, Source, read_source
from x2l.data.tasks import EXTENSIONS, tidy
from x2l.data.tools import language, write_shards
from x2l.data.transforms.base import PROVENANCE, rng_of
from x2l.data.transforms.runner import Summary, run
from x2l.data.transforms.speak import Speak

TEST_SHARE = 0.15  # of all questions


class Asked(NamedTuple):
    """A question about the photo of a row (by its place in the source), before it is spoken."""

    key: str
    row: int
    lang: str
    question: str
    answer: str
    kind: str
    caption: str


def from_captions(record: Record, row: int, rng: random.Random, num_pairs: int, may_ask: Wanted) -> Iterator[Asked]:
    """Questions that ``may_ask`` allows: in English, and in Chinese where there are native captions in both languages."""
    english = [tidy(text, "en") for text in record.fields.get("en", [])]
    chinese = [tidy(text, "zh") for text in record.fields.get("zh", [])]
    pairs = {"en": question_answers(english, rng, num_pairs, may_ask) if english else []}
    pairs["zh"] = question_answers_zh(english, chinese, rng, num_pairs, may_ask) if english and chinese else []
    for lang, found in pairs.items():
        for i, pair in enumerate(found):
            caption = rng.choice({"en": english, "zh": chinese}[lang])
            yield Asked(f"{record.key}-{lang}{i}", row, lang, pair.question, pair.answer, pair.kind, caption)


def from_dialogue(record: Record, row: int, rng: random.Random, num_pairs: int, may_ask: Wanted) -> Iterator[Asked]:
    """Of the first ``num_pairs`` questions of a dialogue, with their answers, those that ``may_ask`` allows."""
    texts = [_text(message) for message in record.fields.get("messages", [])]
    captions = [record.fields[name] for name in ("caption_zh", "caption") if name in record.fields]
    for i, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=False)):
        lang = language(question)
        caption = next((text for text in captions if language(text) == lang), "")
        if i < num_pairs and question.strip() and answer.strip() and may_ask(question):
            yield Asked(f"{record.key}-{lang}{i}", row, lang, question, answer, "dialogue", caption)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part["type"] == "text")


def held_out(question: str, seed: int) -> bool:
    """Whether a question, by its words alone, belongs to the test set."""
    digest = hashlib.sha256(f"{seed}/{' '.join(question.lower().split())}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < TEST_SHARE


def questions(
    source: Source, test: bool, make: Callable[..., Iterator[Asked]] = from_captions, num_pairs: int = 4,
    num_rows: int | None = None, seed: int = 0,
) -> list[Asked]:  # fmt: skip
    """The questions of a split; unreadable rows are counted in ``source.issues``.

    Args:
        source: photos with captions or dialogues. test: ask in held-out wordings alone, else in all others.
        make: ``from_captions`` or ``from_dialogue``. num_pairs: questions a photo and language.
        num_rows: photos that are read, from the first.
    """
    asked: list[Asked] = []
    for row in range(min(len(source), num_rows or len(source))):
        try:
            record = source[row]
        except DataError as error:
            source.issues.add(source.rows[row].key, error)
            continue
        asked += make(record, row, rng_of(seed, record.key), num_pairs, lambda question: held_out(question, seed) == test)
    return asked


def utterance_key(asked: Asked, takes: int, seed: int) -> str:
    """The utterance that a sample plays: equal questions share ``takes`` of them."""
    digest = hashlib.sha256(asked.question.encode()).hexdigest()[:12]
    return f"{asked.lang}-{digest}-{rng_of(seed, asked.key).randrange(takes)}"


def write_utterances(asked: Iterable[Asked], path: Path, takes: int, seed: int) -> int:
    """One JSONL row an utterance to be spoken, in the order of their keys; returns how many."""
    texts = {utterance_key(each, takes, seed): each for each in asked}
    rows = [{"id": key, "text": texts[key].question, "lang": texts[key].lang} for key in sorted(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
    return len(rows)


def build_vsdial(
    source: Source, out: Path, split: str, voices: Sequence[str], asked: list[Asked], takes: int = 2, seed: int = 0,
    workers: int = 2, licence: str = "", progress: bool = True,
) -> tuple[list[Path], Summary]:  # fmt: skip
    """Speak questions and write samples ``<out>/<split>-0000.tar``; run again after a kill, it goes on.

    ``<out>/work`` keeps the utterances (``spoken-<split>-*.tar``), each once.

    Args:
        source: where the photos of ``asked`` lie. voices: as ``Speak`` takes them. takes: utterances a question at most.
        licence: of rows that state none.

    Returns:
        The shards, and what speaking gave.

    Raises:
        DataError: there is no question, or too many could not be spoken.
    """
    if not asked:
        raise DataError(f"no question for {split!r}: more photos, or other captions, are needed")
    texts = out / "work" / f"questions-{split}.jsonl"
    write_utterances(asked, texts, takes, seed)
    speak = Speak(voices, seed=seed)
    summary = run(speak, read_source(texts), out / "work", f"spoken-{split}", workers, progress=progress)
    spoken = read_source([str(path) for path in summary.shards])
    places = {row.key: i for i, row in enumerate(spoken.rows)}
    for old in out.glob(f"{split}-[0-9]*.tar"):
        old.unlink()
    return write_shards(_samples(source, spoken, places, asked, takes, seed, licence), out, split), summary


def _samples(
    source: Source, spoken: Source, places: dict[str, int], asked: list[Asked], takes: int, seed: int, licence: str
) -> Iterator[Record]:
    """Photo, spoken question, answer; a question that could not be spoken has no sample."""
    order = list(asked)
    random.Random(seed).shuffle(order)
    for each in order:
        place = places.get(utterance_key(each, takes, seed))
        if place is not None:
            photo, utterance = source[each.row], spoken[place]
            image = next(ext for ext in photo.media if ext in EXTENSIONS["image"])
            yield Record(each.key, _fields(each, photo, utterance, image, licence), {image: photo.media[image], **utterance.media})


def _fields(asked: Asked, photo: Record, utterance: Record, image: str, licence: str) -> dict[str, Any]:
    (sound,) = utterance.media
    parts = [{"type": "image", "key": image}, {"type": "speech", "key": sound}]
    known: dict[str, Any] = {"licence": licence} if licence else {}
    known |= {name: photo.fields[name] for name in ("source", "licence") if name in photo.fields}
    return {
        "id": asked.key,
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": asked.answer}],
        "text": asked.question,
        "lang": asked.lang,
        "spk": utterance.fields["spk"],
        "kind": asked.kind,
        "caption": asked.caption,
        "photo": photo.key,
        **known,
        PROVENANCE: [*photo.fields.get(PROVENANCE, []), *utterance.fields[PROVENANCE]],
    }
