"""Augmented copies of media, and batches of media of similar size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from x2l.config import HoldoutConfig, SourceConfig
from x2l.data.feed import Feed, Stream, Subset, held_out, open_feed
from x2l.data.media import decode_audio, decode_image
from x2l.data.sources import DataError, Record
from x2l.data.tools import write_shards
from x2l.data.views import audio_view, image_view, in_noise


def tone(hertz: float, seconds: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000), 16_000, format="WAV")
    return buffer.getvalue()


def peak(wave: np.ndarray) -> float:
    """Hertz of the strongest component, the wave being at 16 kHz."""
    return float(np.abs(np.fft.rfft(wave)).argmax() * 16_000 / len(wave))


@pytest.mark.parametrize(("view", "speed"), [(1, 0.9), (2, 1.1)])
def test_other_speeds_change_length_and_pitch(view: int, speed: float) -> None:
    wave = audio_view(tone(440.0), view)
    assert len(wave) == pytest.approx(16_000 / speed, rel=0.002)
    assert peak(wave) == pytest.approx(440.0 * speed, abs=2.0)


def test_noise_is_below_the_sound_and_always_the_same() -> None:
    clean, noisy = decode_audio(tone(440.0)), audio_view(tone(440.0), 3)
    ratio = 10 * np.log10(np.square(clean).mean() / np.square(noisy - clean).mean())
    assert 5 <= ratio <= 25
    assert np.array_equal(noisy, audio_view(tone(440.0), 3))
    assert not in_noise(np.zeros(100, np.float32), 0).any()


def test_pictures_are_mirrored() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert image_view(buffer.getvalue(), 1).getpixel((1, 0)) == (255, 0, 0) == decode_image(buffer.getvalue()).getpixel((0, 0))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 1000))
def test_crops_keep_at_least_half_and_are_always_the_same(width: int, height: int, view: int) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 90).save(buffer, "PNG")
    crop = image_view(buffer.getvalue(), view)
    assert 0 < crop.width <= width
    assert 0 < crop.height <= height
    assert (crop.width + 1) * (crop.height + 1) >= 0.4 * width * height
    assert crop.tobytes() == image_view(buffer.getvalue(), view).tobytes()


def test_views_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="set views to at most 4"):
        audio_view(tone(440.0), 4)


def records(num: int) -> list[Record]:
    return [Record(f"r{i}", {"text": "go on", "spk": i % 10}, {"wav": b"\0" * (1 + i * 37 % 101)}) for i in range(num)]


@pytest.mark.parametrize("num", [64, 61])
def test_bucketed_batches_hold_every_record_once_and_less_padding(num: int) -> None:
    def epochs(bucket: int) -> list[list[int]]:
        feed = Feed([Stream(records(num), {"asr": {}})], batch_size=8, seed=0, bucket=bucket)
        return [[len(family[0].media[0].bytes or b"") for family in feed.batch(step)] for step in range(num)]  # eight epochs

    plain, sorted_ = epochs(0), epochs(4)
    assert sorted(x for batch in plain for x in batch) == sorted(x for batch in sorted_ for x in batch)
    padded = [sum(max(batch) * len(batch) for batch in batches) for batches in (plain, sorted_)]
    assert padded[1] < 0.75 * padded[0]
    assert epochs(4) == sorted_


def test_a_held_out_part_shares_no_speaker_with_the_rest(tmp_path: Path) -> None:
    write_shards([Record(r.key, r.fields, {"wav": tone(300.0, 0.01)}) for r in records(60)], tmp_path, "train")
    speakers = {}
    for part in ("kept", "held_out"):
        holdout = HoldoutConfig(field="spk", percent=40, part=part)
        feed = open_feed([SourceConfig(path="*.tar", tasks={"asr": {}}, licence="", holdout=holdout)], str(tmp_path), 1, 0)
        (stream,) = {id(s): s for s, _ in feed.index}.values()
        speakers[part] = {stream.records[i].fields["spk"] for i in range(len(stream.records))}
        assert isinstance(stream.records, Subset)
    assert speakers["kept"].isdisjoint(speakers["held_out"])
    assert speakers["kept"] | speakers["held_out"] == set(range(10))
    assert speakers["held_out"]
    with pytest.raises(DataError, match="no field 'speaker' to split by, it has text, spk"):
        held_out(records(1)[0], "speaker", 10)
