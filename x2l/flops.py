"""Floating-point operations by formula (Kaplan et al., arXiv 2001.08361, table 1).

A weight costs 2 for each input that meets it (multiply, add); an attention of q queries over k keys costs 4 q k w, w the
width of all heads. Norms, activations, softmax and CIF's sums are left out, as in torch.utils.flop_counter: less than 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from x2l.encoders.conformer import ConformerBlock, ConformerEncoder
from x2l.encoders.fbank import HOP, RATE, WINDOW
from x2l.encoders.hf import VisionEncoder, WhisperEncoder
from x2l.interfaces.adapter import Adapter
from x2l.interfaces.cformer import CFormer
from x2l.interfaces.qformer import QFormer
from x2l.modalities.speech import FrozenListener
from x2l.modalities.video import FrameQFormer, Frames

TOKENS_PER_SECOND = 4  # of Mandarin speech, about; an untrained listener knows no better


class Load(NamedTuple):
    """Operations of one item, and how many vectors come out."""

    flops: int
    length: int


class Item(NamedTuple):
    """What a sample holds: a sound's length, and how many pictures a video (or a sound's spectrum) is."""

    seconds: float
    pictures: int = 1


def linears(module: nn.Module, tokens: int) -> int:
    """Every linear layer of ``module`` on ``tokens`` inputs."""
    return 2 * tokens * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sums of one layer; masked pairs cost as much as others."""
    return 4 * queries * keys * width


def llm(model: Any, length: int, predicted: int, past: int = 0) -> int:
    """A dense causal LM's forward pass on ``length`` tokens after ``past`` cached ones; logits of ``predicted`` tokens."""
    config = model.config
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    layers = config.num_hidden_layers * attention(length, past + length, width)
    return linears(model.get_decoder(), length) + layers + 2 * predicted * model.get_output_embeddings().weight.numel()


# ---------------------------------------------------------------- encoders


def vision(encoder: VisionEncoder, item: Item) -> Load:
    """A vision transformer on one picture of its size; a pooling head, which X2L does not read, is left out."""
    model = encoder.model
    config, names = model.config, dict(model.named_parameters())
    patches = (config.image_size // config.patch_size) ** 2
    prefix = ("class_embedding", "cls_token", "register_tokens")
    length = patches + sum(p.numel() // encoder.width for name, p in names.items() if name.rsplit(".", 1)[-1] in prefix)
    patching = sum(2 * patches * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))
    unread = sum(linears(getattr(model, name), length) for name in ("head", "pooler") if getattr(model, name, None) is not None)
    layers = config.num_hidden_layers * attention(length, length, encoder.width)
    return Load(patching + linears(model, length) - unread + layers, length)


def whisper(encoder: WhisperEncoder, item: Item) -> Load:
    """Whole windows of 30 s; the frames of the padding are cut off afterwards."""
    model, frames = encoder.encoder, encoder.window
    config = model.config
    convolutions = 2 * (2 * frames * model.conv1.weight.numel() + frames * model.conv2.weight.numel())
    layers = config.encoder_layers * attention(frames, frames, encoder.width)
    window_seconds = frames / 50
    windows = max(1, -(-item.seconds // window_seconds))
    return Load(int(windows) * (convolutions + linears(model, frames) + layers), round(item.seconds * 50))


def conformer_block(block: Any, frames: int, width: int) -> int:
    """One Conformer block on ``frames`` frames."""
    return linears(block, frames) + 2 * frames * block.conv.depthwise.weight.numel() + attention(frames, frames, width)


def conformer(encoder: ConformerEncoder, item: Item) -> Load:
    """Mel frames through the convolution, the blocks and the poolings between them."""
    frames = (1 + (int(item.seconds * RATE) - WINDOW) // HOP + 1) // 2
    bins = encoder.project.in_features // encoder.conv.out_channels
    total = 2 * frames * bins * encoder.conv.weight.numel() + linears(encoder.project, frames)
    for number, block in enumerate(encoder.blocks, start=1):
        total += conformer_block(block, frames, encoder.width)
        if number in encoder.pool_after:
            frames = (frames + 1) // 2
    return Load(total, frames)


ENCODERS: dict[type, Callable[[Any, Item], Load]] = {
    VisionEncoder: vision,
    WhisperEncoder: whisper,
    ConformerEncoder: conformer,
}


def encoder(module: Any, item: Item, example: Callable[[], dict[str, Tensor]]) -> Load | None:
    """One item through a frozen encoder: a picture, ``item.pictures`` of them, or ``item.seconds`` of sound.

    An encoder without a formula (a convolutional network) is run once on ``example()``, if it has weights, and counted by
    PyTorch; None where PyTorch sees no operation, as in an ONNX graph.
    """
    one = module.encoder if isinstance(module, Frames) else module
    if type(one) in ENCODERS and (type(one) is not VisionEncoder or hasattr(one.model.config, "patch_size")):
        load = ENCODERS[type(one)](one, item)
        return Load(item.pictures * load.flops, item.pictures * load.length) if one is not module else load
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = module(**example())
    return Load(counter.get_total_flops(), features.x.shape[1:-1].numel()) if counter.get_total_flops() else None


# ---------------------------------------------------------------- interfaces


def qformer(former: QFormer, length: int, item: Item) -> Load:
    """``length`` features read by the queries; texts, which only stage 1 reads, are left out."""
    width, queries, total = former.out_width, former.num_queries, 0
    for block in former.blocks:
        parts: Any = block
        total += linears(parts.attention, queries) + attention(queries, queries, width) + linears(parts.ffn, queries)
        if parts.cross is not None:
            keys_values = linears(parts.cross.key, length) + linears(parts.cross.value, length)
            total += linears(parts.cross.query, queries) + linears(parts.cross.out, queries) + keys_values
            total += attention(queries, length, width)
    return Load(total, queries)


def frame_qformer(former: FrameQFormer, length: int, item: Item) -> Load:
    """The Q-Former on each picture's share of ``length`` features."""
    flops, queries = qformer(former, length // item.pictures, item)
    return Load(item.pictures * flops, queries if former.mean_frames else item.pictures * queries)


def listener(module: FrozenListener, length: int, item: Item) -> Load:
    """Frames to one embedding a token, of which speech has `TOKENS_PER_SECOND`."""
    frames = -(-length // module.stride)
    width = module.width // module.parts
    blocks = sum(conformer_block(block, frames, width) for block in module.blocks if isinstance(block, ConformerBlock))
    weights = 2 * frames * module.cif.conv.weight.numel() + linears(module.cif.fc, frames)
    total = linears(module.project, length) + blocks + linears(module.residual, frames) + weights
    return Load(total, round(item.seconds * TOKENS_PER_SECOND))


def cformer(former: CFormer, length: int, item: Item) -> Load:
    """``length`` CIF embeddings."""
    layers = len(former.blocks) * attention(length, length, former.out_width)
    return Load(linears(former, length) + layers, length)


def adapter(module: Adapter, length: int, item: Item) -> Load:
    """``length`` embeddings."""
    return Load(linears(module, length), length)


INTERFACES: dict[type, Callable[[Any, int, Item], Load]] = {
    QFormer: qformer,
    FrameQFormer: frame_qformer,
    FrozenListener: listener,
    CFormer: cformer,
    Adapter: adapter,
}


def interface(layers: Sequence[nn.Module], length: int, item: Item) -> Load | None:
    """The layers of an interface in turn; None where one of them is not known here."""
    total = 0
    for layer in layers:
        if type(layer) not in INTERFACES:
            return None
        flops, length = INTERFACES[type(layer)](layer, length, item)
        total += flops
    return Load(total, length)
