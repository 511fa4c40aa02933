"""Every builder on a small folder in the official layout, with wrong rows in it."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from x2l.data.builders import BUILDERS, build
from x2l.data.sources import DataError, read_source
from x2l.data.tasks import TASKS
from x2l.data.tools import validate


def put(path: Path, blob: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob.encode() if isinstance(blob, str) else blob)


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def sound(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).normal(0, 0.1, 1600), 16_000, format="WAV")
    return buffer.getvalue()


def clip() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


# Each layout holds the good rows 0, 1, 2 and wrong ones: broken media, missing media, missing or undecodable text.


def coco(root: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(6)]
    texts = ["a dog", "a cat", "a bus", "broken photo", "absent photo", " "]
    notes = [{"id": i, "image_id": i, "caption": text} for i, text in enumerate(texts)]
    put(root / "annotations/captions_train2017.json", json.dumps({"images": images, "annotations": notes}))
    for i in range(3):
        put(root / f"train2017/{i:012d}.jpg", photo(i))
    put(root / f"train2017/{3:012d}.jpg", photo(3)[:200])


def visual_genome(root: Path) -> None:
    def region(phrase: str) -> dict[str, Any]:
        return {"phrase": phrase, "x": 1, "y": 2, "width": 3, "height": 4}

    rows = [{"id": i, "regions": [region("a dog"), region(" ")]} for i in range(5)] + [{"id": 5, "regions": []}]
    put(root / "region_descriptions.json", json.dumps(rows))
    put(root / "VG_100K/0.jpg", photo(0))
    put(root / "VG_100K/1.jpg", photo(1))
    put(root / "VG_100K_2/2.jpg", photo(2))
    put(root / "VG_100K_2/3.jpg", b"nothing")


def flickr30k(root: Path) -> None:
    lines = [f"{i}.jpg#{j}\ta caption {j} .".encode() for i in range(5) for j in range(2)]
    put(root / "results_20130124.token", b"\n".join([*lines, b"7.jpg#0\t\xff\xfe", b"8.jpg#0"]))
    put(root / "train.txt", "0\n1\n2\n3\n4\n")
    for i in range(3):
        put(root / f"flickr30k-images/{i}.jpg", photo(i))
    put(root / "flickr30k-images/3.jpg", b"")


def flickr8k(root: Path) -> None:
    put(root / "Flickr8k.token.txt", "".join(f"{i}.jpg#{j}\ta caption {j} .\n" for i in range(5) for j in range(5)))
    put(root / "flickr8kzhc.caption.txt", "".join(f"{i}.jpg#zhc#{j} 一只狗。\n" for i in range(3) for j in range(5)) + "bad\n")
    put(root / "Flickr_8k.trainImages.txt", "".join(f"{i}.jpg\n" for i in (0, 1, 2, 3, 9)))
    for i in range(3):
        put(root / f"Flicker8k_Dataset/{i}.jpg", photo(i))


def ai_challenger(root: Path) -> None:
    rows = [{"image_id": f"{i}.jpg", "caption": ["一只狗", ""]} for i in range(4)] + [{"image_id": "4.jpg", "caption": []}]
    put(root / "caption_train_annotations_20170902.json", json.dumps(rows))
    for i in range(3):
        put(root / f"caption_train_images_20170902/{i}.jpg", photo(i))


def fetched(root: Path) -> None:
    for i in range(4):
        put(root / f"train/00000/{i:09d}.json", json.dumps({"caption": "a dog", "status": "success", "url": "u"}))
    for i in range(3):
        put(root / f"train/00000/{i:09d}.jpg", photo(i))
    put(root / "train/00001/000010000.json", json.dumps({"caption": "gone", "status": "failed_to_download"}))
    put(root / "train/00001/000010001.json", "{")
    put(root / "train/00001/000010002.json", json.dumps({"caption": None}))


def msrvtt(root: Path) -> None:
    videos = [{"video_id": f"video{i}", "split": "train"} for i in range(5)] + [{"video_id": "video9", "split": "validate"}]
    sentences = [{"video_id": f"video{i}", "caption": "a man sings", "sen_id": i} for i in (0, 1, 2, 3, 9)]
    put(root / "train_val_videodatainfo.json", json.dumps({"videos": videos, "sentences": [*sentences, {"video_id": "video4"}]}))
    for i in range(3):
        put(root / f"TrainValVideo/video{i}.mp4", clip())
    put(root / "TrainValVideo/video3.mp4", clip()[:100])


def activitynet(root: Path) -> None:
    good = {"duration": 9.0, "timestamps": [[0, 4], [4, 9]], "sentences": ["One. ", " Two."]}
    rows = {f"v_{i}": good for i in range(4)} | {"v_4": good | {"timestamps": [[0, 4]]}}
    put(root / "train.json", json.dumps(rows))
    for i in range(3):
        put(root / f"videos/v_{i}.mp4", clip())


def aishell1(root: Path) -> None:
    lines = [f"BAC00{i} 你好 世界".encode() for i in range(4)] + [b"BAC007 \xff\xfe", b"BAC008"]
    put(root / "transcript/aishell_transcript_v0.8.txt", b"\n".join(lines))
    for i in range(3):
        put(root / f"wav/train/S0002/BAC00{i}.wav", sound(i))
    put(root / "wav/train/S0002/BAC003.wav", sound(3)[:30])
    put(root / "wav/train/S0002/BAC009.wav", sound(9))


def aishell2(root: Path) -> None:
    put(root / "data/trans.txt", "".join(f"IC{i}\t厨房用品\n" for i in range(4)) + "IC8\n")
    put(root / "data/wav.scp", "".join(f"IC{i}\twav/C0001/IC{i}.wav\n" for i in (0, 1, 2, 3, 9)))
    for i in range(3):
        put(root / f"data/wav/C0001/IC{i}.wav", sound(i))


def speechocean762(root: Path) -> None:
    put(root / "train/text", "".join(f"00{i}\tWE CALL IT BEAR\n" for i in range(4)))
    put(root / "train/wav.scp", "".join(f"00{i}\tWAVE/SPEAKER1/00{i}.WAV\n" for i in (0, 1, 2, 3, 9)) + "008\n")
    put(root / "train/utt2spk", "".join(f"00{i}\t0001\n" for i in range(10)))
    put(root / "train/spk2age", "0001\t6\n")
    for i in range(3):
        put(root / f"WAVE/SPEAKER1/00{i}.WAV", sound(i))


def esc(root: Path) -> None:
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
    rows.writerows([f"1-{i}-A.wav", 1 + i, 0, "rain", "True", i, "A"] for i in range(4))
    rows.writerows([["1-8-A.wav", "x", 0, "rain", "True", 8, "A"], ["1-9-A.wav", 1, 0, "", "True", 9, "A"], ["1-7-A.wav"]])
    put(root / "meta/esc50.csv", table.getvalue())
    for i in range(3):
        put(root / f"audio/1-{i}-A.wav", sound(i))


def visdial(root: Path) -> None:
    def dialog(number: int, question: int = 0) -> dict[str, Any]:
        return {"image_id": number, "caption": "a dog", "dialog": [{"question": question, "answer": 0}] * 2}

    data = {"questions": ["is it big", ""], "answers": ["no"], "dialogs": [dialog(i) for i in range(4)]}
    data["dialogs"] += [dialog(5, question=9), dialog(6, question=1)]
    put(root / "visdial_1.0_train.json", json.dumps({"data": data}))
    put(root / f"train2014/COCO_train2014_{0:012d}.jpg", photo(0))
    put(root / f"train2014/COCO_train2014_{1:012d}.jpg", photo(1))
    put(root / f"val2014/COCO_val2014_{2:012d}.jpg", photo(2))


def llava(root: Path) -> None:
    def row(name: object, *turns: str) -> dict[str, Any]:
        talk = [{"from": "gpt" if i % 2 else "human", "value": turn} for i, turn in enumerate(turns)]
        return {"id": str(name), "image": f"{name}.jpg", "conversations": talk}

    rows = [row(i, "<image>\nWhat?", "A dog.", "Where?", "Here.") for i in range(4)] + [
        row(5, "<image>\nWhat?"),
        row(6, "", "x"),
        3,
    ]
    put(root / "train.json", json.dumps(rows))
    for i in range(3):
        put(root / f"train2017/{i}.jpg", photo(i))


def minigpt4(root: Path) -> None:
    rows = [{"image_id": str(i), "caption": "The image shows a dog."} for i in range(4)] + [{"image_id": "5", "caption": ""}]
    put(root / "filter_cap.json", json.dumps({"annotations": rows}))
    for i in range(3):
        put(root / f"image/{i}.jpg", photo(i))


# corpus -> (layout, split, bad rows, task that must accept the result, its first answer)
CASES: dict[str, tuple[Callable[[Path], None], str, int, str, str]] = {
    "ai_challenger": (ai_challenger, "train", 2, "caption-zh", "一只狗。"),
    "cc3m": (fetched, "train", 4, "caption", "A dog."),
    "coco": (coco, "train2017", 4, "caption", "A "),
    "flickr30k": (flickr30k, "train", 4, "caption", "A caption 0."),
    "flickr8k": (flickr8k, "train", 3, "caption-zh", "一只狗。"),
    "sbu": (fetched, "train", 4, "caption", "A dog."),
    "visual_genome": (visual_genome, "all", 3, "caption", "A dog."),
    "wukong": (fetched, "train", 4, "caption-zh", "a dog。"),
    "activitynet": (activitynet, "train", 2, "", ""),
    "msrvtt": (msrvtt, "train", 3, "", ""),
    "aishell1": (aishell1, "train", 4, "asr", "你好世界"),
    "aishell2": (aishell2, "data", 3, "asr", "厨房用品"),
    "esc10": (esc, "12345", 4, "", ""),
    "esc50": (esc, "12345", 4, "", ""),
    "speechocean762": (speechocean762, "train", 3, "asr", "We call it bear"),
    "llava_instruct": (llava, "train", 4, "messages", "Here."),
    "minigpt4": (minigpt4, "all", 2, "caption", "The image shows a dog."),
    "visdial": (visdial, "train", 3, "messages", "no"),
}


def test_every_builder_is_tested() -> None:
    assert set(CASES) == set(BUILDERS)


@pytest.mark.parametrize("name", CASES)
def test_builder(name: str, tmp_path: Path) -> None:
    layout, split, num_bad, task, answer = CASES[name]
    layout(tmp_path / "release")
    shards, issues = build(name, tmp_path / "release", split, tmp_path / "out")
    assert len(issues) == num_bad, str(issues)
    records = list(read_source([str(path) for path in shards]))
    assert len(records) == 3
    assert all(record.fields["licence"] and record.fields["source"] for record in records)
    report = validate([str(path) for path in shards], progress=False)
    assert (report.rows, len(report.issues)) == (3, 0), str(report)
    again, _ = build(name, tmp_path / "release", split, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]
    if task:
        function, _, lang = task.partition("-")
        options = {"lang": lang} if lang else {}
        for record in records:
            assert TASKS[function](record, random.Random(0), **options)[0].messages[-1].text.startswith(answer)
    with pytest.raises(DataError, match="rows are bad"):
        build(name, tmp_path / "release", split, tmp_path / "strict", max_bad=0.0)


def test_media_stay_with_their_text(tmp_path: Path) -> None:
    coco(tmp_path)
    shards, _ = build("coco", tmp_path, "train2017", tmp_path / "out")
    for record in read_source([str(path) for path in shards]):
        number = int(record.key)
        assert record.media["jpg"] == photo(number)
        assert record.fields["en"] == [["a dog", "a cat", "a bus"][number]]


def test_a_wrong_root_or_name_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2017\.json is missing"):
        build("coco", tmp_path, "train2017", tmp_path / "out")
    with pytest.raises(DataError, match="no builder for 'cocoa'; there are: activitynet"):
        build("cocoa", tmp_path, "train", tmp_path / "out")
    put(tmp_path / "filter_cap.json", "{")
    with pytest.raises(DataError, match="not JSON"):
        build("minigpt4", tmp_path, "all", tmp_path / "out")
