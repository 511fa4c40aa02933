"""Matrix products of a few rows on a CPU, from weights that oneDNN laid out once.

A decode step multiplies every weight with one row for each answer in progress. PyTorch's general product lays a weight out anew
at every call, which for a few rows is most of the work. In float32 one or two rows have a routine of their own, and many rows
repay the layout; in bfloat16 it always costs (benchmarks/serve.py, steps). Queries, keys and values of a small LLM are too small
for a call each: one product gives all three.

A row is bound by reading the weights, so that four bits a weight pay, where asked for: every 32 weights of an output get 16 levels
from their least to their largest. A GGUF file in Q4_1 has these levels, but for what bfloat16 rounds (docs/serve.md). The output
layer, which such files keep finer, has eight bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2l.build import bf16_in_hardware

FLOAT32_ROWS = range(3, 17)  # for which a packed product is the faster one in float32
HINT = 8  # rows that the layout is made for; any number may come
FEW_BIT_ROWS = 4  # for which 4 bits are the faster ones: all layers of tiny 11.6, 18.9 and 35.7 ms for 1, 4 and 8 rows, packed 20
INT4_GROUP = 32  # weights that share their levels
TOGETHER = ("q_proj", "k_proj", "v_proj")  # layers of one module that are given the same input, under transformers' names


def pack(module: nn.Module, max_bytes: int, int4: bool = False) -> int:
    """Lay out the weights of all linear layers in ``module`` a second time; returns the bytes that this takes.

    Nothing is done, and 0 returned, where the copies would exceed ``max_bytes``, or the processor or PyTorch has no such products.
    Parameters stay what they are, and must not change before `unpack`; nor can the module be copied or converted until then. The
    input of a layer for queries must not be changed in place before that for values has seen it.

    Args:
        int4: few rows are multiplied with weights of 4 bits (the output layer: 8), more with the same weights in bfloat16. Layers
            whose shape the products cannot take stay in bfloat16.

    Raises:
        ValueError: no 4-bit products for this processor, this LLM or in this much memory.
    """
    unpack(module)
    groups = _groups(module)
    weights = [layer.weight for group in groups for layer in group]
    size = sum(weight.nbytes for weight in weights)
    if int4:
        size += size * 5 // 16  # codes and scales
        _check_int4(weights, size, max_bytes)
    if size > max_bytes or not all(map(_possible, weights)):
        return 0
    head = getattr(module, "get_output_embeddings", lambda: None)()
    products = [Product(group, (8 if group[0] is head else 4) if int4 else None) for group in groups]
    if int4 and not any(product.few for product in products):
        raise ValueError("4-bit weights: no linear layer of this LLM has inputs by 32 and outputs by 16")
    for group, product in zip(groups, products, strict=True):
        for i, layer in enumerate(group):
            layer.forward = Packed(layer, product, i)  # type: ignore[method-assign, assignment]
    return size


def unpack(module: nn.Module) -> None:
    """Undo `pack`."""
    for layer in module.modules():
        if isinstance(vars(layer).get("forward"), Packed):
            del layer.forward


def _groups(module: nn.Module) -> list[list[nn.Linear]]:
    """The linear layers in ``module``, each once; those of one product are in one list."""
    groups = [[module]] if type(module) is nn.Linear else []
    for parent in module.modules():
        layers = {name: layer for name, layer in parent.named_children() if type(layer) is nn.Linear}
        shared = [layers.pop(name) for name in TOGETHER] if layers.keys() >= set(TOGETHER) else []
        alike = len({(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in shared}) == 1
        groups += [[layer] for layer in layers.values()] + ([shared] if alike else [[layer] for layer in shared])
    return list({id(group[0]): group for group in groups}.values())


def _check_int4(weights: Sequence[Tensor], size: int, max_bytes: int) -> None:
    if other := {weight.dtype for weight in weights} - {torch.bfloat16}:
        raise ValueError(f"4-bit weights are for an LLM in bfloat16, this one is in {other.pop()}: set llm.dtype=bfloat16")
    capability = torch.backends.cpu.get_cpu_capability()
    if not (bf16_in_hardware() and capability == "AVX512" and all(map(_possible, weights))):
        found = f"PyTorch finds {capability}, bfloat16: {bf16_in_hardware()}, and the LLM on {weights[0].device}"
        raise ValueError(f"4-bit weights need a processor with AVX-512 and bfloat16; {found}")
    if size > max_bytes:
        raise ValueError(f"4-bit weights would take {size:,} bytes beside the LLM, {max_bytes:,} are allowed (packed_bytes)")


def _possible(weight: Tensor) -> bool:
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bf16_in_hardware())


class Product:
    """The product of one input with the weights of several linear layers, computed when the first of them asks.

    Args:
        layers: of one input width and type, all with a bias or all without.
        bits: 4 or 8, for few rows; None: bfloat16 or float32 for any number.
    """

    def __init__(self, layers: Sequence[nn.Linear], bits: int | None = None):
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        self.few: Callable[[Tensor], Tensor] | None = None
        fits = weight.shape[1] % INT4_GROUP == 0  # other widths crash PyTorch's 8-bit product, too
        if bits == 4 and fits and weight.shape[0] % 16 == 0:
            codes, scales, weight = four_bits(weight)
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.few = lambda rows: torch._weight_int4pack_mm_for_cpu(rows, codes, INT4_GROUP, scales)
        elif bits == 8 and fits:
            codes, scales, weight = eight_bits(weight)
            self.few = lambda rows: torch._weight_int8pack_mm(rows, codes, scales)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINT)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._shared: tuple[Tensor, tuple[Tensor, ...]] | None = None  # an input, and what it gives the layers

    def of(self, x: Tensor, i: int) -> Tensor:
        """Layer ``i``'s (..., out) of ``x`` (..., in): computed, or kept since an earlier layer was given the very same tensor."""
        shared = self._shared
        if i == 0 or shared is None or shared[0] is not x:
            whole = self._whole(x.reshape(-1, x.shape[-1]))
            shared = x, whole.view(*x.shape[:-1], -1).split(self.sizes, -1)
        self._shared = None if i == len(self.sizes) - 1 else shared
        return shared[1][i]

    def _whole(self, rows: Tensor) -> Tensor:
        if self.few is not None and len(rows) <= FEW_BIT_ROWS:
            few = self.few(rows.contiguous())
            return few if self.bias is None else few + self.bias
        whole: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return whole


class Packed:
    """Takes the place of a linear layer's ``forward``, the ``i``-th of a `Product`'s; with gradients it is the plain product."""

    def __init__(self, layer: nn.Linear, product: Product, i: int):
        self.layer, self.product, self.i = layer, product, i

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        plain = x.dtype == torch.float32 and x.numel() // x.shape[-1] not in FLOAT32_ROWS
        if plain or x.dtype != weight.dtype or torch.is_grad_enabled():
            return F.linear(x, weight, self.layer.bias)
        return self.product.of(x, self.i)


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (O, I) in 16 levels for each 32 of an output's.

    Returns:
        Codes (O, I) int32 from 0 to 15; of each group the step and the level of code 8 (I / 32, O, 2); and the weight that they
        stand for (O, I). The latter two are of the weight's type.
    """
    groups = weight.float().unflatten(1, (-1, INT4_GROUP))
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    step = (largest - least) / 15
    codes = ((groups - least) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
    scales = torch.cat([step, least + 8 * step], -1).to(weight.dtype)
    rounded = (codes - 8) * scales[..., :1].float() + scales[..., 1:].float()
    return codes.flatten(1).int(), scales.transpose(0, 1).contiguous(), rounded.flatten(1).to(weight.dtype)


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (O, I) in steps of 1/127 of each output's largest.

    Returns:
        Codes (O, I) int8; steps (O,) and the weight that they stand for (O, I), of the weight's type.
    """
    scales = (weight.float().abs().amax(1) / 127).to(weight.dtype)
    codes = (weight.float() / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales, (codes * scales.float()[:, None]).to(weight.dtype)
