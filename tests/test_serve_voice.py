"""Spoken turns: the answer is that to the recorded file, however the sound arrives; limits, bad frames, leaving, keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, tiny_model
from serving import IMAGE, KEY, SPEECH, Running, check_error, image_part, is_idle, running
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.serve import server as serve_server
from x2l.serve.answer import Decode
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.limits import Limits
from x2l.serve.pauses import RATE, TAIL, Pauses
from x2l.serve.voice import VoiceTurn, wav
from x2l.types import Message, Part, assistant, user

LIMITS = Limits(max_voices=3, voice_seconds=8.0, voice_idle_seconds=3.0)
VOICE = {"type": "voice"}


def spoken(*seconds: float, seed: int = 0) -> bytes:
    """16-bit samples: voice (loud noise) and silence (soft noise) in turn, of these lengths."""
    random = np.random.default_rng(seed)
    pieces = [random.standard_normal(int(s * RATE)) * (5.0 if i % 2 else 3000.0) for i, s in enumerate(seconds)]
    return np.concatenate(pieces).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    torch.manual_seed(0)
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder, image=IMAGE, speech=SPEECH))))


@pytest.fixture(scope="module")
def server(model: Assistant) -> Iterator[Running]:
    with running(model, EngineConfig(max_new_tokens=400), limits=LIMITS, origins=("https://good.example",)) as up:
        yield up


def ticket(server: Running, messages: Any = None, **fields: Any) -> str:
    """The WebSocket's address for a turn."""
    body = {"model": "x2l", "messages": messages or [{"role": "user", "content": [VOICE]}], "max_tokens": 12, "temperature": 0}
    response = server.http.post("/v1/voice", json=body | fields)
    assert response.status_code == 200, response.text
    return server.url.replace("http:", "ws:") + str(response.json()["url"])


def speak(socket: ClientConnection, pcm: bytes, size: int = 3200, end: bool = True) -> list[dict[str, Any]]:
    """Send a recording and take everything that comes until the server closes."""
    for at in range(0, len(pcm), size):
        socket.send(pcm[at : at + size])
    if end:
        socket.send('{"type": "end"}')
    return received(socket)


def received(socket: ClientConnection) -> list[dict[str, Any]]:
    """All that comes until the connection is closed, for whatever reason."""
    frames: list[dict[str, Any]] = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            frames.append(json.loads(socket.recv(timeout=120)))
    return frames


def text_of(frames: list[dict[str, Any]]) -> str:
    assert frames[0]["type"] == "end", frames
    assert frames[-1]["usage"], frames
    return "".join(c["delta"].get("content", "") for frame in frames[1:] for c in frame["choices"])


def offline(model: Assistant, *messages: Any, tokens: int = 12) -> str:
    return "".join(model.stream(messages, tokens))


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [(1.0,), (1.0, 0.1), (1.0, 0.6), (0.5, 0.4, 0.7, 0.5)])
def test_the_answer_is_that_to_the_recorded_file(server: Running, model: Assistant, seconds: tuple[float, ...]) -> None:
    pcm = spoken(*seconds, seed=len(seconds))
    with connect(ticket(server)) as socket:
        frames = speak(socket, pcm)
    kept = frames[0]["samples"]
    tail = seconds[-1] if len(seconds) % 2 == 0 else 0.0
    assert kept == len(pcm) // 2 - max(0, int(tail * RATE) - TAIL)
    assert text_of(frames) == offline(model, user(Part("speech", bytes=wav(pcm[: 2 * kept]))))
    assert frames[-1]["usage"]["prompt_tokens_details"]["audio_tokens"] > 0


def test_an_answer_begun_in_a_pause_is_given_or_dropped(server: Running, model: Assistant) -> None:
    """A pause, in which the server has time; then the end, or more speech."""
    before = server.metric('x2l_voice_first_token_seconds_count{ahead="true"}')
    for more in (b"", spoken(0.5, seed=5)):
        pcm = spoken(0.8, 0.5, seed=3 + len(more)) + more
        with connect(ticket(server)) as socket:
            socket.send(pcm[: len(pcm) - len(more)])
            until = time.monotonic() + 60
            requests = server.engine.stats.requests
            while server.engine.stats.requests == requests and time.monotonic() < until:
                time.sleep(0.01)
            assert server.engine.stats.requests == requests + 1, "the pause has begun an answer"
            frames = speak(socket, more)
        assert text_of(frames) == offline(model, user(Part("speech", bytes=wav(pcm[: 2 * frames[0]["samples"]]))))
    assert server.metric('x2l_voice_first_token_seconds_count{ahead="true"}') == before + 1
    assert is_idle(server.engine)


@pytest.mark.parametrize("end_silence", [None, 0.5])
def test_chunks_of_any_size_give_the_same(server: Running, end_silence: float | None) -> None:
    pcm = spoken(0.6, 0.3, 0.4, 0.9, 0.5, 0.1, seed=9)
    answers = []
    for size in (642, 10_000, 60_000):
        with connect(ticket(server, end_silence=end_silence)) as socket:
            frames = speak(socket, pcm, size, end=end_silence is None)
        answers.append((frames[0]["samples"], text_of(frames)))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == (int(1.3 * RATE) + TAIL if end_silence else len(pcm) // 2)


def test_silence_ends_the_speech_where_that_is_asked_for(server: Running, model: Assistant) -> None:
    pcm = spoken(0.5, 0.4, 0.5, 2.0, seed=2)
    with connect(ticket(server, end_silence=0.6)) as socket:
        frames = speak(socket, pcm, end=False)
    assert frames[0]["samples"] == int(1.4 * RATE) + TAIL
    assert text_of(frames) == offline(model, user(Part("speech", bytes=wav(pcm[: 2 * frames[0]["samples"]]))))


def test_photos_earlier_turns_and_what_stands_around_the_voice(server: Running, model: Assistant) -> None:
    photo, pcm = picture((200, 10, 10)), spoken(0.7, seed=4)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(photo), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [{"type": "text", "text": "Listen:"}, VOICE, {"type": "text", "text": "Well?"}]},
    ]
    with connect(ticket(server, talk)) as socket:
        assert is_idle(server.engine)
        frames = speak(socket, pcm)
    assert text_of(frames) == offline(
        model,
        Message("system", (Part("text", text="Be brief."),)),
        user(Part("image", bytes=photo), "What is it?"),
        assistant("Red."),
        user("Listen:", Part("speech", bytes=wav(pcm)), "Well?"),
    )
    usage = frames[-1]["usage"]
    after = usage["prompt_tokens_details"]["audio_tokens"] + len("Well?") + len("<|im_start|>assistant\n") + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - after, "what stands before was known"


def test_the_next_turn_finds_the_recording_known(server: Running) -> None:
    pcm = spoken(0.7, seed=6)
    with connect(ticket(server)) as socket:
        frames = speak(socket, pcm)
    hits = server.engine.stats.embedding_hits
    data = base64.b64encode(wav(pcm)).decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    usage = server.ask([sound]).json()["usage"]
    assert server.engine.stats.embedding_hits == hits + 1
    assert usage["prompt_tokens"] == frames[-1]["usage"]["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1


def test_several_people_at_once(server: Running, model: Assistant) -> None:
    def one(seed: int) -> str:
        with connect(ticket(server)) as socket:
            return text_of(speak(socket, spoken(0.4 + 0.2 * seed, 0.3, 0.3, seed=20 + seed)))

    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(one, range(3)))
    sounds = [spoken(0.4 + 0.2 * seed, 0.3, 0.3, seed=20 + seed) for seed in range(3)]
    assert answers == [offline(model, user(Part("speech", bytes=wav(pcm)))) for pcm in sounds]


def test_a_failed_attempt_in_a_pause_is_repeated_at_the_end(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    pcm = spoken(0.5, 0.5, seed=8)

    async def run() -> str:
        turn = VoiceTurn(engine, [user(Part("speech", bytes=b""))], 0, Decode(12), "", ThreadPoolExecutor(1))
        await turn.begin()
        with monkeypatch.context() as broken:
            broken.setattr(engine, "submit", lambda *_: 1 / 0)
            turn.hear(pcm)
            assert turn.ahead
            await asyncio.sleep(1)
        return "".join([piece async for piece in await turn.answer()])

    try:
        assert asyncio.run(run()) == offline(model, user(Part("speech", bytes=wav(pcm[: 2 * int(0.7 * RATE)]))))
    finally:
        engine.close()


# --- where the voice is -----------------------------------------------------------------------------------------------


def heard(pcm: bytes, end_silence: float | None = None) -> Pauses:
    pauses = Pauses(end_silence)
    pauses.push(np.frombuffer(pcm, "<i2"))
    return pauses


def test_pauses() -> None:
    assert heard(spoken(1.0, 1.0)).voiced_until == RATE
    assert heard(spoken(0.0, 1.0)).voiced_until == 0
    assert not heard(spoken(0.0, 5.0), 0.5).over
    assert heard(spoken(1.0, 0.6), 0.5).over
    assert heard(b"").samples == 0
    pcm, drop_by_drop = np.frombuffer(spoken(0.3, 0.3, 0.2), "<i2"), Pauses(0.25)
    for sample in pcm:
        drop_by_drop.push(np.array([sample], np.int16))
    assert (drop_by_drop.over, drop_by_drop.voiced_until) == (True, int(0.3 * RATE))
    assert heard(pcm.tobytes(), 0.25).voiced_until == int(0.3 * RATE)
    steady = (np.random.default_rng(0).standard_normal(8 * RATE) * 150).astype("<i2").tobytes()
    assert heard(steady).voiced_until < 3 * RATE, "a fan is no voice for long"
    over_a_fan = np.frombuffer(steady, "<i2")[: 6 * RATE].copy()
    over_a_fan[4 * RATE : 5 * RATE] += np.frombuffer(spoken(1.0), "<i2")
    assert abs(heard(over_a_fan.tobytes()).voiced_until - 5 * RATE) <= 320


# --- what strangers may send ------------------------------------------------------------------------------------------


def refused(frames: list[dict[str, Any]], status: int) -> str:
    (frame,) = frames
    return check_error(status, json.dumps(frame).encode())


def denied(address: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as error, connect(address, **options):
        pass
    response = error.value.response
    return response.status_code, check_error(response.status_code, response.body or b"")


@pytest.mark.parametrize(
    "frame", [b"\x00" * 641, "", "{", '{"type": "END"}', "[" * 60_000, '{"type": "end", "n": 1}', "null", "x"], ids=range(8)
)
def test_bad_frames(server: Running, frame: bytes | str) -> None:
    with connect(ticket(server)) as socket:
        socket.send(spoken(0.1))
        socket.send(frame)
        message = refused(received(socket), 400)
    assert "16-bit" in message if isinstance(frame, bytes) else '{"type": "end"}' in message
    assert socket.close_code == 1008


def test_what_is_too_much(server: Running) -> None:
    with connect(ticket(server)) as socket:
        assert "longer than 8 s" in refused(speak(socket, spoken(8.5), 32_000, end=False), 413)
    with connect(ticket(server)) as socket:
        socket.send(b"\x00" * 70_000)
        assert received(socket) == []
    assert socket.close_code == 1009
    with connect(ticket(server)) as socket:
        assert "no sound has arrived" in refused(speak(socket, b"")[1:], 400)
    assert server.ask().status_code == 200


def test_silence_of_the_client_ends_the_turn(server: Running) -> None:
    with connect(ticket(server)) as socket:
        socket.send(spoken(0.1))
        assert "no sound within 3 s" in refused(received(socket), 408)


def test_tickets_are_good_once_and_for_a_moment(server: Running) -> None:
    address = ticket(server)
    with connect(address) as socket:
        assert denied(address)[0] == 404
        text_of(speak(socket, spoken(0.3)))
    assert denied(address)[0] == 404
    assert denied(address[:-3])[0] == 404
    late = ticket(server)
    time.sleep(LIMITS.voice_idle_seconds + 0.5)
    assert denied(late)[0] == 404


def test_turns_are_counted_and_come_back(server: Running) -> None:
    for address in [ticket(server) for _ in range(LIMITS.max_voices)]:
        body = {"model": "x2l", "messages": [{"role": "user", "content": [VOICE]}]}
        answer = server.http.post("/v1/voice", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        check_error(answer.status_code, answer.content)
        with connect(address) as socket:
            socket.send(b"\x00")
            received(socket)
        break
    time.sleep(LIMITS.voice_idle_seconds + 0.5)  # the others were never used
    for _ in range(2 * LIMITS.max_voices):
        with connect(ticket(server)) as socket:
            text_of(speak(socket, spoken(0.2)))


def test_keys_and_origins(server: Running) -> None:
    body = {"model": "x2l", "messages": [{"role": "user", "content": [VOICE]}]}
    answer = server.http.post("/v1/voice", json=body, headers={"Authorization": "Bearer no"})
    assert answer.status_code == 401
    check_error(401, answer.content)
    host = server.url.replace("http:", "ws:")
    assert denied(f"{host}/v1/voice/guess")[0] == 404
    assert denied(f"{host}/v1/models")[0] == 401
    address = ticket(server)
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
        assert denied(address, origin=origin)[0] == 403
    for origin in (server.url, "https://good.example"):
        with connect(ticket(server), origin=origin) as socket:  # type: ignore[arg-type]
            text_of(speak(socket, spoken(0.2)))
    with connect(address) as socket:  # what was refused has not used it up
        text_of(speak(socket, spoken(0.2)))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "no voice"}],
        [{"role": "user", "content": [VOICE, VOICE]}],
        [{"role": "system", "content": [VOICE]}],
        [{"role": "user", "content": [VOICE]}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": [VOICE]}, {"role": "user", "content": [VOICE]}],
        [{"role": "user", "content": [{"type": "voice", "data": "x"}]}],
        [{"role": "user", "content": [image_part(b"no picture"), VOICE]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}}, VOICE]}],
    ],
)
def test_conversations_that_are_refused(server: Running, messages: Any) -> None:
    answer = server.http.post("/v1/voice", json={"model": "x2l", "messages": messages})
    assert answer.status_code == 400, answer.text
    check_error(400, answer.content)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("lookahead", value, "lookahead") for value in (0.4, 11, -1, "1s", "1", True)),
        ("lookahead", 1.0, "reads whole recordings only"),
        *(("end_silence", value, "end_silence") for value in (0.1, 11, "1", True)),
    ],
)
def test_seconds_out_of_bounds_or_that_the_model_cannot_do(server: Running, name: str, value: Any, message: str) -> None:
    body = {"model": "x2l", "messages": [{"role": "user", "content": [VOICE]}], name: value}
    answer = server.http.post("/v1/voice", json=body)
    assert answer.status_code == 400
    assert message in check_error(400, answer.content)


def test_a_voice_is_no_part_of_other_requests(server: Running) -> None:
    assert server.ask([VOICE]).status_code == 400


def test_models_without_speech_say_so(llm_folder: Path) -> None:
    with running(Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))) as up:
        answer = up.http.post("/v1/voice", json={"model": "x2l", "messages": [{"role": "user", "content": [VOICE]}]})
        assert answer.status_code == 400
        assert "cannot read voice" in check_error(400, answer.content)


def test_a_client_that_vanishes_stops_the_computing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "stops", set())
    slow = server.engine.model.llm.register_forward_hook(lambda *_: time.sleep(0.05))
    gone = server.metric("x2l_disconnects_total")
    cancelled = server.engine.stats.cancelled
    try:
        with connect(ticket(server, max_tokens=400)) as socket:  # in a pause: an answer is in work that nobody has asked for
            socket.send(spoken(0.3, 0.4))
            until = time.monotonic() + 60
            while server.engine.load[0] == 0 and time.monotonic() < until:
                time.sleep(0.01)
            assert server.engine.load[0] == 1
        assert is_idle(server.engine)
        with connect(ticket(server, max_tokens=400)) as socket:  # in the middle of its answer
            socket.send(spoken(0.3, 0.4))
            socket.send('{"type": "end"}')
            while not any(c["delta"].get("content") for c in json.loads(socket.recv()).get("choices", [])):
                pass
        assert is_idle(server.engine)
    finally:
        slow.remove()
    assert server.engine.stats.cancelled == cancelled + 2
    assert server.metric("x2l_disconnects_total") == gone + 2


def test_speech_does_not_hold_up_other_answers(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the speech interface is at work, the engine's thread goes on."""
    entered, leave = threading.Event(), threading.Event()
    speech = server.engine.model.modalities["speech"]
    forward = speech.forward

    def stuck(media: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return forward(media)

    monkeypatch.setattr(speech, "forward", stuck)
    try:
        with connect(ticket(server)) as socket:
            socket.send(spoken(0.3, seed=31))
            socket.send('{"type": "end"}')
            assert entered.wait(60)
            assert server.ask("Hi").status_code == 200
            leave.set()
            text_of(received(socket))
    finally:
        leave.set()


def test_the_clock_of_request_heads_does_not_end_a_speech(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_server, "HEADER_SECONDS", 1.0)
    with connect(ticket(server)) as socket:
        for _ in range(3):
            socket.send(spoken(0.2))
            time.sleep(0.5)
        text_of(speak(socket, spoken(0.2)))


def test_a_stopping_server_gives_the_answer_that_is_in_work(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model, limits=LIMITS) as up:
        monkeypatch.setattr(up.engine, "stops", set())
        slow = up.engine.model.llm.register_forward_hook(lambda *_: time.sleep(0.05))
        try:
            waiting = ticket(up)
            with connect(ticket(up, max_tokens=40)) as socket:
                socket.send(spoken(0.3))
                socket.send('{"type": "end"}')
                assert json.loads(socket.recv())["type"] == "end"
                up.server.handle_exit(15, None)
                assert denied(waiting)[0] == 503
                frames = received(socket)
        finally:
            slow.remove()
        assert frames[-1]["usage"]["completion_tokens"] == 40


def test_keys_reach_the_engine(server: Running) -> None:
    """States are reused for the same key alone, and a turn bears the key of its POST."""
    owners = {symbols[0] for symbols in server.engine.prefixes._items}
    assert len(owners) == 1
    assert owners != {""}
    assert KEY not in str(owners)
