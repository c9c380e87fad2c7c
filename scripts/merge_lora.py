"""Merge adapters into their base model: a plain Hugging Face folder that needs no adapter any more.

    W ← W + sum_i w_i ΔW_i        ΔW = s B A for LoRA (model/adapters/); summed in float32, rounded once

The merged model computes what the base with its adapter does, at the base's cost, and loads wherever the base loads.
Several adapters of one base may be mixed, each with a weight: half of two characters is a new one.

reads   a base model, and adapter folders: ours, or PEFT's
writes  a checkpoint folder
run     python scripts/merge_lora.py --adapter out/lora --out out/merged
        python scripts/merge_lora.py --model out/full_sft --adapter out/lora:0.7,out/poet:0.3 --out out/mixed
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "out/full_sft"


@dataclass
class Config:
    model: str = arg(DEFAULT_MODEL, "the base model that the adapter was trained on")
    adapter: str = arg("", "adapter folder; several with weights as a:0.7,b:0.3 (1 where none is given)")
    out: str = arg("", "folder for the merged model")
    dtype: str = arg("float32", "format of the weights that are written", choices=("float32", "bfloat16", "float16"))


def main(cfg):
    import torch  # here and below: --help and a wrong flag answer at once

    from dataset.jsonl import weight_of
    from model.adapters.adapted import detach, merge
    from model.adapters.folder import load_adapter
    from model.checkpoint import load_model, save_model

    if not cfg.adapter or not cfg.out:
        raise UserError("--adapter and --out are needed: which adapter to merge, and where the merged model goes")
    out = pathlib.Path(cfg.out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; name a new folder")
    folder = ROOT / cfg.model if cfg.model == DEFAULT_MODEL else pathlib.Path(cfg.model)
    model, tokenizer = load_model(folder)
    weights = {}
    for number, part in enumerate(cfg.adapter.split(",")):
        path, weight = weight_of(part)
        weights[str(number)] = 1.0 if weight is None else weight
        load_adapter(model, path, str(number))
    merge(model, weights)
    detach(model)
    origin = f"{cfg.model} with {' and '.join(cfg.adapter.split(','))} merged into its weights"
    save_model(out, model, tokenizer, getattr(torch, cfg.dtype), card=f"# {out.name}\n\n{origin}\n")
    print(f"{out}: {origin}, {cfg.dtype}")


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
