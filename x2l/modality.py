"""A modality: a frozen encoder and the trained interface that turns its features into words of the LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from x2l.types import Features, Media

Processor = Callable[[list[Any]], dict[str, Tensor]]  # decoded media -> encoder inputs with leading dimension N


class Encoder(Protocol):
    """What `Modality` asks of an encoder: an nn.Module with its feature width, from inputs to features."""

    width: int

    def __call__(self, **inputs: Tensor) -> Features: ...


class Modality(nn.Module):
    """Frozen encoder -> interface. ``forward`` yields embeddings of the LLM's width D.

    Args:
        encoder: an `Encoder`; set to eval mode and frozen here, for good.
        interface: modules applied in turn, Features -> Features, the last one of width D.
    """

    def __init__(self, encoder: nn.Module, interface: Sequence[nn.Module]):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.interface = nn.Sequential(*interface)

    def train(self, mode: bool = True) -> Modality:
        """Set the interface's mode; the encoder stays in eval mode, batch-norm statistics and dropout included."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, media: Media) -> Features:
        """Features (N, F, E) of all items, computed or as they came from the cache."""
        if media.features is not None:
            return media.features
        assert media.inputs is not None, "media carry inputs or features"
        device = next(self.encoder.parameters(), torch.empty(0)).device
        return self.encoder(**{name: tensor.to(device) for name, tensor in media.inputs.items()})

    def forward(self, media: Media) -> Features:
        """Embeddings (N, U, D) with their lengths."""
        features = self.encode(media)
        device = next(self.interface.parameters()).device
        return self.interface(Features(features.x.to(device), features.lengths.to(device)))
