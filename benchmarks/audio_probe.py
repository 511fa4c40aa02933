"""Which frozen encoder hears most: a linear probe on ESC-10, by cross-validation on folds 1-4, then fold 5 once.

    python benchmarks/audio_probe.py ../shared/data/esc10 [spectra moonshine whisper]

Features are averaged over each clip (mean and standard deviation), standardised, and read by ridge regression onto the
classes; its strength is chosen by the cross-validation. ``spectra`` is EfficientNet-lite0 on log-mel pictures
(x2l/modalities/audio.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from x2l.data.media import decode_audio
from x2l.data.sources import read_source
from x2l.encoders import ENCODERS
from x2l.modalities.audio import as_pictures

STRENGTHS = [10.0**k for k in range(-2, 6)]
NAMES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "spectra": lambda: as_pictures(*ENCODERS["efficientnet_lite0"]()),
    "moonshine": lambda: ENCODERS["moonshine"](threads=1),
    "whisper": lambda: ENCODERS["whisper_ct2"](),
}


@torch.no_grad()
def describe(encoder: Any, processor: Any, blob: bytes) -> Tensor:
    """One vector (2E,) a clip."""
    x = encoder(**processor([decode_audio(blob)])).x.flatten(0, -2)
    return torch.cat([x.mean(0), x.std(0)]).double()


def accuracy(x: Tensor, y: Tensor, train: Tensor, test: Tensor, strength: float) -> float:
    """Percent right on ``test`` of ridge regression on ``train`` (both boolean masks)."""
    mean, std = x[train].mean(0), x[train].std(0).clamp_min(1e-6)
    a, b = ((x[mask] - mean) / std for mask in (train, test))
    targets = torch.nn.functional.one_hot(y[train]).double()
    centre = targets.mean(0)
    weights = torch.linalg.solve(a @ a.T + strength * torch.eye(len(a)).double(), targets - centre)
    return 100 * float(((b @ a.T @ weights + centre).argmax(1) == y[test]).double().mean())


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    records = [record for split in ("train", "test") for record in read_source(str(Path(folder) / f"{split}-*.tar"))]
    classes = sorted({record.fields["en"] for record in records})
    y = torch.tensor([classes.index(record.fields["en"]) for record in records])
    fold = torch.tensor([record.fields["fold"] for record in records])
    print(f"{len(records)} clips, {len(classes)} classes, {int((fold == 5).sum())} in fold 5")
    for name in names or NAMES:
        encoder, processor = NAMES[name]()
        encoder.eval()
        x = torch.stack([describe(encoder, processor, next(iter(r.media.values()))) for r in tqdm(records, desc=name)])
        cv = {s: sum(accuracy(x, y, (fold != k) & (fold < 5), fold == k, s) for k in range(1, 5)) / 4 for s in STRENGTHS}
        best = max(cv, key=lambda s: cv[s])
        final = accuracy(x, y, fold < 5, fold == 5, best)
        print(
            f"{name:10} folds 1-4 {cv[best]:5.1f} %   fold 5 {final:5.1f} %   (strength {best:g}, width {x.shape[1]})", flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
