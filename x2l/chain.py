"""A chain of stages: trained in order, each from what the ones before exported, into one model recipe to talk with."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from x2l.build import IMPORTERS
from x2l.checkpoint import sha256
from x2l.config import ModelConfig, TrainConfig, digest, load_chain_config, load_train_config
from x2l.eval.records import read_json, write_json
from x2l.train import NOT_IDENTITY, TrainError, train

log = logging.getLogger(__name__)


def train_recipe(name: str, overrides: Sequence[str] = ()) -> Path:
    """Train what a recipe describes, a stage or a chain of them; returns where its result lies.

    ``overrides`` of a chain are those of each of its stages, ``run`` apart: the folder of the model recipe.
    """
    chain = load_chain_config(name, overrides)
    if chain is None:
        return train(load_train_config(name, overrides))
    shared = [override for override in overrides if not override.startswith("run=")]
    return train_chain([load_train_config(stage, shared) for stage in chain.stages], Path(chain.run))


def train_chain(stages: Sequence[TrainConfig], run: Path) -> Path:
    """Train ``stages`` in order and write ``run/model.yaml``, which names what they exported.

    A stage that is complete is passed over, one that is part done goes on. Each run folder records in ``chain.json`` which
    files the stage starts from, by sha256.

    Raises:
        TrainError: a stage was begun with another recipe, or from weights that have changed since.
        ValueError: the stages do not share one LLM, or data of some stage are not there.
    """
    merged(stages)  # what cannot come to its end is refused before it costs anything
    lacking = [str(pattern) for cfg in stages for pattern in patterns(cfg) if not glob(pattern)]
    if lacking:
        raise ValueError(f"no data at {', '.join(dict.fromkeys(lacking))}: make or link them (docs/train.md), or set data_root")
    for number, cfg in enumerate(stages, 1):
        record = Path(cfg.run) / "chain.json"
        begun = {"recipe": digest(cfg, exclude=NOT_IDENTITY), "starts_from": origins(cfg)}
        found = read_json(record) if record.is_file() else begun
        changed = [name for name in begun if found[name] != begun[name]]
        if changed:
            raise TrainError(f"{cfg.run} was begun with another {changed[0]}: delete the folder to train this stage again")
        if found.get("complete") and any(Path(cfg.run, "final").glob("*.safetensors")):
            log.info("stage %d of %d, %s: complete", number, len(stages), cfg.run)
            continue
        log.info("stage %d of %d, %s", number, len(stages), cfg.run)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, begun)
        train(cfg)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the next stage listens, there is no step to save
        write_json(record, begun | {"complete": True})
    run.mkdir(parents=True, exist_ok=True)
    recipe = merged(stages)
    for cfg in stages:
        for name in recipe["modalities"]:
            exported = Path(cfg.run, "final", f"{name}.safetensors").resolve()
            if exported.is_file():
                recipe["modalities"][name]["weights"] = str(exported)
    for part in recipe["modalities"].values():
        trained = Path(str(part["encoder"].get("weights", "")))
        if trained.is_file():
            part["encoder"]["weights"] = str(trained.resolve())
    path = run / "model.yaml"
    path.write_text(f"# x2l chat --model {run}\n{yaml.safe_dump(recipe, sort_keys=False)}", encoding="utf-8")
    return path


def merged(stages: Sequence[TrainConfig]) -> dict[str, Any]:
    """The stages' models as one recipe: every modality as the last stage that has it sees it, the last stage's template.

    Raises:
        ValueError: two stages have different LLMs.
    """
    last = stages[-1].model
    other = [cfg.run for cfg in stages if cfg.model.llm != last.llm]
    if other:
        raise ValueError(f"{', '.join(other)}: another LLM than in {stages[-1].run}; the stages of a chain share one")
    modalities = {name: part for cfg in stages for name, part in cfg.model.modalities.items()}
    model = ModelConfig(llm=last.llm, template=last.template, modalities=modalities)
    recipe: dict[str, Any] = model.model_dump(exclude_defaults=True)
    return recipe


def patterns(cfg: TrainConfig) -> Iterator[str]:
    """The local files that a stage reads, as globs."""
    for source in [*cfg.data, *cfg.val]:
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if "://" not in f"{cfg.data_root}/{path}":
                yield str(Path(cfg.data_root) / path)


def origins(cfg: TrainConfig) -> dict[str, str]:
    """The local files that a stage starts from, with their sha256."""
    found = {}
    encoders = [str(part.encoder.args["weights"]) for part in cfg.model.modalities.values() if "weights" in part.encoder.args]
    for source in [*cfg.init.values(), *encoders]:
        importer, _, spec = source.partition(":")
        path = Path(spec if importer in IMPORTERS else source)
        if path.is_file():
            found[str(path)] = sha256(path)
    return found
