"""A real server on a tiny random model in a thread, for the tests of x2l.serve."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
import yaml
from conftest import tiny_model
from safetensors.torch import save_file
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Moonshine

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.data.media import decode_audio
from x2l.modalities.hearing import GrowingSpeech, Hearing
from x2l.serve.app import ServerConfig, create_app
from x2l.serve.decoders import DecoderPool
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.server import Server
from x2l.types import Features, Part, user
from x2l.vocabulary import Vocabulary

SPEECH = {
    "encoder": {"name": "conformer", "num_mels": 8, "channels": 2, "width": 16, "ffn_width": 16, "num_heads": 2, "kernel": 3,
                "num_blocks": 1, "pool_after": []},
    "interface": {"listener": {"width": 16, "num_heads": 2, "kernel": 3}, "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip
IMAGE = {
    "encoder": {"name": "conftest:patches"},
    "interface": {"width": 16, "depth": 2, "heads": 2, "num_queries": 4, "cross_every": 1},
}

ROOT = str(Path(__file__).parents[1])
KEY = "a-key-for-the-tests"
BOUNDS = {"image": {"max_pixels": 25_000_000}, "audio": {"max_seconds": 600.0}}


@dataclass
class Running:
    """A server that is up."""

    server: Server
    engine: Engine
    pool: DecoderPool
    port: int
    http: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, content: Any = "Hi", **fields: Any) -> httpx.Response:
        body = {"model": "x2l", "messages": [{"role": "user", "content": content}], "max_tokens": 3, "temperature": 0} | fields
        return self.http.post("/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def running(
    assistant: Assistant,
    engine: EngineConfig | None = None,
    seconds: float = 300.0,
    make: Callable[..., Engine] = Engine,
    others: Mapping[str, Engine] = MappingProxyType({}),
    **config: Any,
) -> Iterator[Running]:
    """Serve until the block ends, with one key."""
    pool = DecoderPool(1, seconds, BOUNDS)
    one = make(assistant, engine or EngineConfig(), pool)
    gate = create_app(one, ServerConfig(**({"api_keys": [KEY]} | config)), pool, others)
    server = Server(gate, "127.0.0.1", 0, grace=10)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=600) as http:
            yield Running(server, one, pool, port, http)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        one.close()
        pool.close()


@contextlib.contextmanager
def served(recipe: dict[str, Any], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A model recipe served by a process of its own, as ``mine``, with one key: the process, and its port."""
    path, log = folder / "mine.yaml", folder / "log"
    path.write_text(yaml.safe_dump(recipe))
    code = (
        "import sys, logging; sys.path.insert(0, 'tests'); logging.basicConfig(level='INFO')\n"
        "import conftest\n"
        "from x2l.serve import server\n"
        f"server.run({str(path)!r}, port=0)\n"
    )
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"X2L_API_KEYS": KEY}, stderr=out, cwd=ROOT)
    try:
        yield process, _port(log, process)
    finally:
        process.kill()
        process.wait()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(3000):
        text = log.read_text()
        if "running on http://127.0.0.1:" in text:
            return int(text.split("running on http://127.0.0.1:")[1].split()[0])
        assert process.poll() is None, text
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def is_idle(engine: Engine, seconds: float = 10.0) -> bool:
    """Whether nothing is left in the engine, a turn or so after the last answer was read."""
    end = time.monotonic() + seconds
    while engine.load != (0, 0) and time.monotonic() < end:
        time.sleep(0.005)
    return engine.load == (0, 0)


def data_url(blob: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


def image_part(blob: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(blob)}}


def raw_http(port: int, request: bytes) -> tuple[int, bytes]:
    """Bytes on a bare socket: the status and the body of what comes back (0 if the connection is just closed)."""
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        received = b""
        with contextlib.suppress(OSError):  # refused bodies are not read to their end
            connection.sendall(request)
        with contextlib.suppress(OSError):
            while chunk := connection.recv(1 << 16):
                received += chunk
                head, _, body = received.partition(b"\r\n\r\n")
                length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), None)
                if length is not None and len(body) >= length:
                    break
    return (int(received.split(b" ", 2)[1]), received.partition(b"\r\n\r\n")[2]) if received else (0, b"")


def rss(pid: int | str = "self") -> int:
    """Resident bytes of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_error(status: int, body: bytes) -> str:
    """OpenAI's shape, and nothing of the inside; the message."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert not re.search("0x[0-9a-fA-F]{6}", error["message"]), error  # an address; a client's own "0x" may be quoted
    for leak in ("Traceback", ROOT, "/usr", ".py", "site-packages"):
        assert leak not in error["message"], error
    assert 400 <= status < 600
    return str(error["message"])


LETTERS = "[ a-z']"


def settling_model(llm_folder: Path, folder: Path, **more: Any) -> Assistant:
    """A model whose speech can be settled: a random Moonshine, a small listener and reader, soft words; ``more`` of its recipe."""
    torch.manual_seed(0)
    save_file(Moonshine(MoonshineConfig()).state_dict(), folder / "encoder.safetensors")
    plain = Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder))))
    num_tokens = len(Vocabulary.of(plain.tokenizer, LETTERS).token_ids)
    save_file({"embedding.weight": torch.randn(num_tokens + 1, 16)}, folder / "decoder.safetensors")
    speech = {
        "encoder": {"name": "moonshine", "weights": str(folder / "encoder.safetensors")},
        "interface": {
            "listener": {"width": 16, "num_heads": 2, "kernel": 3, "parts": 2, "rate": 0.2, "num_blocks": 2},
            "reader": {"ffn_width": 16, "num_heads": 2, "num_blocks": 2},
            # All words are heard a little, so that no difference hides behind the same likeliest one.
            "words": {"vocabulary": LETTERS, "table": str(folder / "decoder.safetensors"), "temperature": 3.0},
        },
    }
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder, speech=speech) | more)))


def hearing(modality: Any, lookahead: float) -> Hearing:
    """Of a recording that the speech ``modality`` reads."""
    return Hearing(GrowingSpeech(modality), lookahead)


def everything(hearing: Hearing, wave: torch.Tensor) -> torch.Tensor:
    """All embeddings of a recording that is settled as it comes."""
    settled, rest = hearing.read(wave)
    return torch.cat([*settled, rest])


def settled_answer(model: Assistant, sound: bytes, lookahead: float, tokens: int, *after: str) -> str:
    """What the model says offline to a file, and what stands after it, where its speech interface reads as `Hearing` does."""
    modality: Any = model.model.modalities["speech"]
    embeds = everything(hearing(modality, lookahead), torch.from_numpy(decode_audio(sound)))
    modality.forward = lambda media: Features(embeds[None], torch.tensor([len(embeds)]))
    try:
        return "".join(model.stream([user(Part("speech", bytes=sound), *after)], tokens))
    finally:
        del modality.forward


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    """Samples (S,) at 16 kHz, loud and soft in turn."""
    num = int(seconds * 16_000)
    samples = np.random.default_rng(seed).standard_normal(num) * (1.2 + np.sin(np.arange(num) / 900))
    return torch.from_numpy(0.05 * samples.astype(np.float32))
