"""XLLM on a tiny random LLM: packed == shared == single, batched == alone, streaming == whole."""

from __future__ import annotations

import pytest
import torch
from conftest import Patches, make_llm, make_tokenizer

from x2l.data.collate import Collator
from x2l.data.pack import Packed, concatenate, share_prefixes
from x2l.head_loss import head_loss
from x2l.interfaces.adapter import Adapter
from x2l.interfaces.qformer import QFormer
from x2l.modality import Modality
from x2l.model import XLLM, common_prefix
from x2l.template import ChatTemplate, Renderer, Row
from x2l.types import Batch, Features, Message, Part, Sample, assistant, user


def photo(seed: int) -> Part:
    x = torch.randn(1, 4, Patches.width, generator=torch.Generator().manual_seed(seed))
    return Part("image", features=Features(x, torch.tensor([4])))


A, B = photo(1), photo(2)


@pytest.fixture(scope="module")
def collator() -> Collator:
    tokenizer = make_tokenizer()
    return Collator(Renderer(tokenizer, ChatTemplate(tokenizer), {"image": -1}), {}, {})


@pytest.fixture(scope="module")
def model() -> XLLM:
    llm = make_llm()
    torch.manual_seed(3)
    former = QFormer(Patches.width, width=16, depth=2, heads=2, num_queries=4, cross_every=1)
    torch.nn.init.normal_(former.queries)
    return XLLM(llm, {"image": Modality(Patches(), [former, Adapter(16, 32, 1.0)])}).eval()


SAMPLES = [
    Sample("1", (user(A, "What?"), assistant("A dog runs."))),
    Sample("2", (user(A, "What?"), assistant("A cat."))),
    Sample("3", (user(A, "How many?"), assistant("Two."))),
    Sample("4", (user("Text alone"), assistant("Yes."))),
    Sample("5", (user("One ", B, " and two ", A, "?"), assistant("No."), user("And ", B, " now?"), assistant("Well."))),
]


def plain(row: Row) -> Packed:
    return Packed(row.ids, row.labels, [len(row.ids)] * len(row.ids), row.media)


def test_shared_packed_and_batched_losses_equal_the_single_ones(model: XLLM, collator: Collator) -> None:
    rows = [collator.renderer.train(sample) for sample in SAMPLES]
    single = [model(collator.pad([plain(row)], {})) for row in rows]
    tree = share_prefixes(rows[:3])
    for packs in ([plain(r) for r in rows], [tree, *map(plain, rows[3:])], [concatenate([tree, *map(plain, rows[3:])])]):
        together = model(collator.pad(packs, {}))
        assert together.num_tokens == sum(o.num_tokens for o in single)
        torch.testing.assert_close(together.loss_sum, sum(o.loss_sum for o in single), rtol=1e-5, atol=1e-4)


def test_media_after_the_place_where_rows_part_come_once_a_branch(model: XLLM, collator: Collator) -> None:
    asked = [("Say ", A, " then ", B), ("Say ", A, " then ", B, "!"), ("Write ", A, " and ", B)]
    rows = [collator.renderer.train(Sample(str(i), (user(*q), assistant("Well.")))) for i, q in enumerate(asked)]
    tree = share_prefixes(rows)
    assert tree.media == [A, B, A, B]
    single = [model(collator.pad([plain(row)], {})) for row in rows]
    together = model(collator.pad([tree], {}))
    torch.testing.assert_close(together.loss_sum, sum(o.loss_sum for o in single), rtol=1e-5, atol=1e-4)


def test_the_loss_is_hugging_face_s_own(model: XLLM, collator: Collator) -> None:
    row = collator.renderer.train(SAMPLES[3])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    ours = model(collator.pad([plain(row)], {}))
    torch.testing.assert_close(ours.loss_sum / ours.num_tokens, model.llm(input_ids=ids, labels=labels).loss)


CONVERSATIONS: list[list[Message]] = [
    [user(A, "What?")],
    [user("Hello, how are you today?")],
    [user("One ", B, " and two ", A, "?")],
    [user("Hi"), assistant("Hello."), user(B, "And this?")],
]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_mixed_batch_answers_as_each_row_alone(model: XLLM, collator: Collator, num_beams: int) -> None:
    together = model.generate(collator.prompt(CONVERSATIONS), 12, num_beams, eos=[2])
    alone = [model.generate(collator.prompt([c]), 12, num_beams, eos=[2])[0] for c in CONVERSATIONS]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


def test_greedy_equals_hugging_face_generate(model: XLLM, collator: Collator) -> None:
    batch = collator.prompt([CONVERSATIONS[1]])
    expected = model.llm.generate(batch.input_ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    ours = model.generate(batch, 12, eos=[2])[0]
    assert ours == [t for t in expected[0, batch.input_ids.shape[1] :].tolist() if t not in (0, 2)]


def test_beams_that_share_their_prompt_equal_hugging_face_generate(model: XLLM, collator: Collator) -> None:
    batch = collator.prompt(CONVERSATIONS)
    spliced = model.embed(batch, pad_left=True)
    expected = model.llm.generate(
        inputs_embeds=spliced.embeds, attention_mask=(spliced.reach > 0).long(), max_new_tokens=12, num_beams=3, do_sample=False,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ours = model.generate(batch, 12, 3, eos=[2])
    assert ours == [[t for t in row.tolist() if t not in (0, 2)] for row in expected]


def test_the_picture_changes_the_answer_s_loss(model: XLLM, collator: Collator) -> None:
    losses = [model(collator.train([Sample("s", (user(p, "What?"), assistant("A dog.")))])).loss_sum.item() for p in (A, B)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_sampling_is_seeded_and_checked(model: XLLM, collator: Collator) -> None:
    batch = collator.prompt([CONVERSATIONS[0]])
    draws = [model.generate(batch, 8, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match=r"top_p in \(0, 1\], got .* 1.5"):
        list(model.stream(batch, top_p=1.5))
    with pytest.raises(ValueError, match="beam search takes no"):
        model.generate(batch, num_beams=2, temperature=1.0)


def test_context_overflow_names_the_counts(model: XLLM, collator: Collator) -> None:
    with pytest.raises(ValueError, match=r"\d+ tokens of prompt and media \+ 2000 of answer exceed the LLM's context of 1024"):
        list(model.stream(collator.prompt([CONVERSATIONS[0]]), max_new_tokens=2000))


def test_only_the_interface_is_trained(model: XLLM, collator: Collator) -> None:
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"interface"}
    model.train()
    try:
        assert not model.llm.training
        assert not model.modalities["image"].encoder.training
    finally:
        model.eval()


def test_a_common_prefix_runs_once_and_changes_nothing(model: XLLM, collator: Collator, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collator.train(SAMPLES)
    assert 0 < common_prefix(batch) < batch.input_ids.shape[1]

    def loss_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(batch).loss_sum
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    shared = loss_and_gradients()
    monkeypatch.setattr("x2l.model.common_prefix", lambda batch: 0)
    for a, b in zip(shared, loss_and_gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_prefix_ends_before_pictures_supervision_and_shorter_rows() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 9]])
    labels, reach = torch.full_like(ids, -100), torch.full_like(ids, 5)
    assert common_prefix(Batch(ids, labels, reach, {})) == 3
    labels[0, 3] = 8
    assert common_prefix(Batch(ids, labels, reach, {})) == 2  # position 2 predicts it
    ids[:, 1] = -1
    assert common_prefix(Batch(ids, labels, reach, {})) == 1
    reach[0, 0] = 2  # the first document of a packed row
    assert common_prefix(Batch(ids, labels, reach, {})) == 0


@pytest.mark.parametrize("block", [1, 64, 2**23])
def test_head_loss_is_cross_entropy_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("x2l.head_loss.BLOCK", block)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11).requires_grad_(False)
    hidden, labels = torch.randn(40, 8, requires_grad=True), torch.randint(11, (40,))
    expected = torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    (want,) = torch.autograd.grad(expected * 0.5, hidden)
    loss = head_loss(head, hidden, labels)
    (got,) = torch.autograd.grad(loss * 0.5, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, labels), expected)
