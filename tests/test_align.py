"""Times of tokens by cross-attention, and the guidance of CIF by them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from x2l.align import Aligner, monotone_ends
from x2l.asr import CIFASR, Decoder, Spoken
from x2l.interfaces.cif import CIFOutput
from x2l.modalities.reader import MOONSHINE_NAMES
from x2l.modalities.speech import Listener
from x2l.types import Features, Media

PIECES = [b"<unk>", b"<s>", b"</s>", b"a", "\u2581".encode(), "\u2581a".encode()]


def state(width: int = 32, num_blocks: int = 2) -> dict[str, torch.Tensor]:
    """A random Moonshine decoder under transformers' names, made of ours."""
    torch.manual_seed(0)
    found = {"model.decoder.embed_tokens.weight": torch.randn(len(PIECES), width), "model.decoder.norm.weight": torch.ones(width)}
    for name, value in Decoder(3, width, 24, 2, num_blocks=num_blocks).state_dict().items():
        if name.startswith("blocks."):
            for other, ours in MOONSHINE_NAMES.items():
                name = name.replace(f".{ours}.", f".{other}.")
            found[name.replace("blocks.", "model.decoder.layers.")] = value
    return found


@pytest.mark.parametrize(("num_pieces", "num_frames"), [(1, 1), (1, 5), (3, 3), (3, 8), (4, 7)])
def test_the_path_is_the_best_of_all_paths(num_pieces: int, num_frames: int) -> None:
    weight = np.random.default_rng(num_pieces * 10 + num_frames).standard_normal((num_pieces, num_frames)).astype(np.float32)

    def total(ends: tuple[int, ...]) -> float:
        return float(sum(weight[i, a:b].sum() for i, (a, b) in enumerate(itertools.pairwise((0, *ends)))))

    every = [(*cuts, num_frames) for cuts in itertools.combinations(range(1, num_frames), num_pieces - 1)]
    assert tuple(monotone_ends(weight)) == max(every, key=total)


def test_tokens_end_where_attention_moves_on() -> None:
    aligner = Aligner(state(), PIECES, ["a", " ", " a"], ffn_width=24, num_heads=2, num_blocks=2)
    ends = aligner.ends(torch.randn(11, 32), [2, 0, 1])
    assert ends.tolist() == sorted(set(ends.tolist()))
    assert ends[-1] == 11
    assert ends[0] >= 1
    with pytest.raises(ValueError, match="2 frames cannot hold a transcript of 3 Moonshine tokens"):
        aligner.ends(torch.randn(2, 32), [2, 0, 1])


def asr(**arguments: float) -> CIFASR:
    torch.manual_seed(0)
    listener = Listener(8, 16, ffn_width=16, num_heads=2, kernel=3, dropout=0.0)
    spelling = torch.arange(1, 8)[:, None]
    return CIFASR(torch.nn.Identity(), listener, Decoder(7, 16, 16, 2, 3, dropout=0.0), spelling, **arguments)  # type: ignore[arg-type]


def test_guidance_is_zero_where_each_tokens_frames_weigh_one() -> None:
    alpha = torch.tensor([[0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1.0], [1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]).double()
    edges = torch.nn.functional.pad(alpha.cumsum(1), (1, 0))
    fired = CIFOutput(torch.zeros(2, 3, 16), torch.tensor([3, 2]), edges, edges[:, -1].float(), edges)
    ends = torch.tensor([[4.0, 12.0, 14.0], [2.0, 6.0, 0.0]])  # the listener halves the frame rate
    valid = torch.tensor([[True, True, True], [True, True, False]])
    model = asr()
    assert model._guidance(fired, ends, valid) == pytest.approx(0.0)
    late = ends + torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # half a frame of weight 0.25 changes sides
    assert model._guidance(fired, late, valid) == pytest.approx(0.25)


def test_guidance_moves_the_fires_to_the_ends() -> None:
    model, features = asr(), Features(torch.randn(1, 24, 8), torch.tensor([24]))
    ends = torch.tensor([[4.0, 20.0, 24.0]])
    batch = Spoken(Media(features=features), torch.tensor([[1, 2, 3]]), torch.tensor([3]), ends / 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch).loss_sum.backward()
        optimizer.step()
    fired, _, _ = model.listener.listen(features, torch.tensor([3]))
    assert fired.fire_times[0].tolist() == pytest.approx([2.0, 10.0, 12.0], abs=0.7)


def test_masks_and_misread_tokens_are_for_training_alone() -> None:
    model = asr(masks=2, mask_frames=8, history_noise=0.5)
    batch = Spoken(
        Media(features=Features(torch.randn(1, 40, 8), torch.tensor([40]))), torch.tensor([[1, 2, 3]]), torch.tensor([3])
    )

    def losses() -> set[float]:
        return {model(batch).loss_sum.item() for _ in range(4)}

    assert len(losses()) == 4
    model.eval()
    assert len(losses()) == 1
