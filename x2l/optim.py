"""Parameter groups by glob, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


def select(module: nn.Module, trainable: Mapping[str, float]) -> dict[str, float]:
    """Parameter name -> peak learning rate for everything that the globs match; the rest is frozen.

    A parameter takes the rate of the last glob that matches it.

    Raises:
        ValueError: a glob matches no parameter; the message shows names that exist.
    """
    names = [name for name, _ in module.named_parameters()]
    rates: dict[str, float] = {}
    for glob, rate in trainable.items():
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            tops = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ValueError(f"trainable: {glob!r} matches no parameter; the model has {', '.join(tops[:12])} ...")
        rates |= dict.fromkeys(matched, rate)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in rates)
    return rates


def adamw(module: nn.Module, rates: Mapping[str, float], betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the selected parameters: weight decay on matrices alone, not on biases, norms and query embeddings."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if name in rates:
            decayed = parameter.ndim > 1 and not name.endswith("queries")
            groups.setdefault((rates[name], decayed), []).append(parameter)
    table: list[dict[str, Any]] = [
        {"params": params, "lr": lr, "peak": lr, "weight_decay": weight_decay if decayed else 0.0}
        for (lr, decayed), params in groups.items()
    ]
    return torch.optim.AdamW(table, betas=betas, fused=True)


def cosine(step: int, total: int, warmup: int, start: float = 0.0, final: float = 0.0) -> float:
    """Factor of the peak rate: linear from ``start`` over ``warmup`` steps, then half a cosine down to ``final``."""
    if step < warmup:
        return start + (1 - start) * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def tri_stage(step: int, total: int, warmup: int, hold: int, start: float = 0.0, final: float = 0.0) -> float:
    """Factor of the peak rate: linear warm-up, hold, then exponential decay to ``final`` (> 0) at ``total``."""
    if step < warmup:
        return start + (1 - start) * (step + 1) / warmup
    if step < warmup + hold:
        return 1.0
    progress = (step - warmup - hold) / max(1, total - warmup - hold)
    return math.exp(min(1.0, progress) * math.log(final))


def schedule(step: int, total: int, name: str, warmup: int, hold: int, start: float, final: float) -> float:
    """The factor at ``step`` of the named schedule (cosine or tri_stage)."""
    if name == "cosine":
        return cosine(step, total, warmup, start, final)
    return tri_stage(step, total, warmup, hold, start, final or 0.01)


def scale_gradients(optimizer: torch.optim.Optimizer, num_tokens: int, clip: float) -> float:
    """Turn summed gradients into those of the mean over ``num_tokens``, clip them, and return their norm before clipping."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter in params:
        parameter.grad.div_(num_tokens)
    return float(nn.utils.clip_grad_norm_(params, clip))
