"""Translate captions, transcripts and dialogues."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from x2l.data.sources import Record
from x2l.data.tools import language
from x2l.data.transforms.base import Done, Skipped, noted


class Translator(Protocol):
    """Texts of one language to another (translators.py).

    Attributes:
        name: model and version, for the record.
    """

    name: str

    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        """One translation a text; and what was counted (tokens, calls)."""


class Translate:
    """``fields[source]`` (a text or a list) -> ``fields[into]``; dialogues in place, their originals kept.

    A row fails when a translation is empty, is not in the target language, or repeats itself, and when the field of the
    result is taken.

    Args:
        translator: what translates.
        source, target: languages ("en", "zh"); captions stand in the field ``source``.
        texts: other fields to translate ("text", "caption"); the result is in ``<field>_<into>``.
        batch: rows a call.
        into: the field of the result, ``target`` if None.
    """

    name, version = "translate", "2"

    def __init__(
        self, translator: Translator, source: str, target: str, texts: Sequence[str] = (), batch: int = 8, into: str | None = None
    ) -> None:
        self.translator, self.source, self.target, self.texts, self.batch = translator, source, target, tuple(texts), batch
        self.into = into or target

    def settings(self) -> dict[str, Any]:
        return {"model": self.translator.name, "from": self.source, "to": self.target, "texts": list(self.texts), "into": self.into}

    def __call__(self, rows: Sequence[Record]) -> Done:
        by_row = [self._texts(row) for row in rows]
        texts = list(dict.fromkeys(text for found in by_row if isinstance(found, list) for text in found))
        results, counts = self.translator.translate(texts, self.source, self.target) if texts else ([], Counter[str]())
        translated = dict(zip(texts, results, strict=True))
        counts.update(texts=len(texts))
        return Done([self._row(row, found, translated) for row, found in zip(rows, by_row, strict=True)], counts)

    def _texts(self, row: Record) -> list[str] | str:
        """All that is to be translated, or why nothing is."""
        try:
            found = [text for _, value in self._fields(row) for text in ([value] if isinstance(value, str) else value)]
            found += [slot["text"] for slot in _slots(_in_parts(row.fields.get("messages", [])))]
        except (TypeError, KeyError, AttributeError):
            return f"texts that are no texts: {str(row.fields)[:80]}"
        if not all(isinstance(text, str) for text in found):
            return f"texts that are no texts: {str(row.fields)[:80]}"
        if taken := [result for result, _ in self._fields(row) if row.fields.get(result)]:
            return f"{taken[0]!r} holds something already: choose another field with --into"
        return found or f"nothing to translate: no {self.source!r} and no messages among {', '.join(row.fields)}"

    def _fields(self, row: Record) -> list[tuple[str, Any]]:
        """(field of the result, what it is made from)."""
        named = [(self.into, self.source)] + [(f"{field}_{self.into}", field) for field in self.texts]
        return [(result, row.fields[field]) for result, field in named if row.fields.get(field)]

    def _row(self, row: Record, texts: list[str] | str, translated: dict[str, str]) -> Record | Skipped:
        if isinstance(texts, str):
            return Skipped(row.key, texts)
        for text in texts:
            if problem := fault(text, translated[text], self.target):
                return Skipped(row.key, f"{problem}: {text[:60]!r} -> {translated[text][:60]!r}")
        fields: dict[str, Any] = {
            name: translated[value] if isinstance(value, str) else [translated[text] for text in value]
            for name, value in self._fields(row)
        }
        if "messages" in row.fields:
            messages = _in_parts(row.fields["messages"])
            for slot in _slots(messages):
                slot["text"] = translated[slot["text"]]
            fields |= {f"messages_{self.source}": row.fields["messages"], "messages": messages}
        return noted(row, self, fields)


def fault(text: str, translation: str, target: str) -> str | None:
    """What is wrong with a translation, or None."""
    if not translation.strip():
        return "an empty translation"
    if language(text) != "-" and language(translation) != target:
        return f"not a translation into {target!r}"
    words = list(translation) if target == "zh" else translation.split()
    if len(words) > 12 and len({*zip(words, words[1:], words[2:], strict=False)}) < 0.4 * (len(words) - 2):
        return "a translation that repeats itself"
    return None


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy in which every content is a list of parts."""
    copied = copy.deepcopy(messages)
    for message in copied:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return copied


def _slots(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text parts of messages whose contents are lists."""
    return [part for message in messages for part in message["content"] if part["type"] == "text"]
