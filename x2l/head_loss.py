"""Cross-entropy behind a frozen LM head, in blocks of rows whose logits stay in the processor's cache.

A vocabulary of 50,000 makes the logits of a batch its largest tensor by far. Here their gradient is taken to the hidden states
in the forward pass, block by block, so that no more than ``BLOCK`` logits exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**23  # logits at a time


def head_loss(head: nn.Module, hidden_TD: Tensor, labels_T: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of ``head(hidden)`` against ``labels``; ``head`` is frozen and gets no gradient.

    Args:
        head: (T, D) -> logits (T, V), each row by itself; the first dimension of its ``weight`` is V.
        hidden_TD: hidden states at the predicting positions.
        labels_T: token ids.
        weights_T: of each row's term of the sum; all 1 by default.
    """
    loss: Tensor = _HeadLoss.apply(hidden_TD, labels_T, head, weights_T)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, labels_T: Tensor, head: Any, weights_T: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden_TD) if wanted else None
        rows = max(16, BLOCK // head.weight.shape[0])
        for at in range(0, len(hidden_TD), rows):
            block = hidden_TD[at : at + rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                terms = F.cross_entropy(head(block).float(), labels_T[at : at + rows], reduction="none")
                part = terms.sum() if weights_T is None else terms @ weights_T[at : at + rows]
            loss += part.detach()
            if grad is not None:
                (grad[at : at + rows],) = torch.autograd.grad(part, block)
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * gradient.to(grad.dtype), None, None, None
