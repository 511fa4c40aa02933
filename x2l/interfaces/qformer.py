"""Q-Former: learned queries read a frozen encoder's features by cross-attention (BLIP-2, arXiv 2301.12597, 3.1).

BERT blocks, post-norm as published or pre-norm. Queries and an optional text share the self-attention and have separate
feed-forward networks; only queries cross-attend. Shape suffixes: N items, Q queries, T text tokens, F features, E encoder
width, C Q-Former width, H heads.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.types import Features

LN_EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """Multi-head attention, output projection, residual and norm: after the sum as in BERT, or before the attention."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, dropout: float = 0.1, pre_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.dropout, self.pre_norm = dropout, pre_norm

    def forward(self, x_NQC: Tensor, context_NFE: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``mask`` is boolean, broadcastable to (N, H, Q, F), True where attention is allowed."""
        h = self.norm(x_NQC) if self.pre_norm else x_NQC
        context = h if context_NFE is None else context_NFE
        q, k, v = (self._split(p) for p in (self.query(h), self.key(context), self.value(context)))
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        y = x_NQC + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return y if self.pre_norm else self.norm(y)

    def _split(self, x_NQC: Tensor) -> Tensor:
        return x_NQC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with GELU, residual and norm, after the sum or before the layers."""

    def __init__(self, width: int, dropout: float = 0.1, pre_norm: bool = False):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.dropout, self.pre_norm = dropout, pre_norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x) if self.pre_norm else x)))
        y = x + F.dropout(y, self.dropout, self.training)
        return y if self.pre_norm else self.norm(y)


class Block(nn.Module):
    """Self-attention over queries and text, cross-attention and one FFN for queries, another FFN for text."""

    def __init__(self, width: int, heads: int, encoder_width: int | None, text: bool, dropout: float, pre_norm: bool = False):
        super().__init__()
        self.attention = Attention(width, heads, None, dropout, pre_norm)
        self.cross = Attention(width, heads, encoder_width, dropout, pre_norm) if encoder_width else None
        self.ffn = FeedForward(width, dropout, pre_norm)
        self.text_ffn = FeedForward(width, dropout, pre_norm) if text else None

    def forward(
        self, x: Tensor, num_queries: int, feats_NFE: Tensor | None, self_mask: Tensor | None, cross_mask: Tensor | None
    ) -> Tensor:
        x = self.attention(x, mask=self_mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries:
            if self.cross is not None:
                queries = self.cross(queries, feats_NFE, cross_mask)
            queries = self.ffn(queries)
        if text.shape[1]:
            assert self.text_ffn is not None, "this Q-Former was built without text"
            text = self.text_ffn(text)
        return torch.cat([queries, text], dim=1)


class QFormer(nn.Module):
    """``num_queries`` learned queries -> as many embeddings for any number of encoder features.

    The defaults are the paper's bert-base shape: 12 layers of width 768, 12 heads, 32 queries drawn from N(0, 0.02),
    cross-attention in every second layer from layer 0, ``ln_vision`` before it.

    Args:
        encoder_width: E of the frozen encoder.
        width, depth, heads: shape of the transformer.
        num_queries: Q, the number of embeddings that an item becomes.
        cross_every: cross-attention stands in layers 0, cross_every, 2 * cross_every, ...
        vocab_size: a text vocabulary for stage-1 pretraining (blip2.py); 0 = queries alone.
        max_text: longest text, in tokens.
        dropout: in attention, residuals and on the queries.
        drop_features: share of the encoder's features that an item loses at random in each training step (PatchDropout,
            arXiv 2208.07220), against learning a few thousand pictures by heart; the last decay of the rate undid its gain
            on Flickr8k (dev/LOG.md).
        pre_norm: norm before each sublayer, and Xavier weights. From scratch on little data this learns where the
            published post-norm makes all queries alike (dev/LOG.md); BLIP-2's weights are post-norm.
    """

    def __init__(
        self,
        encoder_width: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        num_queries: int = 32,
        cross_every: int = 2,
        vocab_size: int = 0,
        max_text: int = 512,
        dropout: float = 0.1,
        drop_features: float = 0.0,
        pre_norm: bool = False,
    ):
        super().__init__()
        if not 0 <= drop_features < 1:
            raise ValueError(f"drop_features={drop_features}: a share in [0, 1)")
        self.out_width, self.num_queries = width, num_queries
        self.ln_vision = nn.LayerNorm(encoder_width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.dropout, self.drop_features = dropout, drop_features
        self.words = nn.Embedding(vocab_size, width) if vocab_size else None
        self.positions = nn.Embedding(max_text, width) if vocab_size else None
        self.blocks = nn.ModuleList(
            Block(width, heads, encoder_width if i % cross_every == 0 else None, bool(vocab_size), dropout, pre_norm)
            for i in range(depth)
        )
        self.last_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(_init_xavier if pre_norm else _init_bert)

    def forward(self, features: Features) -> Features:
        """(N, F, E) with lengths -> (N, Q, C); every item becomes exactly Q embeddings."""
        n = len(features.x)
        hidden = self.encode(features)
        return Features(hidden, torch.full((n,), self.num_queries, device=hidden.device))

    def encode(
        self,
        features: Features | None,
        text_NT: Tensor | None = None,
        self_mask: Tensor | None = None,
        at_NT: Tensor | None = None,
    ) -> Tensor:
        """Run queries, text or both through the blocks: (N, Q + T, C), queries first.

        Args:
            features: encoder output; None runs the text alone (BLIP-2's unimodal text encoder).
            text_NT: token ids, or None.
            self_mask: boolean (N, Q + T, Q + T) or broadcastable, True = may attend; None = all to all.
            at_NT: position of each token in its own text, for rows that hold several texts; None = 0, 1, ...
        """
        parts, feats, cross_mask = [], None, None
        if features is not None:
            parts.append(self.queries.expand(len(features.x), -1, -1))
            feats = self.ln_vision(features.x)
            frames = torch.arange(feats.shape[1], device=feats.device)
            seen = frames < features.lengths[:, None].to(feats.device)
            if self.training and self.drop_features:
                kept = torch.rand(seen.shape, device=seen.device) >= self.drop_features
                kept[:, 0] = True  # attention needs something to attend to
                seen = seen & kept
            cross_mask = seen[:, None, None]
        if text_NT is not None:
            if self.words is None or self.positions is None:
                raise ValueError("a text for a Q-Former built without one: give it a vocab_size")
            if at_NT is None:
                at_NT = torch.arange(text_NT.shape[1], device=text_NT.device)
            parts.append(self.words(text_NT) + self.positions(at_NT))
        x = F.dropout(self.norm(torch.cat(parts, dim=1)), self.dropout, self.training)
        if self_mask is not None:
            self_mask = self_mask[:, None]
        num_queries = 0 if features is None else self.num_queries
        for block in self.blocks:
            x = block(x, num_queries, feats, self_mask, cross_mask)
        return self.last_norm(x)


def _init_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _init_bert(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# BLIP-2 name -> ours, after the wrapper's prefix has gone; both published layouts share the inner names.
BLIP2_NAMES = [
    (r"^(?:qformer|Qformer\.bert)\.", ""),
    (r"^query_tokens$", "queries"),
    (r"^(?:layernorm|embeddings\.LayerNorm)\.", "norm."),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "positions."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.crossattention\.", ".cross."),
    (r"\.attention\.(?:attention|self)\.", ".attention."),
    (r"\.cross\.(?:attention|self)\.", ".cross."),
    (r"\.(attention|cross)\.output\.dense\.", r".\1.out."),
    (r"\.(attention|cross)\.output\.LayerNorm\.", r".\1.norm."),
    (r"\.intermediate_query\.dense\.", ".ffn.up."),
    (r"\.output_query\.dense\.", ".ffn.down."),
    (r"\.output_query\.LayerNorm\.", ".ffn.norm."),
    (r"\.intermediate\.dense\.", ".text_ffn.up."),
    (r"\.output\.dense\.", ".text_ffn.down."),
    (r"\.output\.LayerNorm\.", ".text_ffn.norm."),
]


def import_blip2(state: dict[str, Tensor], qformer: QFormer) -> list[str]:
    """Load BLIP-2 Q-Former weights, in Hugging Face's or LAVIS's layout, into ``qformer``.

    Strict about what the Q-Former owns: every one of its tensors must be found, in its shape. Tensors of the checkpoint
    that a Q-Former does not have (the vision model, projection heads, the LM head, text parts when ``qformer`` has
    none) are left out.

    ``ln_vision`` lies outside the vision model in LAVIS and inside it, as ``post_layernorm``, in Hugging Face. Here it
    is the Q-Former's, so a Hugging Face BLIP-2 encoder must give the states before it, or they are normalised twice:
    build it with ``layer=-1`` (encoders/hf.py).

    Returns:
        The names in ``state`` that were not used, so that a caller can show them.

    Raises:
        ValueError: a tensor of the Q-Former is missing, or has another shape.
    """
    own = qformer.state_dict()
    renamed: dict[str, Tensor] = {}
    unused = []
    for name, tensor in state.items():
        ours = name
        for pattern, replacement in BLIP2_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ours == "queries":
            tensor = tensor.reshape(tensor.shape[-2:])
        if ours in own:
            renamed[ours] = tensor
        else:
            unused.append(name)
    missing = sorted(own.keys() - renamed.keys())
    wrong = [f"{k}: {tuple(v.shape)}, not {tuple(own[k].shape)}" for k, v in renamed.items() if v.shape != own[k].shape]
    if missing or wrong:
        raise ValueError(f"not a BLIP-2 Q-Former of this shape; missing: {missing[:8]}; other shapes: {wrong[:8]}")
    qformer.load_state_dict(renamed)
    return unused
