"""Write the golden folders of tests/goldens/hf457: tiny models as transformers 4.57 saves them, and their logits.

Most published checkpoints were written by transformers 4, whose config.json is spelled differently from that of
transformers 5, which the test suite runs. So this needs an environment of its own:

    python3 -m venv /tmp/venv457 && /tmp/venv457/bin/pip install torch numpy 'transformers==4.57.*'
    /tmp/venv457/bin/python tests/goldens/make_hf457.py                    writes the goldens
    /tmp/venv457/bin/python tests/goldens/make_hf457.py --check FOLDER …   does 4.57 read what this project wrote?

Each folder holds config.json, model.safetensors (float16, so that it is small; the logits are those of the rounded
weights in float32) and expected.safetensors with ids (1, T) and logits (1, T, V).
"""

import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent / "hf457"
T = 24
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
CASES = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama_biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=12),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, norm_topk_prob=True),
    "dots1": transformers.Dots1Config(**SHAPE, **EXPERTS, n_routed_experts=4, n_shared_experts=1, norm_topk_prob=True,
                                      first_k_dense_replace=1, routed_scaling_factor=2.5),
    "llama_yarn": transformers.LlamaConfig(**SHAPE, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5)),
    "qwen3_yarn": transformers.Qwen3Config(**SHAPE, head_dim=16, rope_scaling=dict(
        type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.25)),
    "llama_llama3": transformers.LlamaConfig(**SHAPE, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=0.2, high_freq_factor=1.5,
        original_max_position_embeddings=16)),
    "llama_linear": transformers.LlamaConfig(**SHAPE, rope_scaling=dict(type="linear", factor=2.0)),
}


@torch.no_grad()
def randomise(model):
    """Weights large enough that every part of the model moves the logits, rounded to float16 values."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        mean = 1.0 if "norm" in name else 0.0
        tensor.copy_(torch.normal(mean, 0.15, tensor.shape).half())


@torch.no_grad()
def write(name, config):
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model)
    ids = torch.randint(config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    folder = ROOT / name
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"ids": ids, "logits": logits}, folder / "expected.safetensors")
    kilobytes = sum(path.stat().st_size for path in folder.iterdir()) / 1000
    print(f"{name:14s} {kilobytes:5.1f} kB, largest logit {logits.abs().max():.2f}")


@torch.no_grad()
def check(folder):
    """Print the largest difference between transformers 4.57's logits and those in FOLDER/expected.safetensors."""
    expected = load_file(f"{folder}/expected.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    worst = (model(expected["ids"]).logits - expected["logits"]).abs().max().item()
    print(f"{folder}: {type(model).__name__}, largest difference {worst:.1e}")
    return worst < 1e-4


if __name__ == "__main__":
    if not transformers.__version__.startswith("4.57."):
        sys.exit(f"this needs transformers 4.57, not {transformers.__version__}; see the top of this file")
    if sys.argv[1:2] == ["--check"]:
        sys.exit(0 if all([check(folder) for folder in sys.argv[2:]]) else 1)
    shutil.rmtree(ROOT, ignore_errors=True)
    for case in CASES.items():
        write(*case)
