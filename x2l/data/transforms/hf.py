"""Models of transformers that transforms use: translation (mBART-50, OPUS-MT, NLLB, ...) and image-text similarity (CLIP,
Chinese-CLIP, SigLIP). Weights come from safetensors alone; a folder's own code is never run."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer

from x2l.data.sources import DataError
from x2l.weights import resolve

LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
CODES = {"en": ("en_XX", "eng_Latn", "en"), "zh": ("zh_CN", "zho_Hans", "zh")}  # mBART-50, NLLB, M2M-100


class _Loaded:
    """A model that is loaded on first use, and left out of a pickle."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.name = f"transformers {spec if ':' in spec else spec.rstrip('/').rsplit('/', 1)[-1]}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def _load(self, model: Any, processor: Any) -> tuple[Any, Any]:
        folder = resolve(self.spec)
        try:
            network = model.from_pretrained(folder, use_safetensors=True, **LOCAL)
            return network.eval().requires_grad_(False), processor.from_pretrained(folder, **LOCAL)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(f"{self.spec}: transformers cannot load it as {model.__name__}: {error}") from error


class Seq2SeqTranslator(_Loaded):
    """A sequence-to-sequence model; greedy for one beam."""

    def __init__(self, spec: str, beams: int = 1, max_new_tokens: int = 256) -> None:
        super().__init__(spec)
        self.beams, self.max_new_tokens = beams, max_new_tokens

    @functools.cached_property
    def _model(self) -> tuple[Any, Any]:
        return self._load(AutoModelForSeq2SeqLM, AutoTokenizer)

    @torch.inference_mode()
    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        """One text at a time: padding would make a text's translation depend on its neighbours."""
        model, tokenizer = self._model
        options: dict[str, Any] = {"num_beams": self.beams, "max_new_tokens": self.max_new_tokens, "do_sample": False}
        vocabulary = tokenizer.get_vocab()
        if hasattr(tokenizer, "src_lang"):
            tokenizer.src_lang = _code(source, getattr(tokenizer, "lang_code_to_id", None) or vocabulary)
            options["forced_bos_token_id"] = vocabulary[_code(target, vocabulary)]
        results, tokens = [], 0
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True)
            tokens += inputs["input_ids"].numel()
            inputs.pop("token_type_ids", None)
            results.append(tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True).strip())
        return results, Counter(tokens=tokens)


def _code(lang: str, known: Any) -> str:
    for code in CODES.get(lang, (lang,)):
        if code in known:
            return code
    raise DataError(f"this translation model does not know the language {lang!r}")


class Clip(_Loaded):
    """CLIP, Chinese-CLIP or SigLIP: anything with ``get_image_features`` and ``get_text_features``."""

    @functools.cached_property
    def _model(self) -> tuple[Any, Any]:
        return self._load(AutoModel, AutoProcessor)

    @torch.inference_mode()
    def similarity(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """Cosine similarity of a picture and each text, in [-1, 1]."""
        model, processor = self._model
        seen = _vector(model.get_image_features(**processor(images=image, return_tensors="pt")))
        read = processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return (_vector(model.get_text_features(**read)) @ seen[0]).tolist()


def _vector(output: Any) -> torch.Tensor:
    """Unit vectors (N, E) of what a model gives: a tensor in older transformers, an output with a pooler in newer ones."""
    found = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(found.float(), dim=-1)
