"""The modalities that X2L knows: one file and one line each (docs/add_a_modality.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from x2l.modalities import audio, image, speech, video
from x2l.modality import Processor


class Kind(NamedTuple):
    """What is a modality's own.

    ``interface(encoder_width, llm_width, llm_std, **arguments)`` returns the modules between encoder and LLM.
    ``decoder`` names what opens its files: a key of `x2l.data.media.DECODERS`, or ``package.module:function`` that takes
    bytes and the options of the recipe's ``decode``.
    ``around(encoder, processor)`` fits them to the modality; by default they stay as they are.
    """

    interface: Callable[..., list[nn.Module]]
    decoder: str
    around: Callable[[Any, Processor], tuple[nn.Module, Processor]] = lambda encoder, processor: (encoder, processor)


MODALITIES = {
    "image": Kind(image.interface, "image"),
    "video": Kind(video.interface, "video", video.framewise),
    "speech": Kind(speech.interface, "audio"),
    "audio": Kind(audio.interface, "audio", audio.as_pictures),
}
