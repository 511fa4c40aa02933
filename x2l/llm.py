"""Load any Hugging Face causal language model, frozen: a safetensors folder, a hub id, or a GGUF file."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from x2l.weights import cache_dir, resolve, sha256_of

log = logging.getLogger(__name__)


def load_llm(
    spec: str,
    sha256: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer; the model is frozen, in eval mode, and known to take ``inputs_embeds``.

    Weights are read from safetensors or GGUF alone, and code that a model folder carries is never run. A GGUF file is
    dequantised once, to float32, and kept as a safetensors folder in the X2L cache under its own sha256.

    Args:
        spec: what ``weights.resolve`` takes, ending in a folder or a ``.gguf`` file.
        sha256: hex digest of the GGUF file.
        dtype: of the parameters.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, ...

    Raises:
        ValueError: the folder has no safetensors, needs its own code, or holds a model that ignores or refuses
            ``inputs_embeds``.
    """
    path = llm_folder(spec, sha256)
    model, tokenizer = _load(spec, path, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True)
    nn.Module.to(model, device)
    model.requires_grad_(False).eval()
    probe_inputs_embeds(model, spec)
    return model, tokenizer


def llm_folder(spec: str, sha256: str | None = None) -> Path:
    """The local safetensors folder that ``spec`` names; a GGUF file is dequantised into one.

    Raises:
        ValueError: it cannot be had, or holds no safetensors.
    """
    path = resolve(spec, sha256)
    if path.is_file():
        path = _dequantised(path, sha256 or sha256_of(path))
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{spec}: {path} holds no *.safetensors; X2L loads no pickled weights, convert them first")
    return path


class TokenTable(nn.Module):
    """An LLM's token embeddings and configuration without its layers, for where these run on another machine."""

    def __init__(self, table: nn.Embedding, config: Any, generation_config: Any):
        super().__init__()
        self.table, self.config, self.generation_config = table, config, generation_config

    def get_input_embeddings(self) -> nn.Embedding:
        """(V, D)."""
        return self.table

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype


def load_table(spec: str, sha256: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[TokenTable, Any]:
    """The token table of an LLM and its tokenizer; no other weight is read, and of its safetensors no other need be there.

    Args:
        spec, sha256, dtype: as for `load_llm`.

    Raises:
        ValueError: as `read_table`.
    """
    path = llm_folder(spec, sha256)
    llm, _, weight = read_table(path)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if (path / "generation_config.json").is_file():
            llm.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return TokenTable(nn.Embedding.from_pretrained(weight.to(dtype)), llm.config, llm.generation_config), tokenizer


def read_table(folder: Path) -> tuple[PreTrainedModel, str, torch.Tensor]:
    """The LLM of a folder on the meta device, and its token table (V, D) with the name that it has in its file.

    Raises:
        ValueError: an LLM that does more to its ids than look them up, or no file with the table.
    """
    llm = sketch_llm(folder)
    table = llm.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise ValueError(f"{folder}: this LLM's token embeddings are no plain table ({type(table).__name__})")
    name = next(name for name, module in llm.named_modules() if module is table) + ".weight"
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if f".{name}".endswith(f".{key}"):  # published files often leave the first part of a name out
                    return llm, key, file.get_tensor(key)
    raise ValueError(f"{folder}: no *.safetensors there holds {name}")


def sketch_llm(architecture: dict[str, Any] | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM of an architecture on the meta device: shapes without weights.

    Args:
        architecture: ``model_type`` and its sizes, or a folder with ``config.json``, or a GGUF file.

    Raises:
        ValueError: transformers knows no such causal LM.
    """
    if isinstance(architecture, Path) and architecture.is_file():
        architecture = _dequantised(architecture, sha256_of(architecture))
    try:
        config = read_config(architecture)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{architecture}: transformers {transformers.__version__} knows no such causal LM: {error}") from error


def read_config(architecture: dict[str, Any] | Path) -> Any:
    """The transformers configuration of ``model_type`` and its sizes, or of a folder with ``config.json``."""
    if isinstance(architecture, Path):
        return AutoConfig.from_pretrained(architecture, trust_remote_code=False, local_files_only=True)
    return AutoConfig.for_model(**architecture)


def probe_inputs_embeds(model: nn.Module, name: str) -> None:
    """Check on a three-token input that embeddings and the ids they stand for give the same logits.

    Raises:
        ValueError: the model refuses ``inputs_embeds``, or reads something else than these.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor([[1, 2, 3]], device=table.weight.device)
    try:
        with torch.inference_mode():
            by_ids = model(input_ids=ids).logits
            by_embeds = model(inputs_embeds=table(ids)).logits
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{name}: this LLM refuses inputs_embeds ({error}); X2L cannot feed it features") from error
    if not torch.allclose(by_ids, by_embeds, rtol=1e-2, atol=1e-2):
        raise ValueError(f"{name}: this LLM gives other logits for inputs_embeds than for the same input_ids")


def _dequantised(gguf: Path, digest: str) -> Path:
    """The safetensors folder made of a GGUF file, written on first use; complete whenever it exists."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{gguf}: neither a model folder nor a GGUF file")
    target = cache_dir() / "llm" / f"{gguf.stem}-{digest[:16]}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not target.exists():  # another process may have written it meanwhile
                _write_folder(gguf, target)
    except OSError as error:
        raise ValueError(f"{gguf}: cannot write {target} ({error}); set X2L_CACHE elsewhere") from error
    return target


def _write_folder(gguf: Path, target: Path) -> None:
    log.info("dequantising %s once; later starts read %s", gguf.name, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the caller holds the lock
    _convert(gguf, partial)
    for path in partial.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
    os.replace(partial, target)


def _convert(gguf: Path, out: Path) -> None:
    # Newer transformers keep GGUF weights packed unless told to dequantise them; older ones know nothing else.
    config: Any = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    model, tokenizer = _load(str(gguf), gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(is_quantized=False, hf_quantizer=None)  # else save_pretrained writes the packed form
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _load(name: str, folder: Path, gguf_file: str | None = None, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if gguf_file is not None:
        source["gguf_file"] = gguf_file
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model = AutoModelForCausalLM.from_pretrained(folder, **source, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{name}: transformers {transformers.__version__} cannot load it as a causal LM: {error}") from error
    return model, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars and notes of transformers; errors are raised all the same."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
