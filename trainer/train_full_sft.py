"""
Supervised fine-tuning: learn to answer  (Ouyang et al. 2022, arXiv:2203.02155, step 1)

    L = - (1/N) sum_t m_t log p(x_t | x_<t)      m_t = 1 on what the assistant says and on the end of its turn, else 0

The same loss as pretraining; only the mask and the data differ. Conversations are packed into rows with their masks
and do not see each other.

reads   out/pretrain   --data  {"conversations"} or {"messages"} records (default: the built-in world)
writes  out/full_sft   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_full_sft.py
        torchrun --nproc_per_node 4 trainer/train_full_sft.py --model out/pretrain --data chats.jsonl
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
    model: str = arg("out/pretrain", "checkpoint folder to start from: size, tokenizer and chat template come from it")
    optimizer: str = arg("muon", "muon (matrices by Muon, the rest by AdamW) or adamw", choices=("muon", "adamw"))
    schedule: str = arg("wsd", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    lr: float = arg(1e-3, "peak learning rate")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

from dataset.builtin.generate import resolve
from dataset.lm_dataset import SFTDataset
from model.logprobs import token_logprobs
from trainer import preflight, runtime, state
from trainer.batches import batches
from trainer.losses import balance_loss, next_token_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step


def compute_loss(model, batch, aux_coef):
    """Summed loss over the targets of a micro-batch of rows (B, T), and its parts for the log."""
    logprobs, aux = token_logprobs(model, batch["input_ids"], None, batch["segment_ids"], batch["positions"])
    loss = next_token_loss(logprobs, batch["loss_mask"])
    balance = balance_loss(aux, batch["loss_mask"])
    return loss + aux_coef * balance, {"loss": loss}


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "full_sft")

    # --- build
    model, tokenizer = run.load_model()
    path = resolve(cfg.data, "sft")
    train, val = run.datasets(SFTDataset, path, tokenizer)
    run.plan(model, train, val, tokenizer)
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, batch, model.config.aux_loss_coef))
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, num_targets in batches(train, cfg, run, start):
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, batch, model.config.aux_loss_coef)
            run.scale(loss * run.world_size / num_targets).backward()                  # DDP averages: x ranks = sum
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
