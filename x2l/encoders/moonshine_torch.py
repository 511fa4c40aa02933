"""Moonshine tiny's encoder in torch, so that stage 1 can train it: as X-LLM does, encoder first, frozen ever after.

The same function as `x2l.encoders.moonshine.MoonshineEncoder`, in float32 where that one computes in int8.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Network

from x2l.encoders.conformer import valid_frames
from x2l.encoders.moonshine import ASSETS, SHA256, MoonshineEncoder, dequantised, load_graph, pad, windows
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

    @property
    def in_torch(self) -> Network:
        """The network."""
        return self.network

    def _stem(self, samples: Tensor) -> Tensor:
        """A padded window (S,) -> (F, 288)."""
        net = self.network
        x = net.groupnorm(torch.tanh(net.conv1(samples[None, None])))
        x = nn.functional.gelu(net.conv3(nn.functional.gelu(net.conv2(x))))
        return x[0].T

    def _blocks(self, x: Tensor, lengths: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.network.rotary_emb(x, position_ids=position)
        mask = valid_frames(lengths, x.shape[1])[:, None, None]
        for layer in self.network.layers:
            x = layer(x, attention_mask=mask, position_ids=position, position_embeddings=rotary)
        return self.network.layer_norm(x)

    @torch.inference_mode()
    def _encode(self, window: np.ndarray) -> np.ndarray:
        device = self.network.layer_norm.weight.device
        frames = self._stem(torch.from_numpy(pad(window)).to(device))
        return self._blocks(frames[None], torch.tensor([len(frames)], device=device))[0].cpu().numpy()


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

    def forward(self, waves: Tensor, lengths: Tensor) -> Features:
        """As `TorchMoonshine.forward`, on the device of ``waves``."""
        features: Features = self._network.to(waves.device)(waves, lengths)
        return features

    @property
    def in_torch(self) -> Network:
        """The network, built by now."""
        return self._network.network

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
