"""The text side of the CIF-based ASR model: its vocabulary, and speech to text with time-stamps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from x2l.asr import CIFASR
from x2l.encoders.moonshine import RATE, windows

HAN = "\u4e00-\u9fff"
SPOKEN = re.compile(rf"[{HAN}]|[^\s{HAN}][^{HAN}]*")  # one Han character, or words between them


def spoken_form(text: str) -> str:
    """A transcript as it is spoken: lower case, letters and apostrophes alone, words apart by one space."""
    return " ".join(re.sub(r"[^\w' ]|[\d_]", " ", text.lower().replace("’", "'")).split())


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of an LLM in which the ASR model writes, so that one embedding is one token of the LLM.

    Attributes:
        token_ids: the LLM's ids; their index is the token of the ASR model.
        texts: their texts.
    """

    token_ids: list[int]
    texts: list[str]

    @classmethod
    def of(cls, tokenizer: Any, pattern: str = r" ?[a-z']+") -> Vocabulary:
        """All tokens of a Hugging Face tokenizer whose whole text matches ``pattern``."""
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        found = [(i, text) for i, text in enumerate(texts) if re.fullmatch(pattern, text)]
        if not found:
            raise ValueError(f"no token of this LLM matches {pattern!r}")
        return cls(*map(list, zip(*found, strict=True)))

    @cached_property
    def _index(self) -> dict[int, int]:
        return {token: i for i, token in enumerate(self.token_ids)}

    @property
    def spelling(self) -> Tensor:
        """(V, K) letters of each token from 1, right-padded with 0: the CTC targets."""
        letters = {letter: i for i, letter in enumerate(sorted({*"".join(self.texts)}), start=1)}
        rows = [torch.tensor([letters[letter] for letter in text]) for text in self.texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """The tokens of a transcript in `spoken_form`: each word after a space, each Han character by itself.

        A token that the vocabulary lacks is spelled, if the vocabulary has its letters.

        Raises:
            ValueError: the transcript is empty, or holds a token outside the vocabulary; the message names it.
        """
        index = self._index
        pieces = [piece if re.match(f"[{HAN}]", piece) else f" {piece.strip()}" for piece in SPOKEN.findall(spoken_form(text))]

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        whole = [i for piece in pieces for i in tokens(piece)]
        ids = [j for i in whole for j in ([i] if i in index else chain(*map(tokens, tokenizer.decode([i]).strip())))]
        foreign = [tokenizer.decode([i]) for i in ids if i not in index]
        if foreign or not ids:
            raise ValueError(f"the transcript {text!r} has no tokens, or tokens outside the vocabulary: {foreign}")
        return [index[i] for i in ids]


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
        max_seconds: float = 20.0,
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
