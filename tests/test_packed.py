"""Packed products: the same numbers as the plain ones, within a bound, and nothing else touched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from x2l.devices import bf16_in_hardware
from x2l.packed import FINE, SLOW_ROWS, PackedProduct, Product, eight_bits, fifteen_bits, four_bits, pack, padded

FEW_BITS = bf16_in_hardware() and torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_few_bits = pytest.mark.skipif(not FEW_BITS, reason="the processor has no AVX-512 with bfloat16")


def layers(*outs: int, width: int = 96, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(width, out, bias=bias, dtype=dtype) for out in outs]


def size(groups: Sequence[Sequence[nn.Linear]]) -> int:
    return sum(layer.weight.nbytes for group in groups for layer in group)


def exact(group: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """In float64."""
    biases = [0 if layer.bias is None else layer.bias.double() for layer in group]
    return torch.cat([x.double() @ layer.weight.double().T + bias for layer, bias in zip(group, biases, strict=True)], -1)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 21, 100])
@pytest.mark.parametrize("outs", [(200,), (64, 32, 33)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_same_products(dtype: torch.dtype, bias: bool, outs: tuple[int, ...], rows: int) -> None:
    group, x = layers(*outs, bias=bias, dtype=dtype), torch.randn(rows, 96).to(dtype)
    (packed,) = pack([group], size([group]))
    assert (type(packed) is PackedProduct) == (dtype == torch.float32 or bf16_in_hardware())
    plain, found = Product(group)(x), packed(x)
    assert (found.shape, found.dtype) == ((rows, sum(outs)), dtype)
    error, bound = ((values - exact(group, x)).abs().max() for values in (found, plain))
    assert error <= 2 * bound + 1e-6


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_products_of_any_number_of_rows(bias: bool) -> None:
    """Those that are padded included: each row is its own."""
    group = layers(64, 32, 33, bias=bias)
    product = Product(group)
    product.slow_rows = SLOW_ROWS  # on this processor or not
    for num_rows in range(1, 20):
        x = torch.randn(num_rows, 96)
        found = product(x)
        assert found.shape == (num_rows, 129)
        torch.testing.assert_close(found.double(), exact(group, x), rtol=1e-5, atol=1e-5)


def test_what_is_too_large_or_of_another_type_is_left_alone() -> None:
    groups = [layers(200), layers(33)]
    assert [type(product) for product in pack(groups, size(groups))] == [PackedProduct] * 2
    assert [type(product) for product in pack(groups, size(groups) - 1)] == [Product] * 2
    assert [type(product) for product in pack([layers(200, dtype=torch.float16)], 1 << 20)] == [Product]


def test_levels_of_a_q4_1_file_stay_what_they_are() -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    blocks = gguf.quants.quantize(torch.randn(48, 64).numpy(), gguf.GGMLQuantizationType.Q4_1)
    weight = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    codes, scales, rounded = four_bits(weight)
    assert codes.min() == 0
    assert codes.max() == 15
    assert scales.shape == (2, 48, 2)
    torch.testing.assert_close(rounded, weight, atol=1e-6, rtol=0)


def test_four_bits_are_as_near_as_sixteen_levels_allow() -> None:
    weight = torch.cat([torch.randn(32, 64), torch.full((16, 64), 0.3)])
    _, _, rounded = four_bits(weight)
    step = (weight.unflatten(1, (-1, 32)).amax(-1) - weight.unflatten(1, (-1, 32)).amin(-1)) / 15
    assert ((rounded - weight).abs().unflatten(1, (-1, 32)).amax(-1) <= step / 2 + 1e-6).all()


@needs_few_bits
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@torch.inference_mode()
def test_any_number_of_rows_reads_the_same_rounded_weights(rows: int, bits: int) -> None:
    group, head = layers(64, 32, dtype=torch.bfloat16), layers(32, dtype=torch.bfloat16)
    for layer in group:
        layer.weight[:, 0] = 3.0  # the steps that the others have are far apart
    x = torch.randn(rows, 96).bfloat16()
    found, unrounded = pack([group, head], 1 << 20, weight_bits=bits)[0](x), exact(group, x)
    for layer in group:
        layer.weight.data = {4: four_bits, 8: eight_bits}[bits](layer.weight)[2]
    near, far = ((found - expected).square().mean() for expected in (exact(group, x), unrounded))
    assert near < far / 4


def test_eight_bits_are_as_near_as_a_step_of_the_largest_allows() -> None:
    weight = torch.cat([torch.randn(32, 64), torch.zeros(1, 64)])
    codes, steps, rounded = eight_bits(weight)
    assert codes.dtype == torch.int8
    assert ((rounded - weight).abs() <= steps[:, None] / 2 + 1e-6).all()


@given(st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
def test_an_input_has_fifteen_bits_of_its_rows_largest(seed: int, outlier: float) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    rows[1, 7], rows[2] = outlier, 0
    codes, scale = fifteen_bits(rows)
    assert codes.dtype == torch.int8
    coarse, fine = codes.double().chunk(2)
    assert codes.double().abs().max() <= 127
    found = scale.double() * (coarse + fine / FINE)
    assert ((found - rows).abs() <= 1.01 * scale / FINE / 2 + 1e-30).all()


@needs_few_bits
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("width", [96, 70])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_eight_bit_weights_are_all_that_is_rounded(rows: int, width: int, bias: bool) -> None:
    group = layers(64, 33, width=width, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(rows, width).bfloat16()
    x[:, 3] *= 100  # as LLMs have them
    found = PackedProduct(group, 8, output=True)(x)
    for layer in group:
        codes, steps, _ = eight_bits(layer.weight)
        layer.weight.data = codes.double() * steps[:, None]
    expected = exact(group, x)
    assert ((found - expected).abs() <= 2**-8 * (2 * expected.abs() + 1) + 2e-4 * x.abs().amax(1, keepdim=True)).all()


@needs_few_bits
@torch.inference_mode()
def test_rows_do_not_depend_on_each_other() -> None:
    group, x = layers(64, dtype=torch.bfloat16), torch.randn(9, 96).bfloat16()
    x[4] *= 1000
    product = PackedProduct(group, 8, output=True)
    torch.testing.assert_close(product(x), torch.cat([product(row[None]) for row in x]), atol=0, rtol=2**-7)


@needs_few_bits
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 4, 5])
@torch.inference_mode()
def test_the_output_layer_has_eight_bits(rows: int, bits: int) -> None:
    group, (head,) = layers(64, width=64, dtype=torch.bfloat16), layers(96, width=64, bias=False, dtype=torch.bfloat16)
    head.weight[:, 0] = 3.0  # 8 bits tell the others apart by a 42nd alone
    x = torch.randn(rows, 64).bfloat16()
    found = pack([group, [head]], 1 << 20, weight_bits=bits)[1](x).double()
    codes, steps, _ = eight_bits(head.weight)
    near, far = ((found - x.double() @ w.double().T).abs().max() for w in (codes * steps[:, None], head.weight))
    assert near < far / 2


@needs_few_bits
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(70, 64), (64, 33)])
@torch.inference_mode()
def test_shapes_that_these_products_cannot_take_stay_in_bfloat16(inputs: int, outputs: int, bits: int) -> None:
    odd, x = layers(outputs, width=inputs, dtype=torch.bfloat16), torch.randn(3, inputs).bfloat16()
    found = pack([odd, layers(32, dtype=torch.bfloat16)], 1 << 20, weight_bits=bits)[0](x)
    assert torch.equal(found, PackedProduct(odd)(x))


@needs_few_bits
@pytest.mark.parametrize(("bits", "copies"), [(4, 21 / 16), (8, 3 / 2)])
def test_all_copies_count(bits: int, copies: float) -> None:
    groups = [layers(64, 32, 32, dtype=torch.bfloat16), layers(96, dtype=torch.bfloat16)]
    most = int(size(groups[:1]) * copies) + size(groups[1:]) // 2
    pack(groups, most, weight_bits=bits)
    with pytest.raises(ValueError, match=f"{bits}-bit weights take .*packed_bytes allows"):
        pack(groups, most - 1, weight_bits=bits)


def test_four_bits_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"this one is in torch.float32: set llm.dtype=bfloat16"):
        pack([layers(200), layers(32)], 1 << 20, weight_bits=4)


def test_four_bits_are_refused_by_a_processor_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match="PyTorch finds AVX2"):
        pack([layers(200, dtype=torch.bfloat16), layers(32, dtype=torch.bfloat16)], 1 << 20, weight_bits=4)


@pytest.mark.parametrize(("num", "rows"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_rows_come_by_sixteen(num: int, rows: int) -> None:
    x = torch.randn(num, 3)
    y, n = padded(x)
    assert n == num
    assert y.shape == (rows, 3)
    assert torch.equal(y[:num], x)
    assert not y[num:].any()
