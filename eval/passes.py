"""pass@k: how often at least one of k answers to a prompt is right, told from n >= k answers without bias.

    pass@k = 1 - C(n - c, k) / C(n, k)        c of the n answers are right   (Chen et al. 2021, arXiv:2107.03374, eq. 1)

C(n - c, k) / C(n, k) is the share of the sets of k among the n answers that hold no right one. To estimate c / n first
and take 1 - (1 - c / n)^k is too low: the curve bends downwards.
"""

from math import comb

from model.errors import UserError


def pass_at_k(n, c, k):
    """Probability that k of the answers hold a right one, where c of n were right; 1 <= k <= n, 0 <= c <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    check(n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def informative_at_k(n, c, k):
    """Probability that k of the answers are neither all wrong nor all right: a group that GRPO learns from."""
    check(n, c, k)
    return 1 - (comb(n - c, k) + comb(c, k)) / comb(n, k)


def check(n, c, k):
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} cannot be told from {n} answers to a prompt; sample at least {max(k, 1)}")
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} answers right")
