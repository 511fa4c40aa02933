"""Packed products: the same numbers as the plain ones, within a bound, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from x2l.build import bf16_in_hardware
from x2l.serve.packed import Packed, eight_bits, four_bits, pack, unpack


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 33, bias=False)).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 21, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_products(dtype: torch.dtype, rows: int) -> None:
    model = layers(dtype)
    x = torch.randn(rows, 1, 96).to(dtype)
    with torch.inference_mode():
        plain, exact = model(x), model.double()(x.double())
        model.to(dtype)
        size = pack(model, 1 << 20)
        if dtype == torch.bfloat16 and not bf16_in_hardware():
            assert size == 0
        else:
            assert size == sum(layer.weight.nbytes for layer in model if isinstance(layer, nn.Linear))
            assert isinstance(model[0].forward, Packed)
        found = model(x)
    assert found.shape == plain.shape
    assert found.dtype == dtype
    error, bound = (found - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * bound + 1e-6


def test_parameters_stay_and_a_tied_table_reads_on() -> None:
    model = layers(torch.float32)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    pack(model, 1 << 20)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], value) for name, (place, value) in before.items())


def test_gradients_flow() -> None:
    model, x = layers(torch.float32), torch.randn(5, 96, requires_grad=True)
    pack(model, 1 << 20)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_unpacked_it_is_what_it_was() -> None:
    model, x = layers(torch.float32), torch.randn(8, 96)
    with torch.inference_mode():
        before = model(x)
        pack(model, 1 << 20)
        unpack(model)
        assert torch.equal(model(x), before)
    assert not any("forward" in vars(layer) for layer in model)


def test_what_is_too_large_is_left_alone() -> None:
    model = layers(torch.float32)
    size = sum(layer.weight.nbytes for layer in model if isinstance(layer, nn.Linear))
    assert pack(model, size - 1) == 0
    x = torch.randn(5, 96)
    assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))
    assert pack(model, size) == size


def test_other_types_are_left_alone() -> None:
    assert pack(layers(torch.float16), 1 << 20) == 0


class Heads(nn.Module):
    """Queries, keys and values under transformers' names, and an output layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(96, 64, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(96, 32, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(64, 96, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.o_proj(self.q_proj(x)), self.k_proj(y), self.v_proj(y)], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_are_one_product(bias: bool) -> None:
    model, x, y = Heads(bias), torch.randn(5, 1, 96), torch.randn(5, 1, 96)
    with torch.inference_mode():
        plain, apart, again = model(x, x), model(x, y), model(y, y)
        assert pack(model, 1 << 20) == sum(layer.weight.nbytes for layer in model.children())
        assert len({id(layer.forward.product) for layer in model.children()}) == 2  # type: ignore[union-attr]
        for expected, inputs in ((plain, (x, x)), (apart, (x, y)), (again, (y, y)), (plain, (x, x))):
            torch.testing.assert_close(model(*inputs), expected)
    unpack(model)
    assert not any("forward" in vars(layer) for layer in model.children())


def test_layers_that_differ_in_kind_stay_apart() -> None:
    model, x = Heads(bias=True), torch.randn(5, 1, 96)
    model.k_proj = nn.Linear(96, 32, bias=False)
    with torch.inference_mode():
        plain = model(x, x)
        pack(model, 1 << 20)
        torch.testing.assert_close(model(x, x), plain)


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


INT4 = bf16_in_hardware() and torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_int4 = pytest.mark.skipif(not INT4, reason="the processor has no AVX-512 with bfloat16")


class LLM(nn.Module):
    """A layer, and an output layer as transformers names it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, 64, bias=False)
        self.head = nn.Linear(width, 96, bias=False)
        with torch.no_grad():
            self.head.weight[:, 0] = 3.0  # 8 bits tell the others apart by a 42nd alone

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@needs_int4
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_any_number_of_rows_reads_the_same_four_bit_weights(rows: int) -> None:
    model, x = Heads(bias=True).bfloat16(), torch.randn(rows, 1, 96).bfloat16()
    rounded = Heads(bias=True).bfloat16()
    for layer in rounded.children():
        layer.weight.data = four_bits(layer.weight)[2]
    with torch.inference_mode():
        expected = rounded.double()(x.double(), x.double())
        pack(model, 1 << 20, int4=True)
        found = model(x, x)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_eight_bits_are_as_near_as_a_step_of_the_largest_allows() -> None:
    weight = torch.cat([torch.randn(32, 64), torch.zeros(1, 64)])
    codes, steps, rounded = eight_bits(weight)
    assert codes.dtype == torch.int8
    assert ((rounded - weight).abs() <= steps[:, None] / 2 + 1e-6).all()


@needs_int4
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_the_output_layer_has_eight_bits(rows: int) -> None:
    llm, x = LLM(64).bfloat16(), torch.randn(rows, 64).bfloat16()
    weight, exact = eight_bits(llm.head.weight)[2], llm.head.weight
    with torch.inference_mode():
        pack(llm, 1 << 20, int4=True)
        found = llm.head(x).double()
    near, far = ((found - x.double() @ w.double().T).abs().max() for w in (weight, exact))
    assert near < far / 2


@needs_int4
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_widths_that_the_products_cannot_take_stay_in_bfloat16(rows: int) -> None:
    """PyTorch's 8-bit product dies of 70 inputs."""
    model, x = nn.Sequential(LLM(64), nn.Linear(70, 64, bias=False)).bfloat16(), torch.randn(rows, 70).bfloat16()
    odd = LLM(70).bfloat16()
    with torch.inference_mode():
        plain = model[1](x), odd.head(x)
        pack(model, 1 << 20, int4=True)
        with pytest.raises(ValueError, match="inputs by 32"):
            pack(odd, 1 << 20, int4=True)
        for found, expected in zip((model[1](x), odd.head(x)), plain, strict=True):
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@needs_int4
def test_packing_again_is_packing_anew_and_all_copies_count() -> None:
    model = Heads(bias=False).bfloat16()
    size = sum(layer.weight.nbytes for layer in model.children())
    assert pack(model, size) == size
    assert pack(model, 2 * size, int4=True) == size * 21 // 16
    assert model.q_proj.forward.product.few is not None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="are allowed"):
        pack(model, size, int4=True)


def test_four_bits_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"this one is in torch.float32: set llm.dtype=bfloat16"):
        pack(layers(torch.float32), 1 << 20, int4=True)


def test_four_bits_are_refused_by_a_processor_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match="PyTorch finds AVX2"):
        pack(layers(torch.bfloat16), 1 << 20, int4=True)


@torch.inference_mode()
def test_an_input_that_changed_in_place_is_read_again() -> None:
    model, x = Heads(bias=False), torch.randn(5, 96)
    pack(model, 1 << 20)
    model.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(model.q_proj(x), F.linear(x, model.q_proj.weight))


def test_a_layer_alone_or_shared_is_packed_once() -> None:
    layer = nn.Linear(32, 32)
    assert pack(layer, 1 << 20) == layer.weight.nbytes
    assert pack(nn.ModuleList([nn.Sequential(layer), nn.Sequential(layer)]), 1 << 20) == layer.weight.nbytes
