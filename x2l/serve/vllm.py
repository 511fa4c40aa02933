"""An engine whose LLM runs in vLLM: prompts leave as embeddings, token ids come back.

This process holds the encoders, the interfaces and the LLM's token table; a stock ``vllm serve --enable-prompt-embeds``
holds the LLM. What clients may ask, queue, limits and text are those of `Engine`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import httpcore2 as httpcore
import torch
from torch import Tensor

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import load_model_config
from x2l.serve.answer import Busy, EngineError
from x2l.serve.engine import Engine
from x2l.serve.intake import DecodeMedia, EngineConfig
from x2l.serve.job import Job

log = logging.getLogger(__name__)
KEY_VARIABLE = "X2L_VLLM_KEY"  # environment variable with the key that vLLM asks for, if it asks for one
TIMEOUT = {"connect": 5.0, "write": 30.0, "read": 300.0, "pool": 5.0}  # seconds; read = to the next token
TICK, WATCH = 0.05, 5.0  # seconds between looks at what clients gave up, and at whether vLLM answers
BROKEN = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError)
GONE = "the LLM server has stopped answering"


class Upstream:
    """A vLLM server's completions API.

    Args:
        url: such as ``http://10.0.0.5:8001/v1``.

    Raises:
        ValueError: not an http(s) URL.
    """

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--vllm {url!r}: give the URL of vLLM's API, such as http://10.0.0.5:8001/v1")
        self.url, self.model, self.context = url.rstrip("/"), "", 0
        self.pool = httpcore.AsyncConnectionPool(max_connections=None, retries=1)
        key = os.environ.get(KEY_VARIABLE)
        self.headers = [("Content-Type", "application/json"), *([("Authorization", f"Bearer {key}")] if key else [])]

    async def connect(self, ids: list[int], embeds: Tensor) -> None:
        """Learn the model's name and context, and see that it reads ``embeds`` (L, D) as it reads the ``ids`` (L) they stand for.

        Raises:
            ValueError: nobody there, no embeddings accepted, or another LLM than ours.
        """
        try:
            served = (await self._json("GET", "models"))["data"][0]
            self.model, self.context = served["id"], served["max_model_len"]
            by_ids = await self._next_token({"prompt": ids})
            by_embeds = await self._next_token({"prompt_embeds": encoded(embeds)})
        except BROKEN as error:
            raise ValueError(f"no vLLM at {self.url} ({type(error).__name__}); start `vllm serve` first") from error
        except EngineError as error:
            raise ValueError(f"the vLLM at {self.url} says: {error} (it needs --enable-prompt-embeds)") from error
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"what answers at {self.url} is no vLLM, or too old a one") from error
        both = by_ids.keys() & by_embeds.keys()
        if len(both) < 3 or max(abs(by_ids[token] - by_embeds[token]) for token in both) > 0.1:  # 16-bit LLMs are this near
            raise ValueError(f"the vLLM at {self.url} holds another LLM ({self.model}) than this model's token table is of")

    async def answers(self) -> bool:
        """Whether the server can be reached."""
        try:
            async with asyncio.timeout(WATCH):
                await self._json("GET", "models")
        except (*BROKEN, EngineError, Busy, ValueError):
            return False
        return True

    async def tokens(self, body: bytes) -> AsyncGenerator[list[int], None]:
        """Token ids as they come, for a streamed completion.

        Raises:
            Busy, EngineError: the server is full, or refuses or breaks off; its own words go to the log.
        """
        async with self.pool.stream("POST", **self._request("completions", body)) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.aread())
            rest = b""
            async for piece in response.aiter_stream():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            raise _refusal(500, line)
                        for choice in event["choices"]:
                            yield choice["token_ids"] or []

    async def _next_token(self, prompt: dict[str, Any]) -> dict[str, float]:
        """Log-probabilities of the five likeliest next tokens."""
        options = {"max_tokens": 1, "temperature": 0, "logprobs": 5, "return_tokens_as_token_ids": True, "return_token_ids": True}
        answer = await self._json("POST", "completions", {"model": self.model, **options, **prompt})
        (choice,) = answer["choices"]
        if not choice["token_ids"]:
            raise ValueError("no token ids")
        return dict(choice["logprobs"]["top_logprobs"][0])

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        response = await self.pool.request(method, **self._request(path, json.dumps(body).encode() if body else None))
        if response.status != 200:
            raise _refusal(response.status, response.content)
        return json.loads(response.content)

    def _request(self, path: str, body: bytes | None) -> dict[str, Any]:
        return {"url": f"{self.url}/{path}", "headers": self.headers, "content": body, "extensions": {"timeout": TIMEOUT}}


class VllmEngine(Engine):
    """An `Engine` that lets vLLM compute the answers.

    Args:
        assistant: its LLM need be no more than a `TokenTable`.
        url: of vLLM's API.
        config, decode_media: as of `Engine`; ``max_batch`` bounds the requests that vLLM has at a time.

    Raises:
        ValueError: vLLM is not there, takes no embeddings, or holds another LLM.
    """

    def __init__(
        self,
        assistant: Assistant,
        url: str,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        decode_media: DecodeMedia | None = None,
    ):
        self.upstream, self._reachable = Upstream(url), True
        self._calls: dict[Job, Future[None]] = {}  # the request of each in _active
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._network = threading.Thread(target=self._run_network, name="x2l-vllm", daemon=True)
        self._network.start()
        ids = assistant.tokenizer("The quick brown fox jumps over the lazy dog.", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            embeds = assistant.model.llm.get_input_embeddings()(torch.tensor(ids, device=assistant.model.device))
        try:
            asyncio.run_coroutine_threadsafe(self.upstream.connect(ids, embeds), self._loop).result()
        except BaseException:
            self._close_network()
            raise
        super().__init__(assistant, config, decode_media)
        self.intake.context = min(self.intake.context, self.upstream.context)

    @property
    def status(self) -> str:
        """``ok``, or why no answers can be had."""
        return super().status if self._reachable else GONE

    def close(self) -> None:
        """Stop both threads; open answers end with an error."""
        super().close()
        self._close_network()

    # --- in the engine's thread -------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Nothing: vLLM keeps the states."""

    def _turn(self) -> None:
        with self._wake:  # the other thread ends answers too: none is ended twice
            self._drop()
            if not self._waiting or len(self._active) >= self.config.max_batch:
                self._wake.wait(TICK)
                return
            job = self._waiting.popleft()
            self._filling = [job]
        try:
            self._embed(job)
            body = self._body(job)
        except Exception as error:
            self._reject([job], error)
            return
        self.stats.prompt_tokens += job.prompt_length
        with self._wake:
            self._filling, job.embeds = [], None
            self._active.append(job)
            self._calls[job] = asyncio.run_coroutine_threadsafe(self._ask(job, body), self._loop)

    def _body(self, job: Job) -> bytes:
        """The request, megabytes of JSON where a prompt is long: made in this thread, so that the other one goes on reading."""
        assert job.embeds is not None
        decode = job.decode
        options = {
            "model": self.upstream.model,
            "stream": True,
            "return_token_ids": True,
            "prompt_embeds": encoded(job.embeds[0]),
            "max_tokens": min(job.limit, self.intake.context - job.prompt_length),
            "stop_token_ids": sorted(self.stops),
            "ignore_eos": True,  # the stops above alone end an answer
            "temperature": decode.temperature,
            "top_p": decode.top_p,
            "top_k": -1,  # these three keep what the LLM's folder recommends out
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": decode.seed,
            **({"cache_salt": job.owner} if job.owner else {}),  # prefixes are reused for the same owner only
        }
        return json.dumps(options).encode()

    def _retain(self, staying: list[Job]) -> None:
        stay = set(staying)
        for gone in [call for call in self._calls if call not in stay]:
            self._calls.pop(gone).cancel()
        self._active = staying

    # --- in the network's thread ------------------------------------------------------------------------------------

    async def _ask(self, job: Job, body: bytes) -> None:
        error: Exception = EngineError("the LLM server ended an answer early")
        try:
            async with aclosing(self.upstream.tokens(body)) as tokens:
                async for ids in tokens:
                    if self._take(job, ids):
                        return
        except BROKEN as broken:
            log.warning("the LLM server is gone: %s", type(broken).__name__)
            error = EngineError(GONE)
        except (Busy, EngineError) as refused:
            error = refused
        except Exception:
            log.exception("a request to the LLM server failed")
        with self._wake:
            if job in self._calls and not self._closed:
                self.stats.errors += not isinstance(error, Busy)
                self._leave(job)
                self._end(job, error)

    def _take(self, job: Job, ids: list[int]) -> bool:
        """Add tokens to an answer; True when it has ended, or nobody waits for it any more."""
        with self._wake:
            if job not in self._calls or self._closed:
                return True
            ended = any(self._append(job, token) for token in ids)
            if ended:
                self._leave(job)
            return ended

    def _leave(self, job: Job) -> None:
        del self._calls[job]
        self._active = [other for other in self._active if other is not job]
        self._wake.notify()

    def _run_network(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # its end cancels the requests that are left
            runner.run(self._watch())

    async def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                await asyncio.wait_for(self._stop.wait(), WATCH)
            except TimeoutError:
                self._reachable = await self.upstream.answers()
        await self.upstream.pool.aclose()

    def _close_network(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._network.join(timeout=30)


def connect(model: str, url: str, config: EngineConfig, decode_media: DecodeMedia | None = None) -> VllmEngine:
    """The engine of a model recipe, whose LLM is not loaded here."""
    return VllmEngine(Assistant(build(load_model_config(model), table_only=True)), url, config, decode_media)


def encoded(embeds: Tensor) -> str:
    """(L, D) as vLLM reads it: the base64 of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # a clone, since a view is saved with all of its storage
    return base64.b64encode(buffer.getvalue()).decode()


def _refusal(status: int, said: bytes) -> Exception:
    text = said[:300].decode(errors="replace")
    log.warning("the LLM server answers %d: %s", status, ascii(text))
    if status in (429, 503):
        return Busy("the LLM server is full")
    return EngineError(f"the LLM server refuses the request with status {status}")
