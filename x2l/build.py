"""Config -> objects: the only place that knows both."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from x2l.config import Component, ModelConfig
from x2l.encoders import ENCODERS
from x2l.llm import load_llm
from x2l.modalities import MODALITIES, Kind
from x2l.modality import Modality, Processor
from x2l.model import XLLM
from x2l.template import TEMPLATES, Renderer
from x2l.weights import resolve


@dataclass
class Built:
    """A model with what turns samples into its batches."""

    model: XLLM
    renderer: Renderer
    processors: dict[str, Processor]
    decoders: dict[str, str]  # modality -> decoder of data/media.py
    config: ModelConfig


def build(
    config: ModelConfig, fresh: Sequence[str] = (), dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> Built:
    """Load the LLM and encoders, make the interfaces, and load their trained weights.

    Encoders with the same config are one module, so that image and video share theirs.

    Args:
        fresh: modalities whose ``weights`` are not loaded.
        dtype: of the LLM, instead of the config's.
        attention: implementation in the LLM, a name that transformers knows.

    Raises:
        ValueError: an unknown encoder, modality or argument, or weights that do not fit; the message names it.
    """
    llm, tokenizer = load_llm(
        config.llm.spec,
        config.llm.sha256,
        dtype or getattr(torch, config.llm.dtype),
        attn_implementation=attention,
    )
    table = llm.get_input_embeddings().weight
    encoders: dict[str, tuple[nn.Module, Processor]] = {}
    modalities, processors, decoders = {}, {}, {}
    for name, part in config.modalities.items():
        kind = _kind(part.type or name)
        key = part.encoder.model_dump_json()
        if key not in encoders:
            encoders[key] = _encoder(part.encoder)
        encoder, processor = encoders[key]
        widths = (encoder.width, table.shape[1], float(table.float().std()))
        layers = _call(kind.interface, f"modalities.{name}.interface", part.interface, *widths)
        modalities[name] = Modality(encoder, layers)
        processors[name], decoders[name] = processor, kind.decoder
        if part.weights and name not in fresh:
            load_strict(modalities[name].interface, shipped_file(part.weights))
    model = XLLM(llm, modalities).eval()
    template = TEMPLATES[config.template.name]
    if config.template.name == "paper":
        renderer_template: Any = template(tokenizer.eos_token)
    else:
        renderer_template = template(tokenizer, config.template.system)
    return Built(model, Renderer(tokenizer, renderer_template, model.sentinels), processors, decoders, config)


def shipped_file(spec: str) -> Path:
    """``x2l:file`` is a file that ships with the package; anything else is a weights spec."""
    if not spec.startswith("x2l:"):
        return resolve(spec)
    path = Path(str(resources.files("x2l") / "shipped" / spec.removeprefix("x2l:")))
    if not path.is_file():
        raise ValueError(f"{spec} does not ship with this version of x2l")
    return path


def load_strict(module: nn.Module, path: Path, prefix: str = "") -> dict[str, Any]:
    """Load a safetensors file into ``module``, every key of it and no other.

    Returns:
        The file's metadata.

    Raises:
        ValueError: keys are missing, extra or of another shape; the message names them.
    """
    with safe_open(path, "pt") as file:
        state: dict[str, Tensor] = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or extra or shapes:
        raise ValueError(f"{path} does not fit: missing {missing[:8]}, extra {extra[:8]}, other shapes {shapes[:8]}")
    module.load_state_dict(state)
    return {key: json.loads(value) for key, value in metadata.items() if key != "format"}


def _kind(name: str) -> Kind:
    if name in MODALITIES:
        return MODALITIES[name]
    if ":" not in name:
        raise ValueError(f"unknown modality {name!r}: use one of {', '.join(MODALITIES)}, or package.module:attribute")
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _encoder(component: Component) -> tuple[nn.Module, Processor]:
    if component.name not in ENCODERS:
        raise ValueError(f"unknown encoder {component.name!r}: use one of {', '.join(ENCODERS)}")
    return _call(ENCODERS[component.name], f"encoder {component.name}", component.args)


def _call(function: Any, what: str, arguments: dict[str, Any], *positional: Any) -> Any:
    try:
        return function(*positional, **arguments)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
