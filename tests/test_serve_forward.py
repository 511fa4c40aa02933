"""Our forward pass against Hugging Face's own: prompts, prompts in pieces, rows of one token with and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llm
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from x2l.devices import bf16_in_hardware
from x2l.packed import eight_bits, four_bits
from x2l.serve.forward import Forward, GivenUp, Llama, Plain, Prompt, _attend_ungrouped, forward_of, linears
from x2l.serve.lanes import Caches, Lanes

needs_few_bits = pytest.mark.skipif(
    not bf16_in_hardware() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the processor has no AVX-512 with bfloat16",
)

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "rms_norm_eps": 1e-2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases and tied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama 3": {"model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 12},
    "llama of one layer, without groups": {"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 4},
    "llama of 64": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 112},
    "llama with yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama that grows": {"model_type": "llama", "rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    "qwen2": {"model_type": "qwen2", "hidden_act": "gelu"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | FAMILIES[family]), dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in llm.named_parameters():
            if "norm" in name or "bias" in name:  # else ones and zeros, which hide what is left out
                weight.add_(0.3 * torch.randn_like(weight))
    return llm.requires_grad_(False)


@torch.inference_mode()
def talk(llm: Any, forward: Forward, pieces: list[int]) -> list[torch.Tensor]:
    """Logits of a prompt that comes in pieces, of three prompts of different lengths, and of four tokens behind each of them."""
    table, caches = llm.get_input_embeddings(), Caches(llm)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (1, sum(pieces)), generator=generator)
    cache, found, at = caches.load([]), [], 0
    for size in pieces:
        found.append(forward(table(ids[:, at : at + size]), torch.arange(at, at + size)[None], cache))
        at += size
    lanes, kept = Lanes(forward, table, caches), {at: cache}
    for length in (5, 11):
        kept[length] = caches.load([])
        found.append(forward(table(ids[:, :length]), torch.arange(length)[None], kept[length]))
    for lengths in ([at], [5, 11]):
        lanes.join([kept[length] for length in lengths], lengths)
        found.append(lanes.step([int(i) for i in torch.randint(97, (len(lanes.lengths),), generator=generator)]))
    found += [lanes.step([3, 4, 5]) for _ in range(2)]
    lanes.keep([1])
    return [*found, lanes.step([6])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[20], [13, 7], [1, 1, 18]])
@pytest.mark.parametrize("packed_bytes", [0, 1 << 24])
def test_the_numbers_are_hugging_faces(family: str, pieces: list[int], packed_bytes: int) -> None:
    llm = make(family)
    ours = forward_of(llm, packed_bytes)
    assert type(ours) is Llama
    for found, expected in zip(talk(llm, ours, pieces), talk(llm, Plain(llm), pieces), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_prompts_side_by_side_are_those_alone(family: str) -> None:
    """Some from their beginning, some behind what is known of them; then each goes on from the states that it left."""
    llm = make(family)
    table, caches = llm.get_input_embeddings(), Caches(llm)
    theirs, ours = Plain(llm), forward_of(llm, 1 << 24)
    ids = [torch.randint(97, (1, length)) for length in (9, 1, 21, 6)]
    known = [0, 0, 17, 5]

    def prompts(begins: list[int], ends: list[int], kept: list[Any]) -> list[Prompt]:
        ranges = [torch.arange(*span)[None] for span in zip(begins, ends, strict=True)]
        return [Prompt(table(row[:, at[0]]), at, cache) for row, at, cache in zip(ids, ranges, kept, strict=True)]

    kept = [[caches.load([]) for _ in ids] for _ in range(2)]
    for forward, own in zip((theirs, ours), kept, strict=True):
        for prompt in prompts([0] * 4, known, own):
            if prompt.positions_BL.shape[1]:
                forward(*prompt)
    lengths = [row.shape[1] for row in ids]
    expected, found = (f.prompts(prompts(known, lengths, own)) for f, own in zip((theirs, ours), kept, strict=True))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    for own, other in zip(kept[1], kept[0], strict=True):
        assert own.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(own.layers[-1].keys, other.layers[-1].keys, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("make_forward", [Plain, forward_of])
@torch.inference_mode()
def test_prompts_are_given_up(make_forward: Any) -> None:
    llm = make("llama")
    ids, caches, asked = torch.arange(6)[None], Caches(llm), iter([False, True])
    prompts = [Prompt(llm.get_input_embeddings()(ids), ids, caches.load([])) for _ in range(2)]
    with pytest.raises(GivenUp):
        make_forward(llm).prompts(prompts, lambda: next(asked))
    with pytest.raises(GivenUp):
        make_forward(llm)(*prompts[0], over=lambda: True)


@torch.inference_mode()
def test_a_step_that_is_given_up_leaves_the_rows_as_they_were() -> None:
    llm = make("llama")
    table, caches, forward = llm.get_input_embeddings(), Caches(llm), forward_of(llm)
    found = []
    for layers in ([], [0], [2, 1]):  # after so many the next step is given up
        lanes = Lanes(forward, table, caches)
        kept = [caches.load([]) for _ in range(2)]
        for cache, length in zip(kept, (5, 11), strict=True):
            forward(table(torch.arange(length)[None]), torch.arange(length)[None], cache)
        lanes.join(kept, [5, 11])
        lanes.step([3, 4])
        for layer in layers:
            asked = iter([False] * layer + [True])
            with pytest.raises(GivenUp):
                lanes.step([96, 96], lambda asked=asked: next(asked))  # type: ignore[misc]
            assert all(layer.keys.shape[2] == layer.values.shape[2] == 12 for layer in lanes._cache.layers)
        found.append((lanes.step([5, 6]), lanes.step([7, 8]), *lanes.states(0)[0]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_they_are_as_near(family: str) -> None:
    """Against float64."""
    llm, pieces = make(family, torch.bfloat16), [13, 7]
    ours, theirs = talk(llm, forward_of(llm, 1 << 24), pieces), talk(llm, Plain(llm), pieces)
    exact = talk(llm.double(), Plain(llm), pieces)
    errors = [sum(float((a - b).square().mean()) for a, b in zip(found, exact, strict=True)) for found in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]


@needs_few_bits
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_those_of_the_rounded_weights(bits: int) -> None:
    llm, pieces = make("llama of 64", torch.bfloat16), [13, 7]
    found, unrounded = talk(llm, forward_of(llm, 1 << 24, bits), pieces), talk(llm, Plain(llm), pieces)
    *inner, output = linears(llm)
    for group, rounded in [*((group, {8: eight_bits, 4: four_bits}[bits]) for group in inner), (output, eight_bits)]:
        for layer in group:
            layer.weight.data = rounded(layer.weight)[2]
    near = talk(llm, Plain(llm), pieces)

    def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True)) ** 0.5

    assert difference(found, near) < (0.5 if bits == 4 else 0.9) * difference(found, unrounded)


@torch.inference_mode()
def test_one_row_in_bfloat16_is_hugging_faces_to_the_last_bit() -> None:
    llm = make("llama of 64", torch.bfloat16)
    table, caches = llm.get_input_embeddings(), Caches(llm)
    theirs, ours = caches.load([]), caches.load([])
    for at, size in ((0, 12), *((at, 1) for at in range(12, 20))):
        embeds, positions = table(torch.arange(at, at + size)[None]), torch.arange(at, at + size)[None]
        assert torch.equal(forward_of(llm)(embeds, positions, ours), Plain(llm)(embeds, positions, theirs))


@pytest.mark.parametrize("length", [1, 5])
def test_without_groups_attention_is_the_same(length: int) -> None:
    """What GPUs compute where there is a mask."""
    q, k, v = torch.randn(3, 6, length, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.ones(3, 1, length, 9, dtype=torch.bool)
    mask[1, :, :, :4] = False
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(_attend_ungrouped(q, k, v, mask), expected)


def test_other_llms_run_as_they_are() -> None:
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    forward = forward_of(llm, 1 << 24)
    assert type(forward) is Plain
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        cache = Caches(llm).load([])
        first = forward(llm.get_input_embeddings()(ids[:, :7]), ids[:, :7], cache)
        rest = forward(llm.get_input_embeddings()(ids[:, 7:]), ids[:, 7:], cache)
        logits = llm(input_ids=ids).logits[0, [6, 11]]
    torch.testing.assert_close(torch.cat([first, rest]), logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="this one is GPTNeoXForCausalLM, not one of LlamaForCausalLM"):
        forward_of(llm, 1 << 24, weight_bits=4)


def test_an_llm_that_somebody_has_changed_runs_as_it_is() -> None:
    class Adapted(nn.Linear):
        pass

    def adapt(llm: Any) -> None:
        llm.model.layers[1].mlp.up_proj = Adapted(32, 64, bias=False)

    def replace(llm: Any) -> None:
        llm.model.layers[1].input_layernorm = Adapted(32, 32)

    def hook(llm: Any) -> None:
        llm.model.layers[0].mlp.register_forward_hook(lambda *_: None)

    def patch(llm: Any) -> None:
        llm.model.layers[0].self_attn.q_proj.forward = lambda x: x

    assert type(forward_of(make_llm())) is Llama
    for change, where in (
        (adapt, "layers.1.mlp.up_proj is test_serve_forward.Adapted"),
        (replace, "layers.1.input_layernorm is"),
        (hook, "layers.0.mlp is hooked"),
        (patch, "layers.0.self_attn.q_proj is hooked or patched"),
    ):
        llm = make_llm()
        change(llm)
        assert type(forward_of(llm)) is Plain
        with pytest.raises(ValueError, match=f"4-bit weights are for LLMs like LLaMA .*{where}"):
            forward_of(llm, weight_bits=4)


def test_parameters_stay_what_they_are() -> None:
    llm = make_llm()
    before = {name: (value.data_ptr(), value.clone()) for name, value in llm.state_dict().items()}
    talk(llm, forward_of(llm, 1 << 24), [20])
    after = llm.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == place and torch.equal(after[name], value) for name, (place, value) in before.items())
