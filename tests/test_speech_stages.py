"""The speech recipes, shrunk to a tiny random LLM and Conformer, each starting from what the one before exported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from conftest import write_shard

from x2l import train
from x2l.config import RECIPES, load_train_config

ENCODER = {"name": "conformer", "num_mels": 8, "channels": 2, "width": 16, "ffn_width": 16, "num_heads": 2, "kernel": 3,
           "num_blocks": 2, "pool_after": [1]}  # fmt: skip

DECODER = {"ffn_width": 16, "num_heads": 2, "num_blocks": 3}


@pytest.fixture(scope="module")
def speech_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noises that are said to be words."""
    root, rng, rows = tmp_path_factory.mktemp("speech"), np.random.default_rng(0), {}
    for i, text in enumerate(["GO ON", "I DO", "TELL HIM", "SIT"]):
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * rng.standard_normal(16_000 + 900 * i), 16_000, format="WAV")
        rows[f"u{i}"] = {"wav": buffer.getvalue(), "json": json.dumps({"text": text, "spk": i}).encode()}
    write_shard(root / "shard-0000.tar", rows)
    return root


def shrunk(name: str, llm: Path, data: Path, run: Path, init: dict[str, str]) -> Path:
    raw: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    words = {"vocabulary": "[ a-z']", "table": str(run.parent / "stage1_asr/final/decoder.safetensors")}
    former = {"reader": DECODER, "words": words} if name.startswith("tiny") else {"width": 16, "depth": 1, "heads": 2}
    interface = {"listener": {"width": 16, "num_heads": 2, "kernel": 3, "parts": 2}, **former}
    raw["model"] = {"llm": {"spec": str(llm)}, "modalities": {"speech": {"encoder": ENCODER, "interface": interface}}}
    if "stage_args" in raw:
        raw["stage_args"] |= {"vocabulary": "[ a-z']"}
    if "decoder" in raw.get("stage_args", {}):
        raw["stage_args"] |= {"moonshine": False}
        raw["stage_args"]["decoder"] |= DECODER
    raw["trainable"] = {glob.replace("network.layers.[2345]", "*"): rate for glob, rate in raw["trainable"].items()}
    source = raw["data"][0] | {"path": "shard-*.tar", "tasks": {"asr": {"lang": "en"}}, "holdout": None}
    raw["val"] = [source | {"holdout": {"field": "spk", "percent": 50, "part": "held_out"}}]
    raw |= {"data": [source], "data_root": str(data), "run": str(run), "init": init, "steps": 2, "epochs": None}
    raw |= {"batch_size": 2, "accumulate": 1, "schedule": {"name": raw["schedule"]["name"], "final": 0.1}}
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("size", ["tiny", "bilingual", "paper"])
def test_each_stage_starts_from_the_one_before(
    size: str, llm_folder: Path, speech_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))

    def run(name: str, **init: str) -> Path:
        load_train_config(f"{size}/{name}")
        places = {key.replace("__", "."): value.rpartition(":") for key, value in init.items()}
        folders = {key: f"{kind}{colon}{tmp_path / path}" for key, (kind, colon, path) in places.items()}
        return train.train(load_train_config(str(shrunk(f"{size}/{name}", llm_folder, speech_root, tmp_path / name, folders))))

    first = run("stage1_asr")
    assert {path.stem for path in first.iterdir()} >= {"listener", "decoder", "ctc_head"}
    assert (first / "encoder.safetensors").exists() == (size != "bilingual")
    if size == "tiny":
        last = run(
            "stage2_speech",
            modalities__speech__interface__0="stage1_asr/final/listener.safetensors",
            modalities__speech__interface__1="decoder:stage1_asr/final/decoder.safetensors",
        )
    elif size == "bilingual":
        matched = run("stage2_match", modality__interface__0="stage1_asr/final/listener.safetensors")
        assert (matched / "speech.safetensors").is_file()
        last = run("stage2_speech", modalities__speech__interface="stage2_match/final/speech.safetensors")
    else:
        last = run(
            "stage2_speech",
            modalities__speech__encoder="stage1_asr/final/encoder.safetensors",
            modalities__speech__interface__0="stage1_asr/final/listener.safetensors",
        )
    assert (last / "speech.safetensors").is_file()
