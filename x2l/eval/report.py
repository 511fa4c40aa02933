"""One static HTML page about stored runs: scores with intervals beside published ones, random and worst samples.

The page opens offline: pictures are data URIs, nothing is fetched, and model output is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from x2l.eval import records
from x2l.eval.tasks import results, stored_score

# Rows of others to stand beside, by task. Figures as printed in the papers, on the full test sets.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "caption": {
        "Google NIC (2015), Flickr8k test": {"BLEU-1": 63},
        "Show, Attend and Tell, soft (2015), Flickr8k test": {"BLEU-4": 19.5},
        "Show, Attend and Tell, hard (2015), Flickr8k test": {"BLEU-1": 67, "BLEU-4": 21.3, "METEOR": 20.3},
    },
}

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}.cards{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(19rem,1fr))}
.card{border:1px solid #ddd;border-radius:6px;padding:.7rem;font-size:13px}
.card img{max-width:100%;display:block}
.answer{font-weight:600}.control{color:#a33}.reference{color:#555}small{color:#777}pre{overflow:auto;font-size:12px}
"""


def report(run_dirs: Sequence[str | Path], out: str | Path, num_cards: int = 24, seed: int = 0) -> Path:
    """Write the page about ``run_dirs``: a section for each task, its control runs beside the plain one.

    The cards are drawn by ``seed``, not picked; the same ids are shown for the controls.

    Raises:
        ValueError: no runs, two runs of one task and control, or a task without its plain run.
    """
    tasks: dict[str, dict[str, Path]] = {}
    for run_dir in map(Path, run_dirs):
        manifest = records.read_json(run_dir / "run.json")
        runs = tasks.setdefault(manifest["task"], {})
        control = manifest["control"] or ""
        if control in runs:
            raise ValueError(f"{run_dir} and {runs[control]} are the same task and control: report them apart")
        runs[control] = run_dir
    if not tasks:
        raise ValueError("no runs to report: name at least one run directory")
    body = "".join(_section(task, runs, num_cards, seed) for task, runs in tasks.items())
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
    scored = {control: stored_score(run_dir) for control, run_dir in runs.items()}
    rows = {control: {row["id"]: row for row in results(run_dir)} for control, run_dir in runs.items()}
    ids = list(rows[""])
    drawn = np.random.default_rng(seed).permutation(len(ids))[:num_cards]
    cards = "".join(_card(ids[i], rows, runs) for i in drawn)
    manifest = json.dumps(records.read_json(runs[""] / "run.json"), ensure_ascii=False, indent=2)
    return (
        f"<h2>{escape(task)}</h2>{_table(task, scored)}"
        f"<h3>{len(drawn)} of {len(ids)} samples, drawn with seed {seed}</h3><div class=cards>{cards}</div>"
        f"<details><summary>Run manifest</summary><pre>{escape(manifest)}</pre></details>"
    )


def _table(task: str, scored: dict[str, dict[str, Any]]) -> str:
    """One row for each run and each published system, one column for each score."""
    names = list(scored[""]["scores"])
    lines = [_cells("th", ["", "n", "coverage", *names])]
    for control, result in sorted(scored.items()):
        values = [format_score(result["scores"].get(name)) for name in names]
        label = f"control: {control}" if control else "this model"
        lines.append(_cells("td", [label, str(result["num_samples"]), f"{result['coverage']:.3f}", *values]))
    for system, published in PUBLISHED.get(task, {}).items():
        lines.append(_cells("td", [system, "", "", *(f"{published[n]:g}" if n in published else "" for n in names)]))
    return f"<table>{''.join(lines)}</table><small>[..] = 95 % bootstrap interval, resampled by image</small>"


def format_score(value: Any) -> str:
    """``21.3 [20.1, 22.4]``, or the bare number, or a dash where a score could not be computed."""
    if value is None:
        return "–"
    if isinstance(value, dict) and "low" in value:
        digits = 3 if abs(value["high"]) < 10 else 1
        return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _cells(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"


def _card(sample_id: str, rows: dict[str, dict[str, dict[str, Any]]], runs: dict[str, Path]) -> str:
    row = rows[""][sample_id]
    pictures = "".join(_picture(runs[""], part["sha256"]) for part in row["media"] if part["type"] == "image")
    lines = [f"<small>{escape(sample_id)} · {escape(row['prompt'])}</small>", _line("answer", row["raw"])]
    for control in sorted(rows.keys() - {""}):
        other = rows[control].get(sample_id)
        if other is not None:
            lines.append(_line("control", other["raw"], f"{control}: "))
    lines += [_line("reference", text) for text in row["references"]]
    return f"<div class=card>{pictures}{''.join(lines)}</div>"


def _line(kind: str, text: str | None, label: str = "") -> str:
    shown = "(no answer)" if text is None else text
    return f"<div class={kind}>{escape(label + shown)}</div>"


def _picture(run_dir: Path, sha256: str) -> str:
    path = run_dir / "media" / f"{sha256}.jpg"
    if not path.exists():
        return ""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'
