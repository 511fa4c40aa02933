"""`x2l serve` through the unmodified client of OpenAI, on a real server with a tiny random model."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from conftest import picture, tiny_model
from serving import KEY, Running, check_error, data_url, image_part, rss, running, served
from typer.testing import CliRunner

from x2l.assistant import Assistant
from x2l.build import build
from x2l.cli import app
from x2l.config import ModelConfig
from x2l.data.tasks import dictated
from x2l.serve.intake import EngineConfig
from x2l.serve.limits import Limits
from x2l.serve.server import read_keys, run
from x2l.types import Message, Part, Sample, assistant, user

RED, BLUE = picture((250, 0, 0)), picture((0, 0, 250))


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))


@pytest.fixture(scope="module")
def server(model: Assistant) -> Iterator[Running]:
    with running(model) as up:
        yield up


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=600)


SPEECH = {
    "encoder": {"name": "conformer", "num_mels": 8, "channels": 2, "width": 16, "ffn_width": 16, "num_heads": 2, "kernel": 3,
                "num_blocks": 1, "pool_after": []},
    "interface": {"listener": {"width": 16, "num_heads": 2, "kernel": 3}, "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip
QFORMER = {"width": 16, "depth": 2, "heads": 2, "num_queries": 4, "cross_every": 1}
VIDEO = {"encoder": {"name": "conftest:patches"}, "interface": QFORMER, "decode": {"num_frames": 3}}


def clip() -> bytes:
    """Five frames of growing brightness, as MP4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 50 * i, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def voice(seconds: float = 1.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds)), 16_000, format="WAV")
    return buffer.getvalue()


def test_sound_and_video(llm_folder: Path) -> None:
    """Every way to give them, batched together; answers are the assistant's own."""
    torch.manual_seed(0)
    model = Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder, speech=SPEECH, video=VIDEO))))
    film, heard = clip(), voice()
    wav = base64.b64encode(heard).decode()
    parts: list[tuple[Part, dict[str, Any]]] = [
        (Part("speech", bytes=heard), {"type": "input_audio", "input_audio": {"data": wav, "format": "mp3"}}),
        (Part("speech", bytes=heard), {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{wav}"}}),
        (Part("video", bytes=film), {"type": "video_url", "video_url": {"url": data_url(film, "video/mp4")}}),
    ]
    with running(model, EngineConfig(max_new_tokens=30)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=600)

        def ask(wire: dict[str, Any]) -> Any:
            content: Any = [wire, {"type": "text", "text": "What?"}]
            return client.chat.completions.create(
                model="x2l", messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0
            )

        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(ask, [wire for _, wire in parts]))
        for (part, _), answer in zip(parts, answers, strict=True):
            assert answer.choices[0].message.content == alone(model, user(part, "What?"))
        counts = [answer.usage.prompt_tokens_details for answer in answers]
        assert counts[0].audio_tokens == counts[1].audio_tokens > 0
        assert counts[2].model_dump()["video_tokens"] == 3 * 4
        for recording in (heard, voice(9.0)):  # the second one is longer than a piece
            said = client.audio.transcriptions.create(model="x2l", file=("a.wav", recording), temperature=0)
            asked = dictated(Part("speech", bytes=recording), "Repeat this sentence word for word.")
            (expected,) = model.generate_text([Sample("a", (asked,))], 30, tokens_a_second=6.5, piece_seconds=8)
            assert said.text == expected
        with pytest.raises(openai.BadRequestError, match="not a readable sound"):
            client.audio.transcriptions.create(model="x2l", file=("a.wav", b"noise"))


def alone(model: Assistant, *messages: Any, n: int = 12) -> str:
    return "".join(model.stream(messages, n))


def test_chat_with_an_image_and_turns(client: openai.OpenAI, model: Assistant) -> None:
    talk: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(RED), {"type": "text", "text": "What is it?"}]},
    ]
    first = client.chat.completions.create(model="x2l", messages=talk, max_tokens=12, temperature=0)
    messages = [*_system("Be brief."), user(Part("image", bytes=RED), "What is it?")]
    assert first.choices[0].message.content == alone(model, *messages)
    assert first.usage is not None
    assert first.usage.prompt_tokens == 4 + sum(i >= 0 for i in model.renderer.prompt(messages).ids)
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.model_dump()["image_tokens"] == 4
    answer = first.choices[0].message.content or ""
    talk += [first.choices[0].message, {"role": "user", "content": "And now?"}]  # as the client's documentation does
    second = client.chat.completions.create(model="x2l", messages=talk, max_tokens=12, temperature=0)
    assert second.choices[0].message.content == alone(model, *messages, assistant(answer), user("And now?"))
    assert second.usage is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 20  # type: ignore[union-attr]


def _system(text: str) -> list[Any]:
    return [Message("system", (Part("text", text=text),))]


def test_streaming(client: openai.OpenAI, model: Assistant) -> None:
    stream = client.chat.completions.create(
        model="x2l",
        messages=[{"role": "user", "content": [image_part(BLUE), {"type": "text", "text": "What?"}]}],  # type: ignore[list-item]
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == alone(model, user(Part("image", bytes=BLUE), "What?"))
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert len(chunks) > 5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "does not exist"),
        ({"n": 2}, openai.BadRequestError, "n: Input should be 1"),
        ({"tools": []}, openai.BadRequestError, "tools: Extra inputs"),
        ({"max_tokens": 5000}, openai.BadRequestError, "the limit is 1024"),
        ({"messages": []}, openai.BadRequestError, "at least 1 item"),
    ],
)
def test_errors_are_the_client_s_own(client: openai.OpenAI, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        client.chat.completions.create(**({"model": "x2l", "messages": [{"role": "user", "content": "Hi"}]} | fields))


def test_modalities_that_the_model_lacks_are_named(client: openai.OpenAI) -> None:
    sound = base64.b64encode(b"RIFF").decode()
    parts: list[Any] = [
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{sound}"}},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{sound}"}},
    ]
    for part in parts:
        with pytest.raises(openai.BadRequestError, match=f"cannot read {part['type']}: it reads text, image"):
            client.chat.completions.create(model="x2l", messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.BadRequestError, match="no speech interface"):
        client.audio.transcriptions.create(model="x2l", file=("a.wav", b"RIFF"))


def test_a_wrong_key(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["x2l"]
    assert client.models.retrieve("x2l").model_extra == {"modalities": ["text", "image"], "lookahead": False}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("x3l")


def test_eight_at_a_time_answer_as_one_alone(server: Running, model: Assistant) -> None:
    contents: list[Any] = [
        [image_part(RED), {"type": "text", "text": "What?"}],
        "Hello!",
        [{"type": "text", "text": "One "}, image_part(BLUE), {"type": "text", "text": " two "}, image_part(RED)],
        "你好",
        [image_part(BLUE)],
        "x" * 200,
        [image_part(RED), {"type": "text", "text": "Why?"}],
        "Tell me a story",
    ]
    single = [server.ask(content, max_tokens=16).json()["choices"][0]["message"]["content"] for content in contents]
    server.engine.prefixes = type(server.engine.prefixes)(1 << 20)  # nothing is remembered
    steps = server.engine.stats.steps
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda content: server.ask(content, max_tokens=16), contents))
    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == single
    assert server.engine.stats.steps - steps < 8 * 15


def test_metrics_and_health_count(server: Running) -> None:
    before = server.metric("x2l_engine_completion_tokens_total")
    answer = server.ask("count", max_tokens=5)
    assert server.metric("x2l_engine_completion_tokens_total") - before == answer.json()["usage"]["completion_tokens"]
    assert server.metric('x2l_http_responses_total{route="/v1/chat/completions",status="200"}') >= 1
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.http.get("/ready").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_computing(server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "stops", set())  # it would go on for 900 tokens
    gone = server.metric("x2l_disconnects_total")
    cancelled = server.engine.stats.cancelled
    body = {"model": "x2l", "messages": [{"role": "user", "content": "tell me"}], "max_tokens": 900, "temperature": 1, "seed": 1}
    with pytest.raises(httpx.TimeoutException), httpx.Client(timeout=httpx.Timeout(60, read=0.3)) as http:  # noqa: PT012
        headers = {"Authorization": f"Bearer {KEY}"}
        with http.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": stream}, headers=headers) as response:
            for i, _ in enumerate(response.iter_lines()):
                if i == 4:
                    raise httpx.ReadTimeout("enough")
    deadline = time.monotonic() + 60
    while server.engine.load[1] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.stats.cancelled == cancelled + 1
    assert server.http.get("/health").json()["cancelled"] == cancelled + 1
    assert server.metric("x2l_engine_cancelled_total") == cancelled + 1
    while server.metric("x2l_disconnects_total") == gone and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("x2l_disconnects_total") == gone + 1


def test_a_killed_decoder_is_replaced_and_counted(server: Running) -> None:
    restarts = server.pool.restarts
    os.kill(server.pool.pids[0], signal.SIGKILL)
    answer = server.ask([image_part(picture((1, 2, 3)))])
    assert answer.status_code == 200, answer.text
    assert server.pool.restarts == restarts + 1
    assert server.http.get("/health").json()["decoder_restarts"] == restarts + 1
    assert server.metric("x2l_decoder_restarts_total") == restarts + 1


def test_an_engine_exception_is_a_500_and_the_server_goes_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = server.engine.stats.errors

    def broken(*_: object) -> None:
        raise RuntimeError("0xdead in /secret/file.py")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine._caches, "load", broken)
        answer = server.ask("break")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the model failed on this request"
    with monkeypatch.context() as patch:
        patch.setattr(server.engine._lanes, "step", broken)
        lines = server.ask("break", stream=True).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    told = server.http.get("/health").json()
    assert (told["status"], told["engine_errors"]) == ("ok", errors + 2)
    assert server.metric("x2l_engine_errors_total") == errors + 2
    assert server.metric("x2l_engine_alive") == 1
    assert server.ask("go on").status_code == 200


def test_a_dead_engine_is_a_503_everywhere(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model) as server:
        monkeypatch.setattr(server.engine, "_drop", lambda: (_ for _ in ()).throw(MemoryError()))
        for _ in range(2):  # the one that it dies on, and the next one
            answer = server.ask("die")
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert check_error(503, answer.content) == "the engine has stopped"
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "engine stopped")
        assert server.http.get("/ready").status_code == 503
        assert server.metric("x2l_engine_alive") == 0


def test_too_many_get_429_while_health_answers(model: Assistant) -> None:
    with running(model, EngineConfig(max_batch=2, max_queue=2), limits=Limits(max_requests=4)) as server:
        slow: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                start = time.monotonic()
                assert server.http.get("/health").status_code == 200
                slow.append(time.monotonic() - start)
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(40) as threads:
            answers = list(threads.map(lambda _: server.ask("flood", max_tokens=40), range(80)))
        done.set()
        watcher.join()
        refused = [a for a in answers if a.status_code == 429]
        assert {a.status_code for a in answers} == {200, 429}
        assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert slow


@pytest.mark.slow
def test_sigterm_drains_and_leaves_no_orphans(llm_folder: Path, tmp_path: Path) -> None:
    with served(tiny_model(llm_folder), tmp_path) as (process, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=600)
        stream = iter(client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "long"}], max_tokens=400, temperature=0, stream=True))  # fmt: skip
        next(stream)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        assert [c.choices[0].finish_reason for c in stream][-1] in ("length", "stop")
        assert process.wait(timeout=60) == 0
        assert children
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_five_hundred_at_once(llm_folder: Path, tmp_path: Path) -> None:
    """What is over the bounds is told when to come again, what is accepted is answered, and /health answers all the while."""
    with served(tiny_model(llm_folder), tmp_path) as (process, port):
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600) as http:
            body = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            before = rss(process.pid)
            script = Path(__file__).parents[1] / "benchmarks" / "flood.py"
            done = subprocess.run([sys.executable, script, url, KEY, "500"], capture_output=True, check=True, timeout=280)
            told = json.loads(done.stdout)
            print(told)
            assert told["statuses"].keys() <= {"200", "429", "503"}
            assert told["statuses"]["200"] >= 72  # what fits into batch and queue
            assert told["statuses"]["429"] > 0
            assert told["not_as_promised"] == 0
            assert told["health_ms"]["not_200"] == 0
            assert told["health_ms"]["p99"] < 1000
            assert process.poll() is None
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            assert http.get("/ready").status_code == 200
            assert rss(process.pid) - before <= 256 << 20
            refused = 'x2l_http_responses_total{route="/v1/chat/completions",status="429"} '
            assert f"{refused}{told['statuses']['429']}.0" in http.get("/metrics").text


def test_what_is_open_to_others_needs_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("X2L_API_KEYS", raising=False)
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 is open to others: set X2L_API_KEYS"):
        run("tiny", host="0.0.0.0")
    with pytest.raises(ValueError, match="every web page"):
        run("tiny", origins=("*",))
    with pytest.raises(ValueError, match=r"'chat\.example' is no origin: .* such as https://chat\.example"):
        run("tiny", origins=("https://fine.example:8443", "chat.example"))
    monkeypatch.setenv("X2L_API_KEYS", f"{KEY},{KEY}2")
    assert read_keys(None) == [KEY, f"{KEY}2"]
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nshort\n")
    with pytest.raises(ValueError, match=r"16 characters or more.*\[2\]"):
        read_keys(keys)
    with pytest.raises(ValueError, match="cannot read the API keys"):
        read_keys(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [["--max-batch", "0"], ["--port", "99999"], ["--grace", "-1"]])
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", *wrong])
    assert result.exit_code == 2
    assert f"for '{wrong[0]}'" in result.output


@pytest.mark.parametrize("command", ["serve", "web"])
def test_the_weights_bits_are_asked_for_by_an_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Assistant:
        loaded.append(arguments)
        raise ValueError("loaded")

    monkeypatch.setattr(Assistant, "load", load)
    for bits, dtype in ((None, None), (32, "float32"), (16, "bfloat16"), (8, "bfloat16"), (4, "bfloat16")):
        loaded.clear()
        with pytest.raises(ValueError, match="loaded"):
            CliRunner().invoke(app, [command, *(["--weight-bits", str(bits)] if bits else [])], catch_exceptions=False)
        assert loaded == [("tiny", [f"llm.dtype={dtype}"] if dtype else [])]
    with pytest.raises(ValueError, match="--weight-bits must be one of 32, 16, 8, 4, got 5"):
        CliRunner().invoke(app, [command, "--weight-bits", "5"], catch_exceptions=False)
