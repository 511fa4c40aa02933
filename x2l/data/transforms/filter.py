"""Keep the texts that fit their picture, by the cosine similarity of a CLIP model (arXiv 2305.04160, appendix A.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from x2l.data.media import MediaError, decode_image
from x2l.data.sources import DataError, Record
from x2l.data.tasks import media_part
from x2l.data.transforms.base import Done, Skipped, noted

PAPER_THRESHOLD = 0.45


class Similarity(Protocol):
    """A model that compares (hf.Clip)."""

    name: str

    def similarity(self, image: Image.Image, texts: Sequence[str]) -> list[float]:
        """One number a text."""


class Filter:
    """Texts of ``fields[field]`` below the threshold go, a row without any is dropped; the rest keep their similarity.

    Args:
        model: what compares. field: the captions ("en", "zh"). threshold: least similarity that is kept.
    """

    name, version, batch = "filter", "1", 1

    def __init__(self, model: Similarity, field: str, threshold: float = PAPER_THRESHOLD) -> None:
        self.model, self.field, self.threshold = model, field, threshold

    def settings(self) -> dict[str, Any]:
        return {"model": self.model.name, "field": self.field, "threshold": self.threshold}

    def __call__(self, rows: Sequence[Record]) -> Done:
        results = [self._row(row) for row in rows]
        return Done(results, Counter(dropped=sum(isinstance(row, Skipped) and not row.bad for row in results)))

    def _row(self, row: Record) -> Record | Skipped:
        value = row.fields.get(self.field)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return Skipped(row.key, f"expected texts in {self.field!r}, got {str(value)[:60]!r}")
        try:
            blob = media_part(row, "image").bytes
            assert blob is not None
            found = self.model.similarity(decode_image(blob), texts)
        except (DataError, MediaError) as error:
            return Skipped(row.key, str(error))
        kept = [(text, round(value, 4)) for text, value in zip(texts, found, strict=True) if value >= self.threshold]
        if not kept:
            return Skipped(row.key, f"similarity {max(found):.3f} below {self.threshold}", bad=False)
        chosen = kept[0][0] if isinstance(value, str) else [text for text, _ in kept]
        return noted(row, self, {self.field: chosen}, similarity=[number for _, number in kept])
