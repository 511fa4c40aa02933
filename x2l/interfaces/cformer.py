"""C-Former: a transformer over CIF embeddings, one a spoken token (X-LLM, arXiv 2305.04160, section 3.1).

The paper's is 12 layers initialised from bert-base-chinese: post-norm BERT blocks with learned positions, fed with
embeddings in place of words. Shape suffixes: N utterances, U embeddings, E CIF width, C C-Former width.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.interfaces.qformer import LN_EPS, Attention, FeedForward, _init_bert
from x2l.types import Features


class CFormer(nn.Module):
    """(N, U, E) with lengths -> (N, U, C), lengths unchanged. The defaults are the paper's bert-base shape.

    Args:
        in_width: E of the CIF embeddings; a linear layer leads to ``width`` where they differ.
        width, depth, heads: shape of the transformer.
        max_positions: the longest utterance, in embeddings.
        dropout: in attention, residuals and on the input.
    """

    def __init__(
        self,
        in_width: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        max_positions: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.out_width = width
        self.project = nn.Linear(in_width, width) if in_width != width else None
        self.positions = nn.Embedding(max_positions, width)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.dropout = dropout
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.apply(_init_bert)

    def forward(self, features: Features) -> Features:
        """Contextualise the embeddings of each utterance, whatever else is in the batch; padding comes out as zeros.

        Raises:
            ValueError: more embeddings than ``max_positions``.
        """
        x, lengths_N = features.x, features.lengths
        num_units = x.shape[1]
        if num_units > self.positions.num_embeddings:
            raise ValueError(
                f"{num_units} CIF embeddings, but this C-Former has {self.positions.num_embeddings} positions: "
                "cut the audio into shorter pieces, or build it with a larger max_positions"
            )
        if num_units == 0:
            return Features(x.new_zeros(len(x), 0, self.out_width), lengths_N)
        position_U = torch.arange(num_units, device=x.device)
        beyond_NU1 = (position_U >= lengths_N[:, None]).unsqueeze(-1)
        # An empty utterance attends to one zero embedding: softmax over nothing is undefined.
        mask = (position_U < lengths_N.clamp(min=1)[:, None])[:, None, None]
        x = x.masked_fill(beyond_NU1, 0.0)
        if self.project is not None:
            x = self.project(x)
        x = F.dropout(self.norm(x + self.positions.weight[:num_units]), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, mask)
        return Features(x.masked_fill(beyond_NU1, 0.0), lengths_N)


class Block(nn.Module):
    """Self-attention and feed-forward network."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads, dropout=dropout)
        self.ffn = FeedForward(width, dropout)

    def forward(self, x_NUC: Tensor, mask: Tensor) -> Tensor:
        return self.ffn(self.attention(x_NUC, mask=mask))


# BERT name -> ours, after the prefix has gone. The oldest checkpoints call a norm's weight and bias gamma and beta.
BERT_NAMES = [
    (r"^bert\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^embeddings\.position_embeddings\.", "positions."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.attention\.output\.LayerNorm\.", ".attention.norm."),
    (r"\.intermediate\.dense\.", ".ffn.up."),
    (r"\.output\.dense\.", ".ffn.down."),
    (r"\.output\.LayerNorm\.", ".ffn.norm."),
]
SEGMENTS = "embeddings.token_type_embeddings.weight"
NOT_OURS = re.compile(r"^(?:embeddings\.(?:word_embeddings\.weight|position_ids)|pooler\..*|cls\..*)$")


def import_bert(state: dict[str, Tensor], cformer: CFormer) -> list[str]:
    """Load the weights of a BERT (bert-base-chinese, or any of ``cformer``'s shape) in Hugging Face's layout.

    BERT adds the embedding of the first segment to every position of a single text; here it is added to the position
    embeddings once. The input projection, which BERT has not, stays as it is.

    Returns:
        The names in ``state`` that a C-Former has no use for: word embeddings, the pooler and the pretraining heads.

    Raises:
        ValueError: a tensor of the C-Former is missing or has another shape, or ``state`` holds a tensor that is
            neither the C-Former's nor among those above.
    """
    own = {name: tensor for name, tensor in cformer.state_dict().items() if not name.startswith("project.")}
    renamed: dict[str, Tensor] = {}
    unused: list[str] = []
    extra: list[str] = []
    for name, tensor in state.items():
        ours = name
        for pattern, replacement in BERT_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ours in own or ours == SEGMENTS:
            renamed[ours] = tensor
        else:
            (unused if NOT_OURS.match(ours) else extra).append(name)
    missing = sorted((own.keys() | {SEGMENTS}) - renamed.keys())
    wrong = [
        f"{name}: {tuple(renamed[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & renamed.keys()
        if renamed[name].shape != own[name].shape
    ]
    if missing or extra or wrong:
        raise ValueError(
            f"not a BERT of this C-Former's shape; missing: {missing[:8]}; extra: {extra[:8]}; other shapes: {wrong[:8]}"
        )
    segments = renamed.pop(SEGMENTS)
    renamed["positions.weight"] = renamed["positions.weight"] + segments[0]
    cformer.load_state_dict(cformer.state_dict() | renamed)
    return unused
