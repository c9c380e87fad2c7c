"""Does a model still read where its training never was? Loss by position, and needles found in a haystack.

A model trained on rows of L0 tokens has seen rotary angles for distances below L0 only; --rope_scaling brings longer
distances back into that range, without training. Both measurements read the same texts without and with it:

  loss by position   text in rows of --max_len tokens (4·L0), documents one after the other as in pretraining; the
                     targets at positions [a, b) of all rows together have
                         bits per byte = sum of -log p / (ln 2 · bytes of these tokens)
                     A model that uses what it read has a falling line, one that is lost behind L0 a rising one.
  needles            somebody's secret number in built-in stories, at a depth of 0 % (first sentence) to 100 % (right
                     before the question), in prompts of L tokens, room for the answer included; greedy answers

The line to beat is the same text read L0 tokens at a time: that is all which a model without scaling can do with it.
Intervals: 95 %, bootstrap over rows (bits per byte), Wilson (needles). --out FILE.json also writes FILE.png.

    python eval/long_context.py --model out/pretrain
    python eval/long_context.py --model out/pretrain --rope_scaling yarn:4,linear:4 --data novel.txt --out novel.json
    python eval/long_context.py --model out/full_sft --data none --needles 50 --lengths 256,1024
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not eval/

from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run


@dataclass
class Config:
    model: str = arg("out/pretrain", "checkpoint folder")
    adapter: str = arg("", "adapter folder to use on it, as train_lora.py leaves one")
    rope_scaling: str = arg("yarn:4", "compare without with yarn:4 or linear:4; several by commas")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    data: str = arg("builtin", "jsonl of texts, txt, a folder, builtin (its held-out text), or none: only needles")
    split: str = arg("all", "all of --data, or only the part that training holds out", choices=("all", "val"))
    val_fraction: float = arg(0.1, "with --split val: the --val_fraction of the training")
    max_len: int = arg(0, "longest reading in tokens; 0 = the trained length times the largest factor")
    max_rows: int = arg(64, "read only so many rows of text; 0 = all")
    needles: int = arg(0, "questions about needles at every length and depth, as 20; 0 = none")
    lengths: str = arg("", "tokens of the prompts with needles, by commas; empty: 1, 2, 3, 4, 8 … times the trained "
                       "length, up to --max_len")
    depths: int = arg(5, "places of the needle in the text: evenly from its beginning to its end")
    raw: bool = arg(False, "no question: let the model continue the needle's sentence (for base checkpoints)")
    thinking: str = arg("auto", "think first, between <think> and </think>: on, off, or auto (as the model likes)",
                        choices=("auto", "on", "off"))
    max_new_tokens: int = arg(24, "longest answer in tokens, thought included")
    seed: int = arg(0, "seed of the needles and their haystacks")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "auto, float32 or bfloat16")
    out: str = arg("", "write the figures to this JSON file, and the plots beside it (.png)")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import json
import math
import random

import torch

from dataset.builtin import needle
from dataset.builtin.checkers import check
from dataset.builtin.generate import resolve
from dataset.builtin.world import split_of
from dataset.lm_dataset import PretrainDataset
from eval.eval_loss import map_rows
from eval.intervals import bootstrap_ratio, wilson
from eval.skills import answer_items
from model import device as devices
from model.checkpoint import load_config, load_model
from model.generate import SamplingParams, generate
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer

BINS_PER_LENGTH = 4                                        # so many bins of positions in a trained length
TOKENS_AT_ONCE = 8192                                      # of texts read together: bounds the memory


# --- loss by position


def bits_by_position(model, data, tokenizer, edges, device, max_rows=0, piece=0):
    """What the targets between two of the positions `edges` cost: (bits, bytes), two arrays (rows, bins) of float64.

    piece > 0 reads every row in pieces of so many tokens, none of which sees another; the bins are those of the row.
    """
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    bins = torch.bucketize(torch.arange(data.max_len), torch.tensor(edges[1:]), right=True).to(device)    # (T,)

    def sums(model, batch):
        ids, mask = batch["input_ids"], batch["loss_mask"].bool()                           # (B, T)
        if piece:
            rows = torch.nn.functional.pad(ids, (0, -ids.shape[1] % piece), value=tokenizer.pad_id).view(-1, piece)
            logprobs = token_logprobs(model, rows)[0].view(len(ids), -1)[:, :ids.shape[1]]  # (B, T)
            mask = mask & (torch.arange(ids.shape[1], device=device) % piece > 0)           # nothing predicts these
        else:
            logprobs, _ = token_logprobs(model, ids)
        bits = torch.where(mask, -logprobs.float() / math.log(2), 0)
        sizes = torch.where(mask, token_bytes[ids], 0).float()
        return torch.cat([x.new_zeros(len(ids), len(edges) - 1).index_add_(1, bins, x) for x in (bits, sizes)], 1)

    both = map_rows(sums, model, data, device, max(1, TOKENS_AT_ONCE // data.max_len), max_rows)
    return both[:, :both.shape[1] // 2], both[:, both.shape[1] // 2:]


def ratio(numerators, denominators):
    """Σ numerators / Σ denominators over everything, with its interval over rows: {"value", "interval"}."""
    numerators, denominators = numerators.reshape(len(numerators), -1), denominators.reshape(len(denominators), -1)
    return {"value": numerators.sum() / max(denominators.sum(), 1), "interval":
            bootstrap_ratio(numerators.sum(1), denominators.sum(1))}


def read_text(load, specs, data, tokenizer, trained, device, max_rows=0):
    """Bits per byte of a packed dataset by position, under every scaling of `specs` ("none" first).

    load(spec) -> the model. Positions below `trained` are `within`, the others `beyond`. Returns {"rows", "bins":
    [(first, end)…], "cut": the text read `trained` tokens at a time, its positions from `trained` on, "readings":
    {spec: {"bins": [ratio…], "within", "beyond", "saved": what beyond costs less than without, paired by rows}}}.
    """
    steps = range(BINS_PER_LENGTH * (data.max_len // trained + 2))
    edges = sorted({min(step * trained // BINS_PER_LENGTH, data.max_len) for step in steps})
    far = edges.index(trained)                             # the first bin of positions that training never had
    readings, plain = {}, None
    for spec in specs:
        model = load(spec)
        bits, sizes = bits_by_position(model, data, tokenizer, edges, device, max_rows)
        if plain is None:
            plain = bits
            if not sizes[:, -1].any():
                raise UserError(f"--data: the text ends before position {edges[-2]} of a row; give a longer one, or a "
                                "smaller --max_len")
            cut, cut_sizes = bits_by_position(model, data, tokenizer, edges, device, max_rows, piece=trained)
        readings[spec] = {"bins": [ratio(bits[:, i], sizes[:, i]) for i in range(bits.shape[1])],
                          "within": ratio(bits[:, :far], sizes[:, :far]),
                          "beyond": ratio(bits[:, far:], sizes[:, far:]),
                          "saved": ratio(plain[:, far:] - bits[:, far:], sizes[:, far:])}
    return {"rows": len(sizes), "bins": list(zip(edges[:-1], edges[1:], strict=True)),
            "cut": ratio(cut[:, far:], cut_sizes[:, far:]), "readings": readings}


# --- needles


def needle_items(tokenizer, length, depth, count, max_new_tokens=24, seed=0, raw=False):
    """Questions whose prompts have about `length` - max_new_tokens tokens, and never more: items as eval/skills.py has.

    depth: see `dataset.builtin.needle.haystack`. `prompt_ids` is what to continue with raw. UserError where there is
    no room for a needle.
    """
    def prompt(hidden, size):
        if raw:
            text = needle.haystack(rng, hidden, size, depth, measure)
            return text, [tokenizer.bos_id, *tokenizer.encode(f"{text}\n{hidden.statement[:-len(hidden.value) - 2]}")]
        text = needle.question(rng, hidden, size, depth, measure)
        return text, tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0]

    def measure(text):
        return len(tokenizer.encode(" " + text))

    rng, items = random.Random(f"needles {seed} {length} {depth}"), []
    while len(items) < count:
        hidden = needle.secret(rng)
        if split_of(needle.key_of(hidden)) != "test":
            continue
        size = length - max_new_tokens - len(prompt(hidden, 0)[1]) + measure(hidden.statement)
        text, ids = prompt(hidden, size)
        while len(ids) > length - max_new_tokens:          # a few tokens where sentences were joined
            size -= len(ids) - (length - max_new_tokens)
            if size < measure(hidden.statement):
                raise UserError(f"--lengths: {length} tokens have no room for a needle, a question and an answer of "
                                f"{max_new_tokens} tokens; give a larger one")
            text, ids = prompt(hidden, size)
        items.append({"skill": "needle", "level": 1, "messages": [{"role": "user", "content": text}],
                      "answer": hidden.value, "checker": "number", "max_new_tokens": max_new_tokens,
                      "prompt_ids": ids})
    return items


def find_needles(model, tokenizer, lengths, depths, count, max_new_tokens=24, seed=0, raw=False, thinking="auto"):
    """Greedy answers at every length and depth: [{"length", "depth", "n", "right", "accuracy", "interval"}]."""
    cells = []
    for length in lengths:
        rows = max(1, TOKENS_AT_ONCE // length)
        for depth in depths:
            items = needle_items(tokenizer, length, depth, count, max_new_tokens, seed, raw)
            if raw:
                params = SamplingParams(max_new_tokens, temperature=0.0, stop_strings=(".", "\n"))
                prompts = [item["prompt_ids"] for item in items]
                answers = [found.text for found, in generate(model, prompts, params, tokenizer, batch_size=rows)]
            else:
                answers = [answer for answer, _ in answer_items(model, tokenizer, items, rows, thinking)]
            right = sum(check(item["checker"], answer, item["answer"])
                        for item, answer in zip(items, answers, strict=True))
            cells.append(cell(length, depth, right, count))
    return cells


def cell(length, depth, right, n):
    return {"length": length, "depth": depth, "n": n, "right": right, "accuracy": right / n,
            "interval": wilson(right, n)}


def by_length(cells):
    """The cells of each length taken together, depth None."""
    together = {}
    for one in cells:
        together.setdefault(one["length"], []).append(one)
    return [cell(length, None, sum(one["right"] for one in some), sum(one["n"] for one in some))
            for length, some in together.items()]


# --- showing it


def text_table(text, trained):
    """The bits per byte by position as aligned lines."""
    def shown(figure):
        return f"{figure['value']:.3f} [{figure['interval'][0]:.3f}, {figure['interval'][1]:.3f}]"

    readings = text["readings"]
    yield f"{'bits per byte at':<18}" + "".join(f"{spec:<24}" for spec in readings)
    for i, (first, end) in enumerate(text["bins"]):
        yield f"{f'{first} to {end - 1}':<18}" + "".join(f"{shown(one['bins'][i]):<24}" for one in readings.values())
    for part, label in (("within", f"below {trained}"), ("beyond", f"from {trained} on")):
        yield f"{label:<18}" + "".join(f"{shown(one[part]):<24}" for one in readings.values())
    yield f"the same positions (from {trained} on), read {trained} tokens at a time: {shown(text['cut'])}"
    for spec, one in readings.items():
        if spec != "none":
            yield f"{spec} saves {shown(one['saved'])} bits per byte from position {trained} on"


def needle_table(cells):
    """The accuracies by length (lines) and depth (columns), with their intervals."""
    def shown(one):
        return f"{one['accuracy']:.0%} ({one['interval'][0]:.0%}-{one['interval'][1]:.0%})"

    depths = list(dict.fromkeys(one["depth"] for one in cells))
    yield f"{'tokens':>8}  " + "".join(f"{f'depth {depth:.0%}':<17}" for depth in depths) + "all depths"
    for total in by_length(cells):
        row = [one for one in cells if one["length"] == total["length"]]
        yield f"{total['length']:>8}  " + "".join(f"{shown(one):<17}" for one in row) + shown(total)


def draw(figures, path):
    """Write the plots: bits per byte over positions, and below it a heat map of the needles for every scaling."""
    from matplotlib.figure import Figure                   # half a second to import: only where something is drawn

    text, grids, trained = figures.get("text"), figures.get("needles", {}), figures["trained_length"]
    figure = Figure(figsize=(max(7, 4.5 * len(grids)), 4 * bool(text) + 3.6 * bool(grids)), layout="constrained")
    parts = iter(figure.subfigures(bool(text) + bool(grids), squeeze=False)[:, 0])
    if text:
        axis = next(parts).add_subplot()
        places = [(first + end) / 2 for first, end in text["bins"]]
        for spec, one in text["readings"].items():
            line, = axis.plot(places, [point["value"] for point in one["bins"]], marker=".",
                              label=f"rope scaling {spec}")
            axis.fill_between(places, *zip(*(point["interval"] for point in one["bins"]), strict=True),
                              color=line.get_color(), alpha=0.2, linewidth=0)
        axis.axhline(text["cut"]["value"], color="gray", linestyle="--", label=f"read {trained} tokens at a time")
        axis.axvline(trained, color="gray", linestyle=":", label=f"trained length, {trained}")
        axis.set(xlabel="position in the text (tokens)", ylabel="bits per byte", xlim=(0, text["bins"][-1][1]))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    if grids:
        axes = next(parts).subplots(1, len(grids), squeeze=False)[0]
        for axis, (spec, cells) in zip(axes, grids.items(), strict=True):
            lengths = list(dict.fromkeys(one["length"] for one in cells))
            depths = list(dict.fromkeys(one["depth"] for one in cells))
            grid = [[one["accuracy"] for one in cells if one["depth"] == depth] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for i, one in enumerate(cells):
                axis.text(i // len(depths), i % len(depths), f"{one['accuracy']:.0%}", ha="center", va="center",
                          fontsize=8)
            axis.set_xticks(range(len(lengths)), lengths)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axis.set(xlabel="tokens", ylabel="depth of the needle", title=f"rope scaling {spec}")
        axis.figure.colorbar(image, ax=list(axes), label="needles found")
    figure.suptitle(figures["model"])
    figure.savefig(path, dpi=110)


# --- the script


def plan(cfg):
    """(scalings, "none" first; trained length; longest length; lengths of needles); UserError for what is no plan."""
    config = load_config(cfg.model)
    specs = list(dict.fromkeys(["none", *(spec.strip() for spec in cfg.rope_scaling.split(",") if spec.strip())]))
    factors = [config.stretched(spec).rope_scaling["factor"] for spec in specs[1:]]
    trained = config.max_position_embeddings
    longest = cfg.max_len or int(trained * max(factors, default=4))
    try:
        lengths = [int(length) for length in cfg.lengths.split(",") if length.strip()]
    except ValueError:
        raise UserError(f"--lengths {cfg.lengths}: expected numbers of tokens by commas, as 256,1024") from None
    if cfg.data != "none" and longest <= trained:
        raise UserError(f"--max_len {longest}: the model was trained on {trained} tokens; give more, as {4 * trained}")
    if cfg.depths < 1 or cfg.needles < 0:
        raise UserError(f"--depths {cfg.depths} --needles {cfg.needles}: at least 1 depth and 0 needles are needed")
    if cfg.data == "none" and not cfg.needles:
        raise UserError("--data none --needles 0: nothing is left to measure; give --needles 20")
    multiples = [1, 2, 3, *(2 ** i for i in range(2, 31))]
    return specs, trained, longest, lengths or [trained * m for m in multiples if trained * m <= longest] or [longest]


def main(cfg):
    device = devices.pick_device(cfg.device)
    specs, trained, longest, lengths = plan(cfg)
    dtype = devices.pick_dtype(cfg.dtype, device)

    def load(spec):
        model, _ = load_model(cfg.model, device, rope_scaling="" if spec == "none" else spec, quantize=cfg.quantize,
                              adapter=cfg.adapter)
        # Rotary positions have no end: every scaling, and none, may be asked what it makes of a text of any length.
        model.config.max_position_embeddings = max(model.config.max_position_embeddings, longest, *lengths)
        return model

    tokenizer = Tokenizer.load(cfg.model)
    figures = {"model": cfg.model, "adapter": cfg.adapter, "trained_length": trained, "dtype": str(dtype)[6:]}
    print(f"{cfg.model}{f' with {cfg.adapter}' if cfg.adapter else ''}: trained on {trained} positions")
    with devices.autocast(device, dtype):
        if cfg.data != "none":
            split = "val" if cfg.data.startswith("builtin") else cfg.split
            data = PretrainDataset(resolve(cfg.data, "pretrain"), tokenizer, longest, split, cfg.val_fraction)
            text = read_text(load, specs, data, tokenizer, trained, device, cfg.max_rows)
            figures.update(data=cfg.data, split=split, max_len=longest, text=text)
            print(f"\n{cfg.data}, {text['rows']} rows of {longest} tokens")
            print("\n".join(text_table(text, trained)))
        if cfg.needles:
            depths = [i / max(cfg.depths - 1, 1) for i in range(cfg.depths)]
            figures.update(seed=cfg.seed, raw=cfg.raw, thinking=cfg.thinking, needles={})
            for spec in specs:
                cells = find_needles(load(spec), tokenizer, lengths, depths, cfg.needles, cfg.max_new_tokens, cfg.seed,
                                     cfg.raw, cfg.thinking)
                figures["needles"][spec] = cells
                print(f"\nneedles found, rope scaling {spec}")
                print("\n".join(needle_table(cells)))
    if cfg.out:
        path = pathlib.Path(cfg.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        draw(figures, path.with_suffix(".png"))
        print(f"\nfigures in {path}, plots in {path.with_suffix('.png')}")
    return figures


if __name__ == "__main__":
    run(main, CONFIG)
