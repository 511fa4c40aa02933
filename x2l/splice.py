"""Late splice: token rows with one sentinel a media item -> the embeddings that the LLM reads. Pure functions.

Who may attend to whom is one integer a token, ``reach``: position q sees position k when k <= q < reach[k]. That single rule
covers plain rows, packed rows, padding, and rows that share a prefix as a tree (docs/architecture.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from x2l.types import IGNORE_INDEX, Features


class Spliced(NamedTuple):
    """Rows as the LLM sees them, L = longest row after every sentinel has become its embeddings."""

    embeds: Tensor  # (B, L, D)
    labels: Tensor  # (B, L)
    reach: Tensor  # (B, L), 0 = padding


def splice(
    input_ids: Tensor,
    labels: Tensor,
    reach: Tensor,
    text_embeds: Tensor,
    media: dict[int, Features],
    pad_left: bool = False,
) -> Spliced:
    """Replace each sentinel by the embeddings of its item; items come in reading order (row by row, left to right).

    Args:
        input_ids: (B, S); negative ids are sentinels.
        labels: (B, S); sentinels never carry a label.
        reach: (B, S); 0 = padding, which is dropped and added anew.
        text_embeds: (B, S, D); what stands at sentinels and padding is not read.
        media: sentinel id -> features of width D for all items with that id, each of any length, zero included.
        pad_left: align the rows at their ends (for generation) instead of at their starts.

    Raises:
        ValueError: the number of items differs from the number of sentinels; the message has both counts.
    """
    device = input_ids.device
    counts = (reach > 0).long()
    sources = [text_embeds.new_zeros(1, text_embeds.shape[-1]), text_embeds.flatten(0, 1)]
    starts = 1 + torch.arange(input_ids.numel(), device=device).view_as(input_ids)  # row of each token in `pool`
    size = 1 + input_ids.numel()
    for sentinel, features in media.items():
        at = (input_ids == sentinel) & (reach > 0)
        if int(at.sum()) != len(features.lengths):
            raise ValueError(f"{int(at.sum())} sentinels {sentinel} in the text, {len(features.lengths)} media items")
        num_items, longest = features.x.shape[:2]
        counts[at] = features.lengths.to(device)
        starts[at] = size + longest * torch.arange(num_items, device=device)
        sources.append(features.x.flatten(0, 1).to(text_embeds.dtype))
        size += num_items * longest
    known = torch.tensor([0, *media], device=device)
    unknown = (input_ids < 0) & (reach > 0) & ~torch.isin(input_ids, known)
    if bool(unknown.any()):
        left = sorted(set(input_ids[unknown].tolist()))
        raise ValueError(f"{int(unknown.sum())} sentinels {left} without media items")

    ends = counts.cumsum(1)
    totals = ends[:, -1]
    length = int(totals.max())
    shift = (length - totals)[:, None] if pad_left else torch.zeros_like(totals)[:, None]
    bounds = torch.cat([torch.zeros_like(totals)[:, None], ends], 1) + shift  # (B, S + 1), first position of each token

    # For each position of the output: the token that it belongs to, and how far into that token it lies.
    position = torch.arange(length, device=device).expand(len(input_ids), -1).contiguous()
    token = torch.searchsorted(bounds[:, 1:].contiguous(), position, right=True).clamp_max(input_ids.shape[1] - 1)
    real = (position >= shift) & (position < shift + totals[:, None])
    index = (starts.gather(1, token) + position - bounds.gather(1, token)) * real
    pool = torch.cat(sources)
    return Spliced(
        embeds=pool[index],
        labels=torch.where(real, labels.gather(1, token), IGNORE_INDEX),
        reach=torch.where(real, bounds.gather(1, reach.gather(1, token)), 0),
    )


def visibility(reach: Tensor) -> Tensor:
    """(B, L) -> boolean (B, L, L): may query q attend to key k? Every position sees itself, so no row is empty."""
    q = torch.arange(reach.shape[1], device=reach.device)
    k = q
    return ((k <= q[:, None]) & (q[:, None] < reach[:, None])) | (k == q[:, None])


def positions(visible: Tensor) -> Tensor:
    """(B, L, L) -> (B, L): the place of each token in its own sequence, which is the number of tokens it sees before it."""
    return visible.sum(-1) - 1


def parents(visible: Tensor) -> Tensor:
    """(B, L, L) -> (B, L): the position that predicts each token, its last visible predecessor; itself at a start."""
    before = visible.tril(-1)
    k = torch.arange(visible.shape[-1], device=visible.device)
    last = torch.where(before, k, -1).amax(-1)
    return torch.where(last < 0, k, last)
