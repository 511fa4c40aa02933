"""Speak a text of each row: voice, speed, noise and seed are drawn by the row's key and recorded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile

from x2l.data.media import SAMPLE_RATE, as_wav, decode_audio
from x2l.data.sources import DataError, Record
from x2l.data.tools import language
from x2l.data.transforms.base import Done, Skipped, noted, rng_of
from x2l.data.transforms.tts import SpeechError, synthesizer

PEAK = 0.8
SHORTEST, LONGEST = 0.03, 1.5  # seconds that a character may take
SILENCE = 1e-3  # root mean square below which nothing was said


class Speak:
    """``fields[field]`` -> mono FLAC at 16 kHz beside the row, and ``fields["spk"]``, the voice.

    Args:
        voices: "<engine>:<voice>" each, as "kokoro:af_heart", "flite:slt"; a row takes one of its language.
        field: the text. speeds: bounds of the speed, 1 as the voice speaks. snr: bounds in dB of the white noise that is
            added, or None. seed: draws others.
    """

    name, version, batch = "speak", "1", 1

    def __init__(
        self, voices: Sequence[str], field: str = "text", speeds: tuple[float, float] = (0.9, 1.1),
        snr: tuple[float, float] | None = (20.0, 40.0), seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0.5 <= speeds[0] <= speeds[1] <= 2:
            raise DataError(f"speeds are between 0.5 and 2, the lower first; got {speeds}")
        if not voices or any(":" not in voice for voice in voices):
            raise DataError(f"voices are <engine>:<voice>, as kokoro:af_heart or flite:slt; got {list(voices)}")
        self.voices, self.field, self.speeds, self.snr, self.seed = tuple(voices), field, speeds, snr, seed
        self.langs = {voice: synthesizer(engine).check(name) for voice, (engine, name) in self._split().items()}

    def _split(self) -> dict[str, tuple[str, str]]:
        return {voice: (voice.partition(":")[0], voice.partition(":")[2]) for voice in self.voices}

    def settings(self) -> dict[str, Any]:
        return {"voices": list(self.voices), "field": self.field, "speeds": list(self.speeds),
                "snr": None if self.snr is None else list(self.snr), "seed": self.seed}  # fmt: skip

    def __call__(self, rows: Sequence[Record]) -> Done:
        done = Done([])
        for row in rows:
            try:
                record, seconds = self._row(row)
                done.rows.append(record)
                done.counts.update({"milliseconds": round(1000 * seconds)})
            except SpeechError as error:
                done.rows.append(Skipped(row.key, str(error)))
        return done

    def _row(self, row: Record) -> tuple[Record, float]:
        text = row.fields.get(self.field)
        if not isinstance(text, str) or not text.strip():
            raise SpeechError(f"no text in {self.field!r}, got {str(text)[:60]!r}")
        lang = row.fields.get("lang") or language(text)
        fitting = [voice for voice in self.voices if self.langs[voice] == lang]
        if not fitting:
            raise SpeechError(f"no voice for the language {lang!r}: {text[:60]!r}")
        rng = rng_of(self.seed, row.key)
        voice, speed = rng.choice(fitting), round(rng.uniform(*self.speeds), 3)
        snr = None if self.snr is None else round(rng.uniform(*self.snr), 1)
        engine, _, name = voice.partition(":")
        speaker = synthesizer(engine)
        sound = levelled(*speaker.speak(text.strip(), name, speed))
        _check(sound, text)
        noise_seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{row.key}".encode()).digest()[:8], "big")
        blob = to_flac(noisy(sound, snr, noise_seed) if snr is not None else sound)
        facts = {"engine": speaker.name, "voice": voice, "speed": speed, "snr_db": snr, "noise_seed": noise_seed}
        result = noted(row, self, {"spk": voice, "lang": lang}, {"flac": blob}, **facts)
        return result, len(sound) / SAMPLE_RATE


def levelled(sound: np.ndarray, rate: int) -> np.ndarray:
    """Mono at 16 kHz, its peak at ``PEAK``."""
    if not len(sound) or not np.isfinite(sound).all():
        raise SpeechError("the engine gave no sound, or values that are not finite")
    resampled = decode_audio(as_wav(sound, rate))
    return resampled * (PEAK / max(float(np.abs(resampled).max()), 1e-9))


def noisy(sound: np.ndarray, snr: float, seed: int) -> np.ndarray:
    """White Gaussian noise at ``snr`` dB below the sound's power, from this seed."""
    noise = np.random.default_rng(seed).standard_normal(len(sound)).astype(np.float32)
    level = float(np.sqrt(np.mean(np.square(sound)))) / 10 ** (snr / 20)
    return np.clip(sound + level * noise, -1, 1)


def to_flac(sound: np.ndarray) -> bytes:
    """16-bit FLAC; unlike Ogg it holds no random serial number, so the same sound gives the same bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _check(sound: np.ndarray, text: str) -> None:
    seconds, loud = len(sound) / SAMPLE_RATE, float(np.sqrt(np.mean(np.square(sound))))
    if not SHORTEST * len(text) <= seconds <= LONGEST * len(text) + 2:
        raise SpeechError(f"{seconds:.2f} s of sound for {len(text)} characters: {text[:60]!r}")
    if loud < SILENCE:
        raise SpeechError(f"silence for {text[:60]!r}")
