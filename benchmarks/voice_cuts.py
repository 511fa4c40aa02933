"""What cutting a recording costs: word error rate of Moonshine's own decoder on speechocean762, 150 utterances of learners.

python benchmarks/voice_cuts.py ../shared/data/speechocean762/test-0000.tar

whole      the recording as it is
trimmed    as a spoken turn takes it: up to 0.2 s after the last voice
phrases    as ``"phrases": true`` takes it, the texts joined
windows    the encoder sees 4 s at a time
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from itertools import islice

import jiwer
import numpy as np

from x2l.data.media import decode_audio
from x2l.encoders.moonshine import build_transcriber
from x2l.serve.pauses import Pauses

NUM = 150


def words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def main(path: str) -> None:
    transcriber = build_transcriber(threads=1)
    truth: list[str] = []
    heard: dict[str, list[str]] = {"whole": [], "trimmed": [], "phrases": [], "windows": []}
    with tarfile.open(path) as shard:
        files = {member.name: member for member in shard}
        for name in islice((name for name in files if name.endswith(".opus")), NUM):
            sound = decode_audio(shard.extractfile(files[name]).read())  # type: ignore[union-attr]
            truth.append(words(json.load(shard.extractfile(files[f"{name[:-5]}.json"]))["text"]))  # type: ignore[arg-type]
            pauses = Pauses()
            pauses.push((sound * 32_767).astype(np.int16))
            clips = {"whole": [(0, len(sound))], "trimmed": [pauses.whole], "phrases": pauses.phrases, "windows": [(0, len(sound))]}
            for way, cuts in clips.items():
                transcriber.encoder.max_seconds = 4.0 if way == "windows" else 20.0
                heard[way].append(words(" ".join(transcriber.transcribe(sound[begin:end]) for begin, end in cuts)))
    for way, texts in heard.items():
        print(f"{way:<8} {100 * jiwer.wer(truth, texts):5.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
