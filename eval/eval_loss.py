"""Held-out loss of a checkpoint on any text: nats per token, perplexity and bits per byte.

    bits per byte = sum of -log p over all targets / (ln 2 · bytes of the raw UTF-8 text)

Loss per token cannot be compared between tokenizers (longer tokens are harder); bits per byte can.

    python eval/eval_loss.py --model out/pretrain --data my.txt
    python eval/eval_loss.py --model out/full_sft --data chats.jsonl      (the loss of the assistant's words)
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not eval/

from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import run


@dataclass
class Config:
    model: str = arg("out/pretrain", "checkpoint folder")
    adapter: str = arg("", "adapter folder to use on it, as train_lora.py leaves one")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    data: str = arg("builtin", "jsonl, txt, a folder, several by commas, or builtin (its held-out text)")
    split: str = arg("all", "all of --data, or only the part that training holds out", choices=("all", "val"))
    val_fraction: float = arg(0.1, "with --split val: the --val_fraction of the training")
    max_len: int = arg(0, "tokens seen at once; 0 = what the model was trained with")
    max_rows: int = arg(0, "evaluate only so many rows; 0 = all")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "auto, float32 or bfloat16")
    out: str = arg("", "write the figures to this JSON file")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import json
import math

import numpy as np
import torch
import torch.distributed as dist

from dataset.builtin.generate import resolve
from dataset.lm_dataset import collate, kind_of
from eval.intervals import bootstrap_ratio
from model import device as devices
from model.checkpoint import load_model
from model.logprobs import token_logprobs


@torch.no_grad()
def map_rows(function, model, data, device, batch_size=16, max_rows=0, rank=0, world_size=1):
    """The figures of the first max_rows rows of a dataset (0 = all), each rank doing its share: (rows, k) float64.

    function(model, batch) -> (B, k), the batch on the device. Rows come in their order, the same array on every rank.
    """
    was_training = model.training
    model.eval()
    rows = range(min(max_rows, len(data)) if max_rows else len(data))[rank::world_size]
    figures = []
    for start in range(0, len(rows), batch_size):
        batch = collate([data[row] for row in rows[start:start + batch_size]])
        figures += function(model, {key: value.to(device) for key, value in batch.items()}).double().tolist()
    model.train(was_training)
    if world_size == 1:
        return np.array(figures)
    gathered = [None] * world_size
    dist.all_gather_object(gathered, figures)
    return np.array([part[place] for place in range(len(gathered[0])) for part in gathered if place < len(part)])


def evaluate_loss(model, data, tokenizer, device, batch_size=16, max_rows=0, rank=0, world_size=1):
    """Loss of `model` on the rows of a packed dataset, each rank doing its share; the same answer on every rank.

    Returns {"loss" (nats per target), "perplexity", "bits_per_byte", "bits_per_byte_interval" (95 %, bootstrap over
    rows), "targets", "bytes"}. Documents in a row are kept apart, so that the score of one does not depend on others.
    """
    token_bytes = torch.from_numpy(np.asarray(tokenizer.token_bytes, np.int64)).to(device)

    def sums(model, batch):
        mask = batch["loss_mask"]
        logprobs, _ = token_logprobs(model, batch["input_ids"], None, batch["segment_ids"], batch["positions"])
        return torch.stack([-(logprobs * mask).sum(1).double(), mask.sum(1).double(),
                            (token_bytes[batch["input_ids"]] * mask).sum(1).double()], dim=1)

    nats, targets, num_bytes = map_rows(sums, model, data, device, batch_size, max_rows, rank, world_size).T
    bits = nats / math.log(2)
    return {"loss": nats.sum() / targets.sum(), "perplexity": math.exp(min(nats.sum() / targets.sum(), 700)),
            "bits_per_byte": bits.sum() / max(num_bytes.sum(), 1),
            "bits_per_byte_interval": bootstrap_ratio(bits, num_bytes),
            "targets": int(targets.sum()), "bytes": int(num_bytes.sum())}


def notes(data, config):
    """What a figure about the rows of `data` does not say itself: which texts were cut, or are longer than trained."""
    longest = config.max_position_embeddings
    if data.report["shortened"]:
        yield (f"{data.report['shortened']} of {data.report['records']} records lost their beginning, to fit into "
               f"{data.max_len} tokens; a larger --max_len reads more, beyond {longest} with --rope_scaling yarn:F")
    if data.max_len > longest:
        yield (f"texts of more than {longest} tokens, up to {data.max_len}, reach positions that this model does not "
               "know; --rope_scaling yarn:F makes it F times as many as trained")


def main(cfg):
    device = devices.pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device, rope_scaling=cfg.rope_scaling, quantize=cfg.quantize,
                                  adapter=cfg.adapter)
    path = resolve(cfg.data, "pretrain")
    split = "val" if cfg.data.startswith("builtin") else cfg.split
    data = kind_of(path)(path, tokenizer, cfg.max_len or model.config.max_position_embeddings, split=split,
                   val_fraction=cfg.val_fraction)
    for note in notes(data, model.config):
        print(f"note: {note}")
    with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
        scores = evaluate_loss(model, data, tokenizer, device, max_rows=cfg.max_rows)
    low, high = scores["bits_per_byte_interval"]
    print(f"{cfg.model}{f' with {cfg.adapter}' if cfg.adapter else ''} on {cfg.data}: "
          f"{scores['targets']:,} targets, {scores['bytes']:,} bytes")
    print(f"loss {scores['loss']:.4f}   perplexity {scores['perplexity']:.2f}   "
          f"bits per byte {scores['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]")
    if cfg.out:
        pathlib.Path(cfg.out).write_text(json.dumps(scores, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, CONFIG)
