"""Held-out accuracy of a checkpoint, skill by skill: greedy answers, judged by each item's checker.

Every skill is reported with its number of items n, the Wilson 95 % interval of its accuracy, and the tokens that the
model wrote per answer, thought included: what the accuracy costs. A thought is no answer; one without end leaves none.
The last line is the mean over skills (each counts the same, however many items it has) with a bootstrap interval: items
are drawn with replacement within each skill, so it says how far other items of the same skills would move the mean.

    python eval/skills.py --model out/full_sft
    python eval/skills.py --model out/reason --data builtin:reason_test --thinking on
    python eval/skills.py --model out/grpo --data my_prompts.jsonl --limit 50 --out skills.json
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
    adapter: str = arg("", "adapter folder to use on it, as train_lora.py leaves one")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    data: str = arg("builtin", "jsonl of items (conversations or prompt, answer, checker, skill), or builtin")
    split: str = arg("test", "which held-out items of the built-in world", choices=("test", "val"))
    thinking: str = arg("auto", "think first, between <think> and </think>: on, off, or auto (as the model likes)",
                        choices=("auto", "on", "off"))
    max_new_tokens: int = arg(0, "longest answer in tokens, thought included; 0 = what each item allows")
    limit: int = arg(0, "use only the first so many items of every skill; 0 = all")
    batch_size: int = arg(128, "prompts answered together; changes memory and speed, not the answers")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    out: str = arg("", "write figures and answers to this JSON file")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import json

import numpy as np

from dataset.builtin.checkers import check
from dataset.builtin.generate import resolve
from eval.intervals import wilson
from model import device as devices
from model.checkpoint import load_model
from model.generate import SamplingParams, generate

THINKING = {"auto": None, "on": True, "off": False}        # enable_thinking of the chat template
MAX_NEW_TOKENS = 64                                        # for items that do not say how long an answer may be


def read_items(path, limit=0):
    """Items of a jsonl file, at most `limit` of each skill (0 = all), as dicts.

    Keys: skill, level, messages, answer, checker, max_new_tokens. Raises UserError with file:line for any other record.
    """
    items, counts = [], {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                messages = record["conversations"] if "conversations" in record else record["prompt"]
                item = {"messages": messages, "answer": str(record["answer"]), "checker": record["checker"],
                        "skill": record.get("skill", "all"), "level": record.get("level", 0),
                        "max_new_tokens": record.get("max_new_tokens", MAX_NEW_TOKENS)}
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}:{number}: not an item to check ({error}); it needs conversations (or prompt), "
                                "answer and checker") from None
            if isinstance(messages, str):
                item["messages"] = [{"role": "user", "content": messages}]
            counts[item["skill"]] = counts.get(item["skill"], 0) + 1
            if not limit or counts[item["skill"]] <= limit:
                items.append(item)
    if not items:
        raise UserError(f"{path}: holds no items")
    return items


def answer_items(model, tokenizer, items, batch_size=128, thinking="auto"):
    """The model's greedy answer to each item, a list of (text, number of tokens written for it).

    The text has the thought too, between <think> and </think>. Items that allow equally long answers share batches.
    """
    answers = [("", 0)] * len(items)
    for budget in sorted({item["max_new_tokens"] for item in items}):
        places = [i for i, item in enumerate(items) if item["max_new_tokens"] == budget]
        prompts = [tokenizer.render(items[i]["messages"], add_generation_prompt=True,
                                    enable_thinking=THINKING[thinking])[0] for i in places]
        params = SamplingParams(max_new_tokens=budget, temperature=0.0)
        completions = generate(model, prompts, params, tokenizer, batch_size=batch_size)
        for i, prompt, (completion,) in zip(places, prompts, completions, strict=True):
            # where the prompt ends inside of a thought, the answer goes on with it
            opening = "<think>" if prompt[-1] == tokenizer.special.get("<think>") else ""
            answers[i] = opening + completion.text, len(completion.ids)
    return answers


def evaluate_skills(model, tokenizer, items, batch_size=128, thinking="auto"):
    """Answer and judge `items` (see `read_items`).

    Returns {"skills": {name: {"n", "accuracy", "interval", "tokens", "levels": {level: accuracy}}}, "mean",
    "mean_interval", "mean_tokens",
    "answers": [{"skill", "level", "question", "expected", "answer", "tokens", "right"}]}.
    """
    answers = answer_items(model, tokenizer, items, batch_size, thinking)
    right = [check(item["checker"], answer, item["answer"]) for item, (answer, _) in zip(items, answers, strict=True)]
    by_skill, by_level, tokens = {}, {}, {}
    for item, (_, size), ok in zip(items, answers, right, strict=True):
        by_skill.setdefault(item["skill"], []).append(ok)
        tokens.setdefault(item["skill"], []).append(size)
        by_level.setdefault(item["skill"], {}).setdefault(item["level"], []).append(ok)
    skills = {name: {"n": len(oks), "accuracy": sum(oks) / len(oks), "interval": wilson(sum(oks), len(oks)),
                     "tokens": float(np.mean(tokens[name])),
                     "levels": {level: sum(part) / len(part) for level, part in sorted(by_level[name].items())}}
              for name, oks in by_skill.items()}
    return {"skills": skills, "mean": float(np.mean([skill["accuracy"] for skill in skills.values()])),
            "mean_interval": bootstrap_mean_over_groups(list(by_skill.values())),
            "mean_tokens": float(np.mean([skill["tokens"] for skill in skills.values()])),
            "answers": [{"skill": item["skill"], "level": item["level"], "question": item["messages"][-1]["content"],
                         "expected": item["answer"], "answer": answer, "tokens": size, "right": ok}
                        for item, (answer, size), ok in zip(items, answers, right, strict=True)]}


def bootstrap_mean_over_groups(groups, resamples=1000, seed=0):
    """95 % percentile bootstrap of the mean of the groups' means; items are redrawn within their group.

    The mean of n values redrawn from k ones and n - k zeros is Binomial(n, k/n) / n, which is drawn directly.
    """
    rng = np.random.default_rng(seed)
    means = [rng.binomial(len(group), sum(group) / len(group), size=resamples) / len(group) for group in groups]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return (float(low), float(high))


def table(scores):
    """The scores as aligned lines of text, with the accuracy of each level in a last column."""
    yield f"{'skill':<20} {'n':>5} {'accuracy':>9}   {'95 % interval (Wilson)':<24} {'tokens':>6}  by level"
    for name, skill in scores["skills"].items():
        low, high = skill["interval"]
        levels = "  ".join(f"{accuracy:.0%}" for accuracy in skill["levels"].values())
        yield (f"{name:<20} {skill['n']:>5} {skill['accuracy']:>9.1%}   {f'{low:.1%} to {high:.1%}':<24} "
               f"{skill['tokens']:>6.1f}  {levels}")
    low, high = scores["mean_interval"]
    total = sum(skill["n"] for skill in scores["skills"].values())
    yield (f"{'mean over skills':<20} {total:>5} {scores['mean']:>9.1%}   {f'{low:.1%} to {high:.1%}':<24} "
           f"{scores['mean_tokens']:>6.1f}  (interval: bootstrap)")


def main(cfg):
    device = devices.pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device, rope_scaling=cfg.rope_scaling, quantize=cfg.quantize,
                                  adapter=cfg.adapter)
    items = read_items(resolve(cfg.data, f"skills_{cfg.split}"), cfg.limit)
    if cfg.max_new_tokens:
        items = [{**item, "max_new_tokens": cfg.max_new_tokens} for item in items]
    scores = evaluate_skills(model, tokenizer, items, cfg.batch_size, cfg.thinking)
    print(f"{cfg.model}{f' with {cfg.adapter}' if cfg.adapter else ''} on {cfg.data}"
          f"{f' ({cfg.split} items)' if cfg.data.startswith('builtin') else ''}")
    print("\n".join(table(scores)))
    if cfg.out:
        path = pathlib.Path(cfg.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": cfg.model, "adapter": cfg.adapter, "data": cfg.data, "split": cfg.split,
                                    "thinking": cfg.thinking, **scores}, indent=1,
                                   ensure_ascii=False), encoding="utf-8")
    return scores


if __name__ == "__main__":
    run(main, CONFIG)
