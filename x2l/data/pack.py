"""Rows -> one row: prefixes shared as a tree, samples packed side by side; masks follow from ``reach`` (splice.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from x2l.template import Row
from x2l.types import IGNORE_INDEX, Part


class Packed(NamedTuple):
    """A row with its ``reach``; see `x2l.types.Batch`."""

    ids: list[int]
    labels: list[int]
    reach: list[int]
    media: list[Part]


def share_prefixes(rows: Sequence[Row]) -> Packed:
    """Merge rows about the same media into one tree: what they share (the photo, the question) is computed once.

    Five captions of a photo cost one Q-Former pass, one prompt and five short branches. Supervised tokens are never merged, so
    the loss is that of the separate rows, term by term. A photo or recording after the place where rows part comes once a branch.

    Args:
        rows: rows with equal media in the same order.

    Raises:
        ValueError: the rows have different media.
    """
    if any(row.media != rows[0].media for row in rows):
        raise ValueError("only rows about the same media can share a prefix")
    tree = Packed([], [], [], [])
    _grow(tree, list(rows), 0)
    return tree


def _grow(tree: Packed, rows: list[Row], depth: int) -> None:
    """Append what follows ``depth`` in rows that agree up to there, depth first."""
    rows = [row for row in rows if len(row.ids) > depth]
    while rows:
        head = rows[0]
        same = [row for row in rows if _shareable(row, head, depth)] if head.labels[depth] == IGNORE_INDEX else [head]
        end = depth + 1
        if len(same) == 1:
            end = len(head.ids)
        else:
            while all(len(row.ids) > end and _shareable(row, head, end) for row in same):
                end += 1
        start = len(tree.ids)
        tree.ids.extend(head.ids[depth:end])
        tree.labels.extend(head.labels[depth:end])
        tree.reach.extend([0] * (end - depth))
        tree.media.extend(head.media[num_media(head.ids[:depth]) : num_media(head.ids[:end])])
        _grow(tree, same, end)
        tree.reach[start : start + end - depth] = [len(tree.ids)] * (end - depth)
        chosen = {id(row) for row in same}
        rows = [row for row in rows if id(row) not in chosen]


def num_media(ids: Sequence[int]) -> int:
    """How many media items stand in ``ids``: sentinels are negative."""
    return sum(i < 0 for i in ids)


def _shareable(row: Row, head: Row, at: int) -> bool:
    return row.ids[at] == head.ids[at] and row.labels[at] == head.labels[at] == IGNORE_INDEX


def concatenate(packs: Sequence[Packed]) -> Packed:
    """Put packed rows side by side in one; none sees another."""
    row = Packed([], [], [], [])
    for pack in packs:
        row.reach.extend(len(row.ids) + r for r in pack.reach)
        row.ids.extend(pack.ids)
        row.labels.extend(pack.labels)
        row.media.extend(pack.media)
    return row
