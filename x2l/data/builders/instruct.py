"""A multimodal instruction set of the paper's kinds (arXiv 2305.04160, section 3.3 and appendix A.1).

Each sample is an instruction, drawn from a pool of paraphrases, and an answer that people wrote or a stated rule gives:

- image-text: a photo and one of its captions.
- speech-text: a recording and its transcript.
- video-text: a video and its description; a talking head says its transcript.
- image-text-speech: a photo, a question spoken about it, and the answer (``builders/vsdial.py``).
- image-speech-text: the same photo and question, to be written down (the paper's multimodal speech recognition, Table 4).
- conversation: a photo and its caption, the question spoken in the next turn, then another photo and its caption.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x2l.data.prompts import instructions
from x2l.data.sources import DataError, Record, Source
from x2l.data.tasks import EXTENSIONS, sentence_case, tidy
from x2l.data.tools import write_shards
from x2l.data.transforms.base import PROVENANCE, rng_of

TALKING = {"en": 'A person faces the camera and says: "{text}."', "zh": "一个人面对镜头，用英语说：“{text}。”"}


@dataclass(frozen=True)
class Part:
    """Rows of one kind: ``num`` of a source at most (None: all), as samples in ``lang``."""

    kind: str
    source: Source
    lang: str
    num: int | None = None
    licence: str = ""
    talking: bool = False  # video-text: the text is what the person in the video says


Turns = list[tuple[list[dict[str, Any]], str]]  # each with the parts of what is asked, and the answer
Sample = tuple[Turns, dict[str, bytes]]  # and the media


def image_text(record: Record, part: Part, rng: random.Random) -> Sample:
    ext, blob = _file(record, "image")
    captions = record.fields.get(part.lang) or []
    captions = [captions] if isinstance(captions, str) else captions
    if not captions:
        raise DataError(f"no caption in {part.lang!r}")
    return [([{"type": "image", "key": ext}, _ask("caption", part, rng)], tidy(rng.choice(captions), part.lang))], {ext: blob}


def speech_text(record: Record, part: Part, rng: random.Random) -> Sample:
    ext, blob = _file(record, "sound")
    asked = _ask("asr", part, rng)["text"] + "\n"  # as in x2l.data.tasks.dictated
    parts = [{"type": "text", "text": asked}, {"type": "speech", "key": ext}]
    return [(parts, sentence_case(_words(record)))], {ext: blob}


def video_text(record: Record, part: Part, rng: random.Random) -> Sample:
    ext, blob = _file(record, "video")
    if part.talking:
        answer = TALKING[part.lang].format(text=_words(record))
    else:
        answer = tidy(rng.choice(record.fields.get(part.lang) or [""]), part.lang)
    return [([{"type": "video", "key": ext}, _ask("video", part, rng)], answer)], {ext: blob}


def image_text_speech(record: Record, part: Part, rng: random.Random) -> Sample:
    (image, photo), (sound, speech) = _file(record, "image"), _file(record, "sound")
    parts = [{"type": "image", "key": image}, {"type": "speech", "key": sound}]
    if rng.random() < 0.5:  # who asks by voice often types nothing
        parts.append(_ask("spoken_question", part, rng))
    return [(parts, _reply(record))], {image: photo, sound: speech}


def image_speech_text(record: Record, part: Part, rng: random.Random) -> Sample:
    (image, photo) = _file(record, "image")
    [(spoken, text)], media = speech_text(record, part, rng)
    return [([{"type": "image", "key": image}, *spoken], text)], {image: photo, **media}


def conversation(record: Record, part: Part, rng: random.Random) -> Sample:
    (image, photo), (sound, speech) = _file(record, "image"), _file(record, "sound")
    other = part.source[rng.choice(_in_language(part))]
    ext, blob = _file(other, "image")
    second = f"second.{ext}"
    turns: Turns = [
        ([{"type": "image", "key": image}, _ask("caption", part, rng)], tidy(record.fields["caption"], part.lang)),
        ([{"type": "speech", "key": sound}], _reply(record)),
        ([{"type": "image", "key": second}, _ask("caption", part, rng)], tidy(other.fields["caption"], part.lang)),
    ]
    return turns, {image: photo, sound: speech, second: blob}


KINDS: dict[str, Callable[[Record, Part, random.Random], Sample]] = {
    "image-text": image_text,
    "speech-text": speech_text,
    "video-text": video_text,
    "image-text-speech": image_text_speech,
    "image-speech-text": image_speech_text,
    "conversation": conversation,
}


def build_instruct(parts: list[Part], out: Path, split: str = "train", seed: int = 0) -> list[Path]:
    """Write samples of all parts, mixed, as ``<out>/<split>-0000.tar``; shards of an earlier run are replaced.

    Raises:
        DataError: an unknown kind, or a part without usable rows or with too many bad ones.
    """
    for part in parts:
        if part.kind not in KINDS:
            raise DataError(f"no kind {part.kind!r}; there are: {', '.join(KINDS)}")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{split}-[0-9]*.tar"):
        old.unlink()
    return write_shards(_samples(parts, split, seed), out, split)


def _samples(parts: list[Part], split: str, seed: int) -> Iterator[Record]:
    plan = [(number, row) for number, part in enumerate(parts) for row in _chosen(part, number, seed)]
    random.Random(seed).shuffle(plan)
    for number, row in plan:
        part = parts[number]
        key = f"{split}-{part.kind}-{part.lang}-{number}-{row:07d}"
        try:
            record = part.source[row]
            turns, media = KINDS[part.kind](record, part, rng_of(seed, key))
            if not all(answer.strip() for _, answer in turns):
                raise DataError("an empty answer")
        except DataError as error:
            part.source.issues.add(part.source.rows[row].key, error)
            continue
        yield Record(key, _fields(key, part, record, turns), media)


def _fields(key: str, part: Part, record: Record, turns: Turns) -> dict[str, Any]:
    kept = {name: record.fields[name] for name in ("text", "spk", "source", PROVENANCE) if name in record.fields}
    return {
        "id": key,
        "messages": [
            {"role": role, "content": content} for turn in turns for role, content in zip(("user", "assistant"), turn, strict=True)
        ],
        "kind": part.kind,
        "lang": part.lang,
        "row": record.key,
        "licence": part.licence or record.fields.get("licence", "not stated"),
        **kept,
    }


def _chosen(part: Part, number: int, seed: int) -> list[int]:
    rows = range(len(part.source))
    if part.kind in ("image-text-speech", "image-speech-text", "conversation"):
        return _in_language(part)[: part.num]
    if part.num is None or part.num >= len(rows):
        return list(rows)
    return sorted(random.Random(f"{seed}/{number}").sample(rows, part.num))


@functools.lru_cache(maxsize=4)
def _in_language(part: Part) -> list[int]:
    """The rows of a VSDial set, which is in both languages, that are in the part's."""
    return [i for i, row in enumerate(part.source.rows) if re.search(rf"-{part.lang}\d+$", row.key)]


def _ask(pool: str, part: Part, rng: random.Random) -> dict[str, Any]:
    return {"type": "text", "text": rng.choice(instructions(pool, part.lang))}


def _file(record: Record, kind: str) -> tuple[str, bytes]:
    found = [(ext, blob) for ext, blob in record.media.items() if ext in EXTENSIONS[kind]]
    if len(found) != 1:
        raise DataError(f"{len(found)} {kind} files, expected one ({', '.join(record.media) or 'none'})")
    return found[0]


def _reply(record: Record) -> str:
    question, reply = record.fields["messages"][:2]
    if (question["role"], reply["role"]) != ("user", "assistant"):
        raise DataError("not a row of builders/vsdial.py")
    return str(reply["content"])


def _words(record: Record) -> str:
    text = record.fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"no transcript in 'text', got {str(text)[:60]!r}")
    return text.strip()
