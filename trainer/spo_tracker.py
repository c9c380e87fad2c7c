"""SPO's memory: for every prompt a running estimate of how often the policy solves it  (Single-stream Policy
Optimization, Xu and Ding 2025, arXiv:2509.13232, section 3).

GRPO compares a completion with others to the same prompt, which all have to be sampled; SPO with the prompt's record.
Of prompt x, a Beta distribution: α successes and β failures that still count, α + β of them, and the value

    v(x) = α / (α + β)

    before   α = N0 (Σ r + ½) / (n + 1),  β = N0 (n - Σ r + ½) / (n + 1)     n samples of the start policy,
                                                                             N0 = 1 / (1 - ρ_min)
    draw     prompts ∝ sqrt(v (1 - v)) + ε                                   those the policy is undecided about
    credit   A = r - v(x), whitened over the step                            v of *before* this sample
    after    α ← ρ α + r,  β ← ρ β + 1 - r                                   that is, v ← v + (r - v) / (new α + β)
             ρ = clip(2^(-D / D_half), ρ_min, ρ_max)                         the faster, the more the policy has changed
             D = mean |log π_now - log π_then| per token                     on the prompt's previous completion

An experience counts 1 / (1 - ρ) samples long: 25 at ρ_max = 0.96, 8 at ρ_min = 0.875. Each prompt is forgotten by what
the policy has changed on *it*; D = 0 where it had no completion yet.

Deviations: 1. A prompt that occurs twice in one update is counted twice, one after the other. 2. π_then is the policy
that sampled the completion; the authors' program takes the one after the step that learnt from it.
"""

import torch

from model.errors import UserError


class PromptTracker:
    """α and β of each of `num_prompts` prompts, and the last completion to it. Lives on the CPU, alike on all ranks:
    each has to call `update` and `remember` with the gathered samples of all."""

    def __init__(self, num_prompts, half_life=0.06, rho_min=0.875, rho_max=0.96):
        self.half_life, self.rho_min, self.rho_max = half_life, rho_min, rho_max
        self.alpha = torch.full((num_prompts,), 0.5 / (1 - rho_min), dtype=torch.float64)      # (P,) as of no samples
        self.beta = self.alpha.clone()
        self.last = {}                                    # prompt -> its last completion: the tensors of `recall`

    def initialise(self, rewards):
        """From rewards (P, n) of n samples of the start policy to each prompt."""
        rewards = in_unit_interval(rewards)
        n, solved = rewards.shape[1], rewards.sum(1)
        effective = 1 / (1 - self.rho_min)
        self.alpha = effective * (solved + 0.5) / (n + 1)
        self.beta = effective * (n - solved + 0.5) / (n + 1)

    def values(self, prompts):
        """v of prompts (N,) -> (N,) float32: the baseline. Ask before `update`."""
        return (self.alpha / (self.alpha + self.beta))[prompts].float()

    def weights(self, epsilon=0.05):
        """What every prompt's chance of being drawn is proportional to, (P,): ½ + ε at v = ½, ε at v = 0 and v = 1."""
        v = self.alpha / (self.alpha + self.beta)
        return (v * (1 - v)).sqrt() + epsilon

    def draw(self, number, generator, epsilon=0.05):
        """`number` different prompts, by `weights`."""
        if number > len(self.alpha):
            raise UserError(f"SPO draws {number} different prompts per step, but the data has only {len(self.alpha)}: "
                            "use a smaller batch or more prompts")
        return self.weights(epsilon).multinomial(number, replacement=False, generator=generator)

    def update(self, prompts, rewards, divergences):
        """Forget by `divergences`, D (N,) of the prompts' previous completions, and count rewards (N,)."""
        rho = (2 ** (-divergences.cpu().double() / self.half_life)).clamp(self.rho_min, self.rho_max)
        for prompt, r, keep in zip(prompts.tolist(), in_unit_interval(rewards).tolist(), rho.tolist(), strict=True):
            self.alpha[prompt] = keep * self.alpha[prompt] + r
            self.beta[prompt] = keep * self.beta[prompt] + 1 - r

    def remember(self, prompts, input_ids, attention_mask, completion_mask, logprobs):
        """Keep the rows of a rollout (N, T), each as the last completion to its prompt (N,); the one before goes."""
        for row, prompt in enumerate(prompts.tolist()):
            size = int(attention_mask[row].sum())         # right-padded
            self.last[prompt] = (input_ids[row, :size].to("cpu", torch.int32), completion_mask[row, :size].bool().cpu(),
                                 logprobs[row, :size].float().cpu())

    def recall(self, prompts, pad_id=0):
        """The last completions to prompts (N,), of those that have one, as right-padded rows (K, T).

        Returns (rows (K,) = their places in `prompts`, input_ids, attention_mask, completion_mask, logprobs of then).
        """
        rows = [row for row, prompt in enumerate(prompts.tolist()) if prompt in self.last]
        ids, masks, logprobs = zip(*(self.last[int(prompts[row])] for row in rows), strict=True) if rows else ((),) * 3

        def padded(tensors, value):
            if not rows:
                return torch.zeros(0, 0)
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        real = padded([torch.ones_like(mask) for mask in masks], False)
        return (torch.tensor(rows, dtype=torch.long), padded(ids, pad_id).long(), real.bool(),
                padded(masks, False).bool(), padded(logprobs, 0.0))

    def state_dict(self):
        """Everything, as tensors: the completions one after the other."""
        prompts = sorted(self.last)
        kept = [self.last[prompt] for prompt in prompts]
        ids, masks, logprobs = (torch.cat([row[k] for row in kept]) if kept else torch.zeros(0) for k in range(3))
        return {"alpha": self.alpha, "beta": self.beta, "prompts": torch.tensor(prompts, dtype=torch.long),
                "sizes": torch.tensor([len(row[0]) for row in kept], dtype=torch.long),
                "ids": ids.to(torch.int32), "completion_mask": masks.bool(), "logprobs": logprobs.float()}

    def load_state_dict(self, state):
        if len(state["alpha"]) != len(self.alpha):
            raise UserError(f"the saved SPO table has {len(state['alpha'])} prompts, the data has {len(self.alpha)}: "
                            "continue with the data that the run began with")
        self.alpha, self.beta = state["alpha"].clone(), state["beta"].clone()
        sizes = state["sizes"].tolist()
        parts = (state[name].split(sizes) for name in ("ids", "completion_mask", "logprobs"))
        self.last = dict(zip(state["prompts"].tolist(), zip(*parts, strict=True), strict=True))


def divergence(logprobs, then, mask):
    """D (N,): mean over a row's sampled tokens of |log π_now - log π_then|; all (N, T); 0 of a row without any."""
    return ((logprobs - then).abs() * mask).sum(1) / mask.sum(1).clamp(min=1)


def in_unit_interval(rewards):
    """Rewards as float64; UserError for one outside [0, 1], which would be no number of successes."""
    rewards = rewards.cpu().double()
    outside = rewards[~((rewards >= 0) & (rewards <= 1))]
    if len(outside):
        raise UserError(f"SPO: reward {float(outside[0]):g} is outside [0, 1]; scale the reward by its known bounds")
    return rewards
