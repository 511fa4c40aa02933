"""``x2l data``: build, validate, stats, shard, split and view data sets; ``x2l/cli.py`` adds it to the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(help="Build, check and look at data sets.", no_args_is_help=True)

Spec = Annotated[list[str], typer.Argument(help="globs of .tar shards or .jsonl files")]


@app.command()
def build(
    corpus: Annotated[str, typer.Argument(help="name of a builder; `x2l data corpora` lists them")],
    root: Annotated[Path, typer.Argument(help="the unpacked release")],
    out: Annotated[Path, typer.Argument(help="folder for the shards")],
    split: Annotated[str, typer.Option(help="train, val or test, as the corpus names it")] = "train",
    max_bad: Annotated[float, typer.Option(help="share of bad rows that is tolerated")] = 0.01,
    workers: Annotated[int, typer.Option(help="rows read and decoded at a time")] = 2,
) -> None:
    """Turn an official corpus into shards; bad rows are listed and left out. Run again after a kill, and it goes on.

    Example:

        x2l data build flickr8k ~/Flickr8k data/flickr8k --split train
    """
    from x2l.data.builders import build as run

    summary = run(corpus, root, split, out, max_bad, workers)
    typer.echo("\n".join(map(str, summary.shards)))
    typer.echo(summary)


@app.command()
def corpora() -> None:
    """List the corpora that have a builder."""
    from x2l.data.builders import BUILDERS

    typer.echo("\n".join(sorted(BUILDERS)))


@app.command()
def validate(spec: Spec) -> None:
    """Read every row and decode all media: counts, broken media, duplicates, languages, licences. Exits with 1 on bad rows."""
    from x2l.data.tools import validate as run

    report = run(spec)
    typer.echo(report)
    raise typer.Exit(1 if report.issues else 0)


@app.command()
def stats(spec: Spec, plot: Annotated[Optional[Path], typer.Option(help="PNG of the histograms")] = None) -> None:  # noqa: UP045
    """Distributions of text lengths, seconds and pixels."""
    from x2l.data.tools import stats as run

    for name, row in run(spec, plot).items():
        typer.echo(f"{name:28} " + "  ".join(f"{key} {value:g}" for key, value in row.items()))


@app.command()
def shard(spec: Spec, out: Annotated[Path, typer.Option(help="folder")], name: str = "train") -> None:
    """Rewrite any source as tar shards."""
    from x2l.data.tools import shard as run

    typer.echo("\n".join(map(str, run(spec, out, name))))


@app.command()
def split(
    spec: Spec,
    out: Annotated[Path, typer.Option(help="folder")],
    by: Annotated[str, typer.Option(help="a field (spk, concept), or image: rows of one group stay together")] = "image",
    parts: Annotated[str, typer.Option(help="name=share, comma-separated")] = "train=0.9,val=0.1",
    seed: int = 0,
) -> None:
    """Divide a source into disjoint parts by speaker, concept or image, never by row."""
    from x2l.data.tools import split as run

    try:
        fractions = {name: float(share) for name, _, share in (item.partition("=") for item in parts.split(","))}
    except ValueError:
        raise ValueError(f"--parts is name=share,name=share, got {parts!r}") from None
    for part, shards in run(spec, out, by, fractions, seed).items():
        typer.echo(f"{part}: {', '.join(map(str, shards))}")


@app.command()
def view(spec: Spec, out: Annotated[Path, typer.Option(help="the page")] = Path("view.html"), num: int = 24, seed: int = 0) -> None:
    """Write one HTML page with random rows and their media; it opens offline."""
    from x2l.data.tools import view as run

    typer.echo(run(spec, out, num, seed))


@app.command()
def questions(
    out: Annotated[Path, typer.Argument(help="folder for the shards")],
    num: Annotated[int, typer.Option(help="spoken questions for training")] = 900,
    num_answered: Annotated[int, typer.Option(help="so many of them also with the LLM's answer to the typed question")] = 900,
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe whose LLM answers")] = "tiny",
    batch_size: int = 30,
) -> None:
    """Make spoken questions with flite: train-*.tar, answered-*.tar, and held_out-*.tar by another voice.

    Example:

        x2l data questions data/spoken_questions
    """
    from x2l.assistant import Assistant
    from x2l.data import spoken
    from x2l.data.prompts import instructions
    from x2l.data.tools import write_shards
    from x2l.types import Sample, user

    texts, assistant, answers = spoken.questions(num), Assistant.load(model), list[str]()
    for at in range(0, num_answered, batch_size):
        asked = [Sample(text, (user(text),)) for text in texts[at : min(at + batch_size, num_answered)]]
        answers += map(spoken.first_sentence, assistant.generate_text(asked, max_new_tokens=32))
    for name, records in (
        ("train", spoken.spoken_questions(texts, spoken.VOICES)),
        ("answered", spoken.spoken_questions(texts[:num_answered], spoken.VOICES, answers)),
        ("held_out", spoken.spoken_questions(instructions("questions_held_out", "en"), [spoken.HELD_OUT_VOICE])),
    ):
        typer.echo("\n".join(map(str, write_shards(records, out, name))))
