"""Every training objective as a pure function: tensors in, tensors out, the equation on top."""

import math

import torch
import torch.nn.functional as F


def next_token_loss(logprobs, loss_mask):
    """L = - sum_t m_t log p(x_t | x_<t): the summed cross-entropy of the tokens the model must emit.

    logprobs (B, T) from model.logprobs.token_logprobs, loss_mask (B, T) with 1 = counts. A sum, not a mean: the caller
    divides by the number of targets over all micro-batches and ranks, so the result does not depend on the split.
    """
    return -(logprobs * loss_mask).sum()


def weighted_next_token_loss(logprobs, loss_mask, weights):
    """L = - sum_t w_t m_t log p(x_t | x_<t): as `next_token_loss`, each target times its weight.

    All (B, T). The weight multiplies the mask: it cannot make a target of what is none. A sum, to be divided by
    sum_t w_t m_t over all micro-batches and ranks; so only the ratios between the weights count.
    """
    return -(logprobs * loss_mask * weights).sum()


def balance_loss(aux_loss, loss_mask):
    """The rows' MoE balance losses (B,), weighted by their targets: it adds to `next_token_loss` and divides alike."""
    return (aux_loss * loss_mask.sum(1)).sum()


# --- reward model: scores of the two answers of a pair


def bradley_terry_loss(chosen, rejected, margin=0.0):
    """L = - log σ(r_c - r_r - m): the chosen answer wins with probability σ(r_c - r_r)  (Bradley and Terry 1952;
    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin m: Touvron et al. 2023, arXiv:2307.09288, eq. 2).

    Scores of any shape -> losses of that shape. ln 2 where a model knows nothing; the gradients of the two scores are
    opposite, so their mean is free: `centering_loss` holds it.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def centering_loss(chosen, rejected):
    """(r_c + r_r)²: pulls the mean score of a pair to 0, which the Bradley-Terry loss leaves free (Eisenstein et al.
    2023, arXiv:2312.09244). Scores of any shape -> losses of that shape; it is added with a small weight η."""
    return (chosen + rejected).square()


# --- distillation: a student S learns the distribution of a teacher T over the next token


def forward_kl(student_logits, teacher_logits, temperature=1.0):
    """KL(T‖S) = Σ_v t_v (log t_v - log s_v): the student must have mass wherever the teacher has (Hinton et al. 2015,
    arXiv:1503.02531). t, s = softmax(logits / τ). Logits (..., V) -> (...), in at least float32."""
    s, t = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    return (t.exp() * (t - s)).sum(-1)


def reverse_kl(student_logits, teacher_logits, temperature=1.0):
    """KL(S‖T) = Σ_v s_v (log s_v - log t_v): the student must have no mass where the teacher has none (Gu et al. 2023,
    arXiv:2306.08543). As `forward_kl` with the two exchanged."""
    return forward_kl(teacher_logits, student_logits, temperature)


def generalized_jsd(student_logits, teacher_logits, beta, temperature=1.0):
    """JSD_β = β KL(T‖M) + (1 - β) KL(S‖M) with M = β T + (1 - β) S (Agarwal et al. 2023, arXiv:2306.13649, eq. 1).

    0 < β < 1; JSD_β / β tends to KL(T‖S) for β → 0, JSD_β / (1 - β) to KL(S‖T) for β → 1. At most ln 2 at β = 1/2.
    """
    s, t = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))          # log(β T + (1 - β) S)
    return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)


def log_softmax(logits, temperature):
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def distillation_loss(logprobs, distances, loss_mask, alpha, scale=1.0):
    """L = Σ_t m_t [ α · (-log p_S(x_t)) + (1 - α) · scale · D(T_t, S_t) ] (Hinton et al. 2015, section 2).

    logprobs, distances (B, T) from model.distill.token_distances, loss_mask (B, T). Returns the sum and its two parts,
    unweighted. scale: τ² keeps the gradient of D independent of the temperature, which alone shrinks it by 1/τ².
    """
    cross_entropy = next_token_loss(logprobs, loss_mask)
    distance = (distances * loss_mask).sum()
    return alpha * cross_entropy + (1 - alpha) * scale * distance, cross_entropy, distance


# --- preferences: of two answers to a prompt, chosen (c) and rejected (r). With the log-probability of a whole answer
# under policy π and reference, ℓ = Σ_t m_t log p(y_t), and its log-ratio h = ℓ_π - ℓ_ref. A bar means: per token.
# Tensors of any shape, one entry per pair -> losses of that shape.


def dpo_loss(chosen, rejected, beta, label_smoothing=0.0):
    """L = - (1 - ε) log σ(β Δ) - ε log σ(-β Δ), Δ = h_c - h_r  (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε, the
    share of labels that are the wrong way round: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

    chosen, rejected: h of the two sides, or the mean per token h̄ for length-normalised DPO (Tulu 3, arXiv:2411.15124,
    eq. 6), with a larger β then. ln 2 where policy = reference; dL/dh_c = -β σ(-β Δ) = -dL/dh_r for ε = 0.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo_loss(chosen, rejected, beta):
    """L = (h̄_c - h̄_r - 1 / (2β))²: a target for the margin where DPO pushes without end  (Azar et al. 2023,
    arXiv:2310.12036, eq. 17, with log-ratios per token). 1 / (4β²) where policy = reference."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(chosen, rejected, beta, gamma):
    """L = - log σ(β (ℓ̄_c - ℓ̄_r) - γ): the log-probability per token is the reward, no reference, and a margin γ to win
    by  (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen, rejected, beta):
    """L = - ℓ̄_c - β log σ(log odds_c - log odds_r), odds = p / (1 - p) with p = exp ℓ̄  (Hong et al. 2024,
    arXiv:2403.07691, eq. 6 and 7, where β is λ): learns to answer and which answer at once, without a reference."""
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprobs):
    """log p - log(1 - p) of p = exp(logprobs); above 1 - 1e-6, p counts as that: the odds of 1 are infinite."""
    logprobs = logprobs.clamp(max=-1e-6)
    return logprobs - torch.log(-torch.expm1(logprobs))


def kto_loss(ratios, desirable, baseline, beta, weight_desirable=1.0, weight_undesirable=1.0):
    """L = λ_D (1 - σ(β (h - z0))) for a good answer, λ_U (1 - σ(β (z0 - h))) for a bad one  (Ethayarajh et al. 2024,
    arXiv:2402.01306, eq. 8).

    ratios: h of answers that were judged each by itself; desirable: 1 = good. baseline: z0, an estimate of the KL
    between policy and reference: `kl_baseline` of answers to other prompts. No gradient goes through it.
    """
    sign = 2 * desirable - 1
    weights = torch.where(desirable > 0, weight_desirable, weight_undesirable)
    return weights * (1 - torch.sigmoid(beta * sign * (ratios - baseline)))


def kl_baseline(mean_ratio):
    """z0 = max(0, mean h of mismatched pairs): how far the policy went from the reference on text unlike the labels."""
    return max(0.0, mean_ratio)


# --- reinforcement learning: of N sampled completions, per token: (N, T) float32 in and out, position t about token t
# as in model.logprobs. logprobs: of the policy π that learns; old_logprobs: as sampled, by π_old; ref_logprobs: of a
# frozen reference; make all three 0 where the completion mask is: a ratio there is 1, and nothing overflows. Ratio
# w_t = π(y_t | …) / π_old(y_t | …). Advantages (trainer/credit.py) are (N,), one for all tokens of a row, or (N, T);
# no gradient goes through them.


def clipped_objective(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """L_t = - min(w_t A, clip(w_t, 1 - ε_low, 1 + ε_high) A)  (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7;
    ε_high > ε_low, "clip-higher": DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 10).

    Returns (losses, low, high), each (N, T): a loss is flat where low (A < 0 and w below the range) or high (A > 0 and
    w above it) is True: the token is already as much rarer or likelier as one batch of samples may make it. At w = 1
    the gradient is that of - A log π: the policy gradient.
    """
    ratio, advantages = (logprobs - old_logprobs).exp(), per_token(advantages)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return losses, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def sequence_clipped_objective(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """L = - min(s A, clip(s, 1 - ε_low, 1 + ε_high) A) with s = exp( Σ_t m_t log w_t / Σ_t m_t ): one ratio for a whole
    completion, the geometric mean of its tokens'  (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7).

    Returns what `clipped_objective` does, (N, T) with the same number at all tokens of a row: reduced by "sequence" it
    counts once. advantages (N,). s moves far less than a token's ratio: ε is of the order of 3e-4.
    """
    log_ratio = (logprobs - old_logprobs) * mask                        # (N, T)
    log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return clipped_objective(log_ratio.expand_as(mask), torch.zeros_like(logprobs), advantages, clip_low, clip_high)


def cispo_objective(logprobs, old_logprobs, advantages, cap):
    """L_t = - sg(min(w_t, cap)) A log π(y_t | …), sg: no gradient goes through  (CISPO, MiniMax 2025, arXiv:2506.13585,
    eq. 4 and 5, where cap is 1 + ε_high): what is bounded is the weight of a token, never its gradient.

    Returns what `clipped_objective` does: high (N, T) is True where the cap held the weight, low nowhere.
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    high = ratio > cap
    return -ratio.clamp(max=cap) * per_token(advantages) * logprobs, torch.zeros_like(high), high


def per_token(advantages):
    """Advantages (N,) or (N, T) as (N, 1) or (N, T), without gradient."""
    advantages = advantages.detach()
    return advantages[:, None] if advantages.dim() == 1 else advantages


def token_weights(mask, how, length=0):
    """What each token counts (N, T), mask (N, T) 1 = sampled: a step's loss is  Σ weights · losses / num_items,  where
    num_items is a number over all micro-batches and ranks, so that the loss does not depend on the split.

    "token"     m                num_items = Σ m     every token counts the same, a long completion more (DAPO, PPO)
    "sequence"  m / Σ_t m        num_items = N       every completion counts the same, its tokens share (GRPO, GSPO)
    "constant"  m / length       num_items = N       nothing depends on how long a completion came out (Dr. GRPO, Liu
                                                     et al. 2025, arXiv:2503.20783); length: the longest it may be
    N counts the completions that have tokens; one without adds 0 and is never NaN.
    """
    mask = mask.float()
    if how == "token":
        return mask
    if how == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    if how == "constant":
        return mask / length
    raise ValueError(f"how={how!r}: expected token, sequence or constant")


def count_items(mask, how):
    """This micro-batch's part of the num_items of `token_weights`: the sum over all of them divides the loss."""
    return int(mask.sum()) if how == "token" else int(mask.any(1).sum())


def k1(logprobs, ref_logprobs):
    """k1 = log π - log ref: of samples of π, its mean is KL(π‖ref)  (Schulman 2020, "Approximating KL divergence").

    What a reward may pay for (detached, `token_rewards`). Never a loss: E[∇k1] = E[∇ log π] = 0, whatever ref is.
    """
    return logprobs - ref_logprobs


def k2(logprobs, ref_logprobs):
    """k2 = (log π - log ref)² / 2: near KL(π‖ref) while the two are close (off by third order).

    As a loss on samples of π itself it is right, E[∇k2] = E[(log π - log ref) ∇ log π] = ∇KL(π‖ref): after the first
    step on a batch, whose samples are π_old's, it no longer is.
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs, ref_logprobs):
    """k3 = ref/π - 1 - log(ref/π): of samples of π, its mean is KL(π‖ref), each is ≥ 0, and the variance is low.

    The estimate to log. As a loss on samples of π it is another divergence's, E[∇k3] = ∇KL(ref‖π), although GRPO
    (Shao et al. 2024, arXiv:2402.03300, eq. 4) uses it so.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def policy_kl_loss(logprobs, old_logprobs, ref_logprobs):
    """w k3, its gradient through both factors: of samples of π_old its mean is KL(π‖ref) of the next token, whatever π
    has become since, hence so is its gradient  (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).

    The penalty to add to a loss, with a small weight β. k2 is right for the first step on a batch alone, k3 for none.
    What no per-token loss sees: that a token also leads to places where π and ref differ. A KL in the reward does.
    """
    return (logprobs - old_logprobs).exp() * k3(logprobs, ref_logprobs)


def value_loss(values, old_values, returns, clip):
    """L_t = ½ max( (V - R)², (clip(V, V_old - ε, V_old + ε) - R)² )  (PPO's value clipping: Engstrom et al. 2020,
    arXiv:2005.12729, section 3).

    V(s_t) is the value of the state before token t, `old_values` what it was when the completion was sampled, R the
    returns of `gae`. ε in units of the reward; inf: no clipping. Flat where V has come more than ε nearer to R.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2
