"""Prediction: ask a model once, store everything; scoring reads the records and needs no model.

A run directory holds ``task.jsonl`` (what was asked of whom, with references), ``records.jsonl`` (what came back),
``run.json`` (the manifest) and ``media/`` (what the model saw and heard, small).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from x2l.data.collate import raw
from x2l.eval import records
from x2l.eval.controls import CONTROLS
from x2l.eval.tasks import find
from x2l.types import Part, Sample

THUMBNAIL = 192  # pixels of the longer side
MAX_SOUND_BYTES = 200_000  # longer sounds are not kept for the report


class Generator(Protocol):
    """Anything that answers samples."""

    def generate_text(self, samples: list[Sample], **decode: Any) -> list[str]:
        """One answer for each sample."""


Read = Callable[[Part], bytes]
Render = Callable[[Sample], str]
Asked = tuple[Sample, dict[str, Any]]  # a question, and its row of the plan


def prompt_of(sample: Sample) -> str:
    """The messages as text, media as ``<type>`` marks: the record of what was asked where a model renders none."""
    return "\n".join(f"{m.role}: " + "".join(p.text or f"<{p.type}>" for p in m.content) for m in sample.messages)


def split_reference(sample: Sample) -> tuple[Sample, list[str]]:
    """The question alone, and the reference answers: ``meta["references"]``, else the final assistant message.

    Raises:
        ValueError: there is neither.
    """
    messages = sample.messages
    final = messages[-1].text if messages and messages[-1].role == "assistant" else None
    references = sample.meta.get("references", [final])
    if references == [None] or not references:
        raise ValueError(f"sample {sample.id!r} has no reference: end it with an assistant message or meta.references")
    return replace(sample, messages=messages[:-1] if final is not None else messages), list(references)


def predict(
    model: Generator,
    samples: Sequence[Sample],
    out_dir: str | Path,
    *,
    task: str,
    model_info: dict[str, Any],
    dataset: str | None = None,
    decode: dict[str, Any] | None = None,
    control: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    read: Read = raw,
    render: Render = prompt_of,
) -> Path:
    """Answer every sample that has no record yet, and return the run directory.

    A record is reused only if the sample's request hash (prompt, media, decoding, seed, checkpoint) is unchanged; ids
    decide, never line numbers. Killing the process loses at most the batch in flight. Samples that ask the same in every
    byte (a grey picture and one question) are answered once where decoding draws nothing.

    Args:
        task: a name of :data:`x2l.eval.tasks.TASKS`.
        model_info: what identifies the model: at least ``checkpoint`` (manifest hash), ``device`` and ``dtype``.
        dataset: the name of the set; a published name is refused by the scorer unless the set is whole.
        decode: keyword arguments of ``generate_text``; ``seed`` is recorded beside them and seeds the controls.
        control: one of :data:`x2l.eval.controls.CONTROLS`, or None for the samples as they are.
        limit: the first so many samples.
        read, render: the bytes of a media part; the prompt as the model sees it.

    Raises:
        ValueError: no samples, two with one id, an unknown task or control, a missing reference, or a directory that
            holds another run.
    """
    out_dir, decode = Path(out_dir), dict(decode or {})
    missing = {"checkpoint", "device", "dtype"} - model_info.keys()
    if missing:
        raise ValueError(f"model_info lacks {sorted(missing)}: a run must say what produced it")
    normalise = find(task).normalise
    pairs = _questions(samples[:limit])
    asked = _controlled([sample for sample, _ in pairs], control, seed, read)
    identity = {"task": task, "dataset": dataset, "control": control, "seed": seed, "decode": decode, "model": model_info}
    plan = [
        {**_request(sample, identity, read, render), "references": references, "cluster": _cluster(original, read)}
        for sample, (original, references) in zip(asked, pairs, strict=True)
    ]
    _claim(out_dir, identity, plan, batch_size)
    done = {row["request_sha256"] for row in records.read(out_dir / "records.jsonl")}
    todo = [(sample, row) for sample, row in zip(asked, plan, strict=True) if row["request_sha256"] not in done]
    groups = [[each] for each in todo] if decode.get("temperature") else _same(todo)
    with tqdm(total=len(plan), initial=len(plan) - len(todo), desc=f"{task} {control or ''}".strip()) as bar:
        for start in range(0, len(groups), batch_size):
            batch = groups[start : start + batch_size]
            answers = model.generate_text([group[0][0] for group in batch], **decode)
            if len(answers) != len(batch):
                raise ValueError(f"the model gave {len(answers)} answers to {len(batch)} samples")
            rows = [
                {**row, "decode": decode, "seed": seed, "raw": raw, "output": normalise(raw, row["meta"])}
                for group, raw in zip(batch, answers, strict=True)
                for _, row in group
            ]
            for group in batch:
                _store_media(group[0][0], out_dir / "media", read)
            records.append(out_dir / "records.jsonl", rows)
            bar.update(len(rows))
    return out_dir


def _same(todo: list[Asked]) -> list[list[Asked]]:
    """Samples together that ask the same in every byte, whatever their ids."""
    groups: dict[str, list[Asked]] = {}
    for sample, row in todo:
        groups.setdefault(row["question_sha256"], []).append((sample, row))
    return list(groups.values())


def _questions(samples: Sequence[Sample]) -> list[tuple[Sample, list[str]]]:
    ids = [sample.id for sample in samples]
    if not ids or len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"samples need unique ids, got {twice[:5]} more than once" if ids else "no samples to predict")
    return [split_reference(sample) for sample in samples]


def _controlled(samples: list[Sample], control: str | None, seed: int, read: Read) -> list[Sample]:
    if control is None:
        return samples
    if control not in CONTROLS:
        raise ValueError(f"unknown control {control!r}: use one of {sorted(CONTROLS)}")
    return CONTROLS[control](samples, lambda part: records.sha256(read(part)), seed)


def _cluster(sample: Sample, read: Read) -> str:
    """Samples about one image are drawn together by the bootstrap; a sample without one stands alone."""
    images = [part for part in sample.media if part.type == "image"]
    return str(sample.meta.get("cluster") or (records.sha256(read(images[0])) if images else sample.id))


def _request(sample: Sample, identity: dict[str, Any], read: Read, render: Render) -> dict[str, Any]:
    prompt = render(sample)
    media = [{"type": part.type, "sha256": records.sha256(read(part))} for part in sample.media]
    # A rendered prompt may be lossy (half characters, trimmed spaces); the messages themselves tell requests apart.
    request = {
        "prompt": prompt,
        "messages": prompt_of(sample),
        "media": media,
        **{k: identity[k] for k in ("decode", "seed", "model")},
    }
    return {
        "id": sample.id,
        "media": media,
        "prompt": prompt,
        "prompt_sha256": records.sha256(prompt),
        "question_sha256": records.sha256(request),
        "request_sha256": records.sha256({"id": sample.id, **request}),
        "meta": {k: v for k, v in sample.meta.items() if k != "references"},
    }


def _claim(out_dir: Path, identity: dict[str, Any], plan: list[dict[str, Any]], batch_size: int) -> None:
    """Write the plan and the manifest, unless the directory belongs to another run."""
    manifest = out_dir / "run.json"
    out_dir.mkdir(parents=True, exist_ok=True)
    if manifest.exists():
        found = records.read_json(manifest)
        other = [name for name, value in identity.items() if found.get(name) != value]
        if other:
            raise ValueError(
                f"{out_dir} holds another run ({other[0]}: {found.get(other[0])!r}, now {identity[other[0]]!r}): "
                "choose another directory"
            )
    records.write_jsonl(out_dir / "task.jsonl", plan)
    task_sha256 = records.sha256([row["request_sha256"] for row in plan])
    about = {"num_samples": len(plan), "task_sha256": task_sha256, "batch_size": batch_size, **records.environment()}
    records.write_json(manifest, {**identity, **about})


def _store_media(sample: Sample, folder: Path, read: Read) -> None:
    """What a report shows: images as thumbnails, short sounds as they are."""
    folder.mkdir(exist_ok=True)
    for part in sample.media:
        content = read(part)
        name = folder / records.sha256(content)
        if part.type == "image" and not name.with_suffix(".jpg").exists():
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                small.save(name.with_suffix(".jpg"), "JPEG", quality=80)
        elif part.type in ("speech", "audio") and len(content) <= MAX_SOUND_BYTES:
            name.with_suffix(".sound").write_bytes(content)
