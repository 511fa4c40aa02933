"""Augmented copies of media, few enough to cache the frozen encoder's features of each. View 0 is the item as it is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from x2l.data.media import SAMPLE_RATE, decode_audio, decode_image
from x2l.data.video import NUM_FRAMES, decode_video

CROP_AREA = (0.5, 1.0)  # share of the picture that a crop keeps
SPEEDS = {1: 0.9, 2: 1.1, 3: 1.0}  # speed perturbation (Ko et al., Interspeech 2015); view 3 is in noise
NOISY = 3
SIGNAL_TO_NOISE = (5.0, 25.0)  # dB


def image_view(blob: bytes, view: int) -> Any:
    """Decode a picture: odd views are mirrored left to right, views from 2 on are crops.

    A crop keeps 50 to 100 % of the area and changes the aspect ratio by at most a quarter, both drawn by content and view.
    """
    picture = decode_image(blob)
    if view >= 2:
        rng = random.Random(f"{hashlib.sha256(blob).hexdigest()}/{view}")
        stretch = rng.uniform(0.8, 1.25) ** 0.5
        side = rng.uniform(*CROP_AREA) ** 0.5
        width, height = (round(edge * min(1.0, side * by)) for edge, by in zip(picture.size, (stretch, 1 / stretch), strict=True))
        left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        picture = picture.crop((left, top, left + width, top + height))
    return ImageOps.mirror(picture) if view % 2 else picture


def video_view(blob: bytes, view: int, num_frames: int = NUM_FRAMES) -> list[Any]:
    """Decode frames of a video, each mirrored left to right.

    Raises:
        ValueError: a view other than 1.
    """
    if view != 1:
        raise ValueError(f"a video has no view {view}, only 1, its mirror image: set views to at most 2")
    return [ImageOps.mirror(frame) for frame in decode_video(blob, num_frames)]


def audio_view(blob: bytes, view: int) -> NDArray[np.float32]:
    """Decode sound to 16 kHz; views 1 and 2 are slower and faster (and so lower and higher), view 3 is in noise.

    Raises:
        ValueError: there is no such view.
    """
    if view not in SPEEDS:
        raise ValueError(f"sound has no view {view}, only {', '.join(map(str, SPEEDS))}: set views to at most {1 + len(SPEEDS)}")
    wave = decode_audio(blob, round(SAMPLE_RATE / SPEEDS[view]))
    return in_noise(wave, int.from_bytes(hashlib.sha256(blob).digest()[:8])) if view == NOISY else wave


def in_noise(wave: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Add noise with a spectrum between white and brown, at a level of 5 to 25 dB below the sound, both by ``seed``."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    spectrum /= np.arange(1, len(spectrum) + 1) ** rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, len(wave))
    level = np.sqrt(np.square(wave).mean() / max(np.square(noise).mean(), 1e-12)) * 10 ** (-rng.uniform(*SIGNAL_TO_NOISE) / 20)
    return (wave + level * noise).astype(np.float32)


VIEWS: dict[str, Callable[..., Any]] = {"image": image_view, "audio": audio_view, "video": video_view}
