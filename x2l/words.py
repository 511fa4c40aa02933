"""Stage 1 for a small image interface: say the words of the captions, in the LLM's own embedding space, without the LLM.

Each picture's embeddings are compared with the embeddings of caption words; the words that people used must be near one of
them. A linear layer, thrown away afterwards, must also read these words from the mean embedding: it finds far more than the
comparison does (dev/LOG.md), and so makes the embeddings hold more. A step costs the interface alone, about 1/30 of a step
through a 135 M LLM, and stage 2 then starts from embeddings that already are words of the LLM. BLIP-2's own stage 1 (ITC, ITM,
ITG) is in blip2.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.types import Features, Output, Sample

FUNCTION_WORDS = frozenset(
    """a an the is are was in on of off out up and or with to at by from as into near over under it its his her he she they
    their that this while for be being has have there who which other another some""".split()
)


class WordBatch(NamedTuple):
    """Encoder features of N pictures, and for each word of the vocabulary the share of its captions that use it."""

    features: Features
    targets: Tensor  # (N, V)


class WordReader(nn.Module):
    """An interface, and how well its embeddings name what is in the picture.

    By comparison the score of word w is ``logsumexp_q(s * cos(e_q, w)) - log Q + b_w``, by reading a linear function of the mean
    over q; the loss is binary cross-entropy summed over words, of either, plus a term that keeps the embeddings at the scale of
    the LLM's.

    Args:
        interface: Features (N, F, E) -> Features (N, Q, D).
        words_VD: embeddings of the vocabulary.
        frequency_V: mean share of captions that use each word; its logit is where b starts.
        std: standard deviation of the LLM's token embeddings.
        drop: share of the encoder's channels that training hides at random.
    """

    center: Tensor
    words: Tensor

    def __init__(self, interface: nn.Module, words_VD: Tensor, frequency_V: Tensor, std: float, drop: float = 0.0):
        super().__init__()
        self.interface = interface
        center_D = words_VD.mean(0)
        self.register_buffer("center", center_D)
        self.register_buffer("words", F.normalize(words_VD - center_D, dim=-1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(8.0)))
        self.bias = nn.Parameter(torch.logit(frequency_V.clamp(1e-4, 1 - 1e-4)))
        self.reader = nn.Linear(words_VD.shape[1], len(words_VD))
        nn.init.zeros_(self.reader.weight)
        nn.init.zeros_(self.reader.bias)
        self.std, self.drop = std, drop

    def scores(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Word logits (N, V) by comparison and by reading, and embeddings (N, Q, D)."""
        device = self.words.device
        x = F.dropout(features.x.to(device), self.drop, self.training)
        embeds: Tensor = self.interface(Features(x, features.lengths.to(device))).x.float()
        cosine = F.normalize(embeds - self.center, dim=-1) @ self.words.T
        compared = torch.logsumexp(cosine.float() * self.log_scale.exp(), dim=1) - math.log(embeds.shape[1])
        read = self.reader(((embeds - self.center) / self.std).mean(1)).float()
        return compared + self.bias, read + self.bias, embeds

    def forward(self, batch: WordBatch) -> Output:
        """Loss summed over pictures, counted by pictures; logs its two parts and the precision of the eight best words."""
        compared, read, embeds = self.scores(batch.features)
        targets_NV = batch.targets.to(read.device)
        losses = {
            name: F.binary_cross_entropy_with_logits(logits, targets_NV, reduction="sum")
            for name, logits in (("compared", compared), ("read", read))
        }
        off_scale = (embeds.std() / self.std - 1) ** 2
        hits = (batch.targets.gather(1, read.topk(8, dim=1).indices.cpu()) > 0).float().mean()
        logs = {name: float(loss.detach()) / len(read) for name, loss in losses.items()} | {"precision_at_8": float(hits)}
        return Output(losses["compared"] + losses["read"] + len(read) * off_scale, len(read), logs)


def content_words(text: str) -> set[str]:
    """The words of a caption that say something about the picture."""
    return set(re.findall(r"[a-z]+", text.lower())) - FUNCTION_WORDS


def vocabulary(families: Iterable[Sequence[Sample]], min_count: int = 10) -> tuple[list[str], Tensor]:
    """Words that occur with at least ``min_count`` pictures, and the mean share of captions that use each."""
    pictures: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    total = 0
    for family in families:
        uses = word_uses(family)
        pictures.update(uses.keys())
        captions.update(uses)
        total += len(family)
    words = sorted(word for word, count in pictures.items() if count >= min_count)
    if not words:
        raise ValueError(f"no word occurs with {min_count} pictures: this stage needs more captions")
    return words, torch.tensor([captions[word] / total for word in words])


def word_uses(family: Sequence[Sample]) -> Counter[str]:
    """How many captions of one picture use each content word."""
    return Counter(word for sample in family for word in content_words(sample.messages[-1].text))


def targets(families: Sequence[Sequence[Sample]], index: dict[str, int]) -> Tensor:
    """(N, V): the share of a picture's captions that use each word."""
    rows = torch.zeros(len(families), len(index))
    for row, family in zip(rows, families, strict=True):
        for word, count in word_uses(family).items():
            if word in index:
                row[index[word]] = count / len(family)
    return rows
