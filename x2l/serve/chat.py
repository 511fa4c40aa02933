"""An answer of the engine as an HTTP response, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, WebSocket
from prometheus_client import Counter

from x2l.serve.answer import Answer, Decode
from x2l.serve.engine import Engine
from x2l.serve.errors import error_response
from x2l.types import Message, Part

T = TypeVar("T")


async def run_or_leave(request: Request | WebSocket, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away; ConnectionError then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ConnectionError("the client went away")
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request | WebSocket) -> None:
    while (await request.receive())["type"] not in ("http.disconnect", "websocket.disconnect"):
        pass


async def submit(engine: Engine, messages: Sequence[Message], decode: Decode, owner: str, upto: Part | None = None) -> Answer:
    """`Engine.submit` in a thread; an answer that nobody waits for any more is cancelled."""
    task = asyncio.ensure_future(asyncio.to_thread(engine.submit, messages, decode, owner, upto))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(abandon)
        raise


def abandon(task: asyncio.Task[Answer]) -> None:
    """Cancel the answer that a task has brought, for `Task.add_done_callback`."""
    if not task.cancelled() and task.exception() is None:
        task.result().cancel()


async def pieces(answer: Answer) -> AsyncIterator[str]:
    """The answer's pieces, once the first one or the end is there; errors before that are raised here."""
    stream = aiter(answer)
    try:
        first = await anext(stream, None)
    except BaseException:
        answer.cancel()
        raise

    async def all_pieces() -> AsyncIterator[str]:
        if first is not None:
            yield first
            async for piece in stream:
                yield piece

    return all_pieces()


def completion(answer: Answer, text: str, model: str) -> dict[str, Any]:
    """The JSON of a `chat.completion`."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return {**_head("chat.completion", model), "choices": [choice], "usage": usage(answer)}


async def chunks(
    answer: Answer, stream: AsyncIterator[str], model: str, include_usage: bool = True
) -> AsyncIterator[dict[str, Any]]:
    """The `chat.completion.chunk` objects of an answer."""
    head = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice], **({"usage": None} if include_usage else {})}

    yield chunk({"role": "assistant", "content": ""})
    async for piece in stream:
        yield chunk({"content": piece})
    yield chunk({}, answer.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": usage(answer)}


async def events(
    answer: Answer, stream: AsyncIterator[str], model: str, include_usage: bool, disconnects: Counter
) -> AsyncIterator[str]:
    """The chunks of an answer as server-sent events, the last one ``[DONE]``."""
    try:
        async for chunk in chunks(answer, stream, model, include_usage):
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        disconnects.inc()
        raise
    except Exception as error:  # the status line is sent, so that the error becomes an event
        yield f"data: {bytes(error_response(error).body).decode()}\n\n"
    finally:
        answer.cancel()


def usage(answer: Answer) -> dict[str, Any]:
    """Counts of tokens; embeddings of media count as tokens of the prompt."""
    count = answer.usage
    return {
        "prompt_tokens": count.prompt,
        "completion_tokens": count.completion,
        "total_tokens": count.prompt + count.completion,
        "prompt_tokens_details": {
            "cached_tokens": count.cached,
            "audio_tokens": count.media.get("speech", 0) + count.media.get("audio", 0),
            "image_tokens": count.media.get("image", 0),
            "video_tokens": count.media.get("video", 0),
        },
    }


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
