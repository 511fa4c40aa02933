"""Drop rows that repeat an earlier one: equal media or texts, or near ones by perceptual hash (pictures) and MinHash (texts)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import imagehash
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from x2l.data.media import MediaError, decode_image
from x2l.data.sources import DataError, Record, Source
from x2l.data.tasks import EXTENSIONS
from x2l.data.tools import texts_of
from x2l.data.transforms.base import Done, Skipped, noted

WAYS = ("media", "image", "text", "near-text")
BITS, BANDS = 64, 8  # of a perceptual hash; two that differ in fewer bits than there are bands share a band
PERMUTATIONS, SHINGLE = 64, 3


class Dedupe:
    """Of rows that are alike the first in order stays, whatever order they are worked in.

    Args:
        earlier: the row that each repeated row repeats, by its place (``find_duplicates``).
        by: "media" (equal bytes), "image" (perceptual hashes differ in at most ``distance`` bits), "text" (equal texts),
            "near-text" (MinHash finds a Jaccard similarity of character trigrams of at least ``threshold``).
    """

    name, version, batch = "dedupe", "1", 1

    def __init__(self, earlier: dict[str, str], by: str, distance: int = 4, threshold: float = 0.8) -> None:
        self.earlier, self.by, self.distance, self.threshold = earlier, by, distance, threshold

    def settings(self) -> dict[str, Any]:
        how: dict[str, dict[str, Any]] = {"image": {"distance": self.distance}, "near-text": {"threshold": self.threshold}}
        return {"by": self.by, **how.get(self.by, {})}

    def __call__(self, rows: Sequence[Record]) -> Done:
        results = [
            Skipped(row.key, f"repeats {self.earlier[row.key]}", bad=False) if row.key in self.earlier else noted(row, self, {})
            for row in rows
        ]
        return Done(results, Counter(duplicates=sum(isinstance(row, Skipped) for row in results)))


def find_duplicates(
    source: Source, by: str, distance: int = 4, threshold: float = 0.8, workers: int = 1, progress: bool = True
) -> dict[str, str]:
    """Key of each repeated row -> key of the earlier row that it repeats; rows that cannot be read are no duplicates.

    Raises:
        DataError: ``by`` is not one of ``WAYS``, or ``distance`` is not below the number of bands.
    """
    if by not in WAYS:
        raise DataError(f"duplicates are found by {', '.join(WAYS)}, not {by!r}")
    if not 0 <= distance < BANDS:
        raise DataError(f"perceptual hashes are compared up to a distance of {BANDS - 1} bits, not {distance}")
    indices: dict[str, _Index] = {"image": _Pictures(distance), "near-text": _Texts(threshold)}
    index = indices.get(by, _Equal())
    earlier: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        signatures = pool.map(lambda i: _signature(source, i, by), range(len(source)))
        for found in tqdm(signatures, total=len(source), desc="signatures", unit="row", disable=not progress):
            if found is not None:
                key, signature = found
                if (first := index.first(key, signature)) != key:
                    earlier[key] = first
    return earlier


def _signature(source: Source, number: int, by: str) -> tuple[str, Any] | None:
    try:
        record = source[number]
        if by == "media":
            hashes = [hashlib.sha256(blob).digest() for _, blob in sorted(record.media.items())]
            return (record.key, b"".join(hashes)) if hashes else None
        if by == "image":
            blob = next(blob for ext, blob in record.media.items() if ext in EXTENSIONS["image"])
            return record.key, int(str(imagehash.phash(decode_image(blob))), 16)
        text = " ".join(" ".join(texts_of(record.fields)).lower().split())
        return (record.key, text if by == "text" else _minhash(text)) if text else None
    except (DataError, MediaError, StopIteration):
        return None


def _minhash(text: str) -> MinHash:
    signature = MinHash(PERMUTATIONS, seed=1)
    signature.update_batch([text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))])
    return signature


class _Index(Protocol):
    def first(self, key: str, signature: Any) -> str:
        """The earliest row that this one repeats, or the row itself."""


class _Equal:
    def __init__(self) -> None:
        self._first: dict[Any, str] = {}

    def first(self, key: str, signature: Any) -> str:
        return self._first.setdefault(signature, key)


class _Pictures:
    """Hashes within a Hamming distance below ``BANDS`` share at least one band (pigeonhole), so bands find all of them."""

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._bands: dict[tuple[int, int], list[tuple[int, str]]] = {}

    def first(self, key: str, signature: int) -> str:
        bands = list(_bands(signature))
        for band in bands:
            for other, found in self._bands.get(band, []):
                if (signature ^ other).bit_count() <= self._distance:
                    return found
        for band in bands:
            self._bands.setdefault(band, []).append((signature, key))
        return key


def _bands(signature: int) -> Iterator[tuple[int, int]]:
    width = BITS // BANDS
    yield from ((band, signature >> band * width & (1 << width) - 1) for band in range(BANDS))


class _Texts:
    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._index = MinHashLSH(threshold, PERMUTATIONS)
        self._known: dict[str, tuple[int, MinHash]] = {}

    def first(self, key: str, signature: MinHash) -> str:
        near = [found for found in self._index.query(signature) if self._known[found][1].jaccard(signature) >= self._threshold]
        if near:
            return min(near, key=lambda found: self._known[found][0])
        self._index.insert(key, signature)
        self._known[key] = (len(self._known), signature)
        return key
