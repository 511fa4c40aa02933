"""The C-Former in the shape of stage 1's decoder."""

from __future__ import annotations

import pytest
import torch

from x2l.asr import CIFASR, Decoder
from x2l.modalities.reader import Reader, import_decoder
from x2l.modalities.soft_words import Words
from x2l.modalities.speech import Listener
from x2l.types import Features

SIZES = {"ffn_width": 16, "num_heads": 2, "num_blocks": 3}


def started() -> tuple[Decoder, Reader]:
    torch.manual_seed(0)
    decoder, reader = Decoder(7, 16, parts=2, **SIZES).eval(), Reader(32, 2, None, **SIZES).eval()  # type: ignore[arg-type]
    assert import_decoder(decoder.state_dict(), reader) == []
    return decoder, reader


@torch.no_grad()
def test_of_one_token_it_says_what_the_decoder_says() -> None:
    decoder, reader = started()
    heard = Features(torch.randn(3, 1, 32), torch.tensor([1, 1, 1]))
    logits = reader(heard).x @ decoder.embedding.weight[: decoder.bos].T
    torch.testing.assert_close(logits, decoder(torch.zeros(3, 0, dtype=torch.long), heard))


@torch.no_grad()
def test_it_does_not_depend_on_the_batch_and_an_empty_utterance_is_empty() -> None:
    _, reader = started()
    x, lengths = torch.randn(4, 5, 32), torch.tensor([5, 2, 0, 3])
    together = reader(Features(x, lengths))
    assert together.lengths.tolist() == lengths.tolist()
    for i, n in enumerate(lengths.tolist()):
        assert not together.x[i, n:].any()
        alone = reader(Features(x[i : i + 1, :n], lengths[i : i + 1]))
        torch.testing.assert_close(together.x[i, :n], alone.x[0])


@torch.no_grad()
def test_every_place_sees_the_whole_utterance() -> None:
    _, reader = started()
    x = torch.randn(1, 4, 32)
    other = x.clone()
    other[0, 3] += 1
    lengths = torch.tensor([4])
    assert (reader(Features(x, lengths)).x[0, 0] - reader(Features(other, lengths)).x[0, 0]).abs().max() > 1e-4


def test_another_decoder_is_refused() -> None:
    decoder = Decoder(7, 16, parts=2, **SIZES | {"num_blocks": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not a decoder of this reader's shape, see \['blocks.2"):
        import_decoder(decoder.state_dict(), Reader(32, 2, None, **SIZES))  # type: ignore[arg-type]


class Certain(Words):
    """The decoder's own words, of which the likeliest alone is believed."""

    def __init__(self, spoken: torch.Tensor) -> None:
        super().__init__("", temperature=1e-5)
        self._spoken = spoken

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, slice]:
        return (x @ self._spoken.T / self.temperature).softmax(-1), slice(None)


@torch.no_grad()
def test_read_often_enough_it_says_what_the_decoder_says_token_by_token() -> None:
    """Against the greedy search of stage 1, on utterances of different lengths."""
    decoder, _ = started()
    words = Certain(decoder.embedding.weight[: decoder.bos])
    heard = Features(3 * torch.randn(4, 6, 32), torch.tensor([6, 2, 0, 5]))
    listener = Listener(8, 16, parts=2, num_heads=2)
    greedy, _ = (
        CIFASR(torch.nn.Identity(), listener, decoder, torch.ones(7, 1, dtype=torch.long)).eval()._search(heard, 1, None, None)
    )
    often = Reader(32, 2, words, **SIZES, again=6).eval()  # type: ignore[arg-type]
    import_decoder(decoder.state_dict(), often)
    said = words.posterior(often(heard).x)[0].argmax(-1)
    for i, length in enumerate(heard.lengths.tolist()):
        assert said[i, :length].tolist() == greedy[i, :length].tolist()
    assert len({tuple(row.tolist()) for row in said[:, :2]}) > 1
