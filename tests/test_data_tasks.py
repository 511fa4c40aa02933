"""Tasks: tidy text, shared media, same seed same samples; and the questions that captions answer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x2l.data.caption_qa import QA, RULES, question_answers
from x2l.data.prompts import POOLS, instructions, phrasings
from x2l.data.sources import DataError, Record, read_source
from x2l.data.tasks import TASKS, sentence_case, tidy

FLICKR = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a dog runs .", "A dog runs."),
        ("A child 's toy , in red ( new ) .", "A child's toy, in red (new)."),
        ('A sign says " Lucky " in red', 'A sign says "Lucky" in red.'),
        ('A sign asks " Where are you ? " .', 'A sign asks "Where are you?".'),
        ("The dogs ' toys do n't break ; number # 9 .", "The dogs' toys don't break; number #9."),
        ("  Two   dogs\n", "Two dogs."),
        ("Whoa !", "Whoa!"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_captions_are_detokenised(raw: str, expected: str) -> None:
    assert tidy(raw, "en") == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("一只 狗 在 跑 。", "一只狗在跑。"), ("一只狗", "一只狗。"), ("穿 T 恤 的人.", "穿T恤的人。"), ("", "")],
)
def test_chinese_captions(raw: str, expected: str) -> None:
    assert tidy(raw, "zh") == expected


@given(st.text(max_size=60), st.sampled_from(["en", "zh"]))
def test_tidy_is_idempotent_on_ordinary_results(text: str, lang: str) -> None:
    once = tidy(text, lang)
    assert once == once.strip()
    assert "  " not in once


def test_transcripts_in_capitals_become_sentences() -> None:
    assert sentence_case("WHAT I SAID IS I'M FINE") == "What I said is I'm fine"
    assert sentence_case("Already Fine") == "Already Fine"
    assert sentence_case("你好") == "你好"


@pytest.mark.parametrize("task", ["caption", "asr"])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_pools_hold_twenty_different_instructions(task: str, lang: str) -> None:
    pool = instructions(task, lang)
    assert len(set(pool)) == len(pool) >= 20
    assert all(line == line.strip() for line in pool)
    assert all(("\u4e00" <= line[0] <= "\u9fff") == (lang == "zh") for line in pool)


def test_an_unknown_pool_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"'caption' in language 'fr'.*caption\.en"):
        instructions("caption", "fr")


PHOTO = Record("p1", {"en": ["A dog runs .", "a dog is running"], "zh": ["一只狗"]}, {"jpg": b"photo"})


def test_captions_share_photo_and_instruction() -> None:
    samples = TASKS["caption"](PHOTO, random.Random(3))
    assert [s.messages[-1].text for s in samples] == ["A dog runs.", "A dog is running."]
    assert len({s.messages[0].text for s in samples}) == 1
    assert samples[0].media[0].bytes is samples[1].media[0].bytes is PHOTO.media["jpg"]
    assert [s.id for s in samples] == ["p1/caption-en-0", "p1/caption-en-1"]
    assert samples == TASKS["caption"](PHOTO, random.Random(3))
    assert {TASKS["caption"](PHOTO, random.Random(i))[0].messages[0].text for i in range(400)} == set(instructions("caption", "en"))
    assert TASKS["caption"](PHOTO, random.Random(0), lang="zh")[0].messages[-1].text == "一只狗。"


@pytest.mark.parametrize(
    ("record", "task", "reason"),
    [
        (Record("k", {"en": ["x"]}, {}), "caption", "no image"),
        (Record("k", {"en": ["x"]}, {"jpg": b"", "png": b""}), "caption", "2 image files"),
        (Record("k", {"en": "x"}, {"wav": b""}), "caption", "no image among its files .wav."),
        (Record("k", {}, {"jpg": b""}), "caption", "expected captions in 'en'"),
        (Record("k", {"en": [1]}, {"jpg": b""}), "caption_qa", "expected captions"),
        (Record("k", {"text": " "}, {"wav": b""}), "asr", "no transcript"),
        (Record("k", {"text": "a"}, {"jpg": b""}), "asr", "no speech"),
        (Record("k", {"messages": []}), "messages", "last message"),
        (Record("k", {}), "messages", "messages"),
        (Record("k", {"messages": [{"role": "user", "content": "hi"}]}), "messages", "last message"),
    ],
)
def test_a_record_that_lacks_something_is_a_data_error(record: Record, task: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        TASKS[task](record, random.Random(0))


def test_asr_tells_the_language_and_reads_video() -> None:
    (sample,) = TASKS["asr"](Record("a", {"text": "HELLO I SAY"}, {"mkv": b"clip"}), random.Random(0))
    assert sample.messages[-1].text == "Hello I say"
    assert (sample.media[0].type, sample.media[0].bytes, sample.meta["lang"]) == ("speech", b"clip", "en")
    (sample,) = TASKS["asr"](Record("a", {"text": "你好"}, {"opus": b"x"}), random.Random(0))
    assert sample.messages[0].text.strip() in instructions("asr", "zh")


def test_messages_resolve_keys_to_the_records_media() -> None:
    content = [{"type": "image", "key": "jpg"}, {"type": "text", "text": "What?"}]
    fields = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]}
    (sample,) = TASKS["messages"](Record("m", fields, {"jpg": b"photo"}), random.Random(0))
    assert (sample.id, sample.media[0].bytes) == ("m", b"photo")
    with pytest.raises(DataError, match=r"no 'jpg' among its files \(png\)"):
        TASKS["messages"](Record("m", json.loads(json.dumps(fields)), {"png": b""}), random.Random(0))


def ask(*captions: str, kind: str, tries: int = 40) -> set[tuple[str, str]]:
    """Every question and answer of a kind that any of many seeds gives."""
    found: set[QA] = set()
    for seed in range(tries):
        found |= {pair for pair in question_answers(list(captions), random.Random(seed), 99) if pair.kind == kind}
    return {(pair.question, pair.answer) for pair in found}


def answers(*captions: str, kind: str) -> set[str]:
    return {answer for _, answer in ask(*captions, kind=kind)}


BROWN = ["A brown dog runs on the beach.", "A brown dog is running along the beach.", "The dog runs by the sea."]


@pytest.mark.parametrize(
    ("captions", "kind", "expected"),
    [
        (BROWN, "colour", {"Brown.", "It is brown.", "The dog is brown."}),
        ([*BROWN, "A black dog runs."], "colour", set()),
        (BROWN, "animal", {"A dog."}),
        (["Two dogs play."] * 3 + ["A dog runs."], "count", {"Two.", "There are two dogs.", "Two dogs.", "There are two."}),
        (["Two dogs play."] * 3 + ["Three dogs play."], "count", set()),
        (["A man and a woman talk."] * 4, "count", {"Two.", "There are two people.", "Two people.", "There are two."}),
        (["A man talks."] * 4 + ["A man talks to a crowd."], "count", set()),
        (["A man talks."] * 4 + ["A man talks to photographers."], "count", set()),
        (["A man in a red hat sits.", "A man with a red hat.", "A man sits.", "The man sits."], "wearing",
         {"A red hat.", "The man is wearing a red hat.", "He is wearing a red hat."}),
        (["A boy rides a bike.", "A boy riding a bicycle.", "A boy on a bike.", "A boy smiles."], "riding",
         {"A bike.", "The boy is riding a bike."}),
        (["A dog with a stick in its mouth.", "A dog runs with a stick in his mouth.", "A dog."], "holding",
         {"A stick.", "The dog has a stick in its mouth.", "It has a stick in its mouth."}),
        (["A dog in the snow.", "A dog runs through deep snow.", "A dog."], "where",
         {"In the snow.", "The dog is in the snow."}),
        (["A man in a kitchen.", "A man cooks in a kitchen."], "setting",
         {"Indoors.", "It is indoors.", "The photo was taken indoors."}),
        (["A man playing tennis."] * 3, "sport", {"Tennis.", "This is tennis."}),
        (["A hot dog with a toy dog."] * 5, "animal", set()),
        (["A dog toy lies here.", "A stuffed dog."] * 2, "animal", set()),
    ],
)  # fmt: skip
def test_rules_by_example(captions: list[str], kind: str, expected: set[str]) -> None:
    assert answers(*captions, kind=kind) == expected


def test_doing_uses_a_captions_own_clause() -> None:
    found = answers(*BROWN, kind="doing")
    assert found <= {
        f"{who} is running {where}." for who in ("It", "The dog") for where in ("on the beach", "along the beach", "by the sea")
    }
    assert found


def test_absence_is_claimed_only_of_things_nobody_comes_near() -> None:
    asked = ask(
        "A puppy splashes in a puddle.", "A small dog plays.", "A dog in water.", "A dog.", "A dog.", kind="presence", tries=300
    )
    denied = {question for question, answer in asked if answer.startswith("No")}
    assert denied
    assert not any(word in question for question in denied for word in ("dog", "water", "fountain", "pool"))


def test_every_phrasing_is_complete_and_varied() -> None:
    sections = phrasings("qa", "en")
    for name, (questions, replies) in sections.items():
        assert len(set(questions)) >= 4, name
        assert replies or name == "animal"
    text = (POOLS / "qa.en.txt").read_text()
    assert "colour" in text
    assert "color " in text


@given(st.lists(st.text(alphabet=" ,.'-abdeginorstwy", max_size=50), max_size=5), st.integers(0, 9))
def test_no_text_breaks_the_rules(captions: list[str], seed: int) -> None:
    assert question_answers(captions, random.Random(seed), 4) == question_answers(captions, random.Random(seed), 4)


@pytest.mark.skipif(not FLICKR.is_dir(), reason="needs ../shared/data/flickr8k")
def test_flickr_presence_is_balanced_and_rules_all_fire() -> None:
    rng, kinds, verdicts = random.Random(0), Counter[str](), Counter[str]()
    for record in list(read_source(str(FLICKR / "val-0000.tar")))[:400]:
        for sample in TASKS["caption_qa"](record, rng, num_pairs=99):
            answer = sample.messages[-1].text
            assert "{" not in answer + sample.messages[0].text
            kinds[sample.meta["kind"]] += 1
            if sample.meta["kind"] == "presence":
                verdicts[answer.split(",")[0].rstrip(".")] += 1
    assert set(kinds) == set(RULES)
    assert 0.42 < verdicts["Yes"] / verdicts.total() < 0.58
