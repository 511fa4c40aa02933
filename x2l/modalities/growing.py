"""Encoder, listener and C-Former on a recording that grows: what they make of the places that are not settled, given the others.

They are the functions of the modules that they are made from, whose weights must not change any more; but the C-Former looks back
alone from its first pass on, and takes the words of an earlier read. What is read is short, a second or two of sound, so that
reading the weights takes as long as multiplying with them, and calling small operations as long again. Weights are therefore in
bfloat16, laid out once, where the processor multiplies in it; layers of one input share a product; rotations are computed once a
read. Norms and what is added up from layer to layer are in float32.

Shape letters: F places that are read, R rows (`padded`), C width, H heads, d width of a head, U tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.devices import bf16_in_hardware
from x2l.encoders.conformer import ConformerBlock
from x2l.encoders.moonshine import HOP, pad
from x2l.modalities.reader import DecoderBlock, Reader
from x2l.modalities.speech import Listener
from x2l.packed import can_lay_out, lay_out, padded
from x2l.past import Past

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "swish": F.silu}  # by oneDNN's names
CONV_ROWS = 64  # as `x2l.packed.ROWS`, of convolutions, whose products take longest to compile
PLACES, BEYOND = 6, 7  # of the encoder's first convolution: to a frame, and those of later frames that the last frame sees


class Linear:
    """A linear layer and what is applied to its outputs: (R, in) -> (R, out), in the type of its weights, or in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
        self.multiply: Callable[[Tensor], Tensor]
        if bf16_in_hardware() and can_lay_out(weight):
            self.dtype = torch.bfloat16
            self.multiply = lay_out(weight.bfloat16(), None if bias is None else bias.bfloat16(), activation)
        else:
            self.dtype = weight.dtype
            self.multiply = lambda rows: ACTIVATIONS[activation](F.linear(rows, weight, bias))

    @classmethod
    def of(cls, *layers: Any, activation: str = "none", factor: float = 1.0) -> Linear:
        """Of layers of one input, all with a bias or all without, side by side, times a ``factor``."""
        weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers))
        return cls(factor * weight.detach(), factor * torch.cat(biases).detach() if biases else None, activation)

    def __call__(self, rows: Tensor) -> Tensor:
        return self.multiply(rows.to(self.dtype))


class Convolution:
    """A convolution without padding: (L, I) -> (L', O), a product of what each place sees, which lies side by side."""

    def __init__(self, conv: nn.Conv1d, activation: str = "none") -> None:
        (self.kernel,), (self.stride,) = conv.kernel_size, conv.stride
        bias = None if conv.bias is None else conv.bias.detach()
        self.linear = Linear(conv.weight.detach().transpose(1, 2).flatten(1), bias, activation)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.dtype).contiguous()
        num, width = (len(x) - self.kernel) // self.stride + 1, x.shape[1]
        rows, _ = padded(x.as_strided((num, self.kernel * width), (self.stride * width, 1)), CONV_ROWS)
        return self.linear(rows)[:num]


class Rotation:
    """Rotary positions (arXiv 2104.09864) of rows from ``start`` on: a head's first ``num_rotary`` channels, in pairs."""

    def __init__(self, start: int, num_rows: int, num_rotary: int, device: torch.device) -> None:
        self.num_rotary = num_rotary
        frequency = 10_000.0 ** -(torch.arange(0, num_rotary, 2, device=device) / num_rotary)
        angle = torch.outer(torch.arange(start, start + num_rows, device=device), frequency)
        self.by = torch.polar(torch.ones_like(angle), angle)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        """(R, 2, H, d), likewise."""
        pairs = torch.view_as_complex(x[..., : self.num_rotary].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * self.by).flatten(-2), x[..., self.num_rotary :]], -1)


class SelfAttention:
    """Attention with rotary positions to the places that are read and those before them.

    Args:
        many: whether many places are read, for which attention is faster in the products' type, too; for a few it is slower.
    """

    def __init__(self, attention: Any, num_heads: int, many: bool = False) -> None:
        self.num_heads = num_heads
        self.qkv = Linear.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Linear.of(attention.o_proj)
        self.dtype = self.qkv.dtype if many else torch.float32

    def __call__(self, x: Tensor, num: int, rotation: Rotation, past: Past, mask: Tensor | None = None) -> Tensor:
        """(R, C) -> (R, C), of whose rows the first ``num`` are seen, and those where a ``mask``, added to the scores, is zero."""
        heads = self.qkv(x).view(len(x), 3, self.num_heads, -1)
        q, k = rotation(heads[:, :2].float()).to(self.dtype).unbind(1)
        k, v = past.join(k[:num].transpose(0, 1)), past.join(heads[:num, 2].to(self.dtype).transpose(0, 1))
        return self.out(_attend(q, k, v, mask))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries (R, H, d), keys and values (H, K, d) -> (R, H * d)."""
    read = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask)
    return read[0].transpose(0, 1).flatten(1)


class GrowingEncoder:
    """Moonshine's encoder, of a network as `x2l.encoders.moonshine_torch` has it."""

    def __init__(self, network: Any) -> None:
        self.device: torch.device = network.conv1.weight.device
        self.convs = Convolution(network.conv1), Convolution(network.conv2, "gelu"), Convolution(network.conv3, "gelu")
        self.stem_norm, self.norm = network.groupnorm, network.layer_norm
        self.num_rotary = 2 * len(network.rotary_emb.inv_freq)
        self.blocks = [GrowingEncoderBlock(layer, network.config.encoder_num_attention_heads) for layer in network.layers]

    def __call__(self, wave: Tensor, past: Past) -> Tensor:
        """The frames of a recording (S,) from ``past.length`` on, (F, C)."""
        x, num = padded(self._stem(wave, past))
        rotation = Rotation(past.length, len(x), self.num_rotary, self.device)
        for block in self.blocks:
            x = block(x, num, rotation, past)
        frames: Tensor = self.norm(x)[:num]
        return frames

    def _stem(self, wave: Tensor, past: Past) -> Tensor:
        first, second, third = self.convs
        samples = torch.from_numpy(pad(wave[past.length * HOP :].float().cpu().numpy())).to(self.device)
        x = _normed(torch.tanh(first(samples[:, None]).float()), self.stem_norm, past)
        return third(second(x)).float()


def _normed(x: Tensor, norm: Any, past: Past) -> Tensor:
    """A norm over a recording, or over the last frames of it that ``past`` may keep sums of: of the places (L, C) after them."""
    moments = torch.stack([x.sum(1), x.square().sum(1)], -1).double()
    own, beyond = moments[:-BEYOND], moments[-BEYOND:]
    frames = past.join(own.unflatten(0, (-1, PLACES)).sum(1))
    num_values = x.shape[1] * (PLACES * len(frames) + BEYOND)
    mean, square = (frames.sum(0) + beyond.sum(0)) / num_values
    scale = norm.weight * (square - mean.square() + norm.eps).rsqrt().float()
    return torch.addcmul(norm.bias - mean.float() * scale, x, scale)


class GrowingEncoderBlock:
    """A layer of Moonshine's encoder."""

    def __init__(self, layer: Any, num_heads: int) -> None:
        self.norm, self.attend = layer.input_layernorm, SelfAttention(layer.self_attn, num_heads, many=True)
        self.ffn_norm = layer.post_attention_layernorm
        self.up, self.down = Linear.of(layer.mlp.fc1, activation="gelu"), Linear.of(layer.mlp.fc2)

    def __call__(self, x: Tensor, num: int, rotation: Rotation, past: Past) -> Tensor:
        """(R, C) -> (R, C), of whose rows ``num`` are frames."""
        x = x + self.attend(self.norm(x), num, rotation, past)
        return x + self.down(self.up(self.ffn_norm(x)))


class GrowingListener:
    """A `Listener` up to what CIF integrates."""

    def __init__(self, listener: Listener) -> None:
        blocks: Any = listener.blocks
        self.stride, project = listener.stride, listener.project
        self.project: Any = project if isinstance(project, nn.Identity) else Linear.of(project)
        self.blocks = [GrowingConformerBlock(block) for block in blocks]
        self.num_rotary = self.blocks[0].num_rotary if self.blocks else 0
        self.residual = Linear.of(listener.residual)

    def __call__(self, frames: Tensor, past: Past) -> Tensor:
        """The encoder's frames (F, E), after ``stride`` for each place of ``past`` -> (F', C)."""
        num = -(-len(frames) // self.stride)
        x = self.project(padded(frames)[0]).float()[: len(frames)]
        x = F.pad(x, (0, 0, 0, num * self.stride - len(frames))).unflatten(0, (num, -1)).mean(1)
        x[-1] *= self.stride / (len(frames) - (num - 1) * self.stride)
        hidden, _ = padded(x)
        rotation = Rotation(past.length, len(hidden), self.num_rotary, x.device)
        for block in self.blocks:
            hidden = block(hidden, num, rotation, past)
        return x + self.residual(hidden)[:num]


class GrowingConformerBlock:
    """A `ConformerBlock`."""

    def __init__(self, block: ConformerBlock) -> None:
        attention, conv = block.attention, block.conv
        depthwise: Any = conv.depthwise
        self.num_rotary = attention.num_rotary
        self.ffns = [
            (norm, Linear.of(up, activation="swish"), Linear.of(down, factor=0.5))
            for norm, up, _, down in (block.ffn_in, block.ffn_out)
        ]
        self.attention_norm, self.attend = block.attention_norm, SelfAttention(attention, attention.num_heads)
        self.conv_norm, self.expand = conv.norm, Linear.of(conv.expand)
        self.kernel, self.bias = depthwise.weight.detach()[:, 0].T.contiguous(), depthwise.bias.detach()  # (K, C), (C,)
        self.inner_norm, self.contract = conv.inner_norm, Linear.of(conv.contract)
        self.norm = block.norm

    def __call__(self, x: Tensor, num: int, rotation: Rotation, past: Past) -> Tensor:
        """(R, C) -> (R, C), of whose rows ``num`` are frames."""
        x = x + self._ffn(0, x)
        x = x + self.attend(self.attention_norm(x), num, rotation, past)
        x = x + self._convolve(x, num, past)
        y: Tensor = self.norm(x + self._ffn(1, x))
        return y

    def _ffn(self, which: int, x: Tensor) -> Tensor:
        norm, up, down = self.ffns[which]
        return down(up(norm(x)))

    def _convolve(self, x: Tensor, num: int, past: Past) -> Tensor:
        size, width = self.kernel.shape
        reach = size // 2
        seen = past.join(F.glu(self.expand(self.conv_norm(x))[:num].float(), -1))[-(num + reach) :]
        seen = F.pad(seen, (0, 0, num + reach - len(seen), len(x) - num + reach))
        y = (seen.as_strided((len(x), size, width), (width, width, 1)) * self.kernel).sum(1).add_(self.bias)
        return self.contract(F.silu(self.inner_norm(y)))


class GrowingReader:
    """A `Reader` that reads again, and goes on from the words of an earlier read: where it has all that it needs, in one pass."""

    def __init__(self, reader: Reader) -> None:
        self.parts, self.again = reader.parts, reader.again
        self.start, self.norm = reader.start.detach(), reader.norm
        self.words, self.fuse = reader.words, Linear.of(reader.fuse)
        blocks: Any = reader.blocks
        self.blocks = [GrowingDecoderBlock(block) for block in blocks]
        attentions = [block.cif_attention for block in blocks]
        self.keys_values = Linear.of(*(layer for each in attentions for layer in (each.k_proj, each.v_proj)))
        self.num_heads, self.num_rotary = attentions[0].num_heads, blocks[0].self_attention.num_rotary

    def __call__(self, heard: Tensor, pieces: Past, tokens: Past, said: Tensor) -> Tensor:
        """The tokens of a recording from ``tokens.length`` on, (U, parts * C) -> (U, C).

        Args:
            pieces, tokens: what is kept of the CIF embeddings, ``parts`` to a token, and of the tokens.
            said: (S, C), words that an earlier read understood for the first S tokens, as `spoken` gives them.
        """
        num, begin, end = len(heard), tokens.length, tokens.length + len(heard)
        if not num:
            return heard.new_zeros(0, len(self.start))
        kept = pieces.join(self._project(heard)).unflatten(0, (-1, 2))
        fused = self.fuse(padded(heard)[0]).float()
        rotation = Rotation(begin, len(fused), self.num_rotary, heard.device)
        mask = torch.full((len(fused), end), -torch.inf, device=heard.device).triu(begin + 1)
        unknown = max(0, end - 1 - len(said))
        for to_come in reversed(range(1 + min(self.again, unknown))):
            tokens.begin()
            before = torch.cat([self.start[None], said, self.start.expand(end, -1)])[begin:end]
            x = fused + F.pad(before, (0, 0, 0, len(fused) - num))
            for block, (keys, values) in zip(self.blocks, kept, strict=True):
                x = block(x, num, (keys, values), rotation, mask, tokens)
            read: Tensor = self.norm(x)[:num]
            if to_come:
                said = torch.cat([said[:begin], self.spoken(read)])
        return read

    def spoken(self, read: Tensor) -> Tensor:
        """What tokens (U, C) say: mean embeddings of the decoder (U, C)."""
        assert self.words is not None
        return self.words.spoken(read[None])[0]

    def _project(self, heard: Tensor) -> Tensor:
        """Keys and values of all blocks, (blocks * 2, H, U * parts, d)."""
        pieces, num = padded(heard.unflatten(-1, (self.parts, -1)).flatten(0, 1))
        projected = self.keys_values(pieces)[:num].float().unflatten(1, (2 * len(self.blocks), self.num_heads, -1))
        return projected.permute(1, 2, 0, 3)


class GrowingDecoderBlock:
    """A `DecoderBlock` without another context."""

    def __init__(self, block: DecoderBlock) -> None:
        attention, of_pieces = block.self_attention, block.cif_attention
        self.num_heads = of_pieces.num_heads
        self.self_norm, self.attend = block.self_norm, SelfAttention(attention, attention.num_heads)
        self.cif_norm, self.ffn_norm = block.cif_norm, block.ffn_norm
        self.query, self.out = Linear.of(of_pieces.q_proj), Linear.of(of_pieces.o_proj)
        self.up, self.down = Linear.of(block.ffn_in), Linear.of(block.ffn_out)

    def __call__(self, x: Tensor, num: int, pieces: tuple[Tensor, Tensor], rotation: Rotation, mask: Tensor, past: Past) -> Tensor:
        """(R, C) -> (R, C), of whose rows ``num`` are tokens, given keys and values (H, K, d) of the CIF embeddings."""
        x = x + self.attend(self.self_norm(x), num, rotation, past, mask)
        query = self.query(self.cif_norm(x)).float().view(len(x), self.num_heads, -1)
        x = x + self.out(_attend(query, *pieces))
        value, gate = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)
