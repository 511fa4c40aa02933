"""The endpoint client, and instruct and translate through it, against a stub server on this machine."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import picture, write_shard

from x2l import endpoint
from x2l.data.sources import DataError, read_source
from x2l.data.transforms.instruct import PROMPTS, Instruct, ReplyError, parse_turns, read_prompt
from x2l.data.transforms.runner import run
from x2l.data.transforms.translate import Translate
from x2l.data.transforms.translators import EndpointTranslator
from x2l.endpoint import ChatEndpoint, EndpointError, cost

KEY = "sk-secret-93"
Answer = tuple[int, dict[str, str], Any]  # status, headers, body; a float as the body waits that long


def completion(text: str, prompt: int = 7, reply: int = 3) -> Answer:
    usage = {"prompt_tokens": prompt, "completion_tokens": reply}
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": usage}


@contextmanager
def serving(script: Callable[[int, dict[str, Any]], Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose n-th answer (from 0) is ``script(n, request)``; its address, and the requests so far."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append(request | {"authorization": self.headers.get("Authorization"), "at": time.monotonic()})
            status, headers, body = script(number, request)
            if isinstance(body, float):
                time.sleep(body)
                body = {}
            blob = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            self.wfile.write(blob)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_ENDPOINT_KEY", KEY)
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.3)


def test_rate_limits_time_outs_and_broken_replies_are_tried_again() -> None:
    answers: list[Answer] = [
        (429, {"Retry-After": "0.2"}, {}), (503, {}, {}), (200, {}, b"{not json"), (200, {}, {"choices": []}), (200, {}, []),
        completion("hello"),
    ]  # fmt: skip
    with serving(lambda n, request: answers[n]) as (url, seen):
        reply = ChatEndpoint(url, "stub").complete([{"role": "user", "content": "hi"}], temperature=0.0)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens, reply.retries) == ("hello", 7, 3, 5)
    assert seen[1]["at"] - seen[0]["at"] >= 0.2
    assert seen[0]["authorization"] == f"Bearer {KEY}"
    assert {name: seen[0][name] for name in ("model", "temperature")} == {"model": "stub", "temperature": 0.0}
    with serving(lambda n, request: (200, {}, 1.0) if n == 0 else completion("late")) as (url, seen):
        assert ChatEndpoint(url, "stub", timeout=0.2).complete([]).retries == 1


def test_refused_and_exhausted_requests_say_so_without_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    caplog.set_level(logging.DEBUG)
    with (
        serving(lambda n, request: (401, {}, {"error": f"bad key {KEY}"})) as (url, seen),
        pytest.raises(EndpointError, match=r"refused: status 401.*\[key\]") as refused,
    ):
        ChatEndpoint(url, "stub").complete([])
    assert len(seen) == 1
    with serving(lambda n, request: (500, {}, {})) as (url, _), pytest.raises(EndpointError, match=r"in 2 attempts, .*status 500"):
        ChatEndpoint(url, "stub").complete([])
    assert KEY not in str(refused.value) + caplog.text
    assert KEY not in repr(vars(ChatEndpoint(url, "stub")))


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda n, request: completion("hello")) as (url, seen):
        for key in (f"{KEY}\nand more", f"{KEY} more", f"“{KEY}”"):
            monkeypatch.setenv("X2L_ENDPOINT_KEY", key)
            with pytest.raises(EndpointError, match="X2L_ENDPOINT_KEY holds a space") as error:
                ChatEndpoint(url, "stub").complete([])
            assert KEY not in f"{error.value} {error.value.__cause__} {error.value.__context__}"
        for key, sent in ((f"{KEY}\n", f"Bearer {KEY}"), ("", None)):
            monkeypatch.setenv("X2L_ENDPOINT_KEY", key)
            ChatEndpoint(url, "stub").complete([])
            assert seen[-1]["authorization"] == sent


def test_a_redirect_takes_the_key_nowhere() -> None:
    with (
        serving(lambda n, request: completion("theirs")) as (other, there),
        serving(lambda n, request: (307, {"Location": f"{other}/chat/completions"}, {})) as (url, _),
        pytest.raises(EndpointError, match="refused: status 307"),
    ):
        ChatEndpoint(url, "stub").complete([])
    assert there == []


@pytest.mark.parametrize(("header", "seconds"), [("2", 2.0), ("-3", 0.0), ("nan", 0.0), ("soon", None), (None, None)])
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert endpoint.retry_after(header) == seconds


def test_retry_after_a_date() -> None:
    assert endpoint.retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30))) == pytest.approx(30, abs=2)


def test_cost() -> None:
    assert cost(2_000_000, 500_000, 0.5, 2.0) == 2.0


TURNS = json.dumps([{"question": "What runs?", "answer": "A dog."}, {"question": "Where?", "answer": "On grass."}])


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("I'm sorry, I cannot help with that.", "refusals"),
        ("作为一个人工智能，我无法查看图片。", "refusals"),
        ('[{"question": "What?", "answer": "As an AI language model, I cannot see it."}]', "refusals"),
        ("Sure! Here is a conversation.", "malformed"),
        ('[{"question": "What?"}]', "malformed"),
        ('[{"question": "What?", "answer": " "}]', "malformed"),
        ('[{"question": "What?", "answer": 3}]', "malformed"),
        ('{"question": "What?", "answer": "It."}', "malformed"),
        ("[]", "malformed"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_replies_that_are_not_kept(reply: str, kind: str) -> None:
    with pytest.raises(ReplyError) as error:
        parse_turns(reply)
    assert error.value.kind == kind


def test_fenced_replies_are_read() -> None:
    assert parse_turns(f"```json\n{TURNS}\n```") == [("What runs?", "A dog."), ("Where?", "On grass.")]


def photos(path: Path, num: int = 4) -> Path:
    rows = {f"p{i}": {"jpg": picture((i, 0, 0)), "json": json.dumps({"en": [f"A dog {i} runs."]}).encode()} for i in range(num)}
    return write_shard(path, rows)


def test_instruct_keeps_good_replies_alone_and_counts_the_rest(tmp_path: Path) -> None:
    def script(n: int, request: dict[str, Any]) -> Answer:
        text = request["messages"][0]["content"]
        if "dog 1" in text:
            return completion("I'm sorry, but no.")
        return completion(TURNS if "dog 2" not in text or n > 3 else "well ...")

    with serving(script) as (url, seen):
        transform = Instruct(ChatEndpoint(url, "stub"), "conversation.en", attempts=4)
        summary = run(transform, read_source(str(photos(tmp_path / "p.tar"))), tmp_path / "out", progress=False)
        calls = len(seen)
        again = run(transform, read_source(str(tmp_path / "p.tar")), tmp_path / "out", progress=False)
    assert len(seen) == calls
    assert summary.counts == again.counts
    assert summary.counts["calls"] == calls
    assert summary.counts["refusals"] == 4
    assert summary.counts["prompt_tokens"] == 7 * calls
    assert [(row.key, row.bad) for row in summary.skipped] == [("p1", True)]
    found = {record.key: record for record in read_source(str(tmp_path / "out" / "*.tar"))}
    assert sorted(found) == ["p0", "p2", "p3"]
    first, answer = found["p0"].fields["messages"][:2]
    assert first["content"] == [{"type": "image", "key": "jpg"}, {"type": "text", "text": "What runs?"}]
    assert answer == {"role": "assistant", "content": "A dog."}
    assert found["p0"].fields["provenance"][0]["model"] == "stub"
    assert KEY.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_an_endpoint_that_refuses_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    source = photos(tmp_path / "p.tar")
    with (
        serving(lambda n, request: completion(TURNS) if n < 2 else (403, {}, {"error": "quota"})) as (url, _),
        pytest.raises(EndpointError, match="quota"),
    ):
        run(Instruct(ChatEndpoint(url, "stub"), "detail.en"), read_source(str(source)), tmp_path / "out", progress=False)
    with serving(lambda n, request: completion(TURNS)) as (url, seen):
        run(Instruct(ChatEndpoint(url, "stub"), "detail.en"), read_source(str(source)), tmp_path / "out", progress=False)
        assert len(seen) == 2


def test_prompts_have_a_place_for_facts(tmp_path: Path) -> None:
    for path in PROMPTS.glob("*.*.txt"):
        assert "{facts}" in read_prompt(path.stem)
    (tmp_path / "mine.txt").write_text("Ask something.")
    with pytest.raises(DataError, match="needs the place"):
        read_prompt(str(tmp_path / "mine.txt"))
    with pytest.raises(DataError, match=r"no prompt 'nothing'.*conversation\.en"):
        read_prompt("nothing")


def test_translate_by_endpoint(tmp_path: Path) -> None:
    chinese = {"A dog 0 runs.": "狗在跑。", "A dog 1 runs.": "A dog 1 runs.", "A dog 2 runs.": "", "A dog 3 runs.": "哈哈" * 20}
    with serving(lambda n, request: completion(chinese[request["messages"][1]["content"]])) as (url, _):
        transform = Translate(EndpointTranslator(ChatEndpoint(url, "stub")), "en", "zh", batch=1)
        summary = run(transform, read_source(str(photos(tmp_path / "p.tar"))), tmp_path / "out", progress=False)
    (kept,) = read_source(str(tmp_path / "out" / "*.tar"))
    assert kept.fields["zh"] == ["狗在跑。"]
    reasons = " ".join(row.reason for row in summary.skipped)
    assert all(words in reasons for words in ("not a translation into 'zh'", "an empty translation", "repeats itself"))
