"""
SPO: a completion is as good as it is better than the prompt's own record  (Xu and Ding 2025, arXiv:2509.13232)

    A_i = (R_i - v(x_i)) whitened over the step,   v(x) = α / (α + β)  a tracker of every prompt, of before the step
    L   = 1/tokens  sum_i sum_t  -min(ρ_it A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high) A_i)
    α ← ρ_x α + R,   β ← ρ_x β + 1 - R,   ρ_x = clip(2^(-D / 0.06), 0.875, 0.96)           after the update

No group: every completion answers another prompt, drawn by sqrt(v (1 - v)) + ε, those the policy is undecided about
most. D is how far the policy has moved on the prompt's previous completion (trainer/spo_tracker.py).

One turn of the loop: act (sample completions), judge (reward them), credit (advantages), learn (update the policy).

reads   out/full_sft   --data  prompts with answer and checker, or any prompts with a --reward (default: built-in world)
writes  out/spo   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/ (the tracker is in it)
run     python trainer/train_spo.py --max_minutes 6
        torchrun --nproc_per_node 4 trainer/train_spo.py --model out/full_sft --data prompts.jsonl --lora_rank 16

Deviations: 1. a KL penalty is added (--beta), as in train_grpo.py and for its reasons; the paper has none. 2. only
--pool prompts of the data are used, each of which is tried --offline times before the start.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import UserError
from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, RLConfig, arg, parse_args


@dataclass
class Config(RLConfig):
    num_generations: int = arg(1, "completions of each prompt")
    pool: int = arg(2048, "prompts of the data that are practised; 0 = all of them")
    offline: int = arg(4, "completions of the start policy to each of them, from which its record begins")
    beta: float = arg(0.1, "weight of the KL to the policy before training; 0 = none")
    clip_low: float = arg(0.2, "ε below")
    clip_high: float = arg(0.28, "ε above")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from model.logprobs import token_logprobs
from trainer import dashboard, experience, preflight, runtime, state
from trainer.batches import row_stream
from trainer.credit import moments, whiten
from trainer.losses import balance_loss, clipped_objective, policy_kl_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step
from trainer.rollout import Rollout, Sampler, sample, score
from trainer.spo_tracker import PromptTracker, divergence


def compute_loss(model, reference, batch, cfg, aux_coef):
    """Summed loss over the completions of a micro-batch of rows (b, T), its parts for the log, and logprobs (b, T)."""
    if "loss_mask" in batch:
        return experience.replay_loss(model, reference, batch, cfg, aux_coef)
    mask, old, advantages = batch["completion_mask"], batch["old_logprobs"], batch["advantages"]      # …, (b,)
    logprobs, aux = token_logprobs(model, batch["input_ids"], batch["attention_mask"], temperature=cfg.temperature)
    logprobs = logprobs * mask                                                                        # (b, T)
    losses, low, high = clipped_objective(logprobs, old, advantages, cfg.clip_low, cfg.clip_high)
    kl = policy_kl_loss(logprobs, old, batch["ref_logprobs"]) if cfg.beta else torch.zeros_like(losses)
    loss = (mask * (losses + cfg.beta * kl)).sum() + aux_coef * balance_loss(aux, mask)
    per_token = {"loss": losses, "kl_to_ref": kl, "clip_low": low, "clip_high": high}
    return loss, {name: (value * mask).sum() for name, value in per_token.items()}, logprobs.detach()


def pool_size(run, data):
    """How many prompts are practised; UserError where a step asks more."""
    size = min(run.cfg.pool or len(data), len(data))
    if run.rows_per_step > size:
        raise UserError(f"--batch_size {run.cfg.batch_size}: asks {run.rows_per_step} different prompts per step, and "
                        f"of {len(data)} prompts --pool {run.cfg.pool} leaves {size}; lower --batch_size, or raise "
                        "--pool or give more prompts")
    return size


def offline_rewards(run, model, tokenizer, data, pool, size, judge):
    """Rewards (size, n) of n = --offline completions of the start policy to each prompt of the pool, on every rank."""
    cfg = run.cfg
    places = list(range(size))[run.rank::run.world_size]
    run.print(f"  record  {cfg.offline} completions to each of {size:,} prompts, from which their records begin")
    with run.sampling(model):
        rollout = sample(model, tokenizer, [data[pool(place)] for place in places], cfg.offline, cfg.max_new_tokens,
                         cfg.temperature, cfg.seed * 2**32, places, 4 * cfg.batch_size)
    mine = judge(rollout)[0].view(-1, cfg.offline)
    rewards = torch.zeros(size, cfg.offline)
    for rank, part in enumerate(run.gather(mine)):
        rewards[rank::run.world_size] = part
    return rewards


def draw(run, tracker, pool, step):
    """{"row", "place"} of the step's prompts, as the tracker thinks worth while: the same on every rank."""
    places = tracker.draw(run.rows_per_step, torch.Generator().manual_seed(run.cfg.seed * 2**32 + step)).tolist()
    if run.cfg.overfit_batch:                                         # by itself it would go on to others
        places = list(range(run.rows_per_step))
    return [{"row": pool(place), "place": place} for place in places]


def credit(run, tracker, rows, rewards):
    """Advantages (N,) of completions with rewards (N,) to the prompts with numbers `rows` (N,) in the pool."""
    gains = rewards - tracker.values(rows)                            # before the tracker has heard of these rewards
    return whiten(gains, statistics=sum(run.gather(moments(gains))))


def remember(run, model, tracker, rollout, rows, rewards):
    """Tell the tracker, on every rank, of the rewards of all ranks, and how far the updated policy has moved."""
    with run.sampling(model):
        known, ids, real, mask, then = tracker.recall(rows)                                           # (K,), (K, T)
        moved = torch.zeros(len(rows))                                                                # (N,) D, 0 = new
        if len(known):
            before = Rollout(ids, real, mask, then, known, real[:, 0], [""] * len(known), [{}] * len(known), 0)
            now = score(model, before, run.cfg.temperature, run.cfg.micro_batch_size)
            moved[known] = divergence(now, then, mask)
    for prompts, solved, distances, *texts in run.gather((rows, rewards, moved, rollout.input_ids,
                                                          rollout.attention_mask, rollout.completion_mask,
                                                          rollout.old_logprobs)):
        tracker.update(prompts, solved, distances)
        tracker.remember(prompts, *texts)


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "spo")
    experience.check(cfg, run.world_size)
    experience.at_least(cfg, 0, "beta", "clip_low", "clip_high", "pool")
    experience.at_least(cfg, 1, "offline")

    # --- build
    model, tokenizer = run.load_model()
    train, val, judge, replay = experience.prepare(run, model, tokenizer, "practice", "practice_val")
    run.plan(model, train, val, tokenizer)
    reference = experience.Reference(model, run.device) if cfg.beta or replay.needs_reference else None
    run.measure = functools.partial(dashboard.measure, run=run, judge=judge, reference=reference)
    run.headline, run.shown_notes = dashboard.headline(val), ("reward", "length")
    pool = row_stream(train, cfg.seed)                                # place in it -> row of the data
    tracker = run.keeps["tracker"] = PromptTracker(pool_size(run, train))
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
        tracker.initialise(offline_rewards(run, model, tokenizer, train, pool, len(tracker.alpha), judge))
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = act, judge, credit, learn
    for step, items, numbers in experience.prompts(train, cfg, run, start, lambda step: draw(run, tracker, pool, step)):
        with run.sampling(model):
            rollout = experience.act(run, sampler, tokenizer, items, numbers, step)
            rewards, components = judge(rollout)                                                      # (N,)
            run.note(**dashboard.rollout_figures(run, rollout, rewards, components))
            columns = {"ref_logprobs": experience.score_reference(run, reference, rollout)} if cfg.beta else {}

        rows = torch.tensor([item["place"] for item in rollout.items])                                # (N,)
        columns["advantages"] = credit(run, tracker, rows, rewards)                                   # (N,)

        lr = lr_at(step, run.total_steps, cfg)
        updates = experience.updates(run, rollout, columns, step, "token", replay)
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

        remember(run, model, tracker, rollout, rows, rewards)

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
