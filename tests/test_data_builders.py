"""Every builder on a small folder in the official layout, with wrong rows in it."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from typer.testing import CliRunner

from x2l.cli import app
from x2l.data.builders import BUILDERS, build
from x2l.data.builders.entry import Entry
from x2l.data.sources import DataError, read_source
from x2l.data.tasks import TASKS
from x2l.data.tools import texts_of

BROKEN = "BROKEN"  # becomes bytes that are no UTF-8


def put(path: Path, blob: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((blob.encode() if isinstance(blob, str) else blob).replace(BROKEN.encode(), b"\xff\xfe"))


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def sound(seed: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).normal(0, 0.1, 1600), 16_000, format="WAV")
    return buffer.getvalue()


def clip(seed: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        for _ in range(3):
            picture = np.full((16, 16, 3), 40 * seed, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


# Each layout holds the good rows 0, 1, 2, whose texts hold their number, and wrong ones: broken or missing media, missing or
# undecodable text, rows of another shape.


def coco(root: Path) -> None:
    images: list[Any] = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(6)]
    texts = ["dog 0", "dog 1", "dog 2", "broken photo", "absent photo", " "]
    notes: list[Any] = [{"id": i, "image_id": i, "caption": text} for i, text in enumerate(texts)]
    notes += [{"image_id": 0, "caption": BROKEN}, 3, {"id": 9}]
    put(root / "annotations/captions_train2017.json", json.dumps({"images": [*images, None], "annotations": notes}))
    for i in range(3):
        put(root / f"train2017/{i:012d}.jpg", photo(i))
    put(root / f"train2017/{3:012d}.jpg", photo(3)[:200])


def visual_genome(root: Path) -> None:
    def region(phrase: str) -> dict[str, Any]:
        return {"phrase": phrase, "x": 1, "y": 2, "width": 3, "height": 4}

    rows: list[Any] = [{"id": i, "regions": [region(f"dog {i}")]} for i in range(5)]
    rows[0]["regions"] += [region(" "), region(BROKEN), 3]
    put(root / "region_descriptions.json", json.dumps([*rows, {"id": 5, "regions": []}, 3]))
    put(root / "VG_100K/0.jpg", photo(0))
    put(root / "VG_100K/1.jpg", photo(1))
    put(root / "VG_100K_2/2.jpg", photo(2))
    put(root / "VG_100K_2/3.jpg", b"nothing")


def flickr30k(root: Path) -> None:
    lines = [f"{i}.jpg#{j}\tdog {i} {j} ." for i in range(5) for j in range(2)]
    put(root / "results_20130124.token", "\n".join([*lines, f"7.jpg#0\t{BROKEN}", "8.jpg#0"]))
    put(root / "train.txt", "0\n1\n2\n3\n4\n")
    for i in range(3):
        put(root / f"flickr30k-images/{i}.jpg", photo(i))
    put(root / "flickr30k-images/3.jpg", b"")


def flickr8k(root: Path) -> None:
    lines = [f"{i}.jpg#{j}\tdog {i} {j} ." for i in range(5) for j in range(5)]
    put(root / "Flickr8k.token.txt", "\n".join([*lines, f"2.jpg#5\tdog {BROKEN}"]))
    put(root / "flickr8kzhc.caption.txt", "".join(f"{i}.jpg#zhc#{j} 第{i}只狗。\n" for i in range(3) for j in range(5)) + "bad\n")
    put(root / "Flickr_8k.trainImages.txt", "".join(f"{i}.jpg\n" for i in (0, 1, 2, 3, 9)))
    for i in range(3):
        put(root / f"Flicker8k_Dataset/{i}.jpg", photo(i))
    put(root / "Flicker8k_Dataset/3.jpg", photo(3)[:100])


def ai_challenger(root: Path) -> None:
    rows: list[Any] = [{"image_id": f"{i}.jpg", "caption": [f"第{i}只狗"]} for i in range(4)]
    rows[0]["caption"].append("")
    rows += [{"image_id": "4.jpg", "caption": []}, {"image_id": "5.jpg", "caption": [BROKEN]}, 3]
    put(root / "caption_train_annotations_20170902.json", json.dumps(rows, ensure_ascii=False))
    for i in range(3):
        put(root / f"caption_train_images_20170902/{i}.jpg", photo(i))


def fetched(root: Path) -> None:
    for i in range(4):
        put(root / f"train/00000/{i:09d}.json", json.dumps({"caption": f"dog {i}", "status": "success", "url": "u"}))
    for i in range(3):
        put(root / f"train/00000/{i:09d}.jpg", photo(i))
    put(root / "train/00001/000010000.json", json.dumps({"caption": "gone", "status": "failed_to_download"}))
    put(root / "train/00001/000010001.json", "{")
    put(root / "train/00001/000010002.json", json.dumps({"caption": None}))
    put(root / "train/00001/000010003.json", json.dumps({"caption": BROKEN}))
    put(root / "train/00001/000010004.json", "[1]")


def msrvtt(root: Path) -> None:
    videos: list[Any] = [{"video_id": f"video{i}", "split": "train"} for i in range(5)]
    videos += [{"video_id": "video9", "split": "validate"}, 7]
    sentences = [{"video_id": f"video{i}", "caption": f"dog {i}", "sen_id": i} for i in (0, 1, 2, 3, 9)]
    sentences += [{"video_id": "video4"}, {"video_id": "video0", "caption": BROKEN}]
    put(root / "train_val_videodatainfo.json", json.dumps({"videos": videos, "sentences": sentences}))
    for i in range(3):
        put(root / f"TrainValVideo/video{i}.mp4", clip(i))
    put(root / "TrainValVideo/video3.mp4", clip(3)[:100])


def activitynet(root: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        return {"duration": 9.0, "timestamps": [[0, 4], [4, 9]], "sentences": [f"Dog {i}. ", " It runs."]}

    rows: dict[str, Any] = {f"v_{i}": row(i) for i in range(4)} | {"v_4": row(4) | {"timestamps": [[0, 4]]}, "v_5": 3}
    put(root / "train.json", json.dumps(rows | {"v_6": row(6) | {"sentences": ["Two.", BROKEN]}}))
    for i in range(3):
        put(root / f"videos/v_{i}.mp4", clip(i))


def aishell1(root: Path) -> None:
    lines = [f"BAC00{i} 第{i}只 狗" for i in range(4)] + [f"BAC007 {BROKEN}", "BAC008", "BAC005 你好", "BAC005 再见"]
    put(root / "transcript/aishell_transcript_v0.8.txt", "\n".join(lines))
    for i in (0, 1, 2, 5, 9):
        put(root / f"wav/train/S0002/BAC00{i}.wav", sound(i))
    put(root / "wav/train/S0002/BAC003.wav", sound(3)[:30])


def aishell2(root: Path) -> None:
    put(root / "data/trans.txt", "".join(f"IC{i}\t第{i}只狗\n" for i in range(4)) + f"IC7\t{BROKEN}\nIC8\n")
    put(root / "data/wav.scp", "".join(f"IC{i}\twav/C0001/IC{i}.wav\n" for i in (0, 1, 2, 3, 9)))
    for i in range(3):
        put(root / f"data/wav/C0001/IC{i}.wav", sound(i))
    put(root / "data/wav/C0001/IC3.wav", sound(3)[:30])


def speechocean762(root: Path) -> None:
    put(root / "train/text", "".join(f"00{i}\tDOG {i}\n" for i in range(4)) + f"007\t{BROKEN}\n")
    put(root / "train/wav.scp", "".join(f"00{i}\tWAVE/SPEAKER1/00{i}.WAV\n" for i in (0, 1, 2, 3, 9)) + "008\n")
    put(root / "train/utt2spk", "".join(f"00{i}\t000{i}\n" for i in range(10)))
    put(root / "train/spk2age", "0000\t6\n0001\tsix\n")
    for i in range(3):
        put(root / f"WAVE/SPEAKER1/00{i}.WAV", sound(i))
    put(root / "WAVE/SPEAKER1/003.WAV", sound(3)[:30])


def esc(root: Path) -> None:
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
    rows.writerows([f"1-{i}-A.wav", 1 + i, 0, f"rain_{i}", "True", i, "A"] for i in range(4))
    rows.writerows([["1-8-A.wav", "x", 0, "rain", "True", 8, "A"], ["1-9-A.wav", 1, 0, "", "True", 9, "A"], ["1-7-A.wav"]])
    rows.writerow(["1-6-A.wav", 1, 0, BROKEN, "True", 6, "A"])
    put(root / "meta/esc50.csv", table.getvalue())
    for i in range(3):
        put(root / f"audio/1-{i}-A.wav", sound(i))
    put(root / "audio/1-3-A.wav", sound(3)[:30])


def visdial(root: Path) -> None:
    def dialog(number: int, question: int = 0, answer: int = 0, caption: str = "a dog") -> dict[str, Any]:
        return {"image_id": number, "caption": caption, "dialog": [{"question": question, "answer": answer}] * 2}

    data: dict[str, Any] = {"questions": ["is it big", ""], "answers": [f"dog {i}" for i in range(4)]}
    data["dialogs"] = [dialog(i, answer=i) for i in range(4)]
    data["dialogs"] += [dialog(5, question=9), dialog(6, question=1), dialog(7, answer=-1), dialog(8, caption=BROKEN), 3]
    put(root / "visdial_1.0_train.json", json.dumps({"data": data}))
    put(root / f"train2014/COCO_train2014_{0:012d}.jpg", photo(0))
    put(root / f"train2014/COCO_train2014_{1:012d}.jpg", photo(1))
    put(root / f"val2014/COCO_val2014_{2:012d}.jpg", photo(2))
    put(root / f"val2014/COCO_val2014_{3:012d}.jpg", photo(3)[:200])


def llava(root: Path) -> None:
    def row(name: object, *turns: str) -> dict[str, Any]:
        talk = [{"from": "gpt" if i % 2 else "human", "value": turn} for i, turn in enumerate(turns)]
        return {"id": str(name), "image": f"{name}.jpg", "conversations": talk}

    rows: list[Any] = [row(i, "<image>\nWhat?", "A dog.", "Which?", f"Dog {i}.") for i in range(4)]
    rows += [row(5, "<image>\nWhat?"), row(6, "", "x"), row(7, "<image>\nWhat?", BROKEN), {}, 3]
    put(root / "train.json", json.dumps(rows))
    for i in range(3):
        put(root / f"train2017/{i}.jpg", photo(i))


def minigpt4(root: Path) -> None:
    rows: list[Any] = [{"image_id": str(i), "caption": f"The image shows dog {i}."} for i in range(4)]
    rows += [{"image_id": "5", "caption": ""}, {"image_id": "6", "caption": BROKEN}, 3]
    put(root / "filter_cap.json", json.dumps({"annotations": rows}))
    for i in range(3):
        put(root / f"image/{i}.jpg", photo(i))
    put(root / "image/3.jpg", photo(3)[:200])


class Case(NamedTuple):
    layout: Callable[[Path], None]
    split: str
    num_bad: int
    media: Callable[[int], bytes]
    place: str  # of row 1's media
    task: str = ""  # that must accept the result
    answer: str = ""  # of it, with a place for the row's number


CASES = {
    "ai_challenger": Case(ai_challenger, "train", 6, photo, "caption_train_images_20170902/1.jpg", "caption-zh", "第{}只狗。"),
    "cc3m": Case(fetched, "train", 6, photo, "train/00000/000000001.jpg", "caption", "Dog {}."),
    "coco": Case(coco, "train2017", 8, photo, "train2017/000000000001.jpg", "caption", "Dog {}."),
    "flickr30k": Case(flickr30k, "train", 4, photo, "flickr30k-images/1.jpg", "caption", "Dog {} 0."),
    "flickr8k": Case(flickr8k, "train", 4, photo, "Flicker8k_Dataset/1.jpg", "caption-zh", "第{}只狗。"),
    "sbu": Case(fetched, "train", 6, photo, "train/00000/000000001.jpg", "caption", "Dog {}."),
    "visual_genome": Case(visual_genome, "all", 7, photo, "VG_100K/1.jpg", "caption", "Dog {}."),
    "wukong": Case(fetched, "train", 6, photo, "train/00000/000000001.jpg", "caption-zh", "dog {}。"),
    "activitynet": Case(activitynet, "train", 4, clip, "videos/v_1.mp4"),
    "msrvtt": Case(msrvtt, "train", 5, clip, "TrainValVideo/video1.mp4"),
    "aishell1": Case(aishell1, "train", 5, sound, "wav/train/S0002/BAC001.wav", "asr", "第{}只狗"),
    "aishell2": Case(aishell2, "data", 4, sound, "data/wav/C0001/IC1.wav", "asr", "第{}只狗"),
    "esc10": Case(esc, "12345", 5, sound, "audio/1-1-A.wav"),
    "esc50": Case(esc, "12345", 5, sound, "audio/1-1-A.wav"),
    "speechocean762": Case(speechocean762, "train", 4, sound, "WAVE/SPEAKER1/001.WAV", "asr", "Dog {}"),
    "llava_instruct": Case(llava, "train", 6, photo, "train2017/1.jpg", "messages", "Dog {}."),
    "minigpt4": Case(minigpt4, "all", 4, photo, "image/1.jpg", "caption", "The image shows dog {}."),
    "visdial": Case(visdial, "train", 6, photo, "train2014/COCO_train2014_000000000001.jpg", "messages", "dog {}"),
}


def test_every_builder_is_tested() -> None:
    assert set(CASES) == set(BUILDERS)


def x2l(*arguments: object) -> str:
    """What ``x2l data`` prints."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def numbers(shards: list[Path], case: Case) -> list[int]:
    """The numbers that the rows' texts hold; each row's media must be those of its number."""
    found = []
    for record in read_source([str(path) for path in shards]):
        number = int(re.findall(r"\d", " ".join(texts_of(record.fields)))[0])
        assert list(record.media.values()) == [case.media(number)], record.key
        assert record.fields["licence"]
        assert record.fields["source"]
        if case.task:
            function, _, lang = case.task.partition("-")
            (sample, *_) = TASKS[function](record, random.Random(0), **({"lang": lang} if lang else {}))
            assert sample.messages[-1].text.startswith(case.answer.format(number))
        found.append(number)
    return sorted(found)


@pytest.mark.parametrize("name", CASES)
def test_build_and_validate(name: str, tmp_path: Path) -> None:
    case, root = CASES[name], tmp_path / "release"
    case.layout(root)
    printed = x2l("build", name, root, tmp_path / "out", "--split", case.split)
    assert f"3 rows kept, 0 dropped, {case.num_bad} bad" in printed
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert numbers(shards, case) == [0, 1, 2]
    assert "rows       3, of which bad: 0" in x2l("validate", tmp_path / "out" / "*.tar")
    again = build(name, root, case.split, tmp_path / "again", progress=False)
    assert [path.read_bytes() for path in again.shards] == [path.read_bytes() for path in shards]
    with pytest.raises(DataError, match="rows are bad"):
        build(name, root, case.split, tmp_path / "strict", max_bad=0.0, progress=False)
    put(root / case.place, case.media(1)[:300])  # each is longer
    damaged = build(name, root, case.split, tmp_path / "damaged", progress=False)
    assert numbers(damaged.shards, case) == [0, 2]
    assert len(damaged.skipped) == case.num_bad + 1


def test_a_build_goes_on_with_its_own_release_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = tmp_path / "release", list[str]()
    aishell2(root)
    before = build("aishell2", root, "data", tmp_path / "out", progress=False)
    monkeypatch.setattr(Entry, "read", lambda entry: read.append(entry.key))
    again = build("aishell2", root, "data", tmp_path / "out", progress=False)
    assert (again.kept, again.skipped, read) == (before.kept, before.skipped, [])
    put(root / "data/trans.txt", (root / "data/trans.txt").read_bytes().replace("第1".encode(), "第4".encode()))
    with pytest.raises(DataError, match="another run"):
        build("aishell2", root, "data", tmp_path / "out", progress=False)


def test_a_wrong_root_or_name_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2017\.json is missing"):
        build("coco", tmp_path, "train2017", tmp_path / "out")
    with pytest.raises(DataError, match="no builder for 'cocoa'; there are: activitynet"):
        build("cocoa", tmp_path, "train", tmp_path / "out")
    for text, problem in (("{", "not JSON"), ("{}", "expected a list of rows at annotations"), ('{"annotations": [3]}', "not one")):
        put(tmp_path / "filter_cap.json", text)
        with pytest.raises(DataError, match=problem):
            build("minigpt4", tmp_path, "all", tmp_path / "out")
