"""Speech to text with time-stamps, by the CIF-based ASR model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from x2l.asr import CIFASR
from x2l.data.media import as_wav
from x2l.encoders.moonshine import RATE, windows

PIECE = 8.0  # seconds; of the recordings that the shipped weights were trained on one in twenty is longer


def in_pieces(wave: np.ndarray, max_seconds: float = PIECE) -> list[tuple[bytes, float]]:
    """A waveform (S,) float32 at 16 kHz as WAV files of at most ``max_seconds``, each with its seconds, cut where it is quiet: so a
    model that was trained on sentences can write down a speech."""
    return [(as_wav(piece), len(piece) / RATE) for piece in windows(wave, max_seconds)]


class Recognizer:
    """Speech to text with time-stamps, of any length.

    Args:
        asr: the trained model, its encoder included.
        processor: of that encoder.
        spellings: the text of each token.
        seconds_per_frame: of the encoder.
        max_seconds: longer audio is cut where it is quiet, and each piece transcribed alone.
    """

    def __init__(
        self,
        asr: CIFASR,
        processor: Callable[[list[np.ndarray]], dict[str, Tensor]],
        spellings: Sequence[str],
        seconds_per_frame: float,
        max_seconds: float = PIECE,
    ) -> None:
        self.asr, self.processor = asr.eval(), processor
        self.spellings, self.seconds_per_frame, self.max_seconds = spellings, seconds_per_frame, max_seconds

    @torch.inference_mode()
    def transcribe(self, waves: Sequence[np.ndarray], num_beams: int = 1, slack: int = 0) -> list[list[tuple[str, float]]]:
        """Each waveform (S,) float32 at 16 kHz to its tokens, with the second at which each was complete.

        ``num_beams`` and ``slack`` are those of `CIFASR.transcribe`.
        """
        pieces = [(i, piece) for i, wave in enumerate(waves) for piece in windows(wave, self.max_seconds)]
        features = self.asr.encoder(**self.processor([piece for _, piece in pieces]))
        results: list[list[tuple[str, float]]] = [[] for _ in waves]
        begins = [0.0] * len(waves)
        for (i, piece), transcript in zip(pieces, self.asr.transcribe(features, num_beams, slack), strict=True):
            ends = [min(frame * self.seconds_per_frame, len(piece) / RATE) + begins[i] for frame in transcript.frames]
            results[i] += zip([self.spellings[token] for token in transcript.tokens], ends, strict=True)
            begins[i] += len(piece) / RATE
        return results

    def text(self, wave: np.ndarray, num_beams: int = 1, slack: int = 0) -> str:
        """The transcript of one waveform, without times."""
        (tokens,) = self.transcribe([wave], num_beams, slack)
        return "".join(text for text, _ in tokens).strip()
