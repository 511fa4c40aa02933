"""``x2l data transform``: translate, speak, filter, dedupe and instruct, each resumable; ``x2l/cli.py`` adds it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:  # the command line starts without torch
    from x2l.data.transforms.base import Transform
    from x2l.endpoint import ChatEndpoint

app = typer.Typer(help="Make new data of old; run a killed command again and it goes on where it was.", no_args_is_help=True)


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


Spec = Annotated[list[str], typer.Argument(help="globs of .tar shards or .jsonl files")]
Out = Annotated[Path, typer.Option(help="folder for the shards")]
Name = Annotated[str, typer.Option(help="name of the shards")]
Workers = Annotated[int, typer.Option(help="calls at a time")]
EngineOption = Annotated[EngineName, typer.Option(help="local: threads of this process; ray: the cluster of RAY_ADDRESS")]
MaxBad = Annotated[float, typer.Option(help="share of bad rows that is tolerated")]
Url = Annotated[Optional[str], typer.Option(help="an OpenAI-compatible endpoint; its key is in X2L_ENDPOINT_KEY")]  # noqa: UP045
Model = Annotated[Optional[str], typer.Option(help="weights, or the endpoint's model")]  # noqa: UP045
Price = Annotated[tuple[float, float], typer.Option(help="price of a million prompt and completion tokens")]


def execute(
    transform: Transform, spec: list[str], out: Path, name: str, workers: int, engine: str, max_bad: float,
    price: tuple[float, float] = (0, 0),
) -> None:  # fmt: skip
    """Run a transform and print what it did, what it cost, and how fast it was."""
    from x2l.data.sources import read_source
    from x2l.data.transforms.ray import on_ray
    from x2l.data.transforms.runner import local, run
    from x2l.endpoint import cost

    source = read_source(spec, max_bad)
    summary = run(transform, source, out, name, workers, {"local": local, "ray": on_ray}[engine], max_bad=max_bad)
    typer.echo(summary)
    if tokens := summary.counts["prompt_tokens"] + summary.counts["completion_tokens"]:
        paid = cost(summary.counts["prompt_tokens"], summary.counts["completion_tokens"], *price)
        typer.echo(f"{tokens} tokens, cost {paid:.4f}" + ("" if any(price) else " (give --price for a cost)"))


def _endpoint(url: str, model: str | None, timeout: float) -> ChatEndpoint:
    if model is None:
        raise ValueError("--url needs --model, the endpoint's name of it")
    from x2l.endpoint import ChatEndpoint

    return ChatEndpoint(url, model, timeout=timeout)


@app.command()
def translate(
    spec: Spec,
    out: Out,
    source: Annotated[str, typer.Option(help="language and field")] = "en",
    target: Annotated[str, typer.Option(help="language")] = "zh",
    into: Annotated[Optional[str], typer.Option(help="field of the result; the target's by default")] = None,  # noqa: UP045
    model: Model = None,
    url: Url = None,
    texts: Annotated[str, typer.Option(help="further fields, comma-separated: text,caption")] = "",
    beams: int = 4,
    timeout: float = 120.0,
    batch: Annotated[int, typer.Option(help="rows a call")] = 8,
    price: Price = (0, 0),
    name: Name = "data",
    workers: Workers = 2,
    engine: EngineOption = EngineName.local,
    max_bad: MaxBad = 0.01,
) -> None:
    """Captions, transcripts and dialogues into another language.

    --model is a transformers seq2seq folder (hf:facebook/mbart-large-50-many-to-many-mmt), or a CTranslate2 OPUS model as a
    folder or .argosmodel; without it, zh to en uses OPUS-MT from the package index. With --url it is an endpoint's model.

    Example:

        x2l data transform translate 'zh/*.tar' --source zh --target en --out en
    """
    from x2l.data.transforms.translate import Translate, Translator
    from x2l.data.transforms.translators import OPUS_ZH_EN, OPUS_ZH_EN_SHA256, CTranslate2Translator, EndpointTranslator

    translator: Translator
    if url is not None:
        translator = EndpointTranslator(_endpoint(url, model, timeout))
        batch = 1
    elif model is None:
        if (source, target) != ("zh", "en"):
            raise ValueError(f"no built-in model from {source!r} to {target!r}: give --model, or --url and --model")
        translator = CTranslate2Translator(OPUS_ZH_EN, OPUS_ZH_EN_SHA256, beams)
    elif model.endswith(".argosmodel") or (Path(model) / "sentencepiece.model").is_file():
        translator = CTranslate2Translator(model, beams=beams)
    else:
        from x2l.data.transforms.hf import Seq2SeqTranslator

        translator = Seq2SeqTranslator(model, beams)
    fields = [field for field in texts.split(",") if field]
    execute(Translate(translator, source, target, fields, batch, into), spec, out, name, workers, engine, max_bad, price)


@app.command()
def speak(
    spec: Spec,
    out: Out,
    voices: Annotated[str, typer.Option(help="comma-separated <engine>:<voice>; engines kokoro, espeak, flite")],
    field: Annotated[str, typer.Option(help="the text")] = "text",
    speeds: Annotated[tuple[float, float], typer.Option(help="slowest and fastest")] = (0.9, 1.1),
    snr: Annotated[tuple[float, float], typer.Option(help="white noise, dB; the same twice is fixed")] = (20, 40),
    quiet: Annotated[bool, typer.Option("--no-noise", help="add no noise")] = False,
    seed: int = 0,
    name: Name = "data",
    workers: Workers = 2,
    engine: EngineOption = EngineName.local,
    max_bad: MaxBad = 0.01,
) -> None:
    """Speak a text of each row.

    Example:

        x2l data transform speak questions.jsonl --voices kokoro:af_heart,kokoro:zf_xiaobei,flite:slt --out spoken
    """
    from x2l.data.transforms.speak import Speak

    transform = Speak(voices.split(","), field, speeds, None if quiet else snr, seed)
    execute(transform, spec, out, name, workers, engine, max_bad)


@app.command(name="filter")
def filter_(
    spec: Spec,
    out: Out,
    model: Annotated[str, typer.Option(help="CLIP or Chinese-CLIP weights, as hf:OFA-Sys/chinese-clip-vit-base-patch16")],
    field: Annotated[str, typer.Option(help="the captions")] = "en",
    threshold: Annotated[float, typer.Option(help="least cosine similarity that is kept; 0.45 in the paper")] = 0.45,
    name: Name = "data",
    workers: Workers = 2,
    engine: EngineOption = EngineName.local,
    max_bad: MaxBad = 0.01,
) -> None:
    """Keep captions that fit their picture."""
    from x2l.data.transforms.filter import Filter
    from x2l.data.transforms.hf import Clip

    execute(Filter(Clip(model), field, threshold), spec, out, name, workers, engine, max_bad)


@app.command()
def dedupe(
    spec: Spec,
    out: Out,
    by: Annotated[str, typer.Option(help="media, image (perceptual hash), text, near-text (MinHash)")] = "media",
    distance: Annotated[int, typer.Option(help="bits in which perceptual hashes may differ")] = 4,
    threshold: Annotated[float, typer.Option(help="Jaccard similarity of near texts")] = 0.8,
    name: Name = "data",
    workers: Workers = 2,
    engine: EngineOption = EngineName.local,
    max_bad: MaxBad = 0.01,
) -> None:
    """Drop rows that repeat an earlier one, exactly or nearly."""
    from x2l.data.sources import read_source
    from x2l.data.transforms.dedupe import Dedupe, find_duplicates

    earlier = find_duplicates(read_source(spec, max_bad), by, distance, threshold, workers)
    execute(Dedupe(earlier, by, distance, threshold), spec, out, name, workers, engine, max_bad)


@app.command()
def instruct(
    spec: Spec,
    out: Out,
    url: Annotated[str, typer.Option(help="an OpenAI-compatible endpoint; its key is in X2L_ENDPOINT_KEY")],
    model: Annotated[str, typer.Option(help="its model")],
    prompt: Annotated[str, typer.Option(help="conversation, detail or reasoning, with .en or .zh; or a file")] = "conversation.en",
    attempts: Annotated[int, typer.Option(help="replies asked for before a row is given up")] = 3,
    temperature: float = 0.7,
    max_tokens: int = 1024,
    seed: int = 0,
    timeout: float = 120.0,
    price: Price = (0, 0),
    name: Name = "data",
    workers: Workers = 4,
    engine: EngineOption = EngineName.local,
    max_bad: MaxBad = 0.05,
) -> None:
    """Let a language model write instructions and answers from captions, boxes and transcripts."""
    from x2l.data.transforms.instruct import Instruct

    transform = Instruct(_endpoint(url, model, timeout), prompt, attempts, seed, temperature, max_tokens)
    execute(transform, spec, out, name, workers, engine, max_bad, price)
