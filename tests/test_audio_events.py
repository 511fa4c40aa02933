"""Sound as a modality: spectra, the interface, the task, the reading of answers, and the controls."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import tiny_model, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l import train
from x2l.build import build
from x2l.config import RECIPES, ModelConfig, load_train_config
from x2l.data.media import decode_audio
from x2l.data.sources import DataError, Record, read_source
from x2l.data.tasks import sound
from x2l.eval import questions, tasks
from x2l.eval.controls import CONTROLS
from x2l.eval.events import read_answer
from x2l.eval.predict import predict
from x2l.modalities.audio import SIDE, SpectrumProcessor, spectrum
from x2l.types import Media, Part, Sample

RATE = 16_000
INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}
CLASSES = ["a baby crying", "a clock ticking", "a person sneezing", "dog barking", "rain", "sea waves"]


def tone(hertz: float, seconds: float = 1.0, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV")
    return buffer.getvalue()


def test_pitch_goes_up_and_time_to_the_right() -> None:
    low, high = (np.asarray(spectrum(tone(hertz)))[..., 0] for hertz in (300.0, 3000.0))
    assert low.shape == (SIDE, SIDE)
    assert high.mean(1).argmax() < low.mean(1).argmax()  # row 0 is the top
    late = np.asarray(spectrum(np.concatenate([np.zeros(RATE, np.float32), tone(1000.0)])))[..., 0]
    assert late[:, : SIDE // 3].mean() < late[:, -SIDE // 3 :].mean()


def test_loudness_does_not_matter_but_silence_is_black() -> None:
    loud, quiet = (np.asarray(spectrum(tone(700.0, level=level)), float) for level in (0.5, 0.02))
    assert np.abs(loud - quiet).mean() < 2
    for nothing in (np.zeros(RATE, np.float32), np.zeros(0, np.float32), 1e-7 * tone(500.0)):
        assert np.asarray(spectrum(nothing)).max() == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 23 * RATE))
def test_windows_are_about_five_seconds(num_samples: int) -> None:
    seen: list[Any] = []

    def processor(pictures: list[Any]) -> dict[str, torch.Tensor]:
        seen.extend(pictures)
        return {"pixels": torch.zeros(len(pictures))}

    inputs = SpectrumProcessor(processor)([np.zeros(num_samples, np.float32)])
    (num,) = inputs["num_frames"].tolist()
    assert num == len(seen) == max(1, round(num_samples / RATE / 5))
    assert inputs["which"].tolist() == list(range(num))


def test_a_sound_does_not_depend_on_the_batch(llm_folder: Path) -> None:
    audio = tiny_model(llm_folder)["modalities"]["image"]  # type: ignore[index]
    built = build(ModelConfig.model_validate(tiny_model(llm_folder, audio=audio)))
    modality, processor = built.model.modalities["audio"], built.processors["audio"]
    sounds = [tone(500.0, 12.0), tone(2000.0, 3.0)]
    together = modality(Media(inputs=processor(sounds)))
    assert together.lengths.tolist() == [2 * 4, 1 * 4]
    for i, one in enumerate(sounds):
        alone = modality(Media(inputs=processor([one])))
        torch.testing.assert_close(together.x[i, : alone.lengths[0]], alone.x[0], atol=1e-6, rtol=1e-5)


def test_the_task() -> None:
    record = Record("r", {"en": "dog barking", "zh": "狗叫"}, {"wav": b"RIFF"})
    (sample,) = sound(record, random.Random(0))
    assert [part.type for part in sample.media] == ["audio"]
    assert sample.messages[-1].text == "Dog barking."
    assert sound(record, random.Random(0), "zh")[0].messages[-1].text == "狗叫。"
    with pytest.raises(DataError, match="no class of sound in 'fr'"):
        sound(record, random.Random(0), "fr")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A dog barking.", "dog barking"), ("I hear a baby that is crying loudly", "a baby crying"), ("Rain.", "rain"),
        ("A dog.", ""), ("Rain and sea waves", ""), ("", ""), ("A training dog barking", "dog barking"), ("trains", ""),
    ],
)  # fmt: skip
def test_an_answer_names_one_class_or_none(answer: str, expected: str) -> None:
    assert read_answer(answer, CLASSES) == expected


def test_chinese_answers() -> None:
    assert read_answer("这是狗叫的声音。", ["狗叫", "下雨"]) == "狗叫"
    assert read_answer("狗叫和下雨", ["狗叫", "下雨"]) == ""


def records(num: int = 12) -> list[Record]:
    return [Record(f"r{i}", {"en": CLASSES[i % 6]}, {"wav": wav(tone(200.0 + 50 * i, 0.3))}) for i in range(num)]


class Hears:
    """Answers by the length of nothing and the identity of the sound: right wherever it hears the original."""

    def __init__(self, truth: dict[bytes, str]):
        self.truth = truth

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        return [f"It is {self.truth.get(sample.media[0].bytes or b'', 'nothing')}." for sample in samples]


def test_accuracy_and_its_controls(tmp_path: Path) -> None:
    asked = questions.sound(records())
    assert {sample.messages[0].text for sample in asked} == {"What do you hear?"}
    model = Hears({part.bytes or b"": sample.meta["references"][0] for sample in asked for part in sample.media})
    results = {}
    for control in (None, "wrong-sound", "silence"):
        run = predict(model, asked, tmp_path / str(control), task="sound", model_info=INFO, control=control)
        results[control] = {name: score["value"] for name, score in tasks.score(run)["scores"].items()}
    assert results[None] == {"accuracy": 100.0, "no class": 0.0}
    assert results["wrong-sound"] == {"accuracy": 0.0, "no class": 0.0}  # never the same class
    assert results["silence"] == {"accuracy": 0.0, "no class": 100.0}


def test_silence_is_silent() -> None:
    (sample,) = CONTROLS["silence"](questions.sound(records(1)), lambda part: "", 0)
    assert np.abs(decode_audio(sample.media[0].bytes or b"")).max() == 0
    assert len(decode_audio(sample.media[0].bytes or b"")) == 5 * RATE


def test_the_recipe_steps_twice(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    load_train_config("tiny/stage2_audio")
    raw: dict[str, Any] = yaml.safe_load((RECIPES / "tiny/stage2_audio.yaml").read_text(encoding="utf-8"))
    audio = tiny_model(llm_folder)["modalities"]["image"]  # type: ignore[index]
    raw["model"] = tiny_model(llm_folder, audio=audio)
    rows = {r.key: {**r.media, "json": json.dumps(r.fields | {"fold": 1}).encode()} for r in records(6)}
    write_shard(tmp_path / "data/esc10/train-0000.tar", rows)
    raw |= {
        "data_root": str(tmp_path / "data"),
        "run": str(tmp_path / "run"),
        "init": {},
        "steps": 3,
        "epochs": None,
        "batch_size": 4,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    folder = train.train(load_train_config(str(tmp_path / "recipe.yaml")))
    assert (folder / "audio.safetensors").is_file()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3]


ESC10 = Path(__file__).parents[2] / "shared/data/esc10"


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs ../shared/data/esc10")
def test_esc10_is_asked_about_in_its_ten_classes() -> None:
    asked = questions.sound(read_source(str(ESC10 / "test-*.tar")))
    (classes,) = {tuple(sample.meta["classes"]) for sample in asked}
    assert len(classes) == 10
    for name in classes:
        assert read_answer(f"I think it is {name}.", classes) == name
    assert all(isinstance(part, Part) and part.type == "audio" for sample in asked for part in sample.media)
