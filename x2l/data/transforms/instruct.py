"""A language model writes questions, answers and dialogues about a row from its captions, boxes and transcripts.

The model never sees the picture: the prompt (a file of ``prompts/instruct``) holds what people wrote about it. A reply must
be a JSON list of question and answer; a refusal or anything else is counted, asked again, and never kept.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from x2l.data.prompts import POOLS
from x2l.data.sources import DataError, Record
from x2l.data.tasks import EXTENSIONS
from x2l.data.transforms.base import Done, Skipped, noted, rng_of
from x2l.endpoint import Reply

PROMPTS = POOLS / "instruct"
MAX_TURNS, LONGEST = 20, 4000  # turns of a reply, characters of a turn
FACTS = ("en", "zh", "text", "caption", "boxes")  # fields that a prompt may tell of
MODALITIES = {"image": "image", "video": "video", "sound": "speech"}


class Chat(Protocol):
    """Something that completes messages (``ChatEndpoint``)."""

    model: str

    def complete(self, messages: Sequence[dict[str, str]], **options: Any) -> Reply:
        """The reply."""


class Instruct:
    """A row -> the same row with ``messages``, written by a model.

    Args:
        chat: the model. prompt: a name of ``prompts/instruct`` (as ``conversation.en``), or a text file; ``{facts}`` in it
            is replaced by what is known. attempts: replies asked for at most. seed: of the first; each further one
            takes the next. temperature, max_tokens: of the reply.
    """

    name, version, batch = "instruct", "1", 1

    def __init__(
        self, chat: Chat, prompt: str, attempts: int = 3, seed: int = 0, temperature: float = 0.7, max_tokens: int = 1024
    ) -> None:
        self.chat, self.attempts, self.seed, self.temperature, self.max_tokens = chat, attempts, seed, temperature, max_tokens
        self.prompt, self.text = Path(prompt).stem if Path(prompt).is_file() else prompt, read_prompt(prompt)

    def settings(self) -> dict[str, Any]:
        return {"model": self.chat.model, "prompt": self.prompt, "text": self.text, "temperature": self.temperature,
                "max_tokens": self.max_tokens, "attempts": self.attempts, "seed": self.seed}  # fmt: skip

    def __call__(self, rows: Sequence[Record]) -> Done:
        counts: Counter[str] = Counter()
        return Done([self._row(row, counts) for row in rows], counts)

    def _row(self, row: Record, counts: Counter[str]) -> Record | Skipped:
        try:
            content = self.text.replace("{facts}", facts_of(row))
            place = _media(row)
        except DataError as error:
            return Skipped(row.key, str(error))
        first, problem = rng_of(self.seed, row.key).getrandbits(31), ""
        for attempt in range(self.attempts):
            options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": first + attempt}
            reply = self.chat.complete([{"role": "user", "content": content}], **options)
            counts.update(reply.counts)
            try:
                messages = _messages(parse_turns(reply.text), place)
            except ReplyError as error:
                problem = str(error)
                counts.update({error.kind: 1})
                continue
            return noted(row, self, {"id": row.key, "messages": messages}, attempt=attempt)
        return Skipped(row.key, f"no usable reply in {self.attempts} attempts, the last: {problem}")


class ReplyError(ValueError):
    """A reply that is not kept; ``kind`` is "refusals" or "malformed"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_turns(reply: str) -> list[tuple[str, str]]:
    """Questions and answers of a reply: a JSON list of ``{"question", "answer"}``, in a code fence or bare.

    Raises:
        ReplyError: a refusal (``prompts/instruct/refusals.txt``), or not of this form.
    """
    text = re.sub(r"^\s*```(?:json)?\s*|\s*```\s*$", "", reply)
    try:
        rows = json.loads(text)
        turns = [(row["question"], row["answer"]) for row in rows]
        whole = isinstance(rows, list) and 0 < len(turns) <= MAX_TURNS and all(isinstance(t, str) for turn in turns for t in turn)
        usable = whole and all(t.strip() and len(t) <= LONGEST and "\ufffd" not in t for turn in turns for t in turn)
    except (ValueError, TypeError, KeyError, RecursionError):
        usable, turns = False, []
    if any(pattern.search(text) for pattern in _refusals()):
        raise ReplyError("refusals", f"a refusal: {reply[:80]!r}")
    if not usable:
        raise ReplyError("malformed", f"not a list of questions and answers: {reply[:80]!r}")
    return [(question.strip(), answer.strip()) for question, answer in turns]


def _refusals() -> list[re.Pattern[str]]:
    lines = (PROMPTS / "refusals.txt").read_text(encoding="utf-8").splitlines()
    return [re.compile(line, re.IGNORECASE) for line in lines if line]


def read_prompt(prompt: str) -> str:
    """A prompt by name or path.

    Raises:
        DataError: there is none, or it has no place for facts.
    """
    path = Path(prompt) if Path(prompt).is_file() else PROMPTS / f"{prompt}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.*.txt")))
        raise DataError(f"no prompt {prompt!r}: give a file, or one of {known}")
    text = path.read_text(encoding="utf-8")
    if "{facts}" not in text:
        raise DataError(f"{path.name}: a prompt needs the place {{facts}}, where a row's captions and boxes go")
    return text


def facts_of(row: Record) -> str:
    """What people wrote about a row, as lines of text."""
    lines = []
    for name in FACTS:
        value = row.fields.get(name)
        for item in value if isinstance(value, list) else [value]:
            if item:
                lines.append(f"{'box (x, y, width, height)' if name == 'boxes' else name}: {item}")
    if not lines:
        raise DataError(f"nothing is known about it: none of {', '.join(FACTS)}")
    return "\n".join(lines)


def _media(row: Record) -> list[dict[str, str]]:
    """A part for each of the row's media files."""
    return [
        {"type": modality, "key": ext}
        for ext in row.media
        for kind, modality in MODALITIES.items()
        if ext in EXTENSIONS[kind]
    ]  # fmt: skip


def _messages(turns: list[tuple[str, str]], media: list[dict[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if messages else [*media, text]})
        messages.append({"role": "assistant", "content": answer})
    return messages
