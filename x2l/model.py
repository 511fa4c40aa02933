"""XLLM: a frozen LLM that reads any number of modalities through their interfaces.

Batch -> modalities -> splice -> LLM -> loss, or text
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x2l.head_loss import head_loss
from x2l.modality import Modality
from x2l.splice import Spliced, parents, positions, splice, visibility
from x2l.types import IGNORE_INDEX, Batch, Features, Media, Output


class XLLM(nn.Module):
    """A frozen causal LM and a dict of modalities; the i-th modality owns the sentinel id -(i + 1).

    Args:
        llm: any Hugging Face causal LM that takes ``inputs_embeds``; frozen here, for good.
        modalities: name -> `Modality` whose interface ends in the LLM's width.
    """

    def __init__(self, llm: Any, modalities: dict[str, Modality]):
        super().__init__()
        self.llm = llm.requires_grad_(False).eval()
        self.modalities = nn.ModuleDict(modalities)

    @property
    def sentinels(self) -> dict[str, int]:
        """Modality name -> sentinel id."""
        return {name: -(i + 1) for i, name in enumerate(self.modalities)}

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> XLLM:
        """Set the interfaces' mode; the frozen LLM stays in eval mode."""
        super().train(mode)
        self.llm.eval()
        return self

    def read(self, media: dict[str, Media]) -> dict[int, Features]:
        """Run every interface once: sentinel id -> embeddings (N, U, D) with lengths."""
        return {self.sentinels[name]: self.modalities[name](items) for name, items in media.items()}

    def embed(self, batch: Batch, pad_left: bool = False) -> Spliced:
        """What the LLM reads: text embeddings with every sentinel replaced by its item's embeddings."""
        ids = batch.input_ids.to(self.device)
        text = self.llm.get_input_embeddings()(ids.clamp_min(0))
        return splice(ids, batch.labels.to(self.device), batch.reach.to(self.device), text, self.read(batch.media), pad_left)

    def forward(self, batch: Batch, weights: Tensor | None = None) -> Output:
        """Summed next-token cross-entropy over the supervised tokens, logits computed for those alone.

        ``weights`` (T,), one for each supervised token in reading order, multiply its terms.

        A token is predicted at its parent: the token before it, or, where branches share a prefix, the prefix's end. What
        all rows begin with (a system prompt) runs once, for no gradient flows into it.

        Raises:
            ValueError: a row is longer than the LLM's context; the message has both counts.
        """
        spliced = self.embed(batch)
        check_context(self.llm, spliced.embeds.shape[1])
        visible = visibility(spliced.reach)
        rows, cols = torch.nonzero(spliced.labels != IGNORE_INDEX, as_tuple=True)
        start = common_prefix(batch)
        hidden = self.llm.get_decoder()(
            inputs_embeds=spliced.embeds[:, start:],
            attention_mask=additive(visible[:, start:], spliced.embeds.dtype),
            position_ids=positions(visible)[:, start:],
            use_cache=start > 0,
            **({cache_name(self.llm): prefix_cache(self.llm, spliced.embeds[:, :start])} if start else {}),
        ).last_hidden_state
        supervised = hidden[rows, parents(visible)[rows, cols] - start]
        weights = None if weights is None else weights.to(supervised.device)
        return Output(head_loss(self.llm.get_output_embeddings(), supervised, spliced.labels[rows, cols], weights), len(rows))

    @torch.inference_mode()
    def stream(
        self,
        batch: Batch,
        max_new_tokens: int | Sequence[int] = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield one token id a row and step, None for rows that have ended; greedy when ``temperature`` is 0.

        Rows may mix text alone and any media, and have any lengths: they are padded on the left. ``max_new_tokens`` is one for
        all, or one a row.

        Raises:
            ValueError: prompt and answer do not fit the context, or temperature or top_p is out of range.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
        spliced = self.embed(batch, pad_left=True)
        limits = torch.as_tensor(max_new_tokens, device=self.device)
        check_context(self.llm, spliced.embeds.shape[1], int(limits.max()))
        mask = (spliced.reach > 0).long()
        step: dict[str, Any] = {"inputs_embeds": spliced.embeds}
        cache, done = cache_name(self.llm), torch.zeros(len(mask), dtype=torch.bool, device=self.device)
        stops = torch.tensor([*eos], device=self.device)
        for num in range(int(limits.max())):
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -step[next(iter(step))].shape[1] :]
            out = self.llm(**step, attention_mask=mask, position_ids=at, use_cache=True, logits_to_keep=1)
            token = sample(out.logits[:, -1], temperature, top_p, generator)
            done |= torch.isin(token, stops) | (num >= limits)
            yield [None if stop else int(t) for t, stop in zip(token, done, strict=True)]
            if bool(done.all()):
                return
            step = {"input_ids": token[:, None], cache: out[cache]}
            mask = F.pad(mask, (0, 1), value=1)

    @torch.inference_mode()
    def generate(
        self,
        batch: Batch,
        max_new_tokens: int | Sequence[int] = 128,
        num_beams: int = 1,
        eos: Sequence[int] = (),
        pad: int = 0,
        **sampling: Any,
    ) -> list[list[int]]:
        """Whole answers as token ids, without the end token; beam search through Hugging Face's own ``generate``.

        ``sampling`` goes to `stream` (temperature, top_p, generator) and does not combine with beams.
        """
        if num_beams == 1:
            steps = list(self.stream(batch, max_new_tokens, eos=eos, **sampling))
            return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]
        if sampling:
            raise ValueError(f"beam search takes no {sorted(sampling)}; use num_beams=1")
        if not isinstance(max_new_tokens, int):
            raise ValueError("beam search takes one max_new_tokens for all rows; use num_beams=1")
        return self._generate(batch, max_new_tokens, num_beams, eos, pad, num_beams=num_beams, do_sample=False)

    def draw(
        self, batch: Batch, num: int, max_new_tokens: int, temperature: float = 1.0, eos: Sequence[int] = (), pad: int = 0
    ) -> list[list[int]]:
        """``num`` answers drawn for each row of ``batch``, the rows' after each other, as token ids without the end token."""
        options = {"num_return_sequences": num, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self._generate(batch, max_new_tokens, num, eos, pad, **options)

    @torch.inference_mode()
    def _generate(
        self, batch: Batch, max_new_tokens: int, copies: int, eos: Sequence[int], pad: int, **options: Any
    ) -> list[list[int]]:
        """Hugging Face's ``generate`` on ``copies`` of each row, whose prompt runs once a row."""
        spliced = self.embed(batch, pad_left=True)
        check_context(self.llm, spliced.embeds.shape[1], max_new_tokens)
        mask = (spliced.reach > 0).long()
        prompt = self.llm.get_decoder()(
            inputs_embeds=spliced.embeds[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :-1],
            use_cache=True,
        )[cache_name(self.llm)]
        prompt.batch_repeat_interleave(copies)
        out = self.llm.generate(
            inputs_embeds=spliced.embeds,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(eos) or None,
            pad_token_id=pad,
            **{cache_name(self.llm): prompt},
            **options,
        )
        stops = {*eos, pad}
        return [ids[: next((i for i, t in enumerate(ids) if t in stops), len(ids))] for ids in out.tolist()]


def cache_name(llm: Any) -> str:
    """What the LLM calls the states of earlier positions, as an argument and in its output; transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"


@torch.no_grad()
def prefix_cache(llm: Any, embeds_BPD: Tensor) -> Any:
    """The LLM's cache of a prefix that B rows share: run once, on the first row, and repeated for all."""
    cache = llm.get_decoder()(inputs_embeds=embeds_BPD[:1], use_cache=True)[cache_name(llm)]
    cache.batch_repeat_interleave(len(embeds_BPD))
    return cache


def common_prefix(batch: Batch) -> int:
    """How many leading text tokens, none of them supervised or predicting a supervised one, are the same in all rows."""
    ids, supervised = batch.input_ids, (batch.labels != IGNORE_INDEX).any(0)
    same = (ids >= 0).all(0) & (ids == ids[:1]).all(0) & (batch.reach == batch.reach.amax(1, keepdim=True)).all(0)
    free = ~(supervised | F.pad(supervised[1:], (0, 1), value=True))
    return int((same & free).cumprod(0).sum())


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean (B, L, L) -> (B, 1, L, L) of 0 and the dtype's minimum, which every attention backend adds to its scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """(B, V) -> (B,) token ids: argmax at temperature 0, else nucleus sampling (arXiv 1904.09751)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs, order = (logits_BV.float() / temperature).softmax(-1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the first token always stays
    return order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


def check_context(llm: Any, length: int, new_tokens: int = 0) -> None:
    """Refuse rows that the LLM's positions cannot hold.

    Raises:
        ValueError: with the counts of prompt, answer and context.
    """
    limit = getattr(llm.config, "max_position_embeddings", None)
    if limit is not None and length + new_tokens > limit:
        raise ValueError(
            f"{length} tokens of prompt and media + {new_tokens} of answer exceed the LLM's context of {limit}; "
            "shorten the conversation, use fewer media or a smaller max_new_tokens"
        )
