"""LLaVA-Bench-COCO: published judgements replayed, the judge stubbed; acceptance cases E1-E4, E7, E8, E11, E18."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from x2l import endpoint
from x2l.eval import judge as judging
from x2l.eval import llava_bench as bench
from x2l.eval import records
from x2l.eval.tasks import exit_code

DATA = Path(__file__).parents[2] / "shared/data/llava_bench_coco"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs shared/data/llava_bench_coco")
KEY = "sk-very-secret-0123456789"


class StubChat:
    """Replies from a list, or the same for ever; remembers what it was asked."""

    name = "stub"

    def __init__(self, *replies: str):
        self.replies, self.asked, self.lock = replies, [], threading.Lock()

    def complete(self, system, message, temperature, max_tokens):
        with self.lock:
            self.asked.append(message)
            return self.replies[(len(self.asked) - 1) % len(self.replies)]


class StubServer:
    """An OpenAI-compatible server: ``script`` gives (status, headers, body) for each call, by its number."""

    def __init__(self, script):
        outer = self
        self.calls: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.calls.append({"path": self.path, "headers": dict(self.headers), "body": body})
                status, headers, reply = script(len(outer.calls))
                content = json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # the client was killed
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def completion(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def questions(num: int) -> list[bench.Question]:
    return [
        bench.Question(i, f"{i // 3}.jpg", f"What is {i}?", bench.CATEGORIES[i % 3], ("A cat.",), (), "Assistant", "Rate.")
        for i in range(num)
    ]


def answers(num: int, text: str) -> dict[int, str]:
    return {i: f"{text} {i}" for i in range(num)}


# E1


@needs_data
@pytest.mark.parametrize(("name", "published"), [("gpt35", 92.1), ("bard", 98.7)])
def test_replay_llava(name, published):
    reviews = bench.load_reviews(DATA / f"llava/review_{name}_vicuna-13b.jsonl", "reference-first")
    assert round(bench.replay(reviews)["all"], 1) == published


@needs_data
def test_replay_xllm_in_paper_mode():
    reviews = bench.load_reviews(DATA / "xllm/review.json", "candidate-first")
    summary = bench.summarise(reviews, "paper")
    scores = {name: round(score["value"], 1) for name, score in summary["scores"].items()}
    assert scores == {"conv": 85.4, "detail": 83.5, "complex": 84.6, "all": 84.5}
    assert {name: round(value, 1) for name, value in bench.replay(reviews).items()} == scores
    assert summary["parse"] == {"ok": 83, "unreadable": 7}
    assert exit_code(summary, bench.MIN_COVERAGE) != 0


@needs_data
def test_one_rule_report():
    lines = bench.one_rule_report({"X-LLM": DATA / "xllm/review.json"}).splitlines()
    assert lines[2] == "| X-LLM | 7 of 90 | as stored | 85.4 | 83.5 | 84.6 | 84.5 |"
    assert lines[3].endswith("| keep as (-1, -1) | 85.4 | 83.5 | 84.6 | 84.5 |")
    assert lines[5].endswith("| leave out | 85.8 | 83.6 | 84.6 | 84.6 |")
    kept = [r["tuple"] for r in json.loads((DATA / "xllm/review.json").read_text()) if r["tuple"] != [-1, -1]]
    candidate, reference = map(sum, zip(*kept, strict=True))
    assert f"{100 * (candidate + 7) / (reference + 63):.1f}" == lines[4].split("|")[-2].strip()


# E2


@needs_data
def test_judge_message_is_llavas_to_the_byte():
    question = bench.load_questions(DATA / "llava")[0]
    row = json.loads((DATA / "llava/qa90_questions.jsonl").read_text().splitlines()[0])
    lines = (DATA / "llava/caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    context = next(c for c in map(json.loads, lines) if c["image"] == row["image"])
    rule = json.loads((DATA / "llava/rule.json").read_text())["conv"]["prompt"]
    expected = "[Context]\n" + "\n".join(context["captions"]) + "\n\n"
    expected += "\n".join(f"{box['category']}: {json.dumps(box['bbox'])}" for box in context["instances"]) + "\n\n"
    expected += "[Question]\nWhat is the color of the two suitcases in the image?\n\n"
    expected += "[Assistant 1]\nblack & brown\n\n[End of Assistant 1]\n\n"
    expected += "[Assistant 2]\n棕色\n\n[End of Assistant 2]\n\n[System]\n" + rule + "\n\n"
    message = bench.judge_message(question, "black & brown", "棕色")
    assert message.encode() == expected.encode()
    pinned = "635d193e0f9b3eb6df73a08dd9fb38fa805482cdfc88f4d591ce6768871f89f5"
    assert hashlib.sha256(message.encode()).hexdigest() == pinned
    assert judging.SYSTEM == "You are a helpful and precise assistant for checking the quality of the answer."


# E3


@pytest.mark.parametrize(
    "reply", ["8, 9", "8 9 ", "\n8 9", "8  9", "8\t9", "8/10 9/10", "**8 9**", "Assistant 1: 8, Assistant 2: 9"]
)
def test_replies_that_only_robust_reads(reply):
    assert bench.parse_paper(reply + "\nBoth are good.").scores is None
    assert bench.parse_robust(reply + "\nBoth are good.").scores == (8.0, 9.0)


@pytest.mark.parametrize(
    ("reply", "status"),
    [("nan 9", "not finite"), ("inf 1", "not finite"), ("11 9", "out of range"), ("-3 9", "out of range")],
)
def test_replies_that_only_paper_reads(reply, status):
    assert bench.parse_paper(reply).scores is not None
    assert bench.parse_robust(reply) == (None, status)


@pytest.mark.parametrize("reply", ["", "8", "8 9 10", "The scores are 3 and 8.", "8/9", "1e1 9", "９ 8", "1_0 9", "9" * 400 + " 1"])
def test_replies_that_robust_refuses(reply):
    assert bench.parse_robust(reply) == (None, "unreadable")


@pytest.mark.parametrize("parse", [bench.parse_paper, bench.parse_robust])
@pytest.mark.parametrize("reply", ["8 9", "8.0 9.0\nGood.", "8,9"])
def test_replies_that_both_read(parse, reply):
    assert parse(reply) == ((8.0, 9.0), "ok")


# E4


@pytest.mark.parametrize("mode", ["paper", "robust"])
def test_unreadable_replies_are_counted(tmp_path, mode):
    chat = StubChat("I cannot say.", *["8 9"] * 9)
    judging.judge(questions(90), answers(90, "ref"), answers(90, "cand"), chat, tmp_path, mode, workers=1)
    summary = judging.score(tmp_path)
    assert "coverage 0.90 of" in bench.format_summary(summary)
    assert exit_code(summary, bench.MIN_COVERAGE) != 0
    assert exit_code({"coverage": 0.98}, bench.MIN_COVERAGE) == 0


# E7

RUNNER = """
import sys
sys.path.insert(0, {root!r})
from tests.test_eval_judge import answers, questions
from x2l.eval.judge import Endpoint, judge
judge(questions(90), answers(90, "ref"), answers(90, "cand"), Endpoint({url!r}, "stub"), {out!r}, "paper", workers=1)
"""


def test_kill_and_resume(tmp_path):
    release = threading.Event()

    def script(number):
        if number == 38:
            release.wait(60)
        return 200, {}, completion("8 9")

    with StubServer(script) as server:
        code = RUNNER.format(root=str(Path(__file__).parents[1]), url=server.url, out=str(tmp_path))
        first = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(server.calls) < 38 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        release.set()
        assert len(records.read(tmp_path / "judgements.jsonl")) == 37
        before = len(server.calls)
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL, timeout=120)
        assert len(server.calls) - before == 53
    rows = records.read(tmp_path / "judgements.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == len({row["question_id"] for row in rows}) == 90
    assert judging.score(tmp_path)["coverage"] == 1.0


# E8, E9


def test_position_bias(tmp_path):
    for mode in ("paper", "robust"):
        out = tmp_path / mode
        judging.judge(questions(6), answers(6, "ref"), answers(6, "cand"), StubChat("9 7"), out, mode)
    paper, robust = judging.score(tmp_path / "paper"), judging.score(tmp_path / "robust")
    assert round(paper["scores"]["all"]["value"], 1) == 77.8
    assert paper["position_bias"] is None
    assert robust["scores"]["all"]["value"] == pytest.approx(100.0)
    assert robust["position_bias"] == pytest.approx(2.0)
    assert "position bias +2.00" in bench.format_summary(robust)


def test_an_unreadable_order_drops_the_question():
    """A question judged in one order only would bring the judge's position bias into the score."""
    rows = [
        {"question_id": i, "image": str(i), "category": "conv", "order": order, "reply": "9 7"}
        for i in range(3)
        for order in bench.ORDERS
    ]
    rows[0]["reply"] = "?"
    summary = bench.summarise(rows, "robust")
    assert summary["num_questions"] == 2
    assert summary["coverage"] == pytest.approx(5 / 6)
    assert summary["scores"]["all"]["value"] == pytest.approx(100)


def test_intervals_cluster_by_image():
    """E9."""
    rows = [
        {"question_id": i, "image": str(i // 3), "category": "conv", "order": order, "reply": reply}
        for i in range(90)
        for order, reply in zip(bench.ORDERS, ("9 3", "3 9") if i // 3 % 2 else ("9 9", "9 9"), strict=True)
    ]
    width = {}
    for name, image in {"clustered": lambda i: str(i // 3), "naive": str}.items():
        score = bench.summarise([{**row, "image": image(row["question_id"])} for row in rows], "robust")["scores"]["all"]
        width[name] = score["high"] - score["low"]
    assert width["clustered"] > 1.5 * width["naive"]
    assert bench.summarise(rows, "robust", seed=1) == bench.summarise(rows, "robust", seed=1)


# E11, E18, E19


class Identity:
    """A translator that changes nothing, and counts."""

    def __init__(self, name="identity"):
        self.name, self.calls = name, []

    def translate(self, texts, source, target):
        assert (source, target) == ("zh", "en")
        self.calls += texts
        return texts, {}


def test_translation_is_stored_and_not_repeated(tmp_path):
    chat, identity = StubChat("8 9"), Identity()
    for _ in range(2):
        judging.judge(questions(3), answers(3, "ref"), answers(3, "答"), chat, tmp_path, "paper", translator=identity)
    rows = records.read(tmp_path / "judgements.jsonl")
    assert len(identity.calls) == len(chat.asked) == len(rows) == 3
    assert all(row["raw"] == row["translated"] for row in rows)
    assert records.read_json(tmp_path / "run.json")["translator"] == "identity"
    first = judging.score(tmp_path)
    assert judging.score(tmp_path) == first
    other = Identity("another")
    judging.judge(questions(3), answers(3, "ref"), answers(3, "答"), chat, tmp_path, "paper", translator=other)
    assert len(other.calls) == 3  # what one translator said is not another's


@needs_data
def test_chinese_answers_are_judged_in_english(tmp_path, monkeypatch):
    """X-LLM's own Chinese answers, translated and judged by one stub endpoint through the command."""
    from typer.testing import CliRunner

    from x2l.eval.commands import app

    replies = []

    def script(n):
        replies.append(server.calls[n - 1]["body"]["messages"])
        translating = replies[-1][0]["content"].startswith("Translate the user's text from Chinese into English.")
        return 200, {}, completion(f"In English {n}." if translating else "8 9")

    with StubServer(script) as server:
        monkeypatch.setenv("X2L_JUDGE_URL", server.url)
        monkeypatch.setenv("X2L_JUDGE_MODEL", "stub")
        answered = str(DATA / "xllm/qa90_x-llm_answer.json")
        options = ["--mode", "paper", "--translate", "judge", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, ["llava-bench", str(DATA / "llava"), answered, *options])
    assert result.exit_code == 0, result.exception
    assert len(server.calls) == 90 + 90
    row = next(row for row in records.read(tmp_path / "judgements.jsonl") if row["question_id"] == 0)
    assert row["raw"] == "图中两个手提箱的颜色是棕色和黑色"
    assert row["translated"].startswith("In English ")
    assert row["translated"] in row["message"]
    assert row["raw"] not in row["message"]


@pytest.mark.network
@needs_data
def test_opus_translates_an_answer_of_x_llm():
    pytest.importorskip("ctranslate2")
    texts, _ = judging.find_translator("opus", StubChat()).translate(["图中两个手提箱的颜色是棕色和黑色"], "zh", "en")
    assert "brown" in texts[0].lower()
    assert "black" in texts[0].lower()


def test_one_character_asks_anew(tmp_path):
    chat = StubChat("8 9")
    judging.judge(questions(3), answers(3, "ref"), answers(3, "a"), chat, tmp_path, "paper")
    changed = {**answers(3, "a"), 1: "a 1."}
    judging.judge(questions(3), answers(3, "ref"), changed, chat, tmp_path, "paper")
    assert len(chat.asked) == 4
    assert judging.score(tmp_path)["num_judgements"] == 3


def test_missing_answers(tmp_path):
    """``paper`` stops at the shortest file, as the original does; ``robust`` refuses."""
    short = answers(4, "cand")
    judging.judge(questions(6), answers(6, "ref"), short, StubChat("8 9"), tmp_path, "paper")
    assert judging.score(tmp_path)["num_judgements"] == 4
    with pytest.raises(ValueError, match=r"questions \[4, 5\]"):
        judging.judge(questions(6), answers(6, "ref"), short, StubChat("8 9"), tmp_path / "r", "robust")


# the endpoint


def test_endpoint_waits_as_told_and_hides_its_key(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("X2L_JUDGE_KEY", KEY)
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    replies = [(429, {"Retry-After": "7"}, {}), (503, {}, {}), (200, {}, completion("8 9"))]
    with StubServer(lambda n: replies[n - 1]) as server, caplog.at_level(logging.DEBUG):
        chat = judging.Endpoint(server.url, "stub")
        judging.judge(questions(1), answers(1, "r"), answers(1, "c"), chat, tmp_path, "paper")
    assert waits == [7.0, 2.0]
    call = server.calls[-1]
    assert call["path"] == "/v1/chat/completions"
    assert call["headers"]["Authorization"] == f"Bearer {KEY}"
    assert call["body"]["temperature"] == 0.2
    assert call["body"]["max_tokens"] == 1024
    assert [m["role"] for m in call["body"]["messages"]] == ["system", "user"]
    stored = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in caplog.text + stored + repr(chat)


def test_endpoint_refusals(monkeypatch):
    monkeypatch.setenv("X2L_JUDGE_KEY", KEY)
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    with StubServer(lambda n: (401, {}, {"error": f"bad key {KEY}"})) as server:
        with pytest.raises(judging.JudgeError, match="status 401") as caught:
            judging.Endpoint(server.url, "stub").complete("s", "m", 0.2, 8)
        assert len(server.calls) == 1
        assert KEY not in str(caught.value)
    with StubServer(lambda n: (500, {}, {})) as server:
        with pytest.raises(judging.JudgeError, match="in 7 attempts"):
            judging.Endpoint(server.url, "stub").complete("s", "m", 0.2, 8)
        assert len(server.calls) == endpoint.ATTEMPTS
        url = server.url
    with pytest.raises(judging.JudgeError, match="ConnectionError"):
        judging.Endpoint(url, "stub").complete("s", "m", 0.2, 8)
    with (
        StubServer(lambda n: (200, {}, {"choices": []})) as server,
        pytest.raises(judging.JudgeError, match="not a chat"),
    ):
        judging.Endpoint(server.url, "stub").complete("s", "m", 0.2, 8)
    monkeypatch.delenv("X2L_JUDGE_URL", raising=False)
    with pytest.raises(judging.JudgeError, match="X2L_JUDGE_URL"):
        judging.Endpoint.from_env()


def test_retry_after():
    assert endpoint.retry_after("3.5") == 3.5
    assert endpoint.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert endpoint.retry_after("soon") is None
    assert endpoint.retry_after(None) is None


def test_local_model_as_judge(tmp_path):
    class Model:
        def generate_text(self, samples, **decode):
            assert [m.role for m in samples[0].messages] == ["system", "user"]
            return ["6 3"]

    judging.judge(questions(3), answers(3, "r"), answers(3, "c"), judging.LocalChat(Model(), "tiny"), tmp_path, "paper")
    assert judging.score(tmp_path)["scores"]["all"]["value"] == pytest.approx(50)
