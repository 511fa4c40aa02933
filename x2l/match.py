"""The first half of stage 2 for speech: each spoken token next to the LLM's own embedding of that token.

CIF gives one embedding a token and the ASR model writes in the LLM's tokens, so an embedding has a known target: the
row of the LLM's input table. Learning it needs no pass through the LLM, hundreds of times less work than stage 2
proper, and makes a spoken question act like a typed one. Not in the paper.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from x2l.asr import Spoken
from x2l.encoders.conformer import valid_frames
from x2l.types import Output

SCALE = 20.0  # of the cosine similarities, before the softmax
SMOOTHING = 0.1


class Matcher(nn.Module):
    """Cross-entropy of the nearest embedding among the vocabulary's by cosine, plus that of the lengths of the two, squared.

    The squared distance in its place makes doubtful embeddings short, and the LLM reads them badly (dev/LOG.md).

    Args:
        modality: frozen encoder and an interface that yields LLM embeddings.
        table: (V, D) the LLM's input embeddings of the vocabulary.
    """

    table: Tensor

    def __init__(self, modality: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.modality = modality
        self.register_buffer("table", table.float())

    def forward(self, batch: Spoken) -> Output:
        """The loss summed over the tokens of those utterances that the listener counts right; others add nothing."""
        heard = self.modality(batch.media)
        right = heard.lengths == batch.token_lengths
        width = min(heard.x.shape[1], batch.tokens.shape[1])
        kept = valid_frames(batch.token_lengths, width) & right[:, None]
        x, target = heard.x[:, :width][kept].float(), batch.tokens[:, :width][kept]
        logits = SCALE * F.normalize(x, dim=-1) @ F.normalize(self.table, dim=-1).T
        nearest = F.cross_entropy(logits, target, label_smoothing=SMOOTHING, reduction="sum")
        norms = self.table.norm(dim=-1)[target]
        length = (x.norm(dim=-1) / norms - 1).square().sum()
        hits = (logits.argmax(-1) == target).float().sum()
        num_tokens = max(1, len(target))
        parts = {"nearest": nearest, "length": length, "accuracy": hits}
        logs = {name: float(value.detach()) / num_tokens for name, value in parts.items()}
        return Output(nearest + length, num_tokens, logs | {"counted": float(right.float().mean())})
