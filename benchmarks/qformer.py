"""Q-Former at bert-base size against Hugging Face's: peer, ours, ratio and goal, in one run.

    python benchmarks/qformer.py [repeats]

One thread, process time, the minimum of interleaved repeats; ratios hold across machines, times do not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn

from x2l.blip2 import NUM_SPECIAL, Blip2
from x2l.interfaces.qformer import QFormer, import_blip2
from x2l.modality import Modality
from x2l.types import IGNORE_INDEX, Batch, Features, Media

ITEMS, PATCHES, WIDTH = 8, 257, 1408  # BLIP-2's ViT-g


def compare(what: str, goal: float, repeats: int, peer: Callable[[], object], ours: Callable[[], object]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):  # the first round warms up
        for run, spent in zip((peer, ours), times, strict=True):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
    before, after = (min(spent[1:]) for spent in times)
    print(f"{what:<52} {before:8.3f} s {after:8.3f} s {before / after:6.2f}x  goal {goal:.2f}x", flush=True)


def features(num_items: int) -> Features:
    return Features(torch.randn(num_items, PATCHES, WIDTH), torch.full((num_items,), PATCHES))


def captions(num_photos: int, captions_each: int, length: int = 13) -> tuple[Batch, Features]:
    """Photos with captions as branches of one row each."""
    ids = torch.randint(0, 1000, (num_photos, 1 + captions_each * length))
    ids[:, 0] = -1
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    ends = 1 + length * (1 + torch.arange(captions_each)).repeat_interleave(length)
    reach = torch.cat([torch.tensor([ids.shape[1]]), ends]).expand(num_photos, -1)
    x = features(num_photos)
    return Batch(ids, labels, reach, {"image": Media(features=x)}), x


@torch.inference_mode()
def inference(repeats: int) -> None:
    config = transformers.Blip2QFormerConfig(attn_implementation="sdpa")
    peer = transformers.Blip2QFormerModel(config).eval()
    ours = QFormer(WIDTH).eval()
    state = peer.state_dict() | {f"ln_vision.{k}": v for k, v in ours.ln_vision.state_dict().items()}
    import_blip2(state | {"query_tokens": ours.queries[None]}, ours)
    x = features(ITEMS)
    mask = torch.ones(x.x.shape[:2])

    def run_peer() -> object:
        normed = ours.ln_vision(x.x)
        queries = ours.queries.expand(ITEMS, -1, -1)
        return peer(queries, encoder_hidden_states=normed, encoder_attention_mask=mask).last_hidden_state

    assert torch.allclose(run_peer(), ours(x).x, atol=1e-4)  # type: ignore[arg-type]
    compare("fp32, 8 photos: transformers sdpa | ours", 0.95, repeats, run_peer, lambda: ours(x))

    def loop() -> None:
        for i in range(ITEMS):
            ours(Features(x.x[i : i + 1], x.lengths[i : i + 1]))

    compare("fp32, 8 frames: one by one | batched", 1.6, repeats, loop, lambda: ours(x))
    half = QFormer(WIDTH).eval().bfloat16()
    x_half = Features(x.x.bfloat16(), x.lengths)
    compare("8 photos: ours fp32 | ours bf16", 3.5, repeats, lambda: ours(x), lambda: half(x_half))


def stage1(repeats: int) -> None:
    """Forward and backward of BLIP-2's first stage on five captions a photo."""
    former = QFormer(WIDTH, width=384, depth=6, heads=6, vocab_size=1000 + NUM_SPECIAL, max_text=48, dropout=0.0)
    model = Blip2(Modality(nn.Identity(), [former]), range(1000))
    both = Blip2(model.modality, range(1000), losses=("itc", "itg"))
    shared, x = captions(ITEMS, 5)
    apart, _ = captions(5 * ITEMS, 1)
    apart.media["image"].features = Features(x.x.repeat_interleave(5, 0), x.lengths.repeat_interleave(5))

    def step(m: Blip2, batch: Batch) -> None:
        m(batch).loss_sum.backward()

    compare("ITC + ITG, 8 x 5 captions: a pass each | shared", 1.0, repeats, lambda: step(both, apart),
            lambda: step(both, shared))  # fmt: skip
    compare("8 x 5 captions: with ITM | without", 1.0, repeats, lambda: step(model, shared), lambda: step(both, shared))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'':<52} {'first':>10} {'second':>10} {'ratio':>7}")
    inference(count)
    stage1(count)
