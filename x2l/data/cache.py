"""Encoder features on disk: a frozen encoder sees each item once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[list[bytes], int], list[Tensor]]  # raw media, view -> features (F, E) each


class FeatureCache:
    """Features (F, E) in float16, one file an item and view, under a key of encoder and content.

    Args:
        folder: where the files go.
        fingerprint: what the features depend on besides the media: the encoder's weights and settings.
        encode: raw media of one view -> features; called for what is not there yet.
    """

    def __init__(self, folder: Path, fingerprint: str, encode: Encode):
        self.folder, self.encode = folder / fingerprint[:16], encode

    def __call__(self, items: Sequence[bytes], views: Sequence[int]) -> list[Tensor]:
        """Features of each item in its view, computed and stored where they are missing."""
        paths = [self._path(item, view) for item, view in zip(items, views, strict=True)]
        for view in sorted(set(views)):
            new = {p: item for p, item, v in zip(paths, items, views, strict=True) if v == view and not p.exists()}
            if new:
                for path, features in zip(new, self.encode(list(new.values()), view), strict=True):
                    _write(path, features)
        return [torch.from_numpy(np.load(path, allow_pickle=False)) for path in paths]

    def _path(self, item: bytes, view: int) -> Path:
        digest = hashlib.sha256(item).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:34]}-{view}.npy"


def _write(path: Path, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, features.to(torch.float16).cpu().numpy(), allow_pickle=False)
    os.replace(partial, path)
