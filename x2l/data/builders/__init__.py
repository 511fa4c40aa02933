"""Official corpora -> shards. A builder is a function ``(root, split) -> entries`` and one line in ``BUILDERS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from x2l.data.builders import captions, dialogues, speech, videos
from x2l.data.builders.entry import Bad, Entries, shuffled
from x2l.data.media import MediaError
from x2l.data.sources import DataError, Issues, Record, read_file
from x2l.data.tools import check_media, write_shards

BUILDERS: dict[str, Callable[[Path, str], Entries]] = {
    "ai_challenger": captions.ai_challenger,
    "cc3m": captions.cc3m,
    "coco": captions.coco,
    "flickr30k": captions.flickr30k,
    "flickr8k": captions.flickr8k,
    "sbu": captions.sbu,
    "visual_genome": captions.visual_genome,
    "wukong": captions.wukong,
    "activitynet": videos.activitynet,
    "msrvtt": videos.msrvtt,
    "aishell1": speech.aishell1,
    "aishell2": speech.aishell2,
    "esc10": speech.esc10,
    "esc50": speech.esc50,
    "speechocean762": speech.speechocean762,
    "llava_instruct": dialogues.llava_instruct,
    "minigpt4": dialogues.minigpt4,
    "visdial": dialogues.visdial,
}


def build(name: str, root: str | Path, split: str, out: str | Path, max_bad: float = 0.01) -> tuple[list[Path], Issues]:
    """Turn an unpacked release into shards ``<out>/<split>-0000.tar``, rows in a random but fixed order.

    Every image and sound is decoded once; rows with broken or missing media, or without text, are counted and left out.

    Returns:
        The shards, and the rows that were left out.

    Raises:
        DataError: unknown corpus, not its layout, or more than ``max_bad`` of the rows are bad.
    """
    if name not in BUILDERS:
        raise DataError(f"no builder for {name!r}; there are: {', '.join(sorted(BUILDERS))}")
    entries = shuffled(BUILDERS[name](Path(root), split))
    issues = Issues(total=len(entries), max_fraction=max_bad)
    seen: set[str] = set()

    def records() -> Iterator[Record]:
        for entry in entries:
            if isinstance(entry, Bad):
                issues.add(entry.key, entry.reason)
                continue
            if entry.key in seen:
                issues.add(f"{entry.key} (again)", "the key is taken by an earlier row")
                continue
            seen.add(entry.key)
            try:
                media = {ext: read_file(path) for ext, path in entry.files.items()}
                check_media(media)
            except (DataError, MediaError) as error:
                issues.add(entry.key, error)
                continue
            yield Record(entry.key, entry.fields, media)

    return write_shards(records(), Path(out), split), issues
