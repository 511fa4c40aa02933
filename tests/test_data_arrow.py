"""Hugging Face data set folders and remote files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from conftest import picture, write_shard

from x2l.data.sources import DataError, read_source

pa = pytest.importorskip("pyarrow")


def table() -> object:
    images = [{"bytes": picture((i, 0, 0)), "path": f"{i}.png" if i % 2 else None} for i in range(5)]
    return pa.table({"image": images, "en": [["A dog."]] * 5, "id": [f"row{i}" for i in range(5)]})


def check(records: list) -> None:
    assert [record.key for record in records] == [f"row{i}" for i in range(5)]
    assert [record.media for record in records] == [{"png": picture((i, 0, 0))} for i in range(5)]
    assert records[0].fields == {"en": ["A dog."], "id": "row0"}


def test_parquet(tmp_path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(table(), tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    source = read_source(str(tmp_path / "*.parquet"))
    check(list(source))
    assert source[3].key == "row3"


def save_to_disk(folder: Path, *tables: object) -> None:
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, part in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_save_to_disk(tmp_path: Path) -> None:
    whole = table()
    save_to_disk(tmp_path, whole.slice(0, 3), whole.slice(3))
    check(list(read_source(tmp_path)))


def test_damage_is_listed(tmp_path: Path) -> None:
    whole = table()
    save_to_disk(tmp_path, whole, whole)
    broken = tmp_path / "data-00001-of-00002.arrow"
    broken.write_bytes(b"nonsense")
    source = read_source(tmp_path)
    check(list(source))
    assert list(source.issues.reasons) == [str(broken)]


def test_media_that_are_only_named_make_a_bad_row(tmp_path: Path) -> None:
    sounds = [{"bytes": None, "path": "elsewhere/a.wav"}, {"bytes": b"RIFF0000WAVE", "path": None}]
    save_to_disk(tmp_path, pa.table({"audio": sounds, "text": ["a", "b"]}))
    source = read_source(tmp_path)
    assert [record.media for record in source] == [{"wav": b"RIFF0000WAVE"}]
    assert "holds no bytes" in next(iter(source.issues.reasons.values()))


def test_a_folder_of_shards_is_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name its files, .*/\*\.tar"):
        read_source(tmp_path)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for name in ("a", "b"):
        path = write_shard(tmp_path / f"{name}.tar", {name: {"png": picture((1, 1, 1)), "json": b"{}"}})
        system.pipe_file(f"/bucket/{name}.tar", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_remote_shards_are_fetched_once(remote: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    assert [record.key for record in read_source("memory://bucket/*.tar")] == ["a", "b"]
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "data").iterdir()}
    assert len(copies) == 2
    assert len(list(read_source("memory://bucket/*.tar"))) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "data").iterdir()} == copies


def test_a_remote_folder_of_datasets(remote: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    save_to_disk(tmp_path / "set", table())
    for path in (tmp_path / "set").iterdir():
        remote.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    check(list(read_source("memory://bucket/set")))


def test_remote_jsonl_comes_with_its_media(remote: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    outside = tmp_path / "cache" / "data" / "secret.png"
    rows = [{"key": "a", "media": {"png": "images/1.png"}}, {"key": "b", "media": {"png": "images/2.png"}}]
    rows += [{"key": "c", "media": {"png": "../secret.png"}}, {"key": "d", "media": 3}]
    talk = [{"role": "user", "content": [{"type": "image", "path": "images/1.png"}]}]
    lines = [json.dumps(row) for row in [*rows, {"key": "e", "messages": talk}]]
    remote.pipe_file("/bucket/rows.jsonl", "\n".join([*lines, "{"]).encode())
    remote.pipe_file("/bucket/images/1.png", picture((1, 2, 3)))
    remote.pipe_file("/secret.png", picture((9, 9, 9)))
    source = read_source("memory://bucket/rows.jsonl")
    first, last = source
    assert (first.key, first.media) == ("a", {"png": picture((1, 2, 3))})
    assert Path(last.fields["messages"][0]["content"][0]["path"]).read_bytes() == picture((1, 2, 3))
    assert len(source.issues) == 4
    assert not outside.exists()


def test_what_cannot_be_fetched_is_named(remote: fsspec.AbstractFileSystem) -> None:
    for spec in ("memory://bucket/absent.tar", "nothing://x/a.tar"):
        with pytest.raises(DataError, match=f"cannot fetch '{spec}'"):
            read_source(spec)
