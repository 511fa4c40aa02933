"""The I-, V- and S-Adapter: one linear layer from the former's width to the LLM's (paper, section 3.1)."""

from __future__ import annotations

from torch import nn

from x2l.types import Features


class Adapter(nn.Module):
    """Linear E -> D whose outputs start at the scale of the LLM's own token embeddings.

    Args:
        width: E, width of the former's output (layer-normalised, so of unit variance).
        out_width: D, width of the LLM.
        out_std: standard deviation of the LLM's token embeddings; a frozen LLM reads inputs of that size.
    """

    def __init__(self, width: int, out_width: int, out_std: float = 0.02):
        super().__init__()
        self.linear = nn.Linear(width, out_width)
        nn.init.normal_(self.linear.weight, std=out_std / width**0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Features:
        """(N, F, E) -> (N, F, D), lengths unchanged."""
        return Features(self.linear(features.x), features.lengths)
