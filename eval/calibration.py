"""Does a probability mean what it says? Of all answers given with 80 %, 80 % should be right.

    ECE = Σ_b n_b / n · | mean probability of bin b - share of it that is true |     equal-width bins of [0, 1]
    Brier = mean (p - y)²                          0 is perfect, 1/4 is p = 1/2 always

(Naeini et al. 2015, AAAI; Guo et al. 2017, arXiv:1706.04599, eq. 3; Brier 1950.) Whoever says the base rate every time
has an ECE of 0; the Brier score sees it.
"""

import numpy as np


def calibration_error(probabilities, outcomes, bins=15):
    """Expected calibration error of probabilities (n,) that the outcomes (n,) are 1. The bins are (lower, upper]."""
    return float(sum(abs(row["probability"] - row["share"]) * row["n"]
                     for row in reliability(probabilities, outcomes, bins)) / max(len(outcomes), 1))


def reliability(probabilities, outcomes, bins=15):
    """The rows of a reliability diagram: [{"from", "to", "n", "probability" (mean), "share" (of outcomes 1)}]."""
    probabilities, outcomes = np.asarray(probabilities, float), np.asarray(outcomes, float)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, probabilities) - 1, 0, bins - 1)
    return [{"from": float(edges[b]), "to": float(edges[b + 1]), "n": int((place == b).sum()),
             "probability": float(probabilities[place == b].mean()), "share": float(outcomes[place == b].mean())}
            for b in range(bins) if (place == b).any()]


def brier_score(probabilities, outcomes):
    """Mean squared distance of probabilities (n,) and outcomes (n,) 0 or 1."""
    return float(np.mean((np.asarray(probabilities, float) - np.asarray(outcomes, float)) ** 2))
