"""Soft words: the S-Adapter that starts as a mean of the LLM's own words."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from x2l.build import initialise
from x2l.modalities.soft_words import NEGLIGIBLE, SoftWords, Words
from x2l.modalities.speech import interface
from x2l.types import Features
from x2l.vocabulary import Vocabulary

LETTERS = "[ a-z']"
LISTENER = {"width": 16, "num_heads": 2, "kernel": 3, "parts": 2}
READER = {"ffn_width": 16, "num_heads": 2, "num_blocks": 1}


@pytest.fixture
def started(tmp_path: Path) -> tuple[SoftWords, torch.Tensor, torch.Tensor, list[int]]:
    """An adapter before training, the decoder's and the LLM's tables, and the tokens in question."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    ids = Vocabulary.of(tokenizer, LETTERS).token_ids
    spoken, table = torch.randn(len(ids) + 1, 8), torch.randn(len(tokenizer), 12)
    save_file({"embedding.weight": spoken}, tmp_path / "decoder.safetensors")
    soft = SoftWords(8, 12, Words(LETTERS, str(tmp_path / "decoder.safetensors")))
    soft.connect(lambda: table, tokenizer)
    return soft, spoken, table, ids


@torch.no_grad()
def test_a_token_heard_for_certain_is_the_word_of_the_llm(started: Any) -> None:
    soft, spoken, table, ids = started
    heard = Features(100 * spoken[None, [3, 7, 5]], torch.tensor([3]))
    x, lengths = soft(heard)
    assert lengths.tolist() == [3]
    torch.testing.assert_close(x[0], table[[ids[3], ids[7], ids[5]]])


@torch.no_grad()
def test_a_doubtful_one_is_the_mean_of_the_words_by_their_probability(started: Any) -> None:
    soft, spoken, table, ids = started
    x = torch.randn(1, 2, 8) / 10
    expected = [
        sum(p * table[i] for p, i in zip(((row @ spoken[:-1].T) / soft.words.temperature).exp().tolist(), ids, strict=True))
        / ((row @ spoken[:-1].T) / soft.words.temperature).exp().sum()
        for row in x[0]
    ]
    torch.testing.assert_close(soft(Features(x, torch.tensor([2]))).x[0], torch.stack(expected))


@torch.no_grad()
def test_words_of_no_weight_are_exactly_zero(started: Any) -> None:
    soft, spoken, table, ids = started
    x = spoken[None, [3]] * torch.linspace(0, 10, 200)[:, None]
    posterior, _ = soft.words.posterior(x)
    plain = (x @ spoken[:-1].T / soft.words.temperature).softmax(-1)
    assert ((plain > 0) & (plain < torch.finfo(torch.float32).tiny)).any()  # denormal numbers, which make products slow
    assert not ((posterior > 0) & (posterior < 1e-13)).any()
    torch.testing.assert_close(soft.words.written(x), plain @ table[ids])
    torch.testing.assert_close(soft.words.spoken(x), plain @ spoken[:-1])


def test_unlikely_words_are_left_out_and_gradients_are_those_of_all(started: Any) -> None:
    soft, spoken, table, ids = started
    x = torch.stack([spoken[[3, 7]], spoken[[5, 3]]]).requires_grad_()
    posterior, words = soft.words.posterior(x)
    assert {3, 5, 7} <= set(words.tolist())
    assert posterior.shape == (2, 2, len(words))
    assert len(words) < len(ids)
    plain = (x @ spoken[:-1].T / soft.words.temperature).softmax(-1) @ table[ids]
    found, expected = (torch.autograd.grad(mean.square().sum(), x)[0] for mean in (soft.words.written(x), plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@torch.no_grad()
def test_no_word_that_matters_is_left_out(scale: float, rounded: bool) -> None:
    """Where scores are computed in bfloat16 to find them, too: as many places as words are near the edge."""
    torch.manual_seed(0)
    words, table = Words(LETTERS), torch.randn(3000, 32)
    vars(words)["_spoken"] = table
    if not rounded:
        vars(words)["_rough"] = None
    elif words._rough is None:
        pytest.skip("the processor does not multiply in bfloat16")
    for x in scale * torch.randn(100, 1, 3, 32):
        scores = x[0].double() @ table.double().T
        needed = ((scores - scores.amax(-1, keepdim=True)).amax(0) > math.log(NEGLIGIBLE) + 1e-3).nonzero()[:, 0]
        assert torch.isin(needed, words._likely(x)).all()


@torch.no_grad()
def test_the_worst_rounding_leaves_no_word_out() -> None:
    """Every factor just above half a unit of bfloat16, so that all roundings add up, and a word barely likely enough."""
    up = 1 + 2**-8 + 2**-20
    x, row = torch.full((1, 1, 877), up), torch.full((877,), up * 2**-6)
    table = torch.stack([row, -row, torch.zeros(877)])
    words = Words(LETTERS)
    vars(words).update(_spoken=table, _rough=(partial(F.linear, weight=table.bfloat16()), row.norm()))
    assert words._likely(x).tolist() == [0, 1, 2]


@torch.no_grad()
def test_what_is_not_a_number_stays_so_and_spoils_no_other(started: Any) -> None:
    soft, spoken, *_ = started
    x = spoken[None, [3, 7]]
    expected = soft.words.written(x)
    broken = torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)
    found = soft.words.written(broken)
    assert found[0, 2].isnan().all()
    torch.testing.assert_close(found[:, :2], expected)


@torch.no_grad()
def test_nothing_said_is_no_words(started: Any) -> None:
    soft, *_ = started
    assert soft.words.written(torch.zeros(2, 0, 8)).shape == (2, 0, 12)


def test_it_owns_the_linear_layer_alone_and_gradients_pass_through_the_words(started: Any) -> None:
    soft, *_ = started
    assert sorted(soft.state_dict()) == ["linear.bias", "linear.weight"]
    x = torch.randn(1, 2, 8, requires_grad=True)
    soft(Features(x, torch.tensor([2]))).x.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_table_of_other_tokens_is_refused(started: Any) -> None:
    soft, *_ = started
    soft.words.vocabulary = "[ a-c]"
    with pytest.raises(ValueError, match=r"'\[ a-c\]' matches 4 tokens of this LLM and the C-Former is 8 wide"):
        soft(Features(torch.zeros(1, 1, 8), torch.tensor([1])))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"reader": READER}, "reader and words go together"),
        ({"words": {"vocabulary": LETTERS}}, "reader and words go together"),
        ({"reader": READER, "words": {"vocabulary": LETTERS}, "depth": 2}, "no use for depth"),
    ],
)
def test_half_an_interface_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        interface(8, 12, 0.1, LISTENER, **args)


def speech(llm_width: int, **sizes: Any) -> nn.Sequential:
    layers = interface(8, llm_width, 1.0, LISTENER, READER | sizes, {"vocabulary": LETTERS})
    for parameter in nn.Sequential(*layers).parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(*layers)


def test_an_interface_starts_before_another_llm(tmp_path: Path) -> None:
    """What hears is taken; what speaks to the LLM are its own words alone."""
    path = tmp_path / "speech.safetensors"
    trained, other = speech(12), nn.Sequential(*interface(8, 20, 1.0, LISTENER, READER, {"vocabulary": LETTERS}))
    save_file(trained.state_dict(), path)
    initialise(other, f"speech:{path}")
    for name, tensor in trained[:2].state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert {name: float(tensor.abs().max()) for name, tensor in other[2].state_dict().items()} == {
        "linear.weight": 0.0,
        "linear.bias": 0.0,
    }
    with pytest.raises(ValueError, match=r"FrozenListener and Reader of these sizes.*ffn_in"):
        initialise(speech(20, ffn_width=24), f"speech:{path}")
    with pytest.raises(ValueError, match="soft words"):
        initialise(nn.Sequential(*interface(8, 20, 1.0, LISTENER, width=8, depth=1, heads=2)), f"speech:{path}")
    with pytest.raises(ValueError, match="does not fit"):
        initialise(other, str(path))
