"""A modality that is no media at all, outside the package: a robot's state, one word of the LLM for each channel.

python examples/robot_state.py data/robot && PYTHONPATH=examples x2l train examples/robot_state.yaml
"""

import json
import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from x2l.data.media import MediaError
from x2l.data.sources import Record
from x2l.data.tools import write_shards
from x2l.interfaces.adapter import Adapter
from x2l.modalities import Kind
from x2l.types import Features

CHANNELS = ("joint 1", "joint 2", "joint 3", "joint 4", "joint 5", "joint 6", "gripper", "battery")  # each from -1 to 1


def decode(blob: bytes) -> Tensor:
    """A JSON object with a number for each channel -> (8,)."""
    try:
        state = torch.tensor([float(json.loads(blob)[name]) for name in CHANNELS])
    except (ValueError, KeyError, TypeError) as error:
        raise MediaError(f"not a robot's state, a number for each of {', '.join(CHANNELS)}: {error!r}") from error
    return state.nan_to_num().clamp(-1, 1)


class Waves(nn.Module):
    """The frozen encoder: every value by sines and cosines of rising frequency, (N, 8) -> (N, 8, 2 * octaves)."""

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.width = 2 * octaves
        self.register_buffer("frequency", torch.pi / 2 * 2.0 ** torch.arange(octaves))

    def forward(self, states: Tensor) -> Features:
        angles = states[..., None] * self.frequency
        return Features(torch.cat([angles.sin(), angles.cos()], -1), torch.full((len(states),), len(CHANNELS)))


class Reader(nn.Module):
    """The former: what a channel is and what it says, mixed with all the others."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.value, self.name = nn.Linear(in_width, width), nn.Parameter(0.02 * torch.randn(len(CHANNELS), width))
        self.mix = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, features: Features) -> Features:
        return Features(self.mix(self.value(features.x) + self.name), features.lengths)


def encoder(octaves: int) -> tuple[nn.Module, object]:
    return Waves(octaves), lambda states: {"states": torch.stack(states)}


def interface(encoder_width: int, llm_width: int, llm_std: float, width: int = 128) -> list[nn.Module]:
    return [Reader(encoder_width, width), Adapter(width, llm_width, llm_std)]


KIND = Kind(interface, "robot_state:decode")


def ask(key: str, rng: random.Random) -> Record:
    state = {name: round(rng.uniform(-1, 1), 2) for name in CHANNELS}
    bent = max(CHANNELS[:6], key=lambda name: abs(state[name])).capitalize()
    first = [{"type": "state", "key": "state"}, {"type": "text", "text": "Which joint is bent most?"}]
    turns = [first, f"{bent}.", "Is the gripper open?", "Yes." if state["gripper"] > 0 else "No."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Record(key, {"messages": messages}, {"state": json.dumps(state).encode()})


if __name__ == "__main__":
    write_shards((ask(f"s{i}", random.Random(i)) for i in range(5000)), Path(sys.argv[1]), "train")
