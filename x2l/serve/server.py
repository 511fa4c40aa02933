"""`x2l serve`: the process around the application, from sockets to signals."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from x2l.assistant import Assistant
from x2l.devices import bf16_in_hardware, default_device
from x2l.serve.app import ServerConfig, create_app
from x2l.serve.decoders import DecoderPool
from x2l.serve.engine import Engine
from x2l.serve.errors import error_body
from x2l.serve.intake import EngineConfig
from x2l.serve.limits import HOST_NAME, Gate, Limits
from x2l.serve.voice_routes import MAX_FRAME_BYTES

log = logging.getLogger(__name__)
HEADER_SECONDS = 20.0  # from the connection to the first complete request head
MAX_HEAD_BYTES = 32 << 10
BITS = (32, 16, 8, 4)
LOCAL = ("127.0.0.1", "localhost", "::1")


class Protocol(H11Protocol):
    """HTTP/1.1 that tells clients in JSON what it cannot parse, and does not wait for heads that never end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Stop the clock: another protocol has the connection from now on."""
        self._head_timer.cancel()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        content = json.dumps(error_body(400, "this is not a valid HTTP/1.1 request")).encode()
        length = len(content)
        head = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
        head += f"content-length: {length}\r\n\r\n"
        self.transport.write(head.encode() + content)
        self.transport.close()


class Server(uvicorn.Server):
    """Drains on SIGTERM: not ready and refusing at once, gone when the last answer is out or the grace is over."""

    def __init__(self, gate: Gate, host: str, port: int, grace: float):
        config = uvicorn.Config(
            gate,
            host=host,
            port=port,
            http=Protocol,
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME_BYTES,
            ws_per_message_deflate=False,
            access_log=False,
            server_header=False,
            log_config=None,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self.gate, self.grace = gate, grace
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends the wait."""
        self.gate.draining = True
        if self._until is None:
            self._until = time.monotonic() + self.grace
            log.warning("stopping: %d requests in work, at most %g s", self.gate.requests, self.grace)
        else:
            self._until = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Leave the main loop when everything is answered."""
        if self._until is not None and (self.gate.requests == 0 or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def read_keys(path: Path | None) -> list[str]:
    """API keys: lines of a file, or X2L_API_KEYS, separated by commas.

    Raises:
        ValueError: the file is missing, or a key is shorter than 16 characters.
    """
    try:
        text = path.read_text(encoding="utf-8") if path else os.environ.get("X2L_API_KEYS", "").replace(",", "\n")
    except OSError as error:
        raise ValueError(f"cannot read the API keys in {path}: {error.strerror}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    short = [i for i, key in enumerate(keys, 1) if len(key) < 16]
    if short or (path and not keys):
        raise ValueError(f"API keys need 16 characters or more; too short or missing: number {short or 1}")
    return keys


def allowed_hosts(keys: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """Names under which the server may be asked for; any (none) where requests bear keys and no name is given.

    Raises:
        ValueError: what is given is no host name.
    """
    if keys and not hosts:
        return []
    wrong = next((name for name in hosts if not re.fullmatch(HOST_NAME, name.lower())), None)
    if wrong is not None:
        raise ValueError(f"--allow-host {wrong!r} is no host name: write it as in example.org, without scheme, port or *")
    return ["127.0.0.1", "localhost", "[::1]", *hosts]


def served_names(models: Sequence[str]) -> list[str]:
    """Names under which clients ask for models: a recipe's file name, or all that was given where these are alike.

    Raises:
        ValueError: a model is given twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"--compare {models[-1]} is the model itself: name another one")
    names = [Path(model).stem if model.endswith((".yaml", ".yml")) else model for model in models]
    return names if len(set(names)) == len(names) else list(models)


def run(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys_file: Path | None = None,
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    allow_remote: bool = False,
    max_batch: int = 8,
    grace: float = 60.0,
    page: bool = False,
    vllm: str | None = None,
    compare: str | None = None,
    weight_bits: int | None = None,
) -> None:
    """Load a model and serve it until a signal comes, with ``page`` the chat page too; ``vllm``: the LLM is at this URL;
    ``compare``: another model, which the page asks the same; ``weight_bits``: of the LLMs' weights, 32 (float32), 16 (bfloat16), or
    8 or 4: bfloat16, but fewer bits for one to four answers at a time.

    Raises:
        ValueError: a public address without API keys, an origin that is none or ``*``, a model that cannot be loaded, or
            ``weight_bits`` with ``vllm``, other than these, or fewer than 16 on a processor that has no such products.
    """
    keys = read_keys(keys_file)
    if not keys and host not in LOCAL:
        raise ValueError(f"--host {host} is open to others: set X2L_API_KEYS or --api-keys FILE, or use --host 127.0.0.1")
    if "*" in origins:
        raise ValueError("--origin * would let every web page use this server: name the origins")
    for origin in origins:
        if not re.fullmatch(r"https?://[^/?#@\s]+", origin):
            raise ValueError(f"--origin {origin!r} is no origin: give scheme and host, such as https://chat.example")
    if weight_bits is not None and weight_bits not in BITS:
        raise ValueError(f"--weight-bits must be one of {', '.join(map(str, BITS))}, got {weight_bits}")
    if weight_bits is not None and vllm is not None:
        raise ValueError(f"--weight-bits {weight_bits} is for an LLM in this process, not at {vllm}: let vLLM quantise it")
    if weight_bits == 16 and default_device().type == "cpu" and not bf16_in_hardware():
        log.warning("this processor does not multiply in bfloat16: --weight-bits 16 saves memory and costs time")
    names = served_names([model] if compare is None else [model, compare])
    engine_config = EngineConfig(max_batch=max_batch, weight_bits=min(16, weight_bits or 16))
    overrides = [f"llm.dtype={'float32' if weight_bits == 32 else 'bfloat16'}"] if weight_bits else []
    limits = Limits(max_requests=len(names) * (max_batch + engine_config.max_queue))
    bounds: dict[str, dict[str, Any]] = {"image": {"max_pixels": limits.max_pixels}, "audio": {"max_seconds": limits.max_seconds}}
    pool = DecoderPool(seconds=limits.decode_seconds, bounds=bounds)
    try:
        if vllm is None:
            engine = Engine(Assistant.load(model, overrides), engine_config, pool)
        else:
            from x2l.serve.vllm import connect  # a leaf too

            engine = connect(model, vllm, engine_config, pool)
        others = {} if compare is None else {names[1]: Engine(Assistant.load(compare, overrides), engine_config, pool)}
        config = ServerConfig(names[0], keys, allowed_hosts(keys, hosts), origins, allow_remote, limits)
        gate = create_app(engine, config, pool, others)
        if page:
            from x2l.serve.web import add_page  # a leaf that may be deleted

            add_page(gate, {names[0]: engine, **others}, config)
        Server(gate, host, port, grace).run()
    finally:
        pool.close()
