"""The paper's recipes hold Table 7 and appendix A.3 to the digit: learning rates as they come out of the schedule."""

from __future__ import annotations

import inspect

import pytest

from x2l.build import sketch
from x2l.config import load_train_config
from x2l.data.tasks import TASKS
from x2l.info import trained_parameters
from x2l.optim import schedule

# peak, lowest and first learning rate, warm-up steps, epochs, batch, accumulation, weight decay
TABLE_7 = {
    "paper/stage2_image": (3e-5, 1e-8, 1e-6, 6000, 5, 4, 16, 0.05),
    "paper/stage2_video": (1e-5, 1e-8, 1e-6, 200, 5, 2, 16, 0.05),
    "paper/stage2_speech": (1e-4, 1e-8, 1e-6, 6000, 30, 4, 16, 0.05),
    "paper/stage3": (1e-6, 1e-6, 1e-6, 0, 2, 2, 16, 0.05),
}


@pytest.mark.parametrize("name", TABLE_7)
def test_table_7(name: str) -> None:
    cfg = load_train_config(name)
    peak, low, first, warmup, epochs, batch, accumulate, decay = TABLE_7[name]
    total, plan = 10 * (warmup + 1), cfg.schedule
    rates = set(cfg.trainable.values())
    assert rates == {peak}

    def rate(step: int) -> float:
        factor = schedule(step, total, plan.name, plan.warmup_steps, plan.hold_steps, plan.warmup_start, plan.final)
        return peak * factor

    assert plan.name == "cosine"
    assert plan.warmup_steps == warmup
    assert rate(total) == pytest.approx(low, rel=1e-6)
    if warmup:
        assert peak * plan.warmup_start == pytest.approx(first, rel=1e-6)
        assert rate(warmup - 1) == pytest.approx(peak)
    else:
        assert rate(0) == pytest.approx(first)
    assert (cfg.epochs, cfg.batch_size, cfg.accumulate, cfg.weight_decay) == (epochs, batch, accumulate, decay)
    assert cfg.betas == (0.9, 0.98)


@pytest.mark.parametrize("name", TABLE_7)
def test_parts_and_tasks_exist(name: str) -> None:
    """What a recipe starts, trains and reads is there, by name; shapes are those of the true size."""
    cfg = load_train_config(name)
    model, _ = sketch(cfg.model)
    for prefix in cfg.init:
        model.get_submodule(prefix)
    assert trained_parameters(cfg, model)
    for source in cfg.data:
        for task, options in source.tasks.items():
            assert set(options) <= set(inspect.signature(TASKS[task]).parameters) - {"record", "rng"}


def test_stage_1_of_speech() -> None:
    """Appendix A.3: warm up 24,000, hold 36,000, decay 120,000 steps at 3e-4, weight decay 0.01, batch 128."""
    cfg = load_train_config("paper/stage1_asr")
    assert cfg.steps == 24_000 + 36_000 + 120_000
    assert (cfg.schedule.warmup_steps, cfg.schedule.hold_steps, cfg.batch_size, cfg.weight_decay) == (24_000, 36_000, 128, 0.01)
    held = schedule(50_000, cfg.steps, "tri_stage", 24_000, 36_000, cfg.schedule.warmup_start, cfg.schedule.final)
    assert held * cfg.trainable["*"] == pytest.approx(3e-4)
