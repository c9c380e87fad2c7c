"""AdaLoRA: low-rank updates whose ranks move to where they are needed  (Zhang et al. 2023, arXiv:2303.10512)

    y = W x + s P Λ Q x        Q (r, in), P (out, r) near-orthogonal, Λ diagonal (r,), 0 at the start      (eq. 3)

Every update starts with more directions than it may keep. Each step estimates how much the loss depends on a direction
and sets λ of the least important ones, over all layers together, to 0: few at first, until on average `rank` are left.

    I(w) = |w · ∂L/∂w|,   smoothed Ī ← β Ī + (1-β) I,   its unrest Ū ← β Ū + (1-β) |I - Ī|,   s(w) = Ī · Ū   (eq. 8-11)
    S_i  = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)                                        of direction i    (eq. 7)
    R    = ‖P^T P - I‖_F + ‖Q Q^T - I‖_F      added to the loss with weight 0.5: λ_i then says how large     (eq. 4)
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

BETA = 0.85               # of both averages, as in the paper's and PEFT's defaults
ORTHOGONALITY = 0.5       # γ, the weight of R
WARM, SETTLED = 0.1, 0.4  # shares of the steps: all directions until the one, the chosen ones only in the last other
PARTS = ("lora_A", "lora_B", "lora_E")       # Q, P and Λ under PEFT's names


class AdaLoRA(nn.Module):
    """The update of one linear layer. `kept` marks the directions that are still there."""

    def __init__(self, base, rank, scale, dropout=0.0):
        """scale: alpha over the rank at the start, whatever is left of it later."""
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.bool))
        for part in PARTS:      # Ī and Ū of each weight: buffers, so that a continued run has them
            self.register_buffer(f"mean_{part}", torch.zeros_like(getattr(self, part)))
            self.register_buffer(f"unrest_{part}", torch.zeros_like(getattr(self, part)))

    def forward(self, base, x):
        """x (..., in) -> (..., out): base is the frozen layer."""
        seen = self.dropout(x)
        return base(x) + self.scale * (seen @ (self.lora_A * self.lora_E).T @ self.lora_B.T)

    def delta(self, weight, bias):
        """What merging adds to weight (out, in), and to bias (out,) or None."""
        Q, P, L = (getattr(self, part).to(weight) for part in PARTS)
        return self.scale * P @ (Q * L), 0.0

    def stored(self, tensors):
        """This module's tensors {name: tensor} -> those of a folder: only the directions that are left."""
        kept = tensors["kept"].flatten()
        return {"lora_A": tensors["lora_A"][kept], "lora_B": tensors["lora_B"][:, kept],
                "lora_E": tensors["lora_E"][kept]}


# ------------------------------------------------------------------------------------------- in the loop


def layers_of(model):
    """The AdaLoRA modules of a model that are being trained; empty for every other method."""
    return [module for module in model.modules() if isinstance(module, AdaLoRA) and module.lora_E.requires_grad]


@torch.no_grad()
def before_step(model, scaler=None):
    """Call between the backward passes of a step and the optimizer's: add the gradient of 0.5 R, and note importances.

    R does not depend on the data, so its gradient is added once for the step, in closed form, on every rank alike:
    d‖Q Q^T - I‖_F / dQ = 2 (Q Q^T - I) Q / ‖Q Q^T - I‖_F, and the same with P^T for Q. R is a mean over all factors.
    scaler: the GradScaler of float16. Importances of a step that is not finite are not noted. Other methods have none
    of it.
    """
    layers, grad_scale = layers_of(model), 1.0 if scaler is None else scaler.get_scale()
    for layer in layers:
        for part in ("lora_A", "lora_B"):
            parameter = getattr(layer, part)
            Q = whole(parameter) if part == "lora_A" else whole(parameter).T        # (r, n)
            off = Q @ Q.T - torch.eye(len(Q), device=Q.device, dtype=Q.dtype)       # (r, r) 0 when orthonormal
            gradient = 2 * off @ Q / off.norm().clamp(min=1e-12)
            weight = ORTHOGONALITY * grad_scale / (2 * len(layers))
            add(parameter.grad, weight * (gradient if part == "lora_A" else gradient.T))
        for part in PARTS:
            parameter, mean, unrest = (getattr(layer, prefix + part) for prefix in ("", "mean_", "unrest_"))
            importance = (whole(parameter) * whole(parameter.grad) / grad_scale).abs()                       # I
            finite = importance.isfinite().all()
            new_mean = BETA * mean + (1 - BETA) * importance                                                 # eq. 9
            new_unrest = BETA * unrest + (1 - BETA) * (importance - new_mean).abs()                          # eq. 10
            mean.copy_(torch.where(finite, new_mean, mean))
            unrest.copy_(torch.where(finite, new_unrest, unrest))


@torch.no_grad()
def after_step(model, config, step, total_steps):
    """Call after the optimizer's step: set the λ of all directions beyond the budget of this step to 0.

    config: the AdapterConfig. A direction can come back, because its λ goes on learning, until the last 40 % of the
    steps: then the chosen ones are settled.
    """
    layers = layers_of(model)
    if not layers:
        return
    end = total_steps - round(SETTLED * total_steps)
    if step <= end:
        scores = [layer_scores(layer) for layer in layers]
        threshold = cut(torch.cat(scores), budget(step, total_steps, config) * len(layers))
        for layer, score in zip(layers, scores, strict=True):
            layer.kept.copy_((score > threshold)[:, None])
    for layer in layers:
        set_to(layer.lora_E, torch.where(layer.kept, whole(layer.lora_E), 0))


def budget(step, total_steps, config):
    """Directions per layer after `step`, on average: start_rank at first, then down to rank as a cubic    (eq. 12)."""
    begin, end = round(WARM * total_steps), total_steps - round(SETTLED * total_steps)
    left = min(max((end - step) / max(end - begin, 1), 0.0), 1.0)                 # 1 before the way down, 0 after it
    return config.rank + (config.start_rank - config.rank) * left**3


def layer_scores(layer):
    """S of each direction of a layer, (r,)."""
    A, B, E = (getattr(layer, "mean_" + part) * getattr(layer, "unrest_" + part) for part in PARTS)
    return E[:, 0] + A.mean(1) + B.mean(0)


def cut(scores, number):
    """The score that exactly `number` (rounded down) of the scores exceed, if no two are equal."""
    dropped = len(scores) - int(number)
    return scores.kthvalue(dropped).values if dropped > 0 else scores.new_tensor(-1.0)


def orthogonality(model):
    """R / 2: how far P and Q are from orthonormal, the mean over all factors of ‖Q Q^T - I‖_F."""
    factors = [factor for layer in layers_of(model) for factor in (whole(layer.lora_A), whole(layer.lora_B).T)]
    return torch.stack([(Q @ Q.T - torch.eye(len(Q), device=Q.device)).norm() for Q in factors]).mean()


# Under fsdp a parameter and its gradient are cut up among the ranks (trainer/parallel.py); these treat them as wholes.


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add(target, value):
    """target += value, where value is whole."""
    target.add_(distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor)
                else value)


def set_to(target, value):
    """target = value, where value is whole."""
    target.zero_()
    add(target, value)
