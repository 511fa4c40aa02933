"""E20: a real (tiny, random) X2L model through the unmodified lmms-eval and lm-eval, on local fixture tasks.

Slow, because importing the two harnesses takes half a minute; skipped where they are not installed, which ``make harness``,
their own environment, does not allow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llm, make_tokenizer, picture, tiny_model
from safetensors.torch import save_file

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import load_model_config
from x2l.types import Part, Sample, user

pytestmark = pytest.mark.slow


def need(name: str) -> Any:
    """A module of a harness; without it the test is skipped, or fails under ``make harness``."""
    return import_module(name) if os.environ.get("X2L_HARNESS") else pytest.importorskip(name)


LMMS_TASK = """
task: x2l_fixture
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function fixture.to_visual
doc_to_text: !function fixture.to_text
doc_to_messages: !function fixture.to_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, until: ["\\n"]}}
process_results: !function fixture.results
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""

LMMS_FUNCTIONS = """
from PIL import Image

def to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def to_messages(doc, lmms_eval_specific_kwargs=None):
    return [{"role": "user", "content": [
        {"type": "image", "url": to_visual(doc)[0]}, {"type": "text", "text": doc["question"]}]}]

def results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""

LM_TASK = """
task: x2l_text_fixture
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no, never"]  # the harness puts a space before
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    make_llm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    path, model = folder / "model.yaml", tiny_model(folder)
    path.write_text(json.dumps(model))
    random_model = build(load_model_config(str(path))).model
    for name, part in model["modalities"].items():
        interface = random_model.modalities[name].get_submodule("interface").state_dict()
        part["weights"] = str(folder / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in interface.items()}, part["weights"])
    path.write_text(json.dumps(model))
    return path


@pytest.fixture(scope="module")
def assistant(recipe: Path) -> Assistant:
    return Assistant(build(load_model_config(str(recipe), [])))


def write_rows(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_lmms_task(folder: Path, assistant: Assistant) -> None:
    """Three questions about three pictures; the model answers two of them as expected."""
    rows = []
    for i, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250)]):
        (folder / f"{i}.png").write_bytes(picture(colour))
        question = "What?" * (i + 1)
        expected = assistant.generate_text([Sample("0", (user(Part("image", bytes=picture(colour)), question),))], 4)[0]
        answer = expected.split("\n")[0] if i else "no model says this"
        rows.append({"image": str(folder / f"{i}.png"), "question": question, "answer": answer})
    (folder / "x2l_fixture.yaml").write_text(LMMS_TASK.format(data=write_rows(folder, rows)))
    (folder / "fixture.py").write_text(LMMS_FUNCTIONS)


def test_lmms_eval(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = need("lmms_eval.evaluator")
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    from x2l.eval import harness_lmms

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_lmms_task(tmp_path, assistant)

    registry = ModelRegistryV2()
    registry.register_manifest(harness_lmms.manifest())
    assert registry.get_model_class("x2l") is harness_lmms.X2L
    results = evaluator.simple_evaluate(
        harness_lmms.X2L(assistant=assistant, batch_size=2),
        tasks=["x2l_fixture"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["x2l_fixture"]["exact,none"] == pytest.approx(2 / 3)


@pytest.mark.timeout(900)
def test_lmms_eval_finds_us_by_its_own_command(recipe: Path, assistant: Assistant, tmp_path: Path) -> None:
    """Its own program finds the installed entry point, loads a recipe by it (with random interfaces), and stores answers."""
    need("lmms_eval")
    write_lmms_task(tmp_path, assistant)
    out = tmp_path / "out"
    arguments = ["--model", "x2l", "--model_args", f"model={recipe}", "--tasks", "x2l_fixture", "--include_path", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments, "--output_path", str(out), "--log_samples"],
        check=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    (samples,) = out.rglob("*samples*.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 3
    assert all(isinstance(answer, str) and answer for answer in answers)


def test_lm_eval(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = need("lm_eval")
    from lm_eval.tasks import TaskManager

    from x2l.eval.harness_lm import language_model

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"question": question} for question in ("Is it?", "Can it be so?", "Well?")]
    (tmp_path / "x2l_text_fixture.yaml").write_text(LM_TASK.format(data=write_rows(tmp_path, rows)))
    results = lm_eval.simple_evaluate(
        language_model(assistant),
        tasks=["x2l_text_fixture"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = results["samples"]["x2l_text_fixture"]
    for row, found in zip(rows, sorted(samples, key=lambda s: s["doc_id"]), strict=True):
        scores = [float(response[0][0]) for response in found["resps"]]
        assert scores == pytest.approx([log_likelihood(assistant, row["question"], c) for c in (" yes", " no, never")], abs=1e-3)


def log_likelihood(assistant: Assistant, context: str, continuation: str) -> float:
    """The slow way: one forward pass of the LLM on the whole text."""
    import torch

    ids = torch.tensor([assistant.tokenizer(context + continuation)["input_ids"]])
    start = len(assistant.tokenizer(context)["input_ids"])
    with torch.no_grad():
        logp = assistant.model.llm(ids).logits.log_softmax(-1)
    return float(sum(logp[0, i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
