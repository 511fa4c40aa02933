"""Spoken questions: synthetic speech (flite) of questions drawn from a small grammar.

Synthetic speech is for training and for asking; no error rate is ever measured on it together with real speech.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from x2l.data.prompts import instructions
from x2l.data.sources import DataError, Record
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


def dictation(num: int, words: Sequence[str], seed: int = 0, lang: str = "en") -> list[str]:
    """Different sentences without sense, the templates of ``prompts/dictation.<lang>.txt`` filled with ``words``.

    They teach the sound of every word; common words come more often: the rank of a word is drawn as N u^2, u uniform in [0, 1).

    Args:
        words: the most common one first, as in `common_words`.
    """
    rng = random.Random(seed)
    return different(num, instructions("dictation", lang), lambda slot: words[int(len(words) * rng.random() ** 2)], rng)


def common_words(tokenizer: Any, num: int = 10_000) -> list[str]:
    """English words of at least two letters that are one token of an LLM, most common first (the order of the merges).

    A dictionary tells words from pieces of words: misaki's, with the endings -s, -es, -d, -ed and -ing.

    Raises:
        DataError: misaki is not installed.
    """
    try:
        known = json.loads((files("misaki") / "data" / "us_gold.json").read_text(encoding="utf-8"))
    except ModuleNotFoundError as error:
        raise DataError("telling words from pieces of words needs misaki: pip install 'x2l[data]'") from error
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    words = [text.strip() for text in texts if re.fullmatch(r" [a-z]{2,}", text)]

    def is_word(text: str) -> bool:
        stems = {text, *(text.removesuffix(ending) for ending in ("s", "es", "d", "ed", "ing")), re.sub("ing$", "e", text)}
        return any(len(stem) > 1 and stem in known for stem in stems)

    return [word for word in words if is_word(word)][:num]


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
