"""
Reasoning: learn to think in writing before answering  (Wei et al. 2022, arXiv:2201.11903; learned from traces as in
DeepSeek-AI 2025, arXiv:2501.12948, section 2.4)

    L = - sum_t w_t m_t log p(x_t | x_<t) / sum_t w_t m_t    m_t = 1 on thought, answer and end of turn, else 0
                                                             w_t = --tag_weight on <think> </think> <answer> </answer>,
                                                                   --thought_weight between <think> and </think>,
                                                                   --answer_weight elsewhere

SFT on conversations whose answers follow <think>…</think>. An empty thought in a record is written into its prompt, not
learned, and so is the switch: asked with enable_thinking=False, the model answers at once. The divisor is the sum over
all micro-batches and ranks, so a common factor of the weights changes nothing. Held-out figures are unweighted.

reads   out/full_sft   --data  {"conversations"} records with <think>…</think> (default: the built-in world's and chats)
writes  out/reason   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_reason.py
        torchrun --nproc_per_node 4 trainer/train_reason.py --model out/full_sft --data traces.jsonl --tag_weight 3
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import UserError
from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, FineTuneConfig, arg, parse_args


@dataclass
class Config(FineTuneConfig):
    data: str = arg("builtin:traces:0.5,builtin:sft:0.5", "jsonl, jsonl.gz, a folder or builtin; several by commas, "
                    "shares as a:0.9,b:0.1")
    optimizer: str = arg("muon", "muon (matrices by Muon, the rest by AdamW) or adamw", choices=("muon", "adamw"))
    schedule: str = arg("wsd", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    lr: float = arg(7e-4, "peak learning rate")
    tag_weight: float = arg(2.0, "weight of the tags in the loss; 2 to 5 where a model forgets to close its thoughts")
    thought_weight: float = arg(1.0, "weight of what is thought")
    answer_weight: float = arg(1.0, "weight of what is answered")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import functools

from dataset.builtin.generate import resolve
from dataset.lm_dataset import ReasonDataset
from model.logprobs import token_logprobs
from trainer import preflight, runtime, state
from trainer.batches import batches
from trainer.losses import balance_loss, weighted_next_token_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step


def compute_loss(model, batch, aux_coef):
    """Weighted sum of the loss over the targets of a micro-batch of rows (B, T), and its parts for the log."""
    logprobs, aux = token_logprobs(model, batch["input_ids"], None, batch["segment_ids"], batch["positions"])
    loss = weighted_next_token_loss(logprobs, batch["loss_mask"], batch["weights"])
    balance = balance_loss(aux, batch["loss_mask"] * batch["weights"])
    return loss + aux_coef * balance, {"loss": loss}


def check_thinking(tokenizer, folder):
    """UserError unless the chat template shows thoughts between tokens of their own and can switch them off."""
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": ".", "reasoning_content": "!"}
    if not {"<think>", "</think>"} <= tokenizer.special.keys():
        raise UserError(f"--model {folder}: <think> and </think> are no single tokens of its vocabulary; start from a "
                        "model that has them (one trained here, or of the Qwen3 family)")
    opening, closing = tokenizer.special["<think>"], tokenizer.special["</think>"]
    thought, _ = tokenizer.render([question, answer])
    direct, _ = tokenizer.render([question], add_generation_prompt=True, enable_thinking=False)
    if opening not in thought or closing not in thought or closing not in direct:
        raise UserError(f"--model {folder}: its chat template cannot switch thinking; give --chat_template chatml")


def check_weights(cfg):
    """UserError for weights that no loss can have."""
    weights = {"tag_weight": cfg.tag_weight, "thought_weight": cfg.thought_weight, "answer_weight": cfg.answer_weight}
    for name, weight in weights.items():
        if weight < 0 or not any(weights.values()):
            raise UserError(f"--{name} {weight}: weights are 0 or more, and one of them is more")
    return weights


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "reason")

    # --- build
    weights = check_weights(cfg)
    model, tokenizer = run.load_model()
    check_thinking(tokenizer, cfg.model)
    path = resolve(cfg.data, "traces")
    train, val = run.datasets(functools.partial(ReasonDataset, **weights), path, tokenizer)
    run.plan(model, train, val, tokenizer)
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, batch, model.config.aux_loss_coef))
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, sum_of_weights in batches(train, cfg, run, start):
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, batch, model.config.aux_loss_coef)
            run.scale(loss * run.world_size / sum_of_weights).backward()               # DDP averages: x ranks = sum
            run.add(**parts)
        lr = lr_at(step, run.total_steps, cfg)
        grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(runtime.first_answer, model, tokenizer, val, 160)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


if __name__ == "__main__":
    run_script(main, CONFIG)
