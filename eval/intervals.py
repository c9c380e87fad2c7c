"""95 % intervals: how far a score may be from what endless test data would give."""

import math

import numpy as np


def wilson(successes, n, z=1.96):
    """Wilson score interval of a proportion (Wilson 1927): sound near 0 and 1 and for small n, unlike p ± z·se."""
    if n == 0:
        return (0.0, 1.0)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_ratio(numerators, denominators, resamples=1000, seed=0):
    """Percentile bootstrap of sum(numerators) / sum(denominators) over items drawn with replacement (Efron 1979)."""
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(numerators) == 0:
        return (math.nan, math.nan)
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        chosen = rng.integers(len(numerators), size=len(numerators))
        ratios.append(numerators[chosen].sum() / max(denominators[chosen].sum(), 1e-12))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return (float(low), float(high))
