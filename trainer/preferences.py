"""The objectives of preference optimisation over rows of pairs: which formula of losses.py gets what, what is logged.

`objective` is what train_dpo.py differentiates and what `measure` averages over held-out pairs: one definition.
"""

import functools

import torch

from eval.eval_loss import map_rows
from eval.intervals import bootstrap_ratio
from trainer.losses import dpo_loss, ipo_loss, kl_baseline, kto_loss, orpo_loss, simpo_loss
from trainer.reference import answer_logprobs

# What is compared of the two sides (h log-ratio or l log-probability, sum or mean per token), and how.
PAIRED = {
    "dpo": ("h", lambda c, r, cfg: dpo_loss(c, r, cfg.beta, cfg.label_smoothing)),
    "dpo_norm": ("h mean", lambda c, r, cfg: dpo_loss(c, r, cfg.beta, cfg.label_smoothing)),
    "ipo": ("h mean", lambda c, r, cfg: ipo_loss(c, r, cfg.beta)),
    "simpo": ("l mean", lambda c, r, cfg: simpo_loss(c, r, cfg.beta, cfg.gamma)),
    "orpo": ("l mean", lambda c, r, cfg: orpo_loss(c, r, cfg.beta)),
}
TIE = 1e-4      # nats: sides that are closer are equal but for rounding, as all are before the first step; half right


def objective(logprobs, lengths, batch, flips, cfg, z0=0.0):
    """The loss and what is logged of every pair, each (B, P). flips (B, P): True = the label is turned round."""
    lengths = lengths.clamp(min=1)                           # where no pair is, all is 0
    ratios = logprobs - batch["ref"] if "ref" in batch else logprobs                     # (B, 2P) h
    if cfg.loss == "kto":                                    # sides: a judged answer, and one to another prompt
        logp, n, h = (x[:, ::2] for x in (logprobs, lengths, ratios))
        good = (batch["desirable"].bool() ^ flips).to(h)
        loss = kto_loss(h, good, z0, cfg.beta, cfg.weight_desirable, cfg.weight_undesirable)
        margin = (2 * good - 1) * (h - z0)
        return {"loss": loss, "nll": -good * logp / n, "accuracy": right(margin), "margin": cfg.beta * margin,
                "z0": torch.full_like(h, z0)}
    (l_c, l_r), (n_c, n_r), (h_c, h_r) = (sides(x, flips) for x in (logprobs, lengths, ratios))
    what, compare = PAIRED[cfg.loss]
    c, r = (h_c, h_r) if what[0] == "h" else (l_c, l_r)
    c, r = (c / n_c, r / n_r) if what.endswith("mean") else (c, r)
    return {"loss": compare(c, r, cfg), "nll": -l_c / n_c, "accuracy": right(c - r), "margin": cfg.beta * (c - r),
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
            logprobs, _, _ = answer_logprobs(model, batch)
        total += float(((logprobs - batch["ref"])[:, 1::2] * batch["pairs"]).sum())
    return kl_baseline(run.sum_over_ranks(total) / num_items)


def measure(model, val, tokenizer, device, cfg, **options):
    """Held-out figures: the mean of everything that `objective` returns, over pairs, and the interval of accuracy."""
    names = []

    def sums(model, batch, z0):
        logprobs, lengths, _ = answer_logprobs(model, batch)
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
