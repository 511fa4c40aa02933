"""``x2l data make`` and ``hear`` with a synthesizer and recognisers of the test's own: shards, card, error rates, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_shard
from test_data_transforms_kinds import Hum, make_photos
from typer.testing import CliRunner

from x2l.cli import app
from x2l.corpora import hear as hearing
from x2l.corpora.hear import Heard, hear
from x2l.data.sources import read_source
from x2l.data.transforms.speak import to_flac

RECIPE = """
kind: vsdial
takes: 2
splits:
  train: {path: "photos-*.tar", questions: train, voices: ["x:en-1", "x:zh-1"], licence: research}
  test: {path: "others-*.tar", questions: test, voices: ["x:en-9", "x:zh-9"]}
"""
INSTRUCT = """
kind: instruct
splits:
  train:
    - {kind: image-text, path: "photos-*.tar", lang: en, num: 5, licence: CC0}
    - {kind: image-text-speech, path: "vsdial:train-*.tar", lang: zh, num: 3, licence: CC0}
  test:
    - {kind: image-text, path: "photos-*.tar", lang: zh, licence: CC0}
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Recognisers that hear the same in every sound; the lengths of what they were played."""
    lengths: list[int] = []

    def always(text: str) -> hearing.Transcribe:
        return lambda sound: (lengths.append(len(sound)), text)[1]

    recognisers = {"en": ("Ear", lambda: always("how many dogs")), "zh": ("耳", lambda: always("有几只狗"))}
    monkeypatch.setattr(hearing, "RECOGNISERS", recognisers)
    monkeypatch.setattr("x2l.corpora.make.RECOGNISERS", recognisers)
    return lengths


def spoken(path: Path) -> Path:
    said = [
        ("a", "en", "How many dogs?"),
        ("a", "en", "How many cats?"),
        ("a", "en", "Why?"),
        ("b", "zh", "有几只猫？"),
        ("c", "xx", "?"),
    ]
    rows = {}
    for i, (voice, lang, text) in enumerate(said):
        fields = {"text": text, "lang": lang, "spk": voice}
        rows[f"r{i}"] = {"flac": to_flac(np.full(1600 + i, 0.1, np.float32)), "json": json.dumps(fields).encode()}
    rows["broken"] = {"flac": b"fLaC", "json": json.dumps({"text": "Why?", "lang": "en", "spk": "d"}).encode()}
    return write_shard(path, rows)


def test_hear_gives_each_voices_error_rate_and_goes_on(tmp_path: Path, asked: list[int]) -> None:
    source = read_source(str(spoken(tmp_path / "a.tar")))
    found = hear(source, tmp_path / "heard", per_voice=2, progress=False)
    assert found == [Heard("a", "en", 2, pytest.approx(1 / 6)), Heard("b", "zh", 1, pytest.approx(1 / 4))]
    assert asked == [1600, 1601, 1603]
    assert hear(source, tmp_path / "heard", per_voice=2, progress=False) == found
    assert len(asked) == 3, "what was heard is not heard again"
    report = json.loads((tmp_path / "heard" / "heard.json").read_text())
    assert [row["key"] for row in report["skipped"]] == ["broken"]


def x2l(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_make_both_sets_with_their_cards(tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2l.data.transforms.speak.synthesizer", lambda engine: Hum())
    make_photos(tmp_path / "root" / "photos-0000.tar")
    make_photos(tmp_path / "root" / "others-0000.tar", prefix="q")
    (tmp_path / "mini.yaml").write_text(RECIPE)
    (tmp_path / "set.yaml").write_text(INSTRUCT)
    vsdial = ["make", tmp_path / "mini.yaml", "--data-root", tmp_path / "root", "--out", tmp_path / "vsd", "--photos", 30]
    x2l(*vsdial)
    card = (tmp_path / "vsd" / "README.md").read_text()
    assert "--photos 30" in card
    assert "2 voices" in card
    for voice in ("x:en-1", "x:en-9"):
        assert f"| {voice} | " in card
    assert "| WER " in card
    assert "| CER " in card
    assert "- research: " in card
    shards, calls = [path.read_bytes() for path in sorted((tmp_path / "vsd").glob("*.tar"))], len(asked)
    x2l(*vsdial)
    assert [path.read_bytes() for path in sorted((tmp_path / "vsd").glob("*.tar"))] == shards
    assert len(asked) == calls
    x2l("make", tmp_path / "set.yaml", "--data-root", tmp_path / "root", "--out", tmp_path / "set", "--vsdial", tmp_path / "vsd")
    card = (tmp_path / "set" / "README.md").read_text()
    assert "train: 8 samples" in card
    assert "image-text-speech, zh: 3" in card
    assert "test: 40 samples" in card
    assert "- CC0: 48 samples" in card
    for folder in ("vsd", "set"):
        assert "of which bad: 0" in x2l("validate", tmp_path / folder / "*.tar")


def test_heard_sound_is_the_rows_own(tmp_path: Path, asked: list[int]) -> None:
    source = read_source(str(spoken(tmp_path / "a.tar")))
    hear(source, tmp_path / "heard", per_voice=1, progress=False)
    first, second = read_source(str(tmp_path / "heard" / "heard-*.tar"))
    assert (first.fields["heard"], second.fields["heard"]) == ("how many dogs", "有几只狗")
    assert first.fields["provenance"][-1]["recogniser"] == "Ear"
    (tmp_path / "x.flac").write_bytes(first.media["flac"])
    assert soundfile.info(tmp_path / "x.flac").frames == 1600


def test_one_split_alone_and_one_that_is_not_there(tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2l.data.transforms.speak.synthesizer", lambda engine: Hum())
    make_photos(tmp_path / "root" / "photos-0000.tar")
    make_photos(tmp_path / "root" / "others-0000.tar", prefix="q")
    (tmp_path / "mini.yaml").write_text(RECIPE)
    make = ["make", tmp_path / "mini.yaml", "--data-root", tmp_path / "root", "--out", tmp_path / "vsd", "--per-voice", 0]
    x2l(*make, "--split", "test")
    assert {path.name.split("-")[0] for path in (tmp_path / "vsd").glob("*.tar")} == {"test"}
    assert "--split test" in (tmp_path / "vsd" / "README.md").read_text()
    with pytest.raises(ValueError, match="no split 'dev': this recipe has "):
        x2l(*make, "--split", "dev")
