"""Sound that is no speech: pictures of its log-mel spectrum -> the frozen image encoder -> Q-Former -> adapter.

The paper's future work. A sound is cut into windows of about five seconds; each window's spectrum is a picture, and from
there on a sound is a video: one batch of pictures, the frame-wise Q-Former, one group of embeddings after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from x2l.encoders.fbank import RATE, fbank
from x2l.modalities.video import FrameProcessor, Frames, interface
from x2l.modality import Processor

__all__ = ["as_pictures", "interface", "spectrum"]

WINDOW = 5.0  # seconds that one picture shows, roughly
NUM_MELS = 80
SIDE = 224  # pixels; the picture is square, so that no encoder's processor crops it
RANGE = 14.0  # nats of energy (61 dB) from black to white
QUIET = 10.0  # nats; a window without anything louder is darker as a whole, and silence is black


def spectrum(wave: np.ndarray) -> Image.Image:
    """The log-mel spectrum of a 16 kHz waveform (S,): time to the right, pitch upwards, the loudest point white."""
    mels_FM = fbank(torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)), NUM_MELS).numpy()
    light = 1 + (mels_FM - max(float(mels_FM.max()), QUIET)) / RANGE
    grey = (255 * light.clip(0, 1)).round().astype(np.uint8)
    return Image.fromarray(grey.T[::-1]).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


class Spectra(Frames):
    """A picture encoder over spectra; the buffer tells a feature cache what the pictures depend on."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.register_buffer("drawing", torch.tensor([WINDOW, NUM_MELS, SIDE, RANGE, QUIET]))


class SpectrumProcessor:
    """16 kHz waveforms, each (S,) float32 -> the inputs of an image encoder for every window, and ``num_frames`` (N,)."""

    def __init__(self, processor: Processor) -> None:
        self.frames = FrameProcessor(processor)

    def __call__(self, sounds: Sequence[np.ndarray]) -> dict[str, Tensor]:
        parts = [np.array_split(sound, max(1, round(len(sound) / (WINDOW * RATE)))) for sound in sounds]
        return self.frames([[spectrum(part) for part in windows] for windows in parts])


def as_pictures(encoder: nn.Module, processor: Processor) -> tuple[nn.Module, Processor]:
    """An image encoder and its processor, made to take waveforms."""
    return Spectra(encoder), SpectrumProcessor(processor)
