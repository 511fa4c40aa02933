"""Raw records to training samples: one function a task, listed in ``TASKS``.

``task(record, rng, **options)`` returns all samples of a record. Samples about one photo hold the same bytes object, so
that a batch can encode it once; the same seed of ``rng`` gives the same samples. A record that lacks what the task
needs raises DataError.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from x2l.data.caption_qa import question_answers
from x2l.data.prompts import instructions
from x2l.data.sources import DataError, Record
from x2l.types import Message, Part, Sample, assistant, user

EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "sound": ("wav", "flac", "opus", "ogg", "mp3", "m4a", "aac"),
    "video": ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "ogv"),
}
READS = {"image": ("image",), "speech": ("sound", "video"), "audio": ("sound", "video"), "video": ("video", "image")}


def media_part(record: Record, modality: str) -> Part:
    """The record's one file that the modality reads; speech and audio also read the sound track of a video, and video reads
    a picture as a video that stands still."""
    for kind in READS[modality]:
        found = [blob for ext, blob in record.media.items() if ext in EXTENSIONS[kind]]
        if len(found) == 1:
            return Part(modality, bytes=found[0])
        if found:
            raise DataError(f"{record.key}: {len(found)} {kind} files, which one is meant? ({', '.join(record.media)})")
    raise DataError(f"{record.key}: no {modality} among its files ({', '.join(record.media) or 'none'})")


def messages(record: Record, rng: random.Random) -> list[Sample]:
    """A row that is a sample already; a part's ``key`` names the media file of the record by its extension."""
    try:
        sample = Sample.from_dict({"id": record.key} | record.fields)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not sample.messages or sample.messages[-1].role != "assistant":
        raise DataError(f"{record.key}: the last message must be the assistant's")
    resolved = tuple(Message(m.role, tuple(_resolve(p, record) for p in m.content)) for m in sample.messages)
    return [Sample(sample.id, resolved, sample.meta)]


def caption(record: Record, rng: random.Random, lang: str = "en", num: int | None = None, modality: str = "image") -> list[Sample]:
    """One sample for each caption in ``record.fields[lang]``; all of them share one sampled instruction, as one
    prefix. ``modality: video`` is for captions of videos."""
    pool = "caption" if modality == "image" else modality
    image, question = media_part(record, modality), rng.choice(instructions(pool, lang))
    meta = {"task": "caption", "lang": lang}
    captions = _texts(record, lang)
    texts = [tidy(text, lang) for text in (captions if num is None else rng.sample(captions, min(num, len(captions))))]
    return [
        Sample(f"{record.key}/caption-{lang}-{i}", (user(image, question), assistant(text)), meta)
        for i, text in enumerate(texts)
        if text
    ]


def caption_qa(record: Record, rng: random.Random, num_pairs: int = 4) -> list[Sample]:
    """Up to ``num_pairs`` questions about a photo with answers that its English captions imply
    (``data/caption_qa.py``)."""
    image, captions = media_part(record, "image"), [tidy(text, "en") for text in _texts(record, "en")]
    return [
        Sample(
            f"{record.key}/qa-{i}",
            (user(image, pair.question), assistant(pair.answer)),
            {"task": "qa", "kind": pair.kind},
        )
        for i, pair in enumerate(question_answers(captions, rng, num_pairs))
    ]


def dictated(speech: Part, instruction: str, *before: Part) -> Message:
    """The request to write speech down: it stands last, on a line of its own, as small LLMs copy best (dev/LOG.md)."""
    return user(*before, f"{instruction}\n", speech)


def asr(record: Record, rng: random.Random, lang: str | None = None) -> list[Sample]:
    """Speech and an instruction to write it down; the answer is ``record.fields["text"]``. Languages are told by the row, or
    by ``lang``."""
    text = record.fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{record.key}: no transcript in 'text', got {text!r}")
    lang = lang or record.fields.get("lang") or ("zh" if HAN.search(text) else "en")
    speech, question = media_part(record, "speech"), rng.choice(instructions("asr", lang))
    meta = {"task": "asr", "lang": lang}
    return [Sample(f"{record.key}/asr", (dictated(speech, question), assistant(sentence_case(text.strip()))), meta)]


def sound(record: Record, rng: random.Random, lang: str = "en") -> list[Sample]:
    """Audio events: a sound, then an instruction; the answer is the class in ``record.fields[lang]``, as a sentence."""
    label = record.fields.get(lang)
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{record.key}: no class of sound in {lang!r}, got {label!r}")
    heard, question = media_part(record, "audio"), rng.choice(instructions("sound", lang))
    return [Sample(f"{record.key}/sound-{lang}", (user(heard, question), assistant(tidy(label, lang))), {"task": "sound"})]


def lips(record: Record, rng: random.Random) -> list[Sample]:
    """A silent video of a speaker, then an instruction; the answer is ``record.fields["text"]``, in English."""
    (sample,) = asr(record, rng, "en")
    question = user(media_part(record, "video"), rng.choice(instructions("lips", "en")))
    return [Sample(f"{record.key}/lips", (question, sample.messages[-1]), {"task": "lips", "lang": "en"})]


TASKS: dict[str, Callable[..., list[Sample]]] = {
    "messages": messages,
    "caption": caption,
    "caption_qa": caption_qa,
    "asr": asr,
    "sound": sound,
    "lips": lips,
}

HAN = re.compile(r"[\u4e00-\u9fff]")
CHINESE = r"[\u4e00-\u9fff\u3001\u3002\uff01\uff0c\uff1f]"  # characters and their punctuation
CHINESE_SPACE = re.compile(rf"(?<={CHINESE})\s+|\s+(?={CHINESE})")


def tidy(text: str, lang: str) -> str:
    """Undo the tokenisation of a caption and make it a sentence: ``a dog 's toy , red .`` -> ``A dog's toy, red.``"""
    text = " ".join(text.split())
    if lang == "zh":
        text = CHINESE_SPACE.sub("", text)
        return text if not text or text[-1] in "。！？" else text.rstrip(".") + "。"
    text = re.sub(r'" ?([^"]*?) ?"', r'"\1"', text)  # quotes in pairs; an odd one stays as it is
    text = re.sub(r" (?=[.,;:!?)\]])|(?<=[(\[#$]) ", "", text)
    text = re.sub(r" (?=(?:'(?:s|re|ve|ll|d|m)|n't)\b)", "", text)
    text = re.sub(r"(?<=s) '(?= )", "'", text)  # the dogs ' toys
    text = re.sub(r"[.,;: ]+$", "", text)
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in "!?" else ".")


def sentence_case(text: str) -> str:
    """Transcripts in capitals become sentences: ``WHAT I SAID`` -> ``What I said``; others stay as they are."""
    if not text.isupper():
        return text
    text = re.sub(r"\bi(?=\b)", "I", text.lower())
    return text[0].upper() + text[1:]


def _texts(record: Record, field: str) -> list[str]:
    texts: Any = record.fields.get(field)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{record.key}: expected captions in {field!r}, got {str(texts)[:80]!r}")
    return texts


def _resolve(part: Part, record: Record) -> Part:
    if part.key is None:
        return part
    if part.key not in record.media:
        raise DataError(f"{record.key}: no {part.key!r} among its files ({', '.join(record.media) or 'none'})")
    return Part(part.type, bytes=record.media[part.key])
