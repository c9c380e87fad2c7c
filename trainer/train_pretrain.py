"""
Pretraining: learn to predict the next token of plain text  (Radford et al. 2019; packing and precision as in nanochat)

    L = - (1/N) sum_t m_t log p(x_t | x_<t)   ( + c · balance loss of a mixture of experts, model/moe.py )

N counts the targets over all micro-batches and all ranks of a step. Documents are opened and closed by <|endoftext|>
and packed into full rows, so that no step is spent on padding.

reads   --data        {"text"} records or .txt (default: the built-in world)      --tokenizer nano | base | FOLDER
writes  out/pretrain  a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_pretrain.py
        torchrun --nproc_per_node 4 trainer/train_pretrain.py --size small --data my.jsonl

Deviations from the usual recipe: 1. matrices are trained by Muon, the rest by AdamW (--optimizer adamw: all by AdamW).
2. Documents that share a row see each other unless --isolate: it costs little and the model learns what
<|endoftext|> means.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, TrainConfig, arg, parse_args


@dataclass
class Config(TrainConfig):
    size: str = arg("auto", "nano, small, base, moe, LAYERSxWIDTH or a config.json; auto: nano on a CPU, else small")
    tokenizer: str = arg("auto", "nano, base or a folder; auto: nano for the size nano, base for the others")
    isolate: bool = arg(False, "documents that share a row do not see each other")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

from dataset.builtin.generate import resolve
from dataset.lm_dataset import PretrainDataset
from model.checkpoint import load_model
from model.config import new_config
from model.generate import SamplingParams, generate
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer import preflight, runtime, state
from trainer.batches import batches
from trainer.losses import balance_loss, next_token_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step


def compute_loss(model, batch, cfg, aux_coef):
    """Summed loss over the targets of a micro-batch of rows (B, T), and its parts for the log."""
    packing = (batch["segment_ids"], batch["positions"]) if cfg.isolate else (None, None)
    logprobs, aux = token_logprobs(model, batch["input_ids"], batch.get("attention_mask"), *packing)   # (B, T), (B,)
    loss = next_token_loss(logprobs, batch["loss_mask"])
    balance = balance_loss(aux, batch["loss_mask"])
    return loss + aux_coef * balance, {"loss": loss}


@preflight.explains_out_of_memory
def main(cfg):
    run = runtime.setup(cfg, "pretrain")

    # --- build
    if cfg.model:                                                                      # continued pretraining
        model, tokenizer = load_model(cfg.model, run.build_device, run.weights_dtype)
    else:
        size = cfg.size if cfg.size != "auto" else "nano" if run.device.type == "cpu" else "small"
        name = cfg.tokenizer if cfg.tokenizer != "auto" else "nano" if size == "nano" else "base"
        tokenizer = Tokenizer.load(name)
        model = CausalLM(new_config(size, tokenizer, cfg.max_len)).to(run.build_device, run.weights_dtype)
    path = resolve(cfg.data, "pretrain")
    train, val = run.datasets(PretrainDataset, path, tokenizer)
    run.plan(model, train, val, tokenizer)
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef))
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, num_targets in batches(train, cfg, run, start):
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, batch, cfg, model.config.aux_loss_coef)
            run.scale(loss * run.world_size / num_targets).backward()                  # DDP averages: x ranks = sum
            run.add(**parts)
        lr = lr_at(step, run.total_steps, cfg)
        grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)

        run.log(step, lr, grad_norm)
        if run.due(step, cfg.eval_every):
            run.evaluate(step, model, val, tokenizer, cfg.eval_rows)
        if run.due(step, cfg.sample_every):
            run.sample(sample, model, tokenizer, cfg.seed)
        if run.due(step, cfg.save_every):
            run.save(step, model, tokenizer, optimizers)
    return run.finish(step, model, val, tokenizer, optimizers)


def sample(model, tokenizer, seed):
    """What the model writes when it starts a document."""
    params = SamplingParams(max_new_tokens=60, temperature=0.8, top_p=0.95, seed=seed)
    return generate(model, [[tokenizer.bos_id]], params, tokenizer)[0][0].text


if __name__ == "__main__":
    run_script(main, CONFIG)
