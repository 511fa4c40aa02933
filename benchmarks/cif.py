"""CIF against torch-cif on the same frames: peer, ours, ratio and goal, in one run.

    python benchmarks/cif.py [repeats]

One thread, process time, the minimum of interleaved repeats; ratios hold across machines, times do not. Each turn runs
three times, so that neither side pays for memory that the other has handed back to the system.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch_cif import cif_function

from x2l.interfaces.cif import cif

WIDTH = 512
SHAPES = [(items, frames) for items in (1, 8, 32) for frames in (128, 512, 2048)]
GOALS = {"forward": {(8, 512): 7.0, (32, 2048): 15.0}, "both ways": {(8, 512): 8.0, (8, 2048): 12.0}}  # elsewhere 1


def utterances(items: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, weights of 0.3 on average (speech at 12.5 frames a second), and lengths."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, frames, WIDTH, generator=generator)
    alpha = torch.sigmoid(torch.randn(items, frames, generator=generator) - 1)
    return x, alpha, torch.full((items,), frames)


def compare(what: str, goal: float, repeats: int, peer: Callable[[], object], ours: Callable[[], object]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, spent in zip((peer, ours), times, strict=True):
            for _ in range(3):
                start = time.process_time()
                run()
                spent.append(time.process_time() - start)
    before, after = (1e3 * min(spent) for spent in times)
    print(f"{what:<36} {before:8.2f} ms {after:8.2f} ms {before / after:6.1f}x  goal {goal:4.1f}x", flush=True)


def speed(items: int, frames: int, repeats: int) -> None:
    x, alpha, lengths = utterances(items, frames)
    padding = torch.zeros(items, frames, dtype=torch.bool)

    def run_peer() -> Tensor:
        return cif_function(x, alpha, padding_mask=padding)["cif_out"][0]

    def run_ours() -> Tensor:
        return cif(x, alpha, lengths).x

    assert torch.allclose(run_peer(), run_ours(), atol=1e-2)
    repeats = max(3, repeats * min(32, 32 * 2048 // (items * frames)))
    goal = {kind: goals.get((items, frames), 1.0) for kind, goals in GOALS.items()}
    compare(f"{items:2} x {frames:4} x {WIDTH} forward", goal["forward"], repeats, run_peer, run_ours)
    grad = torch.randn_like(run_ours())
    x.requires_grad_()
    alpha.requires_grad_()

    def train(run: Callable[[], Tensor]) -> None:
        x.grad = alpha.grad = None
        run().backward(grad)

    compare(f"{items:2} x {frames:4} x {WIDTH} forward + backward", goal["both ways"], repeats,
            lambda: train(run_peer), lambda: train(run_ours))  # fmt: skip


def error() -> None:
    """Largest difference from float64, and weights above 1."""
    x, alpha, lengths = utterances(8, 2048)
    for what, weights in ("alpha < 1", alpha), ("alpha < 3", 3 * alpha):
        exact = cif(x.double(), weights.double(), lengths).x
        theirs = cif_function(x, weights, padding_mask=torch.zeros_like(weights).bool(), unbound_alpha=True)["cif_out"][0]
        ours = cif(x, weights, lengths).x
        before, after = ((result - exact).abs().max().item() for result in (theirs, ours))
        print(f" 8 x 2048 x {WIDTH} error, {what:<13} {before:11.1e} {after:11.1e} {before / after:6.0f}x  goal 1e-06")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'':<36} {'torch-cif':>11} {'ours':>11} {'ratio':>7}")
    for items, frames in SHAPES:
        speed(items, frames, count)
    error()
