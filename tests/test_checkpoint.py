"""Checkpoints that survive crashes: the newest complete one wins, and an altered one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from x2l import checkpoint
from x2l.checkpoint import CheckpointError


def save(folder: Path, step: int, keep: int = 5) -> Path:
    return checkpoint.save(folder, step, {"model": {"w": torch.full((4,), float(step))}}, {"step": step}, keep)


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    newest, *rest = checkpoint.complete(tmp_path)
    assert [newest.name, *(p.name for p in rest)] == ["step-00000003", "step-00000002"]
    tensors, state = checkpoint.load(newest)
    assert tensors["model"]["w"].tolist() == [3.0] * 4
    assert state == {"step": 3}


@pytest.mark.parametrize("damage", ["empty", "truncated", "altered", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    file = bad / ("manifest.json" if damage == "manifest" else "model.safetensors")
    blob = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "truncated": blob[:-1], "manifest": b"{}"}.get(damage, blob[:-1] + b"\x55"))
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000001"]
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoint.load(bad)
    assert checkpoint.load(save(tmp_path, 2))[1] == {"step": 2}


def test_a_full_disk_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002: .*No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_staging_stays_beside_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    save(tmp_path / "run", 1)
    assert not (tmp_path / "elsewhere").exists()


def test_frozen_digest_sees_parameters_and_buffers() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).requires_grad_(False)
    before = checkpoint.frozen_digest(net)
    assert checkpoint.frozen_digest(net) == before
    net[1].running_mean.add_(1)
    assert checkpoint.frozen_digest(net) != before
