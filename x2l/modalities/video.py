"""Video: each of T frames is a picture to the image encoder and its Q-Former; T x num_queries embeddings (X-LLM, 3.1).

The frames of all videos are one batch of pictures: for the encoder, which may be the image modality's own, and for the
Q-Former. Without positions in time the interface has the image interface's weights, name by name, and starts as it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x2l.interfaces.adapter import Adapter
from x2l.interfaces.qformer import QFormer
from x2l.modality import Processor
from x2l.types import Features


class Frames(nn.Module):
    """A picture encoder over lists of pictures, all of them in one batch.

    Args:
        encoder: an `x2l.modality.Encoder` that gives every picture the same number of features.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.width: int = encoder.width

    def forward(self, num_frames: Tensor, which: Tensor, **inputs: Tensor) -> Features:
        """Inputs of the distinct pictures, and ``which`` of them each of the sum(num_frames) places holds.

        Returns:
            x (N, T, P, E), P features a picture, and lengths (N,) in pictures.
        """
        x = self.encoder(**inputs).x[which]
        return Features(nn.utils.rnn.pad_sequence(list(x.split(num_frames.tolist())), batch_first=True), num_frames)


class FrameProcessor:
    """Lists of pictures -> inputs of `Frames`; a picture that stands in several places is processed and encoded once."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __call__(self, videos: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        distinct = {id(picture): picture for video in videos for picture in video}
        place = {key: i for i, key in enumerate(distinct)}
        which = torch.tensor([place[id(picture)] for video in videos for picture in video])
        num_frames = torch.tensor([len(video) for video in videos])
        return self.processor(list(distinct.values())) | {"num_frames": num_frames, "which": which}


def framewise(encoder: nn.Module, processor: Processor) -> tuple[nn.Module, Processor]:
    """An encoder of pictures and its processor, made to take lists of pictures."""
    return Frames(encoder), FrameProcessor(processor)


class FrameQFormer(QFormer):
    """A Q-Former on each frame; the embeddings of a video's frames stand one after another.

    Args:
        encoder_width: E.
        max_frames: with more than 0, an embedding of the frame's place, learned from zero, is added to what the Q-Former
            gives, for at most so many frames. 0 is the paper's: the LLM's own positions alone tell the order.
        mean_frames: a video becomes the mean of its frames, Q embeddings whatever its length. It knows no order, but weights
            that have only met pictures make sense of it, where they do not of T times as many embeddings (dev/LOG.md).
        qformer: arguments of `QFormer`.
    """

    places: nn.Parameter | None

    def __init__(self, encoder_width: int, max_frames: int = 0, mean_frames: bool = False, **qformer: Any) -> None:
        super().__init__(encoder_width, **qformer)
        self.mean_frames = mean_frames
        places = nn.Parameter(torch.zeros(max_frames, self.out_width)) if max_frames else None
        self.register_parameter("places", places)

    def forward(self, features: Features) -> Features:
        """x (N, T, P, E) with lengths in frames -> (N, T * Q, C), or (N, Q, C) of the mean, with lengths in embeddings.

        Raises:
            ValueError: a video has more frames than there are places.
        """
        num_frames = features.x.shape[1]
        if self.places is not None and num_frames > len(self.places):
            raise ValueError(f"{num_frames} frames for max_frames={len(self.places)} places: take fewer or raise max_frames")
        place = torch.arange(num_frames, device=features.x.device)
        real = place < features.lengths[:, None]
        x = features.x[real]
        y = super().forward(Features(x, torch.full((len(x),), x.shape[1], device=x.device))).x
        if self.places is not None:
            y = y + self.places[place.expand_as(real)[real], None]
        out = y.new_zeros(*real.shape, *y.shape[1:])
        out[real] = y
        if self.mean_frames:
            mean_NQC = out.sum(1) / features.lengths.clamp_min(1)[:, None, None].to(y.dtype)
            return Features(mean_NQC, torch.full_like(features.lengths, self.num_queries))
        return Features(out.flatten(1, 2), features.lengths * self.num_queries)


def interface(encoder_width: int, llm_width: int, llm_std: float, **former: Any) -> list[nn.Module]:
    """The video interface; ``former`` holds the arguments of `FrameQFormer`."""
    module = FrameQFormer(encoder_width, **former)
    return [module, Adapter(module.out_width, llm_width, llm_std)]


def import_image(state: dict[str, Tensor], module: nn.Module) -> list[str]:
    """Start a video interface (or its Q-Former alone) from an image interface's weights; places in time stay zero.

    Returns:
        What of ``state`` was not used: nothing.

    Raises:
        ValueError: a tensor is missing, extra, or of another shape; the message names it.
    """
    own = {name: t.shape for name, t in module.state_dict().items() if name.split(".")[-1] != "places"}
    given = {name: t.shape for name, t in state.items()}
    differ = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if differ:
        raise ValueError(f"not the image interface of these sizes; missing, extra or of another shape: {differ[:8]}")
    module.load_state_dict(state, strict=False)
    return []
