"""splice against a slow twin, and the one rule of who sees whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from x2l.splice import parents, positions, splice, visibility
from x2l.types import IGNORE_INDEX, Features

WIDTH = 3


def slow_splice(ids: list[list[int]], media: dict[int, list[Tensor]], text: Tensor) -> list[list[Tensor]]:
    """Row by row, token by token."""
    queues = {sentinel: list(items) for sentinel, items in media.items()}
    return [
        [vector for col, i in enumerate(row) for vector in (queues[i].pop(0) if i < 0 else [text[r, col]])]
        for r, row in enumerate(ids)
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], dict[int, list[Tensor]]]:
    rows = draw(st.lists(st.lists(st.sampled_from([-2, -1, 5, 6]), min_size=1, max_size=6), min_size=1, max_size=4))
    media: dict[int, list[Tensor]] = {}
    for sentinel in (-1, -2):
        count = sum(i == sentinel for row in rows for i in row)
        media[sentinel] = [torch.randn(draw(st.integers(0, 4)), WIDTH) for _ in range(count)]
    return rows, {k: v for k, v in media.items() if v}


def tensors(rows: list[list[int]], media: dict[int, list[Tensor]]) -> tuple[Tensor, Tensor, Tensor, dict[int, Features]]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    reach = torch.tensor([[len(row)] * len(row) + [0] * (longest - len(row)) for row in rows])
    stacked = {
        k: Features(torch.nn.utils.rnn.pad_sequence(v, batch_first=True), torch.tensor([len(x) for x in v]))
        for k, v in media.items()
    }
    return ids, reach, torch.randn(*ids.shape, WIDTH), stacked


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_equal_to_the_slow_twin(case: tuple[list[list[int]], dict[int, list[Tensor]]], pad_left: bool) -> None:
    rows, media = case
    ids, reach, text, stacked = tensors(rows, media)
    labels = torch.where(ids > 5, ids, IGNORE_INDEX)
    out = splice(ids, labels, reach, text, stacked, pad_left)
    for r, expected in enumerate(slow_splice(rows, media, text)):
        real = out.reach[r] > 0
        assert int(real.sum()) == len(expected)
        assert not expected or bool(real[-1 if pad_left else 0])
        assert torch.equal(out.embeds[r][real], torch.stack(expected) if expected else out.embeds[r][:0])
        assert out.labels[r][real].tolist().count(6) == rows[r].count(6)
        assert not bool((out.labels[r][~real] != IGNORE_INDEX).any())
        assert not bool(out.embeds[r][~real].any())


def test_gradients_reach_text_and_media() -> None:
    ids, reach, text, media = tensors([[5, -1, 5]], {-1: [torch.randn(2, WIDTH)]})
    x = media[-1].x.clone().requires_grad_()
    splice(ids, ids, reach, text.requires_grad_(), {-1: Features(x, media[-1].lengths)}).embeds.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert text.grad[0, :, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("rows", "num_items"), [([[5, -1]], 2), ([[5, -1, -1]], 1)])
def test_a_wrong_number_of_items_is_refused_with_both_counts(rows: list[list[int]], num_items: int) -> None:
    ids, reach, text, media = tensors(rows, {-1: [torch.randn(2, WIDTH)] * num_items})
    with pytest.raises(ValueError, match=rf"{rows[0].count(-1)} sentinels -1 .* {num_items} media items"):
        splice(ids, ids, reach, text, media)


def test_a_sentinel_without_media_is_refused() -> None:
    ids, reach, text, _ = tensors([[5, -3]], {})
    with pytest.raises(ValueError, match=r"1 sentinels \[-3\] without media"):
        splice(ids, ids, reach, text, {})


def test_reach_is_packing_padding_and_prefix_sharing_in_one_rule() -> None:
    #      prefix  branch 1  branch 2 | another sample | padding
    reach = torch.tensor([[6, 6, 4, 4, 6, 6, 8, 8, 0]])
    seen = [[k for k in range(9) if visibility(reach)[0, q, k]] for q in range(9)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [8]]
    assert positions(visibility(reach)).tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 0]]
    assert parents(visibility(reach)).tolist() == [[0, 0, 1, 2, 1, 4, 6, 6, 8]]
