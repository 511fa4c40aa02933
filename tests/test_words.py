"""Stage 1 by words: pictures of one colour learn to say it, and unseen shades of it are named too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model

from x2l import train, words
from x2l.config import load_train_config
from x2l.types import Sample, assistant, user


def family(*captions: str) -> list[Sample]:
    return [Sample(c, (user("What?"), assistant(c))) for c in captions]


def test_vocabulary_and_targets_count_captions() -> None:
    families = [family("A red dog runs.", "The dog sleeps."), family("A red cat.", "Cats.")]
    vocabulary, share = words.vocabulary(families, min_count=1)
    index = {word: i for i, word in enumerate(vocabulary)}
    assert set(vocabulary) == {"red", "dog", "runs", "sleeps", "cat", "cats"}
    assert share[index["red"]] == 0.5
    assert share[index["dog"]] == 0.5
    rows = words.targets(families, index)
    assert (rows[0, index["dog"]], rows[0, index["red"]], rows[1, index["dog"]]) == (1.0, 0.5, 0.0)
    with pytest.raises(ValueError, match="no word occurs with 10 pictures"):
        words.vocabulary(families)


def test_colours_are_learnt_and_handed_to_stage_2(
    tmp_path: Path, llm_folder: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(words.vocabulary, "__defaults__", (1,))
    source = {"path": "flickr8k/train-*.tar", "tasks": {"caption": {}}, "licence": "test"}
    recipe = {
        "stage": "words", "model": tiny_model(llm_folder), "trainable": {"*": 1e-2}, "data": [source],
        "val": [source | {"path": "flickr8k/test-*.tar"}], "data_root": str(photo_root), "run": str(tmp_path / "one"),
        "steps": 60, "batch_size": 4, "val_every": 30,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder = train.train(load_train_config(str(path)))
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < 0.7 * rows[0]["loss"]

    init = {"modalities.image.interface": str(folder / "image.safetensors")}
    second = recipe | {"stage": "xllm", "trainable": {"modalities.image.interface.*": 1e-4}, "init": init,
                       "run": str(tmp_path / "two"), "steps": 1, "val": []}  # fmt: skip
    path.write_text(yaml.safe_dump(second))
    assert (train.train(load_train_config(str(path))) / "image.safetensors").is_file()


def test_the_score_is_invariant_to_the_order_of_queries() -> None:
    torch.manual_seed(0)
    reader = words.WordReader(torch.nn.Identity(), torch.randn(5, 8), torch.full((5,), 0.2), 1.0)
    from x2l.types import Features

    x = torch.randn(2, 4, 8)
    torch.nn.init.normal_(reader.reader.weight)
    features, shuffled = (Features(y, torch.tensor([4, 4])) for y in (x, x[:, [2, 0, 3, 1]]))
    for a, b in zip(reader.scores(features)[:2], reader.scores(shuffled)[:2], strict=True):
        torch.testing.assert_close(a, b)
