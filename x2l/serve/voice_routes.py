"""Spoken turns over HTTP: a POST with the conversation gives a ticket, a WebSocket with that ticket takes the sound.

    POST /v1/voice          as a chat completion; {"type": "voice"} stands where the recording will be -> {"url": ...}
    WebSocket /v1/voice/T   16-bit mono samples at 16 kHz in binary frames, then {"type": "end"}
                            -> {"type": "end", "samples": N}, `chat.completion.chunk` objects, close; or {"error": ...},
                            close. The first N samples are the recording

The ticket is good once and for a moment. It stands for the key of its POST, which a browser cannot send with a WebSocket, and
leaves the conversation, with all its media, to the limits and errors of every other POST.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect

from x2l.serve.answer import Decode
from x2l.serve.chat import chunks, pieces, run_or_leave
from x2l.serve.engine import Engine
from x2l.serve.errors import ApiError, error_response
from x2l.serve.limits import Gate, Limits
from x2l.serve.media import MediaReader
from x2l.serve.metrics import Metrics
from x2l.serve.pauses import RATE
from x2l.serve.schema import AnswerRequest, VoiceOut, VoiceRequest
from x2l.serve.voice import Kind, VoiceTurn

PATH = "/v1/voice"
MAX_FRAME_BYTES = 64 << 10  # of a WebSocket message, two seconds of sound
WORKERS = 2  # threads that run the speech interface, of all turns


class Turns:
    """All turns that are open, by ticket; bounded in number and in the bytes of their conversations' media."""

    def __init__(self, limits: Limits):
        self.limits, self.num_open, self.num_bytes = limits, 0, 0
        self._tickets: dict[str, tuple[VoiceTurn, asyncio.TimerHandle]] = {}

    def check(self) -> None:
        """Raises ApiError where one more is too many."""
        if self.num_open >= self.limits.max_voices:
            raise ApiError(429, f"{self.num_open} people are speaking already, the limit is {self.limits.max_voices}",
                           headers={"Retry-After": "5"})  # fmt: skip

    def add(self, turn: VoiceTurn) -> str:
        """The ticket for a turn.

        Raises:
            ApiError: it would be too much.
        """
        self.check()
        if self.num_bytes + turn.num_bytes > self.limits.max_bodies_bytes:
            raise ApiError(503, "too much data is held for spoken turns at the moment", headers={"Retry-After": "5"})
        ticket = secrets.token_urlsafe(24)
        timer = asyncio.get_running_loop().call_later(self.limits.voice_idle_seconds, self._expire, ticket)
        self._tickets[ticket] = turn, timer
        self.num_open += 1
        self.num_bytes += turn.num_bytes
        return ticket

    def take(self, ticket: str) -> VoiceTurn | None:
        """The turn of a ticket, which is used up; `leave` when it is over."""
        turn, timer = self._tickets.pop(ticket, (None, None))
        if timer is not None:
            timer.cancel()
        return turn

    def leave(self, turn: VoiceTurn) -> None:
        """The turn is over."""
        turn.close()
        self.num_open -= 1
        self.num_bytes -= turn.num_bytes

    def _expire(self, ticket: str) -> None:
        if turn := self.take(ticket):
            self.leave(turn)


def add_voice(
    app: FastAPI,
    gate: Gate,
    engine: Engine,
    reader: MediaReader,
    model: str,
    decode: Callable[[AnswerRequest], Decode],
    origins: Sequence[str],
    metrics: Metrics,
) -> None:
    """Add the two routes.

    Args:
        reader: of the conversation's media.
        model: its name in the answers.
        decode: how to decode the answer to a request; raises ApiError.
        origins: of other sites' pages that may connect.
    """
    limits, turns, opened = gate.limits, Turns(gate.limits), set[Kind]()
    workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="x2l-voice")

    @app.post(PATH)
    async def begin(body: VoiceRequest, request: Request) -> VoiceOut:
        """Announce a spoken turn of a conversation; what stands before it is read at once."""
        turns.check()
        how, messages = decode(body), await reader.messages(body.messages)
        turn = VoiceTurn(engine, messages, body.place, how, request.state.owner, workers, body.end_silence, body.lookahead)
        await turn.begin()
        try:
            ticket = turns.add(turn)
        except ApiError:
            turn.close()
            raise
        turn.open(opened)
        return VoiceOut(
            url=f"{PATH}/{ticket}",
            sample_rate=RATE,
            max_seconds=limits.voice_seconds,
            idle_seconds=limits.voice_idle_seconds,
        )

    @app.websocket(PATH + "/{ticket}")
    async def listen(socket: WebSocket, ticket: str) -> None:
        try:
            _check_origin(socket, origins)
            if gate.draining:
                raise ApiError(503, "the server is stopping")
            turn = turns.take(ticket)
            if turn is None:
                raise ApiError(404, "this ticket is not known, used already, or too old: POST to /v1/voice again")
        except ApiError as error:
            await socket.send_denial_response(error_response(error))
            return
        try:
            await socket.accept()
            await _hear(socket, turn, limits)
            gate.requests += 1  # a stopping server waits for the answer
            try:
                await run_or_leave(socket, _reply(socket, turn, model, metrics))
            finally:
                gate.requests -= 1
            await socket.close()
        except (ConnectionError, WebSocketDisconnect):
            metrics.disconnects.inc()
        except Exception as error:
            response = error_response(error)
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await socket.send_text(bytes(response.body).decode())
                await socket.close(1008 if response.status_code < 500 else 1011)
        finally:
            turns.leave(turn)


async def _hear(socket: WebSocket, turn: VoiceTurn, limits: Limits) -> None:
    """Take the sound until the speech is over.

    Raises:
        ApiError: a frame that is neither samples nor the end, too much sound, or none for too long.
        ConnectionError: the client went away.
    """
    try:
        async with asyncio.timeout(2 * limits.voice_seconds):
            while not turn.pauses.over:
                async with asyncio.timeout(limits.voice_idle_seconds):
                    message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    raise ConnectionError("the client went away")
                if (text := message.get("text")) is not None:
                    _check_end(text)
                    return
                pcm = message["bytes"]
                if len(pcm) % 2:
                    raise ApiError(400, f"a frame of {len(pcm)} bytes does not hold whole 16-bit samples")
                if turn.pauses.samples + len(pcm) // 2 > limits.voice_seconds * RATE:
                    raise ApiError(413, f"the recording is longer than {limits.voice_seconds:g} s")
                turn.hear(pcm)
    except TimeoutError:
        raise ApiError(408, f"no sound within {limits.voice_idle_seconds:g} s, or no end of it") from None


def _check_end(text: str) -> None:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if message != {"type": "end"}:
        raise ApiError(400, 'a text frame must be {"type": "end"}; sound comes in binary frames')


async def _reply(socket: WebSocket, turn: VoiceTurn, model: str, metrics: Metrics) -> None:
    start, ahead = time.perf_counter(), turn.ahead
    await socket.send_json({"type": "end", "samples": turn.pauses.kept})
    answer = await turn.answer()
    try:
        stream = await pieces(answer)
        metrics.voice_first.labels(str(ahead).lower()).observe(time.perf_counter() - start)
        async for chunk in chunks(answer, stream, model):
            await socket.send_json(chunk)
    finally:
        answer.cancel()


def _check_origin(socket: WebSocket, origins: Sequence[str]) -> None:
    """Browsers let any page open a WebSocket to anywhere, and say whose page it is."""
    origin = socket.headers.get("origin")
    if origin is not None and origin not in origins and urlsplit(origin).netloc != socket.headers.get("host"):
        raise ApiError(403, "pages of this origin may not use this server: start it with --origin ORIGIN")
