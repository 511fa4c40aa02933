"""What settling early costs: word error rate of the LLM's tokens nearest to the speech embeddings, on recordings in tar shards.

    python benchmarks/voice_lookahead.py tiny 400 ../shared/data/speechocean762/test-0000.tar

whole      the recording as its file is read
trimmed    as a spoken turn takes it: up to 0.2 s after the last voice
0.5 s, …   trimmed, and what was heard so long ago is settled (`x2l.modalities.hearing`); how long the last read takes, too

An interval is that of the difference to ``trimmed``, by bootstrap over recordings.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from itertools import islice

import jiwer
import numpy as np
import torch
from torch import Tensor

from x2l.assistant import Assistant
from x2l.data.media import decode_audio
from x2l.data.sources import read_source
from x2l.modalities.hearing import GrowingSpeech, Hearing
from x2l.serve.pauses import Pauses
from x2l.types import Media

LOOKAHEADS = (0.5, 1.0, 1.5, 2.0)  # seconds


def words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


@torch.inference_mode()
def main(model: str, num: int, *shards: str) -> None:
    torch.set_num_threads(1)
    assistant = Assistant.load(model)
    speech = assistant.model.modalities["speech"]
    growing = GrowingSpeech(speech)
    table = assistant.model.llm.get_input_embeddings().weight

    def said(embeds: Tensor) -> str:
        return words(assistant.tokenizer.decode(torch.cdist(embeds[None], table[None])[0].argmin(-1)))

    def whole(sound: np.ndarray) -> Tensor:
        return speech(Media(inputs=assistant.collator.processors["speech"]([sound]))).x[0]

    truth: list[str] = []
    heard: defaultdict[str, list[str]] = defaultdict(list)
    seconds: defaultdict[str, list[float]] = defaultdict(list)

    def read(way: str, sound: np.ndarray, lookahead: float | None = None) -> None:
        hearing = None if lookahead is None else Hearing(growing, lookahead)
        if hearing is not None:
            hearing.read(torch.from_numpy(sound[:-1]))
        start = time.process_time()
        settled, rest = hearing.read(torch.from_numpy(sound)) if hearing is not None else ([], whole(sound))
        embeds = torch.cat([*settled, rest])
        seconds[way].append(time.process_time() - start)
        heard[way].append(said(embeds))

    records = (record for shard in shards for record in read_source(shard))
    for record in islice(records, num):
        (blob,) = record.media.values()
        sound = decode_audio(blob)
        truth.append(words(record.fields["text"]))
        pauses = Pauses()
        pauses.push((sound * 32_767).astype(np.int16))
        trimmed = sound[: pauses.kept]
        read("whole", sound)
        read("trimmed", trimmed)
        for lookahead in LOOKAHEADS:
            read(f"{lookahead:g} s", trimmed, lookahead)

    counts = {way: [errors(a, b) for a, b in zip(truth, texts, strict=True)] for way, texts in heard.items()}
    lengths = np.array([len(text.split()) for text in truth])
    draws = np.random.default_rng(0).integers(0, len(truth), (1000, len(truth)))
    for way, mistakes in counts.items():
        more = np.array(mistakes) - np.array(counts["trimmed"])
        low, high = 100 * np.percentile(more[draws].sum(1) / lengths[draws].sum(1), [2.5, 97.5])
        share = 100 * sum(mistakes) / lengths.sum()
        print(f"{way:<8} {share:5.1f} % word errors [{low:+.1f}, {high:+.1f}]   {1e3 * np.mean(seconds[way]):4.0f} ms a read")
    print(f"{len(truth)} recordings")


def errors(truth: str, text: str) -> int:
    found = jiwer.process_words(truth, text)
    return found.substitutions + found.deletions + found.insertions


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
