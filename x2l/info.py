"""What a recipe costs, told without its weights: parameters, memory and operations, on the meta device.

The paper states 7.6 billion parameters (arXiv 2305.04160, appendix A.3); with ChatGLM-6B the recipe `paper` has 7.58.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from x2l import flops
from x2l.asr import Decoder
from x2l.blip2 import NUM_SPECIAL, Blip2
from x2l.build import sketch
from x2l.config import (
    ModalityConfig,
    ModelConfig,
    TrainConfig,
    digest,
    load_chain_config,
    load_model_config,
    load_train_config,
    shipped,
)
from x2l.data.video import NUM_FRAMES
from x2l.encoders.fbank import RATE
from x2l.interfaces.qformer import QFormer
from x2l.modalities import audio
from x2l.modalities.speech import Listener
from x2l.modalities.video import Frames
from x2l.modality import Modality
from x2l.model import XLLM
from x2l.optim import select

PAPER_PARAMETERS = 7.6e9
ADAMW_BYTES = 12  # gradient and two moments in float32, a trained parameter


class Part(NamedTuple):
    """A component's share of the model; what two modalities share counts once."""

    name: str
    parameters: int
    bytes: int


class Trained(NamedTuple):
    """What a stage trains; None where the stage is not known here."""

    recipe: str
    parameters: int | None


class Cost(NamedTuple):
    """Operations of one sample with one item of a modality; None where an encoder or interface has no formula."""

    modality: str
    length: int | None  # encoder frames
    embeddings: int | None  # what the LLM reads of it
    encoder: int | None
    interface: int | None
    llm: int | None  # forward, with the text
    training: int | None  # one sample, encoder features computed


@dataclass(frozen=True)
class Info:
    """Everything `show` prints."""

    recipe: str
    parts: list[Part]
    trained: list[Trained]
    costs: list[Cost]
    cache_bytes: int  # keys and values of one token
    token_flops: int  # one token of an answer, at the length of a prompt of text alone
    text: int
    seconds: float

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)


def info(recipe: str, overrides: Sequence[str] = (), text: int = 64, seconds: float = 10.0) -> Info:
    """Build a recipe without weights and count.

    Args:
        recipe: a model (``paper``, ``models/paper.yaml``, a path), told with the stages of the folder of its name, or a
            training recipe (``paper/stage2_image``), told with itself.
        text: tokens of text in a sample, half of them answer.
        seconds: length of the sound in a sample.

    Raises:
        ValueError: no such recipe, or an architecture that is neither known here nor at hand.
    """
    config, stages = _read(recipe, overrides)
    model, processors = sketch(config)
    costs = [_cost(name, part, model, processors[name], text, seconds) for name, part in config.modalities.items()]
    sketches = {digest(config): model}
    trained = []
    for name, stage in stages.items():
        key = digest(stage.model)
        if key not in sketches:
            sketches[key] = sketch(stage.model)[0]
        trained.append(Trained(name, trained_parameters(stage, sketches[key])))
    llm = model.llm.config
    width = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    heads = getattr(llm, "num_key_value_heads", None) or llm.num_attention_heads
    item = next(iter(model.llm.parameters())).element_size()
    return Info(
        recipe, _parts(config, model), trained, costs, 2 * llm.num_hidden_layers * heads * width * item,
        flops.llm(model.llm, 1, 1, past=text), text, seconds,
    )  # fmt: skip


def _read(recipe: str, overrides: Sequence[str]) -> tuple[ModelConfig, dict[str, TrainConfig]]:
    """The model of a recipe, and the training recipes to tell with it."""
    name = recipe if Path(recipe).is_file() else recipe.removesuffix(".yaml")
    model = name.removeprefix("models/")
    if model in shipped("models"):
        stages = [stage for stage in shipped() if stage.split("/")[0] == model and load_chain_config(stage) is None]
        return load_model_config(model, overrides), {stage: load_train_config(stage) for stage in stages}
    if Path(name).is_file() and "trainable:" not in Path(name).read_text(encoding="utf-8"):
        return load_model_config(name, overrides), {}
    stage = load_train_config(name, overrides)
    return stage.model, {recipe: stage}


def _parts(config: ModelConfig, model: XLLM) -> list[Part]:
    modules = [(f"LLM {config.llm.spec}", model.llm)]
    for name, modality in model.modalities.items():
        spec = config.modalities[name].encoder
        modules.append((f"{name}: encoder {spec.args.get('weights', spec.name)}", modality.get_submodule("encoder")))
        modules += [(f"{name}: {type(layer).__name__}", layer) for layer in modality.get_submodule("interface").children()]
    seen: set[int] = set()
    parts = []
    for name, module in modules:
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        parts.append(Part(name, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)))
    return parts


# ---------------------------------------------------------------- what a stage trains


def trained_parameters(cfg: TrainConfig, model: XLLM) -> int | None:
    """Parameters that the globs of ``cfg`` select on the sketch of its model.

    What depends on the training texts' vocabulary (embeddings and biases of stage 1) counts as empty.

    Raises:
        ValueError: a glob that matches nothing.
    """
    if cfg.stage not in STAGES:
        return None
    with torch.device("meta"):
        module = STAGES[cfg.stage](cfg, model)
    rates = select(module, cfg.trainable)
    return sum(p.numel() for name, p in module.named_parameters() if name in rates)


def _holder(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _asr(cfg: TrainConfig, model: XLLM) -> nn.Module:
    encoder: Any = model.modalities["speech"].get_submodule("encoder")
    listener = Listener(encoder.width, **cfg.model.modalities["speech"].interface["listener"])
    width = listener.width // listener.parts
    decoder = Decoder(0, width, parts=listener.parts, **cfg.stage_args["decoder"])
    return _holder(encoder=encoder, listener=listener, decoder=decoder, ctc_head=nn.Linear(width, 1))


def _words(cfg: TrainConfig, model: XLLM) -> nn.Module:
    (modality,) = model.modalities.values()
    scale, bias = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(0))
    return _holder(interface=modality.get_submodule("interface"), log_scale=scale, bias=bias)


def _blip2(cfg: TrainConfig, model: XLLM) -> nn.Module:
    ((name, settings),) = cfg.model.modalities.items()
    encoder: Any = model.modalities[name].get_submodule("encoder")
    former = QFormer(encoder.width, vocab_size=NUM_SPECIAL, **settings.interface)
    return Blip2(Modality(encoder, [former]), [], name, **cfg.stage_args)


STAGES: dict[str, Callable[[TrainConfig, XLLM], nn.Module]] = {
    "xllm": lambda cfg, model: model,
    "asr": _asr,
    "match": lambda cfg, model: _holder(modality=model.modalities["speech"]),
    "words": _words,
    "blip2": _blip2,
}


# ---------------------------------------------------------------- operations


def _cost(name: str, part: ModalityConfig, model: XLLM, processor: Any, text: int, seconds: float) -> Cost:
    """One item and ``text`` tokens. Gradients pass the frozen LLM once (2 x forward) and the interface twice (3 x)."""
    modality = model.modalities[name]
    frozen, layers = modality.get_submodule("encoder"), list(modality.get_submodule("interface").children())
    windows = (
        max(1, round(seconds / audio.WINDOW)) if isinstance(frozen, audio.Spectra) else part.decode.get("num_frames", NUM_FRAMES)
    )
    item = flops.Item(seconds, windows if isinstance(frozen, Frames) else 1)

    def example() -> dict[str, Tensor]:
        picture, wave = Image.new("RGB", (224, 224)), np.zeros(int(seconds * RATE), np.float32)
        shown: Any = {"image": picture, "video": [picture] * item.pictures}.get(part.type or name, wave)
        inputs: dict[str, Tensor] = processor([shown])
        return inputs

    encoder = flops.encoder(frozen, item, example)
    if encoder is None:
        return Cost(name, *[None] * 6)
    interface = flops.interface(layers, encoder.length, item)
    if interface is None:
        return Cost(name, encoder.length, None, encoder.flops, *[None] * 3)
    llm = flops.llm(model.llm, text + interface.length, text // 2)
    training = encoder.flops + 3 * interface.flops + 2 * llm
    return Cost(name, encoder.length, interface.length, encoder.flops, interface.flops, llm, training)


# ---------------------------------------------------------------- printing


def show(told: Info, console: Console) -> None:
    """Print the tables."""
    table = Table("part", *_right("parameters", "memory"), title=told.recipe, title_justify="left")
    for part in told.parts:
        table.add_row(part.name, f"{part.parameters:,}", _bytes(part.bytes))
    table.add_section()
    table.add_row("[bold]total[/]", f"[bold]{told.parameters:,}[/]", _bytes(sum(part.bytes for part in told.parts)))
    console.print(table)
    console.print(f"{told.parameters / 1e9:.2f} billion parameters; X-LLM as published: {PAPER_PARAMETERS / 1e9:.1f}")
    if told.trained:
        table = Table("stage", *_right("trained parameters", "gradients and AdamW"))
        for recipe, count in told.trained:
            table.add_row(recipe, *(("not known", "") if count is None else (f"{count:,}", _bytes(ADAMW_BYTES * count))))
        console.print(table)
    table = Table("a sample", *_right("frames", "embeddings", "encoder", "interface", "LLM, forward", "training"))
    for cost in told.costs:
        numbers = ("not counted" if n is None else f"{n:,}" for n in (cost.length, cost.embeddings))
        table.add_row(cost.modality, *numbers, *map(_flops, (cost.encoder, cost.interface, cost.llm, cost.training)))
    console.print(table)
    console.print(
        f"One item and {told.text} tokens of text, half of them answer; {told.seconds:g} s of sound. Training: the encoder once, "
        f"3 x the interface, 2 x the LLM. A token of an answer: {_flops(told.token_flops)}, "
        f"and {_bytes(told.cache_bytes)} of keys and values. Memory is without activations."
    )


def _right(*names: str) -> list[Any]:
    from rich.table import Column

    return [Column(name, justify="right") for name in names]


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def _flops(number: float | None) -> str:
    if number is None:
        return "not counted"
    for unit in ("", "K", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:.2f} TFLOP"
