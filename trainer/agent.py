"""Rollouts of several turns: a policy that calls tools, in the record that reinforcement learning works on.

    sample_turns    items → Rollout: a row is a whole exchange with the tools        (the loop is eval/agent.py's)
    answer_turns    items → the likeliest answers
    gated           rewards of which calls that went wrong keep a part

Exact from token to token. What was sampled stays the ids that were sampled; what a tool answers comes between them as
the chat template lays it out, with completion_mask 0: it is not the policy's doing and gets no gradient. A row is one
text for the model that learns, so every token of every turn is scored in the very context that it was sampled in.
"""

import torch

from dataset.builtin.tools import failed
from eval.agent import play, play_greedily, with_schemas
from model.errors import UserError
from model.generate import SamplingParams, generate
from trainer.rollout import from_rows

MOST_TURNS = 256           # the draws of a turn have the seed  seed · MOST_TURNS + turn


def sample_turns(model, tokenizer, items, num_samples, max_new_tokens, temperature, seed, numbers, batch_size=0,
                 weights_version=0, max_turns=4, max_len=0, show_tools=False):
    """`num_samples` exchanges with the tools for every item, as a Rollout. What is not said here is as in
    `trainer.rollout.sample`, in whose place it can be put.

    max_new_tokens is for each turn; a row has at most max_turns turns, and max_len tokens in all (0: as many as the
    model has positions). completion_mask is 1 on all that the policy sampled, the end tokens of its turns included.
    finished: gave an answer, and ended by itself. texts: that answer, "" where there is none. items: each row has its
    own, with "calls", the {"name", "arguments", "result"} of its calls (name "": malformed), and "turns", their number.
    show_tools: the prompts describe the tools (`eval.agent.with_schemas`).

    The draws of a row depend on the seed, the item's number, which of its samples it is and the turn; not on batches or
    ranks.
    """
    if not temperature > 0:
        raise UserError(f"--temperature {temperature}: must be above 0; the likeliest completion has no alternatives "
                        "to learn from")
    if not 1 <= max_turns <= MOST_TURNS:
        raise UserError(f"--max_turns {max_turns}: must be from 1 to {MOST_TURNS}")

    def complete(prompts, rows, turn, limits):
        params = SamplingParams(max_new_tokens, temperature, seed=seed * MOST_TURNS + turn)
        if turn == 0:                                        # one prefill for all samples of a prompt
            return generate(model, prompts, params, tokenizer, num_samples, batch_size, numbers, limits)
        names = [numbers[row // num_samples] * num_samples + row % num_samples for row in rows]
        return generate(model, prompts, params, tokenizer, 1, batch_size, names, limits)

    items, positions = with_schemas(items) if show_tools else items, model.config.max_position_embeddings
    episodes = play(complete, tokenizer, items, max_new_tokens, max_turns, min(max_len or positions, positions),
                    num_samples)
    groups = [number for number in range(len(items)) for _ in range(num_samples)]
    return from_rows([(e.ids, e.sampled, e.logprobs) for e in episodes],
                     [{**e.item, "calls": e.calls, "turns": e.turns} for e in episodes], groups,
                     [e.finished for e in episodes], [e.text for e in episodes], tokenizer.pad_id, weights_version)


def answer_turns(model, tokenizer, items, max_turns=4, max_len=0, show_tools=False):
    """The model's greedy answer to each item after the calls that it makes, a list of (text, number of tokens that it
    wrote, its calls included), as eval/skills.py `answer_items` has it for one turn."""
    episodes = play_greedily(model, tokenizer, with_schemas(items) if show_tools else items, max_turns, max_len)
    return [(episode.text, sum(episode.sampled)) for episode in episodes]


def gated(rewards, rollout, weight):
    """R - weight · max(R, 0) · (share of the row's calls that were malformed or failed)  -> (N,)

    A right answer is worth the less the more calls went wrong on the way to it. Calls by themselves earn nothing, so
    there is no reward in making more of them.
    """
    shares = [wrong_calls(item) / max(len(item["calls"]), 1) for item in rollout.items]
    return rewards - weight * rewards.clamp(min=0) * torch.tensor(shares).to(rewards)


def wrong_calls(item):
    """How many calls of a row no tool answered."""
    return sum(failed(made["result"]) for made in item["calls"])


def call_figures(run, rollout):
    """{"turns", "calls": per exchange, "wrong_calls": share of all calls} of a step over all ranks, for `run.note`."""
    counts = [(1, item["turns"], len(item["calls"]), wrong_calls(item)) for item in rollout.items]
    rows, turns, calls, wrong = (sum(column) for column in zip(*sum(run.gather(counts), []), strict=True))
    return {"turns": turns / rows, "calls": calls / rows, "wrong_calls": wrong / max(calls, 1)}


def show(model, tokenizer, val, judge, cfg, sample, seed=0):
    """A held-out prompt and three exchanges that begin with it, with their rewards, for `run.sample`."""
    rollout = sample(model, tokenizer, [val[0]], 3, cfg.max_new_tokens, cfg.temperature, seed, [0])
    rewards, _ = judge(rollout)
    lines = [val[0]["messages"][-1]["content"]]
    for reward, text, item in zip(rewards.tolist(), rollout.texts, rollout.items, strict=True):
        calls = "".join(f"{made['name']}({', '.join(map(str, made['arguments'].values()))}) = {made['result']} -> "
                        for made in item["calls"])
        lines.append(f"{reward:+.2f} {calls}{text}")
    return "\n".join(lines)
