"""Image encoders of timm and open_clip, each an extra of X2L; weights come from safetensors files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from x2l.types import Features
from x2l.weights import resolve


class TokenEncoder(nn.Module):
    """All tokens, or the feature grid, that ``tokens`` gives for processed images.

    Args:
        model: the network.
        tokens: its method, (N, 3, H, W) -> (N, F, E) or (N, E, h, w), or (N, h, w, E) with ``channels_last``.
        width: E.
    """

    def __init__(self, model: nn.Module, tokens: Callable[[Tensor], Tensor], width: int, channels_last: bool = False) -> None:
        super().__init__()
        self.model, self.width = model, width
        self._tokens, self._channels_last = tokens, channels_last

    def forward(self, pixel_values: Tensor) -> Features:
        """Processed images (N, 3, H, W) -> Features (N, F, E); a grid is read row by row."""
        x = self._tokens(pixel_values)
        if x.ndim == 4:
            x = x.flatten(1, 2) if self._channels_last else x.flatten(2).transpose(1, 2)
        return Features(x, torch.full((len(x),), x.shape[1], device=x.device))


class TransformProcessor:
    """RGB images -> ``pixel_values`` (N, 3, H, W) by a library's own transform of one image."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}


def build_timm(weights: str) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """A timm image model without its classifier, with its own evaluation transform.

    Args:
        weights: spec of a folder with ``config.json`` and ``model.safetensors``, as timm's hub pages have them.

    Raises:
        ValueError: timm is not installed, or the folder is not one of its models.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises the latter
        raise ValueError(f"the encoder 'timm' needs an extra: pip install 'x2l[timm]' ({error})") from error
    folder = _with_safetensors(weights, "model.safetensors")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    except (RuntimeError, OSError, KeyError, AssertionError) as error:
        raise ValueError(f"{weights}: timm {timm.__version__} cannot load it: {error}") from error
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return _timm_tokens(model), TransformProcessor(transform)


def build_open_clip(weights: str) -> tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]:
    """The image tower of an open_clip model, with its own evaluation transform.

    Args:
        weights: spec of a folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Raises:
        ValueError: open_clip is not installed, the folder is not one of its models, or its tower gives no tokens.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"the encoder 'open_clip' needs an extra: pip install 'x2l[open-clip]' ({error})") from error
    folder = _with_safetensors(weights, "open_clip_model.safetensors")
    try:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    except (RuntimeError, OSError, KeyError, AssertionError) as error:
        raise ValueError(f"{weights}: open_clip {open_clip.__version__} cannot load it: {error}") from error
    tower: Any = model.visual
    if hasattr(tower, "trunk"):
        return _timm_tokens(tower.trunk), TransformProcessor(transform)
    if not hasattr(tower, "output_tokens"):
        raise ValueError(f"{weights}: an open_clip {type(tower).__name__} gives one vector an image, X2L needs its tokens")
    tower.output_tokens = True
    encoder = TokenEncoder(tower, lambda pixels: tower(pixels)[1], tower.ln_post.normalized_shape[0])
    return encoder, TransformProcessor(transform)


def _timm_tokens(model: Any) -> TokenEncoder:
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return TokenEncoder(model, model.forward_features, model.num_features, channels_last)


def _with_safetensors(weights: str, name: str) -> Path:
    folder = resolve(weights)
    if not (folder / name).is_file():
        raise ValueError(f"{weights}: {folder} holds no {name}; X2L loads no pickled weights")
    return folder
