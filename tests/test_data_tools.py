"""validate, stats, shard, split and view on small shards with faults."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import picture, write_shard

from x2l.data.sources import DataError, Record, read_source
from x2l.data.tools import language, shard, split, stats, texts_of, validate, view, write_shards


def sound(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(16_000 * seconds)), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten rows: photos and sounds by three speakers; one broken photo, one empty text, one repeated photo."""
    rows = {
        f"photo{i}": {"png": picture((i, 0, 0)), "json": json.dumps({"en": ["A dog."], "zh": ["狗。"]}).encode()} for i in range(4)
    }
    for i in range(4):
        fields = {"text": "hello", "spk": f"s{i % 3}", "licence": "CC0"}
        rows[f"sound{i}"] = {"wav": sound(0.1 + i / 10), "json": json.dumps(fields).encode()}
    rows["photo1"] = {"png": picture((0, 0, 0)), "json": rows["photo1"]["json"]}
    rows["broken"] = {"png": picture((9, 9, 9))[:60], "json": b'{"en": ["A cat."]}'}
    rows["empty"] = {"wav": sound(0.7), "json": b'{"text": " "}'}
    return write_shard(tmp_path / "mixed.tar", rows)


def test_validate_counts_and_lists(mixed: Path) -> None:
    report = validate(str(mixed), progress=False)
    assert report.rows == 10
    assert set(report.issues.reasons) == {"broken", "empty"}
    assert "damaged" in report.issues.reasons["broken"]
    assert report.duplicates == [("photo1", "photo0")]
    assert report.media == {"png": 4, "wav": 5}
    assert report.languages == {"en": 8, "zh": 4, "-": 1}
    assert report.licences == {"CC0": 4, "not stated": 5}
    assert "of which bad: 2" in str(report)
    assert "photo1 = photo0" in str(report)


def test_texts_and_languages() -> None:
    message = {"role": "user", "content": [{"type": "image", "key": "jpg"}, {"type": "text", "text": "why"}]}
    assert texts_of({"en": "a", "zh": ["b", "c"], "messages": [message, {"content": "d"}]}) == ["a", "b", "c", "why", "d"]
    assert [language(text) for text in ("a狗", "été", "123", "")] == ["zh", "en", "-", "-"]


def test_stats_and_plot(tmp_path: Path) -> None:
    rows = {f"s{i}": {"wav": sound(i), "json": b'{"text": "hello"}'} for i in (1, 2, 3)}
    found = stats(str(write_shard(tmp_path / "a.tar", rows)), tmp_path / "plot.png")
    assert found["seconds"] == {"num": 3, "min": 1, "mean": 2, "median": 2, "max": 3}
    assert found["characters a text (en)"]["max"] == 5
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_shards_are_cut_by_size_and_reproducible(tmp_path: Path) -> None:
    records = [Record(f"k{i}", {"n": i}, {"bin": bytes(30_000)}) for i in range(9)]
    first = write_shards(records, tmp_path / "a", "train", shard_bytes=100_000)
    second = write_shards(iter(records), tmp_path / "b", "train", shard_bytes=100_000)
    assert [path.name for path in first] == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert list(read_source(str(tmp_path / "a" / "*.tar"))) == records
    with pytest.raises(DataError, match="exists"):
        write_shards(records, tmp_path / "a", "train")
    with pytest.raises(DataError, match="nothing to write"):
        write_shards([], tmp_path / "c", "train")


def test_rows_of_text_alone_are_read_back(tmp_path: Path) -> None:
    records = [Record("a", {"zh": ["狗"]}), Record("b", {"messages": [{"role": "user", "content": "hi"}]})]
    assert list(read_source([str(path) for path in write_shards(records, tmp_path, "text")])) == records


def test_a_failure_leaves_no_shard_under_its_name(tmp_path: Path) -> None:
    def failing() -> object:
        yield Record("a", {"x": 1}, {"bin": b"1"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path, "train")
    assert not list(tmp_path.glob("*.tar"))
    assert len(write_shards([Record("a", {}, {"bin": b"1"})], tmp_path, "train")) == 1


def test_jsonl_becomes_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture((1, 2, 3)))
    (tmp_path / "rows.jsonl").write_text('{"key": "k", "media": {"png": "a.png"}, "en": ["x"]}\n')
    paths = shard(str(tmp_path / "rows.jsonl"), tmp_path / "out", "train")
    (record,) = read_source([str(path) for path in paths])
    assert record.media == {"png": picture((1, 2, 3))}
    assert record.fields["en"] == ["x"]


@pytest.mark.parametrize("by", ["spk", "image"])
def test_split_never_separates_a_group(tmp_path: Path, by: str) -> None:
    rows = {}
    for i in range(120):
        fields = {"spk": f"s{i % 40}", "text": "x"}
        rows[f"k{i:03d}"] = {"bin": bytes([i % 40]), "json": json.dumps(fields).encode()}
    source = str(write_shard(tmp_path / "a.tar", rows))
    parts = split(source, tmp_path / "out", by, {"train": 0.6, "val": 0.2, "test": 0.2})
    groups = {part: {r.fields["spk"] for r in read_source([str(p) for p in paths])} for part, paths in parts.items()}
    assert sum(len(members) for members in groups.values()) == 40, "parts share no group"
    assert 14 <= len(groups["train"]) <= 34
    assert sum(len(read_source([str(p) for p in paths])) for paths in parts.values()) == 120
    half = str(write_shard(tmp_path / "half.tar", dict(list(rows.items())[:60])))
    fewer = split(half, tmp_path / "fewer", by, {"train": 0.6, "val": 0.2, "test": 0.2})
    assert all({r.fields["spk"] for r in read_source([str(p) for p in paths])} <= groups[part] for part, paths in fewer.items()), (
        "a group's part does not depend on the other rows"
    )


def test_split_refuses_what_it_cannot_do(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no field 'spk'"):
        split(str(mixed), tmp_path, "spk", {"train": 0.5, "test": 0.5})
    with pytest.raises(DataError, match="sum to 1"):
        split(str(mixed), tmp_path, "image", {"train": 0.5})
    with pytest.raises(DataError, match="nothing falls into none"):
        split(str(mixed), tmp_path, "image", {"train": 1.0, "none": 0.0})


def test_view_shows_every_row_and_escapes(mixed: Path, tmp_path: Path) -> None:
    page = view(str(mixed), tmp_path / "view.html").read_text()
    assert page.count("<figure>") == 10
    assert page.count("data:image/jpeg;base64,") == 4
    assert page.count("<audio controls") == 5
    assert "bad row: the image is damaged" in page
    talk = [{"role": "user", "content": [{"type": "image", "key": "png"}, {"type": "text", "text": "Why <b>?"}]}]
    fields = {"messages": talk, "provenance": [{"transform": "speak"}]}
    told = {"y": {"png": picture((0, 0, 0)), "opus": sound(0.1), "json": json.dumps(fields).encode()}}
    page = view(str(write_shard(tmp_path / "t.tar", told)), tmp_path / "t.html").read_text()
    assert "<b>user</b> &lt;image&gt; Why &lt;b&gt;?" in page
    assert "data:audio/ogg;base64," in page
    assert "<details><summary>provenance" in page
    hostile = {"x": {"png": picture((0, 0, 0)), "json": b'{"en": ["<script>alert(1)</script>"]}'}}
    page = view(str(write_shard(tmp_path / "h.tar", hostile)), tmp_path / "h.html").read_text()
    assert "<script>" not in page
