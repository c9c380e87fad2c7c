"""What a policy writes for a batch of prompts: the record that reinforcement learning works on, and how it is made.

In lecture order:
  1. Rollout           rows of prompt and completion, with the log-probability of every sampled token as it was sampled
  2. sample            prompts → Rollout;   Sampler: the weights that sample, never older than the policy
  3. micro_batches     rows as the loss takes them: neighbours of like length, trimmed;   put_back: the way back
  4. score             the same tokens under a model, without gradient: a reference, or the policy itself
  5. check_agreement   sampling and scoring must be one distribution: the assertion at the first inner step

What the policy said is its ids. Text is decoded from them for the judges and is never encoded again: another cut into
tokens would be another sample. Sampling is from softmax(logits / τ) over the whole vocabulary, without top-k or top-p,
so that `token_logprobs` with the same τ gives the same numbers again.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model.device import DTYPES
from model.errors import UserError
from model.fused import FusedLM, can_fuse
from model.generate import SamplingParams, generate, inference
from model.logprobs import token_logprobs
from model.quantize import packed_weights

EXACT_LIMIT = 1e-3        # largest |log ratio| where sampling and scoring are both in float32 or better
MEAN_LIMIT = 0.02         # mean |log ratio| where they are in 16 bits


# --- 1. the record


@dataclass
class Rollout:
    """N completions, on the CPU. Rows: prompt, completion (and perhaps tool results and further turns), padding."""
    input_ids: torch.Tensor        # (N, T) int64
    attention_mask: torch.Tensor   # (N, T) bool     1 = real token
    completion_mask: torch.Tensor  # (N, T) bool     1 = sampled by the policy, through the end token
    old_logprobs: torch.Tensor     # (N, T) float32  of the sampled tokens, as sampled, at its temperature; 0 elsewhere
    groups: torch.Tensor           # (N,) int64      number of the prompt, 0 … B - 1; samples of a prompt in a row
    finished: torch.Tensor         # (N,) bool       ended by an end token, not cut
    texts: list                    # N str           what was sampled, without the end token
    items: list                    # N dict          the record of the prompt, shared by its samples
    weights_version: int           # optimizer steps that the sampling weights had seen

    def __len__(self):
        return len(self.input_ids)

    @property
    def lengths(self):
        """Sampled tokens of each row, (N,)."""
        return self.completion_mask.sum(1)

    def select(self, rows):
        """The given rows: indices, or bool (N,). T stays, so that (N, T) tensors beside it can be indexed the same way;
        the prompts that are left are numbered anew."""
        rows = torch.as_tensor(rows)
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        tensors["groups"] = tensors["groups"].unique(return_inverse=True)[1]
        return replace(self, **tensors, texts=[self.texts[i] for i in rows], items=[self.items[i] for i in rows])


def from_rows(rows, items, groups, finished, texts, pad_id, weights_version):
    """A Rollout from N rows of any length, each a tuple of lists (ids, sampled, logprobs) with one entry per token.

    sampled: 1 = the policy's own token. logprobs is read there only.
    """
    N, T = len(rows), max((len(ids) for ids, _, _ in rows), default=0)
    input_ids = torch.full((N, T), pad_id)
    attention_mask, completion_mask = torch.zeros(2, N, T, dtype=torch.bool)
    old_logprobs = torch.zeros(N, T)
    for row, (ids, sampled, logprobs) in enumerate(rows):
        n = len(ids)
        input_ids[row, :n] = torch.tensor(ids)
        attention_mask[row, :n] = True
        completion_mask[row, :n] = torch.tensor(sampled, dtype=torch.bool)
        old_logprobs[row, :n] = torch.tensor(logprobs)
    old_logprobs.masked_fill_(~completion_mask, 0.0)
    return Rollout(input_ids, attention_mask, completion_mask, old_logprobs, torch.as_tensor(groups, dtype=torch.long),
                   torch.as_tensor(finished, dtype=torch.bool), texts, items, weights_version)


def join(rollouts, pad_id=0):
    """One Rollout of the rows of several, the prompts numbered on. Its weights are as old as the oldest."""
    T, first, groups = max(rollout.input_ids.shape[1] for rollout in rollouts), 0, []
    for rollout in rollouts:
        groups.append(rollout.groups + first)
        first = int(groups[-1].max()) + 1

    def rows(name, fill):
        parts = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat([F.pad(part, (0, T - part.shape[1]), value=fill) for part in parts])

    return Rollout(rows("input_ids", pad_id), rows("attention_mask", False), rows("completion_mask", False),
                   rows("old_logprobs", 0.0), torch.cat(groups), torch.cat([rollout.finished for rollout in rollouts]),
                   [text for rollout in rollouts for text in rollout.texts],
                   [item for rollout in rollouts for item in rollout.items],
                   min(rollout.weights_version for rollout in rollouts))


# --- 2. sampling


def sample(model, tokenizer, items, num_samples, max_new_tokens, temperature, seed, numbers, batch_size=0,
           weights_version=0):
    """`num_samples` completions of every item, in the order of the items, by softmax(logits / temperature).

    items: dicts with "messages" (and perhaps "tools"), or with "prompt_ids" where that is rendered already; one that
    has "max_new_tokens" gets no more than that. numbers: what stands for each item in its random draws, as in
    `generate`: with numbers of the data a completion does not depend on ranks and batches. batch_size: rows at once,
    0 = all; it changes speed and memory, not the result. Where a prompt ends inside of a thought, the text opens with
    <think>, as what a judge reads does in eval/skills.py.
    model: the policy itself, not what DDP made of it, or what Sampler.refresh() gives. Raises UserError as `generate`.
    """
    if not temperature > 0:
        raise UserError(f"--temperature {temperature}: must be above 0; the likeliest completion has no alternatives "
                        "to learn from")
    prompts = [item["prompt_ids"] if "prompt_ids" in item else
               tokenizer.render(item["messages"], item.get("tools"), add_generation_prompt=True)[0] for item in items]
    prompts = [list(map(int, prompt)) for prompt in prompts]
    limits = [min(item.get("max_new_tokens") or max_new_tokens, max_new_tokens) for item in items]
    params = SamplingParams(max_new_tokens, temperature, seed=seed)
    with model.autocast() if isinstance(model, FusedLM) else nullcontext():
        completions = generate(model, prompts, params, tokenizer, num_samples, batch_size, numbers, limits)
    rows, texts = [], []
    for prompt, samples in zip(prompts, completions, strict=True):
        opening = "<think>" if prompt[-1] == tokenizer.special.get("<think>") else ""
        for c in samples:
            before = [0] * len(prompt)
            rows.append((prompt + c.ids, before + [1] * len(c.ids), before + c.logprobs))
            texts.append(opening + c.text)
    finished = [c.finish_reason == "stop" for samples in completions for c in samples]
    groups = [number for number in range(len(items)) for _ in range(num_samples)]
    return from_rows(rows, [items[number] for number in groups], groups, finished, texts, tokenizer.pad_id,
                     weights_version)


class Sampler:
    """What samples in place of a policy: `FusedLM`, a copy of its weights for writing only.

    name, a --rollout_dtype: "float32", "bfloat16", …: the format of the copy. "auto": `dtype`, in which the policy
    computes; but it samples itself where an adapter cannot be merged into weights, and where weights of few bits
    (--quantize) are to save the memory that a copy would take.
    """

    def __init__(self, policy, name, dtype):
        self.policy, self.copy = policy, None
        copied = name != "auto" or (can_fuse(policy) and not packed_weights(policy))
        self.dtype = (dtype if name == "auto" else DTYPES[name]) if copied else None        # None: samples itself

    def refresh(self):
        """The model to sample from, with the policy's weights of this moment. Call it before every rollout, where the
        weights are whole (`Run.sampling`)."""
        if self.dtype is None:
            return self.policy
        if self.copy is None:
            self.copy = FusedLM(self.policy, self.dtype)
        else:
            self.copy.refresh()
        return self.copy


# --- 3. rows for a loss


def micro_batches(rollout, size, count=0, **columns):
    """The rows as dicts of tensors, at most `size` (0 = all) each, rows of like length together.

    Each holds input_ids, attention_mask, completion_mask, old_logprobs (b, T) trimmed to its longest row, segment_ids
    (b, T) (1 = real token, as Run counts them), places (b,) of its rows in the rollout, and of every column its rows:
    tensors (N,), or (N, T) trimmed alike. count: that many micro-batches, the missing ones of one row that is all
    padding (places -1): ranks that hold fewer rows than others still have to meet them in every backward pass.
    """
    tensors = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask,
               "completion_mask": rollout.completion_mask, "old_logprobs": rollout.old_logprobs,
               "segment_ids": rollout.attention_mask.long(), **columns}
    lengths = rollout.attention_mask.sum(1)
    batches = []
    for places in lengths.argsort(stable=True).split(size or max(len(rollout), 1)):
        if len(places):
            longest = int(lengths[places].max())
            batch = {name: value[places] for name, value in tensors.items()}
            batch = {name: value[:, :longest] if value.dim() > 1 else value for name, value in batch.items()}
            batches.append({**batch, "places": places})
    blank = {name: value.new_zeros(1, *value.shape[1:])[:, :2] if value.dim() > 1 else value.new_zeros(1)
             for name, value in tensors.items()}
    missing = max(count - len(batches), 0)
    return batches + [{**blank, "places": torch.tensor([-1])}] * missing


def put_back(rollout, batches, values):
    """Values (b, T) of micro-batches → (N, T) float32 in the order of the rollout, on the CPU; 0 behind the rows."""
    whole = torch.zeros(rollout.input_ids.shape)
    for batch, value in zip(batches, values, strict=True):
        places = batch["places"].cpu()
        if places[0] >= 0:
            whole[places, :value.shape[1]] = value.detach().float().cpu()
    return whole


# --- 4. scoring


def score(model, rollout, temperature, micro_batch_size=0):
    """log p of the sampled tokens under `model`, (N, T) float32, 0 elsewhere; no gradient, no dropout."""
    batches, values, device = micro_batches(rollout, micro_batch_size), [], model.lm_head.weight.device
    with inference(model):
        for batch in batches:
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            values.append(token_logprobs(model, ids, mask, temperature=temperature)[0].cpu())
    return put_back(rollout, batches, values) * rollout.completion_mask


# --- 5. one distribution


def check_agreement(rollout, logprobs, dtype, exact_limit=EXACT_LIMIT, mean_limit=MEAN_LIMIT):
    """(mean, largest) |log ratio| between scoring and sampling, for the log; UserError when they are not one.

    logprobs (N, T): of the policy that has seen as many optimizer steps as the weights that sampled. dtype: what
    sampling computed its matrix products in. In 16 bits single tokens may differ by much, the mean may not.
    """
    gap = (logprobs.detach().cpu() - rollout.old_logprobs).abs()[rollout.completion_mask]
    if len(gap) == 0:
        return 0.0, 0.0
    mean, largest = float(gap.mean()), float(gap.max())
    exact = dtype in (torch.float32, torch.float64)
    what, found, limit = ("largest", largest, exact_limit) if exact else ("mean", mean, mean_limit)
    if not found <= limit:                                   # NaN is no agreement either
        raise UserError(f"rollout of weights {rollout.weights_version}: sampling and scoring disagree, {what} |log "
                        f"ratio| {found:.2g} over {len(gap):,} tokens (limit {limit:g}): other weights, another "
                        "temperature, or in 16 bits rounding; --rescore takes the log-probabilities of the trained "
                        "model for those of sampling")
    return mean, largest
