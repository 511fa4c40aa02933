"""Error rates, the normaliser, yes/no questions; acceptance cases E13 and E15."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from x2l.data.caption_qa import QA
from x2l.data.sources import Record
from x2l.eval import bootstrap, metrics, normalize, pope, questions, tasks
from x2l.eval.predict import predict
from x2l.eval.report import report
from x2l.types import Part, Sample, user

INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}
TEXT = st.text(alphabet="abc XYZ'-.,!019%你好儿女花呃２（", max_size=20)


def edit_distance(a, b):
    """The textbook recursion, row by row: the oracle for jiwer's counts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


@given(st.lists(st.tuples(st.text("abc ", max_size=8), st.text("abc ", max_size=8)), min_size=1, max_size=6))
def test_counts_against_the_textbook(pairs):
    hyps, refs = [list(texts) for texts in zip(*pairs, strict=True)]
    for unit in ("word", "char"):
        counts = metrics.error_counts(hyps, refs, unit)
        for row, hyp, ref in zip(counts, hyps, refs, strict=True):
            a, b = metrics.units(hyp, unit), metrics.units(ref, unit)
            assert row[:3].sum() == edit_distance(a, b)
            assert row[3] == len(b)
            assert row[1] - row[2] == len(b) - len(a)  # deletions - insertions


def test_error_rate_is_pooled_over_the_corpus():
    hyps = ["a b c d", "x y z", None]
    counts = metrics.error_counts(hyps, ["a b c e", "w", "p q"], "word")
    assert metrics.summarise_errors(counts, hyps) == metrics.ErrorCounts(
        num_units=7, substitutions=2, deletions=2, insertions=2, num_utterances=3, coverage=2 / 3, num_above_100=1
    )
    assert bootstrap.score(metrics.error_rate(counts)).value == pytest.approx(100 * 6 / 7)
    with pytest.raises(ValueError, match="hold no word"):
        metrics.error_rate(metrics.error_counts(["a"], [" "], "word"))
    assert metrics.overlap(["a b", "c"], ["c", "d"]) == 0.5


def test_mixed_units():
    assert metrics.units("我有 two 苹果ok", "mixed") == ["我", "有", "two", "苹", "果", "ok"]
    with pytest.raises(ValueError, match="unknown unit 'chars'"):
        metrics.units("a", "chars")


def test_published_names_are_for_whole_sets():
    """E15."""
    metrics.check_label("AISHELL-2 test", 5000, 49527)
    metrics.check_label("AISHELL-2 test, first 100", 100, 990)
    for counts in ((4999, 49527), (5000, 49526)):
        with pytest.raises(ValueError, match="5000 samples and 49527 characters"):
            metrics.check_label("AISHELL-2 test", *counts)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("en", "I've got 25 apples, 3rd of May — 1,200.5; T-shirt!", "i've got twenty five apples third of may one "
         "thousand two hundred point five t shirt"),
        ("en", "Ring 0123, it’s 100%", "ring zero one two three it's one hundred percent"),
        ("zh", "我有25个苹果，３％！", "我有二十五个苹果 百分之三"),
        ("zh", "2023年10月1日，30年。", "二零二三年十月一日 三十年"),
        ("zh", "电话13800138000，007", "电话一三八零零一三八零零零 零零七"),
        ("wenet-like", "ＯＫ，25个", "ok 25个"),
        ("speechio-like", "呃，花儿和女兒在門兒口啊", "花和女儿在门口"),
    ],
)  # fmt: skip
def test_normaliser(name, text, expected):
    assert normalize.preset(name)(text) == expected


@given(TEXT, st.sampled_from(sorted(normalize.PRESETS)))
def test_normaliser_is_idempotent(text, name):
    normalise = normalize.preset(name)
    assert normalise(normalise(text)) == normalise(text)


def test_every_option_is_in_the_name():
    names = {normalise.name for normalise in normalize.PRESETS.values()}
    assert len(names) == len(normalize.PRESETS)
    assert normalize.preset("speechio-like").name == ("x2l-1:zh:width+case+script=simplified+numbers+punctuation+fillers+erhua")
    with pytest.raises(ValueError, match="unknown script 'hant'"):
        normalize.Normalizer("zh", script="hant")
    with pytest.raises(ValueError, match="unknown normaliser 'cn'"):
        normalize.preset("cn")


class Parrot:
    """Answers from a table, in any order of asking."""

    def __init__(self, answers):
        self.answers = answers

    def generate_text(self, samples, **decode):
        return [self.answers[sample.id] for sample in samples]


def utterances(texts: dict[str, str]) -> list[Sample]:
    return [
        Sample(key, (user(Part("speech", bytes=key.encode()), "Transcribe."),),
               {"lang": "zh" if ord(text[0]) > 999 else "en", "references": [text]})
        for key, text in texts.items()
    ]  # fmt: skip


def test_asr_task_keeps_languages_apart(tmp_path):
    samples = utterances({"a": "HELLO WORLD", "b": "今天天气好"})
    predict(Parrot({"a": "Hello, word.", "b": "今天天汽好。"}), samples, tmp_path, task="asr", model_info=INFO)
    scores = tasks.score(tmp_path)["scores"]
    assert scores["WER"]["value"] == 50
    assert scores["CER"]["value"] == pytest.approx(20)
    assert "N 2, S 1, D 0, I 0" in report([tmp_path], tmp_path / "page.html").read_text()


def test_a_missing_utterance_costs(tmp_path):
    """E13."""

    class Dies(Parrot):
        def generate_text(self, samples, **decode):
            if samples[0].id == "b":
                raise KeyboardInterrupt
            return super().generate_text(samples)

    samples = utterances({"a": "one two", "b": "three four five"})
    with pytest.raises(KeyboardInterrupt):
        predict(Dies({"a": "one two"}), samples, tmp_path, task="asr", model_info=INFO, batch_size=1)
    result = tasks.score(tmp_path)
    assert result["details"]["WER counts"]["deletions"] == 3
    assert result["details"]["WER counts"]["coverage"] == result["coverage"] == 0.5
    assert tasks.exit_code(result) != 0
    assert tasks.exit_code(result, min_coverage=0.5) == 0


def test_short_answers(tmp_path):
    samples = utterances({"a": "dog", "b": "two", "c": "red"})
    answers = {"a": "A dog.", "b": "There are 2 of them.", "c": "reddish"}
    predict(Parrot(answers), samples, tmp_path, task="qa", model_info=INFO)
    scores = tasks.score(tmp_path)["scores"]
    assert scores["exact match"]["value"] == pytest.approx(100 / 3)
    assert scores["contains"]["value"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes.", "yes"), ("No, there is not.", "no"), ("There isn't a dog", "no"), ("A dog.", ""), ("", ""),
     ("Yes, a dog. No cat.", "yes")],
)  # fmt: skip
def test_yes_or_no(text, answer):
    assert pope.read_answer(text) == answer


def test_pope_asks_what_captions_settle():
    captions = [
        ["A dog on grass", "a puppy runs", "brown dog in the grass", "An animal plays", "dog"],
        ["Two men in a car", "a man drives a car", "men", "guys in an suv", "driving"],
    ]
    present, absent = pope.named(captions[0])
    assert present == {"dog", "grass"}
    assert "cat" not in absent  # "an animal" might be one
    assert "car" in absent
    questions = pope.ask(captions, seed=1)
    assert questions == pope.ask(captions, seed=1)
    assert {(q.image, q.text, q.answer) for q in questions} == {
        (0, "Is there a dog in the image?", "yes"),
        (1, "Is there a dog in the image?", "no"),
        (0, "Is there grass in the image?", "yes"),
        (1, "Is there grass in the image?", "no"),
        (0, "Is there a man in the image?", "no"),
        (1, "Is there a man in the image?", "yes"),
        (0, "Is there a car in the image?", "no"),
        (1, "Is there a car in the image?", "yes"),
    }


def test_pope_task(tmp_path):
    samples = utterances({"a": "yes", "b": "no", "c": "yes", "d": "no"})
    answers = {"a": "Yes", "b": "Yes, it is.", "c": "A dog", "d": "No."}
    predict(Parrot(answers), samples, tmp_path, task="pope", model_info=INFO)
    scores = tasks.score(tmp_path)["scores"]
    assert scores["accuracy"]["value"] == 50
    values = {name: score["value"] for name, score in scores.items()}
    assert values == {"accuracy": 50, "precision": 50, "recall": 50, "F1": 50, "says yes": 50, "neither": 25}


FLICKR8K = Path(__file__).parents[2] / "shared/data/flickr8k/val-0000.tar"


@pytest.mark.skipif(not FLICKR8K.exists(), reason="needs shared/data/flickr8k")
def test_questions_from_flickr8k():
    from x2l.data.sources import read_source
    from x2l.eval.questions import QUESTIONS, draw

    records = list(read_source(FLICKR8K))[:100]
    captions = QUESTIONS["caption"](records)
    assert len(captions) == 100
    assert all(len(sample.meta["references"]) == 5 for sample in captions)
    assert len({sample.messages[0].text for sample in captions}) == 1
    asked = QUESTIONS["pope"](records)
    assert len(asked) > 200
    for text in {sample.messages[0].text for sample in asked}:  # no object gives its answer away
        answers = [s.meta["references"][0] for s in asked if s.messages[0].text == text]
        assert answers.count("yes") == answers.count("no")
    assert [sample.id for sample in draw(captions, 10)] == [sample.id for sample in draw(captions, 10)]


@pytest.mark.parametrize(
    ("kind", "question", "answer", "expected"),
    [
        ("colour", "What colour is the dog?", "The dog is brown.", ["brown"]),
        ("colour", "What colour is the dog?", "The dog is black and white.", ["black and white"]),
        ("count", "How many dogs are there?", "There is one dog.", ["one"]),
        ("setting", "Is this indoors or outdoors?", "It is outdoors.", ["outdoors", "outside", "outdoor"]),
    ],
)
def test_a_reference_is_what_the_answer_adds(kind: str, question: str, answer: str, expected: list[str]) -> None:
    assert questions._short(QA(kind, question, answer)) == expected


def test_no_answer_to_a_kind_of_question_stands_out() -> None:
    """20 photos of one dog, 5 of two, 4 of three: whoever always says "one" is right in a third."""
    dogs = {"One dog runs .": 20, "Two dogs run .": 5, "Three dogs run .": 4}
    records = [Record(f"{text}{i}", {"en": [text] * 5}, {"jpg": b"x"}) for text, num in dogs.items() for i in range(num)]
    asked = [sample for sample in questions.qa(records) if sample.meta["kind"] == "count"]
    answers = [sample.meta["references"][0] for sample in asked]
    assert {answer: answers.count(answer) for answer in answers} == {"one": 4, "two": 4, "three": 4}
    assert asked == [sample for sample in questions.qa(records) if sample.meta["kind"] == "count"]
