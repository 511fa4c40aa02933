"""The loop on tiny random models: exact resume, frozen parts, faults that it must survive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model, write_shard
from safetensors.torch import load_file

from x2l import checkpoint, train
from x2l.config import TrainConfig, load_train_config
from x2l.train import TrainError


@pytest.fixture
def recipe(tmp_path: Path, llm_folder: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    data = {"path": "flickr8k/train-*.tar", "tasks": {"caption": {}, "caption_qa": {}}, "licence": "made by the test"}
    path.write_text(
        yaml.safe_dump(
            {
                "model": tiny_model(llm_folder),
                "trainable": {"modalities.image.interface.*": 1e-2},
                "data": [data],
                "val": [{**data, "path": "flickr8k/val-*.tar"}],
                "data_root": str(photo_root),
                "run": str(tmp_path / "run"),
                "steps": 6,
                "batch_size": 3,
                "accumulate": 2,
                "save_every": 2,
                "val_every": 3,
                "views": 2,
                "schedule": {"warmup_steps": 2},
            }
        )
    )
    return path


def config(recipe: Path, **changes: Any) -> TrainConfig:
    return load_train_config(str(recipe), [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_export_says_where_it_comes_from(recipe: Path, tmp_path: Path) -> None:
    folder = train.train(config(recipe, steps=15, save_every=15))
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3]) - 1  # nats a token, summed over three steps
    assert metrics(tmp_path / "run")[2].keys() >= {"step", "loss", "lr", "grad_norm", "val_loss"}
    from x2l.build import build, load_strict

    built = build(config(recipe).model)
    history = load_strict(built.model.modalities["image"].interface, folder / "image.safetensors")
    assert history["steps"] == 15
    assert history["recipe"]["data"][0]["licence"] == "made by the test"
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(("stop_at", "ema"), [(1, 0.0), (3, 0.0), (4, 0.0), (3, 0.9)])
def test_resumed_equals_uninterrupted_bit_for_bit(recipe: Path, tmp_path: Path, stop_at: int, ema: float, monkeypatch: Any) -> None:
    straight = train.train(config(recipe, run=str(tmp_path / "straight"), ema=ema, keep_start={"*": ema / 2} if ema else {}))
    real, calls = train.forward, []

    def crash(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 2 * stop_at + 1:  # in the middle of an accumulation
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "forward", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(recipe, run=str(tmp_path / "broken"), ema=ema, keep_start={"*": ema / 2} if ema else {}, val_every=100))
    monkeypatch.setattr(train, "forward", real)
    resumed = train.train(config(recipe, run=str(tmp_path / "broken"), ema=ema, keep_start={"*": ema / 2} if ema else {}))
    a, b = load_file(straight / "image.safetensors"), load_file(resumed / "image.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    drop = ("val_loss",)
    rows = [[{k: v for k, v in r.items() if k not in drop} for r in metrics(tmp_path / n)] for n in ("straight", "broken")]
    assert rows[0] == rows[1]


def test_the_average_is_what_is_validated_and_exported() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    average, seen = train.Average(layer, decay=0.5), []
    with torch.no_grad():
        layer.weight.zero_()
        average.weights["weight"].zero_()
        for step in range(20):
            layer.weight.fill_(step + 1)
            average.update(step)
            seen.append(layer.weight[0, 0].item())
    slow = 0.0
    for step, value in enumerate(seen):
        slow += (1 - min(0.5, (1 + step) / (10 + step))) * (value - slow)
    with average.applied():
        assert layer.weight[0].tolist() == pytest.approx([slow, slow])
    assert layer.weight[0].tolist() == [20, 20]


def test_nothing_frozen_changes_and_only_the_globs_train(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.nn.Module] = []
    real = train.optim.select
    monkeypatch.setattr(train.optim, "select", lambda model, globs: (seen.append(model), real(model, globs))[1])
    train.train(config(recipe, trainable={"modalities.image.interface.1.*": 1e-2}))
    trained = {name for name, p in seen[0].named_parameters() if p.requires_grad}
    assert trained == {"modalities.image.interface.1.linear.weight", "modalities.image.interface.1.linear.bias"}


def test_a_changed_buffer_stops_the_export(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.forward

    def leaky(cfg: TrainConfig, model: Any, batch: Any) -> Any:
        model.modalities["image"].encoder.offset.add_(1)
        return real(cfg, model, batch)

    monkeypatch.setattr(train, "forward", leaky)
    with pytest.raises(TrainError, match="frozen parameter or buffer changed"):
        train.train(config(recipe, steps=1))


def test_a_glob_that_matches_nothing_is_an_error(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"'modalities.imgae.\*' matches no parameter; the model has .*modalities.image"):
        train.train(config(recipe, trainable={"modalities.imgae.*": 1e-3}))


def test_another_learning_rate_does_not_resume(recipe: Path) -> None:
    train.train(config(recipe, steps=2))
    with pytest.raises(TrainError, match="another recipe"):
        train.train(config(recipe, steps=2, trainable={"modalities.image.interface.*": 1e-3}))


def test_a_second_trainer_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with train.exclusive(tmp_path / "run"), pytest.raises(TrainError, match="in use by another trainer"):
        train.train(config(recipe))


def test_not_a_number_changes_nothing_and_three_end_the_run(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real, calls = train.forward, []

    def poisoned(*args: Any) -> Any:
        output = real(*args)
        calls.append(1)
        if len(calls) > 4:
            output.loss_sum = output.loss_sum * float("nan")
        return output

    monkeypatch.setattr(train, "forward", poisoned)
    with pytest.raises(TrainError, match="not finite for 3 steps"):
        train.train(config(recipe, val_every=100, save_every=1))
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        tensors, _ = checkpoint.load(path)
        assert all(bool(t.isfinite().all()) for t in tensors["model"].values())


def test_corrupt_photos_are_counted_and_too_many_stop_the_run(recipe: Path, photo_root: Path, tmp_path: Path) -> None:
    from conftest import picture

    fields = json.dumps({"en": ["A dog ."] * 5}).encode()
    rows = {f"k{i}": {"png": picture((i, 0, 0)), "json": fields} for i in range(30)}
    rows |= {"bad-json": {"png": picture((0, 1, 0)), "json": b"{"}}
    write_shard(tmp_path / "mixed" / "train-0000.tar", rows)
    source = [{"path": "mixed/train-*.tar", "tasks": {"caption": {}}, "licence": "test"}]
    train.train(config(recipe, data_root=str(tmp_path), data=source, val=[], steps=6))
    assert metrics(tmp_path / "run")[-1]["bad_rows"] == 1


def test_sigterm_saves_the_last_finished_step(recipe: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    main = "from x2l.cli import main; main()"
    command = [sys.executable, "-c", main, "train", str(recipe), "steps=100000", "save_every=100000", "val=[]"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    newest = checkpoint.complete(tmp_path / "run" / "checkpoints")[0]
    assert checkpoint.load(newest)[1]["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_what_it_started_from_can_be_half_of_what_is_exported(recipe: Path, tmp_path: Path) -> None:
    """The mean of the weights before and after; a resumed run knows where it began, see above."""
    before, half, after = (
        load_file(train.train(config(recipe, run=str(tmp_path / str(share)), keep_start={"*image*": share})) / "image.safetensors")
        for share in (1.0, 0.5, 0.0)
    )
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name in after:
        torch.testing.assert_close(half[name].float(), (before[name].float() + after[name].float()) / 2, atol=2e-3, rtol=2e-3)
    with pytest.raises(
        ValueError, match=r"keep_start: 'modalities\.sound\.\*' matches none of the trained parameters, such as modal"
    ):
        train.train(config(recipe, run=str(tmp_path / "none"), keep_start={"modalities.sound.*": 0.5}))


@pytest.mark.parametrize(("num_batches", "expected"), [(3, [[0], [1], [2]]), (9, [[0], [1], [2], [3]])])
def test_features_are_computed_ahead_for_no_more_than_the_run_sees(num_batches: int, expected: list[list[int]]) -> None:
    class Four:
        def __len__(self) -> int:
            return 4

        def batch(self, step: int) -> list[int]:
            return [step]

    seen: list[Any] = []
    stage: Any = SimpleNamespace(collate=lambda families, step: seen.append(families))
    train.fill_cache(stage, Four(), num_batches)  # type: ignore[arg-type]
    assert seen == expected
