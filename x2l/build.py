"""Config -> objects: the only place that knows both."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from x2l.architectures import ARCHITECTURES, CHATGLM, ChatGLMShape
from x2l.config import Component, ModalityConfig, ModelConfig
from x2l.data.collate import Decoder
from x2l.data.media import DECODERS
from x2l.devices import default_device
from x2l.encoders import ENCODERS
from x2l.encoders.hf import sketch_speech, sketch_vision
from x2l.interfaces.cformer import import_bert
from x2l.interfaces.qformer import import_blip2
from x2l.llm import load_llm, load_table, sketch_llm
from x2l.modalities import MODALITIES, Kind
from x2l.modalities.reader import import_decoder
from x2l.modalities.soft_words import SoftWords
from x2l.modalities.video import import_image
from x2l.modality import Modality, Processor
from x2l.model import XLLM
from x2l.template import TEMPLATES, Renderer
from x2l.weights import resolve

log = logging.getLogger(__name__)


@dataclass
class Built:
    """A model with what turns samples into its batches."""

    model: XLLM
    renderer: Renderer
    processors: dict[str, Processor]
    decoders: dict[str, Decoder]
    decode: dict[str, dict[str, Any]]  # modality -> options of its decoder
    config: ModelConfig


def build(
    config: ModelConfig,
    fresh: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    table_only: bool = False,
) -> Built:
    """Load the LLM and encoders, make the interfaces, and load their trained weights.

    Encoders with the same config are one module, so that image and video share theirs.

    Args:
        fresh: modalities whose ``weights`` are not loaded.
        dtype: of the LLM, instead of the config's.
        attention: implementation in the LLM, a name that transformers knows.
        table_only: of the LLM, load its token table alone: the model embeds and does not answer.

    Raises:
        ValueError: an unknown encoder, modality or argument, or weights that do not fit; the message names it.
    """
    load: Callable[..., tuple[Any, Any]] = load_table if table_only else partial(load_llm, attn_implementation=attention)
    llm, tokenizer = load(config.llm.spec, config.llm.sha256, dtype or getattr(torch, config.llm.dtype))
    std = float(llm.get_input_embeddings().weight.float().std())
    model, processors = assemble(config, llm, std, _encoder)
    for name, part in config.modalities.items():
        model.modalities[name].connect(lambda: llm.get_input_embeddings().weight, tokenizer)  # type: ignore[operator]
        if part.weights and name not in fresh:
            if resolve(split_importer(part.weights)[1]).is_dir():
                raise ValueError(f"modalities.{name}.weights: {part.weights} is a folder, name a safetensors file in it")
            initialise(model.modalities[name].get_submodule("interface"), part.weights)
    model = model.to(default_device()).eval()
    decoders = {name: _decoder(name, part) for name, part in config.modalities.items()}
    decode = {name: part.decode for name, part in config.modalities.items()}
    template = TEMPLATES[config.template.name]
    if config.template.name == "paper":
        renderer_template: Any = template(tokenizer.eos_token)
    else:
        renderer_template = template(tokenizer, config.template.system)
    return Built(model, Renderer(tokenizer, renderer_template, model.sentinels), processors, decoders, decode, config)


def assemble(
    config: ModelConfig, llm: Any, std: float, make_encoder: Callable[[Component], tuple[Any, Any]]
) -> tuple[XLLM, dict[str, Any]]:
    """LLM, encoders and untrained interfaces as one model, and a processor for each modality.

    ``std`` is that of the LLM's token embeddings; encoders with the same config are made once.
    """
    width = llm.get_input_embeddings().weight.shape[1]
    encoders: dict[str, tuple[Any, Any]] = {}
    modalities, processors = {}, {}
    for name, part in config.modalities.items():
        key = part.encoder.model_dump_json()
        if key not in encoders:
            encoders[key] = make_encoder(part.encoder)
        kind = _kind(name, part)
        encoder, processors[name] = kind.around(*encoders[key])
        layers = _call(kind.interface, f"modalities.{name}.interface", part.interface, encoder.width, width, std)
        modalities[name] = Modality(encoder, layers)
    return XLLM(llm, modalities), processors


def sketch(config: ModelConfig) -> tuple[XLLM, dict[str, Any]]:
    """The model of ``config`` on the meta device: every shape, no weights; and what `assemble` gives beside it.

    Hub ids of `x2l.architectures` need no network, others their ``config.json`` alone. Encoders that are no transformers
    model are built as they are: small ones from a package index with their weights.
    """
    source = _architecture(config.llm.spec, config.llm.sha256)
    llm = ChatGLMShape() if source == CHATGLM else sketch_llm(source, getattr(torch, config.llm.dtype))
    with torch.device("meta"):
        return assemble(config, llm, 1.0, _sketch_encoder)


def _architecture(spec: str, sha256: str | None = None) -> Any:
    """Published sizes, or a local folder or file that tells them."""
    name = spec.removeprefix("hf:").partition("@")[0]
    if spec.startswith("hf:") and not spec.endswith(".gguf"):
        known = CHATGLM if name == CHATGLM else ARCHITECTURES.get(name)
        return known or resolve(f"{spec}/config.json").parent
    return resolve(spec, sha256)


def _sketch_encoder(component: Component) -> tuple[Any, Any]:
    sketches: dict[str, Callable[..., nn.Module]] = {"vision": sketch_vision, "speech": sketch_speech}
    if component.name in sketches:
        args = dict(component.args)
        return _call(sketches[component.name], f"encoder {component.name}", args, _architecture(args.pop("weights"))), None
    if component.name == "conformer":
        return _encoder(component)
    if component.name == "moonshine" and not component.args.get("trainable"):
        component = Component(name="moonshine")  # of what stage 1 trains, the shape is the package's
    with torch.device("cpu"):
        return _encoder(component)


def load_strict(module: nn.Module, path: Path, prefix: str = "", partial: bool = False) -> dict[str, Any]:
    """Load a safetensors file into ``module``, every key of it and no other; with ``partial`` the file may hold some alone.

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
    shapes = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    if (missing and not partial) or extra or shapes:
        raise ValueError(f"{path} does not fit: missing {missing[:8]}, extra {extra[:8]}, other shapes {shapes[:8]}")
    module.load_state_dict(own | state)
    return {key: json.loads(value) for key, value in metadata.items() if key != "format"}


def import_first(state: dict[str, Tensor], module: nn.Module) -> list[str]:
    """Start the first module of an interface, a Q-Former or a listener, from that of an interface to another LLM.

    Returns:
        What of ``state`` was not used: the modules behind it.

    Raises:
        ValueError: a tensor is missing, extra, or of another shape; the message names it.
    """
    _fit(module, {name.removeprefix("0."): tensor for name, tensor in state.items() if name.startswith("0.")})
    return sorted(name for name in state if not name.startswith("0."))


def import_speech(state: dict[str, Tensor], interface: nn.Sequential) -> list[str]:
    """Start a speech interface from that of another LLM, where both write in soft words: the listener and the C-Former are taken.

    The S-Adapter needs no training to be read: its words are this LLM's own, and the linear layer beside them becomes zero.

    Returns:
        What of ``state`` was not used: the other LLM's S-Adapter.

    Raises:
        ValueError: this interface has no soft words, or a tensor is missing, extra, or of another shape; the message names it.
    """
    adapter = interface[-1]
    if not isinstance(adapter, SoftWords):
        raise ValueError(
            "only a speech interface with soft words (reader and words) starts from another LLM's, "
            f"this one ends in {type(adapter).__name__}"
        )
    _fit(interface[:2], {name: tensor for name, tensor in state.items() if name.startswith(("0.", "1."))})
    for parameter in adapter.linear.parameters():
        nn.init.zeros_(parameter)
    return sorted(name for name in state if not name.startswith(("0.", "1.")))


def _fit(module: nn.Module, given: dict[str, Tensor]) -> None:
    shapes, others = ({name: tensor.shape for name, tensor in each.items()} for each in (module.state_dict(), given))
    if differ := sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)):
        parts = module if isinstance(module, nn.Sequential) else [module]
        names = " and ".join(type(part).__name__ for part in parts)
        raise ValueError(f"does not begin with a {names} of these sizes; missing, extra or of another shape: {differ[:8]}")
    module.load_state_dict(given)


IMPORTERS: dict[str, Callable[[dict[str, Tensor], Any], list[str]]] = {
    "blip2": import_blip2,
    "bert": import_bert,
    "decoder": import_decoder,
    "image": import_image,
    "qformer": import_first,
    "listener": import_first,
    "speech": import_speech,
}


def split_importer(source: str) -> tuple[str, str]:
    """The importer of a source, with its colon, or nothing; and the spec."""
    importer, colon, spec = source.partition(":")
    return (importer + colon, spec) if importer in IMPORTERS else ("", source)


def initialise(module: nn.Module, source: str) -> None:
    """Start ``module`` from published weights: ``importer:spec``, or a safetensors file of ours that fits exactly.

    Raises:
        ValueError: what the module owns is missing from the source, or has another shape.
    """
    importer, spec = split_importer(source)
    path = resolve(spec)
    if not importer:
        load_strict(module, path)
        return
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    unused = IMPORTERS[importer[:-1]](state, module)
    log.info("%s: %d tensors taken, %d of the source not used", source, len(state) - len(unused), len(unused))


def _lookup(table: Mapping[str, Any], what: str, name: str) -> Any:
    """An entry of an explicit table, or of anybody's package by ``package.module:attribute``."""
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(table)}, or package.module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from error


def _kind(name: str, part: ModalityConfig) -> Kind:
    kind: Kind = _lookup(MODALITIES, "modality", part.type or name)
    return kind


def _decoder(name: str, part: ModalityConfig) -> Decoder:
    decoder = _kind(name, part).decoder
    function = _lookup(DECODERS, "decoder", decoder)
    try:
        inspect.signature(function).bind(b"", **part.decode)
    except TypeError as error:
        raise ValueError(f"modalities.{name}.decode: {error}") from error
    return decoder if decoder in DECODERS else function


def _encoder(component: Component) -> tuple[nn.Module, Processor]:
    build_encoder = _lookup(ENCODERS, "encoder", component.name)
    encoder, processor = _call(build_encoder, f"encoder {component.name}", component.args)
    return encoder, processor


def _call(function: Any, what: str, arguments: dict[str, Any], *positional: Any) -> Any:
    try:
        return function(*positional, **arguments)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
