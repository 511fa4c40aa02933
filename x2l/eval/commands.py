"""The commands of evaluation; ``x2l/cli.py`` adds them to the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from x2l.eval import judge_commands

if TYPE_CHECKING:
    from x2l.data.sources import Record

app = typer.Typer(help="Measure a model, from stored records.", no_args_is_help=True)

app.command("llava-answers")(judge_commands.llava_answers)
app.command("llava-bench")(judge_commands.llava_bench)
app.command()(judge_commands.replay)

Runs = Annotated[list[Path], typer.Argument(help="run folders")]
Coverage = Annotated[float, typer.Option(help="exit with 3 below this share of answered or readable results")]


@app.command()
def caption(
    data: Annotated[str, typer.Argument(help="glob of shards or JSONL whose rows hold a photo and its captions")],
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/eval-caption"),
    control: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="also measure with: wrong-image, blank, no-image; may be repeated"),
    ] = None,
    lang: Annotated[str, typer.Option(help="language of the captions: en or zh")] = "en",
    limit: Annotated[Optional[int], typer.Option(help="the first so many photos")] = None,  # noqa: UP045
    num_beams: Annotated[int, typer.Option(help="1 = greedy")] = 3,
    meteor: Annotated[bool, typer.Option(help="METEOR as well; needs Java")] = False,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Caption photos and score them: BLEU-1..4, CIDEr, with intervals; writes a page of 24 random photos.

    Example:

        x2l eval caption '../shared/data/flickr8k/test-*.tar' --control wrong-image --control blank
    """
    from x2l.assistant import Assistant
    from x2l.data.sources import read_source
    from x2l.eval import predict, questions, report, tasks

    assistant = Assistant.load(model)
    samples = questions.caption(read_source(data), lang)
    decode = {"max_new_tokens": 40, "num_beams": num_beams}
    runs = [
        predict.predict(
            assistant, samples, out / (name or "image"), task="caption", dataset=data, model_info=assistant.info(),
            decode=decode, control=name, seed=seed, limit=limit, batch_size=batch_size, render=assistant.render,
        )
        for name in [None, *(control or [])]
    ]  # fmt: skip
    for run in runs:
        tasks.score(run, meteor=meteor)
    typer.echo(report.scoreboard(runs))
    typer.echo(f"records in {out}, page: {report.report(runs, out / 'report.html')}")


@app.command()
def asr(
    data: Annotated[str, typer.Argument(help="glob of shards or JSONL whose rows hold speech and its text")],
    model: Annotated[Optional[str], typer.Option("--model", "-m", help="model recipe whose LLM writes down the speech")] = None,  # noqa: UP045
    cif: Annotated[Optional[Path], typer.Option(help="run folder of stage 1: the CIF-based ASR model; x2l:tiny/asr ships")] = None,  # noqa: UP045
    peer: Annotated[Optional[list[str]], typer.Option(help="moonshine, whisper (base), or whisper=FOLDER (CTranslate2)")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/eval-asr"),
    limit: Annotated[Optional[int], typer.Option(help="so many clips, drawn by seed")] = None,  # noqa: UP045
    cluster: Annotated[Optional[str], typer.Option(help="field (spk) whose clips the intervals resample together")] = None,  # noqa: UP045
    num_beams: Annotated[int, typer.Option(help="of the CIF-based ASR model; 1 = greedy")] = 1,
    slack: Annotated[int, typer.Option(help="tokens more or fewer than CIF counts that it also tries")] = 0,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Word or character error rates of the LLM, the CIF-based ASR model and other recognisers on the same clips.

    Example:

        x2l eval asr '../shared/data/speechocean762/test-*.tar' --model tiny --peer moonshine --cluster spk
    """
    from x2l.data.sources import read_source
    from x2l.eval import asr as recognisers
    from x2l.eval import questions

    samples = questions.asr(read_source(data), cluster=cluster)
    asked = questions.draw(samples, limit or len(samples), seed)
    systems, notes = recognisers.systems(model, cif, peer or [], asked, {"num_beams": num_beams, "slack": slack})
    runs = recognisers.run(systems, asked, out, data, seed, batch_size)
    typer.echo(recognisers.table(runs, "moonshine"))
    typer.echo("\n".join(notes))


@app.command()
def spoken(
    data: Annotated[str, typer.Argument(help="glob of shards or JSONL whose rows hold a spoken question and its text")],
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/eval-spoken"),
    batch_size: int = 8,
) -> None:
    """Does a spoken question get the answer of the same question typed? By a fixed rule, beside best and chance."""
    from x2l.assistant import Assistant
    from x2l.data.sources import read_source
    from x2l.eval import spoken as questions

    assistant = Assistant.load(model)
    runs = questions.compare(
        assistant, read_source(data), out, dataset=data, model_info=assistant.info(), render=assistant.render, batch_size=batch_size
    )
    typer.echo(questions.table(runs))


@app.command()
def masr(
    data: Annotated[
        str, typer.Argument(help="glob of shards or JSONL whose rows hold a photo, a question spoken about it, and its text")
    ],
    train: Annotated[Optional[str], typer.Option(help="glob of what the model has trained on: how many questions it knows")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/eval-masr"),
    lang: Annotated[str, typer.Option(help="language of the questions: en or zh")] = "en",
    limit: Annotated[Optional[int], typer.Option(help="so many clips, drawn by seed")] = None,  # noqa: UP045
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Multimodal ASR: error rates of speech alone, with its photo, with another one and with a grey one, and paired tests.

    Example:

        x2l eval masr 'data/vsdial-mini/test-*.tar' --train 'data/vsdial-mini/train-*.tar' --model runs/tiny/all
    """
    from x2l.assistant import Assistant
    from x2l.data.sources import read_source
    from x2l.eval import masr as conditions
    from x2l.eval import questions
    from x2l.eval.predict import predict

    rows = [record for record in read_source(data) if record.fields["lang"] == lang]
    asked = questions.draw(questions.masr(rows, lang), limit or len(rows), seed)
    assistant = Assistant.load(model)
    runs = {
        control: predict(
            assistant, asked, out / (control or "image"), task="asr", dataset=data, control=control, model_info=assistant.info(),
            decode={"max_new_tokens": 48}, seed=seed, batch_size=batch_size, render=assistant.render,
        )
        for control in conditions.CONDITIONS.values()
    }  # fmt: skip
    typer.echo(conditions.table(runs))
    if train is not None:
        ids = {sample.id for sample in asked}
        typer.echo(_overlap(train, [row for row in rows if f"{row.key}/masr" in ids], "text", lang))


@app.command()
def score(
    runs: Runs,
    meteor: bool = False,
    normalizer: Annotated[Optional[str], typer.Option(help="of ASR: en, zh, wenet-like or speechio-like")] = None,  # noqa: UP045
    min_coverage: Coverage = 0.0,
) -> None:
    """Score stored records again; no model is needed.

    Example:

        x2l eval score runs/eval/* --min-coverage 1

        x2l eval score runs/eval/asr-aishell --normalizer speechio-like
    """
    from x2l.eval import report, tasks

    results = [tasks.score(run, meteor=meteor, normalizer=normalizer) for run in runs]
    typer.echo(report.scoreboard(runs))
    raise typer.Exit(max(tasks.exit_code(result, min_coverage) for result in results))


@app.command("report")
def write_report(
    runs: Runs, out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"), num_cards: int = 24, seed: int = 0
) -> None:
    """Write one static HTML page about runs; it opens offline."""
    from x2l.eval.report import report

    typer.echo(report(runs, out, num_cards, seed))


@app.command()
def show(run: Path, num: Annotated[int, typer.Option(help="how many, drawn by seed")] = 20, seed: int = 0) -> None:
    """Print random questions of a run with their raw answers and references: read them before quoting a score."""
    import random

    from x2l.eval import tasks

    rows = tasks.results(run)
    for row in random.Random(seed).sample(rows, min(num, len(rows))):
        typer.echo(f"{row['id']}\n  {row['prompt'].strip()!r}\n  -> {row['raw']}\n  references: {' | '.join(row['references'])}")


@app.command()
def compare(run_a: Path, run_b: Path) -> None:
    """Paired differences between two runs on the same samples, with intervals and p-values."""
    from x2l.eval import report, tasks

    for name, value in tasks.compare(run_a, run_b).items():
        typer.echo(f"{name:12} {report.format_score(value)}  p = {value['p']:.3f}")


@app.command()
def predict(
    entry: Annotated[str, typer.Argument(help="a measurement: caption-en, pope, qa, ... (x2l eval entries), or a YAML file")],
    data_root: Annotated[list[Path], typer.Argument(help="folders that hold flickr8k, vsdial-mini, ...")],
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/eval"),
    limit: Annotated[Optional[int], typer.Option(help="at most so many samples, drawn by seed")] = None,  # noqa: UP045
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Store a model's answers for one measurement and its controls; x2l score reads them, and needs no model.

    Example:

        x2l predict pope ../shared/data && x2l score runs/eval/pope*
    """
    from x2l.assistant import Assistant
    from x2l.eval import suite

    chosen = suite.load(entry)
    assistant = Assistant.load(model)
    runs, left_out = suite.run(
        assistant, assistant.reads, data_root, out, info=assistant.info, render=assistant.render, entries=[chosen],
        langs=[chosen.lang], limit=limit, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if left_out:
        raise ValueError(left_out[0])
    typer.echo("\n".join(map(str, runs)))


@app.command()
def entries() -> None:
    """List the measurements of the scoreboard."""
    from x2l.eval import suite

    for name in suite.SCOREBOARD:
        first = (suite.BOARD / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:16} {first.lstrip('# ')}")


@app.command()
def scoreboard(
    data_root: Annotated[list[Path], typer.Argument(help="folders that hold flickr8k, speechocean762, vsdial-mini, ...")],
    model: Annotated[str, typer.Option("--model", "-m", help="model recipe: a shipped name, or a path")] = "tiny",
    out: Annotated[Path, typer.Option(help="folder of the runs; a killed one goes on from here")] = Path("runs/scoreboard"),
    only: Annotated[Optional[list[str]], typer.Option(help="an entry (caption-en, pope, ...); may be repeated")] = None,  # noqa: UP045
    lang: Annotated[Optional[list[str]], typer.Option(help="a language that the model speaks, en if none is given")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="at most so many samples an entry, drawn by seed")] = None,  # noqa: UP045
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Every number of the project for one model: captions, yes/no, ASR, spoken questions, sounds, refusals, with controls.

    Example:

        x2l eval scoreboard ../shared/data

        x2l eval table runs/scoreboard --readme README.md
    """
    from x2l.assistant import Assistant
    from x2l.eval import readme, report, suite

    names, langs = only or suite.SCOREBOARD, lang or ["en"]
    board = [suite.load(name) for name in names]
    assistant = Assistant.load(model)
    runs, left_out = suite.run(
        assistant, assistant.reads, data_root, out, info=assistant.info, render=assistant.render, entries=board, langs=langs,
        limit=limit, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    options = {"--model": (model, "tiny"), "--limit": (limit, None), "--batch-size": (batch_size, 16), "--seed": (seed, 0)}
    chosen = [f"{name} {value}" for name, (value, usual) in options.items() if value != usual]
    chosen += [f"--only {name}" for name in only or []] + [f"--lang {name}" for name in lang or []]
    readme.remember(out, " ".join(["x2l eval scoreboard", *map(str, data_root), *chosen]), runs, left_out)
    typer.echo(readme.render(readme.collect(out)))
    typer.echo(f"page: {report.report(runs, out / 'report.html')}")


@app.command()
def table(
    out: Annotated[Path, typer.Argument(help="folder of a scoreboard")] = Path("runs/scoreboard"),
    readme: Annotated[Optional[Path], typer.Option(help="write the tables between its scoreboard marks")] = None,  # noqa: UP045
) -> None:
    """Print a scoreboard from its stored records, or write it into a README; no model is needed.

    Example:

        x2l eval table runs/scoreboard --readme README.md
    """
    from x2l.eval import readme as page

    board = page.collect(out)
    if readme is None:
        typer.echo(page.render(board))
    else:
        page.write(readme, board)


@app.command()
def overlap(
    train: Annotated[str, typer.Argument(help="glob of training shards or JSONL")],
    test: Annotated[str, typer.Argument(help="glob of test shards or JSONL")],
    field: Annotated[str, typer.Option(help="the text to compare, after normalisation")] = "text",
    normalizer: str = "zh",
) -> None:
    """Share of test texts that training has seen: what a score may owe to memory."""
    from x2l.data.sources import read_source

    typer.echo(_overlap(train, list(read_source(test)), field, normalizer))


def _overlap(train: str, test: Sequence[Record], field: str, normalizer: str) -> str:
    from x2l.data.sources import read_source
    from x2l.eval import metrics, normalize

    normalise = normalize.preset(normalizer)
    seen, asked = [[normalise(record.fields[field]) for record in records] for records in (read_source(train), test)]
    return f"{100 * metrics.overlap(seen, asked):.1f} % of {len(asked)} test texts occur among {len(seen)} in training"
