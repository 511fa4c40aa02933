"""Image captions: COCO, Visual Genome, Flickr30k, Flickr8k with Flickr8k-CN, AI Challenger, and what img2dataset fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from x2l.data.builders.entry import (
    Bad,
    Entries,
    Entry,
    checked,
    each,
    grouped,
    key_of,
    need,
    read_json,
    read_lines,
    read_pairs,
    rows_at,
)


def coco(root: Path, split: str) -> Entries:
    """COCO 2014 or 2017: ``annotations/captions_<split>.json`` and the folder ``<split>``, for a split as ``train2017``."""
    table = read_json(root / "annotations" / f"captions_{split}.json")
    captions: dict[int, list[str]] = {}

    def annotation(row: dict[str, Any]) -> Entries:
        if checked(row["caption"]):
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
        else:
            yield Bad(f"annotation {row.get('id')}", "no caption")

    def image(row: dict[str, Any]) -> Entries:
        if texts := captions.get(row["id"]):
            path = root / split / row["file_name"]
            yield Entry(key_of(row["file_name"]), {"en": texts, "source": "coco", "licence": "CC-BY-4.0"}, {"jpg": path})
        else:
            yield Bad(row["file_name"], "an image without captions")

    yield from each(rows_at(table, "annotations"), "annotations", annotation)
    yield from each(rows_at(table, "images"), "images", image)


def visual_genome(root: Path, split: str) -> Entries:
    """Visual Genome: ``region_descriptions.json`` (phrases with boxes) and images in ``VG_100K``, ``VG_100K_2``; no splits."""

    def image(row: dict[str, Any]) -> Entries:
        number = row["id"] if "id" in row else row["image_id"]
        phrases, boxes = [], []
        for i, region in enumerate(row["regions"]):
            if isinstance(region, dict) and checked(region.get("phrase")):
                phrases.append(region["phrase"].strip())
                boxes.append([region[name] for name in ("x", "y", "width", "height")])
            else:
                yield Bad(f"{number}, region {i}", "no phrase")
        if not phrases:
            yield Bad(str(number), "an image without phrases")
            return
        places = [root / folder / f"{number}.jpg" for folder in ("VG_100K", "VG_100K_2")]
        fields = {"en": phrases, "boxes": boxes, "source": "visual-genome", "licence": "CC-BY-4.0"}
        yield Entry(f"vg{number}", fields, {"jpg": next((path for path in places if path.exists()), places[0])})

    yield from each(rows_at(read_json(root / "region_descriptions.json")), "image", image)


def flickr30k(root: Path, split: str) -> Entries:
    """Flickr30k: ``results_20130124.token``, ``flickr30k-images``; a split is a list ``<split>.txt`` of ids, or "all"."""
    captions, bad = grouped(_numbered(root / "results_20130124.token"))
    wanted = None if split == "all" else {name for _, name in read_lines(root / f"{split}.txt")}
    yield from bad
    for name, texts in captions.items():
        if wanted is None or name.removesuffix(".jpg") in wanted:
            fields = {"en": texts, "source": "flickr30k", "licence": "research only"}
            yield Entry(key_of(name), fields, {"jpg": root / "flickr30k-images" / name})


def flickr8k(root: Path, split: str) -> Entries:
    """Flickr8k: ``Flickr8k.token.txt``, ``Flicker8k_Dataset``, ``Flickr_8k.<split>Images.txt`` (train, dev, test).

    Chinese captions (Flickr8k-CN) are added where ``flickr8kzhc.caption.txt`` lies beside them.
    """
    english, bad = grouped(_numbered(root / "Flickr8k.token.txt"))
    chinese_path = root / "flickr8kzhc.caption.txt"
    chinese, worse = grouped(_numbered(chinese_path)) if chinese_path.exists() else ({}, [])
    yield from (*bad, *worse)
    for _, line in read_lines(root / f"Flickr_8k.{split}Images.txt"):
        name = line.strip()
        if name not in english:
            yield Bad(name, "an image without captions")
            continue
        fields = {"en": english[name], "source": "flickr8k", "licence": "research only"}
        fields |= {"zh": chinese[name]} if name in chinese else {}
        yield Entry(key_of(name), fields, {"jpg": root / "Flicker8k_Dataset" / name})


def _numbered(path: Path) -> Iterator[tuple[str, str] | Bad]:
    """Lines "<image>#<number> <caption>", or "<image>#zhc#<number> <caption>", without what follows the image."""
    for pair in read_pairs(path):
        yield pair if isinstance(pair, Bad) else (re.sub(r"#.*", "", pair[0]), pair[1])


def ai_challenger(root: Path, split: str) -> Entries:
    """AI Challenger captions (Chinese): ``caption_<split>_annotations_<date>.json``, ``caption_<split>_images_<date>``."""
    tables = sorted(root.glob(f"caption_{split}_annotations_*.json"))
    table = tables[0] if tables else need(root / f"caption_{split}_annotations_*.json")
    images = root / table.stem.replace("annotations", "images")

    def image(row: dict[str, Any]) -> Entries:
        name = row["image_id"]
        texts = [text.strip() for text in row["caption"] if checked(text)]
        if len(texts) < len(row["caption"]):
            yield Bad(f"{name}, a caption", "an empty or undecodable caption")
        if texts:
            fields = {"zh": texts, "source": "ai-challenger", "licence": "research only"}
            yield Entry(key_of(name), fields, {"jpg": images / name})
        else:
            yield Bad(name, "an image without captions")

    yield from each(rows_at(read_json(table)), "image", image)


def cc3m(root: Path, split: str) -> Entries:
    """CC3M's links as fetched by img2dataset with ``output_format=files`` into ``<root>/<split>``."""
    return _img2dataset(root / split, "cc3m", "en", "links under Google's terms")


def sbu(root: Path, split: str) -> Entries:
    """SBU Captions, fetched like CC3M."""
    return _img2dataset(root / split, "sbu", "en", "links to Flickr photos")


def wukong(root: Path, split: str) -> Entries:
    """Wukong (Chinese), fetched like CC3M."""
    return _img2dataset(root / split, "wukong", "zh", "CC-BY-NC-SA-4.0")


def _img2dataset(root: Path, source: str, lang: str, licence: str) -> Entries:
    """``<part>/<key>.json`` with "caption" and "status" beside ``<key>.jpg``; rows that were not fetched are bad rows."""
    for path in sorted(need(root).glob("*/*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            yield Bad(path.stem, f"broken JSON: {error}")
            continue
        if not isinstance(row, dict) or not checked(row.get("caption")):
            yield Bad(path.stem, "no caption")
        elif row.get("status") not in (None, "success"):
            yield Bad(path.stem, f"not fetched: {row.get('error_message') or row['status']}")
        else:
            fields = {lang: [row["caption"].strip()], "url": row.get("url"), "source": source, "licence": licence}
            yield Entry(f"{source}{path.stem}", fields, {"jpg": path.with_suffix(".jpg")})
