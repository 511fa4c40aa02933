"""``x2l data make`` and ``x2l data hear``; ``x2l/cli.py`` adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def make(
    name: Annotated[str, typer.Argument(help="vsdial-mini, xllm-instruct-mini, or a YAML file")],
    data_root: Annotated[Path, typer.Option(help="what the recipe's paths are relative to")],
    out: Annotated[Path, typer.Option(help="folder for the shards and the card")],
    photos: Annotated[Optional[int], typer.Option(help="vsdial: photos read of each split; all by default")] = None,  # noqa: UP045
    split: Annotated[Optional[list[str]], typer.Option(help="vsdial: make this split alone; may be repeated")] = None,  # noqa: UP045
    max_samples: Annotated[Optional[int], typer.Option(help="vsdial: samples of each split and language")] = None,  # noqa: UP045
    vsdial: Annotated[Optional[Path], typer.Option(help="instruct: the folder of a VSDial set")] = None,  # noqa: UP045
    per_voice: Annotated[int, typer.Option(help="vsdial: utterances of each voice that a recogniser hears; 0 for none")] = 20,
    workers: Annotated[int, typer.Option(help="utterances spoken at a time")] = 2,
) -> None:
    """Build a data set that X2L defines, with its card. Run again after a kill, and it goes on where it was."""
    from x2l.corpora.hear import Heard
    from x2l.corpora.hear import hear as listen
    from x2l.corpora.make import make_instruct, make_vsdial, write_card
    from x2l.corpora.recipe import VSDialRecipe, load
    from x2l.data.sources import read_source

    recipe, heard = load(name), list[Heard]()
    if isinstance(recipe, VSDialRecipe):
        recipe = recipe.only(split or [*recipe.splits])
        lines = make_vsdial(recipe, data_root, out, photos, workers, max_samples)
        spoken = read_source(str(out / "work" / "spoken-*.tar"))
        heard = listen(spoken, out / "work", per_voice) if per_voice else []
    else:
        lines = make_instruct(recipe, data_root, out, vsdial)
    given = [("photos", photos), ("max-samples", max_samples)]
    options = [*(f"--split {each}" for each in split or []), *(f"--{key} {value}" for key, value in given if value is not None)]
    command = " ".join([f"x2l data make {name}", *options])
    typer.echo(write_card(out, Path(name).stem, command, lines, heard))


def hear(
    spec: Annotated[list[str], typer.Argument(help="globs of spoken shards")],
    out: Annotated[Path, typer.Option(help="folder for what was heard; run again after a kill, and it goes on")],
    per_voice: Annotated[int, typer.Option(help="utterances of each voice")] = 20,
) -> None:
    """Error rate of each voice by an independent recogniser: Moonshine for English, Whisper for Mandarin.

    Example:

        x2l data hear 'spoken/*.tar' --out heard
    """
    from x2l.corpora.hear import UNITS
    from x2l.corpora.hear import hear as run
    from x2l.data.sources import read_source

    for voice, lang, num, rate in run(read_source(spec), out, per_voice):
        typer.echo(f"{voice:24} {num:4} utterances  {UNITS[lang]} {100 * rate:5.1f} %")
