"""A stage-2 step with and without what `XLLM.forward` saves: the prefix that all rows share, and the loss in blocks of logits.

    python benchmarks/stage2.py ../shared/data [repeats]

The first batch of tiny/stage2_image with the LLM's own system prompt. One thread, process time, the minimum of interleaved
repeats; ratios hold across machines, times do not.
"""

from __future__ import annotations

import sys
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F

from x2l import optim
from x2l.config import load_train_config
from x2l.data.feed import open_feed
from x2l.stages import STAGES
from x2l.train import forward


def main(data_root: str, repeats: int = 4) -> None:
    torch.set_num_threads(1)
    overrides = [f"data_root={data_root}", "model.template.system=null", "init={}"]
    cfg = load_train_config("tiny/stage2_image", overrides)
    stage = STAGES[cfg.stage](cfg)
    optim.select(stage.model, cfg.trainable)
    feed = open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed)
    batch = stage.collate(feed.batch(0), None)

    def step() -> tuple[float, float]:
        torch.manual_seed(0)
        stage.model.train().zero_grad(set_to_none=True)
        start = time.process_time()
        output = forward(cfg, stage.model, batch)
        output.loss_sum.backward()
        return time.process_time() - start, float(output.loss_sum.detach())

    def plain() -> tuple[float, float]:
        whole = lambda head, hidden, labels: F.cross_entropy(head(hidden).float(), labels, reduction="sum")  # noqa: E731
        with patch("x2l.model.common_prefix", lambda batch: 0), patch("x2l.model.head_loss", whole):
            return step()

    rounds = [(plain(), step()) for _ in range(repeats + 1)][1:]  # the first round warms up
    (before, loss), (after, same) = (min(times) for times in zip(*rounds, strict=True))
    print(f"{len(batch.input_ids)} photos: {before:.2f} s plain, {after:.2f} s, {1 - after / before:.0%} less")
    print(f"loss {loss:.2f} and {same:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
