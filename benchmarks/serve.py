"""The server against itself at batch 1 and against Hugging Face's generate: requests, peer, ratio and goal, in one run.

    python benchmarks/serve.py [model] [tokens]

Real HTTP on this machine, one thread of computing. Times are CPU seconds of this process (server, engine and client together),
so that other load does not show; ratios hold across machines, times do not. Answers run to their full length: no end token.
"""

from __future__ import annotations

import base64
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch

from x2l.assistant import Assistant
from x2l.demo import PHOTOS
from x2l.serve.app import ServerConfig, create_app
from x2l.serve.engine import Engine, EngineConfig
from x2l.serve.server import Server
from x2l.serve.store import EmbeddingStore, PrefixStore
from x2l.types import Part, user
from x2l.weights import resolve

QUESTIONS = ("Describe this photo.", "What colours are there?", "Is there a person?", "Where was this taken?")
TEXTS = ("Tell me about the sea.", "Why is the sky blue?", "Write a short story about a dog.", "What is a good breakfast?")


class Bench:
    """A model, its server, and a client.

    Args:
        model: recipe.
        tokens: of each answer.
    """

    def __init__(self, model: str, tokens: int):
        self.tokens, self.assistant = tokens, Assistant.load(model)
        self.engine = Engine(self.assistant, EngineConfig(request_seconds=1e6))  # other load may slow everything down
        self.engine.stops = set()
        self.server = Server(create_app(self.engine, ServerConfig("bench")), "127.0.0.1", 0, grace=1)
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.05)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None)
        self.photos = [resolve(spec, sha256).read_bytes() for spec, sha256 in list(PHOTOS.items())[:2]]

    def content(self, question: str, photo: bytes | None) -> list[dict[str, Any]]:
        url = "data:image/jpeg;base64," + base64.b64encode(photo or b"").decode()
        return [*([{"type": "image_url", "image_url": {"url": url}}] if photo else []), {"type": "text", "text": question}]

    def ask(self, content: Any, tokens: int | None = None) -> str:
        body = {"model": "bench", "messages": [{"role": "user", "content": content}], "temperature": 0}
        answer = self.http.post("/v1/chat/completions", json=body | {"max_tokens": tokens or self.tokens}).json()
        assert answer["usage"]["completion_tokens"] == (tokens or self.tokens), answer
        return str(answer["choices"][0]["message"]["content"])

    def forget(self) -> None:
        self.engine.embeddings, self.engine.prefixes = EmbeddingStore(256 << 20), PrefixStore(512 << 20)


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def line(what: str, peer: float, ours: float, ratio: float, goal: float, unit: str) -> None:
    print(f"{what:<46} {peer:9.2f} {ours:9.2f} {unit:<6} {ratio:6.2f}x  goal {goal:.1f}x", flush=True)


def throughput(bench: Bench) -> None:
    """Eight mixed requests one after the other, and at once."""
    contents = [bench.content(question, bench.photos[i % 2]) for i, question in enumerate(QUESTIONS)]
    contents += [bench.content(question, None) for question in TEXTS]
    total = bench.tokens * len(contents)
    bench.forget()
    before, single = clock(lambda: [bench.ask(content) for content in contents])
    bench.forget()

    def together(contents: Sequence[Any] = contents) -> list[str]:
        with ThreadPoolExecutor(len(contents)) as threads:
            return list(threads.map(bench.ask, contents))

    after, answers = clock(together)
    same = sum(a == b for a, b in zip(single, answers, strict=True))
    print(f"{same} of {len(contents)} answers equal to single requests (greedy, {bench.assistant.model.llm.dtype})")
    line("8 mixed requests, batch 1 | 8 at a time", total / before, total / after, before / after, 4.0, "tok/s")


def first_token(bench: Bench) -> None:
    """One token about a photo: everything new, the photo known, its prompt known too; Hugging Face's generate each time anew."""
    photo, model = bench.photos[0], bench.assistant.model

    def peer() -> Any:
        batch = bench.assistant.collator.prompt([[user(Part("image", bytes=photo), QUESTIONS[0])]])
        with torch.inference_mode():
            embeds = model.embed(batch).embeds
            return model.llm.generate(inputs_embeds=embeds, max_new_tokens=1, do_sample=False, pad_token_id=0)

    def ours(prepare: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            prepare()
            times.append(clock(lambda: bench.ask(bench.content(QUESTIONS[0], photo), 1))[0])
        return 1e3 * min(times)

    def forget_states() -> None:
        bench.engine.prefixes = PrefixStore(512 << 20)

    theirs = 1e3 * min(clock(peer)[0] for _ in range(3))
    for what, prepare, goal in (
        ("cold", bench.forget, 1.0),
        ("photo known", forget_states, 3.0),
        ("prompt known", lambda: None, 3.5),
    ):
        mine = ours(prepare)
        line(f"first token, HF generate | {what}", theirs, mine, theirs / mine, goal, "ms")


def decode(bench: Bench) -> None:
    """Tokens a second of one answer, beyond its first."""
    llm = bench.assistant.model.llm
    ids = torch.tensor([bench.assistant.tokenizer("Tell me about the sea.")["input_ids"]])

    def peer(tokens: int) -> Any:
        return llm.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def rate(ask: Callable[[int], Any]) -> float:
        few, many = (min(clock(lambda n=n: ask(n))[0] for _ in range(2)) for n in (1, bench.tokens))
        return (bench.tokens - 1) / (many - few)

    theirs, ours = rate(peer), rate(lambda n: bench.ask("Tell me about the sea.", n))
    line(f"decode, batch 1, HF generate | ours ({llm.dtype})", theirs, ours, ours / theirs, 1.3, "tok/s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench = Bench(sys.argv[1] if len(sys.argv) > 1 else "tiny", int(sys.argv[2]) if len(sys.argv) > 2 else 48)
    print(f"{Path(sys.argv[0]).stem}: {bench.tokens} tokens an answer\n{'':<46} {'peer':>9} {'ours':>9}")
    for part in (throughput, first_token, decode):
        part(bench)
