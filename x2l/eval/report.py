"""One static HTML page about stored runs: scores with intervals beside published ones, random and worst samples.

The page opens offline: pictures are data URIs, nothing is fetched, and model output is escaped.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from x2l.eval import records
from x2l.eval.tasks import LOWER_IS_BETTER, no_skill, per_sample, results, solved_blind, stored_score

# Rows of others to stand beside, by task and language. Figures as printed in the papers, on the full test sets.
PUBLISHED: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("caption", "en"): {
        "Google NIC (2015), Flickr8k test": {"BLEU-1": 63},
        "Show, Attend and Tell, soft (2015), Flickr8k test": {"BLEU-4": 19.5},
        "Show, Attend and Tell, hard (2015), Flickr8k test": {"BLEU-1": 67, "BLEU-4": 21.3, "METEOR": 20.3},
    },
}

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222}
.wide{overflow-x:auto}p img{max-width:100%}
table{border-collapse:collapse;margin:1rem 0}td,th{white-space:nowrap;border:1px solid #ccc;padding:.3rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}.cards{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(19rem,1fr))}
.card{border:1px solid #ddd;border-radius:6px;padding:.7rem;font-size:13px}
.card img,.card audio{max-width:100%;display:block}
.card small{display:block;margin:.3rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.answer{font-weight:600}.control{color:#a33}.reference{color:#555}small{color:#777}pre{overflow:auto;font-size:12px}
"""


def group(run_dirs: Sequence[str | Path]) -> dict[str, dict[str, Path]]:
    """Runs by task and data set, then by control ("" for none).

    Raises:
        ValueError: no runs, or two of one task, data set and control.
    """
    tasks: dict[str, dict[str, Path]] = {}
    for run_dir in map(Path, run_dirs):
        manifest = records.read_json(run_dir / "run.json")
        runs = tasks.setdefault(" ".join(filter(None, (manifest["task"], manifest["dataset"]))), {})
        control = manifest["control"] or ""
        if control in runs:
            raise ValueError(f"{run_dir} and {runs[control]} are the same task and control: report them apart")
        runs[control] = run_dir
    if not tasks:
        raise ValueError("no runs to report: name at least one run directory")
    return tasks


def report(run_dirs: Sequence[str | Path], out: str | Path, num_cards: int = 24, seed: int = 0) -> Path:
    """Write the page about ``run_dirs``: a section for each task, its control runs beside the plain one.

    The cards are drawn by ``seed``, not picked; the same ids are shown for the controls.

    Raises:
        ValueError: no runs, two runs of one task, data set and control, or a task without its plain run.
    """
    body = "".join(_section(task, runs, num_cards, seed) for task, runs in group(run_dirs).items())
    out = Path(out)
    out.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>X2L evaluation</title><style>{_STYLE}</style>"
        f"<h1>X2L evaluation</h1>{body}</html>\n",
        encoding="utf-8",
    )
    return out


def _section(task: str, runs: dict[str, Path], num_cards: int, seed: int) -> str:
    if "" not in runs:
        raise ValueError(f"task {task!r} has only control runs {sorted(runs)}: add the run without a control")
    scored = scores_of(runs)
    rows = {control: {row["id"]: row for row in results(run_dir)} for control, run_dir in runs.items()}
    ids = list(rows[""])
    drawn = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[:num_cards]]
    manifest = json.dumps(records.read_json(runs[""] / "run.json"), ensure_ascii=False, indent=2)
    warnings = "".join(f"<p class=control>{escape(line)}</p>" for line in _blind(scored))
    return (
        f"<h2>{escape(task)}</h2>{_table(scored)}{warnings}"
        f"<h3>{len(drawn)} of {len(ids)} samples, drawn with seed {seed}</h3>{_cards(drawn, rows, runs)}"
        f"{_spread(scored, rows, runs, num_cards // 3)}"
        f"<details><summary>Run manifest</summary><pre>{escape(manifest)}</pre></details>"
    )


def _spread(
    scored: dict[str, dict[str, Any]], rows: dict[str, dict[str, dict[str, Any]]], runs: dict[str, Path], num_worst: int
) -> str:
    """The plot and the worst samples, where the task has a score."""
    name, values = per_sample(runs[""])
    if not name:
        return ""
    ids = list(rows[""])
    order = np.argsort(-values if name in LOWER_IS_BETTER else values)
    worst = [ids[i] for i in order[:num_worst]]
    return f"{_plot(name, scored, values)}<h3>The worst by {escape(name)}</h3>{_cards(worst, rows, runs)}"


def _table(scored: dict[str, dict[str, Any]]) -> str:
    """One row for each run and each published system, one column for each score."""
    header, lines = _score_rows(scored)
    cells = [_cells("th", header), *(_cells("td", line) for line in lines)]
    cells += [_cells("td", line) for line in _published_rows(scored, header)]
    note = "[..] = 95 % bootstrap interval, resampled by image or speaker"
    return f"<div class=wide><table>{''.join(cells)}</table></div><small>{note}</small>"


def _published_rows(scored: dict[str, dict[str, Any]], header: list[str]) -> list[list[str]]:
    """Rows of other systems on the same task and language."""
    first = next(iter(scored.values()))
    systems = PUBLISHED.get((first["task"], "+".join(first["langs"])), {})
    return [
        [system, "", "", *(f"{published[name]:g}" if name in published else "" for name in header[3:])]
        for system, published in systems.items()
    ]


def _score_rows(scored: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    first = next(iter(scored.values()))
    names = list(first["scores"])
    details = [name for name in first["details"] if name == "METEOR" or name.endswith(" counts")]
    lines = []
    for control, result in scored.items():
        values = [format_score(result["scores"].get(name)) for name in names]
        values += [format_score(result["details"].get(name)) for name in details]
        label = f"control: {control}" if control else "this model"
        lines.append([label, str(result["num_samples"]), f"{result['coverage']:.3f}", *values])
    return ["", "n", "coverage", *names, *details], lines


def scoreboard(run_dirs: Sequence[str | Path]) -> str:
    """The scores of runs as Markdown tables, one for each task."""
    tables = []
    for task, runs in group(run_dirs).items():
        commits = commits_of(runs.values())
        tables.append(f"{markdown(task, scores_of(runs))}\n\nCommit {commits}.")
    return "\n\n".join(tables)


def scores_of(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The stored scores of one task's runs by control, the plain run first."""
    return {control: stored_score(run_dir) for control, run_dir in sorted(runs.items())}


def commits_of(run_dirs: Iterable[Path]) -> str:
    """The commits that made the runs, shortened."""
    found = {str(records.read_json(run_dir / "run.json")["git_commit"]) for run_dir in run_dirs}
    return ", ".join(sorted(name[:12] + ("-dirty" if name.endswith("-dirty") else "") for name in found))


def markdown(task: str, scored: dict[str, dict[str, Any]]) -> str:
    """One task's scores by control as a Markdown table, published rows beside them, and what was not earned by looking."""
    header, lines = _score_rows(scored)
    rows = [[task, *header[1:]], ["---"] * len(header), *lines, *_published_rows(scored, header)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *_blind(scored)])


def format_score(value: Any) -> str:
    """``21.3 [20.1, 22.4]``, error counts, a bare number, or a dash where a score could not be computed."""
    if value is None:
        return "–"
    if isinstance(value, dict) and "num_units" in value:
        counts = "N {num_units}, S {substitutions}, D {deletions}, I {insertions}, {num_above_100} above 100 %"
        return counts.format(**value)
    if isinstance(value, dict):
        digits = 2 if abs(value["high"]) < 10 else 1
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value:.1f}"


def _blind(scored: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each control that reaches the plain run's interval, or one that says that nothing was solved."""
    if "" in scored and (reason := no_skill(scored[""])):
        return [reason]
    blind = {control: solved_blind(scored[""], result) for control, result in scored.items() if control and "" in scored}
    return [
        f"Not earned by looking: {control} reaches the plain run's interval in {', '.join(names)}."
        for control, names in blind.items()
        if names
    ]


def _plot(name: str, scored: dict[str, dict[str, Any]], values: np.ndarray) -> str:
    """The first score of each run with its interval, and how that score spreads over samples."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.4), layout="constrained")
    bars = [result["scores"][name] for result in scored.values()]
    errors = [[b["value"] - b["low"] for b in bars], [b["high"] - b["value"] for b in bars]]
    left.barh([control or "this model" for control in scored], [b["value"] for b in bars], xerr=errors, color="#69c")
    left.set_xlabel(f"{name}, 95 % interval")
    right.hist(values[np.isfinite(values)], bins=30, color="#69c")
    right.set(xlabel=f"{name} of a sample", ylabel="samples")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return f"<p>{_image('png', buffer.getvalue())}</p>"


def _cells(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"


def _cards(ids: list[str], rows: dict[str, dict[str, dict[str, Any]]], runs: dict[str, Path]) -> str:
    return f"<div class=cards>{''.join(_card(i, rows, runs) for i in ids)}</div>"


def _card(sample_id: str, rows: dict[str, dict[str, dict[str, Any]]], runs: dict[str, Path]) -> str:
    row = rows[""][sample_id]
    media = "".join(_shown(runs[""], part) for part in row["media"])
    lines = [f"<small>{escape(sample_id)}\n{escape(row['prompt'].strip())}</small>", _line("answer", row["raw"])]
    for control in sorted(rows.keys() - {""}):
        other = rows[control].get(sample_id)
        if other is not None:
            lines.append(_line("control", other["raw"], f"{control}: "))
    lines += [_line("reference", text) for text in row["references"]]
    return f"<div class=card>{media}{''.join(lines)}</div>"


def _line(kind: str, text: str | None, label: str = "") -> str:
    shown = "(no answer)" if text is None else text
    return f"<div class={kind}>{escape(label + shown)}</div>"


def _shown(run_dir: Path, part: dict[str, str]) -> str:
    path = run_dir / "media" / f"{part['sha256']}{'.jpg' if part['type'] == 'image' else '.sound'}"
    if not path.exists():
        return ""
    content = path.read_bytes()
    if part["type"] == "image":
        return _image("jpeg", content)
    kind = {b"OggS": "ogg", b"fLaC": "flac", b"RIFF": "wav"}.get(content[:4], "mpeg")
    return f'<audio controls src="data:audio/{kind};base64,{base64.b64encode(content).decode()}"></audio>'


def _image(kind: str, content: bytes) -> str:
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
