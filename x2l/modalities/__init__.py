"""The modalities that X2L knows: one file and one line each (docs/add_a_modality.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from x2l.modalities import image, speech


class Kind(NamedTuple):
    """How to build a modality's interface, and which decoder of data/media.py opens its files.

    ``interface(encoder_width, llm_width, llm_std, **arguments)`` returns the modules between encoder and LLM.
    """

    interface: Callable[..., list[nn.Module]]
    decoder: str


MODALITIES = {
    "image": Kind(image.interface, "image"),
    "speech": Kind(speech.interface, "audio"),
}
