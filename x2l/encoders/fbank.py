"""Kaldi-compatible log-mel filter banks in torch: frames by ``unfold``, power by ``rfft``, mels by one matrix product.

The defaults are Kaldi's (25 ms Povey window every 10 ms, pre-emphasis 0.97, snip_edges, 20 Hz to Nyquist) without
dither, on samples scaled to 16 bits as Kaldi reads them. 80 bins, as in the paper's stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 16_000  # Hz
WINDOW, HOP, FFT = 400, 160, 512  # samples
LOW_HZ, PRE_EMPHASIS = 20.0, 0.97
SCALE = 32_768.0  # a float waveform in [-1, 1) to the 16-bit range
FLOOR = torch.finfo(torch.float32).eps  # of a mel energy, before the logarithm


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * (1.0 + hertz / 700.0).log()


@cache
def mel_filters(num_mels: int) -> Tensor:
    """(FFT / 2 + 1, num_mels) triangles, equally spaced and linear on the mel scale; the Nyquist bin counts nothing."""
    low, high = _mel(torch.tensor([LOW_HZ, RATE / 2], dtype=torch.float64))
    edges = torch.linspace(float(low), float(high), num_mels + 2, dtype=torch.float64)
    bins = _mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * RATE / FFT)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = rising.minimum(falling).clamp_min(0.0)
    filters[-1] = 0.0
    return filters.float()


@cache
def povey_window() -> Tensor:
    """Hann to the power 0.85, which does not quite reach zero in its neighbourhood (Kaldi's default)."""
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85).float()


def fbank(wave_S: Tensor, num_mels: int = 80) -> Tensor:
    """Log-mel energies (F, num_mels) of a 16 kHz waveform (S,) in [-1, 1], ``F = 1 + (S - 400) // 160``.

    A waveform shorter than one window is padded with zeros to one frame.
    """
    wave = F.pad(wave_S.float() * SCALE, (0, max(0, WINDOW - len(wave_S))))
    frames = wave.unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - PRE_EMPHASIS * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    power = torch.fft.rfft(frames * povey_window().to(frames.device), FFT).abs().square()
    return (power @ mel_filters(num_mels).to(power.device)).clamp_min(FLOOR).log()


def cmvn(mels_FM: Tensor) -> Tensor:
    """Mean 0 and variance 1 of each bin over the utterance; a constant bin becomes 0."""
    centred = mels_FM - mels_FM.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp_min(1e-3)


class FbankProcessor:
    """Waveforms, each (S,) float32 at 16 kHz, to ``mels`` (N, F, num_mels), normalised by utterance, and ``lengths``."""

    def __init__(self, num_mels: int = 80) -> None:
        self.num_mels = num_mels

    def __call__(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        mels = [cmvn(fbank(torch.from_numpy(wave), self.num_mels)) for wave in audio]
        return {
            "mels": nn.utils.rnn.pad_sequence(mels, batch_first=True),
            "lengths": torch.tensor([len(m) for m in mels]),
        }


class SpecAugment(nn.Module):
    """Masks of frames and of channels during training (Park et al., arXiv 1904.08779), nothing in eval mode.

    Args:
        num_channel_masks, channel_width: masks of 0..channel_width channels each (F27 x 2 in the paper).
        num_frame_masks, frame_width: masks of 0..frame_width frames each (T50 x 2 in the paper).
        max_share: no mask covers more than this share of an utterance's frames.
    """

    def __init__(
        self,
        num_channel_masks: int = 2,
        channel_width: int = 27,
        num_frame_masks: int = 2,
        frame_width: int = 50,
        max_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.num_channel_masks, self.channel_width = num_channel_masks, channel_width
        self.num_frame_masks, self.frame_width, self.max_share = num_frame_masks, frame_width, max_share

    def forward(self, x_NFC: Tensor, lengths_N: Tensor) -> Tensor:
        """(N, F, C) -> the same with masked stretches set to 0, the mean of normalised features."""
        if not self.training:
            return x_NFC
        channels = torch.full_like(lengths_N, x_NFC.shape[2])
        widest = (lengths_N * self.max_share).long().clamp_max(self.frame_width)
        hidden = _masks(lengths_N, widest, self.num_frame_masks, x_NFC.shape[1])[..., None]
        widest = torch.full_like(lengths_N, self.channel_width).minimum(channels)
        hidden = hidden | _masks(channels, widest, self.num_channel_masks, x_NFC.shape[2])[:, None]
        return x_NFC.masked_fill(hidden, 0.0)


def _masks(sizes_N: Tensor, widest_N: Tensor, num_masks: int, length: int) -> Tensor:
    """(N, length): the union of ``num_masks`` random intervals within ``sizes``, 0..widest wide."""
    draw = torch.rand(2, num_masks, len(sizes_N), device=sizes_N.device)
    width = (draw[0] * (widest_N + 1)).long()
    start = (draw[1] * (sizes_N - width + 1)).long()
    at = torch.arange(length, device=sizes_N.device)
    return ((at >= start[..., None]) & (at < (start + width)[..., None])).any(0)
