"""Speech recognisers of different kinds behind one interface, so that one table compares them on the same clips."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from x2l.assistant import Assistant
from x2l.build import initialise, load_strict
from x2l.checkpoint import sha256
from x2l.config import TrainConfig
from x2l.data.collate import raw
from x2l.data.media import SAMPLE_RATE, decode_audio
from x2l.encoders import moonshine
from x2l.encoders.ctranslate2 import whisper_base
from x2l.eval import records, tasks
from x2l.eval.predict import Generator, Render, predict, prompt_of
from x2l.eval.report import format_score
from x2l.modality import Processor
from x2l.recognizer import PIECE, Recognizer
from x2l.stages import asr_model
from x2l.types import Sample
from x2l.vocabulary import spoken_form
from x2l.weights import resolve


class Transcriber:
    """A recogniser as `x2l.eval.predict.predict` wants it: it hears the speech and ignores the question."""

    def __init__(self, transcribe: Callable[[np.ndarray], str]) -> None:
        self.transcribe = transcribe

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        """One transcript for each sample's first media item."""
        return [self.transcribe(decode_audio(raw(sample.media[0]))) for sample in samples]


class System(NamedTuple):
    """A recogniser, what identifies it in a record, and how it is asked."""

    model: Generator
    info: dict[str, Any]
    decode: dict[str, Any]
    render: Render = prompt_of


def systems(
    model: str | None, cif: Path | None, peers: Sequence[str], samples: Sequence[Sample], search: dict[str, int]
) -> tuple[dict[str, System], list[str]]:
    """The systems of one table by name, and a line about how each CIF among them counts.

    Args:
        model: recipe of a model whose LLM writes down the speech.
        cif: run folder of stage 1.
        peers: ``moonshine``, ``whisper``, ``whisper=FOLDER``.
        samples: for the counting.
        search: ``num_beams`` and ``slack`` of the CIF-based ASR model.

    Raises:
        ValueError: an unknown peer, or no system at all.
    """
    found, notes = dict[str, System](), list[str]()
    if model:
        assistant = Assistant.load(model)
        # As many tokens as the peer may write, and pieces as short as those of the CIF-based ASR model.
        decode = {"max_new_tokens": 64, "tokens_a_second": moonshine.TOKENS_PER_SECOND, "piece_seconds": PIECE}
        found[f"{model}: LLM"] = System(assistant, assistant.info(), decode, assistant.render)
        speech: Any = assistant.model.modalities["speech"]
        processor = assistant.collator.processors["speech"]
        notes.append(f"{model}: {count(speech.encoder, processor, speech.interface[0], assistant.tokenizer, samples)}")
    if cif:
        recognizer, tokenizer, info = cif_asr(cif)
        found["CIF-ASR"] = System(Transcriber(lambda wave: recognizer.text(wave, **search)), info, search)
        asr = recognizer.asr
        notes.append(f"CIF-ASR: {count(asr.encoder, recognizer.processor, asr.listener, tokenizer, samples)}")
    for peer in peers:
        name, _, folder = peer.partition("=")
        if name not in PEERS:
            raise ValueError(f"unknown peer {peer!r}: use moonshine, whisper or whisper=FOLDER")
        found[name] = PEERS[name](folder)
    if not found:
        raise ValueError("nothing to measure: give --model, --cif or --peer")
    return found, notes


def run(found: dict[str, System], samples: list[Sample], out: Path, dataset: str, seed: int, batch_size: int) -> dict[str, Path]:
    """Let every system transcribe the samples; the run folder of each, scored."""
    runs = {}
    for name, system in found.items():
        folder = out / re.sub(r"\W+", "-", name)
        runs[name] = predict(
            system.model, samples, folder, task="asr", dataset=dataset, model_info=system.info,
            decode=system.decode, seed=seed, batch_size=batch_size, render=system.render,
        )  # fmt: skip
        tasks.score(folder)
    return runs


def moonshine_peer(folder: str) -> System:
    """Moonshine tiny with its own greedy decoder, which has never seen our training data; ``folder`` is not used."""
    info = {"checkpoint": moonshine.SHA256["decoder_model_merged.ort"], "device": "cpu", "dtype": "int8"}
    return System(Transcriber(moonshine.build_transcriber().transcribe), info, {})


def whisper_peer(folder: str) -> System:
    """A Whisper in CTranslate2's format (a weights spec of its folder; "" is Whisper base), decoded greedily by faster-whisper.

    Raises:
        ValueError: faster-whisper is not installed.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise ValueError("the Whisper peer needs faster-whisper: pip install faster-whisper") from error
    path = resolve(folder) if folder else whisper_base()
    model = WhisperModel(str(path), device="cpu", compute_type="float32", cpu_threads=1, local_files_only=True)

    def transcribe(wave: np.ndarray) -> str:
        segments, _ = model.transcribe(wave, beam_size=1, language="en")
        return " ".join(segment.text.strip() for segment in segments)

    info = {"checkpoint": sha256(path / "model.bin"), "device": "cpu", "dtype": "float32"}
    return System(Transcriber(transcribe), info, {})


PEERS: dict[str, Callable[[str], System]] = {"moonshine": moonshine_peer, "whisper": whisper_peer}


def cif_asr(run: Path) -> tuple[Recognizer, Any, dict[str, Any]]:
    """The CIF-based ASR model that stage 1 left in a run folder (``x2l:tiny/asr``: the one that ships), its LLM's tokenizer, and
    what identifies it.

    Raises:
        ValueError: no finished stage 1 there.
    """
    run = resolve(str(run)) if str(run).startswith("x2l:") else run
    if not (run / "final" / "decoder.safetensors").is_file():
        raise ValueError(f"{run} holds no finished stage 1: run x2l train tiny/stage1_asr run={run}")
    config = TrainConfig.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
    model, vocabulary, built = asr_model(config)
    for part, source in config.init.items():
        if "." not in part and not (run / "final" / f"{part}.safetensors").is_file():  # another file of what ships holds it
            initialise(model.get_submodule(part), source)
    for path in sorted((run / "final").glob("*.safetensors")):
        load_strict(model.get_submodule(path.stem), path, partial=bool(config.stage_args.get("moonshine")))
    encoder: Any = model.encoder
    recognizer = Recognizer(model, built.processors["speech"], vocabulary.texts, encoder.seconds_per_frame)
    info = {"checkpoint": sha256(run / "final" / "decoder.safetensors"), "device": "cpu", "dtype": "float32"}
    return recognizer, built.renderer.tokenizer, info


class Counted(NamedTuple):
    """How CIF counts tokens on a set."""

    mean_error: float  # mean |embeddings - tokens| an utterance
    rate: float  # embeddings a second

    def __str__(self) -> str:
        savings = " and ".join(f"{hertz / self.rate:.1f} times fewer than {hertz} Hz" for hertz in (25, 50))
        return f"mean |CIF length - tokens| {self.mean_error:.2f}; {self.rate:.2f} embeddings a second, {savings}"


@torch.inference_mode()
def count(encoder: Any, processor: Processor, listener: Any, tokenizer: Any, samples: Sequence[Sample]) -> Counted:
    """Compare the number of CIF embeddings of each clip with the LLM's tokens of its transcript in `spoken_form`."""
    errors, fired, seconds = 0, 0, 0.0
    for sample in samples:
        wave = decode_audio(raw(sample.media[0]))
        length = int(listener(encoder(**processor([wave]))).lengths)
        tokens = tokenizer(f" {spoken_form(sample.meta['references'][0])}", add_special_tokens=False)["input_ids"]
        errors += abs(length - len(tokens))
        fired, seconds = fired + length, seconds + len(wave) / SAMPLE_RATE
    return Counted(errors / len(samples), fired / seconds)


def table(runs: dict[str, Path], baseline: str) -> str:
    """Error rates of systems on the same clips as a Markdown table, each also relative to ``baseline``.

    Raises:
        ValueError: the systems did not hear the same clips.
    """
    plans = {tuple(row["id"] for row in records.read(run / "task.jsonl")) for run in runs.values()}
    if len(plans) != 1:
        raise ValueError(f"{', '.join(map(str, runs.values()))} are about different clips: compare like with like")
    scored = {name: tasks.stored_score(run) for name, run in runs.items()}
    (rate,) = next(iter(scored.values()))["scores"]
    base = scored[baseline]["scores"][rate]["value"] if baseline in scored else None
    lines = [["", rate, f"of {baseline}'s", "counts", "coverage"], ["---"] * 5]
    for name, result in scored.items():
        value = result["scores"][rate]
        relative = f"{value['value'] / base:.2f}" if base else "–"
        counts = format_score(result["details"][f"{rate} counts"])
        lines.append([name, format_score(value), relative, counts, f"{result['coverage']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
