"""Credit: from the rewards of whole completions to the advantage of every token, as pure functions.

    GRPO and its variants, RLOO    group_advantages, rloo_advantages     against the other samples of the same prompt
    PPO                            token_rewards, gae, whiten            against a critic's value of every state
    SPO                            trainer/spo_tracker.py, whiten        against the prompt's own record

Rewards are (N,), one per completion; what is per token is (N, T), right-padded, with mask 1 on the tokens that the
policy sampled. Between them there may be others (the results of tools): they are nobody's merit, and everything here
passes over them. An advantage is data: nothing here is to be differentiated.
"""

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------- groups


def by_group(rewards, groups):
    """Rewards (N,) as (B, G): the G ≥ 2 samples of each of B prompts, which must stand in a row and be equally many."""
    _, sizes = groups.unique_consecutive(return_counts=True)
    assert len(sizes) == len(groups.unique()), f"the samples of a prompt do not stand in a row: {groups.tolist()}"
    assert (sizes == sizes[0]).all() and sizes[0] >= 2, f"groups of {sizes.unique().tolist()} samples: expected equal"
    return rewards.view(len(sizes), -1)


def centred(grouped):
    """Rewards (B, G) minus their group's mean. Less the first one before: equal rewards give 0 and not a rounding."""
    grouped = grouped - grouped[:, :1]
    return grouped - grouped.mean(1, keepdim=True)


def group_advantages(rewards, groups, scale="group", std=None):
    """A_i = (R_i - mean_g) / (std + 1e-4): how much better than the other samples of the prompt, (N,) -> (N,).

    "group"  std of the group (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2): whatever the rewards' scale, a
             prompt that is nearly always or never solved counts as much as the others
    "none"   no division (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783): it counts by how much there is to learn
    "batch"  std of all rewards of the step (Lite PPO, Liu et al. 2025, arXiv:2508.08221): those passed here, or `std`,
             which the caller computed over all ranks (`moments`, `mean_and_std`)
    All with Bessel's correction. Equal rewards in a group give exactly 0. groups (N,): the number of each row's prompt.
    """
    grouped = by_group(rewards, groups)                                  # (B, G)
    advantages = centred(grouped)
    if scale == "group":
        advantages = advantages / ((grouped - grouped[:, :1]).std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantages = advantages / ((rewards.std() if std is None else std) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}: expected group, none or batch")
    return advantages.flatten()


def rloo_advantages(rewards, groups):
    """A_i = R_i - mean of the others in the group: a baseline that does not depend on sample i, so the gradient is
    unbiased  (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, eq. 8). That is G / (G - 1) (R_i - mean_g)."""
    grouped = by_group(rewards, groups)
    return (centred(grouped) * (grouped.shape[1] / (grouped.shape[1] - 1))).flatten()


def degenerate(rewards, groups):
    """(B,) True: all samples of the prompt got the same reward, so there is nothing to learn from them."""
    grouped = by_group(rewards, groups)
    return (grouped == grouped[:, :1]).all(1)


def overlong_penalty(lengths, max_new_tokens, cache):
    """0 up to L - C tokens, then falling by 1 / C per token to -1 at L tokens and beyond: to be added to the reward
    (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13). lengths (N,); L max_new_tokens, a number or (N,); C cache > 0."""
    return -((lengths - (max_new_tokens - cache)) / cache).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- tokens


def values_before(scores):
    """A critic's scores (N, T), one after each token, as the values of the states *before* each token (N, T).

    V(s_t) is what the critic says at position t - 1, which has read the prompt and y_<t; the value after token t would
    know what was chosen. Position 0, before which nothing was read, is 0.
    """
    return F.pad(scores[:, :-1], (1, 0))


def token_rewards(rewards, old_logprobs, ref_logprobs, mask, kl_coef, finished, missing_eos_penalty=0.0):
    """r_t = - β (log π_old - log ref) + 1[t = last] (R - penalty if it did not end by itself)  (Ouyang et al. 2022,
    arXiv:2203.02155, eq. 2; the KL by its estimate k1, which as a reward is right). -> (N, T), 0 where mask is 0.

    rewards (N,), log-probabilities and mask (N, T), finished (N,). ref_logprobs may be None where β = kl_coef = 0. A
    row without sampled tokens gets nothing.
    """
    ends = mask.bool() & (mask.flip(1).cumsum(1).flip(1) == 1)           # (N, T) the last sampled token of each row
    final = rewards - missing_eos_penalty * (~finished.bool()).to(rewards)
    earned = ends * final[:, None]
    return earned if kl_coef == 0 else earned - kl_coef * (old_logprobs - ref_logprobs) * mask


def gae(token_rewards, values, mask, gamma=1.0, lam=0.95):
    """δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1};   after the last token both V and A are 0  (generalized
    advantage estimation, Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    All (N, T); t + 1 is the next *sampled* token. Returns (advantages, returns), returns = A + V: what V is to become.
    λ = 1: all rewards to come, minus V_t; λ = 0: the error of V by one step. 0 where mask is.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    next_value, advantage = values.new_zeros(2, len(values)).unbind()    # (N,) each
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


# ------------------------------------------------------------------------------------------ statistics


def moments(x, mask=None):
    """[n, Σ x, Σ x²] over x where mask is 1, in float64 on the CPU: their sum over ranks describes what all of them
    hold. x of any shape, mask of the same; None: all of x."""
    x = (x if mask is None else x[mask.bool()]).cpu().double()
    return torch.stack([torch.tensor(float(x.numel()), dtype=torch.float64), x.sum(), x.square().sum()])


def mean_and_std(moments):
    """Mean and standard deviation (Bessel's correction) as two numbers, from `moments`; 0 of nothing."""
    n, total, squares = moments.tolist()
    mean = total / max(n, 1)
    return mean, (max(squares - n * mean**2, 0) / max(n - 1, 1)) ** 0.5


def whiten(x, mask=None, statistics=None):
    """(x - mean) / sqrt(std² + 1e-8) where mask is 1, 0 elsewhere: the same size of step whatever the rewards' scale.

    statistics: `moments` summed over all ranks, where there are several; None: those of x.
    """
    mean, std = mean_and_std(moments(x, mask) if statistics is None else statistics)
    whitened = (x - mean) / (std**2 + 1e-8) ** 0.5
    return whitened if mask is None else torch.where(mask.bool(), whitened, 0)


def explained_variance(returns, errors):
    """1 - Var(R - V) / Var(R) from the `moments` of returns R and of errors R - V, over all ranks: 1 = the critic knows
    the returns, 0 = no better than a constant, below 0 = worse. 0 where the returns do not vary."""
    (_, spread), (_, left) = mean_and_std(returns), mean_and_std(errors)
    return 1 - (left / spread) ** 2 if spread > 0 else 0.0


def adapted_kl_coef(kl_coef, kl, target, rate=0.1):
    """β ← β (1 + rate · clip(KL / target - 1, ±0.2)): a coefficient that holds the KL near its target  (Ziegler et al.
    2019, arXiv:1909.08593, section 2.2). kl, target > 0 in the same unit, by token or by completion; once per rollout.
    """
    return kl_coef * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))
