"""Two recordings of other kind than the training's, Dickens and Beckett, from Moonshine's package: four recognisers, one table.

python benchmarks/recordings.py            needs faster-whisper, as x2l eval asr --peer whisper does
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from x2l.cli import app
from x2l.encoders.moonshine import ASSETS
from x2l.weights import resolve

BECKETT = "ever tried ever failed no matter try again fail again fail better"
DICKENS = (
    "it was the best of times it was the worst of times it was the age of wisdom it was the age of foolishness it was the epoch of "
    "belief it was the epoch of incredulity it was the season of light it was the season of darkness it was the spring of hope it "
    "was the winter of despair we had everything before us we had nothing before us we were all going direct to heaven we were all "
    "going direct the other way in short the period was so far like the present period that some of its noisiest authorities "
    "insisted on its being received for good or for evil in the superlative degree of comparison only"
)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    with (folder / "recordings.jsonl").open("w") as file:
        for name, text in (("beckett", BECKETT), ("two_cities", DICKENS)):
            sound = resolve(f"{ASSETS.removesuffix('/tiny-en')}/{name}.wav")
            file.write(json.dumps({"id": name, "media": {"wav": str(sound)}, "text": text}) + "\n")
    options = "--model tiny --cif x2l:tiny/asr --peer moonshine --peer whisper --num-beams 4 --batch-size 2"
    app(["eval", "asr", str(folder / "recordings.jsonl"), *options.split(), "--out", str(folder / "runs")])


if __name__ == "__main__":
    main()
