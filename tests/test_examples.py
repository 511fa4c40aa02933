"""The modality outside the package: loaded by its dotted path, trained, and talked with."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from x2l import train
from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import load_model_config, load_train_config
from x2l.data.media import MediaError
from x2l.data.tools import write_shards
from x2l.types import Part, Sample, user

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import robot_state

    return robot_state


def test_it_is_small() -> None:
    assert len((EXAMPLES / "robot_state.py").read_text(encoding="utf-8").splitlines()) < 80


def test_states_are_read_or_refused(robot: Any) -> None:
    state = dict.fromkeys(robot.CHANNELS, 0.5) | {"gripper": 3, "battery": float("nan")}
    assert robot.decode(json.dumps(state).encode()).tolist() == [0.5] * 6 + [1.0, 0.0]
    for wrong in (b"", b"[]", b"{}", json.dumps(state | {"joint 1": "bent"}).encode()):
        with pytest.raises(MediaError, match="a number for each of joint 1"):
            robot.decode(wrong)


def test_train_and_talk(robot: Any, llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    records = [robot.ask(f"s{i}", random.Random(i)) for i in range(8)]
    write_shards(iter(records), tmp_path / "data" / "robot", "train")
    raw = yaml.safe_load((EXAMPLES / "robot_state.yaml").read_text(encoding="utf-8"))
    load_train_config(str(EXAMPLES / "robot_state.yaml"))
    raw["model"]["llm"] = {"spec": str(llm_folder)}
    raw["model"]["modalities"]["state"]["interface"] = {"width": 16}
    raw |= {"data_root": str(tmp_path / "data"), "run": str(tmp_path / "run"), "epochs": None, "steps": 12, "batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    folder = train.train(load_train_config(str(tmp_path / "recipe.yaml")))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    raw["model"]["modalities"]["state"]["weights"] = str(folder / "state.safetensors")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(raw["model"]))
    model = Assistant(build(load_model_config(str(tmp_path / "model.yaml"))))
    question = user(Part("state", bytes=records[0].media["state"]), "Is the gripper open?")
    batch = model.collator.prompt([[question]])
    embeds = model.model.embed(batch).embeds
    assert embeds.shape[1] == batch.input_ids.shape[1] - 1 + len(robot.CHANNELS)
    assert torch.isfinite(embeds).all()
    assert isinstance(model.generate_text([Sample("q", (question,))], max_new_tokens=3)[0], str)


@pytest.mark.slow
def test_it_makes_its_data(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "robot_state.py", tmp_path], check=True)
    assert (tmp_path / "train-0000.tar").is_file()
