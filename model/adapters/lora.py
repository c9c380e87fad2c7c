"""LoRA and its kin: the change of a weight matrix as a product of two thin ones.

    LoRA     y = W x + s B A x      A (r, in) random, B (out, r) zero at the start; s = alpha / r
                                    (Hu et al. 2021, arXiv:2106.09685, eq. 3)
    rsLoRA   s = alpha / sqrt(r)    so that a large rank learns as fast as a small one
                                    (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)
    LoRA+    B learns with 16 times the rate of A
                                    (Hayou et al. 2024, arXiv:2402.12354, section 4)
    DoRA     y = m ⊙ (W + s B A) x / ‖W + s B A‖     the length m of each output row is learnt apart from its direction;
                                    the norm counts as a constant in the derivative
                                    (Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3)
    PiSSA    s B₀ A₀ = the r largest singular components of W: training starts in them, not beside them
                                    (Meng et al. 2024, arXiv:2404.02948, eq. 2-4)

PiSSA's paper subtracts B₀ A₀ from W. Here W stays as it is, as in every other method, and the start is subtracted from
what the adapter adds: s (B A - B₀ A₀) x. It is the same function of A and B; the base model is still there when the
adapter is switched off; and a difference of two products of rank r is one of rank 2r, plain LoRA to whoever loads it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.errors import UserError


class LoRA(nn.Module):
    """The trained factors beside one linear layer. `forward` computes the layer and the change together."""

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dora=False, pissa=False, b_lr_ratio=1.0):
        """base: the layer (or a quantized one). b_lr_ratio: learning rate of B over that of A."""
        super().__init__()
        self.rank, self.alpha, self.b_lr_ratio = rank, alpha, b_lr_ratio
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))              # U(±1/√in)
        nn.init.zeros_(self.lora_B.weight)
        self.pissa = pissa
        if pissa:
            start_in_singular_vectors(self, dense_weight(base))
        self.lora_magnitude_vector = None
        if dora:      # the weight at the start is W itself, also with PiSSA
            self.lora_magnitude_vector = nn.Parameter(row_norms(dense_weight(base).detach()))     # m (out,)

    def low_rank(self, x):
        """s B A x, less the start with PiSSA: (..., in) -> (..., out)."""
        y = self.lora_B(self.lora_A(x))
        if self.pissa:
            y = y - F.linear(F.linear(x, self.lora_A.start), self.lora_B.start)
        return self.scale * y

    def forward(self, base, x):
        """x (..., in) -> (..., out): base is the frozen layer."""
        seen = self.dropout(x)
        if self.lora_magnitude_vector is None:
            return base(x) + self.low_rank(seen)
        y, weight = base(x), dense_weight(base)
        # m / ‖W + s B A‖ multiplies W x + s B A x, but not the bias; dropout is for the change only
        product = y if base.bias is None else y - base.bias
        if self.training and isinstance(self.dropout, nn.Dropout):
            product = F.linear(seen, weight.to(y.dtype))
        ratio = (self.lora_magnitude_vector / self.norms(weight)).to(y.dtype)                      # (out,)
        return y + (ratio - 1) * product + ratio * self.low_rank(seen)

    @torch.no_grad()
    def norms(self, weight):
        """‖W + s B A‖ of each output row, (out,): a constant for the derivative (section 4.3 of DoRA)."""
        with torch.autocast(weight.device.type, enabled=False):
            return row_norms(weight + self.change(weight))

    def change(self, weight):
        """s B A (out, in), less the start with PiSSA, in the format of `weight`."""
        change = self.lora_B.weight.to(weight) @ self.lora_A.weight.to(weight)
        if self.pissa:
            change = change - self.lora_B.start.to(weight) @ self.lora_A.start.to(weight)
        return self.scale * change

    def delta(self, weight, bias):
        """What merging adds to weight (out, in), and to bias (out,) or None."""
        change = self.change(weight)
        if self.lora_magnitude_vector is not None:
            new = weight + change
            change = (self.lora_magnitude_vector / row_norms(new)).to(weight)[:, None] * new - weight
        return change, 0.0

    def stored(self, tensors):
        """This module's tensors {name: tensor} -> those of a folder. With PiSSA those of plain LoRA of rank 2r, because
        B A - B₀ A₀ = [B, -B₀] [A; A₀]."""
        if not self.pissa:
            return tensors
        A, A0, B, B0 = (tensors[name] for name in ("lora_A.weight", "lora_A.start", "lora_B.weight", "lora_B.start"))
        others = {name: tensor for name, tensor in tensors.items() if name == "lora_magnitude_vector"}
        return {"lora_A.weight": torch.cat((A, A0)), "lora_B.weight": torch.cat((B, -B0), dim=1), **others}

    def extra_repr(self):
        return f"rank={self.rank}, scale={self.scale:g}" + (", pissa" if self.pissa else "")


@torch.no_grad()
def start_in_singular_vectors(lora, weight):
    """A = √(S/s) Vᵀ and B = U √(S/s) of the largest `rank` singular values of weight; both kept as `start`, too."""
    out_features, in_features = weight.shape
    if lora.rank > min(out_features, in_features):
        raise UserError(f"rank {lora.rank}: pissa takes that many singular vectors, and the smallest layer it is to "
                        f"adapt has only {min(out_features, in_features)}; give a smaller --lora_rank")
    U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (S[:lora.rank] / lora.scale).sqrt()                                    # (r,)
    for factor, value in ((lora.lora_A, root[:, None] * Vh[:lora.rank]), (lora.lora_B, U[:, :lora.rank] * root)):
        factor.weight.copy_(value)
        factor.register_buffer("start", factor.weight.detach().clone())           # saved with a run, like the weights


def row_norms(weight):
    """(out, in) -> (out,), in at least float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))


def dense_weight(layer):
    """The weight (out, in) that a linear layer multiplies with, also of a quantized one."""
    return layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
