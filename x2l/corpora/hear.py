"""Check spoken data with recognisers that never saw it: Moonshine for English, Whisper for Mandarin."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np

from x2l.data.media import MediaError, decode_audio
from x2l.data.sources import DataError, Issues, Record, Row, Source, read_source
from x2l.data.tasks import EXTENSIONS
from x2l.data.tools import readable
from x2l.data.transforms.base import Done, Skipped, noted
from x2l.data.transforms.runner import run
from x2l.encoders.ctranslate2 import whisper_base
from x2l.eval.normalize import preset

Transcribe = Callable[[np.ndarray], str]
UNITS = {"en": "WER", "zh": "CER"}
NORMALIZERS = {"en": "en", "zh": "speechio-like"}


class Heard(NamedTuple):
    """Errors of a voice: ``rate`` of words (en) or characters (zh) over ``num`` utterances."""

    voice: str
    lang: str
    num: int
    rate: float


@functools.cache
def moonshine() -> Transcribe:
    """Moonshine tiny, English."""
    from x2l.encoders.moonshine import build_transcriber

    return build_transcriber(threads=1).transcribe


@functools.cache
def whisper() -> Transcribe:
    """Whisper base, told that it hears Mandarin.

    Raises:
        DataError: faster-whisper is not installed.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise DataError("hearing Mandarin needs an extra: pip install 'x2l[data]'") from error
    model = WhisperModel(str(whisper_base()), device="cpu", compute_type="float32", cpu_threads=1, local_files_only=True)
    options: dict[str, Any] = {"language": "zh", "beam_size": 1, "initial_prompt": "以下是普通话的句子。"}

    def transcribe(wave: np.ndarray) -> str:
        return "".join(segment.text for segment in model.transcribe(wave, **options)[0])

    return transcribe


RECOGNISERS: dict[str, tuple[str, Callable[[], Transcribe]]] = {
    "en": ("Moonshine tiny", moonshine),
    "zh": ("Whisper base", whisper),
}


class Hear:
    """A row with a sound, "text" and "lang" -> the same row with what a recogniser heard, in ``fields["heard"]``."""

    name, version, batch = "hear", "1", 1

    def settings(self) -> dict[str, Any]:
        return {"recognisers": {lang: name for lang, (name, _) in RECOGNISERS.items()}}

    def __call__(self, rows: Sequence[Record]) -> Done:
        return Done([self._row(row) for row in rows])

    def _row(self, row: Record) -> Record | Skipped:
        try:
            sound = decode_audio(next(blob for ext, blob in row.media.items() if ext in EXTENSIONS["sound"]))
        except (MediaError, StopIteration) as error:
            return Skipped(row.key, str(error) or "no sound")
        name, load = RECOGNISERS[row.fields["lang"]]
        return noted(row, self, {"heard": load()(sound)}, recogniser=name)


def hear(source: Source, out: Path, per_voice: int = 20, progress: bool = True) -> list[Heard]:
    """Error rates by voice, on the first ``per_voice`` utterances of each; texts are normalised as in evaluation.

    What was heard is kept in ``<out>/heard-*.tar``, and a killed run goes on there.

    Args:
        source: rows with a sound, "text", "lang" and "spk"; other languages than a recogniser's are left out.
    """
    chosen: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row, record in readable(source):
        voice = (record.fields.get("spk", ""), record.fields.get("lang", ""))
        if voice[1] in RECOGNISERS and len(chosen[voice]) < per_voice:
            chosen[voice].append(row)
    rows = Source([row for voice in sorted(chosen) for row in chosen[voice]], Issues(max_fraction=source.issues.max_fraction))
    summary = run(Hear(), rows, out, "heard", progress=progress)
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for record in read_source([str(path) for path in summary.shards]):
        normal = preset(NORMALIZERS[record.fields["lang"]])
        found = normal(record.fields["text"]), normal(record.fields["heard"])
        pairs[record.fields["spk"], record.fields["lang"]].append(found)
    return [Heard(voice, lang, len(found), _rate(found, lang)) for (voice, lang), found in sorted(pairs.items())]


def _rate(pairs: list[tuple[str, str]], lang: str) -> float:
    said, heard = map(list, zip(*pairs, strict=True))
    return float((jiwer.cer if lang == "zh" else jiwer.wer)(said, heard))
