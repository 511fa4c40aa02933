"""Evaluation's acceptance cases: which test shows each, those that need the whole command, and the README held to its scores.

E5, E6, E10, E12, E14 and E17 are not among the cases.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import picture
from test_eval_judge import DATA, StubServer, completion
from typer.testing import CliRunner

from x2l.eval import readme, suite, tasks
from x2l.eval.commands import app
from x2l.eval.predict import predict
from x2l.types import Part, Sample, user

ROOT = Path(__file__).parents[1]
INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}

SHOWN_BY = {
    "E1": ["judge.test_replay_llava", "judge.test_replay_xllm_in_paper_mode"],
    "E2": ["judge.test_judge_message_is_llavas_to_the_byte"],
    "E3": ["judge.test_replies_that_only_robust_reads", "judge.test_replies_that_only_paper_reads"],
    "E4": ["judge.test_unreadable_replies_are_counted", "acceptance.test_unreadable_judgements_end_the_command"],
    "E7": ["judge.test_kill_and_resume"],
    "E8": ["judge.test_position_bias"],
    "E9": ["caption.test_bootstrap_seed_and_clusters", "judge.test_intervals_cluster_by_image"],
    "E11": ["judge.test_translation_is_stored_and_not_repeated", "judge.test_chinese_answers_are_judged_in_english"],
    "E13": ["asr.test_a_missing_utterance_costs", "commands.test_strict_score_exits_non_zero"],
    "E15": ["asr.test_published_names_are_for_whole_sets", "acceptance.test_a_part_of_aishell_2_is_not_its_test_set"],
    "E16": ["commands.test_greedy_text_does_not_depend_on_the_batch"],
    "E18": ["caption.test_score_again_without_a_model", "acceptance.test_scores_come_again_where_no_model_can_be_loaded"],
    "E19": ["caption.test_one_character_of_the_prompt_is_another_request", "judge.test_one_character_asks_anew"],
    "E20": ["harness.test_lmms_eval", "harness.test_lmms_eval_finds_us_by_its_own_command", "harness.test_lm_eval"],
}


@pytest.mark.parametrize("case", SHOWN_BY)
def test_every_case_has_its_test(case: str) -> None:
    for name in SHOWN_BY[case]:
        file, _, function = name.partition(".")
        tree = ast.parse((ROOT / f"tests/test_eval_{file}.py").read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


class Says:
    """A stub that always says the same."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        return [self.text] * len(samples)


class Names:
    """A stub that looks: it names the colour of the picture, which is all that it sees."""

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        return [{picture(rgb): name for name, rgb in COLOURS.items()}.get(s.media[0].bytes or b"", "grey") for s in samples]


COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}


def pictures(num: int = 40) -> list[Sample]:
    names = list(COLOURS)
    return [
        Sample(
            f"p{i}",
            (user(Part("image", bytes=picture(COLOURS[names[i % 4]])), "What colour?"),),
            {"references": [names[i % 4]], "cluster": str(i)},
        )
        for i in range(num)
    ]


# ---------------------------------------------------------------- cases by the command


@pytest.mark.skipif(not DATA.exists(), reason="needs shared/data/llava_bench_coco")
def test_unreadable_judgements_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: 9 of 90 unreadable -> coverage 0.90 printed, exit code not 0."""
    rows = [json.loads(line) for line in (DATA / "llava/qa90_questions.jsonl").read_text().splitlines()]
    answers = [{"question_id": row["question_id"], "text": "A suitcase."} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(answers))
    with StubServer(lambda n: (200, {}, completion("I cannot say." if n % 10 == 0 else "8 9"))) as server:
        monkeypatch.setenv("X2L_JUDGE_URL", server.url)
        monkeypatch.setenv("X2L_JUDGE_MODEL", "stub")
        arguments = ["llava-bench", str(DATA / "llava"), str(tmp_path / "a.json"), "--mode", "paper", "--out", str(tmp_path / "j")]
        result = CliRunner().invoke(app, arguments)
    assert "coverage 0.90 of 90 judgements" in result.output
    assert result.exit_code == 3


def test_a_part_of_aishell_2_is_not_its_test_set(tmp_path: Path) -> None:
    """E15, by the scorer: three utterances do not carry the label."""
    asked = [
        Sample(f"u{i}", (user(Part("speech", bytes=b"x"), "?"),), {"lang": "zh", "references": ["今天天气很好"]}) for i in range(3)
    ]
    run = predict(Says("好"), asked, tmp_path, task="asr", model_info=INFO, dataset="AISHELL-2 test")
    with pytest.raises(ValueError, match="means 5000 samples and 49527 characters, this run has 3 and 18"):
        tasks.score(run)


def test_scores_come_again_where_no_model_can_be_loaded(tmp_path: Path) -> None:
    """E18: a process that cannot import torch gives the same scores from the records."""
    run = predict(Names(), pictures(), tmp_path / "run", task="qa", model_info=INFO)
    first = tasks.score(run)
    (run / "scores.json").unlink()
    code = f"import sys; sys.modules['torch'] = None; from x2l.eval import tasks; tasks.score({str(run)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert json.loads((run / "scores.json").read_text()) == first


# ---------------------------------------------------------------- the README's table


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A scoreboard folder of a model that looks."""
    out = tmp_path / "board"
    runs = [
        predict(Names(), pictures(), out / str(control), task="qa", dataset="colours", model_info=INFO, control=control)
        for control in (None, "wrong-image", "blank")
    ]
    readme.remember(out, "x2l eval scoreboard data", runs, ["asr spoken digits: the model reads no speech"])
    return out


def test_the_table_goes_between_the_marks(board: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{readme.BEGIN}\nold numbers\n{readme.END}\n\nrest\n")
    for _ in range(2):
        result = CliRunner().invoke(app, ["table", str(board), "--readme", str(page)])
        assert result.exit_code == 0, result.exception
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\n")
    assert text.endswith(f"{readme.END}\n\nrest\n")
    assert "old numbers" not in text
    assert "| this model | 40 | 1.000 | 100.0 [100.0, 100.0] |" in text
    assert "- Left out: asr spoken digits: the model reads no speech" in text
    assert "Made by `x2l eval scoreboard data` at commit " in text
    kept = json.loads((tmp_path / "docs/scoreboard.json").read_text())
    assert readme.render(kept) == readme.render(readme.collect(board))
    assert readme.render(kept) in text


@pytest.mark.parametrize("text", ["no marks", f"{readme.END} {readme.BEGIN}", f"{readme.BEGIN}{readme.END}" * 2, readme.BEGIN])
def test_a_readme_without_its_marks_is_left_alone(board: Path, tmp_path: Path, text: str) -> None:
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="needs one line <!-- scoreboard -->"):
        readme.write(page, readme.collect(board))
    assert page.read_text() == text


def test_runs_of_two_models_make_no_table(board: Path) -> None:
    manifest = json.loads((board / "blank/run.json").read_text())
    manifest["model"]["checkpoint"] = "1" * 64
    (board / "blank/run.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="blank is of another model"):
        readme.collect(board)


# ---------------------------------------------------------------- image tasks must need the image


def blind_tasks(board: dict[str, Any]) -> list[str]:
    """Tasks whose first score a control reaches to within the plain run's interval; one at chance is not solved at all."""
    found = []
    for task, scored in board["tasks"].items():
        plain = scored[""]
        if tasks.no_skill(plain):
            continue
        first = tasks.first_score(plain["task"], plain["scores"])
        found += [
            f"{task}: {control}" for control, other in scored.items() if control and first in tasks.solved_blind(plain, other)
        ]
    return found


def test_blind_tasks_are_found(board: Path, tmp_path: Path) -> None:
    assert blind_tasks(readme.collect(board)) == []
    out = tmp_path / "blind"
    runs = [
        predict(Says("red"), pictures(), out / str(control), task="qa", dataset="colours", model_info=INFO, control=control)
        for control in (None, "wrong-image")
    ]
    readme.remember(out, "x2l eval scoreboard data", runs, [])
    assert blind_tasks(readme.collect(out)) == ["qa colours: wrong-image"]
    assert "Not earned by looking: wrong-image" in readme.render(readme.collect(out))


def test_a_balanced_task_at_chance_is_said_to_be_no_skill(tmp_path: Path) -> None:
    """Whoever always says yes has solved nothing, so there is nothing to solve blind; whoever is better than that must look."""
    asked = [
        Sample(s.id, (user(s.media[0], word),), {"references": [word.lower()], "cluster": s.id})
        for s, word in zip(pictures(40), ["Yes", "No"] * 20, strict=True)
    ]
    found = {}
    for name, model in {"yes": Says("Yes."), "knows": Knows()}.items():
        runs = [
            predict(model, asked, tmp_path / name / str(control), task="pope", dataset="d", model_info=INFO, control=control)
            for control in (None, "wrong-image")
        ]
        readme.remember(tmp_path / name, "x2l eval scoreboard data", runs, [])
        found[name] = readme.collect(tmp_path / name)
    assert "No better than guessing: 50 % are right without looking." in readme.render(found["yes"])
    assert blind_tasks(found["yes"]) == []
    assert blind_tasks(found["knows"]) == ["pope d: wrong-image"]


class Knows:
    """Right without looking: the wording of the question gives its answer away."""

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        return [sample.messages[0].text for sample in samples]


def test_the_share_of_yes_is_no_skill() -> None:
    """A model that says yes as often about a wrong picture has not solved anything by it."""
    plain = {"scores": {"accuracy": {"value": 90, "low": 85, "high": 95}, "says yes": {"value": 50, "low": 45, "high": 55}}}
    control = {"scores": {"accuracy": {"value": 50}, "says yes": {"value": 50}}}
    assert tasks.solved_blind(plain, control) == []


def test_what_is_said_needs_no_picture() -> None:
    plain, wrong = ({"task": "asr", "scores": {"WER": {"value": value, "low": 30, "high": 40}}} for value in (35, 34))
    assert tasks.solved_blind(plain, wrong) == []
    assert tasks.solved_blind(plain | {"task": "lips"}, wrong) == ["WER"]


def test_words_no_better_than_silence_are_no_skill() -> None:
    """An empty answer has 100 % errors: whoever makes as many has read nothing off any lips."""
    wer = {"value": 160, "low": 140, "high": 185}
    assert tasks.no_skill({"task": "lips", "scores": {"WER": wer}}) == "No better than silence, whose WER is 100."
    assert tasks.no_skill({"task": "lips", "scores": {"WER": wer | {"high": 99.0}}}) == ""


def test_every_image_task_of_the_scoreboard_has_a_control() -> None:
    board = [suite.load(name) for name in suite.SCOREBOARD]
    assert all("wrong-image" in entry.controls for entry in board if "image" in entry.reads)


KEPT = ROOT / "docs/scoreboard.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
kept = pytest.mark.skipif(readme.BEGIN not in README, reason="the README has no marks for a scoreboard")


@kept
def test_no_image_task_of_the_readme_is_solved_blind() -> None:
    assert blind_tasks(json.loads(KEPT.read_text(encoding="utf-8"))) == []


@kept
def test_the_readme_shows_the_kept_scores() -> None:
    assert readme.render(json.loads(KEPT.read_text(encoding="utf-8"))) in README
