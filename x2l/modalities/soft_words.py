"""Speech in the LLM's own words: the tokens that stage 1 writes in, and an S-Adapter that starts from them.

X-LLM's adapter is one linear layer, which must learn where tens of thousands of words lie in the LLM from a few thousand
sentences. But stage 1 has taught a decoder which of the LLM's tokens each embedding is. Its posterior weighs the rows of the
LLM's own table, and the LLM reads words from the first step on, doubtful ones as mixtures; the linear layer beside it starts at
zero and learns the rest. Not in the paper. Shape letters: N utterances, U embeddings, C and D widths of C-Former and LLM, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from x2l.devices import bf16_in_hardware
from x2l.encoders import moonshine
from x2l.packed import can_lay_out, lay_out, padded
from x2l.types import Features
from x2l.vocabulary import Vocabulary, spelled_rows
from x2l.weights import resolve

MOONSHINE = "moonshine"
ROUNDING = 2.0**-6  # a bound for how far off a score in bfloat16 is, of its vectors' lengths: three roundings of 2^-8 each
NEGLIGIBLE = 1e-12  # fifty thousand words of less add nothing in float32 (2^-24), and denormal ones slow a product tenfold


class Words:
    """The tokens that stage 1 writes in, by two tables that are the decoder's and the LLM's own, made when the first speech comes.

    Args:
        vocabulary: pattern of the LLM's tokens, as in stage 1.
        table: whose embeddings tell them apart: ``moonshine``, or a spec of the ``decoder.safetensors`` of a stage 1 that
            trained its own.
        temperature: of the posterior; sharper than the decoder's own, it keeps rare words whole.
    """

    def __init__(self, vocabulary: str, table: str = MOONSHINE, temperature: float = 0.1) -> None:
        self.vocabulary, self.table, self.temperature = vocabulary, table, temperature

    def connect(self, embeddings: Callable[[], Tensor], tokenizer: Any) -> None:
        """Say whose words to use: the input embeddings of the LLM and its tokenizer."""
        self._embeddings, self._tokenizer = embeddings, tokenizer

    @cached_property
    def _tokens(self) -> Vocabulary:
        return Vocabulary.of(self._tokenizer, self.vocabulary)

    @cached_property
    def _spoken(self) -> Tensor:
        if self.table != MOONSHINE:
            return load_file(resolve(self.table))["embedding.weight"][:-1].float()  # the last one is where it starts
        state, pieces = moonshine.decoder_weights()
        return spelled_rows(state["model.decoder.embed_tokens.weight"], pieces, self._tokens.texts)

    @cached_property
    def _written(self) -> Tensor:
        return self._embeddings()[self._tokens.token_ids].detach().float()

    @cached_property
    def _rough(self) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """Scores in bfloat16 of rows (R, C) in bfloat16, where they are faster, and the length of the table's longest row."""
        fast = bf16_in_hardware() and can_lay_out(self._spoken)
        return (lay_out(self._spoken.bfloat16(), None), self._spoken.norm(dim=-1).amax()) if fast else None

    def spoken(self, x: Tensor) -> Tensor:
        """Mean embeddings of the decoder under the posterior of its last states: (N, U, C) -> (N, U, C), float32."""
        posterior, words = self.posterior(x)
        return posterior @ self._spoken[words]

    def written(self, x: Tensor) -> Tensor:
        """Mean embeddings of the LLM, likewise: (N, U, C) -> (N, U, D), float32."""
        posterior, words = self.posterior(x)
        return posterior @ self._written[words]

    def posterior(self, x: Tensor) -> tuple[Tensor, Any]:
        """What the decoder's last states (N, U, C) say: probabilities (N, U, K), float32, of K words, and the index of these.

        On a CPU they are the words that some place takes for no less than `NEGLIGIBLE` times as likely as its likeliest, and some
        that are near that. Elsewhere all.

        Raises:
            ValueError: ``table`` holds other tokens, or cannot be had.
        """
        if self._spoken.shape != (len(self._tokens.texts), x.shape[-1]):
            raise ValueError(
                f"soft words from {self.table}: embeddings {tuple(self._spoken.shape)}, but {self.vocabulary!r} matches "
                f"{len(self._tokens.texts)} tokens of this LLM and the C-Former is {x.shape[-1]} wide"
            )
        self._spoken, self._written = self._spoken.to(x.device), self._written.to(x.device)  # moved once
        x = x.float() / self.temperature
        words = self._likely(x)
        return F.threshold((x @ self._spoken[words].T).softmax(-1), NEGLIGIBLE, 0.0), words

    @torch.no_grad()
    def _likely(self, x: Tensor) -> Any:
        """The index of the words that `posterior` keeps, found by scores in bfloat16 where these are faster."""
        if x.device.type != "cpu" or not x.numel():
            return slice(None)
        x = x.flatten(0, -2)
        if self._rough is None:
            scores, off = x @ self._spoken.T, 0.0
        else:
            multiply, longest = self._rough
            rows, num = padded(x)
            scores, off = multiply(rows.bfloat16())[:num].float(), ROUNDING * longest * x.norm(dim=-1).amax()
        least = scores.amax(-1, keepdim=True) + (math.log(NEGLIGIBLE) - 2 * off)
        unlikely = (scores < least).all(0)  # no word is, where something is not a number
        return (~unlikely).nonzero()[:, 0]


class SoftWords(nn.Module):
    """(N, U, C) -> (N, U, D): the mean of the LLM's embeddings under the posterior of each token, plus a linear layer.

    Args:
        width, out_width: C and D.
        words: shared with the `x2l.modalities.reader.Reader` before it.
    """

    def __init__(self, width: int, out_width: int, words: Words) -> None:
        super().__init__()
        self.words = words
        self.linear = nn.Linear(width, out_width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def connect(self, embeddings: Callable[[], Tensor], tokenizer: Any) -> None:
        """As `Words.connect`."""
        self.words.connect(embeddings, tokenizer)

    def forward(self, features: Features) -> Features:
        """Lengths stay."""
        with torch.autocast(features.x.device.type, enabled=False):
            mean = self.words.written(features.x)
        return Features(mean + self.linear(features.x), features.lengths)
