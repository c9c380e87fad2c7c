"""Parameter groups, the optimizers, the learning rate of a step, and the step itself."""

import math
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer

from model.adapters.adapted import learning_rate_ratios
from model.moe import update_router_bias
from trainer.parallel import full

VISITORS = 2**26        # with moments in main memory: weights whose moments are on the device at a time


class Muon(Optimizer):
    """Momentum whose update is orthogonalised, for weight matrices (Jordan 2024, kellerjordan.github.io/posts/muon).

        m ← μ m + (1 - μ) g        u = (1 - μ) g + μ m        W ← (1 - lr·wd) W - lr · 0.2·sqrt(max(rows, cols)) · O(u)

    O(u) replaces the singular values of u by values near 1, so that every direction of the matrix learns at the same
    pace; the factor gives the update the size of AdamW's (arXiv:2502.16982, eq. 4), so both share a learning rate.
    It computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, with two differences: matrices of one shape
    (experts of a mixture too) go through one batched product, and the products run in bfloat16 only where that is fast;
    on a CPU without bfloat16 units torch's version takes longer than the rest of the training step.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for shape, params in same_shape.items():
                updates = []
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                stacked = torch.stack(updates).to(self.dtype)              # (n, rows, cols) or (n, E, rows, cols)
                directions = orthogonalize_all(stacked)
                size = 0.2 * math.sqrt(max(shape[-2:]))
                for number, p in enumerate(params):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(directions[number].to(p.dtype), alpha=-group["lr"] * size)


def orthogonalize_all(stacked):
    """`orthogonalize` of matrices (n, …, rows, cols); where they are sharded, every rank does some whole ones."""
    if not isinstance(stacked, DTensor):
        return orthogonalize(stacked.flatten(0, -3)).view_as(stacked)
    before, rows = stacked.placements, stacked.dim() - 2
    if before[0].is_shard(rows):                        # rows of every matrix -> all rows of some matrices, and back
        stacked = stacked.redistribute(placements=[Shard(0)])
    mine = orthogonalize_all(stacked.to_local())
    shared = DTensor.from_local(mine, stacked.device_mesh, stacked.placements, run_check=False, shape=stacked.shape,
                                stride=stacked.stride())
    return shared.redistribute(placements=before)


def orthogonalize(u, steps=5, eps=1e-7):
    """Newton-Schulz: push all singular values of u (n, rows, cols) towards 1 without computing them.

    X ← a X + (b A + c A²) X with A = X Xᵀ applies the odd polynomial a s + b s³ + c s⁵ to every singular value s; five
    rounds take anything in (0, 1] to between 0.7 and 1.2. The coefficients are Jordan's.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u                                                # the product X Xᵀ is the small one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)              # no singular value exceeds the norm
    for _ in range(steps):
        A = x @ x.mT                                                       # (n, rows, rows)
        x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x


def build_optimizers(model, cfg, dtype=torch.float32):
    """The optimizers of a model: a list, in a fixed order, which together own every trainable parameter once.

    Matrices inside the blocks go to Muon (or AdamW with decay); embeddings and head to AdamW with decay; norm gains and
    biases to AdamW without, because pulling a gain towards 0 regularises nothing. So do all parameters of adapters,
    each kind at its own rate (`lr_ratio`): a pull towards 0 would be one towards the base model, and Muon's update, of
    full rank, is not for thin matrices.
    """
    hidden, tables, vectors, adapters = [], [], [], {}
    ratios = learning_rate_ratios(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {id(p) for name, p in model.named_parameters() if name in ("lm_head.weight", "score.weight")}
    for p in model.parameters():
        if p.requires_grad and id(p) in ratios:
            adapters.setdefault(ratios[id(p)], []).append(p)
        elif p.requires_grad:
            (vectors if p.dim() < 2 else tables if id(p) in embeddings else hidden).append(p)
    decayed = tables if cfg.optimizer == "muon" else tables + hidden
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    groups += [dict(params=params, weight_decay=0.0, lr_ratio=ratio) for ratio, params in adapters.items()]
    adamw = partial(AdamW, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    recipes = [(adamw, [g for g in groups if g["params"]])]
    if cfg.optimizer == "muon" and hidden:
        recipes.append((partial(Muon, lr=cfg.lr, weight_decay=cfg.weight_decay, dtype=dtype), [dict(params=hidden)]))
    if cfg.optimizer_state == "cpu" and any(p.is_cuda for p in model.parameters()):
        return [keep_in_main_memory(make([part])) for make, groups in recipes for part in cut(groups, VISITORS)]
    return [make(groups) for make, groups in recipes if groups]


def cut(groups, most):
    """Parameter groups in pieces of at most `most` numbers each, or of one larger tensor."""
    for group in groups:
        part, size = [], 0
        for p in group["params"]:
            if part and size + p.numel() > most:
                yield {**group, "params": part}
                part, size = [], 0
            part.append(p)
            size += p.numel()
        yield {**group, "params": part}


def keep_in_main_memory(optimizer):
    """Let the moments of an optimizer lie in main memory, and visit the device for its step only. Returns it.

    The arithmetic stays what and where it was. QLoRA's paged optimizers (arXiv:2305.14314, section 3) leave the moving
    to the driver, which moves what it must; here it is done piece by piece, see `cut`.
    """
    optimizer.in_main_memory = {}                            # parameter: its moments there, while they visit the device

    def bring(optimizer, *_):
        for p, moments in list(optimizer.state.items()):
            optimizer.in_main_memory[p] = moments
            optimizer.state[p] = {name: value.to(p.device, non_blocking=True) for name, value in moments.items()}

    def take_back(optimizer, *_):
        for p, moments in list(optimizer.state.items()):
            home = optimizer.in_main_memory.pop(p, None) or {     # pinned: the GPU copies from it by itself
                name: torch.empty_like(value, device="cpu", pin_memory=p.is_cuda) for name, value in moments.items()}
            for name, value in moments.items():
                home[name].copy_(value, non_blocking=True)
            optimizer.state[p] = home
        if torch.cuda.is_available():
            torch.cuda.synchronize()                         # whoever saves them reads them next

    optimizer.register_step_pre_hook(bring)
    optimizer.register_step_post_hook(take_back)
    optimizer.register_load_state_dict_post_hook(take_back)
    return optimizer


def lr_at(step, total_steps, cfg):
    """Learning rate of update `step` (1 … total_steps): 0 → lr over warmup_steps, then down to exactly lr / 10.

    wsd stays at lr and goes down linearly over the last 30 % of the steps; cosine goes down all the way; constant
    stays.
    """
    warmup, down = turning_points(total_steps, cfg)
    if step < warmup:
        return cfg.lr * step / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(max(1 - (total_steps - step) / max(down, 1), 0.0), 1.0)       # 0 at its start, 1 at the last step
    if cfg.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return cfg.lr * (1 - 0.9 * progress)


def turning_points(total_steps, cfg):
    """(warm-up steps, length of the way down in steps) of a schedule."""
    warmup = min(cfg.warmup_steps, total_steps - 1)
    return warmup, (total_steps - warmup) * {"wsd": 0.3, "cosine": 1.0, "constant": 0.0}[cfg.schedule]


def optimizer_step(model, optimizers, lr, grad_clip, scaler=None, on_nonfinite="stop"):
    """Clip the gradient to norm `grad_clip`, update, clear; then balance the experts of a mixture that does it by bias.

    scaler        of float16: the gradient is divided by what `Run.scale` multiplied the loss with
    on_nonfinite  "skip": a gradient that is not finite changes nothing, neither weights nor moments nor balance. In
                  float16 always: such a step is how the scaler finds out that its scale is too large.
    Returns the norm before clipping, a 0-d tensor.
    """
    if scaler is not None:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    left_out = (scaler is not None or on_nonfinite == "skip") and not norm.isfinite()      # here a GPU is waited for
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        if not left_out:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    if left_out:
        update_router_bias(model, u=0.0)                                 # forgets the load of this step, no more
    else:
        update_router_bias(model)
    return norm
