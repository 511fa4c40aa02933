"""Decoding many answers at once: one KV cache for all of them, rows aligned at their ends.

A row joins with states that were computed for it alone and leaves when its answer ends, so that no row waits for another.
Shape letters: B rows, L positions, H key/value heads, d width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x2l.model import cache_name
from x2l.serve.forward import Forward, GivenUp, Over, never
from x2l.serve.store import KV

ROOM = 64  # positions that are added when there is none left


class Caches:
    """Makes the LLM's own kind of cache, empty or from stored states.

    Raises:
        ValueError: a layer of this LLM keeps something else than the keys and values of every position.
    """

    def __init__(self, llm: Any):
        probe = llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=llm.device), use_cache=True)[cache_name(llm)]
        self.config, self.make = llm.config, type(probe)
        if any(getattr(probe, "is_sliding", [])) or any(getattr(layer, "keys", None) is None for layer in probe.layers):
            raise ValueError("serving needs an LLM whose layers all attend to every position; this one keeps other states")
        self.bytes_per_position = sum(layer.keys.nbytes + layer.values.nbytes for layer in probe.layers)

    def load(self, kv: KV) -> Any:
        """A cache that holds a copy of ``kv``."""
        cache = self.make(config=self.config)
        for i, (keys, values) in enumerate(kv):
            cache.update(keys, values, i)
        return cache


class Lanes:
    """The rows that are being decoded.

    Args:
        forward: of an LLM that `Caches` accepts.
        table: its token embeddings.
        caches: makes its caches.
    """

    def __init__(self, forward: Forward, table: nn.Embedding, caches: Caches):
        self.forward, self.table, self.caches = forward, table, caches
        self.lengths: list[int] = []  # positions of each row that the cache holds
        self._cache: Any = None

    def join(self, caches: Sequence[Any], lengths: Sequence[int]) -> None:
        """Add a row for each of ``caches`` (B = 1), which hold so many positions, and from which they are copied."""
        if not self.lengths:
            self._cache = self.caches.load([])
        width = max([*self.lengths, *lengths])
        for mine, *new in zip(self._cache.layers, *(cache.layers for cache in caches), strict=True):
            held = [mine] if self.lengths else []
            Roomy.take(mine, [(layer.keys, layer.values) for layer in (*held, *new)], width)
        self.lengths += lengths

    def step(self, tokens: Sequence[int], over: Over = never) -> Tensor:
        """Feed one token a row, (B,) ids; logits (B, V) of the next ones.

        Raises:
            GivenUp: it was ``over`` before its end; all is as it was before.
        """
        device, width = self.table.weight.device, max(self.lengths)
        length = torch.tensor(self.lengths, device=device)[:, None]
        padded = min(self.lengths) < width
        visible = torch.arange(width + 1, device=device) >= width - length if padded else None
        embeds = self.table(torch.tensor(tokens, device=device)[:, None])
        try:
            logits = self.forward(embeds, length, self._cache, visible, over)
        except GivenUp:
            for layer in self._cache.layers:
                layer.update.back_to(width)
            raise
        self.lengths = [n + 1 for n in self.lengths]
        return logits

    def states(self, row: int) -> KV:
        """A copy of one row's keys and values (1, H, L, d), without padding."""
        start = max(self.lengths) - self.lengths[row]
        one = slice(row, row + 1)
        return [(layer.keys[one, :, start:].clone(), layer.values[one, :, start:].clone()) for layer in self._cache.layers]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the padding that only they needed."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._cache = None
            return
        width = max(self.lengths)
        for layer in self._cache.layers:
            Roomy.take(layer, [(layer.keys[row : row + 1], layer.values[row : row + 1]) for row in rows], width)


class Roomy:
    """Takes the place of a cache layer's ``update``: new states are written where there is room, and nothing else is copied."""

    def __init__(self, layer: Any, keys: Tensor, values: Tensor, length: int):
        self.layer, self.keys, self.values, self.length = layer, keys, values, length
        self._show()

    @classmethod
    def take(cls, layer: Any, rows: KV, width: int) -> None:
        """Fill a layer with copies of ``rows``' last ``width`` positions, zeros in front of the shorter ones."""
        keys, values = _stacked([k for k, _ in rows], width), _stacked([v for _, v in rows], width)
        layer.update, layer.is_initialized = cls(layer, keys, values, width), True

    def __call__(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = _stacked([self.keys], self.length), _stacked([self.values], self.length)
        self.keys.narrow(2, self.length, keys.shape[2]).copy_(keys)
        self.values.narrow(2, self.length, keys.shape[2]).copy_(values)
        self.length = end
        return self._show()

    def back_to(self, length: int) -> None:
        """Forget what was written after ``length`` positions."""
        self.length = length
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.layer.keys, self.layer.values = self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)
        return self.layer.keys, self.layer.values


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    """(b, H, L, d) each -> (B, H, width + ROOM, d): their ends at ``width``, zeros in front."""
    _, heads, _, dim = rows[0].shape
    out = rows[0].new_zeros(sum(map(len, rows)), heads, width + ROOM, dim)
    start = 0
    for row in rows:
        length = min(row.shape[2], width)
        out[start : start + len(row), :, width - length : width] = row[:, :, row.shape[2] - length :]
        start += len(row)
    return out
