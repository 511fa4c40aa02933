"""Conversations about images: VisDial, LLaVA-Instruct, MiniGPT-4's aligned descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from x2l.data.builders.entry import Bad, Entries, Entry, checked, each, key_of, read_json, rows_at

PLACE = "<image>"
IMAGE = {"type": "image", "key": "jpg"}


def visdial(root: Path, split: str) -> Entries:
    """VisDial v1.0: ``visdial_1.0_<split>.json`` (train, val) and COCO's ``train2014``/``val2014`` or ``VisualDial_val2018``.

    One sample a dialogue, ten questions; the caption is in ``fields["caption"]``.
    """
    table = read_json(root / f"visdial_1.0_{split}.json")
    questions, answers = rows_at(table, "data", "questions"), rows_at(table, "data", "answers")

    def dialogue(row: dict[str, Any]) -> Entries:
        key = f"visdial{row['image_id']}"
        places = [(turn["question"], turn["answer"]) for turn in row["dialog"]]
        if any(place < 0 for turn in places for place in turn):
            raise ValueError("a negative place")
        turns = [(questions[question], answers[answer]) for question, answer in places]
        if not turns or not all(map(checked, [row["caption"], *(text for turn in turns for text in turn)])):
            yield Bad(key, "no turn, or an empty or undecodable question, answer or caption")
            return
        talk = _messages([(f"{question}?", answer) for question, answer in turns])
        fields = {"id": key, "messages": talk, "caption": row["caption"], "source": "visdial", "licence": "CC-BY-4.0"}
        yield Entry(key, fields, {"jpg": _coco2014(root, int(row["image_id"]))})

    yield from each(rows_at(table, "data", "dialogs"), "dialogue", dialogue)


def _coco2014(root: Path, number: int) -> Path:
    names = ["train2014/COCO_train2014", "val2014/COCO_val2014", "VisualDial_val2018/VisualDial_val2018"]
    places = [root / f"{name}_{number:012d}.jpg" for name in names]
    return next((path for path in places if path.exists()), places[0])


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The image, then question and answer in turn."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if messages else [IMAGE, text]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def llava_instruct(root: Path, split: str) -> Entries:
    """LLaVA-Instruct: ``<split>.json``, as ``llava_instruct_150k``, and COCO's ``train2017``."""

    def conversation(numbered: tuple[int, dict[str, Any]]) -> Entries:
        number, row = numbered
        key = f"{row['id']}-{number}"  # an image's rows share their id
        texts = [turn["value"] for turn in row["conversations"]]
        speakers = [turn["from"] for turn in row["conversations"]]
        if not texts or speakers != ["human", "gpt"] * (len(texts) // 2) or not all(checked(text) for text in texts):
            yield Bad(key, "expected human and gpt in turn, none of them empty or undecodable")
            return
        clean = [text.replace(PLACE, "").strip() for text in texts]
        turns = list(zip(clean[::2], clean[1::2], strict=True))
        fields = {"id": key, "messages": _messages(turns), "source": "llava-instruct", "licence": "CC-BY-NC-4.0"}
        yield Entry(key_of(key), fields, {"jpg": root / "train2017" / Path(row["image"]).name})

    yield from each(enumerate(rows_at(read_json(root / f"{split}.json"))), "conversation", conversation)


def minigpt4(root: Path, split: str) -> Entries:
    """MiniGPT-4's aligned set (cc_sbu_align): ``filter_cap.json`` and ``image/<id>.jpg``; no splits."""

    def description(row: dict[str, Any]) -> Entries:
        name = str(row["image_id"])
        if checked(row["caption"]):
            fields = {"en": [row["caption"].strip()], "source": "minigpt-4", "licence": "BSD-3-Clause; links of CC and SBU"}
            yield Entry(f"minigpt4-{key_of(name)}", fields, {"jpg": root / "image" / f"{name}.jpg"})
        else:
            yield Bad(name, "no caption")

    yield from each(rows_at(read_json(root / "filter_cap.json"), "annotations"), "description", description)
