"""
Preference optimisation without a reward model: DPO  (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) and its relatives

    L = - (1/N) sum_pairs log sigmoid(beta · (h_c - h_r))      h = log p(y|x) under the policy - under the reference

Of two answers the chosen one becomes likelier against the rejected one, measured from where the policy started. The
log-probability of an answer is the sum over its tokens. --loss chooses another objective of trainer/losses.py:
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
    lr: float = arg(3e-4, "peak learning rate: 3e-4 suits nano, 1e-6 (LoRA 1e-5) models of a billion parameters")
    batch_size: int = arg(16, "rows of pairs per optimizer step, over all ranks")
    loss: str = arg("dpo", "the objective", choices=tuple(BETA))
    beta: float = arg(0.0, "how strongly the policy is held back (orpo: weight of the odds ratio); 0 = "
                      + ", ".join(f"{name} {value:g}" for name, value in BETA.items()))
    gamma: float = arg(1.0, "simpo: margin by which the chosen answer has to win")
    label_smoothing: float = arg(0.0, "dpo: share of the labels that are expected to be wrong")
    nll: float = arg(0.0, "weight of the chosen answer's own loss per token, added to any objective (RPO)")
    weight_desirable: float = arg(1.0, "kto: weight of the good answers")
    weight_undesirable: float = arg(1.0, "kto: weight of the bad ones")
    shuffle_labels: bool = arg(False, "control: which side of a training pair is preferred is drawn by lot")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from dataset.builtin.generate import resolve
from dataset.lm_dataset import PreferenceDataset, UnpairedDataset
from eval.eval_loss import map_rows
from eval.intervals import bootstrap_ratio
from model.generate import SamplingParams, generate
from trainer import preflight, reference, runtime, state
from trainer.batches import batches, coins
from trainer.losses import balance_loss, dpo_loss, ipo_loss, kl_baseline, kto_loss, orpo_loss, simpo_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step

# What is compared of the two sides (h log-ratio or l log-probability, sum or mean per token), and how.
PAIRED = {
    "dpo": ("h", lambda c, r, cfg: dpo_loss(c, r, cfg.beta, cfg.label_smoothing)),
    "dpo_norm": ("h mean", lambda c, r, cfg: dpo_loss(c, r, cfg.beta, cfg.label_smoothing)),
    "ipo": ("h mean", lambda c, r, cfg: ipo_loss(c, r, cfg.beta)),
    "simpo": ("l mean", lambda c, r, cfg: simpo_loss(c, r, cfg.beta, cfg.gamma)),
    "orpo": ("l mean", lambda c, r, cfg: orpo_loss(c, r, cfg.beta)),
}
TIE = 1e-4      # nats: sides that are closer are equal but for rounding, as all are before the first step; half right


def compute_loss(model, batch, cfg, aux_coef, z0=0.0):
    """Summed loss over the pairs of a micro-batch of rows (B, T), and its parts for the log."""
    pairs = batch["pairs"]                                                               # (B, P) 1 = is there
    logprobs, lengths, aux = reference.answer_logprobs(model, batch)                     # (B, 2P), (B, 2P), (B,)
    flips = coins(batch["rows"], pairs.shape[1]) if cfg.shuffle_labels else torch.zeros_like(pairs, dtype=torch.bool)
    parts = objective(logprobs, lengths, batch, flips, cfg, z0)
    parts = {name: (value * pairs).sum() for name, value in parts.items()}
    parts["train_accuracy"] = parts.pop("accuracy")
    return parts["loss"] + aux_coef * balance_loss(aux, pairs), parts


def objective(logprobs, lengths, batch, flips, cfg, z0=0.0):
    """The loss and what is logged of every pair, each (B, P). flips (B, P): True = the label is turned round."""
    lengths = lengths.clamp(min=1)                           # where no pair is, all is 0
    ratios = logprobs - batch["ref"] if "ref" in batch else logprobs                     # (B, 2P) h
    if cfg.loss == "kto":                                    # sides: a judged answer, and one to another prompt
        logp, n, h = (x[:, ::2] for x in (logprobs, lengths, ratios))
        good = (batch["desirable"].bool() ^ flips).to(h)
        loss = kto_loss(h, good, z0, cfg.beta, cfg.weight_desirable, cfg.weight_undesirable)
        loss = loss - cfg.nll * good * logp / n
        margin = (2 * good - 1) * (h - z0)
        return {"loss": loss, "accuracy": right(margin), "margin": cfg.beta * margin, "z0": torch.full_like(h, z0)}
    (l_c, l_r), (n_c, n_r), (h_c, h_r) = (sides(x, flips) for x in (logprobs, lengths, ratios))
    what, compare = PAIRED[cfg.loss]
    c, r = (h_c, h_r) if what[0] == "h" else (l_c, l_r)
    c, r = (c / n_c, r / n_r) if what.endswith("mean") else (c, r)
    return {"loss": compare(c, r, cfg) - cfg.nll * l_c / n_c, "accuracy": right(c - r), "margin": cfg.beta * (c - r),
            "h_chosen": h_c, "h_rejected": h_r, "longer": n_c - n_r,
            **({"kl": -(h_c + h_r) / 2} if "ref" in batch else {})}


def sides(x, flips):
    """Chosen and rejected (B, P) of x (B, 2P), exchanged where flips (B, P) says so. Where no pair is, x must be 0."""
    chosen, rejected = x[:, ::2], x[:, 1::2]
    return torch.where(flips, rejected, chosen), torch.where(flips, chosen, rejected)


def right(margin):
    """1 where the side that should win does, 1/2 for a tie."""
    return torch.where(margin.abs() < TIE, 0.5, (margin > 0).to(margin))


@torch.no_grad()
def step_baseline(model, micro_batches, num_items, run):
    """KTO's z0 of a step: the log-ratio of answers to other prompts, over all micro-batches and ranks."""
    total = 0.0
    for batch in micro_batches:
        with run.autocast():
            logprobs, _, _ = reference.answer_logprobs(model, batch)
        total += float(((logprobs - batch["ref"])[:, 1::2] * batch["pairs"]).sum())
    return kl_baseline(run.sum_over_ranks(total) / num_items)


def measure(model, val, tokenizer, device, cfg, **options):
    """Held-out figures: the mean of everything that `objective` returns, over pairs, and the interval of accuracy."""
    names = []

    def sums(model, batch, z0):
        logprobs, lengths, _ = reference.answer_logprobs(model, batch)
        pairs = batch["pairs"]
        parts = objective(logprobs, lengths, batch, torch.zeros_like(pairs, dtype=torch.bool), cfg, z0)
        names[:] = parts
        apart = (logprobs - batch.get("ref", 0.0))[:, 1::2]
        return torch.stack([(value * pairs).sum(1) for value in (*parts.values(), apart, torch.ones_like(apart))], 1)

    def figures(z0):
        with torch.no_grad():
            return map_rows(functools.partial(sums, z0=z0), model, val, device, **options)          # (rows, k)

    rows = figures(0.0)
    if cfg.loss == "kto":                                    # of all held-out rows, so a second time with it
        rows = figures(kl_baseline(rows[:, -2].sum() / rows[:, -1].sum()))
    scores = {name: rows[:, place].sum() / rows[:, -1].sum() for place, name in enumerate(names)}
    scores["accuracy_interval"] = bootstrap_ratio(rows[:, names.index("accuracy")], rows[:, -1])
    return {**scores, "pairs": int(rows[:, -1].sum())}


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
    model, tokenizer = run.load_model(cfg)
    path = resolve(cfg.data, "preferences")
    train, val = run.datasets(UnpairedDataset if cfg.loss == "kto" else PreferenceDataset, path, tokenizer)
    run.measure, run.headline = functools.partial(measure, cfg=cfg), "accuracy"
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
        z0 = step_baseline(wrapped, micro_batches, num_items, run) if cfg.loss == "kto" else 0.0
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
            run.sample(sample, model, tokenizer, val)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


def sample(model, tokenizer, val):
    """The model's answer to the first held-out prompt."""
    row = val[0]
    targets = row["loss_mask"].nonzero()[0]
    prompt = row["input_ids"][:targets[0]].tolist()
    answer = generate(model, [prompt], SamplingParams(max_new_tokens=60, temperature=0.0), tokenizer)[0][0]
    return f"{tokenizer.decode(prompt)}{answer.text}"


if __name__ == "__main__":
    run_script(main, CONFIG)
