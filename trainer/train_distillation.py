"""
Distillation: a small student learns what a larger teacher expects  (Hinton et al. 2015, arXiv:1503.02531, section 2)

    L = (1/N) sum_t m_t [ α · (-log p_S(x_t | x_<t))  +  (1 - α) · τ² · D(T_t, S_t) ]

T_t and S_t are the two's distributions over the next token, softened by τ; D is forward KL(T‖S), reverse KL(S‖T) or
the Jensen-Shannon divergence between. The data says "this word"; the teacher says how likely every word was.

With --on_policy λ the student answers the prompts of a step itself with probability λ, and is taught on what it said:
generalized knowledge distillation (Agarwal et al. 2023, arXiv:2306.13649, algorithm 1).

reads   --teacher FOLDER   out/full_sft, or a new model of --size   --data  conversations or text (default: built-in)
writes  out/distillation   a Hugging Face folder, metrics.jsonl, summary.json, curves.png, resume/
run     python trainer/train_distillation.py --teacher out/teacher
        torchrun --nproc_per_node 4 trainer/train_distillation.py --teacher out/teacher --size small --data chats.jsonl

Deviations: 1. On its own answers there is no cross-entropy (nobody says that they are right: α = 0 there) and no τ².
2. Whether the student answers is drawn once per step, not per row, so that no step mixes the two.
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
    teacher: str = arg("", "checkpoint folder of the teacher, which must have the student's tokenizer")
    size: str = arg("", "a new student, with the teacher's tokenizer: nano, small, base, moe, LAYERSxWIDTH or a "
                    "config.json; empty: the student is --model")
    lr: float = arg(1e-3, "peak learning rate")
    divergence: str = arg("forward", "forward KL(T‖S), reverse KL(S‖T) or jsd, between them",
                          choices=("forward", "reverse", "jsd"))
    jsd_beta: float = arg(0.5, "--divergence jsd: towards 0 it is like forward, towards 1 like reverse")
    temperature: float = arg(1.0, "softens both distributions before they are compared; 1 to 2 is usual")
    alpha: float = arg(0.5, "weight of the data's own tokens: 0 = only the teacher counts, 1 = only the data")
    on_policy: float = arg(0.0, "share of the steps in which the student is taught on its own answers")
    max_new_tokens: int = arg(64, "longest answer of the student in these steps")
    sample_temperature: float = arg(1.0, "temperature at which it writes them")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints=MINIMIND_FLAGS)   # before the heavy imports

import torch

from dataset.builtin.generate import resolve
from dataset.lm_dataset import SFTDataset, kind_of
from model.checkpoint import load_model
from model.config import new_config
from model.distill import token_distances
from model.transformer import CausalLM
from trainer import preflight, runtime, state
from trainer.batches import batches
from trainer.losses import balance_loss, distillation_loss
from trainer.on_policy import is_on_policy, with_own_answers
from trainer.optim import build_optimizers, lr_at, optimizer_step
from trainer.teacher import check_match, checked


def compute_loss(model, teacher, batch, cfg, aux_coef, own_answers=False):
    """Summed loss over the targets of a micro-batch of rows (B, T), and its parts for the log."""
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": cfg.jsd_beta}[cfg.divergence]
    logprobs, distances, aux = token_distances(model, teacher, batch["input_ids"], batch["segment_ids"],
                                               batch["positions"], beta, cfg.temperature)
    alpha, scale = (0.0, 1.0) if own_answers else (cfg.alpha, cfg.temperature ** 2)
    loss, ce, distance = distillation_loss(logprobs, distances, batch["loss_mask"], alpha, scale)
    balance = balance_loss(aux, batch["loss_mask"])
    return loss + aux_coef * balance, {"loss": loss, "ce": ce, "distance": distance}


@preflight.explains_out_of_memory
def main(cfg):
    cfg = checked(cfg)
    run = runtime.setup(cfg, "distillation")

    # --- build
    half = torch.bfloat16 if run.dtype == torch.bfloat16 else run.weights_dtype        # float16 would be too narrow
    teacher, its_tokenizer = load_model(cfg.teacher, run.device, half)                 # in eval mode
    teacher.requires_grad_(False)
    if cfg.size:
        tokenizer = its_tokenizer.with_chat_template(cfg.chat_template) if cfg.chat_template else its_tokenizer
        model = CausalLM(new_config(cfg.size, tokenizer, cfg.max_len)).to(run.build_device, run.weights_dtype)
    else:
        model, tokenizer = run.load_model()
    check_match(cfg, teacher, its_tokenizer, model, tokenizer)
    path = resolve(cfg.data, "sft")
    kind = kind_of(path)                                                               # conversations or text
    if cfg.on_policy and kind is not SFTDataset:
        raise UserError(f"--on_policy: {path} holds text, and the student answers prompts; give conversations")
    train, val = run.datasets(kind, path, tokenizer)
    run.plan(model, train, val, tokenizer)
    wrapped = run.wrap(model)
    optimizers = build_optimizers(model, cfg, run.muon_dtype)
    run.preflight(wrapped, optimizers, lambda batch: compute_loss(wrapped, teacher, batch, cfg,
                                                                  model.config.aux_loss_coef))
    start = step = state.resume(run, model, optimizers)
    if start == 0:
        run.evaluate(0, model, val, tokenizer, cfg.eval_rows)

    # --- loop: one turn = one optimizer step
    for step, micro_batches, num_targets in batches(train, cfg, run, start):
        own_answers = is_on_policy(cfg, step)
        if own_answers:
            micro_batches, num_targets = with_own_answers(run, model, tokenizer, micro_batches, cfg, step)
        for batch in run.accumulate(wrapped, micro_batches):
            with run.autocast():
                loss, parts = compute_loss(wrapped, teacher, batch, cfg, model.config.aux_loss_coef, own_answers)
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
