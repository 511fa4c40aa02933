"""What the engine remembers between requests, bounded in bytes: interface outputs by content, KV states by prefix."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

Symbols = tuple[Hashable, ...]  # one for each token, and (content key, number of embeddings) for each media item
KV = list[tuple[Tensor, Tensor]]  # keys and values (B, H, L, d) of each layer


class EmbeddingStore:
    """Interface outputs (U, D) by modality and sha256 of the file; the least recently used go first. Threads may share it."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
            return found

    def put(self, key: Hashable, embeds: Tensor) -> None:
        """Keep ``embeds``, which must own its memory (no view of something larger)."""
        with self._lock:
            if key in self._items or embeds.nbytes > self.max_bytes:
                return
            self._items[key] = embeds
            self.num_bytes += embeds.nbytes
            while self.num_bytes > self.max_bytes:
                _, dropped = self._items.popitem(last=False)
                self.num_bytes -= dropped.nbytes

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._items.clear()
            self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._items)


class Prefix(NamedTuple):
    """KV states (1, H, L, d) of a sequence; ``lengths`` says how many positions each of its symbols takes."""

    lengths: tuple[int, ...]
    kv: KV

    @property
    def num_bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.kv)


class PrefixStore:
    """KV states of sequences that were computed before, found by their longest common prefix.

    Symbols identify what stands at a position by content, so that equal prefixes have equal states; the first symbol is
    the owner, so that nobody can time what another key's holder has asked.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._items: OrderedDict[Symbols, Prefix] = OrderedDict()

    def find(self, symbols: Symbols) -> tuple[int, KV]:
        """The longest known prefix of ``symbols``: its number of positions, and states cut to it (views)."""
        shared = {known: common(known, symbols) for known in self._items}
        best = max(shared, key=shared.__getitem__, default=())
        prefix = self._items.get(best)
        length = sum(prefix.lengths[: shared[best]]) if prefix else 0
        if prefix is None or not length:
            return 0, []
        self._items.move_to_end(best)
        return length, [(k[:, :, :length], v[:, :, :length]) for k, v in prefix.kv]

    def put(self, symbols: Symbols, prefix: Prefix) -> None:
        """Keep ``prefix``, in place of those that it extends."""
        if symbols in self._items or prefix.num_bytes > self.max_bytes:
            return
        for known in [known for known in self._items if known == symbols[: len(known)]]:
            self.num_bytes -= self._items.pop(known).num_bytes
        self._items[symbols] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.num_bytes -= dropped.num_bytes

    def clear(self) -> None:
        """Forget all: for the engine's thread, or while it rests."""
        self._items.clear()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._items)


def common(a: Symbols, b: Symbols) -> int:
    """Number of symbols that two sequences begin with in common, by bisection: equality of tuples is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
