"""Self-critical training: the rewards against pycocoevalcap, and a model that learns to write what is rewarded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from x2l import train
from x2l.build import Built, build
from x2l.config import ModelConfig, load_train_config
from x2l.data.collate import Collator
from x2l.data.feed import Feed, Stream
from x2l.data.pack import share_prefixes
from x2l.data.sources import read_source
from x2l.eval.metrics import caption_tokens
from x2l.head_loss import head_loss
from x2l.self_critical import END, Reward, SelfCritical, Writer, advantages, bleu, ngrams
from x2l.types import IGNORE_INDEX, Sample

REFERENCES = [
    ["A dog runs on the grass.", "A brown dog runs.", "The dog is running over green grass."],
    ["A man in a red shirt.", "A man stands by a wall.", "Somebody in red stands on the street."],
    ["Two dogs play in the snow.", "Dogs playing.", "Two brown dogs run in the snow."],
]
WORDS = st.lists(st.sampled_from("a the dog dogs runs on in grass snow red".split()), min_size=1, max_size=9).map(" ".join)


@given(st.tuples(WORDS, WORDS, WORDS))
def test_cider_is_pycocoevalcaps(captions: tuple[str, str, str]) -> None:
    reward = Reward(REFERENCES)
    mine = [reward.cider(ngrams(text), [ngrams(ref) for ref in refs]) for text, refs in zip(captions, REFERENCES, strict=True)]

    def ended(text: str) -> str:
        return " ".join([*caption_tokens(text), END])

    references = {i: [ended(text) for text in texts] for i, texts in enumerate(REFERENCES)}
    theirs = Cider().compute_score(references, {i: [ended(text)] for i, text in enumerate(captions)})[1]
    assert mine == pytest.approx(theirs.tolist(), abs=1e-9)


def test_bleu_of_a_sentence_by_hand() -> None:
    # Words and end: 4 of 5 unigrams, (3+1) of (4+1) bigrams, (2+1) of (3+1), (1+1) of (2+1); as long as the reference.
    value = bleu(ngrams("a dog runs fast"), [ngrams("a dog runs there"), ngrams("no")])
    grams = (4 / 5) * (2 + 1) / (4 + 1) * (1 + 1) / (3 + 1) * (0 + 1) / (2 + 1)  # "fast" breaks those that hold it
    assert value == pytest.approx(grams**0.25)
    assert bleu(ngrams("a dog"), [ngrams("a dog")]) == pytest.approx(1.0)
    assert bleu(ngrams(""), [ngrams("a dog")]) < 0.5


def test_an_answer_is_compared_with_the_others_of_its_picture() -> None:
    leads = advantages(torch.tensor([[1.0, 0.0, 0.5], [9.0, 9.0, 9.0]]))
    torch.testing.assert_close(leads.sum(1), torch.zeros(2))
    assert leads[0, 0] > 0 > leads[0, 1]
    assert leads[1].tolist() == [0.0, 0.0, 0.0]
    assert advantages(torch.zeros(2, 3)).abs().max() == 0


def test_weights_multiply_the_terms_of_the_loss_and_of_its_gradient() -> None:
    torch.manual_seed(0)
    head, labels, weights = torch.nn.Linear(4, 7), torch.randint(7, (40,)), torch.randn(40)
    hidden = torch.randn(40, 4, requires_grad=True)
    terms = torch.stack([head_loss(head, row[None], label[None]) for row, label in zip(hidden, labels, strict=True)])
    (expected,) = torch.autograd.grad(terms @ weights, hidden)
    loss = head_loss(head, hidden, labels, weights)
    torch.testing.assert_close(loss, terms @ weights)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


@pytest.fixture
def built(llm_folder: Path) -> Built:
    torch.manual_seed(0)
    return build(ModelConfig.model_validate(tiny_model(llm_folder)))


def writer(built: Built, **options: int) -> Writer:
    def ascii_share(text: str, references: list[str]) -> float:
        return sum(map(str.isascii, text)) / max(1, len(text))

    return Writer(SelfCritical(built.model), Collator(built.renderer, built.processors, built.decoders), ascii_share, **options)  # type: ignore[arg-type]


def photos(photo_root: Path, **tasks: dict[str, int]) -> list[list[Sample]]:
    return Feed([Stream(read_source([str(photo_root / "flickr8k/train-*.tar")]), tasks)], 4, 0).batch(0)


def test_questions_keep_their_weight_beside_drawn_captions(built: Built, photo_root: Path) -> None:
    families = photos(photo_root, caption={}, caption_qa={"num_pairs": 2})
    judged = writer(built, num=3, max_new_tokens=5)(families, {})
    labels = judged.batch.labels[judged.batch.labels != IGNORE_INDEX]
    assert judged.weights is not None
    assert len(judged.weights) == len(labels)
    asked = [s for family in families for s in family if s.meta["task"] == "qa"]
    assert asked, "the photos of the test have questions"
    answers = [label for s in asked for label in built.renderer.train(s).labels if label != IGNORE_INDEX]
    assert sorted(labels[judged.weights == 1.0].tolist()) == sorted(answers)  # those that share a prefix stand together
    drawn = judged.weights[judged.weights != 1.0]
    assert drawn.min() < 0 < drawn.max()


def test_a_caption_alone_is_refused(built: Built) -> None:
    with pytest.raises(ValueError, match="num=1: a caption is compared with others"):
        writer(built, num=1)


def test_samples_without_captions_are_learnt_by_likelihood(built: Built, photo_root: Path) -> None:
    families = photos(photo_root, caption_qa={"num_pairs": 1})
    judged = writer(built)(families, {})
    assert judged.reward is None
    assert judged.weights is not None
    assert judged.weights.tolist() == [1.0] * int((judged.batch.labels != IGNORE_INDEX).sum())
    mixed = writer(built, num=2, max_new_tokens=3)([*families, *photos(photo_root, caption={})], {})
    assert mixed.weights is not None
    assert (mixed.weights == 1.0).any()
    assert (mixed.weights < 0).any()


def test_what_is_rewarded_becomes_likelier(built: Built, photo_root: Path) -> None:
    """Answers of one byte, rewarded when it is ASCII: about half of them at first, by the model's own probabilities."""
    families, write = photos(photo_root, caption={"num": 2}), writer(built, num=16, max_new_tokens=1)
    model = write.model
    ascii_ids = [i for i in range(built.model.llm.config.vocab_size) if built.renderer.tokenizer.decode([i]).isascii()]
    parameters = list(model.modalities["image"].interface.parameters())  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(parameters, 1e-2)

    def share() -> float:
        rows = [built.renderer.prompt(family[0].messages[:-1]) for family in families]
        model.eval()
        embeds = model.embed(write.collator.pad([share_prefixes([row]) for row in rows], {}), pad_left=True).embeds
        return float(model.llm(inputs_embeds=embeds).logits[:, -1].softmax(-1)[:, ascii_ids].sum(-1).mean())

    before = share()
    for _ in range(60):
        model.train()
        output = model(write(families, {}))
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        optimizer.step()
    assert share() > before + 0.2


def test_the_stage_runs_logs_its_reward_and_hands_the_interface_on(
    tmp_path: Path, llm_folder: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    source = {"path": "flickr8k/train-*.tar", "tasks": {"caption": {}, "caption_qa": {"num_pairs": 1}}, "licence": "test"}
    recipe = {
        "stage": "self_critical", "model": tiny_model(llm_folder), "trainable": {"modalities.image.interface.*": 1e-3},
        "stage_args": {"num": 3, "max_new_tokens": 6}, "data": [source], "val": [source | {"path": "flickr8k/test-*.tar"}],
        "data_root": str(photo_root), "run": str(tmp_path / "run"), "steps": 2, "batch_size": 4, "val_every": 2,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert (train.train(load_train_config(str(path))) / "image.safetensors").is_file()
    first, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {"reward", "loss"} <= first.keys()
    assert 0 < last["reward"] < 1  # by END alone, and far from a caption
    assert 4 < last["val_loss"] < 8  # of human captions, by a tiny random LLM over 259 bytes
