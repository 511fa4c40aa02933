"""The LLM's forward pass as the engine calls it: embeddings in, the last position's logits out, states in a cache.

Hugging Face's layers spend more time around the products of one row than in them: eighty small operations a layer, and Python
between them. LLMs like LLaMA run here in about half of these, on weights that are laid out for few rows (packed.py); with
16 bits a weight or more the results differ by no more than the order of sums. Others run as they are.

Shape letters: B rows, L new positions, S positions with those in the cache, D width, H heads, K heads of keys and
values, d width of a head, V vocabulary, P prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from x2l.model import cache_name
from x2l.packed import Product, pack

log = logging.getLogger(__name__)
LIKE_LLAMA = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class GivenUp(Exception):
    """What was being computed is of no use any more."""


Over = Callable[[], bool]  # whether it is


def never() -> bool:
    """For a pass that is not given up."""
    return False


class Prompt(NamedTuple):
    """New positions of one sequence."""

    embeds_BLD: Tensor  # B = 1
    positions_BL: Tensor
    cache: Any  # states of the positions before; those of the new ones are added, in place


class Forward(Protocol):
    """What computes new positions: of rows that are as long, or of prompts that are not.

    A pass asks now and then, `Llama`'s before each layer, whether it is ``over``; if so, it ends with `GivenUp`, and some layers of
    the cache hold more states than others.
    """

    def __call__(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        cache: Any,
        visible_BS: Tensor | None = None,
        over: Over = never,
    ) -> Tensor:
        """Logits (B, V) behind the last position; keys and values are added to ``cache``, in place.

        Each position sees itself and those before it. ``visible_BS``, for L = 1 alone: which positions a row sees (padding: False).
        """
        ...

    def prompts(self, prompts: Sequence[Prompt], over: Over = never) -> Tensor:
        """Logits (P, V) behind the last position of each, which sees its own sequence alone."""
        ...


def forward_of(llm: Any, packed_bytes: int = 0, weight_bits: int = 16) -> Forward:
    """The fastest forward pass that we have of ``llm``.

    Args:
        llm: a Hugging Face causal LM.
        packed_bytes, weight_bits: as for `pack`.

    Raises:
        ValueError: weights of 4 or 8 bits are asked for, but not for this LLM, on this processor or in this much memory.
    """
    other = _unlike_llama(llm)
    if not other:
        return Llama(llm, packed_bytes, weight_bits)
    if weight_bits < 16:
        raise ValueError(f"{weight_bits}-bit weights are for LLMs like LLaMA as transformers has them: {other}")
    log.info("the LLM runs in transformers' layers: %s", other)
    return Plain(llm)


class Plain:
    """Hugging Face's own forward pass, which asks once, before it begins."""

    def __init__(self, llm: Any):
        self.llm, self.cache_name = llm, cache_name(llm)

    def __call__(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        cache: Any,
        visible_BS: Tensor | None = None,
        over: Over = never,
    ) -> Tensor:
        _go_on(over)
        out = self.llm(
            inputs_embeds=embeds_BLD,
            attention_mask=None if visible_BS is None else visible_BS.long(),
            position_ids=positions_BL,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def prompts(self, prompts: Sequence[Prompt], over: Over = never) -> Tensor:
        return torch.cat([self(*prompt, over=over) for prompt in prompts])


class Norm:
    """Root-mean-square norm (arXiv 1910.07467) of the last axis, rounded where transformers' layers round.

    Args:
        weight: a factor for each channel, or (H, 1, d) for each head's.
        eps: is added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float):
        self.weight = weight
        # Tensors, since numbers are made into tensors at each call.
        self.eps, self.size = (torch.tensor(float(x), device=weight.device) for x in (eps, weight.shape[-1]))

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.float()
        mean = torch.addcdiv(self.eps, exact.square().sum(-1, keepdim=True), self.size)
        return self.weight * (exact * mean.rsqrt_()).type(x.dtype)


class Block(NamedTuple):
    """One layer."""

    norm: Norm
    qkv: Product
    qk_norm: Norm | None  # of queries and keys, where each head has one
    out: Product
    ffn_norm: Norm
    gate_up: Product
    activation: Any
    down: Product


class Llama:
    """The forward pass of LLMs like LLaMA; queries, keys and values are one `Product`, gates and inputs of the FFN another."""

    def __init__(self, llm: Any, packed_bytes: int = 0, weight_bits: int = 16):
        decoder, attention = llm.model, llm.model.layers[0].self_attn
        self.rotary, self.width = decoder.rotary_emb, attention.head_dim
        self.num_q, self.num_k, _ = (layer.out_features // self.width for layer in _qkv(attention))
        *products, self.head = pack(linears(llm), packed_bytes, weight_bits)
        fours = zip(*(products[i::4] for i in range(4)), strict=True)
        norm = partial(Norm, eps=llm.config.rms_norm_eps)
        self.norm = norm(decoder.norm.weight)
        self.blocks = [
            Block(
                norm=norm(layer.input_layernorm.weight),
                qkv=qkv,
                qk_norm=self._qk_norm(layer.self_attn, norm),
                out=out,
                ffn_norm=norm(layer.post_attention_layernorm.weight),
                gate_up=gate_up,
                activation=layer.mlp.act_fn,
                down=down,
            )
            for (qkv, out, gate_up, down), layer in zip(fours, decoder.layers, strict=True)
        ]

    def __call__(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        cache: Any,
        visible_BS: Tensor | None = None,
        over: Over = never,
    ) -> Tensor:
        mask = _mask(embeds_BLD.shape[1], cache.get_seq_length(), visible_BS, embeds_BLD.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.layers[layer].update(k, v)
            return _attend(q, k, v, mask)

        x = self._layers(embeds_BLD, self._rotation(embeds_BLD, positions_BL), attend, over)
        return self._logits(x[:, -1])

    def prompts(self, prompts: Sequence[Prompt], over: Over = never) -> Tensor:
        """All as one row, since few positions cost nearly as much as many; attention alone goes by prompt."""
        lengths = [prompt.embeds_BLD.shape[1] for prompt in prompts]
        masks = [_mask(n, p.cache.get_seq_length(), None, p.embeds_BLD.device) for n, p in zip(lengths, prompts, strict=True)]
        rotations = [self._rotation(prompt.embeds_BLD, prompt.positions_BL) for prompt in prompts]

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            reads = []
            for prompt, mask, q, k, v in zip(prompts, masks, *(x.split(lengths, 2) for x in qkv), strict=True):
                k, v = prompt.cache.layers[layer].update(k, v)
                reads.append(_attend(q, k, v, mask))
            return torch.cat(reads, 2)

        cos, sin = (torch.cat(parts, 2) for parts in zip(*rotations, strict=True))
        x = self._layers(torch.cat([prompt.embeds_BLD for prompt in prompts], 1), (cos, sin), attend, over)
        return self._logits(x[0, torch.tensor(lengths, device=x.device).cumsum(0) - 1])

    def _rotation(self, embeds_BLD: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (B, 1, L, d) of rotary position embedding (arXiv 2104.09864)."""
        cos, sin = (part[:, None] for part in self.rotary(embeds_BLD, positions_BL))
        first, second = sin.chunk(2, -1)
        return cos, torch.cat([-first, second], -1)

    def _layers(self, embeds_BLD: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable[..., Tensor], over: Over) -> Tensor:
        """The last layer's states (B, L, D); ``attend`` (layer, q, k, v) -> (B, H, L, d) keeps keys and values, too."""
        num_rows, length, _ = embeds_BLD.shape
        cos, sin = rotation
        x, num_qk = embeds_BLD.flatten(0, 1), self.num_q + self.num_k
        for i, block in enumerate(self.blocks):
            _go_on(over)
            heads = block.qkv(block.norm(x)).view(num_rows, length, -1, self.width).transpose(1, 2)
            qk = heads[:, :num_qk]
            if block.qk_norm is not None:
                qk = block.qk_norm(qk)
            qk = qk * cos + qk.roll(self.width // 2, -1) * sin  # transformers' rotate_half: the signs are in sin
            read = attend(i, *qk.split((self.num_q, self.num_k), 1), heads[:, num_qk:])
            x = x + block.out(read.transpose(1, 2).reshape(num_rows * length, -1))
            gate, up = block.gate_up(block.ffn_norm(x)).chunk(2, -1)
            x = x + block.down(block.activation(gate) * up)
        return x.view(num_rows, length, -1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def _qk_norm(self, attention: Any, norm: Callable[[Tensor], Norm]) -> Norm | None:
        if not hasattr(attention, "q_norm"):
            return None
        q, k = attention.q_norm.weight, attention.k_norm.weight
        return norm(torch.cat([q.expand(self.num_q, 1, -1), k.expand(self.num_k, 1, -1)]))


def _go_on(over: Over) -> None:
    if over():
        raise GivenUp


def _mask(length: int, past: int, visible_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """True where a new position sees one of the ``past`` and the new ones; None: each new one sees all up to itself."""
    if visible_BS is not None:
        assert length == 1
        return visible_BS[:, None, None]
    if length == 1 or not past:
        return None
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, L, d) to k and v (B, K, S, d), H / K heads each."""
    if mask is not None and q.device.type != "cpu":  # there a mask and groups together have no kernel but the slowest
        return _attend_ungrouped(q, k, v, mask)
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def _attend_ungrouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if q.shape[2] == 1:  # the heads of a group become its rows
        return F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, attn_mask=mask).view(q.shape)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _unlike_llama(llm: Any) -> str:
    """Why `Llama` does not compute what this LLM does; empty if it does."""
    if type(llm).__name__ not in LIKE_LLAMA:
        return f"this one is {type(llm).__name__}, not one of {', '.join(sorted(LIKE_LLAMA))}"
    known = (type(llm).__module__, "torch.nn.", "transformers.activations")
    for name, module in llm.named_modules():
        if not type(module).__module__.startswith(known):
            return f"in this one {name} is {type(module).__module__}.{type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"in this one {name} is hooked or patched"
    return ""


def _qkv(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def linears(llm: Any) -> list[list[Any]]:
    """The linear layers that are given the same input: four groups a block, and the output layer."""
    groups: list[list[Any]] = []
    for layer in llm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [_qkv(attention), [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    return [*groups, [llm.get_output_embeddings()]]
