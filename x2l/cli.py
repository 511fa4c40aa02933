"""The x2l command."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from x2l import __version__
from x2l.corpora.commands import hear, make
from x2l.data.commands import app as data_app
from x2l.data.transforms.commands import app as transform_app
from x2l.eval.commands import app as eval_app
from x2l.eval.commands import predict, score, write_report
from x2l.types import RunError

app = typer.Typer(
    help="Treat any modality as a foreign language for any LLM.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app, name="eval")
app.command()(predict)
app.command()(score)
app.command("report")(write_report)
data_app.add_typer(transform_app, name="transform")
data_app.command()(make)
data_app.command()(hear)
app.add_typer(data_app, name="data")
export_app = typer.Typer(help="Write a model for other programs.", no_args_is_help=True)
app.add_typer(export_app, name="export")
console = Console()

Model = Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")]
AllowHost = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="name under which others may ask for this server; without keys only this machine's own names are answered"),
]
WeightBits = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="of the LLM's weights: 32, 16 (bfloat16, faster on processors that multiply in it), 8 or 4 (faster still for few"
        " answers at a time; such a processor with AVX-512 alone; docs/serve.md); by default as the recipe says"
    ),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="key=value overrides of the recipe")]  # noqa: UP045


def main() -> None:
    """Entry point: user errors become one clear line, everything else keeps its traceback."""
    logging.basicConfig(level=os.environ.get("X2L_LOG", "WARNING"), format="%(levelname)s %(message)s")
    try:
        app()
    except (ValueError, RunError) as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if show:
        console.print(__version__)
        raise typer.Exit


@app.command()
def chat(
    question: Annotated[Optional[str], typer.Argument(help="ask once; leave out to talk")] = None,  # noqa: UP045
    image: Annotated[Optional[list[Path]], typer.Option("--image", "-i", help="a photo; may be repeated")] = None,  # noqa: UP045
    video: Annotated[Optional[list[Path]], typer.Option("--video", "-v", help="a video; may be repeated")] = None,  # noqa: UP045
    speech: Annotated[Optional[list[Path]], typer.Option("--speech", "-s", help="a recording; may be repeated")] = None,  # noqa: UP045
    audio: Annotated[Optional[list[Path]], typer.Option("--audio", "-a", help="a sound; may be repeated")] = None,  # noqa: UP045
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0 = greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus of the sampling")] = 1.0,
) -> None:
    """Talk with a model about pictures, videos and sounds, or by speech.

    Examples:

        x2l chat --image photo.jpg "What is happening here?"

        x2l chat --video clip.mp4 "What is happening here?"

        x2l chat --audio sound.wav "What do you hear?"

        x2l chat --speech question.wav                    (asks by voice)

        x2l chat            (then: /image photo.jpg, and a question)
    """
    from x2l.assistant import Assistant
    from x2l.chat import Chat
    from x2l.data.collate import raw
    from x2l.types import Part

    media = {"image": image, "video": video, "audio": audio, "speech": speech}
    attached = [Part(modality, path=str(path)) for modality, paths in media.items() for path in paths or []]
    for part in attached:
        raw(part)  # a missing file is told before the model is loaded
    session = Chat(
        Assistant.load(model),
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p},
        console,
    )
    for part in attached:
        session.attach(part.type, Path(part.path or ""))
    if question is not None or speech:
        session.ask(question or "")
    else:
        if attached:
            console.print(f"attached {', '.join(str(part.path) for part in attached)}; ask about it", style="dim", highlight=False)
        session.loop()


@app.command()
def demo() -> None:
    """Answer questions about photos that registry packages ship."""
    from x2l.demo import demo as run

    run(console)


@app.command()
def train(recipe: Annotated[str, typer.Argument(help="a shipped name, or a path")], overrides: Overrides = None) -> None:
    """Train a stage, or a chain of them; running the same command again goes on from the newest checkpoint.

    Examples:

        x2l train tiny/stage2_image data_root=../shared/data

        x2l train tiny/stage2_image data_root=../shared/data steps=20 epochs=null run=runs/try

        x2l train tiny/all data_root=data      (then: x2l chat --model runs/tiny/all)
    """
    from x2l.chain import train_recipe

    logging.getLogger("x2l").setLevel(logging.INFO)
    result = train_recipe(recipe, overrides or [])
    console.print(f"exported to [bold]{result}[/]")
    if result.is_dir():
        console.print("to use it, name its files in a model recipe, as weights: (docs/train.md)", style="dim", highlight=False)


@app.command()
def reproduce(
    data_root: Annotated[Path, typer.Argument(help="folder that holds flickr8k, and vsdial-mini for (d) and (e)")],
    only: Annotated[Optional[list[str]], typer.Option(help="a finding, a to e; may be repeated")] = None,  # noqa: UP045
    scale: Annotated[str, typer.Option(help="smoke, small, medium or full")] = "small",
    seed: Annotated[Optional[list[int]], typer.Option(help="may be repeated; 0 and 1 by default")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="folder of runs and tables; a killed run goes on from here")] = Path("runs/reproduce"),
) -> None:
    """Check the paper's findings: a table each, and whether it holds by its interval in every seed (docs/train.md).

    Example:

        x2l reproduce ../shared/data --only a --only b
    """
    from x2l.reproduce import FINDINGS
    from x2l.reproduce import reproduce as run

    logging.getLogger("x2l").setLevel(logging.INFO)
    for line in run(only or list(FINDINGS), out, data_root, scale, seed or [0, 1]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def info(
    recipe: Annotated[str, typer.Argument(help="a model or training recipe: a shipped name, or a path")],
    overrides: Overrides = None,
    text: Annotated[int, typer.Option(help="tokens of text in a sample")] = 64,
    seconds: Annotated[float, typer.Option(help="length of the sound in a sample")] = 10.0,
) -> None:
    """What a recipe costs: parameters, memory and operations, on the meta device, without weights.

    Examples:

        x2l info models/paper.yaml

        x2l info paper llm.spec=hf:zai-org/chatglm-6b
    """
    from x2l.info import info as tell
    from x2l.info import show

    show(tell(recipe, overrides or [], text, seconds), console)


def _url(host: str, port: int) -> str:
    return escape(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


@app.command()
def serve(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="address to listen at; others than this machine's own need API keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=0, max=65535)] = 8000,
    api_keys: Annotated[Optional[Path], typer.Option(help="file of API keys, one a line (else $X2L_API_KEYS)")] = None,  # noqa: UP045
    allow_host: AllowHost = None,
    origin: Annotated[Optional[list[str]], typer.Option(help="web origin that may use the API; may be repeated")] = None,  # noqa: UP045
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="fetch media from public http(s) URLs")] = False,
    max_batch: Annotated[int, typer.Option(help="answers that are decoded at a time", min=1)] = 8,
    grace: Annotated[float, typer.Option(help="seconds that answers in work may take after SIGTERM", min=0)] = 60.0,
    vllm: Annotated[Optional[str], typer.Option(help="URL of a vLLM server that holds the LLM (x2l export vllm)")] = None,  # noqa: UP045
    weight_bits: WeightBits = None,
) -> None:
    """Serve a model over the API of OpenAI's clients (docs/serve.md).

    Examples:

        x2l serve

        x2l serve --weight-bits 16

        X2L_API_KEYS=a-long-random-key x2l serve --host 0.0.0.0 --allow-remote

        x2l serve --vllm http://10.0.0.5:8001/v1 --max-batch 64
    """
    try:
        from x2l.serve.server import run
    except ModuleNotFoundError as error:
        raise RunError(f"x2l serve needs {error.name}: pip install 'x2l[serve]', in a checkout make web") from error

    console.print(f"loading {model}, then answering at [bold]{_url(host, port)}/v1[/] (Ctrl-C ends)", highlight=False)
    names, origins = tuple(allow_host or ()), tuple(origin or ())
    run(model, host, port, api_keys, names, origins, allow_remote, max_batch, grace, vllm=vllm, weight_bits=weight_bits)


@app.command()
def web(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="address to listen at; others than this machine's own need API keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at", min=0, max=65535)] = 8000,
    api_keys: Annotated[Optional[Path], typer.Option(help="file of API keys, one a line (else $X2L_API_KEYS)")] = None,  # noqa: UP045
    allow_host: AllowHost = None,
    compare: Annotated[Optional[str], typer.Option(help="another model, which answers every question beside the first")] = None,  # noqa: UP045
    weight_bits: WeightBits = None,
) -> None:
    """Chat with a model in the browser: photos, videos and sound, as far as it reads them (docs/serve.md).

    Examples:

        x2l web

        x2l web --model runs/new.yaml --compare tiny      (two answers next to each other)

        X2L_API_KEYS=a-long-random-key x2l web --host 0.0.0.0      (then http://ADDRESS:8000/#key=a-long-random-key)
    """
    try:
        from x2l.serve.server import run
    except ModuleNotFoundError as error:
        raise RunError(f"x2l web needs {error.name}: pip install 'x2l[web]', in a checkout make web") from error

    console.print(
        f"loading {model}{f' and {compare}' if compare else ''}, then open [bold]{_url(host, port)}/[/] (Ctrl-C ends)",
        highlight=False,
    )
    run(model, host, port, api_keys, tuple(allow_host or ()), page=True, compare=compare, weight_bits=weight_bits)


@export_app.command(name="vllm")
def export_vllm(
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or not exist")],
    model: Model = "tiny",
    overrides: Overrides = None,
) -> None:
    """Write the LLM as a folder that a stock `vllm serve` loads, and a small one for the `x2l serve` before it (docs/serve.md).

    Examples:

        x2l export vllm --model tiny --out exported
    """
    from x2l.export import export_vllm as run

    console.print(run(model, overrides or [], out), highlight=False, markup=False)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from x2l.config import RECIPES, shipped

    for name in shipped():
        first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        console.print(f"[bold]{name}[/]  {first.lstrip('# ')}", highlight=False)
