"""Packed products: the same numbers as the plain ones, within a bound, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from x2l.build import bf16_in_hardware
from x2l.serve.packed import Packed, pack, unpack


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
