"""Many requests at the same moment: how many are answered, how the others are refused, and how /health answers meanwhile.

    X2L_API_KEYS=a-long-random-key x2l serve &
    python benchmarks/flood.py http://127.0.0.1:8000 a-long-random-key [requests] [tokens]

One line of JSON. Every second request is streamed. /health is asked every 20 ms on a connection of its own; times are the client's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx2 as httpx


class Health(threading.Thread):
    """Asks /health until it is stopped; ``seconds`` holds the time of each answer, ``bad`` counts those that are not 200."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.seconds, self.bad, self.done = url, list[float](), 0, threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.done.wait(0.02):
                start = time.perf_counter()
                self.bad += http.get("/health").status_code != 200
                self.seconds.append(time.perf_counter() - start)

    def stop(self) -> dict[str, float]:
        self.done.set()
        self.join()
        sorted_ms = sorted(1e3 * seconds for seconds in self.seconds)
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        told = {name: round(sorted_ms[min(int(share * len(sorted_ms)), len(sorted_ms) - 1)], 1) for name, share in shares.items()}
        return {"asked": len(sorted_ms), "not_200": self.bad, **told}


async def one(http: httpx.AsyncClient, model: str, i: int, tokens: int) -> tuple[int, bool]:
    """Status, and whether the answer is whole, or the refusal says when to come again."""
    body = {"model": model, "messages": [{"role": "user", "content": f"Count to {i}."}], "max_tokens": tokens, "temperature": 0}
    answer = await http.post("/v1/chat/completions", json=body | {"stream": i % 2 == 1})
    if answer.status_code != 200:
        return answer.status_code, int(answer.headers.get("retry-after", 0)) >= 1
    if i % 2:
        return 200, answer.text.endswith("data: [DONE]\n\n") and '"finish_reason": "' in answer.text
    return 200, answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


async def flood(url: str, key: str, requests: int, tokens: int) -> dict[str, Any]:
    """What came of ``requests`` at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        health = Health(url)
        health.start()
        start = time.perf_counter()
        results = await asyncio.gather(*(one(http, model, i, tokens) for i in range(requests)))
        seconds = time.perf_counter() - start
    statuses = Counter(str(status) for status, _ in results)
    return {"requests": requests, "statuses": dict(statuses), "not_as_promised": sum(not good for _, good in results),
            "seconds": round(seconds, 2), "health_ms": health.stop()}  # fmt: skip


if __name__ == "__main__":
    url, key, *counts = sys.argv[1:]
    requests, tokens = (int(counts[i]) if i < len(counts) else default for i, default in enumerate((500, 16)))
    print(json.dumps(asyncio.run(flood(url, key, requests, tokens))))
