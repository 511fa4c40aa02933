"""The listener and the speech interface; Moonshine's windows, padding and tokens (its network: marked network)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l.encoders.moonshine import (
    HOP,
    RATE,
    RECEPTIVE,
    MoonshineEncoder,
    MoonshineProcessor,
    detokenize,
    pad,
    read_tokens,
    windows,
)
from x2l.interfaces.cif import CIFOutput
from x2l.modalities.speech import FrozenListener, Listener, grouped, interface
from x2l.types import Features

SIZES = {"width": 16, "num_blocks": 1, "ffn_width": 16, "num_heads": 2, "kernel": 3, "rate": 0.3}


def listener() -> Listener:
    torch.manual_seed(0)
    return Listener(8, **SIZES).eval()  # type: ignore[arg-type]


def batch(*num_frames: int) -> Features:
    torch.manual_seed(1)
    return Features(torch.randn(len(num_frames), max(num_frames), 8), torch.tensor(num_frames))


def test_embeddings_do_not_depend_on_the_batch() -> None:
    features = batch(50, 21, 1, 0)
    together = listener()(features)
    for i, n in enumerate(features.lengths.tolist()):
        alone = listener()(Features(features.x[i : i + 1, : max(n, 1)], features.lengths[i : i + 1]))
        assert alone.lengths == together.lengths[i]
        torch.testing.assert_close(together.x[i, : alone.lengths], alone.x[0, : alone.lengths], atol=1e-5, rtol=1e-4)


def test_an_untrained_listener_averages_the_frames_of_its_encoder() -> None:
    torch.manual_seed(0)
    identity = Listener(16, **SIZES).eval()  # type: ignore[arg-type]
    x = torch.randn(1, 41, 16)
    fired, _, lengths = identity.listen(Features(x, torch.tensor([41])), torch.tensor([1]))
    assert lengths.tolist() == [21]  # stride 2, the odd frame alone
    _, frames, _ = identity.frames(Features(x, torch.tensor([41])))
    torch.testing.assert_close(frames[0, :20], (x[0, 0:40:2] + x[0, 1:41:2]) / 2)
    torch.testing.assert_close(frames[0, 20], x[0, 40])
    assert fired.lengths.tolist() == [1]


def test_target_lengths_set_the_number_of_embeddings() -> None:
    fired, _, _ = listener().listen(batch(50, 21), torch.tensor([9, 4]))
    assert fired.lengths.tolist() == [9, 4]


def test_parts_of_a_token_stay_side_by_side() -> None:
    x = torch.arange(1.0, 8.0).view(1, 7, 1).expand(2, 7, 2)
    times = torch.arange(1.0, 8.0).expand(2, 7).double()
    x = x * torch.tensor([[[1.0]] * 7, [[1.0]] * 5 + [[0.0]] * 2])
    edges = torch.linspace(0, 1, 9).double() * torch.tensor([[7.2], [5.3]])
    fired = CIFOutput(x, torch.tensor([7, 5]), times, edges[:, -1].float(), edges)
    tokens = grouped(fired, 3)
    assert tokens.lengths.tolist() == [2, 2]  # a third alone makes no token, two of them do
    assert tokens.x[0].tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]
    assert tokens.x[1].tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 0, 0]]
    assert tokens.fire_times.tolist() == [[3, 6], [3, 5]]
    torch.testing.assert_close(tokens.quantity * 3, fired.quantity)
    torch.testing.assert_close(tokens.edges * 3, fired.edges)


def test_a_frozen_listener_stays_as_it_is() -> None:
    modules = torch.nn.Sequential(*interface(8, 24, 0.02, listener=SIZES, width=16, depth=1, heads=2))
    modules.train()
    frozen = modules[0]
    assert isinstance(frozen, FrozenListener)
    assert not any(module.training for module in frozen.modules())
    out = modules(batch(50, 21))
    assert out.x.shape[-1] == 24
    assert out.lengths.tolist() == frozen(batch(50, 21)).lengths.tolist()
    out.x.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in modules[2].parameters())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40 * RATE), st.integers(0, 9))
def test_windows_cover_the_wave_in_whole_frames(num_samples: int, seed: int) -> None:
    wave = np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)
    parts = list(windows(wave, 5.0))
    np.testing.assert_array_equal(np.concatenate(parts), wave)
    assert all(len(part) % HOP == 0 and 0 < len(part) <= 5 * RATE for part in parts[:-1])
    assert len(parts[-1]) <= 5 * RATE
    frames = [(len(pad(part)) - RECEPTIVE) / HOP + 1 for part in parts]
    assert sum(frames) == max(1, -(-num_samples // HOP))


def test_a_long_wave_is_cut_where_it_is_quiet() -> None:
    wave = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32)
    wave[int(4.2 * RATE) : int(4.5 * RATE)] = 0.0
    first, _ = windows(wave, 5.0)
    assert 4.2 < len(first) / RATE < 4.5


@pytest.mark.parametrize("wrong", [np.zeros((2, 100), np.float32), np.array([0.0, np.nan], np.float32)])
def test_what_is_no_waveform_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="waveform"):
        MoonshineProcessor()([wrong])


def test_tokens_are_read_by_length_and_joined(tmp_path: Path) -> None:
    tokens = [b"<s>", "\u2581caf\u00e9".encode(), b"\xe2\x82", b"\xac", b"x" * 300]
    blob = b"".join((bytes([len(t)]) if len(t) < 128 else bytes([len(t) % 128 + 128, len(t) // 128])) + t for t in tokens)
    (tmp_path / "tokenizer.bin").write_bytes(blob)
    assert read_tokens(tmp_path / "tokenizer.bin") == tokens
    assert detokenize(tokens, [0, 1, 2, 3]) == "caf\u00e9\u20ac"


@pytest.mark.network
def test_moonshine_alone_equals_in_a_batch_and_short_and_long_waves_behave() -> None:
    from x2l.encoders import moonshine

    encoder, processor = moonshine.build(threads=1)
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (RATE, RATE // 20, 45 * RATE + 7, 0)]
    together = encoder(**processor(waves))
    assert together.lengths.tolist() == [max(1, -(-len(wave) // HOP)) for wave in waves]
    for i, wave in enumerate(waves):
        torch.testing.assert_close(together.x[i, : together.lengths[i]], encoder(**processor([wave])).x[0])


def test_a_growing_recording_is_encoded_as_a_whole_one_and_its_complete_windows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = MoonshineEncoder(Path, "00" * 32, max_seconds=1.0), []

    def encode(window: np.ndarray) -> np.ndarray:
        seen.append(len(window))
        return np.tile(pad(window)[: -(-len(window) // HOP) * HOP].reshape(-1, HOP).sum(1)[:, None], 288)

    monkeypatch.setattr(encoder, "_encode", encode)
    wave = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)
    done: list[np.ndarray] = []
    for samples in range(1000, len(wave), 9_000):
        whole = encoder.encode(wave[:samples])
        complete = len(done)
        seen.clear()
        grown = encoder.grow(wave[:samples], done)
        assert len(seen) == len(done) - complete + 1
        assert np.array_equal(grown.x[0].numpy(), whole)
        assert grown.lengths.tolist() == [len(whole)]
    assert len(done) >= 4


@pytest.mark.network
def test_moonshine_transcribes() -> None:
    import soundfile

    from x2l.encoders import moonshine
    from x2l.weights import resolve

    wave, rate = soundfile.read(resolve(f"{moonshine.ASSETS.removesuffix('/tiny-en')}/beckett.wav"), dtype="float32")
    assert rate == RATE
    text = moonshine.build_transcriber(threads=1).transcribe(wave)
    assert text.lower().startswith("ever tried, ever failed")


@pytest.mark.network
def test_a_decoder_imported_from_moonshine_writes_what_moonshine_writes() -> None:
    import soundfile

    pytest.importorskip("onnx")
    from x2l.asr import Decoder, import_moonshine
    from x2l.encoders import moonshine
    from x2l.weights import resolve

    words = ["Ever", " tried", " ever", " failed", " cat", " the", " is"]
    decoder = Decoder(len(words), 288, 1152, 8, 6).eval()
    import_moonshine(*moonshine.decoder_weights(), words, decoder)
    wave, _ = soundfile.read(resolve(f"{moonshine.ASSETS.removesuffix('/tiny-en')}/beckett.wav"), dtype="float32")
    frames = moonshine.build(threads=1)[0](**MoonshineProcessor()([wave[: 3 * RATE]]))
    said = torch.tensor([[0, 1, 2, 3]])
    assert decoder(said[:, :-1], frames).argmax(-1).tolist()[0][1:] == [1, 2, 3]


def test_moonshine_is_opened_when_it_first_hears_something() -> None:
    asked = []

    def file() -> Path:
        asked.append(1)
        raise ValueError("the weights cannot be had")

    encoder = MoonshineEncoder(file, "ab" * 32)
    assert encoder.width == 288
    assert bytes(encoder.sha256.tolist()).hex() == "ab" * 32  # type: ignore[operator, union-attr]
    assert asked == []
    with pytest.raises(ValueError, match="cannot be had"):
        encoder(torch.zeros(1, 400), torch.tensor([400]))
    assert asked == [1]


def torch_moonshine() -> Any:
    from transformers import MoonshineConfig
    from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network

    from x2l.encoders.moonshine_torch import TorchMoonshine

    torch.manual_seed(0)
    return TorchMoonshine(Network(MoonshineConfig()).state_dict(), max_seconds=2.0).eval()


@torch.no_grad()
def test_moonshine_in_torch_is_transformers_own_and_does_not_depend_on_the_batch() -> None:
    encoder = torch_moonshine()
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (RATE, RATE // 20, 5 * RATE + 7, 0)]
    together = encoder(**MoonshineProcessor()(waves))
    assert together.lengths.tolist() == [max(1, -(-len(wave) // HOP)) for wave in waves]
    theirs = encoder.network(torch.from_numpy(pad(waves[0]))[None]).last_hidden_state[0]
    torch.testing.assert_close(together.x[0, : len(theirs)], theirs, atol=2e-5, rtol=1e-4)
    for i, wave in enumerate(waves):
        alone = torch.from_numpy(encoder.encode(wave))
        torch.testing.assert_close(together.x[i, : together.lengths[i]], alone, atol=2e-5, rtol=1e-4)


def test_moonshine_in_torch_learns_and_comes_back_from_its_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from x2l.encoders import moonshine

    encoder = torch_moonshine()
    encoder(**MoonshineProcessor()([np.ones(RATE, np.float32)])).x.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.network.layers.parameters())
    save_file({name: tensor.half() for name, tensor in encoder.state_dict().items()}, tmp_path / "encoder.safetensors")
    again, _ = moonshine.build(str(tmp_path / "encoder.safetensors"), max_seconds=2.0)
    assert [name for name, _ in again.named_parameters()] == []  # built when it first hears something, and frozen
    wave = np.sin(np.arange(3 * RATE) / 20).astype(np.float32)
    np.testing.assert_allclose(again.encode(wave), encoder.encode(wave), atol=0.02)


@pytest.mark.network
def test_moonshine_in_torch_hears_what_the_int8_network_hears() -> None:
    import soundfile

    from x2l.encoders import moonshine
    from x2l.weights import resolve

    wave, _ = soundfile.read(resolve(f"{moonshine.ASSETS.removesuffix('/tiny-en')}/beckett.wav"), dtype="float32")
    ours, theirs = (moonshine.build(trainable=trainable, threads=1)[0].encode(wave[: 4 * RATE]) for trainable in (True, False))
    assert float((ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)) > 0.99


@pytest.mark.network
def test_what_stage_1_did_not_train_comes_from_the_package() -> None:
    from x2l.encoders import moonshine

    plain, _ = moonshine.build(trainable=True)
    tuned, _ = moonshine.build("x2l:tiny/asr/final/encoder.safetensors", trainable=True)
    before, after = (encoder.state_dict() for encoder in (plain, tuned))
    changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2", "3", "4", "5"}
    assert all("layers" in name for name in before if not torch.equal(before[name], after[name]))
