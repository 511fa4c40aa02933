"""Errors in OpenAI's JSON shape. Messages are written for strangers: no addresses, paths or tracebacks."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from x2l.data.media import MediaError
from x2l.serve.answer import Busy, EngineError, RequestError, Timeout

log = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_SHOWN = 80  # characters of an offending value


class ApiError(HTTPException):
    """An HTTP error with OpenAI's ``param`` and ``code``."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The response for any exception; what is not expected becomes a 500 that says nothing about the inside."""
    headers: dict[str, str] = {}
    param = code = None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        param, code = getattr(error, "param", None), getattr(error, "code", None)
    elif isinstance(error, RequestValidationError):
        status, (message, param) = 400, _explain(error)
    elif isinstance(error, RequestError | MediaError):
        status, message = 400, str(error)
    elif isinstance(error, Busy):
        status, message, headers = 429, f"too many requests: {error}", {"Retry-After": str(error.retry_after)}
    elif isinstance(error, Timeout | TimeoutError):
        status, message = 504, "the request took longer than this server allows"
    elif isinstance(error, EngineError):
        dead = "stopped" in str(error)
        status, message = (503, str(error)) if dead else (500, str(error))
        headers = {"Retry-After": "5"} if dead else {}
    else:
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        status, message = 500, "internal error"
    return JSONResponse(error_body(status, message, param, code), status, headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Starlette's form of `error_response`."""
    return error_response(error)


def _explain(error: RequestValidationError) -> tuple[str, str]:
    """What is wrong with the first offending field, with its value, cut and escaped; and its path."""
    first = error.errors()[0]
    path = ".".join(str(key) for key in first["loc"] if key not in ("body", "query"))
    value = first.get("input")
    shown = f" (got {ascii(value)[:MAX_SHOWN]})" if isinstance(value, str | int | float | bool) else ""
    more = len(error.errors()) - 1
    path = json.dumps(path)[1:-1][:MAX_SHOWN]
    reason = first["msg"][: 4 * MAX_SHOWN]  # it may quote the request
    return f"{path or 'body'}: {reason}{shown}{f', and {more} more errors' if more else ''}", path
