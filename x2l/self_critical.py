"""Stage 2, its last part for captions: learn from the scores of one's own answers, where likelihood only copies human ones.

Self-critical sequence training (arXiv 1612.00563): the LLM writes several captions of each picture; those that score above
the mean of the others (the baseline of arXiv 2003.09971) become likelier, those below it less likely. The gradient reaches the
interface alone, through the frozen LLM. Other samples, such as questions with their answers, are learnt beside it by likelihood.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from x2l.data.collate import Collator, Fetch
from x2l.data.pack import Packed, share_prefixes
from x2l.eval.metrics import caption_tokens
from x2l.model import XLLM
from x2l.template import Row
from x2l.types import IGNORE_INDEX, Batch, Output, Sample

END = "<end>"  # scored as a word, so that a caption that breaks off is worse than one that ends
ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # of CIDEr-D's penalty on lengths that differ, in words

Counts = dict[int, Counter[tuple[str, ...]]]  # of the n-grams of each order


class Reward:
    """CIDEr-D (arXiv 1411.5726), its document frequencies those of the training captions, plus the sentence's BLEU-4; in both
    1.0 is what papers print as 100.

    Args:
        references: the captions of every training picture.
    """

    def __init__(self, references: Iterable[Sequence[str]]):
        self.pictures: Counter[tuple[str, ...]] = Counter()  # in whose captions an n-gram stands
        num = 0
        for texts in references:
            self.pictures.update({gram for text in texts for counts in ngrams(text).values() for gram in counts})
            num += 1
        self.log_num = math.log(num)

    def __call__(self, caption: str, references: Sequence[str]) -> float:
        """The score of one caption of a picture with these references."""
        mine, theirs = ngrams(caption), [ngrams(text) for text in references]
        return self.cider(mine, theirs) + bleu(mine, theirs)

    def cider(self, mine: Counts, theirs: Sequence[Counts]) -> float:
        """CIDEr-D, ten times a mean cosine of clipped tf-idf vectors; pycocoevalcap's, for one sentence."""
        total = 0.0
        for reference in theirs:
            gap = mine[2].total() - reference[2].total()
            total += sum(self._cosine(mine[n], reference[n]) for n in ORDERS) * math.exp(-(gap**2) / (2 * SIGMA**2))
        return 10 * total / (len(ORDERS) * len(theirs))

    def _cosine(self, mine: Counter[tuple[str, ...]], theirs: Counter[tuple[str, ...]]) -> float:
        a, b = ({g: count * self._idf(g) for g, count in counts.items()} for counts in (mine, theirs))
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        return sum(min(a[g], b[g]) * b[g] for g in a.keys() & b.keys()) / norms if norms else 0.0

    def _idf(self, gram: tuple[str, ...]) -> float:
        return self.log_num - math.log(max(1, self.pictures[gram]))


def ngrams(text: str) -> Counts:
    """N-grams of the words that caption scores compare, with the sentence's end."""
    words = [*caption_tokens(text), END]
    return {n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in ORDERS}


def bleu(mine: Counts, theirs: Sequence[Counts]) -> float:
    """BLEU-4 of a sentence, one added to matches and counts of orders above 1 (Lin and Och, COLING 2004)."""
    log = 0.0
    for n in ORDERS:
        limit = Counter[tuple[str, ...]]()
        for reference in theirs:
            limit |= reference[n]
        matches, all_mine, extra = (mine[n] & limit).total(), mine[n].total(), int(n > 1)
        log += math.log(max(matches + extra, 1e-9) / (all_mine + extra))
    length = mine[1].total()
    closest = min((abs(r[1].total() - length), r[1].total()) for r in theirs)[1]
    return math.exp(log / len(ORDERS) + min(0.0, 1 - closest / length))


def advantages(rewards_NK: Tensor) -> Tensor:
    """Rewards (N, K) of K captions a picture -> each one's lead over the mean of the others, scaled to the batch's deviation."""
    lead = (rewards_NK - rewards_NK.mean(1, keepdim=True)) * (rewards_NK.shape[1] / (rewards_NK.shape[1] - 1))
    return lead / lead.std().clamp_min(1e-6)


class Judged(NamedTuple):
    """A batch, and how much each of its supervised tokens counts: negative ones shall become less likely."""

    batch: Batch
    weights: Tensor | None = None  # (T,) in reading order; None: all 1
    reward: float | None = None  # mean of the captions drawn


class SelfCritical(XLLM):
    """An X-LLM that learns from weighted tokens."""

    def __init__(self, xllm: XLLM):
        super().__init__(xllm.llm, dict(xllm.modalities.items()))  # type: ignore[arg-type]

    def forward(self, judged: Judged) -> Output:  # type: ignore[override]
        """Summed weighted cross-entropy; logs the mean reward."""
        output = super().forward(judged.batch, judged.weights)
        return output if judged.reward is None else Output(output.loss_sum, output.num_tokens, {"reward": judged.reward})


class Writer:
    """Has the LLM caption the pictures of a batch, and judges what it wrote.

    Args:
        model: whose captions they are.
        collator: its way from samples to batches.
        reward: caption and references -> score.
        num: captions a picture.
        temperature: that they are drawn at.
        max_new_tokens: of a caption.

    Raises:
        ValueError: a single caption has no other to be compared with.
    """

    def __init__(
        self, model: XLLM, collator: Collator, reward: Reward, num: int = 5, temperature: float = 1.0, max_new_tokens: int = 24
    ):
        if num < 2:
            raise ValueError(f"num={num}: a caption is compared with others of its picture, so that it takes two or more")
        self.model, self.collator, self.reward = model, collator, reward
        self.num, self.temperature, self.max_new_tokens = num, temperature, max_new_tokens

    def __call__(self, families: Sequence[Sequence[Sample]], fetch: Mapping[str, Fetch]) -> Judged:
        """The captions of each family become references, and captions drawn take their place; all other samples stay."""
        is_caption = [[sample.meta.get("task") == "caption" for sample in family] for family in families]
        captions = [list(compress(family, chosen)) for family, chosen in zip(families, is_caption, strict=True) if any(chosen)]
        judged, reward = self._judged(captions, fetch) if captions else ([], None)
        drawn = iter(judged)
        packs: list[Packed] = []
        weights: list[float] = []
        for family, chosen in zip(families, is_caption, strict=True):
            rows = next(drawn) if any(chosen) else []
            rows += [(self.collator.renderer.train(s), 1.0) for s, is_one in zip(family, chosen, strict=True) if not is_one]
            weights += [weight for row, weight in rows for label in row.labels if label != IGNORE_INDEX]
            packs.append(share_prefixes([row for row, _ in rows]))
        return Judged(self.collator.pad(packs, fetch), torch.tensor(weights), reward)

    def _judged(
        self, captions: Sequence[Sequence[Sample]], fetch: Mapping[str, Fetch]
    ) -> tuple[list[list[tuple[Row, float]]], float]:
        """For the human captions of each picture, the captions drawn, each with its lead; and the mean reward."""
        prompts = [self.collator.renderer.prompt(samples[0].messages[:-1]) for samples in captions]
        drawn = self._draw(prompts, fetch)
        references = [[sample.messages[-1].text for sample in samples] for samples in captions]
        rewards = torch.tensor(
            [[self.reward(self._text(ids), texts) for ids in mine] for texts, mine in zip(references, drawn, strict=True)]
        )
        return [
            [(self._answered(prompt, ids), lead) for ids, lead in zip(mine, leads, strict=True)]
            for prompt, mine, leads in zip(prompts, drawn, advantages(rewards).tolist(), strict=True)
        ], float(rewards.mean())

    def _draw(self, prompts: Sequence[Row], fetch: Mapping[str, Fetch]) -> list[list[list[int]]]:
        eos, training = self.collator.renderer.eos, self.model.training
        batch = self.collator.pad([share_prefixes([row]) for row in prompts], fetch)
        answers = self.model.eval().draw(batch, self.num, self.max_new_tokens, self.temperature, eos=[eos], pad=eos)
        self.model.train(training)
        return [answers[i : i + self.num] for i in range(0, len(answers), self.num)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.collator.renderer.tokenizer.decode(ids, skip_special_tokens=True))

    def _answered(self, prompt: Row, ids: Sequence[int]) -> Row:
        """The prompt with an answer as it was drawn, and with its end where it came to one."""
        answer = [*ids, *[self.collator.renderer.eos] * (len(ids) < self.max_new_tokens)]
        return Row([*prompt.ids, *answer], [*prompt.labels, *answer], prompt.media)
