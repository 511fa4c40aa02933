"""Reading a sequence that grows: what layers keep of the places that are settled, so that only those after them are read again."""

from __future__ import annotations

import torch
from torch import Tensor


class Past:
    """What each layer of a stack keeps of the first ``length`` places: keys, values, or frames under a convolution.

    A read begins with `begin`, goes through the layers in the same order every time and gives each the places from ``length`` on;
    `join` puts what it kept before them. `settle` ends it. What is settled never changes, whatever is read after it: this is an
    approximation, unless the layers only look back.

    Args:
        limit: places that are kept at most, the last ones; None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.length, self.limit = 0, limit
        self._kept: list[Tensor] = []
        self._joined: list[Tensor] = []

    def begin(self) -> None:
        """Begin a read; one that was broken off is forgotten."""
        self._joined = []

    def join(self, x: Tensor) -> Tensor:
        """(..., F, E) of the places from ``length`` on -> (..., P + F, E), P of them kept."""
        place = len(self._joined)
        self._joined.append(torch.cat([self._kept[place], x], -2) if self._kept else x)
        return self._joined[-1]

    def settle(self, length: int) -> None:
        """End a read: its places before ``length`` stay as they are."""
        if length > self.length:
            end = length - self.length + (self._kept[0].shape[-2] if self._kept else 0)
            begin = 0 if self.limit is None else max(0, end - self.limit)
            self._kept = [joined[..., begin:end, :] for joined in self._joined]
            self.length = length
        self._joined = []
