"""The training loop, top to bottom. It knows model(batch) -> Output and nothing of modalities.

A step is a function of the recipe and its number: data order, augmentation and dropout are seeded by it, so that a resumed run
repeats what an uninterrupted one does, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from x2l import checkpoint, optim
from x2l.config import TrainConfig, digest
from x2l.data.feed import Feed, open_feed
from x2l.devices import default_device
from x2l.stages import STAGES, Stage, compute_dtype
from x2l.types import Output, RunError

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # consecutive non-finite steps, or failed saves, before a run gives up
NOT_IDENTITY = {"run", "save_every", "val_every", "val_batches", "val", "threads", "data_root"}


class TrainError(RunError):
    """A run that cannot go on; the message says why and what to do."""


def train(cfg: TrainConfig) -> Path:
    """Run a stage to its end, from its newest checkpoint if there is one; returns the folder of exported weights.

    Raises:
        TrainError: the run folder is in use or holds another run, the loss stays non-finite, or something frozen changed.
        SystemExit: 143 after SIGTERM, once the last finished step is saved.
    """
    run = Path(cfg.run)
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run):
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        torch.manual_seed(cfg.seed)
        if cfg.precision == "bf16" and compute_dtype(cfg) != torch.bfloat16:
            log.warning("this processor has no bfloat16 arithmetic: the run computes in float32")
        stage = STAGES[cfg.stage](cfg)
        model = stage.model.to(default_device())
        rates = optim.select(model, cfg.trainable)
        optimizer = optim.adamw(model, rates, cfg.betas, cfg.weight_decay)
        frozen = checkpoint.frozen_digest(model)
        feed = open_feed(cfg.data, cfg.data_root, cfg.batch_size, cfg.seed, cfg.bucket)
        val = open_feed(cfg.val, cfg.data_root, cfg.batch_size, cfg.seed, cfg.bucket) if cfg.val else None
        total = cfg.steps or math.ceil((cfg.epochs or 1) * len(feed) / cfg.accumulate)
        identity = digest(cfg, exclude=NOT_IDENTITY)
        average = Average(model, cfg.ema) if cfg.ema else None
        start = kept(model, cfg)
        first = resume(run, model, optimizer, identity, average)
        fill_cache(stage, feed, total * cfg.accumulate)
        if val:
            fill_cache(stage, val, cfg.val_batches)
        (run / "config.json").write_text(cfg.model_dump_json(indent=1))
        log.info("%d trained parameters, steps %d to %d", sum(p.numel() for p in trained(model).values()), first, total)

        metrics, board, stop = Metrics(run, first), SummaryWriter(str(run / "tensorboard")), on_sigterm()
        failures = save_failures = 0
        bar = tqdm(range(first, total), initial=first, total=total, unit="step", dynamic_ncols=True, desc=Path(cfg.run).name)
        model.train()
        for step in bar:
            started = time.perf_counter()
            factor = optim.schedule(step, total, cfg.schedule.name, cfg.schedule.warmup_steps, cfg.schedule.hold_steps,
                                    cfg.schedule.warmup_start, cfg.schedule.final)  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

            loss_sum, num_tokens, num_samples, logs = 0.0, 0, 0, dict[str, float]()
            for micro in range(step * cfg.accumulate, (step + 1) * cfg.accumulate):
                families = feed.batch(micro)
                if not families:
                    continue
                torch.manual_seed(hash((cfg.seed, micro)))
                output = forward(cfg, model, stage.collate(families, micro))
                output.loss_sum.backward()
                loss_sum += float(output.loss_sum.detach())
                num_tokens += output.num_tokens
                num_samples += sum(map(len, families))
                logs |= output.logs
            if not num_tokens:
                raise TrainError(f"step {step}: no readable sample in the batch\n{feed.issues}")
            norm = optim.scale_gradients(optimizer, num_tokens, cfg.clip)
            finite = math.isfinite(loss_sum) and math.isfinite(norm)
            if finite:
                optimizer.step()
                if average:
                    average.update(step)
            optimizer.zero_grad(set_to_none=True)
            failures = 0 if finite else failures + 1
            if failures >= MAX_FAILURES:
                raise TrainError(f"loss or gradient not finite for {failures} steps up to {step}; lower the learning rate")

            done = step + 1
            row = {"step": done, "loss": loss_sum / num_tokens, "lr": factor, "grad_norm": norm, "tokens": num_tokens,
                   "bad_rows": len(feed.issues)} | logs  # fmt: skip
            if val and (done % cfg.val_every == 0 or done == total):
                with average.applied() if average else contextlib.nullcontext():
                    row["val_loss"] = evaluate(cfg, stage, val)
            metrics.write(row)
            for name, value in row.items():
                board.add_scalar(name, value, done)
            speed = num_samples / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:.1f} samples/s" + ("" if finite else ", NOT FINITE: skipped"))
            if done % cfg.save_every == 0 or done == total or stop.asked:
                try:
                    save(run, done, model, optimizer, identity, average)
                    save_failures = 0
                except checkpoint.CheckpointError as error:
                    save_failures += 1
                    log.error("%s", error)
                    if save_failures >= MAX_FAILURES or stop.asked:
                        raise
                give_back_memory()
            if stop.asked:
                log.warning("stopped by SIGTERM after step %d; run the same command to go on", done)
                sys.exit(143)
        board.close()
        if checkpoint.frozen_digest(model) != frozen:
            raise TrainError("a frozen parameter or buffer changed during training; nothing is exported")
        with average.applied() if average else contextlib.nullcontext():
            return export(run, stage, cfg, total, frozen, start)


def give_back_memory() -> None:
    """Return freed pages to the system: batches of ever new sizes fragment glibc's heap (dev/LOG.md)."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def forward(cfg: TrainConfig, model: nn.Module, batch: Any) -> Output:
    """The model's output, under bfloat16 autocast where the recipe asks for it and the device multiplies in it."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=compute_dtype(cfg) == torch.bfloat16):
        output: Output = model(batch)
    return output


@torch.no_grad()
def evaluate(cfg: TrainConfig, stage: Stage, feed: Feed) -> float:
    """Mean loss a token over the first ``val_batches`` batches of ``feed``, always the same ones."""
    stage.model.eval()
    loss, tokens = 0.0, 0
    for step in range(min(cfg.val_batches, len(feed))):
        output = forward(cfg, stage.model, stage.collate(feed.batch(step), None))
        loss, tokens = loss + float(output.loss_sum), tokens + output.num_tokens
    stage.model.train()
    return loss / max(1, tokens)


def fill_cache(stage: Stage, feed: Feed, num_batches: int) -> None:
    """See every record of the first ``num_batches`` once, so that slow encoders run before the loop, under a bar of their own.

    Mirrored views are computed when the loop first meets them.
    """
    for step in tqdm(range(min(num_batches, len(feed))), desc="encoder features", unit="batch", dynamic_ncols=True, leave=False):
        families = feed.batch(step)
        if families:
            stage.collate(families, None)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is being trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Average:
    """An exponential moving average of a model's trained weights; over the first steps it reaches less far back.

    Of a high learning rate it keeps what the steps agree on, where decaying the rate would sharpen what was learnt by heart.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.own, self.decay = trained(model), decay
        self.weights = {name: parameter.detach().clone() for name, parameter in self.own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.weights.values()], [*self.own.values()], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.own.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str, average: Average | None) -> None:
    """Write checkpoint ``step``: trained parameters, their average, optimiser, and the identity of the run."""
    tensors: dict[str, Any] = {"model": trained(model), "optimizer": checkpoint.optimizer_tensors(optimizer)}
    if average:
        tensors["average"] = average.weights
    checkpoint.save(run / "checkpoints", step, tensors, {"step": step, "identity": identity})


def resume(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str, average: Average | None) -> int:
    """Load the newest complete checkpoint and return its step; 0 without one.

    Raises:
        TrainError: it belongs to another recipe, or its keys are not the model's.
    """
    found = checkpoint.complete(run / "checkpoints")
    if not found:
        return 0
    tensors, state = checkpoint.load(found[0])
    if state["identity"] != identity:
        raise TrainError(
            f"{run} holds a run of another recipe (learning rate, data, model or seed differ); "
            "go on with the same values, or give run=another/folder"
        )
    own = trained(model)
    if own.keys() != tensors["model"].keys():
        raise TrainError(f"{found[0]}: keys differ: {sorted(own.keys() ^ tensors['model'].keys())[:8]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors["model"][name])
    if average:
        average.weights = {name: tensors["average"][name].to(parameter.device) for name, parameter in own.items()}
    checkpoint.load_optimizer(optimizer, tensors["optimizer"])
    return int(state["step"])


def kept(model: nn.Module, cfg: TrainConfig) -> dict[str, tuple[Tensor, float]]:
    """The weights that the run starts from and their share in what it exports, of trained parameters that ``keep_start`` names.

    Raises:
        ValueError: a glob names none.
    """
    own = trained(model)
    found = {glob: [name for name in own if fnmatchcase(name, glob)] for glob in cfg.keep_start}
    if empty := [glob for glob, names in found.items() if not names]:
        raise ValueError(f"keep_start: {empty[0]!r} matches none of the trained parameters, such as {next(iter(own))}")
    return {name: (own[name].detach().clone(), cfg.keep_start[glob]) for glob, names in found.items() for name in names}


def export(run: Path, stage: Stage, cfg: TrainConfig, step: int, frozen: str, start: dict[str, tuple[Tensor, float]]) -> Path:
    """Write what the stage hands on, in float16, one safetensors file a part, each with its history in the metadata.

    The mean of a model before and after fine-tuning keeps more of what it could before (Wortsman et al., arXiv 2109.01903):
    the share of ``start`` that `kept` says goes in.
    """
    folder = run / "final"
    with torch.no_grad():
        for name, parameter in trained(stage.model).items():
            if name in start:
                parameter.lerp_(*start[name])
    history = {
        "recipe": json.loads(cfg.model_dump_json(exclude={"run", "data_root"})),
        "steps": step,
        "frozen_sha256": frozen,
    }
    metadata = {key: json.dumps(value) for key, value in history.items()}
    folder.mkdir(exist_ok=True)
    for stem, tensors in stage.export().items():
        half = {name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}
        partial = folder / f".{stem}"
        checkpoint.save_file(half, partial, metadata)
        partial.replace(folder / f"{stem}.safetensors")
    return folder


class Metrics:
    """metrics.jsonl, one line a step; lines past the step that a run resumes from are dropped."""

    def __init__(self, run: Path, first: int):
        self.path = run / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):  # a line cut by a crash
                    if json.loads(line)["step"] <= first:
                        kept.append(line)
        self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run folder; a second trainer is refused."""
    try:
        with FileLock(run / ".lock", timeout=0):
            yield
    except Timeout:
        raise TrainError(f"{run} is in use by another trainer; stop it, or give run=another/folder") from None


class on_sigterm:
    """Remembers that the process was asked to stop, so that the step in progress is finished and saved."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
