"""How fast, against what people would otherwise use: the same work, taking turns on the same machine, in one run.

    python scripts/benchmark.py train                    8 rows of 512 tokens, 26M parameters: transformers' Llama, ours
    python scripts/benchmark.py sft --data chats.jsonl   useful tokens: packed conversations, or one padded row for each
    python scripts/benchmark.py moe                      8 experts against a dense model, as many active parameters
    python scripts/benchmark.py generate                 sampling in batches, against transformers' generate
    python scripts/benchmark.py rollout --batch_size 64 --max_len 192    8 completions of each prompt, as RL takes them
    python scripts/benchmark.py grpo --batch_size 64 --max_len 192 --trl_python trl/bin/python      a step, against TRL
    python scripts/benchmark.py quantize --size base     weights in 32, 16, 8 and 4 bits: size, speed, perplexity

Every contender lives in a process of its own (so that peak memory is its own) and waits while another one is timed;
they take turns for --rounds rounds, in an order that turns around each time. A ratio compares with the first contender
within a round (whatever slows the machine for a while slows both): the median over the rounds, smallest and largest.
transformers must be installed. What was measured goes to scripts/results/benchmark_WORK.json.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKS = ("train", "sft", "moe", "generate", "rollout", "grpo", "quantize")
GROUP = 8                                  # completions of a prompt


@dataclass
class Config:
    size: str = arg("small", "named size or LAYERSxWIDTH of both models")
    tokenizer: str = arg("base", "nano, base or a folder: gives the size of the vocabulary")
    data: str = arg("builtin:sft", "sft: a jsonl of conversations; quantize: held-out ones of it give the perplexity")
    model: str = arg("out/full_sft", "quantize: checkpoint that has the perplexity; all else is of random weights")
    batch_size: int = arg(8, "rows of a step, or prompts that are answered at once")
    max_len: int = arg(512, "tokens of a row; of a prompt with its answer, half of each (rollout, grpo: one third and "
                       "two)")
    rounds: int = arg(7, "how often each contender is timed")
    steps: int = arg(2, "steps of one timing")
    only: str = arg("", "contenders to time, with ; between; empty = all of the work")
    trl_python: str = arg("", "grpo: the Python of an environment that has TRL")
    out: str = arg("", "JSON to write (default: scripts/results/benchmark_WORK.json)")


if __name__ == "__main__":
    WORK = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in WORKS else ""
    CONFIG = parse_args(Config, description=__doc__)                  # before the heavy imports
    if not WORK:
        sys.exit(f"error: the first word says what to measure: {', '.join(WORKS)}")

import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import time

import numpy as np
import torch

from dataset.builtin.generate import resolve
from dataset.lm_dataset import SFTDataset, collate
from eval.eval_loss import evaluate_loss
from model import device as devices
from model.checkpoint import load_causal_lm, load_model, save_model
from model.config import new_config
from model.fused import FusedLM
from model.generate import SamplingParams, generate
from model.logprobs import token_logprobs
from model.quantize import packed_weights
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, count_parameters

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


# ---------------------------------------------------------------------------------- the contenders


def our_config(cfg, **changes):
    """The config both models are built from; without QK-norm, so that transformers' Llama computes the same."""
    config = new_config(cfg.size, Tokenizer.load(cfg.tokenizer), cfg.max_len)
    return dataclasses.replace(config, **{"qk_norm": False, **changes})


def llama(cfg):
    """transformers' Llama of the same shape, with torch's fused attention."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**our_config(cfg).to_hf())
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def ours(cfg, **changes):
    return CausalLM(our_config(cfg, **changes))


def rows_of_tokens(cfg, device):
    tokens = torch.randint(0, our_config(cfg).vocab_size, (cfg.batch_size, cfg.max_len))
    return {"input_ids": tokens.to(device)}


def packed(cfg, device, rows=0):
    """Conversations packed into rows of which each sees only itself; rows drawn by chance."""
    data = SFTDataset(resolve(cfg.data, "sft"), Tokenizer.load(cfg.tokenizer), cfg.max_len)
    drawn = np.random.default_rng(0).permutation(len(data))[:rows or cfg.batch_size]
    return {key: value.to(device) for key, value in collate([data[int(row)] for row in drawn]).items()}


def padded(cfg, device):
    """Conversations of the same data, one a row, the rest of it padding; as long and short as in 200 packed rows."""
    batch = packed(cfg, "cpu", rows=200)
    ids, segments = batch["input_ids"].numpy(), batch["segment_ids"].numpy()
    texts = sorted((row[places == segment] for row, places in zip(ids, segments, strict=True)
                    for segment in range(1, places.max() + 1)), key=len)
    texts = [texts[int((n + 0.5) * len(texts) / cfg.batch_size)] for n in range(cfg.batch_size)]    # its quantiles
    tokens = np.full((cfg.batch_size, cfg.max_len), Tokenizer.load(cfg.tokenizer).pad_id)
    for row, text in zip(tokens, texts, strict=True):
        row[:len(text)] = text
    mask = np.arange(cfg.max_len) < np.array([[len(text)] for text in texts])
    return {"input_ids": torch.from_numpy(tokens).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def training(make, dtype, cfg, compiled=False, checkpointing=False, data=rows_of_tokens):
    """(one optimizer step, useful tokens in it, model): forward, backward, clipping, fused AdamW."""
    device = devices.pick_device()
    model, batch = make(cfg).to(device).train(), data(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if checkpointing:
        model.model.activation_checkpointing = True
    if compiled:
        model.compile()

    def loss():
        if isinstance(model, CausalLM):
            logprobs, aux = token_logprobs(model, batch["input_ids"], None, batch.get("segment_ids"),
                                           batch.get("positions"))
            return -logprobs[:, 1:].mean() + 0.01 * aux.mean()
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"], -100) if "attention_mask" in batch else (
            batch["input_ids"])
        return model(**batch, labels=labels).loss

    def step():
        with devices.autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(device)

    real = batch["segment_ids"] > 0 if "segment_ids" in batch else batch.get("attention_mask")
    return step, int(real.sum()) if real is not None else batch["input_ids"].numel(), model


def mixture(cfg):
    """A mixture of 8 experts, 2 of them for each token, that together are as wide as the dense MLP."""
    dense = our_config(cfg)
    return ours(cfg, qk_norm=True, num_experts=8, num_experts_per_tok=2, router="softmax", aux_loss_coef=0.01,
                moe_intermediate_size=dense.intermediate_size // 2)


def sampling(make, cfg, dtype=None):
    """(answering a batch of prompts, tokens of the answers, model): temperature 1, all answers equally long."""
    device = devices.pick_device()
    dtype = dtype or devices.pick_dtype("auto", device)
    model = make(cfg).to(device, dtype).eval()
    length = cfg.max_len // 2
    prompts = torch.randint(5, our_config(cfg).vocab_size, (cfg.batch_size, length)).to(device)

    @torch.no_grad()
    def step():
        if isinstance(model, CausalLM):
            generate(model, prompts.tolist(), SamplingParams(max_new_tokens=length, seed=0))
        else:
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length,
                           min_new_tokens=length, do_sample=True, top_k=0, pad_token_id=0)
        devices.synchronize(device)

    return step, cfg.batch_size * length, model


def rolling_out(make, cfg):
    """(completing prompts in groups of 8, tokens of the completions, model): temperature 1, all equally long."""
    device = devices.pick_device()
    dtype, model = devices.pick_dtype("auto", device), make(cfg).to(device).eval()
    group, length = min(GROUP, cfg.batch_size), cfg.max_len // 3
    prompts = torch.randint(5, our_config(cfg).vocab_size, (cfg.batch_size // group, length)).to(device)
    new = cfg.max_len - length
    if isinstance(model, CausalLM):
        copy = FusedLM(model, dtype)
    else:
        model = model.to(dtype)

    @torch.no_grad()
    def step():
        if isinstance(model, CausalLM):
            copy.refresh()                                              # part of every rollout: the policy has learnt
            generate(copy, prompts.tolist(), SamplingParams(max_new_tokens=new, seed=0), num_samples=group)
        else:
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                           do_sample=True, top_k=0, num_return_sequences=group, pad_token_id=0)
        devices.synchronize(device)

    return step, len(prompts) * group * new, model


def practising(side, cfg):
    """(a step of GRPO, tokens of its completions, model): acting, judging and learning, by scripts/grpo_step.py in a
    process of its own. The step tells that process's peak memory."""
    length = cfg.max_len // 3
    settings = {**practice(cfg), "batch_size": cfg.batch_size, "group": min(GROUP, cfg.batch_size),
                "max_len": cfg.max_len, "new": cfg.max_len - length}
    script = str(pathlib.Path(__file__).with_name("grpo_step.py"))
    command = [cfg.trl_python if side == "trl" else sys.executable, script, side, json.dumps(settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step():
        print("go", file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith("step took its turn, "):
                return int(line.split()[-1])
        raise UserError(f"grpo, {side}: ended before its time, see above")

    return step, cfg.batch_size * settings["new"], ours(cfg, qk_norm=True)


def practice(cfg):
    """A folder with a random chat model, and a jsonl of prompts that are about a third of a row long, written once."""
    folder = ROOT / "out" / "benchmark" / f"grpo-{pathlib.Path(cfg.size).name}-{cfg.max_len}"
    path, tokenizer = folder / "prompts.jsonl", Tokenizer.load(cfg.tokenizer)
    if not path.exists():
        save_model(folder, ours(cfg, qk_norm=True), tokenizer)
        rng = np.random.default_rng(0)
        words = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        words = [word for word in words if word.startswith(" ") and word[1:].isascii() and word[1:].isalpha()]
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(500):
                messages = [{"role": "user", "content": "".join(rng.choice(words, cfg.max_len // 3))}]
                while len(tokenizer.render(messages, add_generation_prompt=True)[0]) > cfg.max_len // 3:
                    messages[0]["content"] = messages[0]["content"].rpartition(" ")[0]
                file.write(json.dumps({"conversations": messages, "answer": "e", "checker": "exact"}) + "\n")
    return {"folder": str(folder), "data": str(path)}


def answering(dtype, kind, cfg):
    """`sampling` with the weights of a checkpoint in so many bits; and {"bits" per weight of the blocks, "bytes" of the
    model, "perplexity", "memory_before" there was a model}."""
    device = devices.pick_device()
    perplexity = perplexity_in(dtype, kind, cfg, device)                # now all that torch needs is there, too
    before = peak_memory(device, anew=True)
    model = load_causal_lm(random_checkpoint(cfg), device, dtype, quantize=kind)
    packed = packed_weights(model).values()
    stored, weights = sum(part.nbytes for w in packed for part in w.parts()), sum(w.shape.numel() for w in packed)
    figures = {"bits": 8 * stored / weights if packed else torch.finfo(dtype).bits, "perplexity": perplexity,
               "bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())), "memory_before": before}
    peak_memory(device, anew=True)                                      # pages of the file are no part of the model
    return *sampling(lambda cfg: model, cfg, dtype), figures


def random_checkpoint(cfg):
    """A folder with a model of --size, written once. (Whoever made it has had it in memory: not a contender.)"""
    name = f"{pathlib.Path(cfg.size).name}-{pathlib.Path(cfg.tokenizer).name}-{cfg.max_len}"
    folder = ROOT / "out" / "benchmark" / name
    if not folder.is_dir():
        save_model(folder, ours(cfg))
    return folder


def perplexity_in(dtype, kind, cfg, device):
    """Of --model on held-out conversations."""
    folder = ROOT / cfg.model if cfg.model == Config.model else pathlib.Path(cfg.model)
    model, tokenizer = load_model(folder, device, dtype, quantize=kind)
    data = SFTDataset(resolve(cfg.data, "sft"), tokenizer, model.config.max_position_embeddings, split="val")
    return evaluate_loss(model, data, tokenizer, device)["perplexity"]


def peak_memory(device, anew=False):
    """Peak bytes of this process, or of the GPU's allocator, so far; anew: the next peak counts from what is used now.

    (The system's own figure for a process begins with that of its parent.) Off Linux it is that, and has no anew.
    """
    status = pathlib.Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        peak = devices.memory_in_use(device)
    else:
        peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    if anew and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif anew and status.exists():
        status.with_name("clear_refs").write_text("5")
        return peak_memory(device)
    return peak


CONTENDERS = {      # work: contender: (step, tokens, model and perhaps figures); the first is the rival of all others
    "train": {
        "transformers, bf16": functools.partial(training, llama, BFLOAT16),
        "transformers, bf16, compiled": functools.partial(training, llama, BFLOAT16, compiled=True),
        "ours, bf16": functools.partial(training, ours, BFLOAT16),
        "ours, bf16, compiled": functools.partial(training, ours, BFLOAT16, compiled=True),
        "ours, bf16, checkpointing": functools.partial(training, ours, BFLOAT16, checkpointing=True),
        "transformers, fp32": functools.partial(training, llama, FLOAT32),
        "ours, fp32": functools.partial(training, ours, FLOAT32),
    },
    "sft": {
        "transformers, one padded row each": functools.partial(training, llama, BFLOAT16, data=padded),
        "ours, packed": functools.partial(training, ours, BFLOAT16, data=packed),
        "ours, packed, compiled": functools.partial(training, ours, BFLOAT16, data=packed, compiled=True),
    },
    "moe": {
        "dense": functools.partial(training, functools.partial(ours, qk_norm=True), BFLOAT16),
        "8 experts, 2 a token": functools.partial(training, mixture, BFLOAT16),
        "dense, fp32": functools.partial(training, functools.partial(ours, qk_norm=True), FLOAT32),
        "8 experts, 2 a token, fp32": functools.partial(training, mixture, FLOAT32),
    },
    "generate": {
        "transformers": functools.partial(sampling, llama),
        "ours": functools.partial(sampling, ours),
    },
    "rollout": {
        "transformers": functools.partial(rolling_out, llama),
        "ours": functools.partial(rolling_out, ours),
    },
    "grpo": {
        "TRL": functools.partial(practising, "trl"),
        "ours": functools.partial(practising, "ours"),
    },
    "quantize": {
        "fp32": functools.partial(answering, FLOAT32, "none"),
        "bf16": functools.partial(answering, BFLOAT16, "none"),
        "int8": functools.partial(answering, BFLOAT16, "int8"),
        "int4": functools.partial(answering, BFLOAT16, "int4"),
        "nf4": functools.partial(answering, BFLOAT16, "nf4"),
    },
}


# ------------------------------------------------------------------------------------ taking turns


def contend(pipe, work, name, cfg):
    """A contender's process: builds its model, warms up, then times `cfg.steps` steps each time it is asked."""
    if name.startswith("transformers"):
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"                     # as torch is without model/device.py
    step, tokens, model, *more = CONTENDERS[work][name](cfg)
    figures = more[0] if more else {}
    start = time.perf_counter()
    for _ in range(2):
        step()
    total, active = count_parameters(model) if isinstance(model, CausalLM) else (model.num_parameters(),) * 2
    pipe.send({"tokens": tokens, "parameters": total, "active": active, "warm_up": time.perf_counter() - start,
               **figures})
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(cfg.steps):
            told = step()
        memory = (told or peak_memory(devices.pick_device())) - figures.get("memory_before", 0)
        pipe.send(((time.perf_counter() - start) / cfg.steps, memory))


def measure(work, cfg):
    """Time all contenders of a work in turns; a dict for the JSON."""
    wanted = [name.strip() for name in cfg.only.split(";") if name.strip()] or list(CONTENDERS[work])
    if unknown := [name for name in wanted if name not in CONTENDERS[work]]:
        raise UserError(f"--only {unknown[0]}: the contenders are {'; '.join(CONTENDERS[work])}")
    names = [name for name in CONTENDERS[work] if name in wanted]
    if work == "quantize":
        random_checkpoint(cfg)
    if work == "grpo":
        practice(cfg)
        if "TRL" in names and not cfg.trl_python:
            raise UserError("--trl_python is missing: the Python of an environment that has TRL; or give --only ours")
    spawn, found = multiprocessing.get_context("spawn"), {}
    pipes, processes = {}, []
    for name in names:
        pipes[name], other = spawn.Pipe()
        process = spawn.Process(target=contend, args=(other, work, name, cfg), daemon=True)
        process.start()
        processes.append(process)
        other.close()
        try:
            found[name] = {**pipes[name].recv(), "seconds": []}
        except EOFError:
            raise UserError(f"{name}: could not start, see above") from None
    for number in range(cfg.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            pipes[name].send(True)
            seconds, found[name]["memory"] = pipes[name].recv()
            found[name]["seconds"].append(seconds)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(False)
        process.join()
    for result in found.values():
        result["tokens_per_second"] = result["tokens"] / statistics.median(result["seconds"])
        rivals = [rate(found[names[0]], number) for number in range(cfg.rounds)]
        ratios = sorted(rate(result, number) / rival for number, rival in enumerate(rivals))
        result["ratio"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    device = devices.pick_device()
    dtype = devices.pick_dtype("auto", device)
    return {"work": work, "settings": dataclasses.asdict(cfg), "machine": devices.describe_machine(device),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "matmul_gflops": round(devices.matmul_peak(device, dtype) / 1e9), "contenders": found}


def rate(result, number):
    """Tokens per second in one round."""
    return result["tokens"] / result["seconds"][number]


def table(figures):
    """The lines of a Markdown table."""
    first = next(iter(figures["contenders"].values()))
    bits = figures["work"] == "quantize"
    more = "| bits per weight | perplexity | model " if bits else ""
    yield f"| {more}| tokens/s | ratio (smallest – largest) | peak memory | of it |"
    yield "|---|--:|--:|--:|--:|" + bits * "--:|--:|--:|"
    for name, result in figures["contenders"].items():
        median, low, high = result["ratio"]
        more = f"{result['bits']:.2f} | {result['perplexity']:.4f} | {result['bytes'] / 1e6:.0f} MB | " if bits else ""
        yield (f"| {name} | {more}{result['tokens_per_second']:,.0f} | {median:.2f} ({low:.2f} – {high:.2f}) | "
               f"{result['memory'] / 1e9:.2f} GB | {result['memory'] / first['memory']:.0%} |")


def main(work, cfg):
    figures = measure(work, cfg)
    path = pathlib.Path(cfg.out or ROOT / "scripts" / "results" / f"benchmark_{work}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    machine, size = figures["machine"], next(iter(figures["contenders"].values()))["parameters"]
    print(f"{machine['gpu'] or machine['cpu']}, matrix products at {figures['matmul_gflops']:,} GFLOP/s, "
          f"{size / 1e6:.1f}M parameters, {cfg.batch_size} rows of {cfg.max_len} tokens; written to {path}")
    print("\n".join(table(figures)))


if __name__ == "__main__":
    run(main, WORK, CONFIG)
