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
        self.num_frozen = 0

    def freeze(self, num_layers: int) -> None:
        """Count the interface's first ``num_layers`` modules to what is frozen: `encode` gives their output."""
        self.num_frozen = num_layers
        self.interface[:num_layers].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Modality:
        """Set the interface's mode; what is frozen stays in eval mode, batch-norm statistics and dropout included."""
        super().train(mode)
        self.encoder.eval()
        self.interface[: self.num_frozen].eval()
        return self

    def connect(self, embeddings: Callable[[], Tensor], tokenizer: Any) -> None:
        """Tell those modules of the interface that ask for it (by a method ``connect``) the LLM's input embeddings (V, D), to be
        had when they are needed, and its tokenizer."""
        for layer in self.interface:
            connect: Any = getattr(layer, "connect", None)
            if connect is not None:
                connect(embeddings, tokenizer)

    @torch.no_grad()
    def encode(self, media: Media) -> Features:
        """What is frozen gives of all items, (N, F, E): computed, or as it came from the cache."""
        if media.features is not None:
            return media.features
        assert media.inputs is not None, "media carry inputs or features"
        device = next(self.encoder.parameters(), torch.empty(0)).device
        features = self.encoder(**{name: tensor.to(device) for name, tensor in media.inputs.items()})
        return self.interface[: self.num_frozen](features)

    def forward(self, media: Media) -> Features:
        """Embeddings (N, U, D) with their lengths."""
        features = self.encode(media)
        device = next(self.interface.parameters()).device
        return self.interface[self.num_frozen :](Features(features.x.to(device), features.lengths.to(device)))
