"""A tiny random LLM with a byte-level tokenizer and a chat template, and small data sets, for every test."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from x2l.types import Features

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)  # a landing should not hang on a draw
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens and one token a byte."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT
    return fast


def make_llm(context: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llm")
    make_llm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Patches(nn.Module):
    """An encoder for tests: 2 x 2 mean colours through a fixed random linear layer, with a buffer to watch."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = nn.Parameter(torch.randn(3, self.width, generator=generator))
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, pixels: Tensor) -> Features:
        x = pixels.flatten(1, 2) @ self.mix + self.offset
        return Features(x, torch.full((len(x),), 4))


def _pixels(pictures: list[Image.Image]) -> dict[str, Tensor]:
    return {"pixels": torch.stack([torch.from_numpy(np.asarray(p.resize((2, 2)), np.float32) / 255) for p in pictures])}


def patches() -> tuple[nn.Module, Callable[[list[Image.Image]], dict[str, Tensor]]]:
    """Named by recipes under test as ``conftest:patches``."""
    return Patches(), _pixels


def picture(colour: tuple[int, int, int], size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, rows: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for key, files in rows.items():
            for extension, blob in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(blob)
                shard.addfile(info, io.BytesIO(blob))
    return path


@pytest.fixture(scope="session")
def photo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with Flickr8k-like shards: one-coloured photos, five captions each in English and Chinese."""
    root = tmp_path_factory.mktemp("data")
    colours = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}
    for split, copies in (("train", 3), ("val", 1), ("test", 1)):
        rows = {}
        for copy in range(copies):
            for i, (name, colour) in enumerate(colours.items()):
                shade = tuple(max(0, c - 9 * copy - 3 * len(split)) for c in colour)
                fields = {"en": [f"A {name} dog runs on the {w} ." for w in ("grass", "beach", "snow", "street", "sand")],
                          "zh": [f"一只{i}号的狗在跑。"] * 5}  # fmt: skip
                rows[f"{name}{copy}"] = {"png": picture(shade), "json": json.dumps(fields).encode()}
        write_shard(root / "flickr8k" / f"{split}-0000.tar", rows)
    return root


def tiny_model(llm_folder: Path, **modalities: dict[str, object]) -> dict[str, object]:
    """A model recipe of the smallest size, as a mapping."""
    image = {
        "encoder": {"name": "conftest:patches"},
        "interface": {"width": 16, "depth": 2, "heads": 2, "num_queries": 4, "cross_every": 1},
    }
    return {"llm": {"spec": str(llm_folder)}, "modalities": modalities or {"image": image}}
