"""The findings on tiny random models: what is trained and asked of whom, resumption, verdicts by intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import picture, write_shard
from test_stage3 import LAST, noise, root, shrunk, untrained  # noqa: F401 (root is a fixture)
from typer.testing import CliRunner

from x2l import reproduce, words
from x2l.cli import app
from x2l.eval import records
from x2l.reproduce import FINDINGS, SCALES, Lab, verdict

NAMES = ("tiny/stage1_image", "tiny/stage2_image", "tiny/stage3")


@pytest.fixture
def recipes(llm_folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:  # noqa: F811
    """Tiny recipes in the place of the shipped ones, test sets, and random interfaces where the stages 2 would leave them."""
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(words.vocabulary, "__defaults__", (1,))
    untrained(llm_folder, tmp_path, "image", "video", "speech")
    fields = {"en": ["A brown dog runs fast through deep white snow ."] * 5, "zh": ["一只狗在跑。"] * 5}
    photos = {f"t{i}": {"png": picture((9, 40 * i, 90)), "json": json.dumps(fields).encode()} for i in range(4)}
    write_shard(root / "flickr8k" / "test-0000.tar", photos)
    spoken = {}
    for i in range(6):
        said = {"text": "What colour is the dog?", "kind": "colour", "lang": "en", "photo": f"t{i}", "spk": "v"}
        turns = [{"role": "user", "content": []}, {"role": "assistant", "content": f"The dog is {('brown', 'black')[i % 2]}."}]
        row = json.dumps(said | {"messages": turns}).encode()
        spoken[f"q{i}"] = {"png": picture((9, 40 * i, 90)), "wav": noise(i), "json": row}
    write_shard(root / "vsdial-mini" / "test-0000.tar", spoken)
    found = {name: str(shrunk(name, llm_folder, root, tmp_path)) for name in NAMES}
    english = {"modalities.image.interface.0": f"qformer:{tmp_path / LAST['image']}/final/image.safetensors"}
    chinese = shrunk("bilingual/stage2_image", llm_folder, root, tmp_path / "zh", init=english)
    return found | {"bilingual/stage2_image": str(chinese)}


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_each_finding_ends_in_a_table(name: str, recipes: dict[str, str], root: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    lines = reproduce.reproduce([name], tmp_path / "out", root, "smoke", [0, 1], recipes=recipes)
    assert all(line.startswith(f"({name}) ") and line.endswith((": holds", ": open", ": reversed")) for line in lines)
    text = (tmp_path / "out" / "smoke" / f"{name}.md").read_text()
    assert text.count("\n| ") == 2 * len(lines) + 2
    monkeypatch.setattr(reproduce, "train", None)  # a second call trains and asks nothing
    monkeypatch.setattr(reproduce, "predict", None)
    assert reproduce.reproduce([name], tmp_path / "out", root, "smoke", [0, 1], recipes=recipes) == lines


def test_transfer_starts_from_the_english_q_former(recipes: dict[str, str], root: Path, tmp_path: Path) -> None:  # noqa: F811
    lab = Lab(tmp_path / "out", root, SCALES["smoke"], 0, recipes)
    (found,) = FINDINGS["c"](lab)
    assert records.read_json(found.better / "scores.json")["langs"] == ["zh"]
    told = {arm: json.loads((tmp_path / f"out/{arm}/seed0/config.json").read_text()) for arm in ("zh-transfer", "zh-scratch")}
    english = f"qformer:{tmp_path}/stage2_image_scored/final/image.safetensors"
    assert told["zh-transfer"]["init"] == {"modalities.image.interface.0": english}
    assert told["zh-scratch"]["init"] == {}
    told["zh-scratch"] |= {"init": told["zh-transfer"]["init"], "run": told["zh-transfer"]["run"]}
    assert told["zh-scratch"] == told["zh-transfer"]  # the start is all that differs
    assert told["zh-transfer"]["data"][0]["tasks"] == {"caption": {"lang": "zh", "num": 2}}


def test_less_data_is_a_part_of_the_photos(recipes: dict[str, str], root: Path, tmp_path: Path) -> None:  # noqa: F811
    lab = Lab(tmp_path, root, SCALES["smoke"]._replace(few=7), 0, recipes)
    sources = lab.recipe("tiny/stage2_image").data
    (source,) = reproduce.thinned(lab, sources, few=True)
    assert (source.holdout.field, source.holdout.percent, source.holdout.part) == ("en", 7, "held_out")
    assert reproduce.thinned(lab, sources, few=False) == sources


def test_stage_3_is_compared_with_what_it_starts_from(recipes: dict[str, str], root: Path, tmp_path: Path) -> None:  # noqa: F811
    lab = Lab(tmp_path / "out", root, SCALES["smoke"], 0, recipes)
    models = reproduce.around_stage3(lab)
    before, after = ({name: part.weights for name, part in models[stage].modalities.items()} for stage in ("stage2", "stage3"))
    assert before["image"] == str(tmp_path / "stage2_image_scored/final/image.safetensors")
    assert after["speech"] == str(tmp_path / "out/stage3/seed0/final/speech.safetensors")


def test_what_is_missing_is_told_and_the_rest_runs(recipes: dict[str, str], root: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "stage2_speech/final/speech.safetensors").unlink()
    lines = reproduce.reproduce(["d", "c"], tmp_path / "out", root, "smoke", [0], recipes=recipes)
    assert "speech.safetensors: train the stages before (x2l train tiny/all)" in lines[0]
    assert lines[1].startswith("(c) Chinese after English")
    nowhere = reproduce.reproduce(["e"], tmp_path / "out", tmp_path, "smoke", [0], recipes=recipes)
    assert "x2l data make vsdial-mini" in nowhere[0]


@pytest.mark.parametrize(
    ("intervals", "lower_is_better", "said"),
    [
        ([(1, 3), (0.1, 2)], False, "holds"),
        ([(1, 3), (-0.1, 2)], False, "open"),
        ([(-3, -1), (-2, -0.5)], False, "reversed"),
        ([(-3, -1), (-2, -0.5)], True, "holds"),
        ([(1, 3)], True, "reversed"),
        ([(-3, -1), (1, 2)], True, "open"),
        ([(float("nan"), float("nan"))], False, "open"),
    ],
)
def test_a_finding_holds_where_every_interval_does(intervals: list[Any], lower_is_better: bool, said: str) -> None:
    assert verdict([{"low": low, "high": high} for low, high in intervals], lower_is_better) == said


def test_unknown_names_are_told() -> None:
    result = CliRunner().invoke(app, ["reproduce", "nowhere", "--only", "z"])
    assert isinstance(result.exception, ValueError)
    assert "findings are a, b, c, d, e" in str(result.exception)
