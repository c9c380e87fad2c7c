"""
PPO: a token is as good as the answer turned out better than a critic expected  (Schulman et al. 2017,
arXiv:1707.06347; for language models: Ouyang et al. 2022, arXiv:2203.02155)

    r_t = -β (log π_old - log ref)(y_t) + 1[t = last] R        reward of token t; R less a penalty if it did not end
    δ_t = r_t + γ V(s_t+1) - V(s_t),   A_t = δ_t + γ λ A_t+1   s_t: the prompt and y_<t, before token t; A is whitened
    L   = 1/tokens  sum -min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t)                                     policy
    L_V = 1/tokens  sum ½ max((V - ret)², (clip(V, V_old ± ε_v) - ret)²),   ret_t = A_t + V_old(s_t)   critic

The critic is a model of its own with a scalar head and an optimizer of its own: a copy of the policy, or the reward
model of --critic. Before the policy moves it learns alone for --critic_warmup steps.

One turn of the loop: act (sample completions), judge (reward them), credit (advantages), learn (update the policy).

reads   out/full_sft   --data  prompts with answer and checker, or any prompts with a --reward (default: built-in world)
writes  out/ppo   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/ (the critic is in it)
run     python trainer/train_ppo.py --max_minutes 6
        torchrun --nproc_per_node 4 trainer/train_ppo.py --model out/full_sft --data prompts.jsonl --reward out/reward

Deviations: 1. the critic's weights are its own, so c_v only scales a gradient that Adam scales back: there is none.
2. the passes over a rollout end early where the policy has moved by --target_kl.
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
    minibatches: int = arg(2, "optimizer steps that the completions of a step are dealt to")
    inner_epochs: int = arg(2, "passes over the completions of a step")
    critic: str = arg("", "reward model or other folder that the critic begins as; empty: as the policy")
    critic_lr: float = arg(1e-3, "learning rate of the critic")
    critic_warmup: int = arg(5, "first steps, in which the critic learns and the policy does not")
    beta: float = arg(0.02, "price of a nat of KL to the policy before training, in reward; 0 = none")
    kl_target: float = arg(0.0, "nats per completion: beta is raised and lowered to keep the KL there; 0 = beta stays")
    gamma: float = arg(1.0, "discount of rewards to come, per token")
    lam: float = arg(0.95, "λ of the advantages: 1 = only rewards count, 0 = only the critic's next value")
    clip: float = arg(0.2, "ε of the policy")
    value_clip: float = arg(0.2, "ε of the critic, in units of the reward")
    missing_eos: float = arg(1.0, "taken off the reward of a completion that did not end by itself")
    target_kl: float = arg(0.05, "nats per token by which the policy may move on a rollout; 0 = no limit")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from model.checkpoint import load_reward_model
from model.logprobs import token_logprobs
from trainer import dashboard, experience, preflight, runtime, state
from trainer.credit import adapted_kl_coef, explained_variance, gae, moments, token_rewards, values_before, whiten
from trainer.losses import balance_loss, clipped_objective, k3, value_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step
from trainer.rollout import Sampler


def compute_loss(model, critic, reference, batch, cfg, aux_coef):
    """Summed losses of policy and critic over the completions of a micro-batch of rows (b, T), their parts for the log,
    and logprobs (b, T)."""
    if "loss_mask" in batch:
        return experience.replay_loss(model, reference, batch, cfg, aux_coef)
    mask, old, advantages = batch["completion_mask"], batch["old_logprobs"], batch["advantages"]      # (b, T)
    logprobs, aux = token_logprobs(model, batch["input_ids"], batch["attention_mask"], temperature=cfg.temperature)
    logprobs = logprobs * mask                                                                        # (b, T)
    losses, low, high = clipped_objective(logprobs, old, advantages, cfg.clip, cfg.clip)
    scores, critic_aux = critic(batch["input_ids"], batch["attention_mask"])                          # (b, T)
    value_losses = value_loss(values_before(scores), batch["values"], batch["returns"], cfg.value_clip)
    loss = (mask * (losses + value_losses)).sum() + aux_coef * balance_loss(aux + critic_aux, mask)
    per_token = {"loss": losses, "value_loss": value_losses, "moved": k3(old, logprobs), "clip_low": low,
                 "clip_high": high}
    return loss, {name: (value * mask).sum() for name, value in per_token.items()}, logprobs.detach()


class KLCoefficient:
    """β, which goes up and down with --kl_target."""

    def __init__(self, beta):
        self.beta = beta

    def state_dict(self):
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def load_state_dict(self, saved):
        self.beta = float(saved["beta"])


def credit(run, rollout, rewards, columns, beta):
    """(advantages, returns) (N, T) of completions with rewards (N,), and figures for the log."""
    cfg, mask, ref = run.cfg, rollout.completion_mask, columns.get("ref_logprobs")
    paid = token_rewards(rewards, rollout.old_logprobs, ref, mask, beta, rollout.finished, cfg.missing_eos)
    advantages, returns = gae(paid, columns["values"], mask, cfg.gamma, cfg.lam)
    statistics = [sum(run.gather(moments(x, mask))) for x in (advantages, returns, returns - columns["values"])]
    return whiten(advantages, mask, statistics[0]), returns, explained_variance(*statistics[1:])


def checked(cfg, run):
    """UserError for settings that cannot be."""
    experience.check(cfg, run.world_size)
    experience.at_least(cfg, 0, "beta", "kl_target", "target_kl", "clip", "missing_eos", "critic_warmup")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must lie between 0 and 1")
    for name in ("critic_lr", "value_clip"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be above 0")
    if run.scaler:
        raise UserError("--dtype float16: two models would share one scale of the loss; use bfloat16 or float32")
    if cfg.kl_target and not cfg.beta:
        raise UserError(f"--kl_target {cfg.kl_target}: adapts --beta, which is 0; give it a start, as 0.02")


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "ppo")
    checked(cfg, run)

    # --- build
    model, tokenizer = run.load_model()
    critic, _ = run.load_model(folder=cfg.critic, load=load_reward_model, modules_to_save=("score",),
                               task_type="SEQ_CLS")
    train, val, judge, replay = experience.prepare(run, model, tokenizer, "practice", "practice_val")
    run.plan(model, train, val, tokenizer)
    reference = experience.Reference(model, run.device) if cfg.beta or replay.needs_reference else None
    run.measure = functools.partial(dashboard.measure, run=run, judge=judge, reference=reference)
    run.headline, run.shown_notes = dashboard.headline(val), ("reward", "length")
    wrapped, wrapped_critic = run.wrap(model), run.wrap(critic)
    experience.gate_start(run, model, tokenizer, train, judge)
    optimizers, critic_optimizers = (build_optimizers(part, cfg, run.muon_dtype) for part in (model, critic))
    both = [*optimizers, *critic_optimizers]
    run.keeps = {"critic": critic, "beta": KLCoefficient(cfg.beta)}
    run.preflight(wrapped, both, lambda batch: compute_loss(wrapped, wrapped_critic, reference, batch, cfg,
                                                            model.config.aux_loss_coef)[:2],
                  experience.long_rows(run, advantages=2, values=2, returns=2),
                  lambda run: run.sample(dashboard.show, model, tokenizer, val, judge, cfg))
    sampler = Sampler(model, cfg.rollout_dtype, run.dtype)
    start = step = state.resume(run, model, both)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = act, judge, credit, learn
    for step, items, numbers in experience.prompts(train, cfg, run, start):
        with run.sampling(model, critic):
            rollout = experience.act(run, sampler, tokenizer, items, numbers, step)
            rewards, components = judge(rollout)                                                      # (N,)
            run.note(**dashboard.rollout_figures(run, rollout, rewards, components))
            columns = {"ref_logprobs": experience.score_reference(run, reference, rollout)} if cfg.beta else {}
            columns["values"] = experience.score_values(run, critic, rollout)                         # (N, T)

        beta = run.keeps["beta"]
        columns["advantages"], columns["returns"], explained = credit(run, rollout, rewards, columns, beta.beta)
        run.note(explained_variance=explained)

        lr = lr_at(step, run.total_steps, cfg)
        updates = experience.updates(run, rollout, columns, step, "token", replay)
        for update, part, micro_batches, num_items in updates:
            seen = []
            for batch in run.accumulate(wrapped, micro_batches):
                with run.autocast():
                    loss, parts, logprobs = compute_loss(wrapped, wrapped_critic, reference, batch, cfg,
                                                         model.config.aux_loss_coef)
                run.scale(loss * run.world_size / num_items).backward()                # DDP averages: x ranks = sum
                run.add(**parts)
                seen.append(logprobs)
            if update == 0:                                             # the weights are still those that sampled
                run.note(**experience.agreement(run, sampler, part, micro_batches, seen))
            if 0 < cfg.target_kl < experience.moved(run, part, micro_batches, seen):     # in the updates before this
                model.zero_grad(set_to_none=True)
                critic.zero_grad(set_to_none=True)
                break
            grad_norm = optimizer_step(model, optimizers, 0.0 if step <= cfg.critic_warmup else lr, cfg.grad_clip,
                                       run.scaler, cfg.on_nonfinite)
            optimizer_step(critic, critic_optimizers, cfg.critic_lr, cfg.grad_clip, None, cfg.on_nonfinite)

        if cfg.kl_target:
            kl = experience.mean_over_rows(run, (rollout.old_logprobs - columns["ref_logprobs"]).sum(1))
            beta.beta = adapted_kl_coef(beta.beta, kl, cfg.kl_target)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(dashboard.show, model, tokenizer, val, judge, cfg)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, both)
    return run.finish(step, model, val, tokenizer, both)


if __name__ == "__main__":
    run_script(main, CONFIG)
