"""The Conformer encoder: rates, independence of padding, and its attention against a direct computation."""

from __future__ import annotations

import pytest
import torch

from x2l.encoders.conformer import Attention, ConformerEncoder, rotate, valid_frames


def small() -> ConformerEncoder:
    torch.manual_seed(0)
    sizes = {"num_mels": 8, "channels": 4, "width": 16, "ffn_width": 32, "num_heads": 2, "kernel": 5}
    return ConformerEncoder(**sizes, num_blocks=3, pool_after=(1, 2)).eval()


@pytest.mark.parametrize(("num_frames", "expected"), [(1, 1), (8, 1), (9, 2), (400, 50)])
def test_one_eighth_of_the_frames(num_frames: int, expected: int) -> None:
    features = small()(torch.randn(1, num_frames, 8), torch.tensor([num_frames]))
    assert features.x.shape == (1, expected, 16)
    assert features.lengths.tolist() == [expected]


def test_padding_changes_nothing_whatever_it_holds() -> None:
    encoder, lengths = small(), torch.tensor([37, 101, 5])
    mels = torch.randn(3, 101, 8)
    together = encoder(mels.masked_fill(~valid_frames(lengths, 101)[..., None], 1e4), lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = encoder(mels[i : i + 1, :length], lengths[i : i + 1])
        assert alone.lengths == together.lengths[i]
        torch.testing.assert_close(together.x[i, : alone.lengths], alone.x[0], atol=1e-5, rtol=1e-4)
        assert (together.x[i, alone.lengths :] == 0).all()


def test_paper_sizes() -> None:
    with torch.device("meta"):
        encoder = ConformerEncoder()
    assert len(encoder.blocks) == 18
    assert 100e6 < sum(p.numel() for p in encoder.parameters()) < 130e6


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8).expand(1, 1, 10, 8), torch.randn(8).expand(1, 1, 10, 8)
    scores = (rotate(q, 6) @ rotate(k, 6).mT)[0, 0]
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_attention_equals_its_definition() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, context_width=6)
    x, context, mask = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    q, k, v = attention.q_proj(x), attention.k_proj(context), attention.v_proj(context)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = (q[..., h] @ k[..., h].mT / 2).masked_fill(~mask[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(attention(x, context, mask), attention.o_proj(torch.cat(heads, -1)))


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"num_mels": 7}, {"pool_after": (4,)}, {"num_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    sizes = {"num_mels": 8, "channels": 4, "width": 16, "ffn_width": 8, "num_heads": 2, "kernel": 5, "num_blocks": 3}
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).strip("()")):
        ConformerEncoder(**({"pool_after": (1,)} | sizes | wrong))  # type: ignore[arg-type]
