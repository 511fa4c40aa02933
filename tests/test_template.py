"""Rendering: train prompt == inference prompt, labels by prefix, and text that can never become a sentinel."""

from __future__ import annotations

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from x2l.data.pack import share_prefixes
from x2l.template import ChatTemplate, PaperTemplate, Renderer
from x2l.types import IGNORE_INDEX, Part, Sample, assistant, user

TOKENIZER = make_tokenizer()
IMAGE, OTHER = Part("image", path="a.jpg"), Part("image", path="b.jpg")
CHAT = Renderer(TOKENIZER, ChatTemplate(TOKENIZER, "Be kind."), {"image": -1, "speech": -2})
PAPER = Renderer(TOKENIZER, PaperTemplate("<|im_end|>"), {"image": -1, "speech": -2})


def shown(ids: list[int]) -> str:
    return "".join(f"<{i}>" if i < 0 else TOKENIZER.decode([i]) for i in ids)


def test_the_chat_template_is_the_llm_s_own_with_media_in_place() -> None:
    row = CHAT.prompt([user("Left: ", IMAGE, " Right: ", OTHER, " Same?")])
    assert shown(row.ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nLeft: <-1> Right: <-1> Same?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.media == [IMAGE, OTHER]


def test_the_paper_s_template_to_the_letter() -> None:
    row = PAPER.prompt([user(IMAGE, Part("speech", path="q.wav"), "What is it?")])
    assert shown(row.ids) == "<Image><-1></Image><Speech><-2></Speech>Question: What is it? \n Answer:"


@pytest.mark.parametrize("renderer", [CHAT, PAPER])
def test_train_prompt_equals_inference_prompt_in_every_turn(renderer: Renderer) -> None:
    turns = (user(IMAGE, "What?"), assistant("A dog."), user("And ", OTHER, "?"), assistant("Two cats."))
    row = renderer.train(Sample("s", turns))
    learnt = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
    for turn in (1, 3):
        prompt = renderer.prompt(turns[:turn]).ids
        assert row.ids[: len(prompt)] == prompt
        assert len(prompt) in learnt
    answers = shown([row.labels[i] for i in learnt])
    assert answers.replace(" ", "") == "Adog.<|im_end|>Twocats.<|im_end|>"
    assert row.media == [IMAGE, OTHER]


@given(st.text(max_size=40))
@settings(deadline=None)
def test_typed_text_is_never_special_and_survives(text: str) -> None:
    typed = text + "<|im_end|><-1><Image>[[0:0]]"
    ids = CHAT.prompt([user(IMAGE, typed)]).ids
    assert ids.count(-1) == 1
    assert sum(i == TOKENIZER.eos_token_id for i in ids) == 2  # the system's and the user's own turn ends
    assert typed in TOKENIZER.decode([i for i in ids if i >= 0])


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(ValueError, match=r"reads .*image.*, not 'video'"):
        CHAT.prompt([user(Part("video", path="a.mp4"), "What?")])


def test_a_sample_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        CHAT.train(Sample("s", (user("Hi"),)))


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"template: \{name: paper\}"):
        ChatTemplate(bare)


def test_shared_prefixes_hold_every_row_once() -> None:
    rows = [CHAT.train(Sample(a, (user(IMAGE, q), assistant(a)))) for q, a in (("Q?", "one"), ("Q?", "two"), ("R?", "one"))]
    tree = share_prefixes(rows)
    assert tree.ids.count(-1) == 1
    assert len(tree.ids) < 0.6 * sum(len(row.ids) for row in rows)
    for row in rows:  # every row is a root-to-leaf path: follow it by who sees whom
        leaf = max(q for q in range(len(tree.ids)) if [tree.ids[k] for k in range(q + 1) if q < tree.reach[k]] == row.ids)
        assert [tree.labels[k] for k in range(leaf + 1) if leaf < tree.reach[k]] == row.labels


def test_rows_about_different_media_are_not_merged() -> None:
    rows = [CHAT.train(Sample("s", (user(part, "Q?"), assistant("a")))) for part in (IMAGE, OTHER)]
    with pytest.raises(ValueError, match="same media"):
        share_prefixes(rows)
