"""The server against itself at batch 1 and against Hugging Face's generate: peer, ours, ratio and goal, in one run.

    python benchmarks/serve.py [model] [tokens] [--only PART] [--set llm.dtype=bfloat16 [--weight-bits 8|4]]

Real HTTP on this machine, one thread of computing, float32 unless an override of the model's recipe says otherwise. Times are
CPU seconds of this process (server, engine and client together), minima of runs in turns, so that other load shows little; ratios
hold across machines, times do not. Answers run to their full length: no end token. The peers of the first token, each computing
everything anew as they do: the model's own parts in Hugging Face's way (`generate` of the LLM on embeddings), from the file on;
and a `Blip2ForConditionalGeneration` around the same LLM (ViT-B/16, BERT-base Q-Former, 32 queries; random weights), from pixels in
memory on, beside a model of ours with the same weights.
"""

from __future__ import annotations

import argparse
import base64
import copy
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import httpx2 as httpx
import torch
import transformers

from x2l.assistant import Assistant
from x2l.data.media import decode_image
from x2l.demo import PHOTOS
from x2l.encoders.hf import ImageProcessor, VisionEncoder
from x2l.interfaces.adapter import Adapter
from x2l.interfaces.qformer import QFormer, import_blip2
from x2l.modality import Modality
from x2l.serve.app import ServerConfig, create_app
from x2l.serve.engine import Engine
from x2l.serve.forward import Forward, Plain
from x2l.serve.intake import EngineConfig
from x2l.serve.lanes import Caches, Lanes
from x2l.serve.server import Server
from x2l.types import Media, Part, user
from x2l.weights import resolve

QUESTIONS = ("Describe this photo.", "What colours are there?", "Is there a person?", "Where was this taken?")
TEXTS = ("Tell me about the sea.", "Why is the sky blue?", "Write a short story about a dog.", "What is a good breakfast?")


class Bench:
    """A model, its server, and a client.

    Args:
        model, overrides: recipe.
        tokens: of each answer.
        weight_bits: as in `EngineConfig`.
    """

    def __init__(self, model: str, tokens: int, overrides: Sequence[str] = (), weight_bits: int = 16):
        self.tokens, self.assistant = tokens, Assistant.load(model, overrides)
        config = EngineConfig(request_seconds=1e6, weight_bits=weight_bits)  # other load may slow everything down
        self.engine = Engine(self.assistant, config)
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

    def ask(self, *turns: Any, tokens: int | None = None) -> str:
        """The answer to the contents of user, assistant, user, ..."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
        body = {"model": "bench", "messages": messages, "temperature": 0}
        answer = self.http.post("/v1/chat/completions", json=body | {"max_tokens": tokens or self.tokens}).json()
        assert answer["usage"]["completion_tokens"] == (tokens or self.tokens), answer
        return str(answer["choices"][0]["message"]["content"])

    def forget(self) -> None:
        time.sleep(0.3)  # the last answer's states may be on their way
        self.engine.embeddings.clear()
        self.engine.prefixes.clear()


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def line(what: str, peer: float, ours: float, ratio: float, goal: float, unit: str) -> None:
    print(f"{what:<46} {peer:9.2f} {ours:9.2f} {unit:<6} {ratio:6.2f}x  goal {goal:.1f}x", flush=True)


def throughput(bench: Bench) -> None:
    """Eight mixed requests one after the other, and at once: photos, text, and second turns about both."""
    photos = [bench.content(question, bench.photos[i % 2]) for i, question in enumerate(QUESTIONS)]
    talks: list[tuple[Any, ...]] = [(photos[0],), (photos[1],), (photos[2], "A photo.", "Tell me more."), (photos[3],)]
    talks += [(TEXTS[0],), (TEXTS[1],), (TEXTS[2], "A dog slept.", "And then?"), (TEXTS[3],)]

    def one_by_one() -> list[str]:
        return [bench.ask(*talk) for talk in talks]

    def together(talks: Sequence[Any] = talks) -> list[str]:
        with ThreadPoolExecutor(len(talks)) as threads:
            return list(threads.map(lambda talk: bench.ask(*talk), talks))

    times: dict[Callable[[], list[str]], list[tuple[float, list[str]]]] = {one_by_one: [], together: []}
    for _ in range(2):
        for work, measured in times.items():
            bench.forget()
            measured.append(clock(work))
    (before, single), (after, answers) = (min(measured) for measured in times.values())
    same = sum(a == b for a, b in zip(single, answers, strict=True))
    print(f"{same} of {len(talks)} answers equal to single requests (greedy, {bench.assistant.model.llm.dtype})")
    total = bench.tokens * len(talks)
    line("8 mixed requests, batch 1 | 8 at a time", total / before, total / after, before / after, 4.0, "tok/s")


def steps(bench: Bench) -> None:
    """What bounds `throughput`: a decode step of 1 and of 8 rows by Hugging Face's layers and by ours."""
    llm = bench.assistant.model.llm
    table, caches = llm.get_input_embeddings(), Caches(llm)

    def lanes(forward: Forward, rows: int) -> Lanes:
        lanes, lengths, filled = Lanes(forward, table, caches), [60 + 5 * i for i in range(rows)], []
        for length in lengths:
            filled.append(caches.load([]))
            forward(table(torch.full((1, length), 5)), torch.arange(length)[None], filled[-1])
        lanes.join(filled, lengths)
        return lanes

    with torch.inference_mode():
        for what, forward in (("Hugging Face's", Plain(llm)), ("ours", bench.engine.forward)):
            by_rows = {rows: lanes(forward, rows) for rows in (1, 8)}
            one, eight = (1e3 * min(clock(partial(rows.step, [5] * n))[0] for _ in range(12)) for n, rows in by_rows.items())
            line(f"decode step, {what}, 8 x 1 row | 8 rows", 8 * one, eight, 8 * one / eight, 4.0, "ms")


def blip2(llm: Any) -> tuple[Any, Modality]:
    """Hugging Face's BLIP-2 around ``llm``, with random weights, and the same weights as a modality of ours."""
    vit = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    config = transformers.Blip2Config(
        vision_config=vit | {"image_size": 224, "initializer_range": 0.05},  # by default it gives every picture the same
        qformer_config={"encoder_hidden_size": 768, "initializer_range": 0.05},
        text_config=transformers.LlamaConfig(vocab_size=64, hidden_size=llm.config.hidden_size, num_hidden_layers=1),
        num_query_tokens=32,
        image_token_index=llm.config.vocab_size - 1,
    )
    torch.manual_seed(0)
    peer = transformers.Blip2ForConditionalGeneration(config).to(llm.dtype).eval()
    torch.nn.init.normal_(peer.query_tokens)
    former = QFormer(768)
    import_blip2(peer.state_dict(), former)
    adapter = Adapter(768, llm.config.hidden_size)
    adapter.linear.load_state_dict(peer.language_projection.state_dict())
    peer.language_model = llm
    return peer, Modality(VisionEncoder(copy.deepcopy(peer.vision_model), layer=-1), [former, adapter]).eval()


@torch.inference_mode()
def check_same(peer: Any, modality: Modality, *pixels: torch.Tensor) -> None:
    """Two pictures have embeddings of their own, the same by both."""
    theirs = [peer.get_image_features(one).pooler_output for one in pixels]
    ours = [modality(Media(inputs={"pixel_values": one})).x for one in pixels]
    apart, off = (float((a - b).std()) for a, b in ((ours[0], ours[1]), (ours[0], theirs[0])))
    print(f"BLIP-2: embeddings of two photos are {apart:.3f} apart, ours and Hugging Face's {off:.1e}")
    assert off < 0.1 * apart


def first_token(bench: Bench) -> None:
    """One token about a photo, by the model's own parts and by those of a BLIP-2."""
    collator, model, llm = bench.assistant.collator, bench.assistant.model, bench.assistant.model.llm

    def prompt() -> Any:
        return collator.prompt([[user(Part("image", bytes=bench.photos[0]), QUESTIONS[0])]])

    def parts() -> Any:
        return llm.generate(inputs_embeds=model.embed(prompt()).embeds, max_new_tokens=1, do_sample=False, pad_token_id=0)

    first_tokens(bench, "same parts", parts)
    peer, modality = blip2(llm)
    processor = ImageProcessor(transformers.BlipImageProcessorPil(size={"height": 224, "width": 224}))
    pixels, other = (processor([decode_image(photo)])["pixel_values"].to(llm.dtype) for photo in bench.photos)
    check_same(peer, modality, pixels, other)
    (row,), image = prompt().input_ids, torch.full((32,), peer.config.image_token_id)
    place = int((row < 0).nonzero())
    ids = torch.cat([row[:place], image, row[place + 1 :]])[None]

    def whole() -> Any:
        return peer.generate(pixel_values=pixels, input_ids=ids, max_new_tokens=1, do_sample=False, pad_token_id=0)

    own = model.modalities["image"], collator.processors["image"]
    model.modalities["image"], collator.processors["image"] = modality, processor
    first_tokens(bench, "BLIP-2", whole)
    model.modalities["image"], collator.processors["image"] = own


def first_tokens(bench: Bench, name: str, peer: Callable[[], Any]) -> None:
    """A photo that is new, one whose embeddings are known, one that was asked about before, the same prompt; ``peer`` computes all
    of it anew each time."""
    photo, questions = bench.photos[0], iter(f"{QUESTIONS[0]} {i}" for i in range(100))

    def ours() -> Any:
        return bench.ask(bench.content(QUESTIONS[0], photo), tokens=1)

    def another() -> Any:
        return bench.ask(bench.content(next(questions), photo), tokens=1)

    def forget_states() -> None:
        time.sleep(0.3)
        bench.engine.prefixes.clear()

    times, answers = dict[str, float](), dict[str, str]()
    with torch.inference_mode():
        for _ in range(5):
            for way, prepare, work in (
                ("HF", lambda: None, peer),
                ("cold", bench.forget, ours),
                ("photo known", forget_states, ours),
                ("another question", lambda: None, another),
                ("prompt known", lambda: None, ours),
            ):
                prepare()
                taken, said = clock(work)
                times[way] = min(times.get(way, 1e9), 1e3 * taken)
                answers.setdefault(way, bench.assistant.tokenizer.decode(said[0, -1:]) if way == "HF" else said)
    print(f"{name}: first tokens {answers}")
    for way, goal in (("cold", 1.0), ("photo known", 3.0), ("another question", 3.5), ("prompt known", 3.5)):
        line(f"first token, HF {name} | {way}", times["HF"], times[way], times["HF"] / times[way], goal, "ms")


def decode(bench: Bench) -> None:
    """Tokens a second of one answer, beyond its first."""
    llm = bench.assistant.model.llm
    ids = torch.tensor([bench.assistant.tokenizer("Tell me about the sea.")["input_ids"]])

    def peer(tokens: int) -> Any:
        return llm.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    ways = {"peer": peer, "ours": lambda tokens: bench.ask("Tell me about the sea.", tokens=tokens)}
    times: dict[tuple[str, int], float] = {}
    for _ in range(4):
        for (name, ask), tokens in product(ways.items(), (1, bench.tokens)):
            taken, _ = clock(partial(ask, tokens))
            times[name, tokens] = min(times.get((name, tokens), 1e9), taken)
    theirs, ours = ((bench.tokens - 1) / (times[name, bench.tokens] - times[name, 1]) for name in ways)
    line(f"decode, batch 1, HF generate | ours ({llm.dtype})", theirs, ours, ours / theirs, 1.3, "tok/s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {part.__name__: part for part in (throughput, steps, first_token, decode)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("tokens", nargs="?", default=48, type=int)
    parser.add_argument("--only", action="append", choices=parts)
    parser.add_argument("--set", action="append", default=[], help="an override of the model's recipe: llm.dtype=bfloat16")
    parser.add_argument("--weight-bits", default=16, type=int, choices=(16, 8, 4), help="8 or 4 with --set llm.dtype=bfloat16")
    args = parser.parse_args()
    bench = Bench(args.model, args.tokens, args.set, args.weight_bits)
    print(f"serve: {bench.tokens} tokens an answer\n{'':<46} {'peer':>9} {'ours':>9}")
    for name in args.only or parts:
        parts[name](bench)
    bench.engine.close()
