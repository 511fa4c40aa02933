"""A stage-3 step on cached outputs of Q-Formers and C-Former, beside the same step with live encoders and formers.

    python benchmarks/stage3.py ../shared/data [repeats]

Untrained interfaces of tiny/stage3; for each kind of instruction 4 samples: photos, recordings, videos. Three ways: everything
live, encoder features cached as in stage 2, interface outputs cached as in stage 3. One thread, process time of a step with the
making of its batch, in bfloat16 where the processor has it, the minimum of interleaved repeats.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from x2l import optim, stages
from x2l.config import TrainConfig, load_train_config
from x2l.data.collate import Collator
from x2l.data.feed import open_feed
from x2l.train import forward

ENCODER = "x2l:tiny/asr/final/encoder.safetensors"  # the one that ships
KINDS = {
    "photo": ("flickr8k/val-*.tar", {"caption": {"num": 1}}),
    "recording": ("speechocean762/test-*.tar", {"asr": {}}),
    "video": ("grid-s1/test-*.tar", {"lips": {}}),
}


def step(cfg: TrainConfig, model: Any, batch_of: Callable[[], Any]) -> float:
    """Seconds of process time: make a batch, forward and backward, in the recipe's precision."""
    model.train().zero_grad(set_to_none=True)
    start = time.process_time()
    forward(cfg, model, batch_of()).loss_sum.backward()
    return time.process_time() - start


def main(data_root: str, repeats: int = 3, num: int = 4) -> None:
    torch.set_num_threads(1)
    cfg = load_train_config(
        "tiny/stage3", [f"data_root={data_root}", "init={}", f"model.modalities.speech.encoder.weights={ENCODER}"]
    )
    built = stages.build(cfg.model, dtype=stages.compute_dtype(cfg), attention="eager")
    optim.select(built.model, cfg.trainable)
    collator = Collator(built.renderer, built.processors, built.decoders, built.decode)
    modalities: dict[str, Any] = dict(built.model.modalities.items())
    layers = {name: len(modality.interface) - 1 for name, modality in modalities.items()}
    with tempfile.TemporaryDirectory() as folder, patch.object(stages, "cache_dir", lambda: Path(folder)):
        for kind, (path, tasks) in KINDS.items():
            source = cfg.data[0].model_copy(update={"path": path, "tasks": tasks})
            samples = [sample for family in open_feed([source], data_root, num, 0).batch(0) for sample in family]
            times: dict[str, list[float]] = {"live": [], "encoder": [], "interface": []}
            for _ in range(repeats + 1):
                for way, taken in times.items():
                    for name, modality in modalities.items():
                        modality.freeze(layers[name] if way == "interface" else 0)
                    fetch = {
                        name: stages.viewed(stages.feature_cache(cfg, name, modality, collator), cfg, None)
                        for name, modality in modalities.items()
                        if way != "live"
                    }
                    taken.append(step(cfg, built.model, partial(collator.train, samples, fetch)))
            live, encoder, interface = (min(taken[1:]) for taken in times.values())  # the first round fills the caches
            print(
                f"{kind:10} {live:6.2f} s live   {encoder:6.2f} s encoder cached   {interface:6.2f} s interface cached: "
                f"{live / interface:.2f} and {encoder / interface:.2f} times as fast",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
