"""What a stage trains: a model that maps a batch to an `Output`, and the way from samples to such a batch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x2l.build import build, initialise
from x2l.checkpoint import frozen_digest
from x2l.config import TrainConfig
from x2l.data.cache import FeatureCache
from x2l.data.collate import Collator
from x2l.modality import Modality
from x2l.types import Media, Sample
from x2l.weights import cache_dir

Families = list[list[Sample]]  # the samples of each record of a batch


@dataclass
class Stage:
    """A model, ``collate(families, step) -> batch`` (step None: no augmentation), and what is handed on in the end."""

    model: nn.Module
    collate: Callable[[Families, int | None], Any]
    export: Callable[[], dict[str, dict[str, Tensor]]]  # file stem -> tensors


def xllm_stage(cfg: TrainConfig) -> Stage:
    """Stages 2 and 3: interfaces in front of the frozen LLM, encoder features from the cache."""
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    # On a CPU plain matmuls beat the fused kernel at these short lengths, 2.0 s against 2.5 s a step (dev/LOG.md).
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    built = build(cfg.model, cfg.fresh, dtype, attention)
    for prefix, source in cfg.init.items():
        initialise(built.model.get_submodule(prefix), source)
    collator = Collator(built.renderer, built.processors, built.decoders)
    caches = {name: feature_cache(cfg, name, built.model.modalities[name], collator) for name in cfg.model.modalities}

    def collate(families: Families, step: int | None) -> Any:
        fetch = {name: viewed(cache, cfg, step) for name, cache in caches.items()}
        return collator.train([sample for family in families for sample in family], fetch)

    def export() -> dict[str, dict[str, Tensor]]:
        return {
            name: modality.get_submodule("interface").state_dict()
            for name, modality in built.model.modalities.items()
            if is_trained(modality)
        }

    return Stage(built.model, collate, export)


STAGES: dict[str, Callable[[TrainConfig], Stage]] = {"xllm": xllm_stage}


def is_trained(module: nn.Module) -> bool:
    """True when any parameter of it is being trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def viewed(cache: FeatureCache, cfg: TrainConfig, step: int | None) -> Callable[[list[bytes]], list[Tensor]]:
    """A source of cached features that draws each item's view by seed and step; without a step, the item as it is."""
    rng = random.Random(f"{cfg.seed}/{step}")
    return lambda items: cache(items, [0 if step is None else rng.randrange(cfg.views) for _ in items])


def feature_cache(cfg: TrainConfig, name: str, modality: Any, collator: Collator) -> FeatureCache:
    """Features of one modality's frozen encoder, keyed by its weights and settings."""
    assert isinstance(modality, Modality)
    settings = cfg.model.modalities[name].encoder.model_dump_json()
    fingerprint = hashlib.sha256((settings + frozen_digest(modality.encoder)).encode()).hexdigest()

    def encode(items: list[bytes], view: int) -> list[Tensor]:
        features = modality.encode(Media(inputs=collator.process(name, items, mirror=view == 1)))
        return [x[:length] for x, length in zip(features.x, features.lengths.tolist(), strict=True)]

    return FeatureCache(cache_dir() / "features", fingerprint, encode)
