"""Speech that is settled while it comes in: how it is cut makes no difference, and what is settled stays."""

from __future__ import annotations

import copy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from serving import SPEECH, everything, hearing, noise, running, settling_model
from test_growing import Words
from torch import Tensor
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.encoders.moonshine import HOP, RATE
from x2l.encoders.moonshine_torch import TorchMoonshine
from x2l.modalities import growing as growing_module
from x2l.modalities.growing import GrowingEncoder, Linear
from x2l.modalities.hearing import STEP, GrowingSpeech, Hearing, can_settle
from x2l.modalities.reader import Reader
from x2l.modalities.speech import FrozenListener, side_by_side
from x2l.modality import Modality
from x2l.past import Past
from x2l.types import Features, Media


@pytest.fixture(scope="module")
def model(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return settling_model(llm_folder, tmp_path_factory.mktemp("speech"))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: bfloat16 rounds products of other lengths differently."""
    monkeypatch.setattr(growing_module, "bf16_in_hardware", lambda: False)


def whole(model: Assistant, wave: Tensor) -> Tensor:
    inputs = model.collator.processors["speech"]([wave.numpy()])
    with torch.inference_mode():
        embeds: Tensor = model.model.modalities["speech"](Media(inputs=inputs)).x[0]
    return embeds


class Whole(Past):
    """A `Past` for reads of all places: layers compute them all again, and what is settled is put over it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_settled, self.kept, self.joined = 0, list[Tensor](), list[Tensor]()

    def begin(self) -> None:
        self.joined = []

    def join(self, x: Tensor) -> Tensor:
        if self.kept:
            x = torch.cat([self.kept[len(self.joined)], x[..., self.num_settled :, :]], -2)
        self.joined.append(x)
        return x

    def settle(self, length: int) -> None:
        if length > self.num_settled:
            self.kept, self.num_settled = [joined[..., :length, :].clone() for joined in self.joined], length
        self.begin()


@torch.inference_mode()
def slow_twin(speech: GrowingSpeech, wave: Tensor, lookahead: float) -> tuple[list[Tensor], Tensor]:
    """`Hearing.read`, each time from the first sample on: CIF over all frames, no positions that start in the middle."""
    (encoder, listener, cif, reader, adapter), parts, stride = speech.made, speech.num_parts, speech.stride
    frames, context, pieces, tokens = (Whole() for _ in range(4))
    kept, said, settled, num_settled = torch.zeros(1, 0, cif.width), torch.zeros(0, cif.width), list[Tensor](), 0
    rest = speech.nothing
    spoken = reader.spoken
    reader.spoken = lambda read: torch.cat([said[:num_settled], spoken(read)[num_settled:]])  # type: ignore[method-assign]
    for end in sorted({*range(STEP, len(wave) + 1, STEP), len(wave)}):
        x = listener(encoder(wave[:end], frames), context)[None]
        x = torch.cat([kept, x[:, kept.shape[1] :]], 1)
        fired = cif(Features(x, torch.tensor([x.shape[1]])))
        grouped, _ = side_by_side(Features(fired.x, fired.lengths), parts)
        tokens.begin()
        read = reader(grouped[0], pieces, tokens, said)
        embeds = adapter(Features(read[None], torch.tensor([len(read)]))).x[0]
        num_frames = max(0, end - round(lookahead * RATE)) // (HOP * stride)
        if end % STEP:
            num_frames = kept.shape[1]
        else:
            said = reader.spoken(read)
        kept = x[:, :num_frames].clone()
        sure = num_frames - cif.reach  # frames whose weight hangs on settled ones alone
        num_tokens = max(num_settled, int(fired.edges[0, max(0, sure)]) // parts) if end % STEP == 0 else num_settled
        frames.settle(num_frames * stride)
        context.settle(num_frames)
        pieces.settle(num_tokens * parts)
        tokens.settle(num_tokens)
        if num_tokens > num_settled:
            settled.append(embeds[num_settled:num_tokens].clone())
        num_settled, rest = num_tokens, embeds[num_tokens:]
    return settled, rest


class Straight(torch.nn.Module):
    """In place of `SoftWords`: what no posterior makes alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, 12)

    def forward(self, features: Features) -> Features:
        return Features(self.linear(features.x), features.lengths)


@pytest.mark.parametrize(
    ("parts", "stride", "again", "kernel", "rate", "seconds", "lookahead"),
    [
        (1, 1, 1, 3, 0.1, 2.9, 0.5),
        (2, 2, 2, 15, 0.2, 4.0, 0.5),
        (4, 2, 2, 15, 0.15, 3.7, 1.0),
        (1, 3, 1, 31, 0.3, 3.0, 0.37),
        (4, 1, 1, 5, 0.24, 2.0, 5.0),
        (1, 2, 2, 15, 0.9, 2.8, 0.8),
        (3, 5, 2, 3, 0.3, 4.2, 0.8),
    ],
)
def test_it_is_its_slow_twin(
    parts: int, stride: int, again: int, kernel: int, rate: float, seconds: float, lookahead: float
) -> None:
    torch.manual_seed(parts + 10 * stride)
    encoder = TorchMoonshine(Network(MoonshineConfig()).state_dict(), 1000.0)
    listener = FrozenListener(288, 16, stride, 2, 32, 2, kernel, parts=parts, rate=rate)
    reader = Reader(16 * parts, parts, Words(16), 32, 2, 2, again)  # type: ignore[arg-type]
    for name, parameter in [*listener.named_parameters(), *reader.named_parameters()]:
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=(0.5 if "cif.fc" in name or "cif.conv" in name else 1.0) / parameter.shape[-1] ** 0.5
            )
    torch.nn.init.normal_(reader.start)
    modality = Modality(encoder, [listener, reader, Straight(16)]).eval()
    wave = noise(seconds, seed=parts)
    settled, rest = hearing(modality, lookahead).read(wave)
    slowly_settled, slow_rest = slow_twin(GrowingSpeech(modality), wave, lookahead)
    assert [len(embeds) for embeds in settled] == [len(embeds) for embeds in slowly_settled]
    assert bool(settled) == (lookahead < seconds)
    for one, other in zip([*settled, rest], [*slowly_settled, slow_rest], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.5])
def test_of_a_moment_it_is_what_the_file_gives(model: Assistant, seconds: float) -> None:
    """Of the first two tokens, for which the passes are enough, where there are no words to begin with."""
    wave = noise(seconds)
    settled, rest = hearing(model.model.modalities["speech"], 100).read(wave)
    expected = whole(model, wave)
    assert settled == []
    assert seconds < 0.1 or len(rest) > 0
    assert rest.shape == expected.shape
    torch.testing.assert_close(rest[:2], expected[:2], rtol=1e-3, atol=1e-3)


def test_what_is_settled_stays_whatever_comes_and_however(model: Assistant) -> None:
    modality: Any = model.model.modalities["speech"]
    wave, other = noise(4.3, seed=3), noise(4.3, seed=4)
    at_once, rest = hearing(modality, 0.5).read(wave)
    assert len(at_once) >= 4
    for size in (1_000, STEP, 50_000):
        growing, before = hearing(modality, 0.5), list[Tensor]()
        for end in [*range(size, len(wave), size), len(wave)]:
            settled, _ = growing.read(wave[:end])
            assert all(map(torch.equal, before, settled[: len(before)]))
            before = settled
        again, piece_by_piece = growing.read(wave)
        assert all(map(torch.equal, again, at_once))
        assert torch.equal(piece_by_piece, rest)
    growing = hearing(modality, 0.5)
    early, _ = growing.read(wave[: 5 * STEP])
    other[: 5 * STEP] = wave[: 5 * STEP]
    late, _ = growing.read(other)
    assert early
    assert all(map(torch.equal, early, late[: len(early)]))
    assert len(late) > len(early)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(late, at_once, strict=False))


@pytest.mark.parametrize(
    ("owner", "name", "caller"),
    [
        ("encoder", "__call__", "_read"),
        ("cif", "stream", "_read"),
        ("torch", "cat", "_spoken"),
        ("adapter", "forward", "_call_impl"),
        ("cif", "stream", "_settle"),
        ("torch", "cat", "_settle"),
        ("tensor", "clone", "_settle"),
    ],
)
def test_a_step_that_fails_changes_nothing(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, caller: str
) -> None:
    """Wherever it fails."""
    modality: Any = model.model.modalities["speech"]
    wave = noise(3.3, seed=8)
    growing = hearing(modality, 0.5)
    expected = everything(hearing(modality, 0.5), wave)
    growing.read(wave[: 3 * STEP])
    parts = growing.speech.made
    where: Any = {"encoder": GrowingEncoder, "cif": parts.cif, "adapter": parts.adapter, "torch": torch, "tensor": Tensor}[owner]
    original = getattr(where, name)

    def failing(*given: Any, **more: Any) -> Any:
        return 1 / 0 if sys._getframe(1).f_code.co_name == caller else original(*given, **more)

    with monkeypatch.context() as broken:
        broken.setattr(where, name, failing)
        with pytest.raises(ZeroDivisionError):
            growing.read(wave)
    torch.testing.assert_close(everything(growing, wave), expected, rtol=0, atol=0)


def test_the_parts_are_made_once(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two threads that come together, where the other weights are."""
    made, moved, init, move = list[Any](), list[Any](), GrowingEncoder.__init__, Network.to

    def slow(encoder: GrowingEncoder, network: Any) -> None:
        made.append(encoder)
        time.sleep(0.2)
        init(encoder, network)

    monkeypatch.setattr(GrowingEncoder, "__init__", slow)
    monkeypatch.setattr(Network, "to", lambda network, device: moved.append(device) or move(network, device))  # type: ignore[func-returns-value]
    modality: Any = model.model.modalities["speech"]
    speech = GrowingSpeech(modality)
    with ThreadPoolExecutor(2) as workers:
        one, other = workers.map(lambda _: speech.made, range(2))
    assert one is other
    assert len(made) == 1
    assert moved == [modality.interface[2].linear.weight.device]


def test_the_encoder_may_move_and_all_may_learn(model: Assistant) -> None:
    """What was made of them when they first heard something is apart from them."""
    encoder: Any = TorchMoonshine(Network(MoonshineConfig()).state_dict(), 20.0)
    modality: Any = model.model.modalities["speech"]
    listener, reader, adapter = copy.deepcopy(
        tuple(modality.interface), {id(modality.interface[1].words): modality.interface[1].words}
    )
    speech, wave = GrowingSpeech(Modality(encoder, [listener, reader, adapter]).eval()), noise(2.3)
    before = everything(Hearing(speech, 0.5), wave)
    for module in (encoder, listener, reader, adapter):
        for parameter in module.parameters():
            parameter.data += 1
    encoder.to("meta")
    assert torch.equal(everything(Hearing(speech, 0.5), wave), before)


def test_a_recording_longer_than_the_encoder_sees(model: Assistant) -> None:
    modality: Any = model.model.modalities["speech"]
    modality.encoder.max_seconds = 2.0
    try:
        growing = hearing(modality, 0.5)
        embeds = everything(growing, noise(5.0, seed=9))
        assert growing._frames.limit == int(2.0 * RATE / HOP)
        assert all(kept.shape[-2] == growing._frames.limit for kept in growing._frames._kept)
    finally:
        modality.encoder.max_seconds = 20.0
    assert torch.isfinite(embeds).all()
    assert len(embeds) > 10


def test_a_recording_cannot_become_shorter(model: Assistant) -> None:
    growing = hearing(model.model.modalities["speech"], 0.5)  # type: ignore[arg-type]
    growing.read(noise(2.0))
    with pytest.raises(ValueError, match=f"{STEP} samples, of which {4 * STEP}"):
        growing.read(noise(0.5))


def test_nothing_is_left_to_be_made_when_something_is_heard(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though silence says nothing: oneDNN has compiled products for the numbers of rows that recordings have."""
    modality: Any = model.model.modalities["speech"]
    rows, multiply = set[tuple[Any, ...]](), Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda of, x: rows.add((id(of), len(x))) or multiply(of, x))  # type: ignore[func-returns-value]
    speech = GrowingSpeech(modality)
    speech.open(3.0)
    known = set(rows)
    for seed, lookahead in enumerate((0.5, 1.5, 3.0)):
        Hearing(speech, lookahead).read(noise(4.6, seed))
    assert len(known) > 100
    assert rows == known


def test_which_interfaces_can_settle(model: Assistant, llm_folder: Path) -> None:
    assert can_settle(model.model.modalities["speech"])  # type: ignore[arg-type]
    with running(model) as up:
        assert up.http.get("/v1/models").json()["data"][0]["lookahead"] is True
    modality: Any = model.model.modalities["speech"]
    listener, reader, adapter = modality.interface
    once = Reader(32, 2, reader.words, 16, 2, 2, again=0)
    assert not can_settle(Modality(TorchMoonshine(Network(MoonshineConfig()).state_dict()), [listener, once, adapter]))
    other = build(ModelConfig.model_validate(tiny_model(llm_folder, speech=SPEECH)))
    assert not can_settle(other.model.modalities["speech"])  # type: ignore[arg-type]
