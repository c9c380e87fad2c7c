"""QLoRA at a real size. By hand: the suite does the same with models of some thousand weights.

    python tests/qlora.py [--out tests/results/qlora.json]

For a Llama and a Qwen2 of about 100M random weights, in folders that transformers has written (float32):

gradients   of A and B beside an NF4 base against LoRA on the same base dequantized: the largest relative difference
memory      on paper, and the most that a process of its own takes above what it had before: while it reads the folder,
            and in steps of LoRA training; for the base in float32 and in NF4. (Linux. Pages of files do not count: the
            system takes them back when it needs them. What is freed is given back at once, see `ALLOCATOR`.)
"""

import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from model.cli import arg, parse_args
from model.errors import run as run_script

SHAPE = dict(vocab_size=8192, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
             num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True)
RANK, ROWS, TOKENS, STEPS = 16, 4, 128, 3
# Else memory that tensors have left counts, too: kept for the next ones, in pages of 2 MB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "THP_MEM_ALLOC_ENABLE": "0"}


@dataclass
class Config:
    out: str = arg("", "write the results to this JSON file")
    measure: str = arg("", "used by itself: KIND:FOLDER whose memory this process measures")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)

import torch
import transformers

from model.adapters.folder import AdapterConfig, attach
from model.checkpoint import load_causal_lm, save_model
from model.config import ModelConfig
from model.logprobs import token_logprobs
from model.quantize import QuantizedLinear, packed_weights
from model.transformer import CausalLM, count_parameters
from trainer.optim import build_optimizers, optimizer_step
from trainer.preflight import activation_bytes, lasting_bytes
from trainer.train_full_sft import Config as TrainingConfig


def write(family, folder):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)


def loss_of(model, rows):
    ids = torch.randint(model.config.vocab_size, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return -token_logprobs(model, ids)[0].mean()


# ---------------------------------------------------------------------------------------------- gradients


def gradients(model):
    """{name: gradient} of A and B, both drawn at random, in float32."""
    torch.manual_seed(1)
    attach(model, AdapterConfig(rank=RANK))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    (-token_logprobs(model, ids)[0].mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dequantized(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            dense.weight, dense.bias = torch.nn.Parameter(module.dequantize()), module.bias
            model.set_submodule(name, dense)
    return model


def compare_gradients(folder):
    ours = gradients(load_causal_lm(folder, quantize="nf4"))
    theirs = gradients(dequantized(load_causal_lm(folder, quantize="nf4")))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * SHAPE["num_hidden_layers"]
    return max(float((g - theirs[name]).norm() / theirs[name].norm()) for name, g in ours.items())


# ------------------------------------------------------------------------------------------------- memory


class Peak:
    """The most anonymous memory of this process above that at the start, looked at every millisecond."""

    def __init__(self):
        ctypes.CDLL(None).malloc_trim(0)
        self.before, self.most, self.done = self.now(), 0, False
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def now(self):
        return int(pathlib.Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

    def watch(self):
        while not self.done:
            self.most = max(self.most, self.now() - self.before)
            time.sleep(0.001)

    def take(self):
        """The peak so far; the next one begins here."""
        most, self.most = max(self.most, self.now() - self.before), 0
        return most


def train(model, steps):
    attach(model.train(), AdapterConfig(rank=RANK))
    optimizers = build_optimizers(model, TrainingConfig(optimizer="adamw"))
    for _ in range(steps):
        loss_of(model, ROWS).backward()
        optimizer_step(model, optimizers, 1e-4, 1.0)
    return optimizers


def measure(kind, folder):
    """{"paper", "measured"} bytes of loading and training in this process."""
    tiny = ModelConfig(**{**SHAPE, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}, head_dim=32)
    with tempfile.TemporaryDirectory() as place:                 # all code has run once: what it keeps is there
        save_model(place, CausalLM(tiny))
        train(load_causal_lm(place, quantize=kind), 2)
    peak = Peak()
    model = load_causal_lm(folder, quantize=kind)
    loading = peak.take()
    weights = lasting_bytes(model, [])["weights"]
    optimizers = train(model, STEPS)
    training = peak.take()
    peak.done = True
    lasting = lasting_bytes(model, optimizers)
    row, fixed = activation_bytes(model, lambda rows: loss_of(model, rows), 2)
    logits = 4 * ROWS * TOKENS * SHAPE["vocab_size"]
    parts = {**lasting, "activations": ROWS * row + fixed, "logits": 3 * logits}
    return {"loading": {"paper": weights, "measured": loading},
            "training": {"paper": sum(parts.values()), "measured": training, "parts": parts},
            "bits": [8 * sum(part.nbytes for part in packed.parts()) / packed.shape.numel()
                     for packed in packed_weights(model).values()][:1], "parameters": count_parameters(model)[0]}


def main(cfg):
    if cfg.measure:
        kind, folder = cfg.measure.split(":", 1)
        print(json.dumps(measure(kind, folder)))
        return
    results = {"rank": RANK, "rows": ROWS, "tokens": TOKENS, "torch": torch.__version__}
    for family in ("Llama", "Qwen2"):
        with tempfile.TemporaryDirectory() as folder:
            write(family, folder)
            results[family] = {"gradients": compare_gradients(folder)}
            print(f"{family}: gradients differ by {results[family]['gradients']:.1e}", flush=True)
            for kind in ("none", "nf4"):
                told = subprocess.check_output([sys.executable, __file__, "--measure", f"{kind}:{folder}"], text=True,
                                               env={**os.environ, **ALLOCATOR})
                found = results[family][kind] = json.loads(told.splitlines()[-1])
                for phase in ("loading", "training"):
                    paper, measured = (found[phase][key] / 1e6 for key in ("paper", "measured"))
                    print(f"  {kind:<5} {phase:<9} {paper:6.0f} MB on paper, {measured:6.0f} MB measured "
                          f"({measured / paper - 1:+.0%})", flush=True)
                print("       ", {key: round(value / 1e6) for key, value in found["training"]["parts"].items()})
    if cfg.out:
        pathlib.Path(cfg.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main, CONFIG)
