"""The server's engine against vLLM on the same LLM, prompts and processor: tokens/s, ratio and goal, in one run.

    python benchmarks/vllm_peer.py VLLM_COMMAND [model] [tokens]

``VLLM_COMMAND`` is the ``vllm`` of an environment that has it (docs/serve.md says how to make one). Both sides compute in
float32 on one thread, answers run to their full length, and no states of earlier prompts are reused. The peer is sent the
prompts' embeddings by HTTP; ours gets chats and photos by HTTP and knows the photos' embeddings. Give this process and so vLLM,
its child, one core: ``taskset -c 0``. Minima of interleaved runs; processor seconds are of vLLM's processes, or of this one.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import torch
from serve import QUESTIONS, TEXTS, Bench

from x2l.export import export_vllm
from x2l.serve.answer import Decode
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.vllm import VllmEngine
from x2l.types import Message, Part, user

START_SECONDS = 1200.0
REPEATS = 3


class Vllm:
    """`vllm serve` on an exported LLM, in a session of its own, until `stop`.

    Args:
        command: the ``vllm`` to run.
        llm: folder.
        log: file for what it says.
        flags: more of them.

    Raises:
        RuntimeError: it ended, or does not answer in time.
    """

    def __init__(self, command: str, llm: Path, log: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        common = ["--enable-prompt-embeds", "--dtype", "float32", "--max-model-len", "2048", "--no-enable-prefix-caching"]
        one_thread = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [command, "serve", str(llm), *common, *flags, "--host", "127.0.0.1", "--port", str(port)],
                env=os.environ | one_thread | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"vLLM does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(1)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/models", timeout=5).ok
        except requests.RequestException:
            return False

    def cpu(self) -> float:
        """Processor seconds of its processes so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:  # session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it and its children."""
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def token_ids(engine: Engine, talks: Sequence[Sequence[Message]], tokens: int) -> list[list[int]]:
    """The ids of each answer, all asked at once."""
    ids: dict[int, list[int]] = {}
    finish = engine._finish

    def record(job: Any, reason: str) -> None:
        ids[id(job.answer)] = list(job.ids)
        finish(job, reason)

    engine._finish = record  # type: ignore[method-assign]
    try:
        answers = [engine.submit(talk, Decode(tokens)) for talk in talks]
        for answer in answers:
            "".join(answer)
    finally:
        engine._finish = finish  # type: ignore[method-assign]
    return [ids[id(answer)] for answer in answers]


def best(work: Callable[[], Any], cpu: Callable[[], float], known: tuple[float, float]) -> tuple[float, float]:
    """The least wall and processor seconds, of ``known`` and another run."""
    wall, used = time.perf_counter(), cpu()
    work()
    return min(known[0], time.perf_counter() - wall), min(known[1], cpu() - used)


def main(command: str, model: str = "tiny", tokens: int = 48) -> None:
    bench = Bench(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        export_vllm(model, [], Path(folder) / "out")
        vllm = Vllm(command, Path(folder) / "out" / "llm", Path(folder) / "log")
        behind = VllmEngine(bench.assistant, vllm.url, EngineConfig(request_seconds=1e6))
        behind.stops = set()
        try:
            compare(bench, behind, vllm)
        finally:
            behind.close()
            vllm.stop()


def compare(bench: Bench, behind: VllmEngine, vllm: Vllm) -> None:
    asked = [(question, bench.photos[i % 2]) for i, question in enumerate(QUESTIONS)] + [(text, None) for text in TEXTS]
    talks = [[user(*([Part("image", bytes=photo)] if photo else []), question)] for question, photo in asked]
    contents = [bench.content(*pair) for pair in asked]
    theirs, ours = token_ids(behind, talks, bench.tokens), token_ids(bench.engine, talks, bench.tokens)  # both are warm now
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    print(f"{same} of {len(talks)} answers of {bench.tokens} tokens are the same, token for token", flush=True)
    for at_once, repeats in ((1, 1), (len(talks), REPEATS)):

        def peer(at_once: int = at_once) -> None:
            for i in range(0, len(talks), at_once):
                token_ids(behind, talks[i : i + at_once], bench.tokens)

        def mine(at_once: int = at_once) -> None:
            bench.engine.prefixes.clear()
            with ThreadPoolExecutor(at_once) as threads:
                list(threads.map(bench.ask, contents))

        least = [(math.inf, math.inf)] * 2
        for _ in range(repeats):
            least = [best(peer, vllm.cpu, least[0]), best(mine, time.process_time, least[1])]
        for what, i in (("wall", 0), ("processor", 1)):
            rates = [len(talks) * bench.tokens / seconds[i] for seconds in least]
            goal = "  goal 0.7x" if at_once > 1 else ""
            ratio = f"vLLM {rates[0]:.1f}, ours {rates[1]:.1f}, {rates[1] / rates[0]:.2f}x{goal}"
            print(f"8 mixed requests, {at_once} at a time, tokens/s of {what} time: {ratio}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], *sys.argv[2:3], *map(int, sys.argv[3:4]))
