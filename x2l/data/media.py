"""Media files to the arrays that processors take. Every size is checked before memory is spent on it.

Decoders accept bytes (as they come from a shard or a request) or a path, and raise MediaError with a message that is
fit for a stranger: no addresses, no paths of the machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 512 << 20
SAMPLE_RATE = 16_000
BLOCK = 1 << 15  # samples decoded at a time
JOINED = 50  # packets (of about 20 ms) that are resampled at a time
MAX_CHANNELS = 32
SAMPLE_RATES = range(1_000, 768_001)

# EXIF orientation -> how to turn the stored pixels upright (EXIF 2.3, tag 0x0112)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class MediaError(ValueError):
    """A media file that cannot be used; the message says why."""


def decode_image(source: bytes | str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF to an upright RGB image.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey keeps its high byte, CMYK and palettes are
    converted, and of an animation the first frame is taken.

    Raises:
        MediaError: unknown format, more than ``max_pixels`` (judged by the header), or damaged.
    """
    blob = load(source)
    try:
        image = Image.open(io.BytesIO(blob), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"the image has more than {max_pixels} pixels") from error
    except Exception as error:  # a hostile header may raise anything
        raise MediaError(f"not a readable image: expected one of {', '.join(IMAGE_FORMATS)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise MediaError(f"the image has {width} x {height} pixels, the limit is {max_pixels} in all")
    try:
        turn = UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb.transpose(turn) if turn is not None else rgb
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise MediaError(f"the image is damaged ({type(error).__name__})") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL would clip it instead of scaling
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image.convert("RGB")


def decode_audio(source: bytes | str | Path, rate: int = SAMPLE_RATE, max_seconds: float = 600.0) -> NDArray[np.float32]:
    """Decode a sound file, or the sound track of a video, to mono float32 in [-1, 1] at ``rate`` Hz; shape (samples,).

    Decoding stops at ``max_seconds``, whatever the header claims; channels are averaged.

    Raises:
        MediaError: unknown format, longer than ``max_seconds``, no sound in it, damaged, or a WAV or Ogg that was cut off.
    """
    blob = load(source)
    if _cut_off(blob):
        raise MediaError("the sound is cut off: the file ends before its own header says")
    container = _container(blob)
    blocks = _av_blocks(blob, container) if container else _soundfile_blocks(blob)
    try:
        sound = _resample(blocks, rate, max_seconds)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"the sound is damaged ({type(error).__name__})") from error
    if not np.isfinite(sound).all():
        raise MediaError("the sound holds values that are not finite")
    return sound


UNKNOWN_SIZE = 0x7FFFF000  # and above: what programs write that cannot know a WAV's length, as into a pipe
MAX_CHUNKS = 64  # before a WAV's samples
WHOLE = 0.9  # of a WAV's samples; with less it is cut off


def as_wav(wave: NDArray[np.float32], rate: int = SAMPLE_RATE) -> bytes:
    """A waveform (S,) or (S, channels) as a WAV file of floats, which loses nothing."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _cut_off(blob: bytes) -> bool:
    """Whether a WAV lacks samples that its header counts, or an Ogg ends within a page. (Decoders read on to the end that is
    there, and half a sentence would keep the whole one's transcript.)"""
    if blob[:4] == b"RIFF" and blob[8:12] == b"WAVE":
        at = 12
        for _ in range(MAX_CHUNKS):
            size = int.from_bytes(blob[at + 4 : at + 8], "little")
            if blob[at : at + 4] == b"data":
                return size < UNKNOWN_SIZE and len(blob) - at - 8 < WHOLE * size
            at += 8 + size + size % 2
    elif blob[:4] == b"OggS":
        page = blob[blob.rfind(b"OggS") :]
        return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    return False


Blocks = Iterator[tuple[NDArray[np.float32], int]]  # mono samples and their rate


def _soundfile_blocks(blob: bytes) -> Blocks:
    try:
        file = soundfile.SoundFile(io.BytesIO(blob))
    except (soundfile.SoundFileError, TypeError) as error:
        raise MediaError("not a readable sound: expected WAV, FLAC, Ogg, MP3, MP4 or Matroska") from error
    with file:
        if file.channels > MAX_CHANNELS or file.samplerate not in SAMPLE_RATES:
            raise MediaError(f"{file.channels} channels at {file.samplerate} Hz: at most {MAX_CHANNELS} at 1-768 kHz")
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield block.mean(axis=1), file.samplerate


def _av_blocks(blob: bytes, demuxer: str) -> Blocks:
    with av.open(io.BytesIO(blob), "r", format=demuxer) as container:
        if not container.streams.audio:
            raise MediaError("the file has no sound track")
        to_float = av.AudioResampler(format="fltp")
        joined: list[NDArray[np.float32]] = []
        rate = 0
        for frame in container.decode(container.streams.audio[0]):
            if frame.layout.nb_channels > MAX_CHANNELS or frame.sample_rate not in SAMPLE_RATES:
                raise MediaError(f"{frame.layout.nb_channels} channels at {frame.sample_rate} Hz are not supported")
            if frame.sample_rate != rate or len(joined) >= JOINED:
                if joined:
                    yield np.concatenate(joined), rate
                joined, rate = [], frame.sample_rate
            floats = [frame] if frame.format.name == "fltp" else to_float.resample(frame)
            joined.extend(_mono(f) for f in floats)
        if joined:
            yield np.concatenate(joined), rate


def _mono(frame: av.AudioFrame) -> NDArray[np.float32]:
    planes = [np.frombuffer(memoryview(plane), np.float32, frame.samples) for plane in frame.planes]
    return planes[0].copy() if len(planes) == 1 else np.mean(planes, axis=0, dtype=np.float32)


def _resample(blocks: Blocks, rate: int, max_seconds: float) -> NDArray[np.float32]:
    """Join the blocks at ``rate`` (band-limited, FFmpeg's swresample), stopping as soon as they are too long."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    pieces: list[NDArray[np.float32]] = []
    seconds = 0.0
    for block, block_rate in blocks:
        seconds += len(block) / block_rate
        if seconds > max_seconds + 1e-3:  # sums of fractions are not exact
            raise MediaError(f"the sound is longer than {max_seconds:g} s")
        if block_rate == rate:
            pieces.append(block)
            continue
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block[None]), format="flt", layout="mono")
        frame.sample_rate = block_rate
        pieces.extend(f.to_ndarray()[0] for f in resampler.resample(frame))
    if not seconds:
        raise MediaError("the sound is empty")
    if block_rate != rate:
        pieces.extend(f.to_ndarray()[0] for f in resampler.resample(None))
    return np.concatenate(pieces).astype(np.float32, copy=False)


def _container(blob: bytes) -> str | None:
    """FFmpeg's demuxer for a container that libsndfile does not read; named, so that no playlist can open other
    files."""
    return next((name for name, matches in CONTAINERS.items() if matches(blob)), None)


CONTAINERS: dict[str, Callable[[bytes], bool]] = {
    "ogg": lambda blob: blob[:4] == b"OggS" and b"OpusHead" in blob[:128],  # libsndfile 1.2 fails at some page ends
    "mov": lambda blob: blob[4:8] == b"ftyp",
    "matroska": lambda blob: blob[:4] == b"\x1a\x45\xdf\xa3",
    "avi": lambda blob: blob[:4] == b"RIFF" and blob[8:12] == b"AVI ",
    "mpegts": lambda blob: blob[:1] == b"\x47" and blob[188:189] == b"\x47",
    "mpeg": lambda blob: blob[:4] == b"\x00\x00\x01\xba",
    "flv": lambda blob: blob[:3] == b"FLV",
    "asf": lambda blob: blob[:4] == b"\x30\x26\xb2\x75",
    "aac": lambda blob: len(blob) > 1 and blob[0] == 0xFF and blob[1] & 0xF6 == 0xF0,
}


def load(source: bytes | str | Path) -> bytes:
    """The bytes of a file of at most ``MAX_FILE_BYTES``, or MediaError."""
    if isinstance(source, bytes):
        return source
    try:
        if Path(source).stat().st_size > MAX_FILE_BYTES:
            raise MediaError(f"the file {Path(source).name!r} is larger than {MAX_FILE_BYTES} bytes")
        return Path(source).read_bytes()
    except OSError as error:
        raise MediaError(f"cannot read the file {str(source)!r}: {error.strerror}") from error


def _decode_video(source: bytes | str | Path, num_frames: int = 8) -> list[Image.Image]:
    from x2l.data.video import decode_video  # it stands on this file

    return decode_video(source, num_frames)


DECODERS: dict[str, Callable[..., Any]] = {"image": decode_image, "audio": decode_audio, "video": _decode_video}
