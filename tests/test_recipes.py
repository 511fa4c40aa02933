"""Every shipped recipe is parsed, and every training recipe takes two real steps on tiny random models."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_model
from torch import nn

from x2l import train, words
from x2l.build import build, load_strict
from x2l.config import RECIPES, ModelConfig, load_model_config, load_train_config, shipped
from x2l.modalities import MODALITIES
from x2l.weights import resolve

STAGES = [name for name in shipped() if not name.startswith("models/")]
ELSEWHERE = ("speech", "asr", "match", "video", "audio", "stage3", "all")  # test_{speech_stages,video,audio_events,stage3,...}.py


@pytest.mark.parametrize("name", shipped("models"))
def test_models(name: str) -> None:
    cfg = load_model_config(name)
    assert cfg.modalities


@pytest.mark.parametrize("name", [name for name in STAGES if not any(word in name for word in ELSEWHERE)])
def test_image_stages_step_twice(
    name: str, llm_folder: Path, photo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    load_train_config(name)
    raw: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    source = next(s for s in raw["data"] if "caption" in s["tasks"])
    shrunk = raw | {
        "model": tiny_model(llm_folder),
        "init": {},
        "data": [source | {"path": "flickr8k/train-*.tar"}],
        "val": [source | {"path": "flickr8k/val-*.tar"}],
        "data_root": str(photo_root),
        "run": str(tmp_path / "run"),
        "steps": 2,
        "epochs": None,
        "batch_size": 2,
        "accumulate": min(2, raw.get("accumulate", 1)),
        "val_every": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(shrunk))
    monkeypatch.setattr(words.vocabulary, "__defaults__", (1,))
    folder = train.train(load_train_config(str(tmp_path / "recipe.yaml")))
    assert (folder / ("qformer.safetensors" if raw.get("stage") == "blip2" else "image.safetensors")).is_file()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_shipped_weights_fit_the_default_model_strictly() -> None:
    """Without the LLM and the encoders, of which the widths are enough: 576, and 288 or 1280."""
    parts = load_model_config("tiny").modalities
    for name, part in parts.items():
        assert part.weights is not None
        layers = nn.Sequential(*MODALITIES[name].interface(288 if name == "speech" else 1280, 576, 0.1, **part.interface))
        load_strict(layers, resolve(part.weights))
    assert parts["video"].weights == parts["image"].weights  # and each frame is read as a picture (test_video.py)
    assert sum(resolve(weights).stat().st_size for weights in {str(part.weights) for part in parts.values()}) < 100e6


def test_a_checkpoint_with_missing_or_extra_keys_is_refused(llm_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cfg = tiny_model(llm_folder)
    state = build(ModelConfig.model_validate(cfg)).model.modalities["image"].interface.state_dict()
    del state["1.linear.bias"]
    state["surplus"] = state["0.queries"].clone()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    image = cfg["modalities"]["image"] | {"weights": str(tmp_path / "w.safetensors")}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"missing \['1.linear.bias'\], extra \['surplus'\]"):
        build(ModelConfig.model_validate(cfg | {"modalities": {"image": image}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"name": "efficientnet"}}, "unknown encoder 'efficientnet': use one of .*efficientnet_lite0"),
        ({"encoder": {"name": "conftest:nothing"}}, "cannot be imported"),
        ({"interface": {"widht": 3}}, "modalities.image.interface: .*widht"),
        ({"type": "smell"}, "unknown modality 'smell': use one of image"),
    ],
)
def test_wrong_parts_are_named(change: dict[str, Any], message: str, llm_folder: Path) -> None:
    cfg = tiny_model(llm_folder)
    image = cfg["modalities"]["image"] | change  # type: ignore[index]
    with pytest.raises(ValueError, match=message):
        build(ModelConfig.model_validate(cfg | {"modalities": {"image": image}}))


def test_a_cformer_starts_from_bert(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    from x2l.build import initialise
    from x2l.interfaces.cformer import CFormer

    bert = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    save_file(bert.state_dict(), tmp_path / "bert.safetensors")
    cformer = CFormer(16, width=16, depth=1, heads=2)
    initialise(cformer, f"bert:{tmp_path / 'bert.safetensors'}")
    theirs = bert.encoder.layer[0].output.dense.weight
    assert any(p.shape == theirs.shape and torch.equal(p, theirs) for p in cformer.parameters())


def test_a_qformer_goes_on_before_another_llm(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from x2l.build import initialise
    from x2l.modalities.image import interface

    shape = {"width": 16, "depth": 1, "heads": 2, "num_queries": 3}
    before, after = (torch.nn.Sequential(*interface(8, width, 0.02, **shape)) for width in (24, 40))
    save_file(before.state_dict(), tmp_path / "image.safetensors")
    initialise(after[0], f"qformer:{tmp_path / 'image.safetensors'}")
    assert all(torch.equal(p, q) for p, q in zip(before[0].parameters(), after[0].parameters(), strict=True))
    wider = torch.nn.Sequential(*interface(8, 24, 0.02, **(shape | {"num_queries": 5})))
    with pytest.raises(ValueError, match=r"another shape: \['queries'\]"):
        initialise(wider[0], f"qformer:{tmp_path / 'image.safetensors'}")


@pytest.mark.parametrize(("has_it", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_bf16_is_used_where_the_processor_has_it(has_it: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from x2l.stages import compute_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # as it answers on any AVX-512
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cfg = load_train_config("tiny/stage2_image")
    assert str(compute_dtype(cfg)) == f"torch.{expected}"
    assert compute_dtype(cfg.model_copy(update={"precision": "fp32"})) == torch.float32
