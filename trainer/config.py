"""The flags that every gradient-training script shares, and the answer to flags people bring from MiniMind.

A script's own Config inherits TrainConfig and adds or re-defaults only the knobs of its method. 0 and "" mean "off" or
"chosen for you", as each help says.
"""

import time
from dataclasses import dataclass

from model.cli import arg, parse_args  # noqa: F401  (scripts take all three from here)

STARTED = time.perf_counter()      # the first thing a script does: --max_minutes counts from here


@dataclass
class TrainConfig:
    model: str = arg("", "checkpoint folder to start from: size, tokenizer and chat template come from it")
    data: str = arg("builtin", "jsonl, jsonl.gz, txt, a folder, several by commas, or builtin")
    val_data: str = arg("", "held-out file; empty: a part of --data that training never sees")
    val_fraction: float = arg(0.1, "share held out: the end of a .txt, a seeded choice of jsonl records (1000 at most)")
    out: str = arg("", "run folder: checkpoint, metrics.jsonl, resume state (default: out/<stage>)")
    overwrite: bool = arg(False, "start over in a run folder that already holds a run")

    epochs: float = arg(0.0, "passes over the data; 0 = one, or as many as fit into --max_minutes")
    max_steps: int = arg(0, "optimizer steps; 0 = as many as --epochs need")
    max_minutes: float = arg(0.0, "wall-clock budget, set-up included; how many steps fit is measured once; 0 = none")
    batch_size: int = arg(8, "sequences per optimizer step, over all ranks: 8 suits nano, 64 and more larger models")
    micro_batch_size: int = arg(0, "sequences per forward pass on one rank; 0 = all of its share")
    max_len: int = arg(256, "tokens in a row; longer documents are cut, longer conversations lose old turns")

    optimizer: str = arg("muon", "muon (matrices by Muon, the rest by AdamW) or adamw", choices=("muon", "adamw"))
    lr: float = arg(3e-3, "peak learning rate")
    schedule: str = arg("wsd", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    warmup_steps: int = arg(40, "steps of linear warm-up from 0")
    weight_decay: float = arg(0.1, "decay of matrices (never of norm gains and biases)")
    grad_clip: float = arg(1.0, "largest gradient norm; 0 = no clipping")

    eval_every: int = arg(100, "steps between held-out evaluations; 0 = only at the end")
    eval_rows: int = arg(128, "held-out rows of the evaluations on the way; the last one takes all")
    sample_every: int = arg(200, "steps between printed samples; 0 = none")
    save_every: int = arg(100, "steps between saves; a killed run continues from the last one")
    log_every: int = arg(10, "steps between progress lines")

    seed: int = arg(42, "seed of weights, order of data and samples")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "format of matrix products: auto (bfloat16 where it is fast), float32, bfloat16, float64")
    compile: bool = arg(False, "torch.compile the model: a minute of waiting, then faster steps")
    on_bad_record: str = arg("stop", "a record that cannot be read: stop, or skip and count", choices=("stop", "skip"))
    dry_run: bool = arg(False, "say what would be trained, print one row with its mask, and stop")
    overfit_batch: bool = arg(False, "sanity check: train on the first batch only; its loss must go to zero")


MINIMIND_FLAGS = {   # what MiniMind users type: what answers it here
    "from_resume": "the same command again continues an unfinished run by itself",
    "use_wandb": "metrics.jsonl in the run folder is the record",
    "wandb_project": "metrics.jsonl in the run folder is the record",
    "data_path": "it is --data",
    "learning_rate": "it is --lr",
    "max_seq_len": "it is --max_len",
    "accumulation_steps": "it is --batch_size (whole step) with --micro_batch_size (one forward pass)",
    "save_interval": "it is --save_every",
    "log_interval": "it is --log_every",
    "from_weight": "it is --model FOLDER",
    "save_weight": "it is --out FOLDER",
    "save_dir": "it is --out FOLDER",
    "hidden_size": "it is --size NAME or --size LAYERSxWIDTH, at pretraining only",
    "num_hidden_layers": "it is --size NAME or --size LAYERSxWIDTH, at pretraining only",
    "use_moe": "it is --size moe, at pretraining only",
    "num_workers": "not needed: tokens are read from a memory-mapped cache",
    "tokenizer_path": "it is --tokenizer nano|base|FOLDER, at pretraining only",
    "ddp": "start with torchrun --nproc_per_node N and it is distributed",
}
