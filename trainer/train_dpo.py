"""
Preference optimisation without a reward model: DPO  (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) and its relatives

    L = - (1/N) sum_pairs log sigmoid(beta · (h_c - h_r))      h = log p(y|x) under the policy - under the reference

Of two answers the chosen one becomes likelier against the rejected one, measured from where the policy started. The
log-probability of an answer is the sum over its tokens. Since both may fall as long as the rejected one falls faster,
--nll adds the chosen answer's own loss (RPO, Pang et al. 2024, arXiv:2404.19733, eq. 1).
--loss chooses another objective of trainer/losses.py:
  dpo_norm  the same per token                     ipo   a squared distance to a margin of 1 / (2 beta) per token
  simpo     no reference, per token, with a margin  orpo  no reference, plus the loss of the chosen answer: from a base
  kto       answers that are judged good or bad one by one, {"prompt", "completion", "label"}; pairs count as two

reads   out/full_sft   --data  {"chosen", "rejected"} records (default: the built-in world)
writes  out/dpo   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_dpo.py
        torchrun --nproc_per_node 4 trainer/train_dpo.py --model out/full_sft --data pairs.jsonl --lora_rank 16

Deviations: 1. The reference's log-probabilities come from a cache (trainer/reference.py), not from a second model.
2. KTO's z0 is the mean over the whole step, so that it does not depend on micro-batches and ranks; it costs a forward.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import UserError
from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, FineTuneConfig, arg, parse_args

BETA = {"dpo": 0.1, "dpo_norm": 5.0, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


@dataclass
class Config(FineTuneConfig):
    lr: float = arg(2.5e-4, "peak learning rate: 2.5e-4 suits nano, 1e-6 (LoRA 1e-5) models of a billion parameters")
    epochs: float = arg(3.0, "passes over the data; large models take 1")
    warmup_steps: int = arg(20, "steps of linear warm-up from 0")
    batch_size: int = arg(16, "rows of pairs per optimizer step, over all ranks")
    loss: str = arg("dpo", "the objective", choices=tuple(BETA))
    beta: float = arg(0.0, "how strongly the policy is held back (orpo: weight of the odds ratio); 0 = "
                      + ", ".join(f"{name} {value:g}" for name, value in BETA.items()))
    gamma: float = arg(1.0, "simpo: margin by which the chosen answer has to win")
    label_smoothing: float = arg(0.0, "dpo: share of the labels that are expected to be wrong")
    nll: float = arg(1.0, "weight of the chosen answer's own loss per token, which holds its probability up (RPO); 0 = "
                     "plain DPO; orpo has it built in")
    weight_desirable: float = arg(1.0, "kto: weight of the good answers")
    weight_undesirable: float = arg(1.0, "kto: weight of the bad ones")
    shuffle_labels: bool = arg(False, "control: which side of a training pair is preferred is drawn by lot")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from dataset.builtin.generate import resolve
from dataset.lm_dataset import PreferenceDataset, UnpairedDataset
from trainer import preferences, preflight, reference, runtime, state
from trainer.batches import batches, coins
from trainer.losses import balance_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step


def compute_loss(model, batch, cfg, aux_coef, z0=0.0):
    """Summed loss over the pairs of a micro-batch of rows (B, T), and its parts for the log."""
    pairs = batch["pairs"]                                                               # (B, P) 1 = is there
    logprobs, lengths, aux = reference.answer_logprobs(model, batch)                     # (B, 2P), (B, 2P), (B,)
    flips = coins(batch["rows"], pairs.shape[1], cfg.seed) if cfg.shuffle_labels else torch.zeros_like(pairs).bool()
    parts = preferences.objective(logprobs, lengths, batch, flips, cfg, z0)
    parts = {name: (value * pairs).sum() for name, value in parts.items()}
    parts["train_accuracy"] = parts.pop("accuracy")
    anchor = 0.0 if cfg.loss == "orpo" else cfg.nll * parts["nll"]
    return parts["loss"] + anchor + aux_coef * balance_loss(aux, pairs), parts


def check(cfg):
    """UserError for a knob of the objective that it cannot have."""
    for name in ("beta", "gamma", "nll", "weight_desirable", "weight_undesirable"):
        if not 0 <= getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 0")
    if not 0 <= cfg.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {cfg.label_smoothing}: must be at least 0 and below 0.5, from where on the "
                        "labels would mean their opposite")


@preflight.explains_out_of_memory
def main(cfg):
    check(cfg)
    cfg.beta = cfg.beta or BETA[cfg.loss]
    run = runtime.setup(cfg, "dpo")

    # --- build
    model, tokenizer = run.load_model()
    path = resolve(cfg.data, "preferences")
    train, val = run.datasets(UnpairedDataset if cfg.loss == "kto" else PreferenceDataset, path, tokenizer)
    run.measure, run.headline = functools.partial(preferences.measure, cfg=cfg), "accuracy"
    run.plan(model, train, val, tokenizer)
    compares = cfg.loss not in ("simpo", "orpo")             # with a reference: the model as it is here
    weights = reference.fingerprint(model) if compares else ""
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    if compares:
        reference.reserve(train, val)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef))
    if compares:
        reference.fill(run, model, weights, train, val)
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, num_items in batches(train, cfg, run, start):
        z0 = preferences.step_baseline(wrapped, micro_batches, num_items, run) if cfg.loss == "kto" else 0.0
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef, z0)
            run.scale(loss * run.world_size / num_items).backward()                    # DDP averages: x ranks = sum
            run.add(**parts)
        lr = lr_at(step, run.total_steps, cfg)
        grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(runtime.first_answer, model, tokenizer, val)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


if __name__ == "__main__":
    run_script(main, CONFIG)
