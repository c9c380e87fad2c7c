"""The student's own answers in place of the data's, so that it is taught where it goes by itself.

A student that has only ever seen good answers is not taught what to do after its own mistakes, but those are what it
meets when it writes. Generalized knowledge distillation (Agarwal et al. 2023, arXiv:2306.13649, algorithm 1) lets it
answer the prompts of the data in a share λ of the steps, and compares the two models on what it said.

What is sampled is a function of (seed, step, row of the data) and of the weights: a run continues exactly, and in
float32 or float64 it does not matter how many ranks or micro-batches share the rows.
"""

import numpy as np
import torch

from dataset.lm_dataset import collate, plan_rows
from model.generate import SamplingParams, generate
from trainer import parallel


def is_on_policy(cfg, step):
    """Whether the rows of a step get the student's answers: with probability --on_policy, the same on every rank."""
    return np.random.default_rng((cfg.seed, step)).random() < cfg.on_policy


def with_own_answers(run, model, tokenizer, micro_batches, cfg, step):
    """(micro-batches, their number of targets over all ranks) of a step in which `model` has answered.

    Of each conversation in a row the last answer is replaced, what comes before it stays as context. loss_mask is 1 on
    what was sampled, the end token included. As many rows come out as the new conversations fill.
    """
    params = SamplingParams(cfg.max_new_tokens, cfg.sample_temperature, seed=cfg.seed * 2**32 + step)
    answered = []
    with run.autocast(), parallel.whole(model), torch.compiler.set_stance("force_eager"):          # other shapes
        for batch in micro_batches:
            run.count(batch, -1)                                # the log counts what is trained on
            prompts, numbers = prompts_of(batch, cfg.max_len)
            completions = generate(model, prompts, params, tokenizer, numbers=numbers)
            texts = [(prompt + answer.ids)[:cfg.max_len]
                     for prompt, (answer,) in zip(prompts, completions, strict=True)]
            rows = pack(texts, [len(prompt) for prompt in prompts], numbers, cfg.max_len, tokenizer.pad_id)
            answered.append(run.to_device(collate(rows) if rows else batch))      # no prompt: a rank's padding
    return answered, run.sum_over_ranks(sum(int(batch["loss_mask"].sum()) for batch in answered))


def prompts_of(batch, max_len):
    """(prompts, a list of ids each; numbers): all that stands before the last answer of every conversation of a batch.

    A number says which conversation of the data it is: its row · max_len + its place in that row.
    """
    batch = {name: value.cpu().numpy() for name, value in batch.items()}
    prompts, numbers = [], []
    for row, ids in enumerate(batch["input_ids"]):
        segments, mask = batch["segment_ids"][row], batch["loss_mask"][row]
        for segment in range(1, segments.max(initial=0) + 1):
            places = np.flatnonzero(segments == segment)
            targets = np.flatnonzero(mask[places])              # by their place in the conversation
            if len(targets):
                begins = targets[np.diff(targets, prepend=-2) > 1]         # of the answers: runs of targets
                prompts.append(ids[places[:begins[-1]]].tolist())
                numbers.append(int(batch["rows"][row]) * max_len + segment)
    return prompts, numbers


def pack(texts, prompt_sizes, numbers, max_len, pad_id):
    """Rows of packed texts, as `PackedRows` makes them, with the targets behind the prompts."""
    rows = []
    for plan in plan_rows([len(text) for text in texts], max_len, cut=False):
        ids, (mask, segments, positions) = np.full(max_len, pad_id), np.zeros((3, max_len), np.int64)
        at = 0
        for segment, (text, _, size) in enumerate(plan, start=1):
            here = slice(at, at + size)
            ids[here], segments[here], positions[here] = texts[text], segment, np.arange(size)
            mask[at + prompt_sizes[text]:at + size] = 1
            at += size
        rows.append({"input_ids": ids, "loss_mask": mask.astype(np.uint8), "segment_ids": segments,
                     "positions": positions, "rows": np.int64(numbers[plan[0][0]] // max_len)})
    return rows
