"""Build a data set of a recipe, and its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from x2l.corpora.hear import RECOGNISERS, UNITS, Heard
from x2l.corpora.recipe import InstructPart, InstructRecipe, VSDialRecipe
from x2l.data.builders import instruct, vsdial
from x2l.data.sources import Source, read_source

MAKERS = {"captions": vsdial.from_captions, "dialogues": vsdial.from_dialogue}


def make_vsdial(
    recipe: VSDialRecipe, data_root: Path, out: Path, photos: int | None = None, workers: int = 2, max_samples: int | None = None
) -> list[str]:
    """Every split of a VSDial recipe; returns lines for the card.

    Args:
        photos: read of each split at most. max_samples: of each split and language; the rest is left out.
    """
    lines = []
    for name, split in recipe.splits.items():
        source = read_source(str(data_root / split.path))
        test = split.questions == "test"
        asked = vsdial.questions(source, test, MAKERS[split.source], recipe.pairs, photos, recipe.seed)
        asked = _first(asked, max_samples)
        _, spoken = vsdial.build_vsdial(source, out, name, split.voices, asked, recipe.takes, recipe.seed, workers, split.licence)
        langs = ", ".join(f"{lang} {num}" for lang, num in sorted(Counter(each.lang for each in asked).items()))
        kinds = ", ".join(f"{kind} {num}" for kind, num in Counter(each.kind for each in asked).most_common())
        lines.append(
            f"- {name}: {len(asked)} questions ({langs}) about {len({each.row for each in asked})} photos; "
            f"{spoken.kept} utterances, {spoken.counts['milliseconds'] / 60_000:.1f} minutes, {len(split.voices)} voices; "
            f"{spoken.rows_a_second:.2f} rows/s; kinds: {kinds}."
        )
    return lines


def _first(asked: list[vsdial.Asked], num: int | None) -> list[vsdial.Asked]:
    seen: Counter[str] = Counter()
    kept = []
    for each in asked:
        seen[each.lang] += 1
        if num is None or seen[each.lang] <= num:
            kept.append(each)
    return kept


def make_instruct(recipe: InstructRecipe, data_root: Path, out: Path, spoken: Path | None) -> list[str]:
    """Every split of an instruction recipe; returns lines for the card.

    Args:
        spoken: folder of a VSDial set, for parts with the path ``vsdial:...``.

    Raises:
        ValueError: such a part, and no folder.
    """
    lines = []
    for name, listed in recipe.splits.items():
        parts = [
            instruct.Part(part.kind, _source(part, data_root, spoken), part.lang, part.num, part.licence, part.talking)
            for part in listed
        ]
        shards = instruct.build_instruct(parts, out, name, recipe.seed)
        found = Counter((record.fields["kind"], record.fields["lang"]) for record in read_source([str(path) for path in shards]))
        lines.append(f"- {name}: {sum(found.values())} samples.")
        lines += [f"  - {kind}, {lang}: {num}" for (kind, lang), num in sorted(found.items())]
    return lines


def _source(part: InstructPart, data_root: Path, spoken: Path | None) -> Source:
    if not part.path.startswith("vsdial:"):
        return read_source(str(data_root / part.path))
    if spoken is None:
        raise ValueError(f"{part.kind} takes its samples from a VSDial set: make one, and name its folder with --vsdial")
    return read_source(str(spoken / part.path.removeprefix("vsdial:")))


def write_card(out: Path, title: str, command: str, lines: Sequence[str], heard: Sequence[Heard] = ()) -> Path:
    """``<out>/README.md``: what is in it, how it was made, and what recognisers hear."""
    licences = Counter(_licence(record.fields) for record in read_source(str(out / "*.tar")))
    text = [f"# {title}", "", f"Made by `{command}`.", "", *lines, "", "## Licences", ""]
    text += [f"- {licence}: {num} samples" for licence, num in licences.most_common()]
    if heard:
        names = ", ".join(f"{name} for {lang}" for lang, (name, _) in RECOGNISERS.items())
        text += [
            "",
            "## What recognisers hear",
            "",
            f"They never saw this data: {names}.",
            "",
            "| voice | utterances | error rate |",
        ]
        text += ["|---|---|---|", *(f"| {h.voice} | {h.num} | {UNITS[h.lang]} {100 * h.rate:.1f} % |" for h in heard)]
    path = out / "README.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def _licence(fields: dict[str, object]) -> str:
    return str(fields.get("licence") or fields.get("source") or "not stated")
