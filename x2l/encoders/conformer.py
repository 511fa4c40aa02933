"""The paper's speech encoder: a 2-D convolution, then Conformer blocks (Gulati et al., arXiv 2005.08100) with two
max-poolings between them, 1/8 of the frame rate in all (facts: X-LLM section 3.1, sizes of Han et al., arXiv 2301.13003).

Every operation masks what lies beyond an utterance's length, and normalisation is by frame (LayerNorm where the
original has BatchNorm), so an utterance gives the same features alone and in any batch.

Shape letters: N utterances, F frames, M mel bins, C channels, E width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.encoders.fbank import FbankProcessor, SpecAugment
from x2l.types import Features


def valid_frames(lengths_N: Tensor, num_frames: int) -> Tensor:
    """(N,) lengths to a (N, F) mask, True on the frames that exist."""
    return torch.arange(num_frames, device=lengths_N.device) < lengths_N[:, None]


def rotate(x_NHFE: Tensor, num_rotary: int) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) on the first ``num_rotary`` channels of each head, in pairs."""
    frequency = 10_000.0 ** -(torch.arange(0, num_rotary, 2, device=x_NHFE.device) / num_rotary)
    angle = torch.outer(torch.arange(x_NHFE.shape[-2], device=x_NHFE.device), frequency).repeat_interleave(2, -1)
    turned, passed = x_NHFE[..., :num_rotary], x_NHFE[..., num_rotary:]
    quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat([(turned * angle.cos() + quarter * angle.sin()).to(x_NHFE.dtype), passed], -1)


KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention without biases; self-attention is rotary, cross-attention has no positions."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_rotary = 0 if context_width else int(width // num_heads * 0.9) // 2 * 2
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width or width, width, bias=False)
        self.v_proj = nn.Linear(context_width or width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Of a context (N, K, C) that is attended to several times: keys and values (N, H, K, E / H), without positions."""
        return self._heads(self.k_proj(context)), self._heads(self.v_proj(context))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Queries ``x`` (N, F, E), context (N, K, C) or its `keys_values`; ``mask`` (N, K) is True on valid keys."""
        q = self._heads(self.q_proj(x))
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        if self.num_rotary:
            q, k = rotate(torch.cat([q, k], 1), self.num_rotary).chunk(2, 1)
        keys = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class ConvModule(nn.Module):
    """Pointwise, GLU, depthwise, normalise, SiLU, pointwise (2005.08100 section 2.2)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"the depthwise kernel must be odd to keep the length, got {kernel}")
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width)
        self.contract = nn.Linear(width, width)

    def forward(self, x_NFE: Tensor, mask_NF: Tensor) -> Tensor:
        x = F.glu(self.expand(self.norm(x_NFE)), -1) * mask_NF[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.contract(F.silu(self.inner_norm(x)))


def feed_forward(width: int, hidden: int) -> nn.Sequential:
    """Pre-normalised two-layer network with SiLU."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


class ConformerBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward, LayerNorm (2005.08100 equation 1)."""

    def __init__(self, width: int, ffn_width: int, num_heads: int, kernel: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.ffn_in = feed_forward(width, ffn_width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.conv = ConvModule(width, kernel)
        self.ffn_out = feed_forward(width, ffn_width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NFE: Tensor, mask_NF: Tensor) -> Tensor:
        """(N, F, E) -> (N, F, E); frames outside ``mask_NF`` are never read."""
        x = x_NFE + 0.5 * self.dropout(self.ffn_in(x_NFE))
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, y, mask_NF))
        x = x + self.dropout(self.conv(x, mask_NF))
        return self.norm(x + 0.5 * self.dropout(self.ffn_out(x)))


class ConformerEncoder(nn.Module):
    """Mel features to width E at 1/8 of their rate; the defaults are the paper's sizes. SpecAugment in training.

    Args:
        num_mels: M, a multiple of 2.
        channels: of the 2-D convolution (kernel 3, stride 2 in time and frequency).
        width, ffn_width, num_heads, kernel, num_blocks, dropout: of the Conformer blocks.
        pool_after: a max-pooling of 2 frames follows these blocks, counted from 1.
    """

    def __init__(
        self,
        num_mels: int = 80,
        channels: int = 256,
        width: int = 512,
        ffn_width: int = 2048,
        num_heads: int = 8,
        kernel: int = 31,
        num_blocks: int = 18,
        pool_after: tuple[int, ...] = (6, 12),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_mels % 2 or not set(pool_after) <= set(range(1, num_blocks + 1)):
            raise ValueError(f"num_mels {num_mels} must be even, pool_after {pool_after} within 1..{num_blocks}")
        self.width, self.pool_after = width, frozenset(pool_after)
        self.augment = SpecAugment()
        self.conv = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.project = nn.Linear(channels * num_mels // 2, width)
        self.blocks = nn.ModuleList(ConformerBlock(width, ffn_width, num_heads, kernel, dropout) for _ in range(num_blocks))

    def forward(self, mels: Tensor, lengths: Tensor) -> Features:
        """``mels`` (N, F, M) with ``lengths`` (N,) frames -> (N, ceil(F / 8), E)."""
        x = self.augment(mels, lengths) * valid_frames(lengths, mels.shape[1])[..., None]
        x = F.relu(self.conv(x[:, None])).transpose(1, 2).flatten(2)
        x, lengths = self.project(x), (lengths + 1) // 2
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, valid_frames(lengths, x.shape[1]))
            if number in self.pool_after:
                x = x.masked_fill(~valid_frames(lengths, x.shape[1])[..., None], -torch.inf)
                x = F.max_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
                lengths = (lengths + 1) // 2
                x = x.masked_fill(~valid_frames(lengths, x.shape[1])[..., None], 0.0)
        return Features(x * valid_frames(lengths, x.shape[1])[..., None], lengths)


def build(num_mels: int = 80, **sizes: Any) -> tuple[ConformerEncoder, FbankProcessor]:
    """An untrained Conformer of these ``sizes`` (those of `ConformerEncoder`) and its processor: stage 1 trains it."""
    return ConformerEncoder(num_mels, **sizes), FbankProcessor(num_mels)
