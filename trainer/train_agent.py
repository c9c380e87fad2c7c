"""
Reinforcement learning of tool use over several turns  (GRPO, Shao et al. 2024, arXiv:2402.03300, on whole exchanges)

    prompt → turn: <tool_call>… → result of the tool → turn: <tool_call>… → result → turn: the answer → R

    A_i = (R_i - mean_g R) / (std_g R + 1e-4)                  over the G exchanges that began with one prompt
    L   = 1/Z  sum_i sum_t  m_it [ -min(ρ_it A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high) A_i) + β ρ_it k3_it ]
    m   = 1 on what the policy sampled (words, calls, ends of turns), 0 on prompt and results;   Z = sum of m (as DAPO)

A policy that calls a tool (dataset/builtin/tools.py: calculator, units, a book about the built-in world) reads what it
answers, and goes on; one that does not has answered, and only that is rewarded, at the end: every token of every turn
has the advantage of the whole. Rows are exact from token to token: results are put between sampled ids as the chat
template lays them out, and nothing that was sampled is encoded again (trainer/agent.py).

One turn of the loop: act (play the exchanges), judge (reward them), credit (advantages), learn (update the policy).

reads   out/full_sft, after some traces of such exchanges (below)   --data  prompts with answer and checker
writes  out/agent   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_full_sft.py --model out/full_sft --data builtin:agent:0.5,builtin:sft:0.5 \\
                                         --max_steps 120 --out out/agent_sft
        python trainer/train_agent.py --model out/agent_sft --max_minutes 6
        torchrun --nproc_per_node 4 trainer/train_agent.py --model FOLDER --data prompts.jsonl \\
                                         --show_tools --max_len 1024
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
    model: str = arg("out/agent_sft", "checkpoint folder to start from: size, tokenizer and chat template come from it")
    lr: float = arg(1e-4, "peak learning rate: 1e-4 suits nano, 1e-6 (LoRA 1e-5) models of a billion parameters")
    max_turns: int = arg(4, "turns of the policy in an exchange, the answer included")
    max_new_tokens: int = arg(64, "longest turn in tokens, where a prompt does not ask for fewer")
    show_tools: bool = arg(False, "describe the tools in the prompts, in some 600 tokens: for a model that was not "
                           "taught them by examples")
    call_weight: float = arg(0.2, "share of its reward that a right answer loses if all its calls went wrong")
    beta: float = arg(0.0, "weight of the KL to the policy before training; 0 = none")
    clip_low: float = arg(0.2, "ε below")
    clip_high: float = arg(0.28, "ε above")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from eval.agent import check_tokenizer
from model.logprobs import token_logprobs
from trainer import agent, dashboard, experience, preflight, runtime, state
from trainer.credit import group_advantages
from trainer.losses import balance_loss, clipped_objective, policy_kl_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step
from trainer.rollout import Sampler


def compute_loss(model, reference, batch, cfg, aux_coef):
    """Summed loss over the exchanges of a micro-batch of rows (b, T), its parts for the log, and logprobs (b, T)."""
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


def checked(cfg, world_size):
    """UserError for settings that cannot be."""
    experience.check(cfg, world_size)
    if cfg.num_generations < 2:
        raise UserError(f"--num_generations {cfg.num_generations}: must be at least 2: an exchange is compared with "
                        "the others to its prompt")
    for name in ("beta", "clip_low", "clip_high", "call_weight"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 0")
    if cfg.call_weight > 1:
        raise UserError(f"--call_weight {cfg.call_weight}: must be at most 1, all of the reward")


def check_start(cfg, folder):
    """UserError, with what to do, where the policy that the built-in experiment starts from is not there yet."""
    if cfg.model == Config.model and not pathlib.Path(folder).exists():
        raise UserError(f"--model {cfg.model}: is not there; let a policy see some traces of tool use first: python "
                        "trainer/train_full_sft.py --model out/full_sft --data builtin:agent:0.5,builtin:sft:0.5 "
                        f"--max_steps 120 --out {cfg.model}")


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "agent")
    checked(cfg, run.world_size)
    check_start(cfg, run.parent(cfg.model))

    # --- build
    model, tokenizer = run.load_model()
    check_tokenizer(tokenizer, cfg.model)
    train, val, judge, replay = experience.prepare(run, model, tokenizer, "agent_prompts", "agent_val",
                                                  cfg.max_turns * cfg.max_new_tokens)
    run.plan(model, train, val, tokenizer)
    reference = experience.Reference(model, run.device) if cfg.beta or replay.needs_reference else None
    play = dict(max_turns=cfg.max_turns, max_len=cfg.max_len, show_tools=cfg.show_tools)
    sample, answer = functools.partial(agent.sample_turns, **play), functools.partial(agent.answer_turns, **play)
    run.measure = functools.partial(dashboard.measure, run=run, judge=judge, reference=reference, sample=sample,
                                    answer=answer)
    run.headline, run.shown_notes = dashboard.headline(val), ("reward", "calls")
    wrapped = run.wrap(model)
    experience.gate_start(run, model, tokenizer, train, judge, sample)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers,
                  lambda batch: compute_loss(wrapped, reference, batch, cfg, model.config.aux_loss_coef)[:2],
                  experience.long_rows(run, cfg.max_len, advantages=1, ref_logprobs=2),
                  lambda run: run.sample(agent.show, model, tokenizer, val, judge, cfg, sample))
    sampler = Sampler(model, cfg.rollout_dtype, run.dtype)
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = act, judge, credit, learn
    for step, items, numbers in experience.prompts(train, cfg, run, start):
        with run.sampling(model):
            rollout = experience.act(run, sampler, tokenizer, items, numbers, step, sample)
            rewards, components = judge(rollout)                                                      # (N,)
            rewards = agent.gated(rewards, rollout, cfg.call_weight)
            run.note(**dashboard.rollout_figures(run, rollout, rewards, components), **agent.call_figures(run, rollout))
            columns = {"ref_logprobs": experience.score_reference(run, reference, rollout)} if cfg.beta else {}

        columns["advantages"] = group_advantages(rewards, rollout.groups)                             # (N,)

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

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(agent.show, model, tokenizer, val, judge, cfg, sample)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


if __name__ == "__main__":
    run_script(main, CONFIG)
