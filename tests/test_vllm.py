"""`x2l serve --vllm` and `x2l export vllm`: against a stand-in that speaks vLLM's protocol, and against vLLM where there is one."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import yaml
from conftest import picture, tiny_model
from serving import check_error, image_part, is_idle, running
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from x2l.assistant import Assistant
from x2l.build import build
from x2l.cli import app
from x2l.config import ModelConfig
from x2l.demo import PHOTOS, QUESTIONS
from x2l.export import export_vllm
from x2l.llm import load_llm, read_table
from x2l.serve.answer import Busy, Decode, EngineError, Timeout
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.server import run
from x2l.serve.vllm import KEY_VARIABLE, VllmEngine, connect
from x2l.types import Message, Part, assistant, user
from x2l.weights import resolve

RED, BLUE = picture((250, 0, 0)), picture((0, 0, 250))
SERVE_VARIABLE = "X2L_TEST_VLLM"  # the `vllm` command of an environment that has it


def image(blob: bytes) -> Part:
    return Part("image", bytes=blob)


TALKS: list[list[Message]] = [
    [user(image(RED), "What?")],
    [user("Hello, how are you today?")],
    [user("One ", image(BLUE), " and two ", image(RED), "?")],
    [user("Hi"), assistant("Hello."), user(image(BLUE), "And this?")],
    [user("你好")],
    [user(image(BLUE))],
]


class StandIn(ThreadingHTTPServer):
    """vLLM's side of the completions protocol on the tests' LLM.

    Args:
        llm: computes the answers.
        fault: ``full``, ``refuse``, ``broken``, ``event``, ``slow`` or ``other``: what goes wrong from now on; "" is nothing.
    """

    daemon_threads = True

    def __init__(self, llm: Any, fault: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.llm, self.fault = llm, fault
        self.bodies: list[dict[str, Any]] = []
        self.embeds: list[torch.Tensor] = []
        self.keys: set[str | None] = set()
        self.left = threading.Event()  # a client went away before its answer was over

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that the end of the connection ends a stream."""

    server: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        served = {"id": "the-llm"} if self.server.fault == "other" else {"id": "the-llm", "max_model_len": 300}
        self._json(200, {"data": [served]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "the-llm"
        if "prompt_embeds" in body and self.server.fault in ("full", "refuse"):
            self._json(429 if self.server.fault == "full" else 400, {"error": {"message": "no"}})
            return
        if "prompt" in body:
            embeds = self.server.llm.get_input_embeddings()(torch.tensor(body["prompt"]))
        else:
            embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        if not body.get("stream"):
            self._json(200, {"choices": [self._choice(embeds)]})
            return
        self.server.bodies.append(body)
        self.server.embeds.append(embeds)
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self._stream(embeds, body)
            return
        self.server.left.set()

    @torch.inference_mode()
    def _choice(self, embeds: torch.Tensor) -> dict[str, Any]:
        logits = self.server.llm(inputs_embeds=embeds[None]).logits[0, -1]
        best = logits.log_softmax(-1).topk(5)
        top = {f"token_id:{i}": p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}
        return {"token_ids": [int(best.indices[0])], "logprobs": {"top_logprobs": [top]}}

    @torch.inference_mode()
    def _stream(self, embeds: torch.Tensor, body: dict[str, Any]) -> None:
        for _ in range(body["max_tokens"]):
            token = int(self.server.llm(inputs_embeds=embeds[None]).logits[0, -1].argmax())
            embeds = torch.cat([embeds, self.server.llm.get_input_embeddings()(torch.tensor([token]))])
            self._event({"choices": [{"text": "", "token_ids": [token]}]})
            if token in body["stop_token_ids"]:
                break
            if self.server.fault == "broken":
                return
            if self.server.fault == "event":
                self._event({"error": {"message": "the engine has died at 0xdead in /usr/lib"}})
                return
            if self.server.fault == "slow":
                time.sleep(0.05)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def config(llm_folder: Path) -> ModelConfig:
    return ModelConfig.model_validate(tiny_model(llm_folder))


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Assistant:
    torch.manual_seed(3)  # of the untrained interface
    return Assistant(build(config))


@pytest.fixture(scope="module")
def gateway(config: ModelConfig) -> Assistant:
    """The same model without its LLM."""
    torch.manual_seed(3)
    return Assistant(build(config, table_only=True))


@pytest.fixture
def upstream(model: Assistant) -> Iterator[StandIn]:
    server = StandIn(model.model.llm)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def engine(gateway: Assistant, upstream: StandIn) -> Iterator[VllmEngine]:
    engine = VllmEngine(gateway, upstream.url, EngineConfig(max_batch=4))
    yield engine
    engine.close()


def test_what_is_sent_is_exactly_what_the_model_reads(model: Assistant, engine: VllmEngine, upstream: StandIn) -> None:
    for talk in TALKS:
        "".join(engine.submit(talk, Decode(2)))
    with torch.inference_mode():
        read = [model.model.embed(model.collator.prompt([talk])).embeds[0] for talk in TALKS]
    assert len(upstream.embeds) == len(TALKS)
    assert all(torch.equal(sent, known) for sent, known in zip(upstream.embeds, read, strict=True))


def test_answers_equal_those_of_the_whole_model(model: Assistant, engine: VllmEngine) -> None:
    lengths = [20, 7, 20, 1, 13, 20]
    answers = [engine.submit(talk, Decode(n)) for talk, n in zip(TALKS, lengths, strict=True)]
    texts = ["".join(answer) for answer in answers]
    assert texts == ["".join(model.stream(talk, n)) for talk, n in zip(TALKS, lengths, strict=True)]
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert answers[0].usage.media == {"image": 4}
    assert answers[3].usage.completion == 1
    assert is_idle(engine)
    assert engine.stats.completion_tokens == sum(answer.usage.completion for answer in answers)


def test_the_llm_is_not_loaded(gateway: Assistant, model: Assistant) -> None:
    def size(one: Assistant) -> int:
        return sum(p.numel() for p in one.model.llm.parameters())

    assert size(gateway) == gateway.model.llm.get_input_embeddings().weight.numel() < size(model)
    assert gateway.info() == model.info()
    assert gateway.eos == model.eos


def test_end_tokens_and_stop_strings_end_an_answer(model: Assistant, engine: VllmEngine, upstream: StandIn) -> None:
    whole = "".join(model.stream(TALKS[0], 20))
    stop = whole[3:5]
    answer = engine.submit(TALKS[0], Decode(20, stop=(stop,)))
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    ids = [token for (token,) in model.model.stream(model.collator.prompt([TALKS[1]]), 6)]
    engine.stops = {ids[4]}
    answer = engine.submit(TALKS[1], Decode(20))
    assert "".join(answer) == model.decode(ids[: ids.index(ids[4])])
    assert answer.finish_reason == "stop"
    assert upstream.bodies[-1]["stop_token_ids"] == [ids[4]]


def test_sampling_and_owners_are_passed_on(engine: VllmEngine, upstream: StandIn) -> None:
    "".join(engine.submit(TALKS[1], Decode(3, 0.5, 0.9, seed=7), owner="someone"))
    "".join(engine.submit(TALKS[1], Decode(3)))
    first, second = upstream.bodies
    assert {key: first[key] for key in ("temperature", "top_p", "seed", "max_tokens", "cache_salt")} == {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 3, "cache_salt": "someone",
    }  # fmt: skip
    assert (second["temperature"], second["seed"], "cache_salt" in second) == (0, None, False)


def test_the_context_is_the_smaller_of_both(engine: VllmEngine) -> None:
    assert engine.intake.context == 300
    engine.stops = set()
    answer = engine.submit([user("x" * 200)], Decode())
    "".join(answer)
    assert answer.usage.prompt + answer.usage.completion == 300
    assert answer.finish_reason == "length"


def test_a_cancelled_answer_ends_its_request(engine: VllmEngine, upstream: StandIn) -> None:
    upstream.fault, engine.stops = "slow", set()
    answer = engine.submit(TALKS[1], Decode(200))
    next(iter(answer))
    answer.cancel()
    assert upstream.left.wait(5)
    assert is_idle(engine)
    assert answer.finish_reason == "cancelled"
    assert engine.stats.cancelled == 1


def test_deadlines_hold(gateway: Assistant, upstream: StandIn) -> None:
    engine = VllmEngine(gateway, upstream.url, EngineConfig(request_seconds=0.5))
    upstream.fault, engine.stops = "slow", set()
    with pytest.raises(Timeout):
        "".join(engine.submit(TALKS[1], Decode(200)))
    assert upstream.left.wait(5)
    engine.close()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("full", Busy, "full"),
        ("refuse", EngineError, "refuses the request with status 400"),
        ("event", EngineError, "refuses the request with status 500"),
        ("broken", EngineError, "ended an answer early"),
    ],
)
def test_faults_end_one_answer(
    fault: str, error: type[Exception], message: str, engine: VllmEngine, upstream: StandIn, model: Assistant
) -> None:
    upstream.fault = fault
    with pytest.raises(error, match=message):
        "".join(engine.submit(TALKS[0], Decode(9)))
    upstream.fault = ""
    assert "".join(engine.submit(TALKS[0], Decode(9))) == "".join(model.stream(TALKS[0], 9))
    assert is_idle(engine)


def test_open_answers_end_when_the_engine_closes(gateway: Assistant, upstream: StandIn) -> None:
    engine = VllmEngine(gateway, upstream.url)
    upstream.fault, engine.stops = "slow", set()
    answer = engine.submit(TALKS[1], Decode(200))
    pieces = iter(answer)
    next(pieces)
    engine.close()
    with pytest.raises(EngineError, match="stopped"):
        list(pieces)
    assert upstream.left.wait(5)
    assert not engine.alive


def test_over_http_with_our_limits_in_front(gateway: Assistant, model: Assistant, upstream: StandIn, monkeypatch: Any) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "the-key-of-vllm")
    monkeypatch.setattr("x2l.serve.vllm.WATCH", 0.1)

    def make(assistant: Assistant, config: EngineConfig, pool: Any) -> VllmEngine:
        return VllmEngine(assistant, upstream.url, config, pool)

    with running(gateway, make=make) as up:
        answer = up.ask([image_part(RED), {"type": "text", "text": "What?"}], max_tokens=9).json()
        assert answer["choices"][0]["message"]["content"] == "".join(model.stream(TALKS[0], 9))
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 4
        assert upstream.keys == {"Bearer the-key-of-vllm"}
        for field in ("prompt_embeds", "cache_salt"):
            refused = up.ask("Hi", **{field: "AAAA"})
            check_error(refused.status_code, refused.content)
            assert refused.status_code == 400
        upstream.fault = "event"
        failed = up.ask("Hi")
        check_error(failed.status_code, failed.content)  # what vLLM says of its inside stays inside
        assert up.http.get("/ready").status_code == 200
        upstream.shutdown()
        upstream.server_close()
        gone = up.ask("Hi")
        assert (gone.status_code, check_error(503, gone.content)) == (503, "the LLM server has stopped answering")
        assert _becomes(up.http, 503)
        assert up.http.get("/health").status_code == 200  # a restart of this process would not help


def _becomes(http: httpx.Client, status: int) -> bool:
    end = time.monotonic() + 10
    while http.get("/ready").status_code != status and time.monotonic() < end:
        time.sleep(0.05)
    return http.get("/ready").status_code == status


def test_what_is_no_vllm_of_this_model_is_refused_at_the_start(gateway: Assistant, model: Assistant, upstream: StandIn) -> None:
    torch.manual_seed(1)
    upstream.llm = AutoModelForCausalLM.from_config(model.model.llm.config).eval()
    with pytest.raises(ValueError, match="holds another LLM"):
        VllmEngine(gateway, upstream.url)
    upstream.llm, upstream.fault = model.model.llm, "refuse"
    with pytest.raises(ValueError, match="--enable-prompt-embeds"):
        VllmEngine(gateway, upstream.url)
    upstream.fault = "other"
    with pytest.raises(ValueError, match="is no vLLM"):
        VllmEngine(gateway, upstream.url)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="start `vllm serve` first"):
            VllmEngine(gateway, f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
    with pytest.raises(ValueError, match="give the URL"):
        VllmEngine(gateway, "localhost:8001")


@pytest.fixture
def exported(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a trained interface, exported; the working directory is the export's, as its README says."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    interface = build(config).model.modalities["image"].get_submodule("interface")
    save_file(interface.state_dict(), tmp_path / "trained.safetensors")
    part = config.modalities["image"].model_copy(update={"weights": str(tmp_path / "trained.safetensors")})
    recipe = config.model_copy(update={"modalities": {"image": part}})
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe.model_dump(exclude_defaults=True)))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "vllm", "--model", str(tmp_path / "mine.yaml"), "--out", str(out)])
    assert (done.exit_code, "has the two commands" in " ".join(done.output.split())) == (0, True)
    monkeypatch.chdir(out)
    return out


def test_an_export_serves_as_its_readme_says(exported: Path, model: Assistant, upstream: StandIn) -> None:
    llm, tokenizer = load_llm("llm")
    assert all(torch.equal(p, q) for p, q in zip(llm.parameters(), model.model.llm.parameters(), strict=True))
    assert tokenizer.chat_template == model.tokenizer.chat_template
    engine = connect("model.yaml", upstream.url, EngineConfig())
    assert "".join(engine.submit(TALKS[0], Decode(9))) == "".join(model.stream(TALKS[0], 9))
    engine.close()
    assert str(exported.parent) not in (exported / "model.yaml").read_text()  # it may be moved
    with pytest.raises(ValueError, match="--vllm 'localhost:8001': give the URL"):
        run("model.yaml", vllm="localhost:8001")
    with pytest.raises(ValueError, match="let vLLM quantise"):
        run("model.yaml", vllm=upstream.url, weight_bits=4)


def test_the_table_alone_is_no_llm(exported: Path) -> None:
    assert sorted(path.name for path in (exported / "table").glob("*.safetensors")) == ["table.safetensors"]
    with pytest.raises(ValueError, match="cannot load it as a causal LM"):
        load_llm("table")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_vllm("tiny", [], exported)


def test_an_interface_that_starts_from_another_llm_s_is_exported_as_one(llm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "speech.safetensors").write_bytes(b"weights")
    speech = {"encoder": {"name": "moonshine"}, "weights": f"speech:{tmp_path}/speech.safetensors"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_model(llm_folder, speech=speech)))
    export_vllm(str(tmp_path / "recipe.yaml"), [], tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())
    assert recipe["modalities"]["speech"]["weights"] == "speech:interfaces/speech.safetensors"
    assert (tmp_path / "out" / "interfaces" / "speech.safetensors").read_bytes() == b"weights"


def test_tables_are_found_under_the_names_of_published_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2))
    gpt.config.save_pretrained(tmp_path)
    save_file({"wte.weight": gpt.transformer.wte.weight.detach()}, tmp_path / "model.safetensors")
    _, key, table = read_table(tmp_path)
    assert key == "wte.weight"
    assert torch.equal(table, gpt.transformer.wte.weight)
    (tmp_path / "model.safetensors").unlink()
    save_file({"wpe.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds transformer\.wte\.weight"):
        read_table(tmp_path)


def test_llms_that_scale_their_embeddings_are_refused(tmp_path: Path) -> None:
    gemma = Gemma3TextConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    gemma.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plain table"):
        read_table(tmp_path)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3000)
def test_vllm_itself_gives_the_engine_s_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy in float32, about photos and without: whatever differs was a near tie. docs/serve.md has the counts."""
    command = os.environ.get(SERVE_VARIABLE)
    if not command:
        pytest.skip(f"{SERVE_VARIABLE} does not name the `vllm` command of an environment that has it (docs/serve.md)")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from vllm_peer import Vllm, token_ids

    photos = [resolve(spec, sha256).read_bytes() for spec, sha256 in PHOTOS.items()]
    talks = [[user(image(photo), question)] for photo in photos for question in QUESTIONS]
    talks += [[user(text)] for text in ("Why is the sky blue?", "List three colours.", "How do I boil an egg?", "What is gravity?")]
    export_vllm("tiny", [], tmp_path / "out")
    vllm = Vllm(command, tmp_path / "out" / "llm", tmp_path / "log", "--enforce-eager")  # no compiler: it starts in a minute
    try:
        behind = connect("tiny", vllm.url, EngineConfig())
        theirs = token_ids(behind, talks, 32)
        behind.close()
    finally:
        vllm.stop()
    whole = Assistant.load("tiny")
    engine = Engine(whole, EngineConfig())
    ours = token_ids(engine, talks, 32)
    engine.close()
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    print(f"{same} of {len(talks)} answers are the same, {sum(map(len, ours))} tokens")
    for talk, a, b in zip(talks, theirs, ours, strict=True):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -1], strict=False)) if x != y)
            gap = _lead(whole, talk, b[:at])
            print(f"{talk[0].text!r} differs at token {at}, where the best token leads by {gap:.2g} nats")
            assert gap < 1e-3


@torch.inference_mode()
def _lead(model: Assistant, talk: list[Message], answer: list[int]) -> float:
    """By how much the best next token leads the second one."""
    embeds = model.model.embed(model.collator.prompt([talk])).embeds
    more = model.model.llm.get_input_embeddings()(torch.tensor([answer], dtype=torch.long))
    best = model.model.llm(inputs_embeds=torch.cat([embeds, more], 1)).logits[0, -1].log_softmax(-1).topk(2).values
    return float(best[0] - best[1])
