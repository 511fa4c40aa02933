"""Matrix products of a few rows on a CPU, from weights that oneDNN laid out once.

A decode step multiplies every weight with one row for each answer in progress. PyTorch's general product lays a weight out anew
at every call, which for a few rows is most of the work. In float32 one or two rows have a routine of their own, and many rows
repay the layout; in bfloat16 it always costs (benchmarks/serve.py, steps).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2l.build import bf16_in_hardware

FLOAT32_ROWS = range(3, 17)  # for which a packed product is the faster one in float32
HINT = 8  # rows that the layout is made for; any number may come


def pack(module: nn.Module, max_bytes: int) -> int:
    """Lay out the weights of all linear layers in ``module`` a second time; returns the bytes that this takes.

    Nothing is done, and 0 returned, where the copies would exceed ``max_bytes``, or the processor or PyTorch has no such products.
    Parameters stay what they are, and must not change before `unpack`; nor can the module be copied or converted until then.
    """
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    size = sum(layer.weight.nbytes for layer in layers)
    if size > max_bytes or not all(_possible(layer.weight) for layer in layers):
        return 0
    for layer in layers:
        if not isinstance(layer.forward, Packed):
            layer.forward = Packed(layer)  # type: ignore[method-assign, assignment]
    return size


def unpack(module: nn.Module) -> None:
    """Undo `pack`."""
    for layer in module.modules():
        if isinstance(vars(layer).get("forward"), Packed):
            del layer.forward


def _possible(weight: Tensor) -> bool:
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bf16_in_hardware())


class Packed:
    """Takes the place of a linear layer's ``forward``; with gradients it is the plain product."""

    def __init__(self, layer: nn.Linear):
        self.weight, self.bias = layer.weight, layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), HINT)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        plain = x.dtype == torch.float32 and len(rows) not in FLOAT32_ROWS
        if plain or x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return out.view(*x.shape[:-1], -1)
