"""Moonshine tiny's encoder in torch, so that stage 1 can train it: as X-LLM does, encoder first, frozen ever after.

The same function as `x2l.encoders.moonshine.MoonshineEncoder`, in float32 where that one computes in int8 (in bfloat16 for
recordings that are still being made).
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network
from transformers.models.moonshine.modeling_moonshine import apply_rotary_pos_emb

from x2l.devices import bf16_in_hardware
from x2l.encoders.conformer import valid_frames
from x2l.encoders.moonshine import ASSETS, SHA256, MoonshineEncoder, dequantised, load_graph, pad, windows
from x2l.past import Past
from x2l.types import Features
from x2l.weights import resolve, sha256_of


class TorchMoonshine(MoonshineEncoder):
    """The network of `MoonshineEncoder` with trainable weights.

    Args:
        state: its weights under the names of transformers.
        max_seconds: longest window that the network sees at once.
    """

    def __init__(self, state: dict[str, Tensor], max_seconds: float = 20.0) -> None:
        nn.Module.__init__(self)
        self.max_seconds = max_seconds
        self.network = Network(MoonshineConfig())
        self.network.load_state_dict(state)

    def forward(self, waves: Tensor, lengths: Tensor) -> Features:
        """Encode ``waves`` (N, S) with ``lengths`` (N,) samples to (N, F, 288), ``F = ceil(lengths / 384)``.

        The convolutions see one window at a time, for they normalise over all of it; the blocks see all windows at once.
        """
        device, pieces, owners = waves.device, list[Tensor](), list[int]()
        for i, (wave, length) in enumerate(zip(waves, lengths.tolist(), strict=True)):
            for window in windows(wave[:length].float().cpu().numpy(), self.max_seconds):
                pieces.append(self._stem(torch.from_numpy(pad(window)).to(device)))
                owners.append(i)
        frame_lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        encoded = self._blocks(nn.utils.rnn.pad_sequence(pieces, batch_first=True), frame_lengths)
        frames = [x[:length] for x, length in zip(encoded, frame_lengths.tolist(), strict=True)]
        items = [torch.cat([x for x, owner in zip(frames, owners, strict=True) if owner == i]) for i in range(len(waves))]
        return Features(nn.utils.rnn.pad_sequence(items, batch_first=True), torch.tensor([len(x) for x in items], device=device))

    @torch.inference_mode()
    def resume(self, wave: Tensor, past: Past) -> Tensor:
        """The frames of a recording (S,) from ``past.length`` on, (1, F, 288), given what was settled of those before."""
        samples = torch.from_numpy(pad(wave.float().cpu().numpy())).to(self.network.layer_norm.weight)  # its device and type
        return self._blocks(self._stem(samples, past.length)[None], past=past).float()

    def _stem(self, samples: Tensor, begin: int = 0) -> Tensor:
        """A padded window (S,) -> its frames from ``begin`` on, (F, 288)."""
        net: Any = self.network
        x = net.groupnorm(torch.tanh(net.conv1(samples[None, None])))[..., begin * net.conv2.stride[0] * net.conv3.stride[0] :]
        x = nn.functional.gelu(net.conv3(nn.functional.gelu(net.conv2(x))))
        return x[0].T

    def _blocks(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        begin = past.length if past else 0
        rotary = self.network.rotary_emb(x, position_ids=torch.arange(begin, begin + x.shape[1], device=x.device)[None])
        mask = None if lengths is None else valid_frames(lengths, x.shape[1])[:, None, None]
        layers: Any = self.network.layers
        for layer in layers:
            x = x + _attend(layer.self_attn, layer.input_layernorm(x), rotary, mask, past)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.network.layer_norm(x)

    @torch.inference_mode()
    def _encode(self, window: np.ndarray) -> np.ndarray:
        device = self.network.layer_norm.weight.device
        frames = self._stem(torch.from_numpy(pad(window)).to(device))
        return self._blocks(frames[None], torch.tensor([len(frames)], device=device))[0].cpu().numpy()


def _attend(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: Past | None) -> Tensor:
    """`MoonshineAttention`'s forward, to which a ``past`` could only be given as one of transformers' caches."""
    q, k, v = (
        project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    if past is not None:
        k, v = past.join(k), past.join(v)
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.o_proj(y.transpose(1, 2).flatten(2))


class LazyMoonshine(MoonshineEncoder):
    """What stage 1 made of the encoder, frozen: built when it first hears something, as `MoonshineEncoder` is, and not part of
    the module tree.

    Args:
        trained: ``encoder.safetensors`` of stage 1: all weights, or those that it trained, the others being the package's.
        max_seconds: longest window that the network sees at once.
    """

    def __init__(self, trained: Path, max_seconds: float = 20.0) -> None:
        nn.Module.__init__(self)
        self.trained, self.max_seconds = trained, max_seconds
        self.register_buffer("sha256", torch.tensor(list(bytes.fromhex(sha256_of(trained))), dtype=torch.uint8))

    @cached_property
    def _network(self) -> TorchMoonshine:
        return TorchMoonshine(read_state(self.trained), self.max_seconds).requires_grad_(False).eval()

    @cached_property
    def _quick(self) -> TorchMoonshine:
        quick, frequencies = copy.deepcopy(self._network).cpu(), copy.deepcopy(self._network.network.rotary_emb).cpu()
        quick.bfloat16().network.rotary_emb = frequencies  # they are too coarse in bfloat16
        return quick

    def forward(self, waves: Tensor, lengths: Tensor) -> Features:
        """As `TorchMoonshine.forward`, on the device of ``waves``."""
        features: Features = self._network.to(waves.device)(waves, lengths)
        return features

    def resume(self, wave: Tensor, past: Past) -> Tensor:
        """As `TorchMoonshine.resume`, on the device of ``wave``; in bfloat16 on a processor that multiplies in it."""
        quick = wave.device.type == "cpu" and bf16_in_hardware()
        return (self._quick if quick else self._network.to(wave.device)).resume(wave, past)

    def _encode(self, window: np.ndarray) -> np.ndarray:
        return self._network._encode(window)


def read_state(path: Path) -> dict[str, Tensor]:
    """The encoder's weights in float32: of an ``encoder_model.ort``, or of what stage 1 wrote, which lacks what it did not train:
    that comes from the package.

    Raises:
        ValueError: it holds no Moonshine encoder.
    """
    if path.suffix == ".safetensors":
        trained = {name.removeprefix("network."): tensor.float() for name, tensor in load_file(path).items()}
        whole = "conv1.weight" in trained
        return trained if whole else read_state(resolve(f"{ASSETS}/encoder_model.ort", SHA256["encoder_model.ort"])) | trained
    graph = load_graph(path)
    weights = dequantised(graph, graph)
    renamed = {re.sub(r"_add_tensor$", "", name): tensor for name, tensor in weights.items()}
    scale, shift = (next(n for n in graph.node if n.name == f"/groupnorm/{op}").input[1] for op in ("Mul", "Add"))
    renamed |= {"groupnorm.weight": weights[scale].flatten(), "groupnorm.bias": weights[shift].flatten()}
    wanted = Network(MoonshineConfig()).state_dict()
    missing = sorted(wanted.keys() - renamed.keys())
    if missing:
        raise ValueError(f"{path} is no Moonshine encoder: it lacks {missing[:8]}")
    return {name: renamed[name] for name in wanted}
