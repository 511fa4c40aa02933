"""BLIP-2's first stage: its scores are BLIP-2's, shared passes and shared ranks change nothing, and it learns."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from test_qformer import SMALL, E, blip2_config, features, randomize
from torch import Tensor

from x2l.blip2 import CLS, DEC, NUM_SPECIAL, UNKNOWN, Blip2, gather, padded, read_captions, similarity
from x2l.data.pack import Packed, concatenate, share_prefixes
from x2l.interfaces.qformer import QFormer, import_blip2
from x2l.modality import Modality
from x2l.template import Row
from x2l.types import IGNORE_INDEX, Batch, Features, Media, Part

WORDS = range(100, 120)
PHOTO = -1


def model(dropout: float = 0.0, losses: tuple[str, ...] = ("itc", "itm", "itg"), max_text: int = 16) -> Blip2:
    torch.manual_seed(0)
    former = QFormer(E, **SMALL, vocab_size=len(WORDS) + NUM_SPECIAL, max_text=max_text, dropout=dropout)
    return Blip2(Modality(torch.nn.Identity(), [former]), WORDS, losses=losses)


def rows(part: Part, *captions: list[int]) -> list[Row]:
    """[7, photo, 8] caption [9]: a prompt, a supervised answer and the template's end."""
    return [Row([7, PHOTO, 8, *c, 9], [IGNORE_INDEX] * 3 + [*c, IGNORE_INDEX], [part]) for c in captions]


def batch(packs: list[Packed], x: Features) -> Batch:
    longest = max(len(pack.ids) for pack in packs)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([[*getattr(p, name), *[fill] * (longest - len(p.ids))] for p in packs])

    return Batch(column("ids", 0), column("labels", IGNORE_INDEX), column("reach", 0), {"image": Media(features=x)})


def tree(*captions: list[int]) -> Packed:
    return share_prefixes(rows(Part("image", key="x"), *captions))


CAPTIONS = [[[100, 101, 102], [103, 104]], [[105], [106, 107, 108, 109]], [[110, 111], [110, 111, 112]]]


def test_captions_of_trees_and_packed_rows() -> None:
    photos = [tree(*captions) for captions in CAPTIONS]
    for packs in ([*photos], [concatenate(photos)], [concatenate(photos[:2]), photos[2]]):
        b = batch(packs, features(3))
        found = read_captions(b.input_ids, b.labels, b.reach, PHOTO)
        assert found.photo_M.tolist() == [0, 0, 1, 1, 2, 2]
        texts = [found.ids_P[found.caption_P == m].tolist() for m in range(6)]
        assert texts == [[-1, *caption] for caption in itertools.chain(*CAPTIONS)]
        assert found.at_P.tolist() == [k for text in texts for k in range(len(text))]


def test_captions_in_the_vocabulary_of_the_captions() -> None:
    b = batch([tree([100, 119, 555])], features(1))
    assert model().read(b).ids_P.tolist() == [CLS, NUM_SPECIAL, NUM_SPECIAL + 19, UNKNOWN]


@pytest.mark.parametrize(
    ("packs", "message"),
    [
        ([Packed([7, 8, 100, 9], [IGNORE_INDEX, IGNORE_INDEX, 100, IGNORE_INDEX], [4] * 4, [])], "got \\[0\\]"),
        ([Packed([PHOTO, PHOTO, 100], [IGNORE_INDEX, IGNORE_INDEX, 100], [3] * 3, [])], "got \\[2\\]"),
        ([Packed([PHOTO, 8], [IGNORE_INDEX] * 2, [2] * 2, [])], "holds no caption"),
        ([tree([100]), Packed([PHOTO, 8], [IGNORE_INDEX] * 2, [2] * 2, [])], "2 photos, 1 of them with captions"),
        ([tree([100])], "1 photos, 1 of them with captions: need at least 2"),
        ([tree([100] * 20), tree([100])], "20 tokens and a start token exceed max_text 16"),
    ],
)
def test_errors(packs: list[Packed], message: str) -> None:
    b = batch(packs, features(int((torch.tensor([i for p in packs for i in p.ids]) == PHOTO).sum())))
    with pytest.raises(ValueError, match=message):
        model()(b)


def test_wrong_model_is_refused() -> None:
    modality = Modality(torch.nn.Identity(), [QFormer(E, **SMALL, vocab_size=20)])
    with pytest.raises(ValueError, match=r"20 token ids need .*vocab_size=23"):
        Blip2(modality, WORDS)
    with pytest.raises(ValueError, match="itm only with itc"):
        model(losses=("itm", "itg"))


# ---------------------------------------------------------------- against transformers


def test_scores_are_those_of_transformers() -> None:
    """ITC similarity and ITM logits of Blip2ForImageTextRetrieval, from copied weights."""
    peer = randomize(transformers.Blip2ForImageTextRetrieval(blip2_config(use_qformer_text_input=True, vocab_size=23)))
    ours = Blip2(Modality(torch.nn.Identity(), [QFormer(E, **SMALL, vocab_size=23)]), WORDS, embed_width=16).eval()
    import_blip2(peer.state_dict(), ours.qformer)
    ours.image_projection.load_state_dict(peer.vision_projection.state_dict())
    ours.text_projection.load_state_dict(peer.text_projection.state_dict())
    ours.match_head.load_state_dict(peer.itm_head.state_dict())
    pixels, text = torch.randn(3, 3, 28, 28), torch.randint(0, 23, (3, 6))
    valid = torch.arange(6) < torch.tensor([6, 3, 5])[:, None]
    hidden = peer.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    x = Features(hidden, torch.full((3,), hidden.shape[1]))
    with torch.no_grad():
        itm = peer(pixels, text, valid.long(), use_image_text_matching_head=True).logits_per_image
        assert (ours.match(x, text, valid) - itm).abs().max() <= 1e-5
        itc = peer(pixels, text, valid.long()).logits_per_image
        assert (similarity(ours.embed_images(x), ours.embed_texts(text, valid)) - itc).abs().max() <= 1e-5


# ---------------------------------------------------------------- against a plain reading of the paper


def plain_losses(m: Blip2, x: Features, captions: list[list[list[int]]]) -> dict[str, float]:
    """ITC and ITG written one photo and one caption at a time."""
    former, lm_sum, lm_count, images, texts, owner = m.qformer, 0.0, 0, [], [], []
    for n, mine in enumerate(captions):
        photo = Features(x.x[n : n + 1], x.lengths[n : n + 1])
        images.append(F.normalize(m.image_projection(former(photo).x[0]), dim=-1))
        for caption in mine:
            ids = [NUM_SPECIAL + i - WORDS[0] for i in caption]
            hidden = former.encode(None, torch.tensor([[CLS, *ids]]))
            texts.append(F.normalize(m.text_projection(hidden[0, 0]), dim=-1))
            owner.append(n)
            for k in range(len(ids)):  # no mask at all: the text so far is all there is, and queries ignore it
                so_far = torch.tensor([[DEC, *ids[:k]]])
                q, t = former.num_queries, k + 1
                mask = torch.ones(1, q + t, q + t, dtype=torch.bool).tril()
                mask[:, :q, :q] = True
                last = former.encode(photo, so_far, mask)[0, -1]
                logits = m.word_transform(last) @ former.words.weight.T + m.word_bias
                lm_sum += F.cross_entropy(logits, torch.tensor(ids[k]), label_smoothing=0.1).item()
                lm_count += 1
    scores = torch.stack([(torch.stack(texts) @ image.T).amax(1) for image in images]) / m.temperature
    count = len(images)
    spread, exact = 0.1 / len(texts), 0.1 / count
    to_text = -sum(
        (0.9 / len(captions[n]) * (owner[j] == n) + spread) * scores[n].log_softmax(0)[j] / count
        for n in range(count)
        for j in range(len(texts))
    )
    to_image = -sum(
        (0.9 * (owner[j] == n) + exact) * scores[:, j].log_softmax(0)[n] / len(texts)
        for n in range(count)
        for j in range(len(texts))
    )
    return {"itc": (to_text + to_image).item() / 2, "itg": lm_sum / lm_count}


def test_losses_are_those_of_one_caption_at_a_time() -> None:
    m = randomize(model())
    m.temperature.data.fill_(0.1)
    x = Features(torch.randn(3, 7, E), torch.tensor([7, 3, 5]))
    out = m(batch([tree(*captions) for captions in CAPTIONS], x))
    expected = plain_losses(m, x, CAPTIONS)
    assert out.logs["itc"] == pytest.approx(expected["itc"], abs=1e-5)
    assert out.logs["itg"] == pytest.approx(expected["itg"], abs=1e-5)
    assert out.num_tokens == 3
    assert float(out.loss_sum) == pytest.approx(3 * sum(out.logs.values()), rel=1e-5)


def test_padding_and_packing_change_nothing() -> None:
    m = randomize(model(losses=("itc", "itg")))
    x = features(3)
    apart = m(batch([tree(*captions) for captions in CAPTIONS], x))
    padding = Features(torch.cat([x.x, torch.full((3, 4, E), 1e4)], 1), x.lengths)
    packed = m(batch([concatenate([tree(*captions) for captions in CAPTIONS])], padding))
    assert float(packed.loss_sum) == pytest.approx(float(apart.loss_sum), rel=1e-5)


def test_matching_draws_hard_negatives() -> None:
    """Two look-alikes among four photos: their wrong photo and wrong text are nearly always each other's."""
    m = model()
    seen: list[tuple[Tensor, Tensor]] = []

    def match(x: Features, text: Tensor, valid: Tensor) -> Tensor:
        seen.append((x.x[:, 0, 0], text[:, 0]))
        return torch.zeros(len(text), 2)

    m.match = match  # type: ignore[method-assign]
    scores = torch.tensor([[9.0, 9, 0, 0], [9, 9, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]])
    names = torch.arange(4.0)
    x = Features(names[:, None, None].expand(-1, 1, E), torch.ones(4, dtype=torch.long))
    for _ in range(50):
        m._match(x, torch.arange(4)[:, None], torch.ones(4, 1, dtype=torch.bool), scores, torch.arange(4))
    photos, texts = (torch.stack(pair).long() for pair in zip(*seen, strict=True))
    own, twin = torch.arange(4), torch.tensor([1, 0, 3, 2])
    assert (photos[:, [0, 1, 2, 3, 8, 9, 10, 11]] == own.repeat(2)).all()
    assert (texts[:, :8] == own.repeat(2)).all()
    for wrong in (photos[:, 4:8], texts[:, 8:]):
        assert not (wrong == own).any()
        assert (wrong == twin).float().mean() > 0.95


def test_gradients_reach_everything_that_trains() -> None:
    m = model().train()
    m(batch([tree(*captions) for captions in CAPTIONS], features(3))).loss_sum.backward()
    assert [name for name, p in m.named_parameters() if p.grad is None] == []


def test_export_is_a_qformer_without_text() -> None:
    m = model()
    former = QFormer(E, **SMALL)
    former.load_state_dict(m.export())
    torch.testing.assert_close(former.eval()(features()).x, m.eval().qformer(features()).x)
    assert {f"modalities.image.interface.0.{k}" for k in m.export()} < m.state_dict().keys()


def test_it_learns_which_caption_belongs_to_which_photo() -> None:
    m = model(losses=("itc", "itm", "itg")).train()
    x = features(4)
    captions = [[[100 + n, 110 + n]] for n in range(4)]
    b = batch([tree(*mine) for mine in captions], x)
    optimizer = torch.optim.AdamW(m.parameters(), 3e-3)
    for _ in range(200):
        out = m(b)
        out.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    m.eval()
    text, valid = padded(m.read(b))
    scores = similarity(m.embed_images(x), m.embed_texts(text, valid))
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == [0, 1, 2, 3]
    for shift in range(4):
        logits = m.match(x, text.roll(shift, 0), valid)
        assert (logits.argmax(1) == (shift == 0)).all()
    smoothed = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 23)  # ITG's floor, about
    assert m(b).logs["itg"] < smoothed + 0.3


# ---------------------------------------------------------------- two ranks


def _rank(rank: int, folder: Path, split: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    m = randomize(model(losses=("itc",)))
    b, e = (0, split[0]) if rank == 0 else (split[0], sum(split))
    x = features(sum(split))
    mine = Features(x.x[b:e], x.lengths[b:e])
    captions = [[[100 + n, 101], [103, 104 + n]] for n in range(sum(split))]
    out = m(batch([tree(*c) for c in captions[b:e]], mine))
    out.loss_sum.backward()
    torch.save({"loss": out.loss_sum.detach(), "grad": m.image_projection.weight.grad}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("split", [[2, 2], [3, 2]], ids=["even", "uneven"])
def test_two_ranks_are_one_batch(tmp_path: Path, split: list[int]) -> None:
    """Summed over ranks, the loss and its gradient are those of one process that has all photos."""
    torch.multiprocessing.start_processes(_rank, (tmp_path, split), nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    m = randomize(model(losses=("itc",)))
    captions = [[[100 + n, 101], [103, 104 + n]] for n in range(sum(split))]
    out = m(batch([tree(*c) for c in captions], features(sum(split))))
    out.loss_sum.backward()
    assert float(sum(p["loss"] for p in parts)) == pytest.approx(float(out.loss_sum), rel=1e-5)
    torch.testing.assert_close(sum(p["grad"] for p in parts), m.image_projection.weight.grad, atol=1e-5, rtol=1e-4)


def test_gather_alone_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert gather(x) is x
