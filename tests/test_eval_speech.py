"""`x2l eval asr` and `x2l eval spoken` on models that need no weights, and the rule of agreement."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_shard

from x2l.data.sources import read_source
from x2l.eval import asr, metrics, questions, spoken
from x2l.eval.predict import prompt_of
from x2l.types import Features, Sample

INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Clips of 1, 2 and 3 s."""
    rows: dict[str, dict[str, bytes]] = {}
    for i, text in enumerate(["GO ON", "I DO IT", "SIT"], start=1):
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * np.random.default_rng(i).standard_normal(16_000 * i), 16_000, format="WAV")
        rows[f"u{i}"] = {"wav": buffer.getvalue(), "json": json.dumps({"text": text, "spk": str(i)}).encode()}
    write_shard(tmp_path / "test-0000.tar", rows)
    return str(tmp_path / "test-*.tar")


def test_systems_hear_the_same_clips_in_one_table(shard: str, tmp_path: Path) -> None:
    heard = {16_000: "go on", 32_000: "I do", 48_000: "no way"}
    systems = {
        "ours": asr.System(asr.Transcriber(lambda wave: heard[len(wave)]), INFO, {}),
        "moonshine": asr.System(asr.Transcriber(lambda wave: ""), INFO, {}),
    }
    runs = asr.run(systems, questions.asr(read_source(shard), cluster="spk"), tmp_path / "runs", "clips", 0, 2)
    ours, peer = asr.table(runs, "moonshine").splitlines()[2:]
    assert ours.startswith("| ours | 50.0 ")
    assert "| 0.50 | N 6, S 1, D 1, I 1, 1 above 100 % | 1.000 |" in ours
    assert peer.startswith("| moonshine | 100.0")
    (tmp_path / "runs" / "ours" / "task.jsonl").write_text('{"id": "other"}\n')
    with pytest.raises(ValueError, match="compare like with like"):
        asr.table(runs, "moonshine")


def test_counting_against_the_tokens(shard: str) -> None:
    def encoder(seconds: torch.Tensor) -> Features:
        return Features(seconds[:, :, None], seconds.sum(1))

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    counted = asr.count(
        encoder,
        lambda waves: {"seconds": torch.tensor([[len(waves[0]) // 16_000]])},
        lambda features: Features(features.x, features.lengths),  # one embedding a second: 1, 2, 3 where 2, 3, 1 were said
        tokenizer,
        questions.asr(read_source(shard)),
    )
    assert counted == asr.Counted(mean_error=4 / 3, rate=1.0)
    assert "25.0 times fewer than 25 Hz and 50.0 times fewer than 50 Hz" in str(counted)


def test_unknown_peers_and_empty_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown peer 'siri': use moonshine, whisper or whisper=FOLDER"):
        asr.systems(None, None, ["siri"], [], {})
    with pytest.raises(ValueError, match="give --model, --cif or --peer"):
        asr.systems(None, None, [], [], {})
    with pytest.raises(ValueError, match="holds no finished stage 1"):
        asr.cif_asr(tmp_path)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The capital is Paris.", "Paris, the capital!", 1.0),
        ("It is in Paris.", "The capital is Paris.", 2 / 3),
        ("Yes.", "No.", 1.0),  # no long word in either
        ("Yes.", "Maybe.", 0.0),
        ("word " * 32 + "extra", "word", 1.0),
    ],
)
def test_word_overlap(answer: str, reference: str, expected: float) -> None:
    assert metrics.word_overlap(answer, reference) == pytest.approx(expected)
    assert metrics.word_overlap(reference, answer) == pytest.approx(expected)


def test_spoken_questions_are_measured_beside_best_and_chance(shard: str, tmp_path: Path) -> None:
    class Listener:
        """Hears two of three questions."""

        def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
            return [self.answer(sample) for sample in samples]

        def answer(self, sample: Sample) -> str:
            text = sample.messages[-1].text.upper()
            sizes = {len(record.media["wav"]): record.fields["text"] for record in read_source(shard)}
            for part in sample.media:
                text = sizes[len(part.bytes or b"")]
            return {"GO ON": "walking slowly", "I DO IT": "dancing wildly", "SIT": "" if sample.media else "chairs"}[text]

    runs = spoken.compare(Listener(), read_source(shard), tmp_path / "runs", dataset="clips", model_info=INFO, render=prompt_of)
    header, _, heard, typed, other = spoken.table(runs).splitlines()
    assert header == "| question | n | agreement | word overlap |"
    assert heard.startswith("| spoken | 3 | 66.7 ")
    assert typed.startswith("| as it sounds, typed | 3 | 100.0 ")
    assert other.startswith("| another question, spoken | 3 | 0.0")


@pytest.mark.network
def test_the_shipped_cif_asr_writes_what_is_said_with_times_inside_the_recording() -> None:
    from x2l.data.media import SAMPLE_RATE, decode_audio
    from x2l.encoders import moonshine
    from x2l.weights import resolve

    recognizer, _, _ = asr.cif_asr(Path("x2l:tiny/asr"))
    wave = decode_audio(resolve(f"{moonshine.ASSETS.removesuffix('/tiny-en')}/beckett.wav").read_bytes())
    ((*tokens,),) = recognizer.transcribe([wave], num_beams=4)
    assert "".join(text for text, _ in tokens).strip().startswith("ever tried ever failed no matter try")
    ends = [end for _, end in tokens]
    assert ends == sorted(ends)
    assert 0 < ends[0] < ends[-1] <= len(wave) / SAMPLE_RATE
