"""Speech: frozen encoder -> listener (context blocks and CIF, frozen too) -> C-Former -> S-Adapter (X-LLM, section 3.1).

The listener turns frames into one embedding a spoken token. Stage 1 trains it between the encoder and the decoder of
`x2l.asr`; from stage 2 on it never changes again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.encoders.conformer import ConformerBlock, valid_frames
from x2l.interfaces.adapter import Adapter
from x2l.interfaces.cformer import CFormer
from x2l.interfaces.cif import CIF, CIFOutput
from x2l.modalities.reader import Reader
from x2l.modalities.soft_words import SoftWords, Words
from x2l.types import Features


class Listener(nn.Module):
    """Encoder frames to one embedding a spoken token: thin out, add context, weigh, integrate and fire.

    Args:
        in_width: E, width of the encoder's frames.
        width: of the context blocks and of the embeddings.
        stride: frames that are averaged into one before anything else; the rest is lighter by that factor.
        num_blocks, ffn_width, num_heads, kernel, dropout: of the Conformer blocks.
        parts: CIF fires this often a token, and their embeddings side by side are the token's: what was said first in
            a word stays apart from what was said last. 1 is the paper's.
        rate: weight a thinned-out frame that an untrained model gives, spoken tokens a frame in typical speech.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: int = 2,
        num_blocks: int = 1,
        ffn_width: int = 288,
        num_heads: int = 8,
        kernel: int = 15,
        dropout: float = 0.1,
        parts: int = 1,
        rate: float = 0.12,
    ) -> None:
        super().__init__()
        self.width, self.stride, self.parts = width * parts, stride, parts
        self.project = nn.Identity() if in_width == width else nn.Linear(in_width, width)
        self.blocks = nn.ModuleList(ConformerBlock(width, ffn_width, num_heads, kernel, dropout) for _ in range(num_blocks))
        self.residual = nn.Linear(width, width)
        nn.init.zeros_(self.residual.weight)  # an untrained listener hands on the encoder's own frames
        nn.init.zeros_(self.residual.bias)
        self.cif = CIF(width, dropout=dropout)
        nn.init.constant_(self.cif.fc.bias, math.log(rate * parts / (1 - rate * parts)))

    def frames(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden frames (N, F, width) for a CTC head, what CIF integrates (N, F, width), and their lengths (N,)."""
        mask = valid_frames(features.lengths, features.x.shape[1])
        x = self.project(features.x) * mask[..., None]
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stride)).unflatten(1, (-1, self.stride))
        count = F.pad(mask, (0, -mask.shape[1] % self.stride)).unflatten(1, (-1, self.stride)).sum(-1)
        x = x.sum(2) / count.clamp_min(1)[..., None]
        lengths = (features.lengths + self.stride - 1) // self.stride
        mask, hidden = valid_frames(lengths, x.shape[1]), x
        for block in self.blocks:
            hidden = block(hidden, mask)
        hidden = hidden * mask[..., None]
        return hidden, x + self.residual(hidden), lengths

    def listen(self, features: Features, target_lengths: Tensor | None = None) -> tuple[CIFOutput, Tensor, Tensor]:
        """Integrate and fire: the embeddings, and the hidden frames (N, F, width) with their lengths.

        ``target_lengths`` (N,) scales the weights to that many tokens: for the training of stage 1 alone.
        """
        hidden, frames, lengths = self.frames(features)
        target_lengths = None if target_lengths is None else target_lengths * self.parts
        return grouped(self.cif(Features(frames, lengths), target_lengths), self.parts), hidden, lengths

    def forward(self, features: Features) -> Features:
        """(N, F, E) -> (N, U, width), U the number of tokens that the listener counts."""
        fired, _, _ = self.listen(features)
        return Features(fired.x, fired.lengths)


def grouped(fired: CIFOutput, parts: int) -> CIFOutput:
    """``parts`` fires to a token: (N, M, C) -> (N, M / parts, parts * C); the last token may lack less than half of it."""
    if parts == 1:
        return fired
    x, lengths = side_by_side(Features(fired.x, fired.lengths), parts)
    num_tokens = x.shape[1]
    last = (torch.arange(1, num_tokens + 1, device=x.device) * parts).minimum(fired.lengths[:, None]) - 1
    times = fired.fire_times.gather(1, last.clamp_min(0)) * valid_frames(lengths, num_tokens)
    return CIFOutput(x, lengths, times, fired.quantity / parts, fired.edges / parts)


def side_by_side(fires: Features, parts: int) -> Features:
    """(N, M, C) -> (N, M / parts, parts * C); the last token may lack less than half of it."""
    lengths = (fires.lengths + parts // 2) // parts
    num_tokens = int(lengths.max()) if len(lengths) else 0
    x = F.pad(fires.x, (0, 0, 0, num_tokens * parts - fires.x.shape[1]))
    x = x * valid_frames(lengths * parts, x.shape[1])[..., None]
    return Features(x.unflatten(1, (num_tokens, parts)).flatten(2), lengths)


class FrozenListener(Listener):
    """The listener from stage 2 on: in eval mode and without gradients, whatever the modules around it do."""

    def train(self, mode: bool = True) -> FrozenListener:
        """Stay in eval mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, features: Features) -> Features:
        """(N, F, E) -> (N, U, width)."""
        return super().forward(features)


def interface(
    encoder_width: int,
    llm_width: int,
    llm_std: float,
    listener: dict[str, Any],
    reader: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    **cformer: Any,
) -> list[nn.Module]:
    """The speech interface: listener, C-Former and S-Adapter, each by the paper or as a stage 1 that writes text lets it be.

    Args:
        listener: arguments of `Listener` (width, stride, num_blocks, ...), as in stage 1.
        reader: arguments of `Reader` (ffn_width, num_heads, num_blocks, ...), to have stage 1's decoder for a C-Former.
        words: arguments of `Words` (vocabulary, ...), to have `SoftWords` for an adapter; they go with a reader.
        cformer: arguments of `CFormer` (width, depth, heads, ...).

    Raises:
        TypeError: one of reader and words without the other.
    """
    frozen = FrozenListener(encoder_width, **listener)
    if (reader is None) != (words is None):
        raise TypeError("reader and words go together: soft words are read in what stage 1's decoder gives")
    if reader is None or words is None:
        former = CFormer(frozen.width, **cformer)
        return [frozen, former, Adapter(former.out_width, llm_width, llm_std)]
    if cformer:
        raise TypeError(f"a reader takes the C-Former's place, which has no use for {', '.join(cformer)}")
    shared = Words(**words)
    decoder = Reader(frozen.width, frozen.parts, shared, **reader)
    return [frozen, decoder, SoftWords(decoder.out_width, llm_width, shared)]
