"""Speech that is settled while it comes in: how it is cut makes no difference, and what is settled stays."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import SPEECH, everything, is_idle, running, settled_answer, settling_model
from test_serve_voice import speak, spoken, text_of, ticket
from torch import Tensor
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network
from websockets.sync.client import connect

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.data.media import decode_audio
from x2l.encoders import moonshine_torch
from x2l.encoders.conformer import Attention, ConvModule
from x2l.encoders.moonshine import HOP, pad
from x2l.encoders.moonshine_torch import TorchMoonshine
from x2l.modalities.hearing import STEP, Hearing, can_settle
from x2l.modalities.reader import Reader
from x2l.modalities.speech import FrozenListener, side_by_side
from x2l.modality import Modality
from x2l.past import Past
from x2l.serve import voice
from x2l.serve.answer import Decode, RequestError
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.job import Job
from x2l.serve.voice import VoiceTurn, wav
from x2l.types import Features, Media, Part, user

RATE = 16_000


@pytest.fixture(scope="module")
def model(llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return settling_model(llm_folder, tmp_path_factory.mktemp("speech"))


def sound(seconds: float, seed: int = 0) -> Tensor:
    """Noise that is loud and soft in turn."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal(int(seconds * RATE)) * (1.2 + np.sin(np.arange(int(seconds * RATE)) / 900))
    return torch.from_numpy(0.05 * samples.astype(np.float32))


def whole(model: Assistant, wave: Tensor) -> Tensor:
    inputs = model.collator.processors["speech"]([wave.numpy()])
    with torch.inference_mode():
        embeds: Tensor = model.model.modalities["speech"](Media(inputs=inputs)).x[0]
    return embeds


# --- what layers keep -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
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
            y, before = x[:, past.length : end], past.length
            for layer in layers:
                y = layer(y, y, causal=True, past=past)
            past.settle(data.draw(st.integers(before, end)))
            done = [*done[:before], *y[0]]
    torch.testing.assert_close(torch.stack(done), expected[0], rtol=1e-4, atol=1e-5)


def test_a_convolution_in_pieces_sees_what_was_before() -> None:
    torch.manual_seed(2)
    conv, x, past, reach = ConvModule(8, 5).eval(), torch.randn(1, 20, 8), Past(), 2
    every = torch.ones(1, 20, dtype=torch.bool)
    with torch.inference_mode():
        expected, done = conv(x, every), []
        for end in (4, 5, 11, 20):
            past.begin()
            y = conv(x[:, past.length : end], every[:, past.length : end], past)
            settled = max(past.length, end - reach)  # those to whose right all is known
            done += y[0, : settled - past.length]
            past.settle(settled)
    torch.testing.assert_close(torch.stack(done), expected[0, :18], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(y[0, -9:], expected[0, -9:], rtol=1e-4, atol=1e-6)


def test_a_past_may_forget_what_is_too_old() -> None:
    past, forgetful = Past(), Past(limit=6)
    for end, length in ((10, 7), (20, 20), (24, 22), (30, 30)):
        x = torch.arange(past.length, end)[None, :, None].float()
        for each in (past, forgetful):
            each.begin()
            joined = each.join(x)
            assert joined[0, -1] == end - 1
            each.settle(length)
        assert torch.equal(forgetful._kept[0], past._kept[0][:, -6:])
        assert forgetful.length == past.length == length


def test_the_encoder_is_transformers_own() -> None:
    """Batches with padding, and a recording that goes on after nothing."""
    torch.manual_seed(4)
    network = Network(MoonshineConfig()).eval()
    encoder = TorchMoonshine(network.state_dict()).eval()
    waves = [sound(1.0), sound(0.6, 1)]
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    with torch.inference_mode():
        frames = encoder(batch, lengths)
        for wave, x, length in zip(waves, frames.x, frames.lengths.tolist(), strict=True):
            expected = network(torch.from_numpy(pad(wave.numpy()))[None]).last_hidden_state[0]
            torch.testing.assert_close(x[:length], expected[:length], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(encoder.resume(wave, Past())[0], expected[:length], rtol=1e-3, atol=1e-4)


# --- a recording ------------------------------------------------------------------------------------------------------


class Whole(Past):
    """A `Past` for reads of all places: layers compute them all again, and what is settled is put over it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_settled = 0

    def join(self, x: Tensor) -> Tensor:
        if self._kept:
            x = torch.cat([self._kept[len(self._joined)], x[..., self.num_settled :, :]], -2)
        self._joined.append(x)
        return x

    def settle(self, length: int) -> None:
        if length > self.num_settled:
            self._kept, self.num_settled = [joined[..., :length, :] for joined in self._joined], length
        self._joined = []


@torch.inference_mode()
def slow_twin(modality: Any, wave: Tensor, lookahead: float) -> tuple[list[Tensor], Tensor]:
    """`Hearing.read`, each time from the first sample on: CIF over all frames, no positions that start in the middle."""
    listener, reader, adapter = modality.interface
    frames, context, pasts = Whole(), Whole(), [Whole() for _ in range(2 + reader.again)]
    kept, settled, num_settled = torch.zeros(1, 0, listener.cif.width), list[Tensor](), 0
    rest = torch.zeros(0, adapter.linear.out_features)
    for end in [*range(STEP, len(wave) + 1, STEP), len(wave)]:
        encoded = modality.encoder.resume(wave[:end], frames)
        _, x, _ = listener.frames(Features(encoded, torch.tensor([encoded.shape[1]])), context)
        x = torch.cat([kept, x[:, kept.shape[1] :]], 1)
        fired = listener.cif(Features(x, torch.tensor([x.shape[1]])))
        tokens, _ = side_by_side(Features(fired.x, fired.lengths), listener.parts)
        embeds = adapter(reader(Features(tokens, torch.tensor([tokens.shape[1]])), pasts)).x[0]
        num_frames = max(0, end - round(lookahead * RATE)) // (HOP * listener.stride)
        if end % STEP:
            num_frames = kept.shape[1]
        kept = x[:, :num_frames].clone()
        sure = num_frames - listener.cif.reach  # frames whose weight hangs on settled ones alone
        num_tokens = max(num_settled, int(fired.edges[0, max(0, sure)]) // listener.parts) if end % STEP == 0 else num_settled
        frames.settle(num_frames * listener.stride)
        context.settle(num_frames)
        for past, length in zip(pasts, [num_tokens * listener.parts, *[num_tokens] * (1 + reader.again)], strict=True):
            past.settle(length)
        if num_tokens > num_settled:
            settled.append(embeds[num_settled:num_tokens].clone())
        num_settled, rest = num_tokens, embeds[num_tokens:]
    return settled, rest


class Spoken:
    """In place of `Words`: what a token sounds like is a function of its state."""

    def __init__(self, width: int) -> None:
        self.table = torch.randn(width, width, generator=torch.Generator().manual_seed(0))

    def spoken(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table)


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
        (1, 1, 0, 3, 0.1, 2.9, 0.5),
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
    words: Any = Spoken(16) if again else None
    reader = Reader(16 * parts, parts, words, 32, 2, 2, again)
    for name, parameter in [*listener.named_parameters(), *reader.named_parameters()]:
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=(0.5 if "cif.fc" in name or "cif.conv" in name else 1.0) / parameter.shape[-1] ** 0.5
            )
    torch.nn.init.normal_(reader.start)
    modality = Modality(encoder, [listener, reader, Straight(16)]).eval()
    wave = sound(seconds, seed=parts)
    settled, rest = Hearing(modality, lookahead).read(wave)
    slowly_settled, slow_rest = slow_twin(modality, wave, lookahead)
    assert [len(embeds) for embeds in settled] == [len(embeds) for embeds in slowly_settled]
    assert bool(settled) == (lookahead < seconds)
    for one, other in zip([*settled, rest], [*slowly_settled, slow_rest], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.3, 3.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_with_nothing_settled_it_is_what_the_file_gives(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, seconds: float, rounded: bool
) -> None:
    """But for what the encoder rounds where the processor multiplies in bfloat16."""
    modality: Any = model.model.modalities["speech"]
    monkeypatch.setattr(moonshine_torch, "bf16_in_hardware", lambda: rounded)
    vars(modality.encoder).pop("_quick", None)
    wave = sound(seconds)
    settled, rest = Hearing(modality, lookahead=100).read(wave)
    assert ("_quick" in vars(modality.encoder)) == rounded
    vars(modality.encoder).pop("_quick", None)
    assert settled == []
    assert rest.dtype == torch.float32
    assert len(rest) < 3 or rest.std(0).min() > 1e-3, "embeddings differ, so that a mix-up would show"
    expected = whole(model, wave)
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=0.03 if rounded else 1e-5)
    assert torch.equal(rest, expected) or rounded == ((rest - expected).abs().max() > 1e-4)


def test_what_is_settled_stays_whatever_comes_and_however(model: Assistant) -> None:
    modality: Any = model.model.modalities["speech"]
    wave, other = sound(4.3, seed=3), sound(4.3, seed=4)
    at_once, rest = Hearing(modality, 0.5).read(wave)
    assert len(at_once) >= 4
    for size in (1_000, STEP, 50_000):
        hearing, before = Hearing(modality, 0.5), list[Tensor]()
        for end in [*range(size, len(wave), size), len(wave)]:
            settled, _ = hearing.read(wave[:end])
            assert all(map(torch.equal, before, settled[: len(before)]))
            before = settled
        again, piece_by_piece = hearing.read(wave)
        assert all(map(torch.equal, again, at_once))
        assert torch.equal(piece_by_piece, rest)
    hearing = Hearing(modality, 0.5)
    early, _ = hearing.read(wave[: 5 * STEP])
    other[: 5 * STEP] = wave[: 5 * STEP]
    late, _ = hearing.read(other)
    assert early
    assert all(map(torch.equal, early, late[: len(early)]))
    assert len(late) > len(early)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(late, at_once, strict=False))


@pytest.mark.parametrize("where", ["encoder", "cif", "adapter"])
def test_a_read_that_fails_changes_nothing(model: Assistant, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    modality: Any = model.model.modalities["speech"]
    wave = sound(3.3, seed=8)
    expected = everything(Hearing(modality, 0.5), wave)
    hearing = Hearing(modality, 0.5)
    hearing.read(wave[: 3 * STEP])
    with monkeypatch.context() as broken:
        owner, name = {
            "encoder": (modality.encoder, "resume"), "cif": (modality.interface[0].cif, "stream"),
            "adapter": (modality.interface[2], "forward"),
        }[where]  # fmt: skip
        broken.setattr(owner, name, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hearing.read(wave)
    torch.testing.assert_close(everything(hearing, wave), expected, rtol=0, atol=0)


def test_a_recording_longer_than_the_encoder_sees(model: Assistant) -> None:
    modality: Any = model.model.modalities["speech"]
    modality.encoder.max_seconds = 2.0
    try:
        hearing = Hearing(modality, 0.5)
        embeds = everything(hearing, sound(5.0, seed=9))
        assert hearing._frames.limit == int(2.0 * RATE / HOP)
        assert all(tensor.shape[-2] == hearing._frames.limit for tensor in hearing._frames._kept)
    finally:
        modality.encoder.max_seconds = 20.0
    assert torch.isfinite(embeds).all()
    assert len(embeds) > 10


def test_a_recording_cannot_become_shorter(model: Assistant) -> None:
    hearing = Hearing(model.model.modalities["speech"], 0.5)  # type: ignore[arg-type]
    hearing.read(sound(2.0))
    with pytest.raises(ValueError, match=f"{STEP} samples, of which {4 * STEP}"):
        hearing.read(sound(0.5))


def test_the_encoders_rotations_are_not_rounded(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 their frequencies would be off by 0.4 %, and frames at 20 s by a third of a radian."""
    encoder: Any = model.model.modalities["speech"].encoder
    monkeypatch.setattr(moonshine_torch, "bf16_in_hardware", lambda: True)
    vars(encoder).pop("_quick", None)
    assert encoder._quick.network.conv2.weight.dtype == torch.bfloat16
    assert torch.equal(encoder._quick.network.rotary_emb.inv_freq, encoder._network.network.rotary_emb.inv_freq)


def test_which_interfaces_can_settle(model: Assistant, llm_folder: Path) -> None:
    assert can_settle(model.model.modalities["speech"])  # type: ignore[arg-type]
    with running(model) as up:
        assert up.http.get("/v1/models").json()["data"][0]["lookahead"] is True
    other = build(ModelConfig.model_validate(tiny_model(llm_folder, speech=SPEECH)))
    assert not can_settle(other.model.modalities["speech"])  # type: ignore[arg-type]


# --- a spoken turn ----------------------------------------------------------------------------------------------------


def test_a_spoken_turn_that_settles(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, however the sound comes; the LLM knows what is settled before the end."""
    monkeypatch.setattr(voice, "WORTHWHILE", 8)
    pcm = spoken(6.6, seed=8)
    expected = settled_answer(model, wav(pcm), 1.0, 12)
    with running(model) as up:
        for size in (3_200, 60_000):
            up.engine.prefixes.clear()
            with connect(ticket(up, lookahead=1.0)) as socket:
                frames = speak(socket, pcm, size)
            assert frames[0] == {"type": "end", "samples": len(pcm) // 2}
            assert text_of(frames) == expected
        slow = ticket(up, lookahead=0.5)
        up.engine.prefixes.clear()
        with connect(slow) as socket:
            for at in range(0, len(pcm), 16_000):
                socket.send(pcm[at : at + 16_000])
                requests = up.engine.stats.requests
                for _ in range(200):
                    if up.engine.stats.requests > requests and up.engine.load[0] == 0:
                        break
                    time.sleep(0.01)
            frames = speak(socket, b"")
        assert text_of(frames) == settled_answer(model, wav(pcm), 0.5, 12)
        details = frames[-1]["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] > details["audio_tokens"] // 2, "the LLM has read what is settled already"


class Turn:
    """A spoken turn on an engine of its own, and what its encoder was given; ``before`` is called ahead of each read."""

    def __init__(self, model: Assistant, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] = lambda samples: None):
        self.engine, self.reads, self.workers = Engine(model), list[int](), ThreadPoolExecutor(2)
        encoder: Any = model.model.modalities["speech"].encoder
        resume = encoder.resume

        def counting(wave: Tensor, past: Past) -> Tensor:
            before(len(wave))
            self.reads.append(len(wave))
            frames: Tensor = resume(wave, past)
            return frames

        monkeypatch.setattr(encoder, "resume", counting)

    def run(self, scene: Callable[[VoiceTurn], Coroutine[Any, Any, Any]]) -> Any:
        async def played() -> Any:
            turn = VoiceTurn(self.engine, [VOICE], 0, Decode(12), "", self.workers, lookahead=0.5)
            await turn.begin()
            while self.engine.load[1]:
                await asyncio.sleep(0.01)
            return await scene(turn)

        try:
            return asyncio.run(asyncio.wait_for(played(), 60))
        finally:
            self.engine.close()


VOICE = user(Part("speech", bytes=b""))


async def said(turn: VoiceTurn) -> str:
    return "".join([piece async for piece in await turn.answer()])


async def settled(turn: VoiceTurn) -> None:
    while turn._settling is not None and not turn._settling.done():
        await asyncio.sleep(0.01)


def test_a_turn_opens_the_interface_before_anything_is_said(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on with what came meanwhile, though no more comes."""
    speech: Any = model.model.modalities["speech"]
    vars(speech.encoder).pop("_quick", None)

    async def scene(turn: VoiceTurn) -> None:
        turn.open()
        turn.hear(spoken(1.2, seed=1))
        await settled(turn)

    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(moonshine_torch, "bf16_in_hardware", lambda: True)
    turns.run(scene)
    assert turns.reads == [STEP, STEP, 2 * STEP]
    assert "_quick" in vars(speech.encoder)


def test_the_first_turn_of_a_kind_opens_the_interface(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[type] = []
    monkeypatch.setattr(VoiceTurn, "open", lambda turn: opened.append(type(turn._ear)))
    with running(model) as up:
        for lookahead in (None, 1.0, None, 2.0):
            ticket(up, lookahead=lookahead)
    assert opened == [voice.Ear, voice.EarlyEar]


def test_what_is_settled_is_not_computed_twice(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a person speaks each step is read once; the end reads the rest alone."""
    turns, pcm = Turn(model, monkeypatch), spoken(2.2, seed=11)

    async def scene(turn: VoiceTurn) -> str:
        for at in range(0, len(pcm), 8_000):
            turn.hear(pcm[at : at + 8_000])
            await settled(turn)
        return await said(turn)

    assert turns.run(scene)
    assert turns.reads == [*range(STEP, 4 * STEP + 1, STEP), int(2.2 * RATE)]


def test_a_busy_server_settles_and_the_llm_waits(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(VoiceTurn, "_has_room", lambda self: False)
    monkeypatch.setattr(voice, "WORTHWHILE", 1)

    async def scene(turn: VoiceTurn) -> int:
        requests = turns.engine.stats.requests
        turn.hear(spoken(2.2, seed=11))
        await settled(turn)
        assert turns.engine.stats.requests == requests
        reads = len(turns.reads)
        await said(turn)
        return reads

    assert turns.run(scene) == 4
    assert len(turns.reads) == 5


def test_a_turn_that_is_left_stops_after_the_step_in_work(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the person speaks, and when the end has come and all is still to be read."""
    for ended in (False, True):
        reading = threading.Event()
        turns = Turn(model, monkeypatch, lambda _, reading=reading: (reading.set(), time.sleep(0.1)))  # type: ignore[misc]

        async def scene(turn: VoiceTurn, ended: bool = ended, reading: threading.Event = reading) -> None:
            for seed in range(4):
                turn.hear(spoken(5.0, seed=seed))
            answer = asyncio.ensure_future(said(turn)) if ended else None
            while not reading.is_set():
                await asyncio.sleep(0.01)
            if answer is not None:
                answer.cancel()
            turn.close()
            await asyncio.sleep(1.0)

        turns.run(scene)
        assert len(turns.reads) <= 2
        assert is_idle(turns.engine)


async def taken_in_late(turns: Turn, turn: VoiceTurn, pcm: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, threading.Event]:
    """What the LLM is to take in of ``pcm``: it waits behind another prompt until the event is set."""
    go_on, lay_out = threading.Event(), Job.lay_out

    def waiting(job: Job, *args: Any) -> None:
        assert go_on.wait(60)
        lay_out(job, *args)

    monkeypatch.setattr(Job, "lay_out", waiting)
    turns.engine.submit([user("Hi")], Decode(max_new_tokens=1))
    while turns.engine._waiting:
        await asyncio.sleep(0.01)
    turn.hear(pcm)
    while not turns.engine._waiting:
        await asyncio.sleep(0.01)
    (job,) = turns.engine._waiting
    return job, go_on


def test_what_the_llm_was_given_in_advance_is_dropped_with_the_turn(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(voice, "WORTHWHILE", 1)

    async def scene(turn: VoiceTurn) -> None:
        job, go_on = await taken_in_late(turns, turn, spoken(3.0, seed=3), monkeypatch)
        turn.close()
        while not job.answer.cancelled:
            await asyncio.sleep(0.01)
        go_on.set()

    turns.run(scene)


def test_an_answer_in_advance_takes_the_place_of_what_the_llm_takes_in(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for one more alone; if the person goes on, the answer is that to all that was said."""
    turns = Turn(model, monkeypatch)
    monkeypatch.setattr(voice, "WORTHWHILE", 8)
    monkeypatch.setattr(turns.engine, "config", EngineConfig(max_batch=4))
    pcm = spoken(3.0, seed=3) + bytes(2 * RATE) + spoken(4.0, seed=5)

    async def scene(turn: VoiceTurn) -> str:
        job, go_on = await taken_in_late(turns, turn, pcm[: 6 * RATE], monkeypatch)
        turn.hear(pcm[6 * RATE : 7 * RATE])
        while len(turns.engine._waiting) < 2 or not job.answer.cancelled:
            await asyncio.sleep(0.01)
        assert turn.ahead
        turn.hear(pcm[7 * RATE :])
        assert not turn.ahead
        go_on.set()
        return await said(turn)

    answer = turns.run(scene)
    monkeypatch.undo()
    assert answer == settled_answer(model, wav(pcm), 0.5, 12)


def test_one_turn_takes_one_worker(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, one of which a step of one turn holds: another turn is read all the same."""
    held, go_on = threading.Event(), threading.Event()

    def before(samples: int) -> None:
        if samples == 3 * STEP:
            held.set()
            assert go_on.wait(60)

    turns, pcm = Turn(model, monkeypatch, before), spoken(0.4, seed=2)

    async def scene(turn: VoiceTurn) -> tuple[str, str]:
        turn.hear(spoken(1.6, seed=1))
        while not held.is_set():
            await asyncio.sleep(0.01)
        first = asyncio.ensure_future(said(turn))
        await asyncio.sleep(0.2)
        other = VoiceTurn(turns.engine, [VOICE], 0, Decode(12), "", turns.workers, lookahead=0.5)
        other.hear(pcm)
        second = await said(other)
        go_on.set()
        return await first, second

    answers = turns.run(scene)
    monkeypatch.undo()
    assert answers == tuple(settled_answer(model, wav(each), 0.5, 12) for each in (spoken(1.6, seed=1), pcm))


def test_a_step_that_fails_is_told_and_tried_again(
    model: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("out of memory"), None])

    def before(samples: int) -> None:
        if error := next(failures, None):
            raise error

    pcm, turns = spoken(2.2, seed=6), Turn(model, monkeypatch, before)

    async def scene(turn: VoiceTurn) -> str:
        turn.hear(pcm)
        await settled(turn)
        return await said(turn)

    answer = turns.run(scene)
    monkeypatch.undo()
    assert "not read in advance: RuntimeError('out of memory')" in caplog.text
    assert answer == settled_answer(model, wav(pcm), 0.5, 12)


def test_recordings_that_begin_alike_are_told_apart(model: Assistant) -> None:
    """Two ends, of as many embeddings each, after the same beginning: the states of one are not taken for the other's."""
    modality: Any = model.model.modalities["speech"]
    beginning = spoken(2.0, seed=1)

    def with_end(seed: int) -> tuple[bytes, int]:
        pcm = beginning + spoken(0.4, seed=seed)  # shorter than a step: nothing of it is settled
        return pcm, len(Hearing(modality, 0.5).read(torch.from_numpy(decode_audio(wav(pcm))))[1])

    def answer(pcm: bytes) -> str:
        return settled_answer(model, wav(pcm), 0.5, 12)

    first, num = with_end(2)
    alike = [pcm for pcm, other in map(with_end, range(3, 40)) if other == num]
    second = next(pcm for pcm in alike if answer(pcm) != answer(first))
    with running(model) as up:
        answers = []
        for pcm in (first, second):
            with connect(ticket(up, lookahead=0.5)) as socket:
                answers.append(text_of(speak(socket, pcm)))
    assert answers == [answer(first), answer(second)]


def test_what_the_interface_cannot_read_is_the_requests_error(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(samples: int) -> None:
        raise ValueError("too long")

    async def scene(turn: VoiceTurn) -> str:
        turn.hear(spoken(1.2, seed=6))
        return await said(turn)

    with pytest.raises(RequestError, match=r"cannot read this recording of 1\.2 s"):
        Turn(model, monkeypatch, before).run(scene)


def test_a_recording_in_pieces_is_one_recording_to_the_template(llm_folder: Path, tmp_path: Path) -> None:
    """The paper's prompt marks where one begins and ends; and no cache is needed."""
    paper = settling_model(llm_folder, tmp_path, template={"name": "paper"})
    pcm = spoken(2.7, seed=5)
    with running(paper, EngineConfig(embedding_bytes=0)) as up, connect(ticket(up, lookahead=0.5)) as socket:
        frames = speak(socket, pcm)
    assert text_of(frames) == settled_answer(paper, wav(pcm), 0.5, 12)
