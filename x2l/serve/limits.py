"""The gate in front of every route: key, size, time and number of requests, before a byte of the body is kept."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from x2l.serve.errors import error_body

Scope = dict[str, Any]
Message = dict[str, Any]
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HOST_NAME = r"[a-z0-9._-]+|\[[0-9a-f:.]+\]"
HOST = re.compile(rf"({HOST_NAME})(?::\d{{1,5}})?")  # the header


@dataclass(frozen=True)
class Limits:
    """Bounds of the HTTP side; what the engine bounds itself is in `EngineConfig`."""

    max_body_bytes: int = 32 << 20
    max_bodies_bytes: int = 192 << 20  # of all requests in flight
    max_requests: int = 72  # in flight, POST
    body_seconds: float = 30.0
    max_media: int = 16  # a request
    max_file_bytes: int = 24 << 20  # one file, decoded from base64 or fetched
    fetch_seconds: float = 10.0
    decode_seconds: float = 20.0
    max_pixels: int = 25_000_000
    max_seconds: float = 600.0  # of sound
    max_voices: int = 8  # spoken turns that are open at a time
    voice_seconds: float = 60.0  # of one of them
    voice_idle_seconds: float = 10.0  # until somebody connects, and between two frames


class Refused(Exception):
    """A request that the gate does not let through."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


class Gate:
    """ASGI middleware.

    Args:
        app: what lies behind it.
        limits: its bounds.
        keys: API keys, one of which a request must bear; none = everybody is let in.
        hosts: names under which the server may be asked for; none = any.
        origins: of other sites' pages that may use a server that checks its hosts.
        observe: called with (method, path, status, seconds, request id) after each response.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        keys: Sequence[str],
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        observe: Callable[[str, str, int, float, str], None] = lambda *_: None,
    ):
        self.app, self.limits, self.observe = app, limits, observe
        self._hosts, self._origins = {host.lower() for host in hosts}, {origin.lower() for origin in origins}
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.requests = self.body_bytes = 0
        self.draining = False
        self.open_paths = {"/health"}  # liveness needs no key

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, owner="")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            elif message["type"].endswith("http.response.start"):
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_safe_headers(request_id)]
            await send(message)

        try:
            await self._pass(scope, headers, receive, answer)
        except Refused as refused:
            await _refuse(scope, answer, refused)
        finally:
            self.observe(scope.get("method", "WS"), scope["path"], status, time.perf_counter() - start, request_id)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Any, send: Any) -> None:
        if self._hosts:
            self._check_sender(headers)
        preflight = scope["type"] == "http" and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        ticket = scope["type"] == "websocket" and scope["path"].startswith("/v1/voice/")  # it was given for a key
        # A browser's preflight bears no key and reaches no route.
        if scope["path"] not in self.open_paths and not preflight and not ticket:
            scope["state"]["owner"] = self._owner(headers)
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if self.draining:
            raise Refused(503, "the server is stopping", **{"Retry-After": "5"})
        if self.requests >= self.limits.max_requests:
            raise Refused(429, f"too many requests: {self.requests} are in work or waiting", **{"Retry-After": "1"})
        self._check_length(headers)
        self.requests += 1
        size = 0
        try:
            body, size = await self._body(receive)
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.requests -= 1
            self.body_bytes -= size

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        """Refuse web pages that reach this machine through a name of their own (DNS rebinding) or from another origin."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not (match := HOST.fullmatch(host)) or match[1] not in self._hosts:
            name = json.dumps(host[:80])
            raise Refused(421, f"this server is not called {name}: use {min(self._hosts)}, or start it with --allow-host NAME")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and origin not in self._origins:
            raise Refused(403, f"pages of {json.dumps(origin[:80])} may not use this server: start it with --origin ORIGIN")

    def _owner(self, headers: dict[bytes, bytes]) -> str:
        """Who asks, by the digest of the key; every key is compared, in constant time."""
        if not self._keys:
            return ""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != b"bearer" or not key.strip() or not any(matches):
            raise Refused(401, "a valid API key is needed: send 'Authorization: Bearer KEY'", **{"WWW-Authenticate": "Bearer"})
        return digest.hex()[:16]

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        if b"content-encoding" in headers and headers[b"content-encoding"].lower() != b"identity":
            raise Refused(415, "compressed bodies are not accepted")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise Refused(400, "Content-Length is not a number")
        if int(length) > self.limits.max_body_bytes:
            raise Refused(413, f"the body has {int(length)} bytes, the limit is {self.limits.max_body_bytes}")
        if self.body_bytes + int(length) > self.limits.max_bodies_bytes:
            raise Refused(503, "too much data is being uploaded at the moment", **{"Retry-After": "2"})

    async def _body(self, receive: Any) -> tuple[bytes, int]:
        """The whole body and its size, which counts towards ``body_bytes`` until the response is complete."""
        body = bytearray()
        counted = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client went away")
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > self.limits.max_body_bytes:
                        raise Refused(413, f"the body has more than {self.limits.max_body_bytes} bytes")
                    if self.body_bytes + len(chunk) > self.limits.max_bodies_bytes:
                        raise Refused(503, "too much data is being uploaded at the moment", **{"Retry-After": "2"})
                    body += chunk
                    self.body_bytes += len(chunk)
                    counted += len(chunk)
                    if not message.get("more_body", False):
                        return bytes(body), counted
        except TimeoutError:
            self.body_bytes -= counted
            raise Refused(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        except BaseException:
            self.body_bytes -= counted
            raise


def _replay(body: bytes, receive: Any) -> Any:
    """A receive that gives the body first, then what the connection says (its end)."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _safe_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


async def _refuse(scope: Scope, send: Any, refused: Refused) -> None:
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    content = json.dumps(error_body(refused.status, str(refused))).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": f"{kind}.start", "status": refused.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": content})
