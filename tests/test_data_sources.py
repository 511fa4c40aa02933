"""Sources: nothing is mispaired, nothing bad is fatal, and too much of it stops the run."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l.data.sources import DataError, Issues, read_source


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def row(key: str) -> list[tuple[str, bytes]]:
    """A pair whose halves name each other."""
    return [(f"{key}.jpg", f"media of {key}".encode()), (f"{key}.json", json.dumps({"of": key}).encode())]


def rows(*keys: str) -> list[tuple[str, bytes]]:
    return [member for key in keys for member in row(key)]


def test_shards_are_read_in_order_and_by_index(tmp_path: Path) -> None:
    shard(tmp_path / "b.tar", rows("3", "4"))
    shard(tmp_path / "a.tar", rows("2", "1"))
    source = read_source(str(tmp_path / "*.tar"))
    assert [record.key for record in source] == ["2", "1", "3", "4"] == [source[i].key for i in range(len(source))]
    assert source[2].media == {"jpg": b"media of 3"}
    assert pickle.loads(pickle.dumps(source))[3].fields == {"of": "4"}


def test_keys_keep_their_folder_and_end_at_the_first_dot(tmp_path: Path) -> None:
    members = [("./x/1.seg.png", b"s"), ("./x/1.json", b"{}"), ("y/1.JPG", b"j"), ("y/1.json", b"{}"), (".hidden.jpg", b"")]
    records = {record.key: record.media for record in read_source(shard(tmp_path / "a.tar", members))}
    assert records == {"x/1": {"seg.png": b"s"}, "y/1": {"jpg": b"j"}}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([("9.jpg", b"orphan")], "no json"),
        ([("9.json", b"{}")], "no media"),
        ([("9.jpg", b""), ("9.json", b"{")], "broken JSON"),
        ([("9.jpg", b""), ("9.json", b"\xff\xfe")], "broken JSON"),
        ([("9.jpg", b""), ("9.json", b"[1]")], "expected a JSON object"),
        ([("9.jpg", b""), ("9.json", b"[" * 100_000)], "broken JSON"),
        ([*row("9"), ("9.jpg", b"another")], "two members"),
        ([*row("9"), ("9.json", b'{"of": "another"}')], "two members"),
    ],
)
def test_a_bad_row_is_listed_and_skipped(tmp_path: Path, bad: list[tuple[str, bytes]], reason: str) -> None:
    source = read_source(shard(tmp_path / "a.tar", [*rows("1"), *bad, *rows("2")]))
    assert [(record.key, record.media["jpg"]) for record in source] == [("1", b"media of 1"), ("2", b"media of 2")]
    assert list(source.issues.reasons) == ["9"]
    assert reason in source.issues.reasons["9"]
    assert len(source.issues) == 1
    assert [record.key for record in source] == ["1", "2"]
    assert len(source.issues) == 1, "a second pass must not count again"


def test_the_same_key_in_two_shards_is_listed(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", rows("1"))
    shard(tmp_path / "b.tar", rows("1", "2"))
    source = read_source([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert [record.key for record in source] == ["1", "2"]
    assert len(source.issues) == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_240), flip=st.none() | st.tuples(st.integers(0, 10_239), st.integers(1, 255)))
def test_a_damaged_shard_never_mispairs(cut: int, flip: tuple[int, int] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = shard(Path(folder) / "a.tar", rows("1", "2", "3"))
        blob = bytearray(path.read_bytes())
        if flip:
            blob[flip[0]] ^= flip[1]
        path.write_bytes(blob[: len(blob) - cut])
        try:
            records = list(read_source(path))
        except DataError:
            return
        for record in records:
            of = record.fields.get("of", record.key)
            media = next(iter(record.media.values()))
            changed = sum(a != b for a, b in zip(media, f"media of {of}".encode(), strict=False))
            assert changed <= 1, "at most the byte that was flipped"


@pytest.mark.parametrize("keep", [512 + 5, 4 * 512, 4 * 512 + 100])
def test_a_truncated_shard_is_reported(tmp_path: Path, keep: int) -> None:
    good = shard(tmp_path / "good.tar", rows("7"))
    cut = shard(tmp_path / "cut.tar", rows("1", "2", "3"))
    cut.write_bytes(cut.read_bytes()[:keep])
    source = read_source([good, cut])
    assert "7" in [record.key for record in source]
    assert any(str(cut) in name for name in source.issues.reasons)


def test_seven_bad_among_a_hundred_and_above_the_threshold(tmp_path: Path) -> None:
    members = rows(*(f"good{i}" for i in range(93)))
    members += [(f"bad{i}.json", b"{}") for i in range(7)]
    path = shard(tmp_path / "a.tar", members)
    source = read_source(path)
    assert len(list(source)) == 93
    assert sorted(source.issues.reasons) == [f"bad{i}" for i in range(7)]
    strict = read_source(path, max_bad=0.0)
    with pytest.raises(DataError, match="bad0: no media"):
        list(strict)


def test_issues_stop_at_the_fraction() -> None:
    issues = Issues(total=5000, max_fraction=0.01)
    for i in range(50):
        issues.add(f"row{i}", "broken")
    with pytest.raises(DataError, match="51 of 5000 rows are bad"):
        issues.add("row50", "broken")


def test_all_bad_or_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one of 3 rows"):
        list(read_source(shard(tmp_path / "a.tar", [(f"{i}.json", b"{}") for i in range(3)])))
    with pytest.raises(DataError, match="no row"):
        read_source(shard(tmp_path / "b.tar", []))
    with pytest.raises(DataError, match="no file matches"):
        read_source(str(tmp_path / "absent-*.tar"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"expected one of \.tar, \.jsonl"):
        read_source(tmp_path / "a.csv")


def test_jsonl_reads_media_and_paths_beside_it(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"one")
    lines = [
        {"key": "a", "media": {"jpg": "1.jpg"}, "en": ["x"]},
        {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "path": "1.jpg"}]}]},
        {"key": "c", "media": {"jpg": "absent.jpg"}},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n\xe9\n"
    (tmp_path / "rows.jsonl").write_bytes(text.encode("latin-1"))
    source = read_source(tmp_path / "rows.jsonl")
    first, second = list(source)
    assert (first.key, first.media, first.fields["en"]) == ("a", {"jpg": b"one"}, ["x"])
    assert second.fields["messages"][0]["content"][0]["path"] == str(tmp_path / "1.jpg")
    assert list(source.issues.reasons) == ["rows.jsonl:3", "rows.jsonl:5", "rows.jsonl:6"]


@pytest.mark.parametrize(
    "text", ['{"media": 3}', '{"media": {"jpg": 3}}', '{"messages": 3}', '{"messages": [{"content": [{"path": 3}]}]}']
)
def test_jsonl_of_the_wrong_shape_is_a_bad_row(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"key": "good"}\n' + text)
    source = read_source(tmp_path / "rows.jsonl")
    assert [record.key for record in source] == ["good"]
    assert list(source.issues.reasons) == ["rows.jsonl:2"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_are_rows_or_issues(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b'{"key": "good"}\n' + b"\n".join(lines))
        source = read_source(path)
        assert next(iter(source)).key == "good"
        assert len(list(source)) + len(source.issues) == len(source)
