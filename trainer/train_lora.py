"""
Fine-tuning through an adapter: learn something new without touching the model  (LoRA: Hu et al. 2021, arXiv:2106.09685)

    L = - (1/N) sum_t m_t log p(x_t | x_<t)      as in train_full_sft.py, but only the adapter's parameters are trained:
    y = W x + s B A x                            W frozen, A and B thin; model/adapters/ has this and the other methods

A run leaves a small folder in PEFT's format beside its base model. Many of them fit one base, which stays what it was:
take the adapter off and it is there again. A rate 10 times that of full fine-tuning is usual; B starts at 0.

reads   out/full_sft   --data  {"conversations"} or {"messages"} records (default: the built-in persona, a captain)
writes  out/lora       adapter_config.json, adapter_model.safetensors, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_lora.py --method dora
        torchrun --nproc_per_node 4 trainer/train_lora.py --model out/full_sft --data chats.jsonl --lora_rank 16
then    python scripts/chat.py --adapter out/lora    or    python scripts/merge_lora.py --adapter out/lora --out merged
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

from dataclasses import dataclass

from model.adapters import METHODS
from model.errors import run as run_script
from trainer.config import MINIMIND_FLAGS, FineTuneConfig, arg, parse_args


@dataclass
class Config(FineTuneConfig):
    method: str = arg("lora", "; ".join(f"{name}: {text}" for name, text in METHODS.items()), choices=tuple(METHODS))
    data: str = arg("builtin:persona:0.5,builtin:sft:0.5", "jsonl, jsonl.gz, a folder or builtin; several by commas, "
                    "shares as a:0.9,b:0.1: some of what it knew before keeps a model from forgetting it")
    lora_rank: int = arg(8, "rank of the updates (or how many tokens, or how wide a bottleneck)")
    lora_dropout: float = arg(0.0, "share of a layer's inputs that its update does not see")
    virtual_text: str = arg("", "prompt, prefix: a text that the virtual tokens begin as; empty: random tokens")
    prefix_inner: int = arg(0, "prefix: width of an MLP through which it is trained (and which is not saved); 0 = none")
    lr: float = arg(0.0, "peak learning rate; 0 = what suits the method")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

from dataset.builtin.generate import resolve
from dataset.lm_dataset import SFTDataset
from model.adapters import adalora
from model.adapters.adapted import AdapterConfig
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer
from trainer import preflight, runtime, state
from trainer.batches import batches
from trainer.losses import balance_loss, next_token_loss
from trainer.optim import build_optimizers, lr_at, optimizer_step

LEARNING_RATES = {"lora": 5e-3, "rslora": 5e-3, "dora": 5e-3, "lora+": 1e-3, "pissa": 2e-3, "adalora": 1e-2,
                  "ia3": 3e-2, "prompt": 1.0, "prefix": 0.3, "prefix through an MLP": 1e-2, "bottleneck": 5e-3}


def compute_loss(model, batch, aux_coef):
    """Summed loss over the targets of a micro-batch of rows (B, T), and its parts for the log."""
    logprobs, aux = token_logprobs(model, batch["input_ids"], None, batch["segment_ids"], batch["positions"])
    loss = next_token_loss(logprobs, batch["loss_mask"])
    balance = balance_loss(aux, batch["loss_mask"])
    return loss + aux_coef * balance, {"loss": loss}


@preflight.explains_out_of_memory
def main(cfg):
    cfg.lr = cfg.lr or LEARNING_RATES["prefix through an MLP" if cfg.prefix_inner else cfg.method]
    run = runtime.setup(cfg, "lora")

    # --- build
    begin = Tokenizer.load(run.parent(cfg.model)).encode(cfg.virtual_text)
    adapter = AdapterConfig(cfg.method, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets,
                            start="text" if begin else "vocabulary", start_ids=tuple(begin), inner=cfg.prefix_inner)
    model, tokenizer = run.load_model(adapter)
    path = resolve(cfg.data, "persona")
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
        adalora.before_step(model, run.scaler)
        grad_norm = optimizer_step(model, optimizers, lr, cfg.grad_clip, run.scaler, cfg.on_nonfinite)
        adalora.after_step(model, adapter, step, run.total_steps)

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
