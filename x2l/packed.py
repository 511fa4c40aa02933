"""Matrix products of a few rows on a CPU, from weights that oneDNN laid out once.

A decode step multiplies every weight with one row for each answer in progress. PyTorch's general product lays a weight out anew
at every call, which for a few rows is most of the work. In float32 one or two rows have a routine of their own, and many rows
repay the layout; in bfloat16 it always costs. Layers that are given the same input, such as those for queries, keys and values,
share a product: a small LLM's are too small for a call each.

A row is bound by reading the weights, so that fewer bits a weight pay, where asked for, for few rows; more are multiplied with the
same weights as bfloat16 rounds them. Eight bits: steps of 1/127 of each output's largest weight. Four: every 32 weights of an
output get 16 levels from their least to their largest; a GGUF file in Q4_1 has these levels, but for what bfloat16 rounds
(docs/serve.md). The output layer, which such files keep finer, has eight bits in both, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2l.devices import bf16_in_hardware

FLOAT32_ROWS = range(3, 65)  # for which a packed product is the faster one in float32
SLOW_ROWS = range(7, 16)  # for which MKL's product in float32 takes longer than for 16: a pass of Qwen 0.5B 490 for 317 ms
ROWS = 16  # come at a time where their number varies much: oneDNN compiles a product for each, which takes longer than to multiply
HINT = 64  # rows that the layout is made for; any number may come
FEW_ROWS = 4  # for which fewer bits are the faster ones: all layers of tiny 10, 13 and 18 ms for 1, 2 and 4 rows in 4 bits, 21, 23
# and 27 in 8, packed 35 (with the memory busy)
GROUP = 32  # weights that share their levels
FINE = 254  # steps of an input's second eight bits in one of its first: half a step is 127
COPIES = {16: 1.0, 8: 1.5, 4: 1.3125}  # bytes of all copies beside the weights, in units of these; of the output layer's 8 bits 0.5


def pack(groups: Sequence[Sequence[nn.Linear]], max_bytes: int, weight_bits: int = 16) -> list[Product]:
    """A product for each group of layers, whose weights must not change from then on.

    Where a second copy of all weights would exceed ``max_bytes``, or the processor or PyTorch has no such products, they are
    PyTorch's own.

    Args:
        groups: layers that are given the same input, all with a bias or all without; the last group is the output layer.
        weight_bits: 16: as the weights are; 8 or 4: for few rows, but for layers whose inputs do not come by 32, or outputs by 16.
            The output layer has 8 then, for any number of rows.

    Raises:
        ValueError: no products of 4 or 8 bits for weights of this type, this processor or in this much memory.
    """
    *inner, output = groups
    weights = [layer.weight for group in groups for layer in group]
    in_output = sum(layer.weight.nbytes for layer in output)
    size = int((sum(weight.nbytes for weight in weights) - in_output) * COPIES[weight_bits])
    size += in_output if weight_bits == 16 else in_output // 2
    if weight_bits < 16:
        _check_bits(weight_bits, weights, size, max_bytes)
    if size > max_bytes or not all(map(can_lay_out, weights)):
        return [Product(group) for group in groups]
    return [*(PackedProduct(group, weight_bits) for group in inner), PackedProduct(output, weight_bits, output=True)]


def _check_bits(bits: int, weights: Sequence[Tensor], size: int, max_bytes: int) -> None:
    if other := {weight.dtype for weight in weights} - {torch.bfloat16}:
        raise ValueError(f"{bits}-bit weights are for an LLM in bfloat16, this one is in {other.pop()}: set llm.dtype=bfloat16")
    capability = torch.backends.cpu.get_cpu_capability()
    if not (bf16_in_hardware() and capability == "AVX512" and all(map(can_lay_out, weights))):
        found = f"PyTorch finds {capability}, bfloat16: {bf16_in_hardware()}, and the LLM on {weights[0].device}"
        raise ValueError(f"{bits}-bit weights need a processor with AVX-512 and bfloat16; {found}")
    if size > max_bytes:
        raise ValueError(f"{bits}-bit weights take {size:,} bytes beside the LLM, EngineConfig.packed_bytes allows {max_bytes:,}")


def can_lay_out(weight: Tensor) -> bool:
    """Whether `lay_out` takes it, on this processor."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bf16_in_hardware())


def lay_out(weight: Tensor, bias: Tensor | None, activation: str = "none") -> Callable[[Tensor], Tensor]:
    """The product of rows (N, in) with a copy of a linear layer's weight (out, in), all of its type.

    Args:
        activation: of the outputs, by oneDNN's name: ``none``, ``gelu`` or ``swish``.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINT)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, bias, activation, [], "none")


def padded(rows: Tensor, by: int = ROWS) -> tuple[Tensor, int]:
    """Rows (N, in) and zeros after them, a multiple of ``by`` in all, and how many there were."""
    return F.pad(rows, (0, 0, 0, -len(rows) % by)), len(rows)


class Product:
    """The outputs of linear layers, side by side, of one input."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.layers = layers
        weight = layers[0].weight
        in_mkl = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
        self.slow_rows = SLOW_ROWS if in_mkl and torch.backends.cpu.get_cpu_capability() == "AVX512" else range(0)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in) -> (N, sum of out)."""
        num_rows = len(rows)
        if num_rows in self.slow_rows:
            rows = F.pad(rows, (0, 0, 0, self.slow_rows.stop - num_rows))
        outs = [F.linear(rows, layer.weight, layer.bias) for layer in self.layers]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out if len(out) == num_rows else out[:num_rows]


class PackedProduct(Product):
    """The same from copies of the weights.

    Args:
        layers: of one input width and type, all with a bias or all without.
        bits: of a weight, 16 (as it is), 8 or 4.
        output: whether this is the output layer, which has no fewer than 8, and these for any number of rows.
    """

    def __init__(self, layers: Sequence[nn.Linear], bits: int = 16, output: bool = False):
        super().__init__(layers)
        weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers))
        self.bias = torch.cat(biases) if biases else None
        self.plain = weight.dtype == torch.float32
        self.few: Callable[[Tensor], Tensor] | None = None
        if output and bits < 16:
            self.many = _fifteen_by_eight_bits(weight, self.bias)
            return
        if bits == 4 and _fits(weight):
            codes, scales, weight = four_bits(weight)
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.few = lambda rows: torch._weight_int4pack_mm_for_cpu(rows, codes, GROUP, scales)
        elif bits == 8 and _fits(weight):
            codes, steps, weight = eight_bits(weight)
            self.few = lambda rows: torch._weight_int8pack_mm(rows, codes, steps)
        self.many = lay_out(weight, self.bias)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, in) -> (N, sum of out)."""
        if self.plain and len(rows) not in FLOAT32_ROWS:
            return super().__call__(rows)
        if self.few is None or len(rows) > FEW_ROWS:
            return self.many(rows)
        few = self.few(rows.contiguous())
        return few if self.bias is None else few + self.bias


def _fits(weight: Tensor) -> bool:
    """Whether PyTorch's products of few bits can take it; of some other shapes they crash."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % GROUP == 0


def _fifteen_by_eight_bits(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The processor's product of 8 by 8 bits, which reads a large weight fastest.

    Inputs in 8 bits cost an LLM much (dev/LOG.md), whose few large channels leave little of the others. Two rows cost as much as
    one: the second is what the first leaves over, so that inputs have 15 bits.
    """
    codes, steps = eight_bits(weight)[:2]
    packed = torch.ops.onednn.qlinear_prepack(codes, [HINT, codes.shape[1]])
    steps, zeros = steps.float(), torch.zeros(len(codes), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default

    def product(rows: Tensor) -> Tensor:
        x, scale = fifteen_bits(rows)
        y = multiply(x, 1.0, 0, packed, steps, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.add(y[: len(rows)], y[len(rows) :], alpha=1 / FINE).mul_(scale)
        return (y if bias is None else y + bias).to(rows.dtype)

    return product


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (O, I) in 16 levels for each 32 of an output's.

    Returns:
        Codes (O, I) int32 from 0 to 15; of each group the step and the level of code 8 (I / 32, O, 2); and the weight that they
        stand for (O, I). The latter two are of the weight's type.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    step = (largest - least) / 15
    codes = ((groups - least) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
    scales = torch.cat([step, least + 8 * step], -1).to(weight.dtype)
    rounded = (codes - 8) * scales[..., :1].float() + scales[..., 1:].float()
    return codes.flatten(1).int(), scales.transpose(0, 1).contiguous(), rounded.flatten(1).to(weight.dtype)


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (O, I) in steps of 1/127 of each output's largest.

    Returns:
        Codes (O, I) int8 from -127 to 127; steps (O,) and the weight that they stand for (O, I), of the weight's type.
    """
    steps = (weight.float().abs().amax(1) / 127).to(weight.dtype)
    codes = (weight.float() / steps.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), steps, (codes * steps.float()[:, None]).to(weight.dtype)


def fifteen_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, I) as ``scale * (codes[:N] + codes[N:] / FINE)``: codes (2N, I) int8 from -127 to 127, scale (N, 1) float32."""
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).mul_(1 / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    x = rows / scale
    return torch.cat([x, (x - x.round()).mul_(FINE)]).round_().to(torch.int8), scale
