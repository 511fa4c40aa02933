"""What the engine takes and gives: how to decode, and an answer that is read while it is made."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field


class RequestError(ValueError):
    """The request cannot be answered as it is; the message is for its sender."""


class Busy(RuntimeError):
    """Too many requests; try again after ``retry_after`` seconds."""

    retry_after = 1


class EngineError(RuntimeError):
    """The engine failed on a request; the log says why, the message does not."""


class Timeout(EngineError):
    """The request took longer than allowed."""


@dataclass(frozen=True)
class Decode:
    """How to decode one answer.

    Attributes:
        max_new_tokens: longest answer; None = as long as the context and the engine's own limit allow.
        temperature: 0 = greedy.
        top_p: nucleus of the sampling, in (0, 1].
        seed: of the sampling; the same seed gives the same answer, whatever else is decoded at the time.
        stop: strings that end the answer.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Usage:
    """Counts of tokens; ``media`` says how many of the prompt's are embeddings of each modality."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    media: dict[str, int] = field(default_factory=dict)


class Answer:
    """Pieces of text as they are decoded, to be iterated once, from a thread or a coroutine.

    Iteration raises `RequestError` or `EngineError` where the answer fails. Afterwards ``finish_reason`` is ``"stop"``,
    ``"length"`` or ``"cancelled"``, and ``usage`` has the counts.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.usage = Usage()
        self.cancelled = False
        self._items: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._wake: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """Stop computing; takes effect before the next decode step, and mostly earlier where others wait."""
        self.cancelled = True

    def put(self, item: str | Exception | None) -> None:
        """For the engine: a piece, an error, or None for the end."""
        self._items.put(item)
        self._wake()

    def __iter__(self) -> Iterator[str]:
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while True:
            ready.clear()
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                await ready.wait()
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item
