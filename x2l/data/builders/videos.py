"""Video captions: MSR-VTT and ActivityNet Captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from x2l.data.builders.entry import Bad, Entries, Entry, checked, each, read_json, rows_at
from x2l.data.sources import DataError

CONTAINERS = (".mp4", ".mkv", ".webm", ".avi")


def msrvtt(root: Path, split: str) -> Entries:
    """MSR-VTT: ``train_val_videodatainfo.json`` with ``TrainValVideo``, or ``test_videodatainfo.json`` with ``TestVideo``."""
    part, folder = ("test", "TestVideo") if split == "test" else ("train_val", "TrainValVideo")
    table = read_json(root / f"{part}_videodatainfo.json")
    captions: dict[str, list[str]] = {}

    def sentence(row: dict[str, Any]) -> Entries:
        if checked(row["caption"]):
            captions.setdefault(row["video_id"], []).append(row["caption"].strip())
        else:
            yield Bad(f"sentence {row.get('sen_id')}", "no caption")

    def video(row: dict[str, Any]) -> Entries:
        name = row["video_id"]
        if row["split"] == split and name in captions:
            fields = {"en": captions[name], "source": "msr-vtt", "licence": "research only"}
            yield Entry(name, fields, {"mp4": root / folder / f"{name}.mp4"})
        elif row["split"] == split:
            yield Bad(name, "a video without captions")

    yield from each(rows_at(table, "sentences"), "sentences", sentence)
    yield from each(rows_at(table, "videos"), "videos", video)


def activitynet(root: Path, split: str) -> Entries:
    """ActivityNet Captions: ``<split>.json`` (train, val_1, val_2) and ``videos/v_<id>.mp4`` (or mkv, webm).

    A row holds the whole video, its sentences and their ``[start, end]`` in seconds.
    """

    def video(named: tuple[str, dict[str, Any]]) -> Entries:
        name, row = named
        times, sentences = row["timestamps"], row["sentences"]
        if not sentences or len(times) != len(sentences) or not all(checked(text) for text in sentences):
            yield Bad(name, f"{len(sentences)} sentences for {len(times)} time spans, or an empty or undecodable one")
            return
        found = [path for ending in CONTAINERS if (path := root / "videos" / f"{name}{ending}").exists()]
        path = found[0] if found else root / "videos" / f"{name}.mp4"
        fields = {
            "en": [text.strip() for text in sentences], "times": times, "seconds": row.get("duration"),
            "source": "activitynet-captions", "licence": "links to videos of others",
        }  # fmt: skip
        yield Entry(name, fields, {path.suffix[1:]: path})

    table = read_json(root / f"{split}.json")
    if not isinstance(table, dict):
        raise DataError(f"{split}.json: expected an object of videos, got {str(table)[:80]!r}")
    yield from each(table.items(), "video", video)
