"""translate, speak and instruct as commands: kill -9 in the middle, run again; the same bytes, no finished row asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import picture, write_shard
from test_endpoint import KEY, Answer, completion, serving
from typer.testing import CliRunner

from x2l.cli import app
from x2l.data.sources import read_source

NUM_ROWS = 14
WAIT = 0.1  # seconds of a call, so that a kill finds some of them finished


def row_name(i: int) -> str:
    """Part of every text of a row."""
    return f"dog {i:02d} "


def asked_rows(texts: list[str]) -> Counter[int]:
    """How often each row was asked about, one text after the other."""
    return Counter(i for text in texts for i in range(NUM_ROWS) if row_name(i) in text)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    captions = [[f"A {row_name(i)}runs.", f"The {row_name(i)}is here."] for i in range(NUM_ROWS)]
    files = {
        f"r{i:02d}": {"png": picture((i, 0, 0)), "json": json.dumps({"en": en, "text": en[0]}).encode()}
        for i, en in enumerate(captions)
    }
    return write_shard(tmp_path / "rows.tar", files)


def results(folder: Path) -> dict[str, str]:
    written = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


def finished_rows(out: Path) -> set[int]:
    """Rows in the journal; the commands tested here work one row a call."""
    with sqlite3.connect(out / "data.journal") as database:
        return {number for (number,) in database.execute("select number from chunks")}


def survives_a_kill(tmp_path: Path, arguments: list[str], asked: Callable[[], list[str]]) -> str:
    """Run a command whole, killed and again, with ``asked`` all texts that were asked so far; returns all that it printed."""

    def whole(out: str) -> str:
        result = CliRunner().invoke(app, ["data", "transform", *arguments, "--out", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        return result.output

    printed = whole("whole")
    start = len(asked())
    command = [sys.executable, "-c", "from x2l.cli import main; main()", "data", "transform", *arguments]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None:
        if len(asked()) - start >= start // 2:
            process.kill()
        time.sleep(0.005)
    printed += process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, printed
    done, before = finished_rows(tmp_path / "out"), asked_rows(asked()[start:])
    assert 0 < len(done) < NUM_ROWS
    printed += whole("out")
    after = asked_rows(asked()[start:])
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert {i: after[i] for i in done} == {i: before[i] for i in done}, "a finished row was asked about again"
    assert "rows/s" in printed
    for path in (tmp_path / "out").iterdir():
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in printed
    return printed


def test_translate(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(n: int, request: dict[str, Any]) -> Answer:
        time.sleep(WAIT)
        return completion(f"译：{request['messages'][1]['content']}")

    monkeypatch.setenv("X2L_ENDPOINT_KEY", KEY)
    with serving(answer) as (url, seen):
        arguments = ["translate", str(rows), "--url", url, "--model", "stub", "--workers", "2", "--price", "1", "1"]
        printed = survives_a_kill(tmp_path, arguments, lambda: [request["messages"][1]["content"] for request in list(seen)])
    assert {request["authorization"] for request in seen} == {f"Bearer {KEY}"}
    assert f"{2 * NUM_ROWS * 10} tokens, cost {2 * NUM_ROWS * 10 / 1e6:.4f}" in printed
    (first, *_) = read_source(str(tmp_path / "out" / "*.tar"))
    assert first.fields["zh"] == [f"译：{text}" for text in first.fields["en"]]


def test_instruct(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(n: int, request: dict[str, Any]) -> Answer:
        time.sleep(WAIT)
        if request["seed"] % 3 == 0:  # a request gets the same reply in each run
            return completion("I'm sorry, I cannot do that.")
        return completion(json.dumps([{"question": f"What does {request['seed']} show?", "answer": "A dog."}]))

    monkeypatch.setenv("X2L_ENDPOINT_KEY", KEY)
    with serving(answer) as (url, seen):
        arguments = ["instruct", str(rows), "--url", url, "--model", "stub", "--workers", "2"]
        printed = survives_a_kill(tmp_path, arguments, lambda: [request["messages"][0]["content"] for request in list(seen)])
    assert "refusals: " in printed
    assert len(list(read_source(str(tmp_path / "out" / "*.tar")))) == NUM_ROWS


FLITE = f"""#!{sys.executable} -SE
import os, sys, time, wave
if sys.argv[1] == "-lv":
    print("Voices available: slt rms")
    sys.exit()
text = sys.argv[sys.argv.index("-t") + 1]
with open(os.environ["FLITE_LOG"], "a") as log:
    log.write(text + "\\n")
time.sleep({WAIT})
with open("/dev/stdout", "wb") as out, wave.open(out, "wb") as sound:
    sound.setparams((1, 2, 16000, 16000, "NONE", ""))
    sound.writeframesraw(bytes(range(2, 202)) * 160)
"""


def test_speak(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, program = tmp_path / "flite.log", tmp_path / "bin" / "flite"
    program.parent.mkdir()
    program.write_text(FLITE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), os.environ["PATH"]]))
    monkeypatch.setenv("FLITE_LOG", str(log))
    arguments = ["speak", str(rows), "--voices", "flite:slt,flite:rms", "--workers", "2"]
    printed = survives_a_kill(tmp_path, arguments, lambda: log.read_text().splitlines() if log.exists() else [])
    assert "milliseconds: " in printed
    found = list(read_source(str(tmp_path / "out" / "*.tar")))
    assert len(found) == NUM_ROWS
    assert all({"png", "flac"} == record.media.keys() for record in found)
