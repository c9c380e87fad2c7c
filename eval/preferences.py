"""How often are a checkpoint's own answers the preferred ones? Sampled answers to held-out requests, judged by rule.

A held-out pair says whether a model tells a given good answer from a given bad one; this says how the model answers by
itself, which is what preference training is for. The requests and the rule are those of the built-in world
(dataset/builtin/preferences.py). Printed are the share of preferred answers, its Wilson 95 % interval, by kind of
request, and how long the answers are.

    python eval/preferences.py --model out/full_sft
    python eval/preferences.py --model out/dpo --temperature 0 --out dpo.json
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
    model: str = arg("out/full_sft", "checkpoint folder")
    adapter: str = arg("", "adapter folder to use on it, as train_dpo.py --lora_rank leaves one")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    data: str = arg("builtin", "jsonl of preferences with request and answer, as the built-in ones")
    split: str = arg("test", "which held-out requests of the built-in world", choices=("test", "val"))
    temperature: float = arg(1.0, "1 = the model's own distribution; 0 = its likeliest answer")
    max_new_tokens: int = arg(64, "longest answer in tokens")
    batch_size: int = arg(128, "requests answered together; changes memory and speed, not the answers")
    seed: int = arg(0, "seed of the samples")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    out: str = arg("", "write figures and answers to this JSON file")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import json

from dataset.builtin.generate import resolve
from dataset.builtin.preferences import MANNERS, preferred
from dataset.jsonl import find_files
from eval.intervals import wilson
from model import device as devices
from model.checkpoint import load_model
from model.generate import SamplingParams, generate


def read_requests(path):
    """[{"messages", "request", "answer"}] of a preference file; UserError with file:line for any other record."""
    items = []
    kinds = [kind.__name__ for kind in MANNERS]
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                items.append({"messages": record["chosen"][:-1], "request": record["request"],
                              "answer": record["answer"]})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a request to judge ({error!r}); it needs chosen (messages), "
                                "request and answer, as --data builtin has them") from None
            if record["request"] not in kinds:
                raise UserError(f"{path}:{number}: request {record['request']!r} has no rule; known are "
                                f"{', '.join(kinds)}")
    return items


def win_rate(model, tokenizer, items, temperature=1.0, max_new_tokens=64, batch_size=128, seed=0):
    """Answer every item once and judge the answers.

    Returns {"n", "win_rate", "win_rate_interval", "tokens" (mean length), "requests": {kind: the same}, "answers":
    [{"request", "question", "answer", "preferred"}]}.
    """
    prompts = [tokenizer.render(item["messages"], add_generation_prompt=True)[0] for item in items]
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    answers = [sampled for sampled, in generate(model, prompts, params, tokenizer, batch_size=batch_size)]
    wins = [preferred(item["request"], answer.text, item["answer"])
            for item, answer in zip(items, answers, strict=True)]

    def summed_up(places):
        won = sum(wins[place] for place in places)
        return {"n": len(places), "win_rate": won / len(places), "win_rate_interval": wilson(won, len(places)),
                "tokens": sum(len(answers[place].ids) for place in places) / len(places)}

    kinds = {}
    for place, item in enumerate(items):
        kinds.setdefault(item["request"], []).append(place)
    return {**summed_up(range(len(items))), "requests": {kind: summed_up(kinds[kind]) for kind in sorted(kinds)},
            "answers": [{"request": item["request"], "question": item["messages"][-1]["content"],
                         "answer": answer.text, "preferred": won}
                        for item, answer, won in zip(items, answers, wins, strict=True)]}


def main(cfg):
    device = devices.pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device, rope_scaling=cfg.rope_scaling, quantize=cfg.quantize,
                                  adapter=cfg.adapter)
    path, = find_files(resolve(cfg.data, f"preferences_{cfg.split}"))
    scores = win_rate(model, tokenizer, read_requests(path), cfg.temperature, cfg.max_new_tokens, cfg.batch_size,
                      cfg.seed)
    print(f"{'request':<12} {'n':>5} {'preferred':>10}   {'95 % interval (Wilson)':<24} tokens")
    for kind, part in [*scores["requests"].items(), ("all", scores)]:
        low, high = part["win_rate_interval"]
        print(f"{kind:<12} {part['n']:>5} {part['win_rate']:>10.1%}   {f'{low:.1%} to {high:.1%}':<24} "
              f"{part['tokens']:.1f}")
    if cfg.out:
        out = pathlib.Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"model": cfg.model, "data": cfg.data, "split": cfg.split, **scores}, indent=1,
                                  ensure_ascii=False), encoding="utf-8")
    return scores


if __name__ == "__main__":
    run(main, CONFIG)
