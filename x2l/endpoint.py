"""A client of any OpenAI-compatible chat-completions endpoint: it waits as told, tries again, and counts tokens.

The key goes into one request header and nowhere else: not into settings, records, messages or logs.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import requests

ATTEMPTS, LONGEST_WAIT = 7, 120.0  # seconds


class EndpointError(ValueError):
    """The endpoint cannot be asked; what was answered so far is kept by whoever asked."""


@dataclass(frozen=True)
class Reply:
    """A completion and what it used; ``retries`` counts the attempts that failed before it."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    retries: int

    @property
    def counts(self) -> dict[str, int]:
        """What a run adds up."""
        used = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {"calls": 1, "retries": self.retries, **used}


class ChatEndpoint:
    """One model behind a URL; threads and worker processes may share a copy.

    Args:
        url: such as ``https://host/v1``.
        model: its name there.
        key_variable: the environment variable that holds the key; read at each request, so that no copy of this object
            carries it. Unset means that no key is sent.
        timeout: seconds of silence after which an attempt has failed.
    """

    def __init__(self, url: str, model: str, key_variable: str = "X2L_ENDPOINT_KEY", timeout: float = 120.0) -> None:
        self.url, self.model, self.key_variable, self.timeout = url.rstrip("/"), model, key_variable, timeout

    def complete(self, messages: Sequence[dict[str, str]], **options: Any) -> Reply:
        """The first choice for these messages (``{"role", "content"}``), with options such as ``temperature``.

        429, 408 and 5xx are tried again after ``Retry-After`` seconds (else 1, 2, 4, ...), as are time-outs, broken
        connections and replies that are not a completion.

        Raises:
            EndpointError: refused, or no answer after all attempts.
        """
        body = {"model": self.model, "messages": list(messages), **options}
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = 2.0**attempt
            try:
                response = self._post(body)
                if response.status_code < 300:
                    return _reply(response, attempt)
                problem = f"status {response.status_code}: {self._redacted(response.text[:300])}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise EndpointError(f"{self.model} refused: {problem}")
                wait = retry_after(response.headers.get("Retry-After")) or wait
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = type(error).__name__
            except (LookupError, TypeError, AttributeError, requests.exceptions.JSONDecodeError) as error:
                problem = f"not a chat completion: {type(error).__name__}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(wait, LONGEST_WAIT))
        raise EndpointError(f"no answer from {self.model} in {ATTEMPTS} attempts, the last: {problem}")

    def _key(self) -> str | None:
        key = os.environ.get(self.key_variable, "").strip()  # files from which keys are read end in a line break
        if re.search(r"[^!-~]", key):  # requests would quote the whole header in its error
            raise EndpointError(f"${self.key_variable} holds a space, a line break or a character that is not ASCII: no key does")
        return key or None

    def _post(self, body: dict[str, Any]) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        return requests.post(
            f"{self.url}/chat/completions", json=body, headers=headers, timeout=self.timeout, allow_redirects=False
        )

    def _redacted(self, text: str) -> str:
        return text.replace(key, "[key]") if (key := self._key()) else text


def _reply(response: requests.Response, retries: int) -> Reply:
    answer = response.json()
    usage = answer.get("usage") or {}
    text = str(answer["choices"][0]["message"]["content"] or "")
    return Reply(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), retries)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), or None."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def cost(prompt_tokens: int, completion_tokens: int, prompt_price: float, completion_price: float) -> float:
    """What tokens cost, prices being for a million of them."""
    return (prompt_tokens * prompt_price + completion_tokens * completion_price) / 1e6
