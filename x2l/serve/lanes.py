"""Decoding many answers at once: one KV cache for all of them, rows aligned at their ends.

A row joins with states that were computed for it alone and leaves when its answer ends, so that no row waits for another.
Shape letters: B rows, L positions, H key/value heads, d width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x2l.serve.store import KV


class Caches:
    """Makes the LLM's own kind of cache, empty or from stored states.

    Raises:
        ValueError: a layer of this LLM keeps something else than the keys and values of every position.
    """

    def __init__(self, llm: Any):
        probe = llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=llm.device), use_cache=True).past_key_values
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
        llm: a causal LM that `Caches` accepts.
    """

    def __init__(self, llm: Any):
        self.llm = llm
        self.lengths: list[int] = []  # positions of each row that the cache holds
        self._cache: Any = None

    def join(self, cache: Any, length: int) -> None:
        """Add a row whose ``length`` positions are in ``cache`` (B = 1), which is the lanes' own from now on."""
        if not self.lengths:
            self._cache = cache
        else:
            width = max(*self.lengths, length)
            for mine, new in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_widen(mine.keys, width), _widen(new.keys, width)])
                mine.values = torch.cat([_widen(mine.values, width), _widen(new.values, width)])
        self.lengths.append(length)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token a row, (B,) ids; logits (B, V) of the next ones."""
        device = self.llm.device
        length = torch.tensor(self.lengths, device=device)[:, None]
        width = max(self.lengths)
        mask = torch.arange(width + 1, device=device) >= width - length
        out = self.llm(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=length,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        self.lengths = [n + 1 for n in self.lengths]
        return out.logits[:, -1]

    def states(self, row: int) -> KV:
        """A copy of one row's keys and values (1, H, L, d), without padding."""
        start = max(self.lengths) - self.lengths[row]
        one = slice(row, row + 1)
        return [(layer.keys[one, :, start:].clone(), layer.values[one, :, start:].clone()) for layer in self._cache.layers]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the padding that only they needed."""
        if len(rows) == len(self.lengths):
            return
        before = max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._cache = None
            return
        start = before - max(self.lengths)
        index = torch.tensor(rows, device=self.llm.device)
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, start:].index_select(0, index)
            layer.values = layer.values[:, :, start:].index_select(0, index)


def _widen(states: Tensor, width: int) -> Tensor:
    """(B, H, L, d) -> (B, H, width, d), zeros in front."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
