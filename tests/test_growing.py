"""Encoder, listener and C-Former on a recording that grows: the modules' own functions, in pieces as at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import noise
from torch import Tensor, nn
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network

from x2l.devices import bf16_in_hardware
from x2l.encoders.conformer import Attention, ConformerBlock, ConvModule
from x2l.encoders.moonshine import pad
from x2l.encoders.moonshine_torch import TorchMoonshine
from x2l.modalities import growing
from x2l.modalities.growing import GrowingConformerBlock, GrowingEncoder, GrowingListener, GrowingReader, Rotation, SelfAttention
from x2l.modalities.reader import Reader
from x2l.modalities.speech import Listener
from x2l.past import Past
from x2l.types import Features


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32."""
    monkeypatch.setattr(growing, "bf16_in_hardware", lambda: False)


class Words:
    """In place of `x2l.modalities.soft_words.Words`: what a token sounds like is a function of its state."""

    def __init__(self, width: int, seed: int = 0) -> None:
        self.table = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))

    def spoken(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table)


def loud(module: nn.Module) -> Any:
    """With weights that no layer's output is small beside its input."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, 0.5, 0.3)
    return module.eval().requires_grad_(False)


# --- in pieces --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.data())
def test_layers_that_look_back_alone_say_in_pieces_what_they_say_of_all(cuts: list[int], data: st.DataObject) -> None:
    """Attention to what came before, read piece by piece; of each piece some places are read again by the next one."""
    torch.manual_seed(1)
    layers, x = [Attention(16, 2) for _ in range(2)], torch.randn(1, sum(cuts), 16)
    with torch.inference_mode():
        expected, past, done = x, Past(), []
        for layer in layers:
            expected = layer(expected, expected, causal=True)
        for end in np.cumsum(cuts).tolist():
            past.begin()
            y, before = x[0, past.length : end], past.length
            rotation = Rotation(before, len(y), layers[0].num_rotary, y.device)
            mask = torch.full((len(y), end), -torch.inf).triu(before + 1)
            for layer in layers:
                y = SelfAttention(layer, 2)(y, len(y), rotation, past, mask)
            past.settle(data.draw(st.integers(before, end)))
            done = [*done[:before], *y]
    torch.testing.assert_close(torch.stack(done), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5, 15])
def test_a_convolution_in_pieces_sees_what_was_before(kernel: int) -> None:
    torch.manual_seed(2)
    block, x, past, reach = loud(ConformerBlock(8, 8, 2, kernel)), torch.randn(1, 40, 8), Past(), kernel // 2
    conv: ConvModule = block.conv
    expected, done = conv(x, torch.ones(1, 40, dtype=torch.bool))[0], []
    growing_block = GrowingConformerBlock(block)
    for end in (7, 9, 22, 40):
        past.begin()
        y = growing_block._convolve(torch.cat([x[0, past.length : end], torch.full((3, 8), 9.0)]), end - past.length, past)[:-3]
        settled = max(past.length, end - reach)  # those to whose right all is known
        begin = past.length
        done += y[: settled - begin]
        past.settle(settled)
    torch.testing.assert_close(torch.stack(done), expected[: 40 - reach], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, expected[begin:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [None, 6])
def test_a_past_joins_what_is_settled_to_what_comes(limit: int | None) -> None:
    """The last ones, as they were when they were settled, of each layer; a read that breaks off leaves nothing."""
    past, settled = Past(limit), list[float]()
    for read, (end, length) in enumerate(((10, 7), (12, 7), (20, 20), (24, 22), (90, 60), (61, 60), (99, 61))):
        for breaks_off in (True, False):
            x = torch.arange(past.length, end)[None, :, None] + (1000.0 * breaks_off + 0.01 * read)
            past.begin()
            for layer in range(1 if breaks_off else 2):
                expected = torch.tensor([*settled[-(limit or 1000) :], *x[0, :, 0].tolist()])[None, :, None]
                assert torch.equal(past.join((1 - 2 * layer) * x), (1 - 2 * layer) * expected)
        settled += x[0, : length - past.length, 0].tolist()
        past.settle(length)
        assert past.length == length


# --- at once ----------------------------------------------------------------------------------------------------------


def test_the_encoder_is_transformers_own() -> None:
    """Batches with padding, and a recording that grows from nothing."""
    torch.manual_seed(4)
    network = Network(MoonshineConfig()).eval()
    encoder = TorchMoonshine(network.state_dict()).eval()
    waves = [noise(1.0), noise(0.6, 1)]
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = nn.utils.rnn.pad_sequence(waves, batch_first=True)
    with torch.inference_mode():
        frames = encoder(batch, lengths)
        for wave, x, length in zip(waves, frames.x, frames.lengths.tolist(), strict=True):
            expected = network(torch.from_numpy(pad(wave.numpy()))[None]).last_hidden_state[0]
            torch.testing.assert_close(x[:length], expected[:length], rtol=1e-3, atol=1e-4)
            grown = GrowingEncoder(encoder.in_torch)(wave, Past())
            torch.testing.assert_close(grown, expected[:length], rtol=1e-3, atol=1e-4)


def test_the_encoders_first_norm_is_over_all_that_came() -> None:
    """What is settled counts, without being computed again, and so do the places after the last frame's own."""
    torch.manual_seed(4)
    norm, past = loud(nn.GroupNorm(1, 16)), Past()
    x = torch.randn(6 * 40 + 7, 16) * torch.linspace(0.1, 2, 247)[:, None] + 0.7
    for num_frames, settled in ((3, 1), (20, 20), (31, 25), (40, 40)):
        past.begin()
        end, begin = 6 * num_frames + 7, 6 * past.length
        expected = norm(x[:end].T[None])[0].T
        torch.testing.assert_close(growing._normed(x[begin:end], norm, past), expected[begin:], rtol=1e-5, atol=1e-5)
        past.settle(settled)


@pytest.mark.parametrize(("in_width", "stride", "blocks", "frames"), [(12, 2, 2, 41), (16, 3, 1, 50), (16, 1, 0, 7), (12, 4, 2, 1)])
def test_the_listener_is_the_modules(in_width: int, stride: int, blocks: int, frames: int) -> None:
    torch.manual_seed(5)
    listener: Listener = loud(Listener(in_width, 16, stride, blocks, 32, 2, 5))
    x = torch.randn(1, frames, in_width)
    _, expected, _ = listener.frames(Features(x, torch.tensor([frames])))
    torch.testing.assert_close(GrowingListener(listener)(x[0], Past()), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("parts", "num"), [(1, 7), (4, 5), (2, 20), (3, 1)])
def test_the_reader_says_what_the_module_says_token_by_token(parts: int, num: int) -> None:
    """Read from nothing and often enough, in one pass from the right words, and going on after settled tokens."""
    torch.manual_seed(6)
    module: Reader = loud(Reader(16 * parts, parts, Words(16), 32, 2, 2, again=num))  # type: ignore[arg-type]
    heard = torch.randn(num, 16 * parts)
    expected = module(Features(heard[None], torch.tensor([num]))).x[0]
    reader, pieces, tokens = GrowingReader(module), Past(), Past()
    first = reader(heard, pieces, tokens, heard.new_zeros(0, 16))
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
    said = reader.spoken(first)
    pieces.settle(parts * (num // 2))
    tokens.settle(num // 2)
    reader.spoken = None  # type: ignore[assignment, method-assign]  # it has all words: one pass
    for known in (said, said[: num - 1], torch.cat([said, said])):  # fewer tokens may be counted than before
        pieces.begin()
        tokens.begin()
        again = reader(heard[num // 2 :], pieces, tokens, known)
        torch.testing.assert_close(again, expected[num // 2 :], rtol=1e-3, atol=1e-4)


def test_a_pass_more_for_each_word_that_is_missing() -> None:
    """As long as there are passes: a token read with a wrong word before it is wrong."""
    torch.manual_seed(7)
    module: Reader = loud(Reader(16, 1, Words(16), 32, 2, 2, again=2))  # type: ignore[arg-type]
    heard = torch.randn(6, 16)
    truth = loud(Reader(16, 1, Words(16), 32, 2, 2, again=9))  # type: ignore[arg-type]
    truth.load_state_dict(module.state_dict())
    expected = truth(Features(heard[None], torch.tensor([6]))).x[0]
    reader, passes = GrowingReader(module), list[int]()
    first = reader(heard, Past(), Past(), heard.new_zeros(0, 16))
    torch.testing.assert_close(first[:3], expected[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module(Features(heard[None], torch.tensor([6]))).x[0, :2], expected[:2], rtol=1e-3, atol=1e-4)
    said = reader.spoken(expected)
    spoken = reader.spoken
    reader.spoken = lambda read: passes.append(len(read)) or spoken(read)  # type: ignore[assignment, func-returns-value, method-assign]
    for known, more in ((6, 0), (5, 0), (4, 1), (3, 2), (1, 2)):
        passes.clear()
        read = reader(heard, Past(), Past(), said[:known])
        assert len(passes) == more
        right = min(6, known + 1 + more)
        torch.testing.assert_close(read[:right], expected[:right], rtol=1e-3, atol=1e-4)
        assert right == 6 or (read[right:] - expected[right:]).abs().max() > 0.01


def test_no_tokens_are_no_tokens() -> None:
    reader = GrowingReader(loud(Reader(32, 2, Words(16), 32, 2, 1)))  # type: ignore[arg-type]
    assert reader(torch.zeros(0, 32), Past(), Past(), torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.skipif(not bf16_in_hardware(), reason="the processor does not multiply in bfloat16")
def test_what_bfloat16_rounds_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    network, wave = Network(MoonshineConfig()).eval().requires_grad_(False), noise(1.0)
    listener: Listener = loud(Listener(12, 16, 2, 2, 32, 2, 5))
    reader: Reader = loud(Reader(32, 2, Words(16), 32, 2, 2))  # type: ignore[arg-type]
    frames, heard, said = torch.randn(50, 12), torch.randn(6, 32), torch.randn(6, 16)

    def read() -> list[Tensor]:
        return [
            GrowingEncoder(network)(wave, of_encoder),
            GrowingListener(listener)(frames, of_listener),
            GrowingReader(reader)(heard, Past(), Past(), said),
        ]

    of_encoder, of_listener = Past(), Past()
    exact = read()
    of_encoder, of_listener = Past(), Past()
    monkeypatch.setattr(growing, "bf16_in_hardware", lambda: True)
    rounded = read()
    assert [of_encoder._joined[1].dtype, of_listener._joined[0].dtype] == [torch.bfloat16, torch.float32]
    for one, other in zip(rounded, exact, strict=True):
        off = ((one - other).norm(dim=-1) / other.norm(dim=-1)).mean()
        assert 1e-4 < off < 0.03
