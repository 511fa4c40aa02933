"""Filter banks against kaldi-native-fbank, an independent implementation; CMVN and SpecAugment by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from x2l.encoders.fbank import FbankProcessor, SpecAugment, cmvn, fbank


def waveform(num_samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    tones = np.sin(2 * np.pi * 220 * time) + 0.3 * np.sin(2 * np.pi * 3_000 * time * (1 + time))
    return (0.2 * tones + 0.05 * rng.standard_normal(num_samples)).astype(np.float32)


def kaldi(wave: np.ndarray, num_mels: int) -> np.ndarray:
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = num_mels
    online = knf.OnlineFbank(options)
    online.accept_waveform(16_000, (wave * 32_768).tolist())
    online.input_finished()
    return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])


@pytest.mark.parametrize(("num_samples", "num_mels"), [(400, 80), (559, 80), (16_000, 80), (12_345, 40)])
def test_equals_kaldi(num_samples: int, num_mels: int) -> None:
    wave = waveform(num_samples)
    ours, theirs = fbank(torch.from_numpy(wave), num_mels).numpy(), kaldi(wave, num_mels)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_a_wave_shorter_than_a_window_gives_one_frame() -> None:
    assert fbank(torch.from_numpy(waveform(100))).shape == (1, 80)
    assert fbank(torch.zeros(0)).isfinite().all()


def test_cmvn_and_silence() -> None:
    mels = cmvn(fbank(torch.from_numpy(waveform(16_000))))
    torch.testing.assert_close(mels.mean(0), torch.zeros(80), atol=1e-4, rtol=0)
    torch.testing.assert_close(mels.square().mean(0), torch.ones(80), atol=1e-3, rtol=0)
    assert cmvn(fbank(torch.zeros(8_000))).abs().max() < 0.01


def test_processor_pads_on_the_right_and_leaves_each_wave_alone() -> None:
    waves = [waveform(16_000), waveform(4_000, 1)]
    together, alone = FbankProcessor()(waves), FbankProcessor()(waves[1:])
    assert together["lengths"].tolist() == [98, 23]
    torch.testing.assert_close(together["mels"][1, :23], alone["mels"][0])
    assert (together["mels"][1, 23:] == 0).all()


def test_spec_augment_masks_within_its_limits_and_only_in_training() -> None:
    torch.manual_seed(0)
    x, lengths = torch.ones(64, 100, 80), torch.full((64,), 100)
    augment = SpecAugment(num_channel_masks=1, num_frame_masks=1)
    masked = augment(x, lengths) == 0
    frames, channels = masked.all(2).sum(1), masked.all(1).sum(1)
    assert 10 < frames.max() <= 20
    assert 15 < channels.max() <= 27
    assert augment.eval()(x, lengths) is x
