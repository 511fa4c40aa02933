"""Checkpoints: what we own as safetensors, the rest as JSON, a manifest over all; the newest complete one wins.

A checkpoint is a folder ``step-00000123``. It is written beside its target, synced, and renamed, so that a reader sees it
whole or not at all; every file's size and sha256 stand in manifest.json and are checked before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from x2l.types import RunError

log = logging.getLogger(__name__)


class CheckpointError(RunError):
    """A checkpoint that cannot be written, or that is not what it says."""


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``folder/step-N`` atomically, then delete all but the newest ``keep``.

    Args:
        tensors: file stem -> tensors by name.
        state: JSON-serialisable rest.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    if target.exists() and _problem(target) is None:
        return target
    partial = folder / f".{target.name}.{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for stem, named in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, partial / f"{stem}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1))
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write {target}: {error}") from error
    for old in complete(folder)[keep:]:
        shutil.rmtree(old)
    return target


def complete(folder: Path) -> list[Path]:
    """Checkpoints that match their manifests, newest first; others are reported and passed over."""
    found = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(path)
        if problem:
            log.warning("%s is passed over: %s", path, problem)
        else:
            found.append(path)
    return found


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file stem, and the state.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    problem = _problem(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors: ``index.name``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; parameter groups stay those of ``optimizer``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def frozen_digest(module: nn.Module) -> str:
    """sha256 over every frozen parameter and every buffer outside trained modules: equal before and after training."""
    trained = {name.rsplit(".", 1)[0] for name, p in module.named_parameters() if p.requires_grad}
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    tensors |= {name: b for name, b in module.named_buffers() if name.rsplit(".", 1)[0] not in trained}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            file = path / name
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{name} is not what the manifest says"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no valid manifest or file ({error})"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
