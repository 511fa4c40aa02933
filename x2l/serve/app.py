"""The HTTP API: OpenAI's chat completions on an `Engine`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import pydantic_core
from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from x2l.data.media import MediaError
from x2l.data.prompts import instructions
from x2l.data.tasks import dictated
from x2l.encoders.moonshine import TOKENS_PER_SECOND
from x2l.recognizer import in_pieces
from x2l.serve.answer import Answer, Busy, Decode, EngineError, RequestError
from x2l.serve.chat import completion, events, pieces, run_or_leave, submit
from x2l.serve.decoders import DecoderPool
from x2l.serve.engine import Engine
from x2l.serve.errors import ApiError, handle
from x2l.serve.fetch import Fetcher
from x2l.serve.limits import Gate, Limits
from x2l.serve.media import MediaReader
from x2l.serve.metrics import Metrics
from x2l.serve.schema import AnswerRequest, ChatRequest, ChatResponse, ErrorOut, ModelList, ModelOut, Transcription
from x2l.serve.voice_routes import PATH as VOICE
from x2l.serve.voice_routes import add_voice
from x2l.types import Message, Part

log = logging.getLogger(__name__)
T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}
TRANSCRIBE = instructions("asr", "en")[0]


@dataclass(frozen=True)
class ServerConfig:
    """What the operator decides.

    Attributes:
        model: the name under which clients ask for the model.
        api_keys: one of which a request must bear; none lets everybody in.
        hosts: names under which the server may be asked for; none = any. Without keys, a web page could else reach it
            through a name that it lets point here.
        origins: web origins that may read responses (CORS).
        allow_remote: whether media may be given by http(s) URLs.
    """

    model: str = "x2l"
    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    allow_remote: bool = False
    limits: Limits = field(default_factory=Limits)


class StrictRequest(Request):
    """JSON bodies must be declared as such, and be what RFC 8259 calls JSON."""

    async def json(self) -> Any:
        """The body; NaN, lone surrogates and endless nesting are refused by the parser."""
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error


class StrictRoute(APIRoute):
    """Gives its endpoint a `StrictRequest`."""

    def get_route_handler(self) -> Any:
        """The wrapped handler."""
        handler = super().get_route_handler()
        wanted = self.body_field and ("multipart/form-data" if self.path.startswith("/v1/audio") else "application/json")

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
            if wanted and kind != wanted:
                raise ApiError(415, f"Content-Type must be {wanted}")
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def create_app(
    engine: Engine,
    config: ServerConfig = ServerConfig(),
    pool: DecoderPool | None = None,
    others: Mapping[str, Engine] = MappingProxyType({}),
) -> Gate:
    """The ASGI application; its lifespan closes engines and pool.

    ``gate.app`` is the FastAPI application inside, to which a web page can be mounted.

    Args:
        engine: of the model ``config.model``, which takes spoken turns too.
        others: of further models, by the name under which clients ask for them.
    """
    engines = {config.model: engine, **others}
    metrics = Metrics(engines, pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for one in engines.values():
            one.close()
        if pool is not None:
            pool.close()

    app = FastAPI(title="X2L", description="OpenAI-compatible API of an X2L model.", lifespan=lifespan, docs_url=None,
                  redoc_url=None, responses=ERRORS)  # fmt: skip
    app.router.route_class = StrictRoute
    if config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    for kind in (HTTPException, RequestValidationError, RequestError, MediaError, Busy, EngineError, TimeoutError, Exception):
        app.add_exception_handler(kind, handle)
    routes = {"/v1/chat/completions", "/v1/models", "/v1/audio/transcriptions", VOICE, "/openapi.json"}
    routes |= {"/health", "/ready", "/metrics"}

    def observe(method: str, path: str, status: int, seconds: float, request_id: str) -> None:
        route = path if path in routes else f"{VOICE}/TICKET" if path.startswith(f"{VOICE}/") else "other"
        metrics.responses.labels(route, str(status or 499)).inc()
        metrics.seconds.labels(route).observe(seconds)
        log.info("%s %s %d %.3f s %s", method if method.isalpha() else "?", route, status, seconds, request_id)

    gate = Gate(app, config.limits, config.api_keys, config.hosts, config.origins, observe)
    _add_status(app, gate, engines, pool, metrics)
    _add_models(app, engines)
    _add_chat(app, gate, engines, config, metrics)
    _hide_422(app)
    return gate


def _add_status(app: FastAPI, gate: Gate, engines: Mapping[str, Engine], pool: DecoderPool | None, metrics: Metrics) -> None:
    def state() -> dict[str, Any]:
        return {
            "status": next((engine.status for engine in engines.values() if engine.status != "ok"), "ok"),
            "engine_errors": sum(engine.stats.errors for engine in engines.values()),
            "cancelled": sum(engine.stats.cancelled for engine in engines.values()),
            "decoder_restarts": pool.restarts if pool else 0,
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process should go on living."""
        return JSONResponse(state(), 200 if all(engine.alive for engine in engines.values()) else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether to send requests here: not while stopping, not when the queue is full."""
        full = any(engine.load[1] >= engine.capacity for engine in engines.values())
        reason = "stopping" if gate.draining else "busy" if full else state()["status"]
        return JSONResponse({"status": reason}, 200 if reason == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, engines: Mapping[str, Engine]) -> None:
    now = int(time.time())
    held = {
        name: ModelOut(id=name, created=now, modalities=["text", *engine.reads], lookahead=engine.growing_speech is not None)
        for name, engine in engines.items()
    }

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models that this server holds."""
        return ModelList(data=list(held.values()))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> ModelOut:
        """One of them by name."""
        return chosen(name, held)


def _add_chat(app: FastAPI, gate: Gate, engines: Mapping[str, Engine], config: ServerConfig, metrics: Metrics) -> None:
    limits = config.limits
    fetcher = Fetcher(limits.max_file_bytes, limits.fetch_seconds) if config.allow_remote else None
    readers = {
        name: MediaReader(engine.reads, limits.max_media, limits.max_file_bytes, fetcher) for name, engine in engines.items()
    }

    def how(body: AnswerRequest, engine: Engine) -> Decode:
        if body.limit is not None and body.limit > engine.config.max_new_tokens:
            raise ApiError(400, f"max_tokens is {body.limit}, the limit is {engine.config.max_new_tokens}", "max_tokens")
        return Decode(body.limit, body.temperature, body.top_p, body.seed, body.stops)

    def voice(body: AnswerRequest) -> Decode:
        return how(body, chosen(body.model, {config.model: engines[config.model]}))

    add_voice(app, gate, engines[config.model], readers[config.model], config.model, voice, config.origins, metrics)

    async def first_text(
        request: Request, engine: Engine, messages: list[Message], decode: Decode
    ) -> tuple[Answer, AsyncIterator[str]]:
        """The answer once its first piece is there, so that whatever fails before is an HTTP error."""
        start = time.perf_counter()
        answer = await submit(engine, messages, decode, request.state.owner)
        stream = await pieces(answer)
        metrics.first_token.observe(time.perf_counter() - start)
        return answer, stream

    async def whole(request: Request, engine: Engine, messages: list[Message], decode: Decode) -> tuple[Answer, str]:
        answer, stream = await first_text(request, engine, messages, decode)
        try:
            return answer, "".join([piece async for piece in stream])
        finally:
            answer.cancel()

    @app.post("/v1/chat/completions", response_model=ChatResponse)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with ``stream`` as server-sent events."""
        engine = chosen(body.model, engines)
        reader, decode = readers[body.model], how(body, engine)

        async def streamed() -> tuple[Answer, AsyncIterator[str]]:
            return await first_text(request, engine, await reader.messages(body.messages), decode)

        async def at_once() -> tuple[Answer, str]:
            return await whole(request, engine, await reader.messages(body.messages), decode)

        try:
            if body.stream:
                answer, stream = await run_or_leave(request, streamed())
                include_usage = body.stream_options is not None and body.stream_options.include_usage
                return StreamingResponse(
                    events(answer, stream, body.model, include_usage, metrics.disconnects), media_type="text/event-stream"
                )
            answer, text = await run_or_leave(request, at_once())
        except ConnectionError:
            metrics.disconnects.inc()
            return Response(status_code=499)
        return JSONResponse(completion(answer, text, body.model))

    @app.post("/v1/audio/transcriptions", response_model=Transcription)
    async def transcribe(
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form(max_length=256)],
        language: Annotated[str | None, Form(max_length=8)] = None,
        response_format: Annotated[str, Form(pattern="^(json|text)$")] = "json",
        temperature: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """What is said in a sound file."""
        engine = chosen(model, engines)
        if "speech" not in engine.reads:
            raise ApiError(400, f"this model has no speech interface: it reads {', '.join(['text', *engine.reads])}", "model")
        blob = await file.read(limits.max_file_bytes + 1)
        if not 0 < len(blob) <= limits.max_file_bytes:
            raise ApiError(400, f"the file has {len(blob)} bytes; 1 to {limits.max_file_bytes} are accepted", "file")

        async def written() -> str:
            texts = []
            for piece, seconds in await asyncio.to_thread(lambda: in_pieces(engine.intake.decoded("speech", blob))):
                limit = max(1, int(seconds * TOKENS_PER_SECOND))
                spoken = [dictated(Part("speech", bytes=piece), TRANSCRIBE)]
                _, text = await whole(request, engine, spoken, Decode(limit, temperature))
                texts.append(text.strip())
            return " ".join(texts)

        try:
            text = await run_or_leave(request, written())
        except ConnectionError:
            metrics.disconnects.inc()
            return Response(status_code=499)
        return PlainTextResponse(text) if response_format == "text" else JSONResponse({"text": text})


def chosen(name: str, held: Mapping[str, T]) -> T:
    """What belongs to a model's name; ApiError 404 for unknown ones."""
    if name not in held:
        shown, names = json.dumps(name[:80]), ", ".join(map(repr, held))
        raise ApiError(404, f"the model {shown} does not exist; this server has {names}", "model", "model_not_found")
    return held[name]


def _hide_422(app: FastAPI) -> None:
    """FastAPI documents its own validation errors; here they are 400 in OpenAI's shape."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for path in schema["paths"].values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
