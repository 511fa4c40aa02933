"""Bootstrap intervals for any statistic of summed per-sample counts: a mean, a corpus BLEU, a pooled error rate.

Every metric here is a function of sums over samples, so one resample is one row of multinomial counts times the matrix
of per-sample statistics. Samples that share an image (or a speaker) are correlated: resample whole clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # sums (..., K) -> values (...)


class Score(NamedTuple):
    """A value with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


class Stat(NamedTuple):
    """What a score is made of: the additive counts of each sample, and the function of their sums."""

    rows: np.ndarray  # (N, K)
    statistic: Statistic


def mean(sums: np.ndarray) -> np.ndarray:
    """The statistic of (total, count) columns: total / count; NaN where the count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def mean_of(values: Sequence[float] | np.ndarray) -> Stat:
    """The mean of one value a sample."""
    column = np.asarray(values, dtype=np.float64)
    return Stat(np.stack([column, np.ones_like(column)], 1), mean)


def score(
    stat: Stat,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Score:
    """The statistic of all samples with its percentile bootstrap interval.

    Args:
        stat: the counts of N samples and the function of their sums.
        clusters: N labels; samples with one label are drawn together. None: each sample is its own cluster.
        seed, draws, level: the resampling; the same seed gives the same interval.

    Raises:
        ValueError: no samples, or not one cluster label for each sample.
    """
    sums = _sum_by_cluster(stat.rows, clusters)
    resampled = stat.statistic(_counts(len(sums), seed, draws) @ sums)
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Score(float(stat.statistic(sums.sum(0))), float(low), float(high))


def paired_difference(
    a: Stat,
    b: Stat,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[Score, float]:
    """a - b on the same samples, with its interval and the two-sided bootstrap p-value of "no difference".

    Both systems are resampled together (Koehn, 2004), so the noise that they share cancels.
    """
    if len(a.rows) != len(b.rows):
        raise ValueError(f"a paired test needs the same samples, got {len(a.rows)} and {len(b.rows)}")
    sums_a, sums_b = _sum_by_cluster(a.rows, clusters), _sum_by_cluster(b.rows, clusters)
    counts = _counts(len(sums_a), seed, draws)
    resampled = a.statistic(counts @ sums_a) - b.statistic(counts @ sums_b)
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    value = float(a.statistic(sums_a.sum(0)) - b.statistic(sums_b.sum(0)))
    return Score(value, float(low), float(high)), float(min(1.0, 2 * (tail + 1) / (draws + 1)))


def _counts(num_clusters: int, seed: int, draws: int) -> np.ndarray:
    uniform = np.full(num_clusters, 1 / num_clusters)
    return np.random.default_rng(seed).multinomial(num_clusters, uniform, size=draws).astype(np.float64)


def _sum_by_cluster(stats: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    stats = np.asarray(stats, dtype=np.float64)
    if not len(stats):
        raise ValueError("no samples to score")
    if clusters is None:
        return stats
    if len(clusters) != len(stats):
        raise ValueError(f"{len(clusters)} cluster labels for {len(stats)} samples: give one label a sample")
    index: dict[Hashable, int] = {}
    rows = [index.setdefault(label, len(index)) for label in clusters]
    sums = np.zeros((len(index), stats.shape[1]))
    np.add.at(sums, rows, stats)
    return sums
