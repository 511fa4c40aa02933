"""From photographs to the normalised pixels of an image encoder that brings no processor of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class ImageProcessor:
    """RGB images of any size -> ``pixel_values`` (N, 3, size, size).

    Args:
        size: edge of the square, in pixels.
        mean, std: of each channel, on a scale from 0 to 1.
        crop: ``None`` squashes the whole picture into the square; a fraction (0, 1] keeps the aspect ratio, scales the
            shorter edge to ``size / crop`` and cuts the square out of the middle.

    Raises:
        ValueError: ``crop`` is out of range.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], crop: float | None = None) -> None:
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(f"crop={crop}: must be a fraction in (0, 1], or none to squash the picture")
        self.size, self.crop = size, crop
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        pixels_NHW3 = np.stack([np.asarray(self._square(image)) for image in images])
        values_N3HW = torch.from_numpy(pixels_NHW3).permute(0, 3, 1, 2).float().div_(255)
        return {"pixel_values": values_N3HW.sub_(self.mean).div_(self.std)}

    def _square(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        shorter = int(self.size / self.crop)
        width, height = (edge * shorter // min(image.size) for edge in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + self.size, top + self.size))
