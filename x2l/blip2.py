"""Stage 1 of the image interface: Q-Former representation learning (BLIP-2, arXiv 2301.12597, section 3.2).

Three losses teach the queries to extract what a caption says about a photo, before any LLM reads them:

    ITC  contrast: queries and text apart; the similarity of a photo and a text is that of the best of its Q queries
    ITM  matching: queries and text see each other; a binary head, hard negatives drawn by ITC's similarity
    ITG  generation: causal text that sees the queries, which do not see the text

The data are those of stage 2: a `Batch` whose supervised tokens are captions. Their ids are the LLM's, mapped to the
few thousand that occur in the captions, so that one tokenizer serves both stages and the word embeddings stay small.
As no query sees a text in ITC and ITG, all captions of a photo share one pass of its queries, with the same result.

Shape suffixes: N photos, M captions, P tokens of all captions, S tokens of a photo's captions, T longest caption,
Q queries, F features, E encoder width, C Q-Former width, K width of the similarity space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from x2l.interfaces.qformer import QFormer
from x2l.modality import Modality
from x2l.types import IGNORE_INDEX, Batch, Features, Output

CLS, DEC, UNKNOWN, NUM_SPECIAL = 0, 1, 2, 3  # starts a text to embed or match, a text to write; stands for other tokens
LOSSES = ("itc", "itm", "itg")
SMOOTHING = 0.1  # of labels, in ITC and ITG


class Captions(NamedTuple):
    """The captions of a batch, one after another, photo by photo; each opens with a start token."""

    ids_P: Tensor
    at_P: Tensor  # place of the token in its caption, 0 = start token
    caption_P: Tensor  # 0 .. M - 1, ascending
    photo_M: Tensor  # 0 .. N - 1, ascending


class Blip2(nn.Module):
    """The Q-Former of an image modality with the heads of its pretraining; ``forward`` is a training step.

    Args:
        modality: frozen encoder and an interface that opens with a `QFormer` with text; what follows it is not used.
        token_ids: the LLM's ids that occur in the captions; the Q-Former's ``vocab_size`` is their number + 3.
        name: of the modality, in batches and in the names of the weights (those of `XLLM`).
        losses: which of itc, itm and itg are summed. ITM draws its negatives by ITC's similarity, and costs most.
        embed_width: K.

    Raises:
        ValueError: no Q-Former with a vocabulary of that size, or an unknown loss.
    """

    token_ids: Tensor

    def __init__(
        self,
        modality: Modality,
        token_ids: Sequence[int],
        name: str = "image",
        losses: Sequence[str] = LOSSES,
        embed_width: int = 256,
    ):
        super().__init__()
        former = modality.interface[0]
        known = sorted(set(token_ids))
        size = len(known) + NUM_SPECIAL
        if not isinstance(former, QFormer) or former.words is None or former.words.num_embeddings != size:
            raise ValueError(f"{len(known)} token ids need an interface that opens with QFormer(vocab_size={size})")
        if not set(losses) <= set(LOSSES) or not losses or ("itm" in losses and "itc" not in losses):
            raise ValueError(f"losses are any of {LOSSES}, itm only with itc, got {tuple(losses)}")
        self.modalities = nn.ModuleDict({name: modality})
        self.name, self.losses = name, tuple(losses)
        self.register_buffer("token_ids", torch.tensor(known))
        width = former.out_width
        self.image_projection = nn.Linear(width, embed_width)
        self.text_projection = nn.Linear(width, embed_width)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.match_head = nn.Linear(width, 2)
        self.word_transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))  # BERT's LM head
        self.word_bias = nn.Parameter(torch.zeros(size))

    @property
    def modality(self) -> Modality:
        return cast(Modality, self.modalities[self.name])

    @property
    def qformer(self) -> QFormer:
        return cast(QFormer, self.modality.interface[0])

    @property
    def words(self) -> Tensor:
        """(V, C) embeddings of the compact vocabulary, tied to the output layer of ITG."""
        return cast(nn.Embedding, self.qformer.words).weight

    @property
    def sentinels(self) -> dict[str, int]:
        """Modality name -> sentinel id, as in `XLLM`."""
        return {self.name: -1}

    def export(self) -> dict[str, Tensor]:
        """The weights that stage 2 starts from: those of the same Q-Former without text."""
        text = ("words.", "positions.")
        return {k: v for k, v in self.qformer.state_dict().items() if not k.startswith(text) and "text_ffn" not in k}

    def forward(self, batch: Batch) -> Output:
        """The plain sum of the losses, each a mean over the batch; the count of the `Output` is that of photos.

        Raises:
            ValueError: fewer than two photos, a caption without exactly one photo before it, a photo without caption,
                or a caption longer than the Q-Former's positions.
        """
        device = self.word_bias.device
        features = self.modality.encode(batch.media[self.name])
        features = Features(features.x.to(device), features.lengths.to(device))
        captions = self.read(batch)
        num_photos, num_used = len(features.x), len(captions.photo_M.unique())
        if num_photos < 2 or num_used < num_photos:
            raise ValueError(f"{num_photos} photos, {num_used} of them with captions: need at least 2, each with one")

        queries_NQC, itg = self._generate(features, captions)
        losses = {"itg": itg}
        if "itc" in self.losses:
            text, valid = padded(captions)
            image_NQK, text_MK = self._embed_images(queries_NQC), self.embed_texts(text, valid)
            losses["itc"], scores_NM = self._contrast(image_NQK, text_MK, captions.photo_M)
            if "itm" in self.losses:
                losses["itm"] = self._match(features, text, valid, scores_NM.detach(), captions.photo_M)
        losses = {name: losses[name] for name in self.losses}
        logs = {name: float(loss.detach()) for name, loss in losses.items()}
        return Output(num_photos * torch.stack([*losses.values()]).sum(), num_photos, logs)

    def read(self, batch: Batch) -> Captions:
        """The captions of a batch, in compact ids."""
        ids, labels, reach = (t.to(self.token_ids.device) for t in (batch.input_ids, batch.labels, batch.reach))
        captions = read_captions(ids, labels, reach, self.sentinels[self.name])
        limit = cast(nn.Embedding, self.qformer.positions).num_embeddings
        longest = int(captions.at_P.max()) + 1
        if longest > limit:
            raise ValueError(f"a caption of {longest - 1} tokens and a start token exceed max_text {limit}; raise it")
        i = torch.searchsorted(self.token_ids, captions.ids_P).clamp_max(len(self.token_ids) - 1)
        compact = torch.where(self.token_ids[i] == captions.ids_P, i + NUM_SPECIAL, UNKNOWN)
        return captions._replace(ids_P=torch.where(captions.at_P == 0, CLS, compact))

    def embed_images(self, features: Features) -> Tensor:
        """(N, Q, K), one unit vector a query."""
        return self._embed_images(self.qformer(features).x)

    def _embed_images(self, queries_NQC: Tensor) -> Tensor:
        return F.normalize(self.image_projection(queries_NQC).float(), dim=-1)

    def embed_texts(self, text_MT: Tensor, valid_MT: Tensor) -> Tensor:
        """Compact ids that open with CLS -> (M, K), a unit vector from the place of CLS."""
        hidden = self.qformer.encode(None, text_MT, valid_MT[:, None])
        return F.normalize(self.text_projection(hidden[:, 0]).float(), dim=-1)

    def match(self, features: Features, text_NT: Tensor, valid_NT: Tensor) -> Tensor:
        """Logits (N, 2), (no match, match), of photo n with text n, averaged over the queries."""
        num_queries = self.qformer.num_queries
        valid = F.pad(valid_NT, (num_queries, 0), value=True)
        hidden = self.qformer.encode(features, text_NT, valid[:, None])
        return self.match_head(hidden[:, :num_queries]).float().mean(1)

    def _generate(self, features: Features, captions: Captions) -> tuple[Tensor, Tensor]:
        """Queries' outputs (N, Q, C), and the ITG loss of all captions of a photo in the same pass."""
        photo_P = captions.photo_M[captions.caption_P]
        col_P = torch.arange(len(photo_P), device=photo_P.device) - torch.searchsorted(photo_P, photo_P)
        num_queries, shape = self.qformer.num_queries, (len(features.x), int(col_P.max()) + 1)
        grid = torch.zeros(3, *shape, dtype=torch.long, device=photo_P.device)
        start = captions.at_P == 0
        grid[:, photo_P, col_P] = torch.stack([torch.where(start, DEC, captions.ids_P), captions.at_P, captions.caption_P + 1])
        ids_NS, at_NS, caption_NS = grid
        own = caption_NS[:, :, None] == caption_NS[:, None]
        mask = F.pad(own.tril(), (num_queries, 0), value=True)  # a text sees the queries, its own caption, no future
        mask = F.pad(mask, (0, 0, num_queries, 0), value=False)
        mask[:, :num_queries, :num_queries] = True
        hidden = self.qformer.encode(features, ids_NS, mask, at_NS)
        predicts = ~start[1:]
        before_PC = hidden[photo_P, num_queries + col_P][:-1][predicts]
        logits = F.linear(self.word_transform(before_PC), self.words, self.word_bias)
        loss = F.cross_entropy(logits.float(), captions.ids_P[1:][predicts], label_smoothing=SMOOTHING)
        return hidden[:, :num_queries], loss

    def _contrast(self, image_NQK: Tensor, text_MK: Tensor, photo_M: Tensor) -> tuple[Tensor, Tensor]:
        """ITC against the texts and photos of all ranks, and this rank's own scores (N, M).

        A photo's target is spread evenly over its captions; with one caption a photo this is BLIP-2's loss.
        """
        first = photos_before(len(image_NQK), photo_M.device)
        row_N = first + torch.arange(len(image_NQK), device=photo_M.device)
        owner_M = gather(first + photo_M)
        own_NM = (owner_M == row_N[:, None]).float()
        to_text = similarity(image_NQK, gather(text_MK)) / self.temperature
        to_image = similarity(gather(image_NQK), text_MK).T / self.temperature
        loss = F.cross_entropy(to_text, own_NM / own_NM.sum(1, keepdim=True), label_smoothing=SMOOTHING)
        loss = (loss + F.cross_entropy(to_image, first + photo_M, label_smoothing=SMOOTHING)) / 2
        return loss, to_image[:, row_N].T

    def _match(self, features: Features, text_MT: Tensor, valid_MT: Tensor, scores_NM: Tensor, photo_M: Tensor) -> Tensor:
        """ITM on one random caption of each photo: the pair, the text with a wrong photo, the photo with a wrong text.

        Negatives come from this rank, the more often the more alike ITC holds them.
        """
        own_NM = photo_M == torch.arange(len(scores_NM), device=photo_M.device)[:, None]
        text_N = torch.multinomial(own_NM.float(), 1).squeeze(1)
        to_text = (scores_NM.softmax(1) + 1e-4).masked_fill(own_NM, 0)
        to_image = (scores_NM.softmax(0) + 1e-4).masked_fill(own_NM, 0).T[text_N]
        photo_N = torch.arange(len(scores_NM), device=photo_M.device)
        photos = torch.cat([photo_N, torch.multinomial(to_image, 1).squeeze(1), photo_N])
        texts = torch.cat([text_N, text_N, torch.multinomial(to_text, 1).squeeze(1)])
        logits = self.match(Features(features.x[photos], features.lengths[photos]), text_MT[texts], valid_MT[texts])
        return F.cross_entropy(logits, (torch.arange(len(photos), device=photo_M.device) < len(photo_N)).long())


def similarity(image_NQK: Tensor, text_MK: Tensor) -> Tensor:
    """(N, M): the cosine of each text with the best query of each photo."""
    return torch.einsum("nqk,mk->nmq", image_NQK, text_MK).amax(-1)


def read_captions(input_ids: Tensor, labels: Tensor, reach: Tensor, sentinel: int) -> Captions:
    """Find the captions of a `Batch`: runs of supervised tokens with one reach. Ids stay the LLM's, -1 at the starts.

    Args:
        input_ids, labels, reach: (B, S), as in `Batch`.
        sentinel: id of a photo.

    Raises:
        ValueError: no caption at all, or a caption that sees another number of photos than one.
    """
    supervised = (labels != IGNORE_INDEX) & (reach > 0)
    continues = F.pad(supervised[:, 1:] & supervised[:, :-1] & (reach[:, 1:] == reach[:, :-1]), (1, 0))
    rows_M, cols_M = torch.nonzero(supervised & ~continues, as_tuple=True)
    if not len(rows_M):
        raise ValueError("a batch without a single supervised token holds no caption")
    photos = (input_ids == sentinel) & (reach > 0)
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    seen_MS = photos[rows_M] & (position < cols_M[:, None]) & (reach[rows_M] > cols_M[:, None])
    if bool((seen_MS.sum(1) != 1).any()):
        raise ValueError(f"each caption needs exactly one photo before it, got {sorted(set(seen_MS.sum(1).tolist()))}")
    number = photos.flatten().cumsum(0).view_as(input_ids) - 1
    photo_M = number[rows_M, seen_MS.long().argmax(1)]

    lengths_M = (supervised & ~continues)[supervised].cumsum(0).bincount()[1:] + 1
    caption_P = torch.repeat_interleave(lengths_M)
    at_P = torch.arange(len(caption_P), device=input_ids.device) - (lengths_M.cumsum(0) - lengths_M)[caption_P]
    ids_P = torch.full_like(at_P, -1)
    ids_P[at_P > 0] = labels[supervised]
    return Captions(ids_P, at_P, caption_P, photo_M)


def padded(captions: Captions) -> tuple[Tensor, Tensor]:
    """Ids (M, T), right-padded, and where they are valid."""
    shape = len(captions.photo_M), int(captions.at_P.max()) + 1
    text_MT = torch.full(shape, CLS, device=captions.ids_P.device)
    valid_MT = torch.zeros(shape, dtype=torch.bool, device=captions.ids_P.device)
    text_MT[captions.caption_P, captions.at_P] = captions.ids_P
    valid_MT[captions.caption_P, captions.at_P] = True
    return text_MT, valid_MT


def gather(x: Tensor) -> Tensor:
    """Join the tensors of all ranks along dimension 0, whatever their sizes there; gradients flow back to each rank."""
    if not dist.is_initialized():
        return x
    sizes = _sizes(len(x), x.device)
    full = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    parts = all_gather(full) if x.requires_grad else _plain_gather(full)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def photos_before(num_photos: int, device: torch.device) -> int:
    """How many photos the ranks before this one hold."""
    return sum(_sizes(num_photos, device)[: dist.get_rank()]) if dist.is_initialized() else 0


def _sizes(size: int, device: torch.device) -> list[int]:
    return torch.cat(_plain_gather(torch.tensor([size], device=device))).tolist()


def _plain_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts
