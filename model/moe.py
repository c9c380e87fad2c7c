"""Mixture of experts: many small feed-forward networks, of which a router picks k for every token.

    y_t = Σ_{e in top-k} g_te · FFN_e(x_t)  +  FFN_shared(x_t)            FFN(x) = W_down (silu(W_gate x) ⊙ W_up x)

The number of parameters grows with E, the work per token with k only. Two routers, as two families of models have them:

    softmax   s_t = softmax(W x_t);  the k largest s_te are chosen;  g = s_te, divided by their sum iff norm_topk_prob.
              (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5; Qwen3-MoE)
    sigmoid   s_t = sigmoid(W x_t);  the k largest s_te + b_e are chosen;  g = s_te / Σ s  ·  routed_scaling_factor.
              (DeepSeek-V3, arXiv:2412.19437, eq. 12-16; Dots1)   b_e steers who is chosen, never how much it counts.

Left alone, a router sends everything to a few experts, which then are the only ones that learn. Two cures:

    auxiliary loss   L = E · Σ_e f_e P_e   (Fedus et al. 2021, arXiv:2101.03961, eq. 4)   f_e: share of the k·T choices
                     that expert e got, P_e: its mean probability. 1 when balanced, E when one expert gets everything.
                     Here per row of the batch, over its real tokens, so that it does not depend on how a batch is cut.
    bias             b_e += u · sign(mean load - load_e) after each optimizer step: no gradient, hence no competition
                     with the language-model loss  (Wang et al. 2024, arXiv:2408.15664, algorithm 1).

There is no capacity limit: no token is ever dropped, and training and evaluation compute the same function.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.kernels import matmul_dtype, silu_mul

BLOCK = 128  # rows of an expert come in multiples of it


class Router(nn.Module):
    """Chooses k of E experts for each token. Computes in float32, or more, whatever the model's dtype or autocast."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.router
        self.k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        # With k = 1 the renormalised gate would be s/s = 1: the router would get no gradient from the task.
        self.renormalise = config.norm_topk_prob and self.k > 1
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))  # (E, D)
        nn.init.normal_(self.weight, std=config.initializer_range)
        if self.kind == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))  # b (E,), saved
        # How many choices each expert got since the last `update_router_bias`. Not a buffer: every rank counts its own
        # tokens, and DistributedDataParallel would overwrite buffers with those of rank 0 before each forward.
        self.load = torch.zeros(config.num_experts, dtype=torch.int64, device="cpu")

    def _apply(self, fn, recurse=True):
        """`model.to(bfloat16)` leaves b in float32: next to 0.5 a step of 0.001 would be lost in bfloat16."""
        if self.kind == "softmax":
            return super()._apply(fn, recurse)
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        self.e_score_correction_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self

    def forward(self, x):
        """x (N, D) -> gates (N, k), expert indices (N, k), probabilities (N, E) that sum to 1."""
        with torch.autocast(x.device.type, enabled=False):
            at_least = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(at_least), self.weight.to(at_least))  # (N, E)
            if self.kind == "softmax":
                scores = probs = torch.softmax(logits, dim=-1)
                chosen = scores.topk(self.k, dim=-1).indices  # (N, k)
            else:
                scores = torch.sigmoid(logits)
                probs = scores / scores.sum(dim=-1, keepdim=True)
                chosen = (scores.detach() + self.e_score_correction_bias).topk(self.k, dim=-1).indices
            gates = scores.gather(1, chosen)  # (N, k)
            if self.renormalise:
                gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
            return gates * self.scale, chosen, probs


class Experts(nn.Module):
    """E feed-forward networks of width F in three stacked tensors. A saved checkpoint holds one tensor per expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        num_experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner, width))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, width))  # (E, F, D)
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))  # (E, D, F)
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x, ends):
        """x (M, D), sorted so that rows ends[e-1] … ends[e] - 1 belong to expert e; ends (E,) int32 -> (M, D).

        An expert without tokens multiplies zero rows: it stays in the graph and its gradient is 0, not None, which
        is what DistributedDataParallel needs.
        """
        hidden = silu_mul(grouped_linear(x, self.gate_proj, ends), grouped_linear(x, self.up_proj, ends))  # (M, F)
        return grouped_linear(hidden, self.down_proj, ends)


def grouped_linear(x, weight, ends):
    """Row block e of x (M, in) times weight[e] (out, in) -> (M, out): all experts in one call, without waiting for the
    counts to arrive from the GPU (torch 2.10 and later, but not on MPS and not in float64: there expert by expert).
    ends (E,): where each block ends."""
    dtype = matmul_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if hasattr(F, "grouped_mm") and x.device.type in ("cpu", "cuda") and dtype != torch.float64:
        return F.grouped_mm(x, weight.mT, offs=ends)
    blocks = x.tensor_split(ends[:-1].tolist())  # unbind, because the gradient of weight[e] would be a full (E, F, D)
    return torch.cat([F.linear(block, w) for block, w in zip(blocks, weight.unbind(), strict=True)])


def line_up(chosen, hot):
    """Put M choices in line, expert by expert: chosen (M,), hot (M, E) the same one-hot.

    Returns place (M,), the row of the queue where each choice stands; ends (E,), where each expert's rows end; and the
    number of rows. With many choices an expert's rows are filled up to a multiple of BLOCK: kernels for GPUs need
    aligned blocks, and those for CPUs are prepared once for each size that occurs, so few sizes should.
    """
    M, E = hot.shape
    block = BLOCK if M >= E * BLOCK else 1
    line = hot.cumsum(0)  # (M, E) how many chose the expert so far
    sizes = (line[-1] + block - 1) // block * block  # (E,)
    ends = sizes.cumsum(0)
    place = (line + (ends - sizes - 1)).gather(1, chosen.unsqueeze(1)).squeeze(1)
    rows = (M + E * (block - 1)) // block * block  # the most there can be: known without waiting for the GPU
    ends[-1] = rows  # empty rows at the end go to the last expert
    return place, ends.int(), rows


class SharedExperts(nn.Module):
    """The experts that every token visits, as one feed-forward network of width num_shared_experts · F."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner = config.num_shared_experts * config.moe_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """The feed-forward half of a decoder block. `forward` returns the output and the balance loss of each row."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.with_aux = config.aux_loss_coef > 0
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.num_shared_experts else None

    def forward(self, x, mask=None):
        """x (B, T, D); mask (B, T) bool, True = real token, None = all -> y (B, T, D), aux (B,).

        aux is E · Σ_e f_e P_e of each row (1 = balanced), not yet multiplied by any coefficient; zeros if the config
        has none. Tokens never see each other here, so a padding token only affects its own, meaningless, output.
        """
        B, T, D = x.shape
        gates, chosen, probs = self.gate(x.reshape(B * T, D))  # (N, k), (N, k), (N, E) with N = B·T here
        k = chosen.shape[1]

        hot = F.one_hot(chosen.flatten(), self.num_experts)  # (N·k, E)
        place, ends, rows = line_up(chosen.flatten(), hot)
        queue = x.new_zeros(rows, D).index_copy(0, place, x.reshape(B * T, D).repeat_interleave(k, dim=0))
        y = self.experts(queue, ends)[place].view(B * T, k, D)
        y = (y * gates.unsqueeze(-1)).sum(dim=1).to(x.dtype).view(B, T, D)  # gates, and so the sum, are float32
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)

        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        picks = (hot.view(B, T, k, -1).sum(dim=2) * real.unsqueeze(-1)).sum(dim=1)  # (B, E) of the row's real tokens
        if self.training:
            self.gate.load = self.gate.load.to(x.device) + picks.sum(dim=0)
        if not self.with_aux:
            return y, probs.new_zeros(B)
        tokens = real.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        share = picks / (k * tokens)  # f (B, E)
        mean_prob = (probs.view(B, T, -1) * real.unsqueeze(-1)).sum(dim=1) / tokens  # P (B, E)
        return y, self.num_experts * (share * mean_prob).sum(dim=-1)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model (or of a wrapped one), first layer first; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, Router)]


def expert_load(model: nn.Module):
    """Share of the choices that each expert got in training mode since the last `update_router_bias`: (layers, E) on
    the CPU, this rank only; 1/E everywhere is perfect balance. An empty tensor for a dense model."""
    loads = [router.load.cpu() / router.load.sum().clamp(min=1).cpu() for router in routers(model)]
    return torch.stack(loads) if loads else torch.empty(0, 0)


@torch.no_grad()
def update_router_bias(model: nn.Module, u: float = 1e-3):
    """Call after each optimizer step: b_e += u · sign(mean load - load_e) over all ranks; then counting starts anew.

    Softmax routers have no bias and frozen ones keep theirs: for them it is only the new start. Ranks stay equal
    because the loads are summed first.
    """
    found = routers(model)
    if not found:
        return
    loads = torch.stack([router.load.to(router.weight.device) for router in found])  # (layers, E)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)
    for router, load in zip(found, loads, strict=True):
        if router.kind == "sigmoid" and router.weight.requires_grad:
            router.e_score_correction_bias += u * torch.sign(load.sum() - len(load) * load)  # exact: integers
        router.load = torch.zeros_like(router.load)
