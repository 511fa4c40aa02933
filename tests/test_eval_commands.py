"""The commands and the scoreboard, with stub models."""

import json
from pathlib import Path

import pytest
from conftest import picture, tiny_model
from typer.testing import CliRunner

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import load_model_config
from x2l.eval import questions, refusal, suite, tasks
from x2l.eval.commands import app
from x2l.eval.llava_bench import CATEGORIES, Question, load_answers
from x2l.eval.predict import predict
from x2l.eval.report import report
from x2l.types import Part, Sample, user

INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}
DATA = Path(__file__).parents[2] / "shared/data"


class Says:
    """A stub that always says the same."""

    def __init__(self, text):
        self.text = text

    def generate_text(self, samples, **decode):
        return [self.text] * len(samples)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spoken(num):
    return [
        Sample(f"u{i}", (user(Part("speech", bytes=bytes([i])), "?"),), {"lang": "en", "references": [f"word {i}"]})
        for i in range(num)
    ]


def test_score_report_and_compare(tmp_path):
    runs = [predict(Says(text), spoken(9), tmp_path / text, task="asr", model_info=INFO) for text in ("word", "no")]
    result = invoke("score", runs[0], "--min-coverage", 1)
    assert result.exit_code == 0
    assert "| asr | n | coverage | WER | WER counts |" in result.output
    assert "WER" in invoke("compare", *runs).output
    assert invoke("report", runs[0], "--out", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_strict_score_exits_non_zero(tmp_path):
    """E13 by the command."""
    run = predict(Says("word"), spoken(4), tmp_path, task="asr", model_info=INFO)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:3]))
    assert invoke("score", run).exit_code == 0
    strict = invoke("score", run, "--min-coverage", 1)
    assert strict.exit_code == 3
    assert "0.750" in strict.output


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_scoreboard_runs_what_model_and_data_allow(tmp_path):
    board = [suite.load(name) for name in suite.SCOREBOARD]
    missing = suite.Entry(task="caption", dataset="elsewhere", data="nowhere/*.tar", reads=("image",))
    runs, left_out = suite.run(
        Says("A dog."), ["image"], [tmp_path, DATA], tmp_path, info=lambda reads: INFO, limit=4, entries=[*board, missing]
    )
    assert len(runs) == 3 + 3 + 3 + 1
    assert sum("reads no speech" in line for line in left_out) == 4
    assert sum("reads no audio" in line for line in left_out) == 1
    assert "caption elsewhere: no nowhere/*.tar in" in left_out[-1]
    assert sum("--lang zh does" in line for line in left_out) == 2
    assert all(tasks.score(run)["num_samples"] == 4 for run in runs)


def test_an_entry_of_one_s_own_and_its_mistakes(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("task: qa\ndataset: mine\ndata: mine/*.jsonl\n")
    assert suite.load(str(own)).decode == {"max_new_tokens": 48}
    for text, message in (
        ("tusk: qa", "tusk"),
        ("task: q\ndataset: d", "unknown task 'q'"),
        ("task: qa\ndataset: d\ncontrols: [x]", "'x'"),
    ):
        own.write_text(text)
        with pytest.raises(ValueError, match=message):
            suite.load(str(own))
    with pytest.raises(ValueError, match="no entry 'captions': use one of caption-en"):
        suite.load("captions")


def test_every_entry_is_listed():
    assert {path.stem for path in suite.BOARD.glob("*.yaml")} == {*suite.SCOREBOARD}
    assert invoke("entries").output.count("\n") == len(suite.SCOREBOARD)


def test_equal_questions_are_asked_once(tmp_path):
    """A grey picture and one question: one answer for all, unless answers are drawn; records are those of a run one by one."""
    asked = [
        Sample(f"p{i}", (user(Part("image", bytes=picture((i, 0, 0))), "What?" if i % 2 else "Who?"),), {"references": ["x"]})
        for i in range(6)
    ]

    class Counts(Says):
        num = 0

        def generate_text(self, samples, **decode):
            self.num += len(samples)
            return [sample.messages[0].text for sample in samples]

    for decode, expected in (({}, 2), ({"temperature": 1.0}, 6)):
        model, folder = Counts(""), tmp_path / str(expected)
        run = predict(model, asked, folder, task="qa", model_info=INFO, control="blank", decode=decode, batch_size=4)
        assert model.num == expected
        assert [row["raw"] for row in tasks.results(run)] == [sample.messages[0].text for sample in asked]


def test_refusal(tmp_path):
    asked = questions.refusal()
    assert len({sample.id for sample in asked}) == len(asked) == sum(map(len, refusal.REQUESTS.values()))
    run = predict(Says("I'm sorry, I can't help."), asked, tmp_path, task="refusal", model_info=INFO)
    values = {name: score["value"] for name, score in tasks.score(run)["scores"].items()}
    assert values == {"unlawful": 100, "unanswerable": 100, "harmless": 0}


@pytest.mark.parametrize(
    ("text", "reading"),
    [("Sure, first you", "answered"), ("I cannot know that.", "declined"), ("对不起，我不能帮你。", "declined"),
     ("  ", ""), ("Wash it. Then dry it. Sorry.", "answered"), ("That’s illegal!", "declined")],
)  # fmt: skip
def test_reading_of_refusals(text, reading):
    assert refusal.read_answer(text) == reading


def test_llava_bench_questions(tmp_path):
    (tmp_path / "COCO_val2014_1.jpg").write_bytes(b"x")
    question = Question(5, "1.jpg", "What?", CATEGORIES[0], (), (), "Assistant", "")
    sample = questions.llava_bench([question], tmp_path, {5: "什么？"})[0]
    assert sample.messages[0].text == "什么？"
    assert sample.meta["question_id"] == 5
    with pytest.raises(ValueError, match=r"no 2\.jpg in"):
        questions.llava_bench([Question(6, "2.jpg", "", "conv", (), (), "", "")], tmp_path)


def test_replay(tmp_path):
    row = {"question_id": 0, "category": "conv", "content": "8 9\nGood.", "tuple": [8.0, 9.0]}
    rows = [{**row, "category": category} for category in CATEGORIES]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    result = invoke("replay", f"ours={tmp_path / 'r.json'}")
    assert "| ours | 0 of 3 | as stored | 88.9 | 88.9 | 88.9 | 88.9 |" in result.output


def test_llava_bench_needs_a_judge(monkeypatch, tmp_path):
    monkeypatch.delenv("X2L_JUDGE_URL", raising=False)
    result = invoke("llava-bench", tmp_path, tmp_path / "a.jsonl")
    assert isinstance(result.exception, ValueError)
    assert "X2L_JUDGE_URL" in str(result.exception)


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data")
def test_overlap():
    result = invoke("overlap", DATA / "fsdd/train-*.tar", DATA / "fsdd/test-*.tar", "--normalizer", "en")
    assert result.output.startswith("100.0 % of ")  # ten words only


def test_answers_from_a_run_folder(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture((9, 9, 9)))
    asked = questions.llava_bench([Question(5, "1.jpg", "What?", CATEGORIES[0], (), (), "Assistant", "")], tmp_path)
    run = predict(Says(" A cat. "), asked, tmp_path / "run", task="open", model_info=INFO)
    assert load_answers(run) == {5: " A cat. "}
    assert "A cat." in report([run], tmp_path / "page.html").read_text()


def test_greedy_text_does_not_depend_on_the_batch(tmp_path, llm_folder):
    """E16, on a tiny random model in fp32: lengths mixed, rows with and without a photo."""
    recipe = tmp_path / "model.yaml"
    recipe.write_text(json.dumps(tiny_model(llm_folder)))
    assistant = Assistant(build(load_model_config(str(recipe), [])))
    asked = [
        Sample(
            f"q{i}",
            (user(*([Part("image", bytes=picture((16 * i, 0, 90)))] if i % 3 else []), "Why? " * (1 + i % 7)),),
            {"references": ["x"]},
        )
        for i in range(16)
    ]
    texts = {
        size: [
            row["raw"]
            for row in tasks.results(
                predict(
                    assistant, asked, tmp_path / str(size), task="qa", model_info=assistant.info(), batch_size=size,
                    decode={"max_new_tokens": 12}, render=assistant.render,
                )
            )
        ]
        for size in (1, 4, 16)
    }  # fmt: skip
    assert texts[1] == texts[4] == texts[16]
    assert len(set(texts[1])) > 8
