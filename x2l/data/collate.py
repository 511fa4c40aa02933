"""Samples -> Batch: render, share prefixes, decode and process media, pad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x2l.data.media import DECODERS
from x2l.data.pack import Packed, share_prefixes
from x2l.data.views import VIEWS
from x2l.template import Renderer, Row
from x2l.types import IGNORE_INDEX, Batch, Features, Media, Message, Part, Sample

Fetch = Callable[[list[bytes]], list[Tensor]]  # raw media -> cached features (F, E)
Decoder = str | Callable[..., Any]  # a key of `data.media.DECODERS`, or a function of the raw media and options


class Collator:
    """Turns samples into batches for one model.

    Args:
        renderer: samples -> rows.
        processors: modality -> processor of its encoder.
        decoders: modality -> its decoder.
        options: modality -> keyword arguments of its decoder.
    """

    def __init__(
        self,
        renderer: Renderer,
        processors: Mapping[str, Any],
        decoders: Mapping[str, Decoder],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.renderer, self.processors, self.decoders, self.options = renderer, processors, decoders, options or {}

    def train(self, samples: Sequence[Sample], fetch: Mapping[str, Fetch] | None = None) -> Batch:
        """Rows with labels; neighbouring samples about the same media become one row with shared prefixes.

        Args:
            fetch: modality -> source of cached features; modalities that it lacks are decoded and processed.
        """
        packs = []
        for _, same in groupby(samples, key=lambda s: s.media):
            rows = [self.renderer.train(sample) for sample in same]
            packs += [share_prefixes(rows)] if rows[0].media else [_single(row) for row in rows]
        return self.pad(packs, fetch or {})

    def prompt(self, conversations: Sequence[Sequence[Message]]) -> Batch:
        """One row a conversation, ready for the model to answer."""
        return self.pad([_single(self.renderer.prompt(messages)) for messages in conversations], {})

    def pad(self, packs: Sequence[Packed], fetch: Mapping[str, Fetch]) -> Batch:
        """Right-pad rows to one length and gather their media in reading order."""
        longest = max(len(pack.ids) for pack in packs)

        def column(name: str, fill: int) -> Tensor:
            return torch.tensor([[*getattr(p, name), *[fill] * (longest - len(p.ids))] for p in packs])

        parts = [part for pack in packs for part in pack.media]
        media = {}
        for name in sorted({part.type for part in parts}):
            mine = [part for part in parts if part.type == name]
            ready = [part.features for part in mine if part.features is not None]
            if ready:
                media[name] = Media(features=stack([f.x[0, : int(f.lengths[0])] for f in ready]))
                assert len(ready) == len(mine), "either all items of a modality carry features, or none"
            elif name in fetch:
                media[name] = Media(features=stack(fetch[name]([raw(part) for part in mine])))
            else:
                media[name] = Media(inputs=self.process(name, [raw(part) for part in mine]))
        return Batch(column("ids", 0), column("labels", IGNORE_INDEX), column("reach", 0), media)

    def process(self, modality: str, items: Sequence[bytes], view: int = 0) -> dict[str, Tensor]:
        """Raw media, decoded in one of their views (data/views.py) -> the encoder's inputs."""
        return self.processors[modality]([self.decode(modality, item, view) for item in items])

    def decode(self, modality: str, item: bytes, view: int = 0) -> Any:
        """One file as the modality's processor takes it.

        Raises:
            ValueError: it is broken, or has no such view.
        """
        decoder, options = self.decoders[modality], self.options.get(modality, {})
        if not view:
            return (DECODERS[decoder] if isinstance(decoder, str) else decoder)(item, **options)
        if decoder not in VIEWS:
            raise ValueError(f"{modality} has no view {view}, only the item as it is: set views to 1")
        return VIEWS[decoder](item, view, **options)


def raw(part: Part) -> bytes:
    """The bytes of a media part given by bytes or path.

    Raises:
        ValueError: the file cannot be read, or the part is given in another way.
    """
    if part.bytes is not None:
        return part.bytes
    if part.path is None:
        raise ValueError(f"a {part.type} part here needs bytes or a path, got {part}")
    try:
        return Path(part.path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {part.type} file {part.path!r}: {error.strerror}") from error


def _single(row: Row) -> Packed:
    return Packed(row.ids, row.labels, [len(row.ids)] * len(row.ids), row.media)


def stack(items: Sequence[Tensor]) -> Features:
    """Features (F, E) of several items, right-padded to one tensor."""
    x = torch.nn.utils.rnn.pad_sequence([item.float() for item in items], batch_first=True)
    return Features(x, torch.tensor([len(item) for item in items]))
