"""Decoders: defined results for odd files, bounds before memory, and messages fit for strangers."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from x2l.data.media import MediaError, _cut_off, decode_audio, decode_image
from x2l.data.sources import read_source
from x2l.data.video import check_video

ESC10 = Path(__file__).parents[2] / "shared" / "data" / "esc10"


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 4], -1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_allowed_format(kind: str, tmp_path: Path) -> None:
    blob = encode(gradient(), kind)
    image = decode_image(blob)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(image, float) - np.asarray(gradient(), float)).mean() < 12
    (tmp_path / "x").write_bytes(blob)
    assert decode_image(tmp_path / "x").tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["JPEG2000", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(MediaError, match="expected one of JPEG"):
        decode_image(encode(gradient(), kind))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_pillows(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encode(gradient(), "PNG", exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(blob)))
    assert decode_image(blob).tobytes() == expected.convert("RGB").tobytes()


def test_damaged_exif_loses_nothing() -> None:
    blob = encode(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\xff" * 30)
    assert decode_image(blob).size == (40, 24)


def test_odd_modes_have_defined_results() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    assert list(np.asarray(decode_image(encode(half, "PNG")))[0, 1]) == [255, 255, 255], "transparent is white"
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(decode_image(encode(deep, "PNG")))[0, :, 0].tolist() == [0, 128, 255]
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    red = np.asarray(decode_image(encode(cmyk, "TIFF")))[0, 0]
    assert red[0] > 200
    assert max(red[1:]) < 50
    assert decode_image(encode(gradient().convert("P"), "PNG")).mode == "RGB"
    assert decode_image(encode(gradient().convert("1"), "PNG")).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(animated).getpixel((0, 0)) == (255, 0, 0), "the first frame"


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds one row of nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (200_000, 2000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_bounded_by_the_header(width: int, height: int) -> None:
    with pytest.raises(MediaError, match="pixels"):
        decode_image(png_header(width, height))


@pytest.mark.parametrize("blob", [b"", b"\x00", b"GIF89a", b"\xff\xd8\xff", b"SIMPLE  =", b"not an image at all" * 9])
def test_garbage_leaks_nothing(blob: bytes) -> None:
    for decode in (decode_image, decode_audio):
        with pytest.raises(MediaError) as caught:
            decode(blob)
        assert "0x" not in str(caught.value)
        assert "<" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_damaged_images_decode_or_raise_media_error(kind: str, keep: float, flips: list[tuple[float, int]]) -> None:
    blob = bytearray(encode(gradient(), kind))
    for place, mask in flips:
        blob[int(place * len(blob))] ^= mask
    with contextlib.suppress(MediaError):
        assert decode_image(bytes(blob[: int(keep * len(blob))])).mode == "RGB"


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def sound(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_the_same_tone(rate: int) -> None:
    decoded = decode_audio(sound(tone(rate), rate, "WAV", "FLOAT"))
    assert decoded.dtype == np.float32
    assert abs(len(decoded) - 8000) <= 2
    middle = slice(500, 7500)
    assert np.abs(decoded[: 8000 - 2][middle] - tone(16_000)[: 8000 - 2][middle]).max() < 0.01


def test_what_the_target_rate_cannot_hold_is_filtered_out() -> None:
    decoded = decode_audio(sound(tone(48_000, hertz=11_000.0), 48_000, "WAV", "FLOAT"))
    assert np.abs(decoded[500:7500]).max() < 0.02, "11 kHz would alias to 5 kHz"


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_every_sound_format_and_channels_are_averaged(kind: str, subtype: str | None) -> None:
    stereo = np.stack([tone(16_000), np.zeros(8000, np.float32)], 1)
    decoded = decode_audio(sound(stereo, 16_000, kind, subtype))
    assert 0.2 < np.abs(decoded[1000:7000]).max() < 0.3
    assert decoded.ndim == 1


def video(path: str, with_sound: bool) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=path) as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        track = out.add_stream("aac", rate=48_000) if with_sound else None
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
        if track is not None:
            for start in range(0, 24_000 - 1024, 1024):
                frame = av.AudioFrame.from_ndarray(tone(48_000)[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48_000, start
                out.mux(track.encode(frame))
            out.mux(track.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_the_sound_track_of_a_video(container: str) -> None:
    decoded = decode_audio(video(container, with_sound=True))
    assert 7000 < len(decoded) < 9000
    spectrum = np.abs(np.fft.rfft(decoded[1000:6000]))
    assert abs(np.argmax(spectrum) * 16_000 / 5000 - 440) < 10
    with pytest.raises(MediaError, match="no sound track"):
        decode_audio(video(container, with_sound=False))


def test_check_video() -> None:
    blob = video("mp4", with_sound=True)
    check_video(blob)
    for bad in (blob[:200], b"", SOUNDS["WAV"]):
        with pytest.raises(MediaError, match="not a readable video"):
            check_video(bad)


def test_length_is_bounded_while_decoding() -> None:
    silence = sound(np.zeros(16_000 * 900, np.int16), 16_000, "FLAC")
    assert len(silence) < 300_000
    with pytest.raises(MediaError, match="longer than 30 s"):
        decode_audio(silence, max_seconds=30)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (sound(np.zeros(0, np.float32), 16_000, "WAV"), "empty"),
        (sound(np.full(100, np.nan, np.float32), 16_000, "WAV", "FLOAT"), "not finite"),
        (sound(np.zeros((100, 64), np.float32), 16_000, "WAV"), "64 channels"),
        (sound(np.zeros(100, np.float32), 100, "WAV"), "100 Hz"),
    ],
)
def test_unusable_sound(blob: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        decode_audio(blob)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["WAV", "FLAC", "OGG", "matroska", "mp4"]),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_damaged_sounds_decode_or_raise_media_error(kind: str, keep: float, flips: list[tuple[float, int]]) -> None:
    blob = bytearray(SOUNDS[kind])
    for place, mask in flips:
        blob[int(place * len(blob))] ^= mask
    with contextlib.suppress(MediaError):
        assert decode_audio(bytes(blob[: int(keep * len(blob))])).ndim == 1


SOUNDS = {kind: sound(tone(16_000), 16_000, kind) for kind in ("WAV", "FLAC", "OGG")} | {
    kind: video(kind, with_sound=True) for kind in ("matroska", "mp4")
}


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("FLAC", "PCM_16")])
def test_half_a_recording_is_refused(kind: str, subtype: str) -> None:
    blob = sound(np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000, kind, subtype)
    assert len(decode_audio(blob)) == pytest.approx(48_000, rel=0.01)
    for keep in (0.1, 0.5, 0.85):
        with pytest.raises(MediaError, match=r"cut off|damaged"):
            decode_audio(blob[: int(keep * len(blob))])


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_does_not_know_its_length(size: int) -> None:
    blob = bytearray(sound(tone(16_000), 16_000, "WAV"))
    blob[40:44] = size.to_bytes(4, "little")
    assert not _cut_off(bytes(blob))


def test_endless_chunks_end_the_search() -> None:
    assert not _cut_off(b"RIFF\0\0\0\0WAVE" + bytes(64 << 20))


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(SOUNDS["WAV"])
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n".encode()
    concat = f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n".encode()
    for blob in (playlist, concat):
        with pytest.raises(MediaError):
            decode_audio(blob)


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs ../shared/data/esc10")
def test_opus_that_libsndfile_cannot_read() -> None:
    for record, _ in zip(read_source(str(ESC10 / "train-0000.tar")), range(40), strict=False):
        assert 79_000 < len(decode_audio(record.media["opus"])) < 120_000
