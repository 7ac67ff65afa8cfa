"""How sure a figure is: bootstrap intervals (seeded), McNemar's exact test, the paired bootstrap.

Percentile bootstrap (Efron 1979) over questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000


def shares_interval(counts: Sequence[int], worth: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values that take few levels: `counts[i]` questions of value `worth[i]`. Resampling
    questions is a multinomial draw of the counts. (nan, nan) without a question."""
    total = sum(counts)
    if not total:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).multinomial(total, np.asarray(counts) / total, size=DRAWS)
    low, high = np.percentile(draws @ np.asarray(worth, dtype=float) / total, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean by resampling its values. (nan, nan) without a value."""
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(_resampled_means(values, seed), [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(parts: Sequence[tuple[float, int]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the sum of `parts[i][0]` over that of `parts[i][1]`, question i being drawn as a whole. What
    one question adds belongs together: two verdicts on one pair are not two draws. (nan, nan) over nothing."""
    alike = Counter(parts)
    if not any(whole for _, whole in alike):
        return math.nan, math.nan
    shares, values = np.array([*alike.values()]) / len(parts), np.array([*alike], dtype=float)
    random = np.random.default_rng(seed)
    sums = [random.multinomial(len(parts), shares, size=rows) @ values for rows in _blocks(len(alike))]
    of, whole = np.concatenate(sums).T
    low, high = np.percentile(of[whole > 0] / whole[whole > 0], [2.5, 97.5])
    return float(low), float(high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean of ours - theirs over the same questions: {"difference", "low", "high", "p"}. p: twice the smaller share of
    resampled means on one side of 0 (two-sided), at least 2 / (draws + 1)."""
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    means = _resampled_means(differences, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    side = (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + len(means))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high),
            "p": min(1.0, 2.0 * float(side))}  # fmt: skip


def difference_text(ours: Sequence[float], theirs: Sequence[float], digits: int = 1) -> str:
    """`+0.103 [+0.081, +0.126]`: the paired difference with its interval, and words where it holds 0."""
    found = paired_difference(ours, theirs)
    low, high = found["low"], found["high"]
    words = "" if low > 0 or high < 0 else ", not distinguishable"
    return f"{found['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{words}"


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Two-sided exact p of McNemar's test: questions that only one of two systems answers rightly (binomial, 1/2)."""
    total = only_ours + only_theirs
    tail = sum(math.comb(total, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2**total)


def _resampled_means(values: Sequence[float], seed: int):
    """DRAWS means of resamples."""
    values, random = np.asarray(values, dtype=float), np.random.default_rng(seed)
    draws = (random.integers(0, len(values), (rows, len(values))) for rows in _blocks(len(values)))
    return np.concatenate([values[rows].mean(axis=1) for rows in draws])


def _blocks(width: int) -> list[int]:
    """DRAWS in parts: 10,000 x 4,241 indices at once would take 340 MB."""
    block = max(1, 2_000_000 // width)
    return [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
