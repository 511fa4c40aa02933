"""Matrix products of a few rows on a CPU, from weights that oneDNN laid out once.

A decode step multiplies every weight with one row for each answer in progress. PyTorch's general product lays a weight out anew
at every call, which for a few rows is most of the work. In float32 one or two rows have a routine of their own, and many rows
repay the layout; in bfloat16 it always costs (benchmarks/serve.py, steps). Queries, keys and values of a small LLM are too small
for a call each: one product gives all three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2l.build import bf16_in_hardware

FLOAT32_ROWS = range(3, 17)  # for which a packed product is the faster one in float32
HINT = 8  # rows that the layout is made for; any number may come
TOGETHER = ("q_proj", "k_proj", "v_proj")  # layers of one module that are given the same input, under transformers' names


def pack(module: nn.Module, max_bytes: int) -> int:
    """Lay out the weights of all linear layers in ``module`` a second time; returns the bytes that this takes.

    Nothing is done, and 0 returned, where the copies would exceed ``max_bytes``, or the processor or PyTorch has no such products.
    Parameters stay what they are, and must not change before `unpack`; nor can the module be copied or converted until then.
    """
    groups = [group for parent in module.modules() for group in _groups(parent)]
    layers = [layer for group in groups for layer in group]
    size = sum(layer.weight.nbytes for layer in layers)
    if size > max_bytes or not all(_possible(layer.weight) for layer in layers):
        return 0
    for group in groups:
        if not isinstance(group[0].forward, Packed):
            product = Product(group)
            for i, layer in enumerate(group):
                layer.forward = Packed(product, i)  # type: ignore[method-assign, assignment]
    return size


def unpack(module: nn.Module) -> None:
    """Undo `pack`."""
    for layer in module.modules():
        if isinstance(vars(layer).get("forward"), Packed):
            del layer.forward


def _groups(parent: nn.Module) -> list[list[nn.Linear]]:
    """The linear layers among a module's children, those that share a product together."""
    layers = {name: layer for name, layer in parent.named_children() if type(layer) is nn.Linear}
    shared = [layers.pop(name) for name in TOGETHER] if layers.keys() >= set(TOGETHER) else []
    alike = len({(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in shared}) == 1
    return [[layer] for layer in layers.values()] + ([shared] if alike else [[layer] for layer in shared])


def _possible(weight: Tensor) -> bool:
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bf16_in_hardware())


class Product:
    """The product of one input with the weights of several linear layers, computed when the first of them asks."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINT)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, x: Tensor, i: int) -> Tensor:
        """Layer ``i``'s (..., out) of ``x`` (..., in), which is the very tensor that the layers before were given, or another."""
        if self._last is None or self._last[0] is not x:
            rows = x.reshape(-1, x.shape[-1])
            whole: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
            self._last = x, whole.view(*x.shape[:-1], -1).split(self.sizes, -1)
        part = self._last[1][i]
        if i == len(self.sizes) - 1:
            self._last = None
        return part


class Packed:
    """Takes the place of a linear layer's ``forward``, the ``i``-th of a `Product`'s; with gradients it is the plain product."""

    def __init__(self, product: Product, i: int):
        self.product, self.i, self.layer = product, i, product.layers[i]

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        plain = x.dtype == torch.float32 and x.numel() // x.shape[-1] not in FLOAT32_ROWS
        if plain or x.dtype != weight.dtype or torch.is_grad_enabled():
            return F.linear(x, weight, self.layer.bias)
        return self.product.part(x, self.i)
