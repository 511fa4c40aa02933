"""Spoken questions: synthetic speech (flite) of questions drawn from a small grammar.

Synthetic speech is for training and for asking; no error rate is ever measured on it together with real speech.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from x2l.data.prompts import instructions
from x2l.data.sources import Record
from x2l.data.transforms.speak import levelled, to_flac
from x2l.data.transforms.tts import synthesizer

VOICES = ("awb", "kal", "rms")
HELD_OUT_VOICE = "slt"  # never trained on: it asks the held-out questions


def questions(num: int, seed: int = 0, lang: str = "en") -> list[str]:
    """Different questions from the grammar ``prompts/questions.<lang>.txt``.

    Its lines ``= slot: a | b`` name the fillers of ``{slot}``; every other line is a template.

    Raises:
        ValueError: the grammar does not hold that many; the message says how many it gave.
    """
    lines = instructions("questions", lang)
    slots = {name.strip(): values.split(" | ") for name, _, values in (x[1:].partition(": ") for x in lines if x[0] == "=")}
    rng = random.Random(seed)
    return different(num, [line for line in lines if line[0] != "="], lambda slot: rng.choice(slots[slot]), rng)


def different(num: int, templates: Sequence[str], fill: Callable[[str], str], rng: random.Random) -> list[str]:
    """``num`` different sentences by filling the ``{slots}`` of random templates.

    Raises:
        ValueError: 20 tries a sentence do not give that many.
    """
    found = dict[str, None]()
    for _ in range(20 * num):
        text = re.sub(r"{(\w+)}", lambda slot: fill(slot[1]), rng.choice(templates))
        found[text[0].upper() + text[1:]] = None
        if len(found) == num:
            return list(found)
    raise ValueError(f"the grammar gave {len(found)} different questions, {num} were asked for")


def first_sentence(answer: str) -> str:
    """An answer cut after its first sentence; "" where it holds no whole sentence."""
    found = re.match(r".+?[.!?](?=\s|$)", answer.strip(), re.DOTALL)
    return found[0] if found else ""


def spoken_questions(texts: Sequence[str], voices: Sequence[str], answers: Sequence[str] | None = None) -> Iterator[Record]:
    """One record a question, the voices in turn: its sound, its ``text`` and, where there is one, the answer as messages.

    As samples (task ``messages``) they teach that a spoken question is answered like a typed one; as transcripts (task
    ``asr``) they are plain speech. With ``answers``, questions whose answer is empty are left out.

    Raises:
        DataError: flite is not installed, or lacks a voice; the message names it.
    """
    flite = synthesizer("flite")
    for voice in voices:
        flite.check(voice)
    for i, text in enumerate(texts):
        if answers is not None and not answers[i]:
            continue
        voice = voices[i % len(voices)]
        fields: dict[str, Any] = {"text": text, "lang": "en", "spk": voice}
        if answers is not None:
            question = {"role": "user", "content": [{"type": "speech", "key": "flac"}]}
            fields["messages"] = [question, {"role": "assistant", "content": answers[i]}]
        yield Record(f"question-{i:05}", fields, {"flac": to_flac(levelled(*flite.speak(text, voice, speed=1.0)))})
