"""Image: frozen encoder -> Q-Former -> I-Adapter; every picture becomes ``num_queries`` embeddings (paper, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import nn

from x2l.interfaces.adapter import Adapter
from x2l.interfaces.qformer import QFormer


def interface(encoder_width: int, llm_width: int, llm_std: float, **qformer: Any) -> list[nn.Module]:
    """The image interface; ``qformer`` holds the arguments of `QFormer` (width, depth, heads, num_queries, ...)."""
    former = QFormer(encoder_width, **qformer)
    return [former, Adapter(former.out_width, llm_width, llm_std)]
