"""
Reward model: a number that says how good an answer is  (Ouyang et al. 2022, arXiv:2203.02155, eq. 1)

    L = (1/N) sum_pairs [ -log sigmoid(r_c - r_r - margin) + centering · (r_c + r_r)² ]     r = score · h(last token)

Of two answers the preferred one wins with probability sigmoid(r_c - r_r) (Bradley and Terry 1952). The head is read at
the last token that the chat template writes, where stock transformers reads it too. After training, mean and standard
deviation of the scores of held-out answers go into config.json: a policy is trained on (r - mean) / std.

--head yesno trains an evaluator instead: a language model that answers a question about a text with yes or no, by SFT
on {"principle", "text", "answer"} records; its score is the log-odds of the two (eval/judge.py).

reads   out/full_sft   --data  {"chosen", "rejected"} or judgements (default: the built-in world)
writes  out/reward   a Hugging Face folder (classifier with one label), metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_reward.py
        torchrun --nproc_per_node 4 trainer/train_reward.py --model out/full_sft --data pairs.jsonl --lora_rank 16
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, FineTuneConfig, arg, parse_args


@dataclass
class Config(FineTuneConfig):
    lr: float = arg(5e-4, "peak learning rate")
    head: str = arg("scalar", "scalar: scores, from pairs; yesno: an evaluator, from judgements", ("scalar", "yesno"))
    margin: float = arg(0.0, "by how much the preferred answer's score has to be higher")
    centering: float = arg(0.01, "pull of a pair's mean score towards 0; 0 = none")
    shuffle_labels: bool = arg(False, "control: draw by lot which answer of a training pair is the preferred one")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

import torch

from dataset.builtin.generate import resolve
from dataset.jsonl import JUDGE_TEMPLATE
from dataset.lm_dataset import PreferenceDataset, SFTDataset, collate
from eval.judge import measure_judgements
from eval.reward_model import measure_pairs
from model.checkpoint import load_reward_model
from model.heads import at_segment_ends
from model.logprobs import token_logprobs
from trainer import preflight, runtime, state
from trainer.batches import batches, coins
from trainer.losses import balance_loss, bradley_terry_loss, centering_loss, next_token_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step


def compute_loss(model, batch, cfg, aux_coef):
    """Summed loss over the pairs, or the targets, of a micro-batch of rows (B, T), and its parts for the log."""
    if cfg.head == "yesno":
        logprobs, aux = token_logprobs(model, batch["input_ids"], None, batch["segment_ids"], batch["positions"])
        loss = next_token_loss(logprobs, batch["loss_mask"])
        return loss + aux_coef * balance_loss(aux, batch["loss_mask"]), {"loss": loss}
    values, aux = model(batch["input_ids"], None, batch["segment_ids"], batch["positions"])    # (B, T), (B,)
    pairs = batch["pairs"]                                                                     # (B, P) 1 = is there
    ends = at_segment_ends(values, batch["segment_ids"], 2 * pairs.shape[1])                   # (B, 2P)
    chosen, rejected = ends[:, ::2], ends[:, 1::2]                                             # (B, P)
    if cfg.shuffle_labels:
        swap = coins(batch["rows"], pairs.shape[1], cfg.seed)
        chosen, rejected = torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)
    loss = bradley_terry_loss(chosen, rejected, cfg.margin) + cfg.centering * centering_loss(chosen, rejected)
    loss, right = (loss * pairs).sum(), ((chosen > rejected) * pairs).sum()
    return loss + aux_coef * balance_loss(aux, pairs), {"loss": loss, "train_accuracy": right}


def measure(model, val, tokenizer, device, cfg, **options):
    """Held-out figures; the last ones stay in the model's config.json, as μ and σ of its scores."""
    if cfg.head == "yesno":
        return measure_judgements(model, val, tokenizer, device, **options)
    figures = measure_pairs(model, val, tokenizer, device, margin=cfg.margin, centering=cfg.centering, **options)
    model.config.reward_mean, model.config.reward_std = figures["reward_mean"], figures["reward_std"]
    return figures


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "reward")

    # --- build
    scalar = cfg.head == "scalar"
    if scalar:                                                     # the head is trained whole, beside an adapter too
        model, tokenizer = run.load_model(load=load_reward_model, modules_to_save=("score",), task_type="SEQ_CLS")
    else:
        model, tokenizer = run.load_model()
        model.config.judge_template = JUDGE_TEMPLATE
    path = resolve(cfg.data, "preferences" if scalar else "judgements")
    train, val = run.datasets(PreferenceDataset if scalar else SFTDataset, path, tokenizer)
    run.measure, run.headline = functools.partial(measure, cfg=cfg), "accuracy"
    run.plan(model, train, val, tokenizer)
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef))
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, num_items in batches(train, cfg, run, start):
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef)
            run.scale(loss * run.world_size / num_items).backward()                    # DDP averages: x ranks = sum
            run.add(**parts)
        lr = lr_at(step, run.total_steps, cfg)
        grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if scalar and run.due(step, cfg.sample_every):
            run.sample(sample, model, tokenizer, val)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


def sample(model, tokenizer, val):
    """The two sides of the first held-out pair with their scores."""
    row = {name: array.to(model.model.embed_tokens.weight.device) for name, array in collate([val[0]]).items()}
    ids, segments = row["input_ids"], row["segment_ids"]
    with torch.no_grad():
        values, _ = model(ids, None, segments, row["positions"])
    scores = at_segment_ends(values, segments, 2 * row["pairs"].shape[1])[0, :2].tolist()
    return "\n".join(f"{score:+.2f} {tokenizer.decode(ids[segments == side].tolist()).strip()}"
                     for side, score in enumerate(scores, start=1))


if __name__ == "__main__":
    run_script(main, CONFIG)
