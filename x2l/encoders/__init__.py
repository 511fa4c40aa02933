"""Frozen single-modal networks, by name.

An entry builds ``(encoder, processor)`` from flat keyword arguments. The encoder is an ``nn.Module`` with ``width``
and ``forward(**inputs) -> Features``; the processor maps a list of decoded media (PIL images, or 16 kHz waveforms) to
those inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from x2l.encoders import conformer, efficientnet, hf, moonshine, onnx, optional, resnet

Build = Callable[..., tuple[nn.Module, Callable[[Sequence[Any]], dict[str, Tensor]]]]

ENCODERS: dict[str, Build] = {
    "efficientnet_lite0": efficientnet.build,
    "resnet50": resnet.build,
    "vision": hf.build_vision,
    "speech": hf.build_speech,
    "whisper_ct2": hf.build_whisper_ct2,
    "moonshine": moonshine.build,
    "conformer": conformer.build,
    "onnx": onnx.build,
    "timm": optional.build_timm,
    "open_clip": optional.build_open_clip,
}
