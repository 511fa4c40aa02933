"""translate, speak, filter and dedupe: what they make, drop and write down; instruction pools; spoken dialogue sets."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import make_tokenizer, picture, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from x2l.corpora import recipe
from x2l.data.builders import instruct, vsdial
from x2l.data.builders.instruct import Part, build_instruct
from x2l.data.caption_qa import question_answers
from x2l.data.caption_qa_zh import question_answers_zh
from x2l.data.prompts import instructions
from x2l.data.sources import DataError, Record, read_source
from x2l.data.tasks import messages as messages_task
from x2l.data.tools import language, validate
from x2l.data.transforms.dedupe import Dedupe, _Pictures, find_duplicates
from x2l.data.transforms.filter import Filter
from x2l.data.transforms.speak import SAMPLE_RATE, Speak, levelled, noisy
from x2l.data.transforms.translate import Translate
from x2l.data.transforms.tts import synthesizer


class Dictionary:
    name = "dictionary"

    def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
        return [f"译{text}" for text in texts], Counter()


class Hum:
    """A synthesizer: a tone as long as the text."""

    name = "hum"

    def check(self, voice: str) -> str:
        return voice[:2]

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        seconds = 0.06 * len(text) / speed
        return np.sin(np.arange(int(24_000 * seconds)) / 9).astype(np.float32), 24_000


@pytest.fixture
def hum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2l.data.transforms.speak.synthesizer", lambda engine: Hum())


def test_translate_captions_and_dialogues() -> None:
    image = {"type": "image", "key": "jpg"}
    talk = [{"role": "user", "content": [image, {"type": "text", "text": "Why?"}]}, {"role": "assistant", "content": "So."}]
    rows = [Record("a", {"en": ["One.", "Two."], "caption": "Three."}), Record("b", {"messages": talk}), Record("c", {"n": 1})]
    first, second, third = Translate(Dictionary(), "en", "zh", ["caption"])(rows).rows
    assert isinstance(first, Record)
    assert (first.fields["zh"], first.fields["caption_zh"], first.fields["en"]) == (
        ["译One.", "译Two."],
        "译Three.",
        ["One.", "Two."],
    )
    assert isinstance(second, Record)
    assert second.fields["messages"][0]["content"] == [image, {"type": "text", "text": "译Why?"}]
    assert second.fields["messages"][1]["content"] == [{"type": "text", "text": "译So."}]
    assert second.fields["messages_en"] == talk
    assert third == ("c", "nothing to translate: no 'en' and no messages among n", True)


def test_translate_writes_over_nothing() -> None:
    class Counted(Dictionary):
        def translate(self, texts: list[str], source: str, target: str) -> tuple[list[str], Counter[str]]:
            asked.extend(texts)
            return super().translate(texts, source, target)

    asked: list[str] = []
    rows = [Record("a", {"en": ["One."], "zh": ["一。"]}), Record("b", {"en": ["Two."]})]
    first, second = Translate(Counted(), "en", "zh")(rows).rows
    assert first == ("a", "'zh' holds something already: choose another field with --into", True)
    assert (asked, second.fields["zh"]) == (["Two."], ["译Two."])  # type: ignore[union-attr]
    (into,) = Translate(Dictionary(), "en", "zh", into="zh_mt")(rows[:1]).rows
    assert isinstance(into, Record)
    assert (into.fields["zh"], into.fields["zh_mt"]) == (["一。"], ["译One."])


def test_speak_is_a_function_of_the_row(hum: None) -> None:
    voices = ["x:en-a", "x:en-b", "x:en-c", "x:zh-a"]
    rows = [Record(f"r{i}", {"text": f"question number {i}"}) for i in range(20)] + [Record("z", {"text": "图片里有几只狗？"})]
    speak = Speak(voices, seed=3)
    together, alone = speak(rows).rows, [speak([row]).rows[0] for row in reversed(rows)][::-1]
    assert together == alone
    notes = [row.fields["provenance"][0] for row in together if isinstance(row, Record)]
    assert {note["voice"] for note in notes[:20]} == set(voices[:3])
    assert notes[20]["voice"] == "x:zh-a"
    assert len({note["speed"] for note in notes}) > 10
    assert all(0.9 <= note["speed"] <= 1.1 and 20 <= note["snr_db"] <= 40 for note in notes)
    sound, rate = soundfile.read(io.BytesIO(together[0].media["flac"]))  # type: ignore[union-attr]
    assert (rate, sound.ndim) == (16_000, 1)
    assert len(sound) / rate == pytest.approx(0.06 * len("question number 0") / notes[0]["speed"], abs=0.01)


def test_speak_refuses_silence_and_unknown_languages(hum: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Speak(["x:en-a"])([Record("a", {"text": "你好"}), Record("b", {"text": " "}), Record("c", {})]).rows
    assert [type(row).__name__ for row in done] == ["Skipped"] * 3
    monkeypatch.setattr(Hum, "speak", lambda *_: (np.zeros(24_000, np.float32), 24_000))
    (silent,) = Speak(["x:en-a"])([Record("a", {"text": "hello there"})]).rows
    assert "silence" in silent.reason  # type: ignore[union-attr]
    with pytest.raises(DataError, match="<engine>:<voice>"):
        Speak(["slt"])


@settings(deadline=None)
@given(st.floats(5, 40), st.integers(0, 2**32))
def test_noise_has_the_power_that_is_recorded(snr: float, seed: int) -> None:
    sound = levelled(np.sin(np.arange(16_000) / 7).astype(np.float32) * 0.3, SAMPLE_RATE) * 0.2
    noise = noisy(sound, snr, seed) - sound
    assert 10 * np.log10(np.mean(sound**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.5)


@pytest.mark.parametrize(("engine", "voice", "program"), [("espeak", "en-gb+f3", "espeak-ng"), ("flite", "slt", "flite")])
def test_programs_speak(engine: str, voice: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(program):
        (row,) = Speak([f"{engine}:{voice}"])([Record("a", {"text": "How many dogs are there?"})]).rows
        assert isinstance(row, Record)
        assert 0.5 < soundfile.info(io.BytesIO(row.media["flac"])).duration < 5
        with pytest.raises((DataError, ValueError), match=r"voice|failed"):
            Speak([f"{engine}:none"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=f"the program {program} is not installed"):
        synthesizer(engine).check(voice)


def test_filter_with_a_random_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    from x2l.data.transforms.hf import Clip

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 300, "eos_token_id": 2, "max_position_embeddings": 64},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    texts = ["a red dog", "two men", "snow"]
    model = Clip(str(tmp_path / "clip"))
    found = model.similarity(Image.new("RGB", (16, 16), "red"), texts)
    assert all(-1 <= value <= 1 for value in found)
    assert found[1] == pytest.approx(model.similarity(Image.new("RGB", (16, 16), "red"), texts[1:2])[0], abs=1e-5)
    row = Record("a", {"en": texts}, {"png": picture((255, 0, 0))})
    middle = sorted(found)[1]
    (kept,) = Filter(model, "en", middle - 1e-4)([row]).rows
    assert isinstance(kept, Record)
    assert kept.fields["en"] == [text for text, value in zip(texts, found, strict=True) if value >= middle - 1e-4]
    assert len(kept.fields["provenance"][0]["similarity"]) == len(kept.fields["en"])
    (dropped,) = Filter(model, "en", 1.1)([row]).rows
    assert (dropped.bad, dropped.key) == (False, "a")  # type: ignore[union-attr]
    (broken,) = Filter(model, "en")([Record("b", {"en": texts}, {"png": b"no"})]).rows
    assert broken.bad  # type: ignore[union-attr]


def drawn(seed: int, size: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def test_dedupe(tmp_path: Path) -> None:
    long = "the quick brown fox jumps over the lazy dog and then sleeps for the whole afternoon in the warm sun"
    texts = [long, "Something else.", long.upper(), long.replace("warm", "hot"), "Something else entirely, with other words."]
    images = [drawn(0, 64), drawn(1, 64), drawn(0, 96), drawn(1, 64), drawn(2, 64)]
    files = {f"r{i}": {"png": images[i], "json": json.dumps({"en": texts[i]}).encode()} for i in range(5)}
    source = read_source(str(write_shard(tmp_path / "a.tar", files)))
    assert find_duplicates(source, "media", progress=False) == {"r3": "r1"}
    assert find_duplicates(source, "image", progress=False, workers=2) == {"r2": "r0", "r3": "r1"}
    assert find_duplicates(source, "text", progress=False) == {"r2": "r0"}
    assert find_duplicates(source, "near-text", threshold=0.7, progress=False) == {"r2": "r0", "r3": "r0"}
    kept = [isinstance(row, Record) for row in Dedupe({"r3": "r1"}, "media")(list(source)).rows]
    assert kept == [True, True, True, False, True]
    with pytest.raises(DataError, match="not 'colour'"):
        find_duplicates(source, "colour")


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=7))
def test_near_hashes_are_always_found(others: list[int], one: int, flips: set[int]) -> None:
    near = one
    for bit in flips:
        near ^= 1 << bit
    index = _Pictures(7)
    for i, other in enumerate([one, *others]):
        index.first(f"k{i}", other)
    assert index.first("near", near) != "near"


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("pool", ["caption", "asr", "video", "spoken_question"])
def test_pools_hold_twenty_different_instructions(pool: str, lang: str) -> None:
    lines = instructions(pool, lang)
    assert len(set(lines)) == len(lines) >= 20


DOGS = ["Two black dogs run on the beach .", "Two dogs are running on the beach .", "Two black dogs play on the beach .",
        "A pair of dogs .", "Two black dogs run ."]  # fmt: skip


def chinese(captions: list[str], num: int = 40) -> dict[str, set[str]]:
    """All answers by rule over many seeds."""
    found: dict[str, set[str]] = {}
    for seed in range(num):
        for pair in question_answers_zh(DOGS, captions, random.Random(seed), 9):
            found.setdefault(pair.kind, set()).add(pair.answer)
    return found


def test_chinese_answers_need_a_native_caption_that_agrees() -> None:
    agreed = chinese(["两只黑色的狗在海滩上奔跑。"])
    assert agreed["count"] <= {"两只。", "有两只狗。", "图片里有两只狗。"}
    assert agreed["count"]
    assert agreed["where"] <= {"海滩上。", "狗在海滩上。"}
    other = chinese(["一只猫坐在沙发上。"])
    assert not {"count", "where", "animal", "colour"} & other.keys()


def make_photos(path: Path, num: int = 40, prefix: str = "p") -> Path:
    rows = {}
    for i in range(num):
        fields = {"en": [text.replace("black", ["black", "white", "brown"][i % 3]) for text in DOGS],
                  "zh": [f"两只{'黑白棕'[i % 3]}色的狗在海滩上奔跑"] * 5, "source": "test"}  # fmt: skip
        rows[f"{prefix}{i:03d}"] = {"png": picture((i, 3, 3)), "json": json.dumps(fields).encode()}
    return write_shard(path, rows)


def test_each_fact_is_asked_in_a_wording_of_the_split(tmp_path: Path) -> None:
    source = read_source(str(make_photos(tmp_path / "photos.tar")))
    asked = {test: vsdial.questions(source, test, num_pairs=99) for test in (False, True)}
    for test, found in asked.items():
        assert all(vsdial.held_out(each.question, 0) == test for each in found)
    drawn = [pair for row in source for pair in question_answers(row.fields["en"], random.Random(row.key), 99)]
    by_chance = sum(vsdial.held_out(pair.question, 0) for pair in drawn)
    english = sum(each.lang == "en" for each in asked[True])
    assert english > 1.5 * by_chance > 0  # a held-out wording is looked for, not waited for


def test_vsdial_and_instruction_set(hum: None, tmp_path: Path) -> None:
    source = read_source(str(make_photos(tmp_path / "photos.tar")))
    voices = {"train": ["x:en-1", "x:zh-1", "x:en-2"], "test": ["x:en-9", "x:zh-9"]}
    for split, names in voices.items():
        asked = vsdial.questions(source, split == "test")
        shards, _ = vsdial.build_vsdial(source, tmp_path / "vsd", split, names, asked, progress=False)
        before = [path.read_bytes() for path in shards]
        again, _ = vsdial.build_vsdial(source, tmp_path / "vsd", split, names, asked, progress=False)
        assert [path.read_bytes() for path in again] == before
    found = {split: list(read_source(str(tmp_path / "vsd" / f"{split}-*.tar"))) for split in voices}
    heard = {split: {row.fields["text"] for row in rows} for split, rows in found.items()}
    assert not heard["train"] & heard["test"]
    assert {row.fields["spk"] for row in found["test"]} == set(voices["test"])
    assert {row.fields["lang"] for row in found["train"]} == {"en", "zh"}
    spoken = read_source(str(tmp_path / "vsd" / "work" / "spoken-train-*.tar"))
    assert len(spoken) <= 2 * len(heard["train"]) < len(found["train"])  # equal questions are spoken once for each take
    (sample,) = messages_task(found["train"][0], random.Random(0))
    assert [part.type for part in sample.messages[0].content] == ["image", "speech"]
    assert not validate(str(tmp_path / "vsd" / "train-*.tar"), progress=False).issues.reasons
    spoken_set = read_source(str(tmp_path / "vsd" / "train-*.tar"))
    asked_aloud = [Part(kind, spoken_set, "zh") for kind in ("image-text-speech", "image-speech-text", "conversation")]
    parts = [Part("image-text", source, "en", 7), Part("image-text", source, "zh", 5), *asked_aloud]
    shards = build_instruct(parts, tmp_path / "set")
    rows = list(read_source([str(path) for path in shards]))
    num = sum(row.fields["lang"] == "zh" for row in found["train"])
    assert Counter((row.fields["kind"], row.fields["lang"]) for row in rows) == {
        ("image-text", "en"): 7, ("image-text", "zh"): 5,
        **dict.fromkeys([(part.kind, "zh") for part in asked_aloud], num),
    }  # fmt: skip
    typed: list[bool] = []
    for row in rows:
        (sample,) = messages_task(row, random.Random(0))
        if row.fields["kind"] == "conversation":
            said = [(m.role, [part.type for part in m.content]) for m in sample.messages]
            looks, asks, answers = ("user", ["image", "text"]), ("user", ["speech"]), ("assistant", ["text"])
            assert said == [looks, answers, asks, answers, looks, answers]
            assert all(language(m.text) == "zh" for m in sample.messages if m.role == "assistant")
            continue
        pool = {"image-text": "caption", "image-text-speech": "spoken_question", "image-speech-text": "asr"}[row.fields["kind"]]
        assert ("text" in row.fields) == (pool != "caption"), "what is asked aloud is written down"
        texts = [part.text for part in sample.messages[0].content if part.type == "text"]
        assert all(str(text).strip() in instructions(pool, row.fields["lang"]) for text in texts)
        if pool == "spoken_question":
            typed.append(bool(texts))
        elif pool == "asr":
            assert [part.type for part in sample.messages[0].content] == ["image", "text", "speech"]
            assert sample.messages[1].text == row.fields["text"]
        else:
            assert texts
    assert len(set(typed)) == 2, "some speak for themselves, some come with typed words"
    assert not validate([str(path) for path in shards], progress=False).issues.reasons


def test_speech_and_video_kinds() -> None:
    rng = random.Random(0)
    heard = Record("a", {"text": "GOOD DAY"}, {"wav": b"RIFF"})
    source: Any = []
    [(content, answer)], media = instruct.speech_text(heard, Part("speech-text", source, "en"), rng)
    assert (content[-1], answer, list(media)) == ({"type": "speech", "key": "wav"}, "Good day", ["wav"])
    assert content[0]["text"].endswith("\n")  # the speech stands on a line of its own
    seen = Record("b", {"text": "bin blue now"}, {"mkv": b"1"})
    [(content, answer)], _ = instruct.video_text(seen, Part("video-text", source, "en", talking=True), rng)
    assert (content[0]["type"], answer) == ("video", 'A person faces the camera and says: "bin blue now."')
    with pytest.raises(DataError, match="0 image files"):
        instruct.image_text(seen, Part("image-text", source, "en"), rng)


def test_recipes_hold_voices_and_questions_apart() -> None:
    assert recipe.shipped() == ["vsdial-mini", "xllm-instruct-mini"]
    mini = recipe.load("vsdial-mini")
    assert isinstance(mini, recipe.VSDialRecipe)
    train, test = mini.splits["train"], mini.splits["test"]
    assert len({*train.voices, *test.voices}) >= 8
    assert not {*train.voices} & {*test.voices}
    assert (train.questions, test.questions) == ("train", "test")
    with pytest.raises(ValueError, match="shipped: vsdial-mini"):
        recipe.load("vsdial-maxi")
