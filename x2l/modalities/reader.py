"""A C-Former in the shape of stage 1's decoder, from which it starts.

X-LLM starts its C-Former from a BERT, which knows text but has never heard anything. The decoder of the CIF-based ASR model
knows both: asked for all tokens at once, without the tokens before, it already tells two thirds of them. Read again with what it
understood for the tokens before (Jacobi iteration: Song et al., arXiv 2002.03629), it says after few passes what it would say
token by token. Not in the paper. Shape letters: N utterances, U embeddings, C width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.encoders import moonshine
from x2l.encoders.conformer import Attention, KeysValues, valid_frames
from x2l.modalities.soft_words import Words
from x2l.types import Features


class DecoderBlock(nn.Module):
    """Self-attention, attention to the CIF embeddings, attention to one context if any, gated feed-forward."""

    def __init__(self, width: int, ffn_width: int, num_heads: int, context_width: int | None, dropout: float) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width, bias=False)
        self.self_attention = Attention(width, num_heads)
        self.cif_norm = nn.LayerNorm(width, bias=False)
        self.cif_attention = Attention(width, num_heads, context_width=width)
        self.context_norm = nn.LayerNorm(width, bias=False) if context_width else None
        self.context_attention = Attention(width, num_heads, context_width) if context_width else None
        self.ffn_norm = nn.LayerNorm(width, bias=False)
        self.ffn_in = nn.Linear(width, 2 * ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        heard: Tensor | KeysValues,
        heard_mask: Tensor,
        context: Features | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(N, U, C) -> (N, U, C), given CIF embeddings (N, K, C) or what ``cif_attention`` makes of them.

        With a ``mask`` (N, U) every place sees all that it allows, else those before it.
        """
        y = self.self_norm(x)
        x = x + self.dropout(self.self_attention(y, y, mask, causal=mask is None))
        x = x + self.dropout(self.cif_attention(self.cif_norm(x), heard, heard_mask))
        if self.context_attention is not None and self.context_norm is not None and context is not None:
            seen = valid_frames(context.lengths, context.x.shape[1])
            x = x + self.dropout(self.context_attention(self.context_norm(x), context.x, seen))
        value, gate = self.ffn_in(self.ffn_norm(x)).chunk(2, -1)
        return x + self.dropout(self.ffn_out(F.silu(gate) * value))


class Reader(nn.Module):
    """(N, U, parts * C) with lengths -> (N, U, C), lengths unchanged, all places at once.

    Args:
        in_width: parts * C, of the listener's embeddings.
        parts: of the listener; attention sees them apart.
        words: the tokens that stage 1 writes in; None where it reads once.
        ffn_width, num_heads, num_blocks: as the decoder's of stage 1.
        again: passes after the first, each given the words of the one before; U of them read token by token.
    """

    def __init__(
        self,
        in_width: int,
        parts: int,
        words: Words | None,
        ffn_width: int,
        num_heads: int,
        num_blocks: int,
        again: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.parts, self.out_width = parts, in_width // parts
        self.words, self.again = words, again if words else 0
        self.start = nn.Parameter(torch.zeros(self.out_width))  # where the decoder has the token before
        self.fuse = nn.Linear(in_width, self.out_width)
        self.blocks = nn.ModuleList(DecoderBlock(self.out_width, ffn_width, num_heads, None, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(self.out_width, bias=False)

    def forward(self, features: Features) -> Features:
        """Each place from all of an utterance, whatever else is in the batch; padding comes out as zeros."""
        heard, lengths_N = features
        if heard.shape[1] == 0:
            return Features(heard.new_zeros(len(heard), 0, self.out_width), lengths_N)
        seen_N = lengths_N.clamp(min=1)  # softmax over nothing is undefined: an empty utterance sees one zero
        mask, beyond = valid_frames(seen_N, heard.shape[1]), ~valid_frames(lengths_N, heard.shape[1])[..., None]
        heard = heard.masked_fill(beyond, 0.0)
        pieces = heard.unflatten(-1, (self.parts, -1)).flatten(1, 2)
        pieces_mask = valid_frames(seen_N * self.parts, pieces.shape[1])
        kept = [block.cif_attention.keys_values(pieces) for block in self.blocks]  # type: ignore[operator, union-attr]
        fused = self.fuse(heard)
        x = self._read(self.start + fused, kept, pieces_mask, mask)
        for _ in range(self.again):
            assert self.words is not None
            said = self.words.spoken(x)
            before = torch.cat([self.start.expand(len(x), 1, -1), said[:, :-1]], 1)
            x = self._read(before + fused, kept, pieces_mask, None)
        return Features(x.masked_fill(beyond, 0.0), lengths_N)

    def _read(self, x: Tensor, pieces: Sequence[KeysValues], pieces_mask: Tensor, mask: Tensor | None) -> Tensor:
        for block, keys_values in zip(self.blocks, pieces, strict=True):
            x = block(x, keys_values, pieces_mask, mask=mask)
        read: Tensor = self.norm(x)
        return read


MOONSHINE_NAMES = {
    "self_attn": "self_attention",
    "encoder_attn": "cif_attention",
    "input_layernorm": "self_norm",
    "post_attention_layernorm": "cif_norm",
    "final_layernorm": "ffn_norm",
    "mlp.fc1": "ffn_in",
    "mlp.fc2": "ffn_out",
}


def moonshine_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The blocks and the last norm of Moonshine's decoder under our names."""
    renamed = {"norm.weight": state["model.decoder.norm.weight"]}
    for name, value in state.items():
        if name.startswith("model.decoder.layers."):
            ours = "blocks." + name.removeprefix("model.decoder.layers.")
            for theirs, own in MOONSHINE_NAMES.items():
                ours = ours.replace(f".{theirs}.", f".{own}.")
            renamed[ours] = value
    return renamed


def import_decoder(state: dict[str, Tensor], reader: Reader) -> list[str]:
    """Start a `Reader` from the decoder that stage 1 exported; what that did not train is Moonshine's.

    Returns:
        The names in ``state`` that a reader has no use for.

    Raises:
        ValueError: a tensor of the reader is missing or has another shape.
    """
    state = {name: tensor.float() for name, tensor in state.items()}
    if "embedding.weight" in state:
        state["start"] = state.pop("embedding.weight")[-1]
    else:
        theirs, _ = moonshine.decoder_weights()
        state = moonshine_blocks(theirs) | {"start": theirs["model.decoder.embed_tokens.weight"][moonshine.BOS]} | state
    own = reader.state_dict()
    wrong = sorted(name for name in own if name not in state or state[name].shape != own[name].shape)
    if wrong:
        raise ValueError(f"not a decoder of this reader's shape, see {wrong[:8]}")
    reader.load_state_dict({name: state[name] for name in own})
    return sorted(state.keys() - own.keys())
