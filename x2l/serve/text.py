"""Token ids to text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 8  # tokens before the new ones that are decoded with them: a SentencePiece token's text depends on its neighbour


class TextStream:
    """Turns one answer's tokens into pieces of text; their concatenation is the answer before the first stop string.

    Args:
        decode: ids -> text.
        stops: strings that end the answer and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._end = 0  # ids[:_end] have become text; ids[_start:_end] are the context of the next ones
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that this token makes certain; empty while a character or a stop string is incomplete."""
        self._ids.append(token)
        known = self.decode(self._ids[self._start : self._end])
        text = self.decode(self._ids[self._start :])
        if len(text) <= len(known) or text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            return ""
        self._start, self._end = max(self._start, len(self._ids) - CONTEXT), len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """What was held back when the answer ends."""
        known = self.decode(self._ids[self._start : self._end])
        rest = self._release(self.decode(self._ids[self._start :])[len(known) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
