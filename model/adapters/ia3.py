"""(IA)³: learnt factors on keys, values and the inner activations of the MLP  (Liu et al. 2022, arXiv:2205.05638, 3.3)

    k ← l_k ⊙ k        v ← l_v ⊙ v        inner ← l_ff ⊙ inner        all factors 1 at the start

The fewest parameters of all methods here: one per output of k_proj and v_proj and per input of down_proj.
"""

import torch
from torch import nn


class IA3(nn.Module):
    """y = l ⊙ (W x + b) of a linear layer, or with `before` y = W (l ⊙ x) + b."""

    def __init__(self, base, before):
        super().__init__()
        self.before = before
        self.ia3_l = nn.Parameter(torch.ones(1, base.in_features) if before else torch.ones(base.out_features, 1))

    def forward(self, base, x):
        """x (..., in) -> (..., out): base is the frozen layer."""
        factors = self.ia3_l.flatten()
        if self.before:
            return base((x * factors).to(x.dtype))
        y = base(x)
        return (y * factors).to(y.dtype)

    def delta(self, weight, bias):
        """What merging adds to weight (out, in), and to bias (out,) or None."""
        change = (self.ia3_l.to(weight) - 1) * weight                             # (1, in) or (out, 1) times (out, in)
        return change, 0.0 if self.before or bias is None else (self.ia3_l.flatten().to(bias) - 1) * bias

    def stored(self, tensors):
        """The tensors of a folder."""
        return tensors
