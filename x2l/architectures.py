"""Published architectures by hub id, so that `x2l info` needs no network: sizes from their config.json, no weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# Arguments of the transformers configuration; what is not named has that configuration's default.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
    },
    "Salesforce/blip2-itm-vit-g": {"model_type": "blip_2_vision_model"},  # EVA-CLIP ViT-g/14 without its last layer
    "google/siglip2-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "num_register_tokens": 4,
    },
    "openai/whisper-large-v3-turbo": {
        "model_type": "whisper",
        "vocab_size": 51866,
        "num_mel_bins": 128,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "decoder_layers": 4,
        "decoder_attention_heads": 20,
        "decoder_ffn_dim": 5120,
    },
}

CHATGLM = "zai-org/chatglm-6b"
META: dict[str, Any] = {"device": "meta", "dtype": torch.float16}


class ChatGLMShape(nn.Module):
    """The parameters of ChatGLM-6B, the paper's LLM, on the meta device: to be counted, not to be run.

    28 GLM blocks (arXiv 2103.10360) of width 4096 with 32 heads, a feed-forward network of 4 x the width, biases in
    both, two LayerNorms a block and one at the end; 130,528 tokens, embedded by the table that also predicts them. X2L
    does not load it: its weights are published as pickles, its tokenizer as code, and its prefix mask and
    two-dimensional positions fit no causal LM of transformers.
    """

    def __init__(self, width: int = 4096, depth: int = 28, heads: int = 32, vocab_size: int = 130_528) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads,
            max_position_embeddings=2048,
        )  # fmt: skip
        blocks = [_block(width, [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]) for _ in range(depth)]
        self.embedding = nn.Embedding(vocab_size, width, **META)
        self.head = nn.Linear(width, vocab_size, bias=False, **META)
        self.head.weight = self.embedding.weight
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(width, **META))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> nn.Module:
        return self.decoder


def _block(width: int, linears: list[tuple[int, int]]) -> nn.Sequential:
    norms = (nn.LayerNorm(width, **META) for _ in range(2))
    return nn.Sequential(*norms, *(nn.Linear(*shape, **META) for shape in linears))
