"""Tool use over several turns: a model asks for tools, reads what they answer, and goes on until it has an answer.

    python eval/agent.py --model out/agent
    python eval/agent.py --model out/agent --data my_problems.jsonl --show_tools --out agent.json

What a policy wrote is its ids and stays those ids: a tool's result is appended to them as the chat template lays it
out, and nothing that was sampled is decoded and encoded again. `play` is the loop; evaluation plays greedily,
trainer/agent.py by sampling, and both judge the last turn.

Success is reported kind by kind, with the Wilson 95 % interval, beside the calls made per problem and the shares of
them that could not be read (malformed) or that no tool could answer (failed).
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not eval/

from dataclasses import dataclass, field

from model.cli import arg, parse_args
from model.errors import UserError, run


@dataclass
class Config:
    model: str = arg("out/agent", "checkpoint folder")
    adapter: str = arg("", "adapter folder to use on it, as train_lora.py leaves one")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    data: str = arg("builtin", "jsonl of items (conversations or prompt, answer, checker, skill), or builtin")
    split: str = arg("test", "which held-out items of the built-in world", choices=("test", "val"))
    show_tools: bool = arg(False, "describe the tools in the prompt, in some 600 tokens: for a model that was not "
                           "taught them by examples")
    max_turns: int = arg(4, "turns of the model per problem, the answer included")
    max_new_tokens: int = arg(0, "longest turn in tokens; 0 = what each item allows")
    limit: int = arg(0, "use only the first so many items of every kind; 0 = all")
    batch_size: int = arg(128, "problems worked on together; changes memory and speed, not the answers")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    out: str = arg("", "write figures and answers to this JSON file")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import functools
import json

import numpy as np

from dataset.builtin import tools
from dataset.builtin.checkers import check
from dataset.builtin.generate import resolve
from eval.intervals import wilson
from eval.skills import MAX_NEW_TOKENS, bootstrap_mean_over_groups, read_items
from model import device as devices
from model.checkpoint import load_model
from model.generate import SamplingParams, generate

MALFORMED = "error: not a tool call"                       # what a model reads after one that cannot be read


# --- 1. one problem being worked on


@dataclass
class Episode:
    """A problem and all that was written about it so far, by the policy and by the tools."""
    item: dict
    ids: list                                              # prompt, a turn of the policy, results, another turn, …
    sampled: list                                          # of each id: 1 = the policy's own
    logprobs: list                                         # of each id: as sampled, 0 where it is not the policy's
    calls: list = field(default_factory=list)              # {"name", "arguments", "result"}; name "" = malformed
    turns: int = 0                                         # that the policy has had
    text: str = ""                                         # its answer, "" while there is none
    finished: bool = False                                 # it gave one, and ended by itself

    def add(self, ids, logprobs=None):
        """Append ids: the policy's own, with their logprobs, or a tool's."""
        self.ids += ids
        self.sampled += [int(logprobs is not None)] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    def wrong_calls(self):
        """(malformed, failed): calls that could not be read, and calls that no tool could answer."""
        malformed = sum(not made["name"] for made in self.calls)
        return malformed, sum(tools.failed(made["result"]) for made in self.calls) - malformed


# --- 2. what stands between two turns


def read_calls(tokenizer, ids):
    """The tool calls in a turn's ids: {"name", "arguments"}, or None for one that is malformed.

    <tool_call> counts as a token only: a model that spells it letter by letter has written text.
    """
    opening, closing = tokenizer.special_id("<tool_call>"), tokenizer.special_id("</tool_call>")
    calls, start = [], None
    for place, index in enumerate(ids):
        if index in (opening, closing):
            if start is not None or index == closing:      # closed, or never opened, or opened twice
                whole = start is not None and index == closing
                calls.append(parse_call(tokenizer.decode(ids[start:place], skip_special=False)) if whole else None)
            start = place + 1 if index == opening else None
    return calls + [None] * (start is not None)


def parse_call(text):
    """{"name", "arguments"} from JSON, or None where it is something else."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
        return {"name": call["name"], "arguments": call["arguments"]}
    return None


def tool_turn(tokenizer, results):
    """The ids from the end of an assistant's turn to the beginning of its next one, with the tools' results between.

    Cut out of a rendered conversation, so the template says how results look and a result that spells a special token
    stays plain text. That conversation has no assistant's turn: what follows the end of a turn is the same for a user's
    in every template with one end token, and some lay an assistant's last turn out differently.
    """
    question = [{"role": "user", "content": "?"}]
    ends = tokenizer.render(question)[0].count(tokenizer.end_of_turn_id)
    ids, _ = tokenizer.render(question + [{"role": "tool", "content": result} for result in results],
                              add_generation_prompt=True)
    places = [place for place, index in enumerate(ids) if index == tokenizer.end_of_turn_id]
    return ids[places[ends - 1] + 1:]


def check_tokenizer(tokenizer, folder):
    """UserError unless tool calls are tokens of the vocabulary and the chat template shows results."""
    if not {"<tool_call>", "</tool_call>"} <= tokenizer.special.keys():
        raise UserError(f"--model {folder}: <tool_call> and </tool_call> are no single tokens of its vocabulary; start "
                        "from a model that has them (one trained here, or of the Qwen2.5 and Qwen3 families)")
    if "a result" not in tokenizer.decode(tool_turn(tokenizer, ["a result"])):
        raise UserError(f"--model {folder}: its chat template has no place for results of tools; give a model with "
                        "another, or --chat_template chatml where it is trained")


# --- 3. the loop


def play(complete, tokenizer, items, max_new_tokens, max_turns, max_len, num_samples=1):
    """Work on every item `num_samples` times; returns Episodes, those of an item in a row.

    complete(prompts, rows, turn, limits) -> a list, per prompt, of lists of Completion: turn number `turn` of the
    policy. In turn 0 there is a prompt for each item, and each gets num_samples completions; later every episode that
    goes on is a prompt of its own. `rows` says for each prompt which (first) episode it is of, `limits` how many new
    tokens it may get: max_new_tokens or what its item allows, and no more than fit into max_len with the prompt.

    An episode ends with a turn that calls no tool: its answer. It ends without one where a turn is cut, after max_turns
    turns, or where the tools' results leave no room.
    """
    prompts = [list(map(int, item["prompt_ids"])) if "prompt_ids" in item else
               tokenizer.render(item["messages"], item.get("tools"), add_generation_prompt=True)[0] for item in items]
    episodes = [Episode(item, list(prompt), [0] * len(prompt), [0.0] * len(prompt))
                for item, prompt in zip(items, prompts, strict=True) for _ in range(num_samples)]
    between = functools.cache(lambda results: tool_turn(tokenizer, results))
    for episode in episodes:
        if len(episode.ids) >= max_len:
            raise UserError(f"a prompt of {len(episode.ids)} tokens leaves no room within {max_len}: give a larger "
                            "--max_len, shorter prompts, or no --show_tools; eval/agent.py: --rope_scaling yarn:F")
    rows = list(range(0, len(episodes), num_samples))
    live = list(range(len(episodes)))
    for turn in range(max_turns if items else 0):
        limits = [min(episodes[row].item.get("max_new_tokens") or max_new_tokens, max_new_tokens,
                      max_len - len(episodes[row].ids)) for row in rows]
        completions = complete([episodes[row].ids for row in rows], rows, turn, limits)
        rows = []
        for row, completion in zip(live, (c for samples in completions for c in samples), strict=True):
            results = take_turn(episodes[row], completion, tokenizer)
            following = between(tuple(results)) if results and turn + 1 < max_turns else []
            if following and len(episodes[row].ids) + len(following) < max_len:
                episodes[row].add(following)
                rows.append(row)
        live = rows
        if not live:
            break
    return episodes


def play_greedily(model, tokenizer, items, max_turns=4, max_len=0, batch_size=128):
    """Episodes of the model's likeliest tokens, one for each item, of as many new tokens a turn as the item allows."""
    longest = max((item.get("max_new_tokens") or MAX_NEW_TOKENS for item in items), default=1)

    def complete(prompts, rows, turn, limits):
        return generate(model, prompts, SamplingParams(longest, temperature=0.0), tokenizer, batch_size=batch_size,
                        limits=limits)

    positions = model.config.max_position_embeddings
    return play(complete, tokenizer, items, longest, max_turns, min(max_len or positions, positions))


def take_turn(episode, completion, tokenizer):
    """Add a turn of the policy. Returns what the tools answer to it, [] where the episode ends with it."""
    opening = "<think>" if episode.ids[-1] == tokenizer.special.get("<think>") else ""    # the prompt began a thought
    episode.add(completion.ids, completion.logprobs)
    episode.turns += 1
    calls = read_calls(tokenizer, completion.ids)
    if completion.finish_reason != "stop":
        return []
    if not calls:
        episode.text, episode.finished = opening + completion.text, True
        return []
    for made in calls:
        result = tools.call(**made) if made else MALFORMED
        episode.calls.append({**(made or {"name": "", "arguments": {}}), "result": result})
    ended_turn = completion.ids[-1] == tokenizer.end_of_turn_id              # and not the whole document
    return [made["result"] for made in episode.calls[-len(calls):]] if ended_turn else []


def with_schemas(items):
    """The items with the tools' descriptions in their prompts."""
    return [{name: value for name, value in {**item, "tools": tools.SCHEMAS}.items() if name != "prompt_ids"}
            for item in items]


# --- 4. how well it goes


def evaluate_agent(model, tokenizer, items, max_turns=4, batch_size=128):
    """Play `items` (see eval/skills.py `read_items`) greedily and judge the answers.

    Returns {"skills": {name: {"n", "accuracy", "interval", "calls", "malformed", "failed", "unfinished"}}, "mean",
    "mean_interval", "answers"}; calls are per problem, malformed and failed per call, unfinished per problem.
    """
    episodes = play_greedily(model, tokenizer, items, max_turns, batch_size=batch_size)
    right = [is_right(episode) for episode in episodes]
    by_skill = {}
    for episode, ok in zip(episodes, right, strict=True):
        by_skill.setdefault(episode.item["skill"], []).append((episode, ok))
    skills = {name: {"n": len(pairs), "accuracy": sum(ok for _, ok in pairs) / len(pairs),
                     "interval": wilson(sum(ok for _, ok in pairs), len(pairs)), **usage([e for e, _ in pairs])}
              for name, pairs in by_skill.items()}
    return {"skills": skills, "mean": float(np.mean([skill["accuracy"] for skill in skills.values()])),
            "mean_interval": bootstrap_mean_over_groups([[ok for _, ok in pairs] for pairs in by_skill.values()]),
            "answers": [{"skill": e.item["skill"], "question": e.item["messages"][-1]["content"],
                         "expected": e.item["answer"], "calls": e.calls, "answer": e.text, "right": ok}
                        for e, ok in zip(episodes, right, strict=True)]}


def is_right(episode):
    """Whether there is an answer and the item's checker accepts it."""
    return episode.finished and check(episode.item["checker"], episode.text, episode.item["answer"])


def usage(episodes):
    """How some episodes used the tools: calls per episode, shares of calls that went wrong, share without an answer."""
    made = sum(len(episode.calls) for episode in episodes)
    malformed, failed = np.sum([episode.wrong_calls() for episode in episodes], axis=0)
    return {"calls": made / len(episodes), "malformed": float(malformed / max(made, 1)),
            "failed": float(failed / max(made, 1)), "unfinished": np.mean([not e.finished for e in episodes]).item()}


def table(scores):
    """The scores as aligned lines of text."""
    yield (f"{'kind':<20} {'n':>5} {'success':>8}   {'95 % interval (Wilson)':<24} {'calls':>5} {'malformed':>9} "
           f"{'failed':>6} {'no answer':>9}")
    for name, skill in scores["skills"].items():
        low, high = skill["interval"]
        yield (f"{name:<20} {skill['n']:>5} {skill['accuracy']:>8.1%}   {f'{low:.1%} to {high:.1%}':<24} "
               f"{skill['calls']:>5.2f} {skill['malformed']:>9.1%} {skill['failed']:>6.1%} {skill['unfinished']:>9.1%}")
    low, high = scores["mean_interval"]
    total = sum(skill["n"] for skill in scores["skills"].values())
    yield (f"{'mean over kinds':<20} {total:>5} {scores['mean']:>8.1%}   {f'{low:.1%} to {high:.1%}':<24} "
           "(interval: bootstrap)")


def main(cfg):
    device = devices.pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device, rope_scaling=cfg.rope_scaling, quantize=cfg.quantize,
                                  adapter=cfg.adapter)
    check_tokenizer(tokenizer, cfg.model)
    items = read_items(resolve(cfg.data, f"agent_{cfg.split}"), cfg.limit)
    if cfg.max_new_tokens:
        items = [{**item, "max_new_tokens": cfg.max_new_tokens} for item in items]
    scores = evaluate_agent(model, tokenizer, with_schemas(items) if cfg.show_tools else items, cfg.max_turns,
                            cfg.batch_size)
    print(f"{cfg.model}{f' with {cfg.adapter}' if cfg.adapter else ''} on {cfg.data}"
          f"{f' ({cfg.split} items)' if cfg.data.startswith('builtin') else ''}")
    print("\n".join(table(scores)))
    if cfg.out:
        path = pathlib.Path(cfg.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": cfg.model, "adapter": cfg.adapter, "data": cfg.data, "split": cfg.split,
                                    **scores}, indent=1, ensure_ascii=False), encoding="utf-8")
    return scores


if __name__ == "__main__":
    run(main, CONFIG)
