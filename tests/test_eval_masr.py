"""Multimodal ASR and spoken questions about photos, on rows as VSDial has them: four pictures, paired tests, overlap."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import picture, write_shard
from typer.testing import CliRunner

from x2l.data.sources import read_source
from x2l.eval import commands, controls, masr, questions, records, tasks
from x2l.eval.predict import predict
from x2l.types import Part, Sample, user

INFO = {"checkpoint": "0" * 64, "device": "cpu", "dtype": "float32"}
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}


SHADES = ("bright", "bright", "bright", "dark", "dark", "pale")  # what answers say


def shade(rgb: tuple[int, int, int], photo: int) -> bytes:
    """Each photo has a shade of its own."""
    red, green, blue = (max(0, value - photo) for value in rgb)
    return picture((red, green, blue))


def write_rows(path: Path, num_photos: int = 24, per_photo: int = 3) -> str:
    """Three questions a photo, all about its colour; the last one is Chinese."""
    rows: dict[str, dict[str, bytes]] = {}
    for i in range(num_photos * per_photo):
        photo = i // per_photo
        name = list(COLOURS)[photo % 4]
        word = f"{chr(97 + i // 26)}{chr(97 + i % 26)}"
        text = f"is it {name} number {word}" if i % per_photo < 2 else "是什么颜色"
        answer = f"It is {SHADES[photo % len(SHADES)]}."
        fields = {
            "text": text,
            "lang": "en" if i % per_photo < 2 else "zh",
            "kind": "colour" if i % per_photo == 0 else "where",
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ],
        }
        rows[f"q{i:03}"] = {
            "png": shade(COLOURS[name], photo),
            "wav": f"sound {word}".encode(),
            "json": json.dumps(fields).encode(),
        }
    write_shard(path / "test-0000.tar", rows)
    return str(path / "test-*.tar")


class Sees:
    """Hears all but the colour, which it takes from the picture; without one it says nothing for it."""

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        return [self.answer(sample) for sample in samples]

    def answer(self, sample: Sample) -> str:
        heard = next(part.bytes for part in sample.media if part.type == "speech") or b""
        seen = [part.bytes for part in sample.media if part.type == "image"]
        shades = {shade(rgb, k): name for name, rgb in COLOURS.items() for k in range(24)}
        colour = shades.get(seen[0] or b"", "") if seen else ""
        return f"is it {colour} number {heard.decode().split()[1]}"


class Deaf(Sees):
    """Does not look."""

    def answer(self, sample: Sample) -> str:
        return "is it red number " + (next(p.bytes for p in sample.media if p.type == "speech") or b"").decode().split()[1]


def run(model: Any, asked: list[Sample], out: Path) -> dict[str | None, Path]:
    return {
        control: predict(model, asked, out / str(control), task="asr", model_info=INFO, control=control)
        for control in masr.CONDITIONS.values()
    }


def cells(table: str) -> dict[str, list[str]]:
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()[2:]}


def test_four_pictures_and_paired_tests(tmp_path: Path) -> None:
    asked = questions.masr(read_source(write_rows(tmp_path)))
    runs = run(Sees(), asked, tmp_path / "runs")
    rows = cells(masr.table(runs))
    assert list(rows) == ["S", "S + image", "S + wrong image", "S + blank image"]
    assert rows["S"][2].startswith("20.0 ")  # one word of five is not heard
    assert rows["S + image"][2].startswith("0.00 ")
    assert rows["S + image"][3].startswith("-20.0 ")
    assert float(rows["S + image"][4]) < 0.01
    assert rows["S + wrong image"][2].startswith("20.0 ") or float(rows["S + wrong image"][2].split()[0]) > 10
    assert rows["S + blank image"][3:5] == ["0.00 [0.00, 0.00]", "1.000"]
    plans = {control: records.read(folder / "task.jsonl") for control, folder in runs.items()}
    for plan in zip(*plans.values(), strict=True):  # the instruction, the sound, the words and the clusters are the same
        assert len({row["prompt"].replace("<image>", "") for row in plan}) == 1
        assert len({tuple(part["sha256"] for part in row["media"] if part["type"] == "speech") for row in plan}) == 1
        assert len({row["cluster"] for row in plan}) == 1
    assert all(row["cluster"] == row["media"][0]["sha256"] for row in plans[None])


def test_a_model_that_does_not_look_gains_nothing(tmp_path: Path) -> None:
    rows = cells(masr.table(run(Deaf(), questions.masr(read_source(write_rows(tmp_path))), tmp_path / "runs")))
    assert {row[2] for row in rows.values()} == {rows["S"][2]}
    assert all(row[4] == "1.000" for name, row in rows.items() if name != "S")


def test_intervals_resample_photos(tmp_path: Path) -> None:
    """Both questions of a photo are right or wrong together: whole photos give the wider interval."""
    asked = questions.masr(read_source(write_rows(tmp_path)))
    clustered = tasks.score(predict(Deaf(), asked, tmp_path / "c", task="asr", model_info=INFO))["scores"]["WER"]
    alone = [Sample(s.id, s.messages, {**s.meta, "cluster": s.id}) for s in asked]
    naive = tasks.score(predict(Deaf(), alone, tmp_path / "n", task="asr", model_info=INFO))["scores"]["WER"]
    assert clustered["value"] == naive["value"]
    assert clustered["high"] - clustered["low"] > 1.2 * (naive["high"] - naive["low"])


def test_a_condition_that_was_not_run_is_named(tmp_path: Path) -> None:
    asked = questions.masr(read_source(write_rows(tmp_path)))
    runs = run(Deaf(), asked, tmp_path / "runs")
    del runs["blank"]
    with pytest.raises(ValueError, match="no run of S \\+ blank image"):
        masr.table(runs)


def test_the_command_says_how_many_questions_training_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(Deaf):
        render = staticmethod(lambda sample: "".join(part.text or f"<{part.type}>" for m in sample.messages for part in m.content))
        info = staticmethod(lambda: INFO)

    monkeypatch.setattr("x2l.assistant.Assistant.load", lambda name: Stub())
    (tmp_path / "train").mkdir()
    train = write_rows(tmp_path / "train", num_photos=6)
    arguments = [write_rows(tmp_path), "--train", train, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(commands.app, ["masr", *arguments])
    assert result.exit_code == 0, result.exception
    assert "| S + image | 48 |" in result.output
    assert "25.0 % of 48 test texts occur among 18 in training" in result.output


def test_spoken_questions_about_photos(tmp_path: Path) -> None:
    asked = questions.spoken_vqa(read_source(write_rows(tmp_path)))
    said = Counter(sample.meta["references"][0] for sample in asked)  # English, answered in a word: 12 bright, 8 dark, 4 pale
    assert said == {"bright": 4, "dark": 4, "pale": 4}
    assert [part.type for part in asked[0].messages[0].content] == ["image", "speech"]
    swapped = controls.CONTROLS["wrong-speech"](asked, lambda part: records.sha256(part.bytes), 0)
    for before, after in zip(asked, swapped, strict=True):
        assert before.media[0] == after.media[0]
        assert before.media[1] != after.media[1]


def test_the_wrong_question_is_never_the_right_one_by_another_voice() -> None:
    typed = ["What sport?", "What sport?", "Which colour?", "How many?"]
    asked = [
        Sample(str(i), (user(Part("image", bytes=b"photo"), Part("speech", bytes=bytes([i]))),), {"typed": text})
        for i, text in enumerate(typed)
    ]
    for seed in range(20):
        swapped = controls.CONTROLS["wrong-speech"](asked, lambda part: records.sha256(part.bytes), seed)
        heard = [typed[sample.media[1].bytes[0]] for sample in swapped]
        assert all(a != b for a, b in zip(heard, typed, strict=True))


def test_the_same_question_in_writing(tmp_path: Path) -> None:
    rows = {f"{row.key}/spoken-vqa": row.fields["text"] for row in read_source(write_rows(tmp_path))}
    asked = questions.spoken_vqa(read_source(str(tmp_path / "test-*.tar")))
    for spoken, typed in zip(asked, controls.typed(asked, lambda part: "", 0), strict=True):
        photo, question = typed.messages[0].content
        assert photo == spoken.media[0]
        assert question == Part("text", text=rows[spoken.id])


def test_a_question_that_is_easier_in_writing_is_not_blind() -> None:
    plain, typed = ({"task": "qa", "control": name, "scores": {"contains": {"value": 30.0 + 20 * bool(name), "low": 25.0}}}
                    for name in (None, "typed"))  # fmt: skip
    assert tasks.solved_blind(plain, typed) == []
    assert tasks.solved_blind(plain, typed | {"control": "blank"}) == ["contains"]


def test_a_run_is_scored_with_another_normaliser(tmp_path: Path) -> None:
    asked = [
        Sample("a", questions.masr(read_source(write_rows(tmp_path)), "zh")[0].messages, {"lang": "zh", "references": ["花儿25个"]})
    ]

    class Says:
        def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
            return ["呃，花二十五个。"]

    folder = predict(Says(), asked, tmp_path / "run", task="asr", model_info=INFO)
    rates = {name: tasks.score(folder, normalizer=name)["scores"]["CER"]["value"] for name in ("zh", "wenet-like", "speechio-like")}
    assert rates == pytest.approx({"zh": 100 * 2 / 6, "wenet-like": 100 * 4 / 5, "speechio-like": 0})
    result = CliRunner().invoke(commands.app, ["score", str(folder), "--normalizer", "speechio-like"])
    assert result.exit_code == 0
    assert records.read_json(folder / "scores.json")["details"]["normalisers"][0].endswith("fillers+erhua")
    with pytest.raises(ValueError, match="normaliser 'en' is for 'en', sample a is 'zh'"):
        tasks.score(folder, normalizer="en")
