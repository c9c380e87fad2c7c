"""
GRPO: a completion is as good as it is better than the others to its prompt  (Shao et al. 2024, arXiv:2402.03300, eq. 3)

    A_i = (R_i - mean_g R) / (std_g R + 1e-4)                  over the G completions of a prompt
    L   = 1/Z  sum_i sum_t  w_it [ -min(ρ_it A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high) A_i) + β ρ_it k3_it ]
    ρ   = π(y_t | x, y_<t) / π_old(y_t | x, y_<t),   k3 = ref/π - 1 - log(ref/π)

--loss            objective        w, Z                       advantage, ε (low, high)
    grpo          as above         1/|y_i|, completions       / group std, 0.2
    dr_grpo       as above         1/L_max, completions       no division, 0.2           arXiv:2503.20783
    dapo          as above         1, tokens                  / group std, 0.2, 0.28     arXiv:2503.14476
    gspo          ρ of the whole   1/|y_i|, completions       / group std, 3e-4, 4e-4    arXiv:2507.18071
    cispo         -sg(min(ρ, c)) A log π     1, tokens        / group std, c = 5         arXiv:2506.13585
    rloo          as above         1, tokens                  R_i - mean of the others   arXiv:2402.14740

One turn of the loop: act (sample completions), judge (reward them), credit (advantages), learn (update the policy).

reads   out/full_sft   --data  prompts with answer and checker, or any prompts with a --reward (default: built-in world)
writes  out/grpo   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_grpo.py --max_minutes 6
        torchrun --nproc_per_node 4 trainer/train_grpo.py --model out/full_sft --data prompts.jsonl --lora_rank 16

Deviations: 1. the KL term is weighted by ρ, which makes its gradient that of KL(π‖ref) (losses.policy_kl_loss).
2. grpo keeps a completion that was cut off like any other; --mask_truncated leaves it out, as DAPO does. 3. β is 0.1 by
default with every --loss, where the papers have 0.04 (GRPO) or none: a model of a million parameters is moved by the
noise of its gradients alone, see RL.md.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import UserError
from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, RLConfig, arg, parse_args

# --loss: (weights of the tokens, scale of the advantages, clip_low, clip_high)
VARIANTS = {"grpo": ("sequence", "group", 0.2, 0.2), "dr_grpo": ("constant", "none", 0.2, 0.2),
            "dapo": ("token", "group", 0.2, 0.28), "gspo": ("sequence", "group", 3e-4, 4e-4),
            "cispo": ("token", "group", 0.0, 5.0), "rloo": ("token", "none", 0.2, 0.2)}


@dataclass
class Config(RLConfig):
    loss: str = arg("dapo", "the objective, see above", choices=tuple(VARIANTS))
    beta: float = arg(0.1, "weight of the KL to the policy before training; 0 = none")
    clip_low: float = arg(0.0, "ε below; 0 = what the --loss has")
    clip_high: float = arg(0.0, "ε above (cispo: the cap); 0 = what the --loss has")
    scale: str = arg("", "divide advantages by the std of the group, of the batch, or by nothing; empty: as --loss",
                     choices=("", "group", "batch", "none"))
    resample: int = arg(0, "rounds in which prompts whose completions all got the same reward are replaced by others")
    mask_truncated: bool = arg(False, "completions that were cut off teach nothing (DAPO's overlong filtering)")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from model.logprobs import token_logprobs
from trainer import dashboard, experience, preflight, runtime, state
from trainer.credit import group_advantages, mean_and_std, moments, rloo_advantages
from trainer.losses import (
    balance_loss,
    cispo_objective,
    clipped_objective,
    policy_kl_loss,
    sequence_clipped_objective,
    token_weights,
)
from trainer.optim import build_optimizers, lr_at, optimizer_step
from trainer.rollout import Sampler


def compute_loss(model, reference, batch, cfg, aux_coef):
    """Summed loss over the completions of a micro-batch of rows (b, T), its parts for the log, and logprobs (b, T)."""
    if "loss_mask" in batch:
        return experience.replay_loss(model, reference, batch, cfg, aux_coef)
    mask, old, advantages = batch["completion_mask"], batch["old_logprobs"], batch["advantages"]      # …, (b,)
    logprobs, aux = token_logprobs(model, batch["input_ids"], batch["attention_mask"], temperature=cfg.temperature)
    logprobs = logprobs * mask                                                                        # (b, T)
    if cfg.loss == "gspo":
        losses, low, high = sequence_clipped_objective(logprobs, old, advantages, mask, cfg.clip_low, cfg.clip_high)
    elif cfg.loss == "cispo":
        losses, low, high = cispo_objective(logprobs, old, advantages, cfg.clip_high)
    else:
        losses, low, high = clipped_objective(logprobs, old, advantages, cfg.clip_low, cfg.clip_high)
    kl = policy_kl_loss(logprobs, old, batch["ref_logprobs"]) if cfg.beta else torch.zeros_like(losses)
    weights = token_weights(mask, VARIANTS[cfg.loss][0], cfg.max_new_tokens)
    loss = (weights * (losses + cfg.beta * kl)).sum() + aux_coef * balance_loss(aux, weights)
    per_token = {"loss": losses, "kl_to_ref": kl, "clip_low": low, "clip_high": high}
    return loss, {name: (value * mask).sum() for name, value in per_token.items()}, logprobs.detach()


def credit(run, rewards, groups):
    """Advantages (N,) of completions with rewards (N,)."""
    if run.cfg.loss == "rloo":
        return rloo_advantages(rewards, groups)
    _, std = mean_and_std(sum(run.gather(moments(rewards))))          # of the batch: over all ranks
    return group_advantages(rewards, groups, run.cfg.scale, std)


def fill_in(cfg):
    """Give the settings the numbers of their --loss; UserError for what cannot be."""
    _, scale, low, high = VARIANTS[cfg.loss]
    cfg.scale, cfg.clip_low, cfg.clip_high = cfg.scale or scale, cfg.clip_low or low, cfg.clip_high or high
    if cfg.num_generations < 2:
        raise UserError(f"--num_generations {cfg.num_generations}: must be at least 2: a completion is compared with "
                        "the others to its prompt")
    experience.at_least(cfg, 0, "beta", "clip_low", "clip_high", "resample")


@preflight.explains_out_of_memory
def main(cfg):
    fill_in(cfg)                              # before the run looks whether it continues one with other settings
    run = runtime.setup(cfg, "grpo")
    experience.check(cfg, run.world_size)
    reduction = VARIANTS[cfg.loss][0]

    # --- build
    model, tokenizer = run.load_model()
    train, val, judge, replay = experience.prepare(run, model, tokenizer, "practice", "practice_val")
    run.plan(model, train, val, tokenizer)
    reference = experience.Reference(model, run.device) if cfg.beta or replay.needs_reference else None
    run.measure = functools.partial(dashboard.measure, run=run, judge=judge, reference=reference)
    run.headline, run.shown_notes = dashboard.headline(val), ("reward", "length")
    wrapped = run.wrap(model)
    experience.gate_start(run, model, tokenizer, train, judge)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers,
                  lambda batch: compute_loss(wrapped, reference, batch, cfg, model.config.aux_loss_coef)[:2],
                  experience.long_rows(run, advantages=1, ref_logprobs=2),
                  lambda run: run.sample(dashboard.show, model, tokenizer, val, judge, cfg))
    sampler = Sampler(model, cfg.rollout_dtype, run.dtype)
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = act, judge, credit, learn
    for step, items, numbers in experience.prompts(train, cfg, run, start):
        with run.sampling(model):
            rollout = experience.act(run, sampler, tokenizer, items, numbers, step)
            rewards, components = judge(rollout)                                                      # (N,)
            run.note(**dashboard.rollout_figures(run, rollout, rewards, components))
            if cfg.resample:
                rollout, rewards = experience.replace_flat(run, sampler, tokenizer, train, rollout, rewards, judge,
                                                           numbers, step)
            columns = {"ref_logprobs": experience.score_reference(run, reference, rollout)} if cfg.beta else {}

        columns["advantages"] = credit(run, rewards, rollout.groups)                                  # (N,)
        if cfg.mask_truncated:
            rollout = experience.without(rollout, ~rollout.finished)

        lr = lr_at(step, run.total_steps, cfg)
        updates = experience.updates(run, rollout, columns, step, reduction, replay)
        for update, part, micro_batches, num_items in updates:
            seen = []
            for batch in run.accumulate(wrapped, micro_batches):
                with run.autocast():
                    loss, parts, logprobs = compute_loss(wrapped, reference, batch, cfg, model.config.aux_loss_coef)
                run.scale(loss * run.world_size / num_items).backward()                # DDP averages: x ranks = sum
                run.add(**parts)
                seen.append(logprobs)
            if update == 0:                                             # the weights are still those that sampled
                run.note(**experience.agreement(run, sampler, part, micro_batches, seen))
            grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(dashboard.show, model, tokenizer, val, judge, cfg)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


if __name__ == "__main__":
    run_script(main, CONFIG)
