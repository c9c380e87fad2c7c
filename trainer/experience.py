"""From prompts to what a step learns from: whom a rank asks, and how its rollout becomes micro-batches.

    for step, items, numbers in prompts(train, cfg, run, start):       this rank's prompts of the step
        rollout = …                                                    act: num_generations completions of each
        for _, part, micro_batches, num_items in updates(rollout, …):  learn: what one optimizer step gets

A step asks batch_size / num_generations prompts; rank r takes every world_size-th of them, all completions of a prompt
stay together. `numbers` are the places of the prompts in the endless stream of trainer/batches.py: what is sampled
depends on them and the seed, not on how many ranks share the work.
"""

import copy
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from dataset.builtin.generate import resolve
from dataset.lm_dataset import PromptDataset, kind_of, load_rows
from model.adapters.adapted import disabled, has_adapters
from model.distill import token_distances
from model.errors import UserError
from model.generate import inference
from model.logprobs import token_logprobs
from trainer.batches import row_stream, share_of_rank
from trainer.credit import degenerate, values_before
from trainer.gate import gate
from trainer.losses import balance_loss, count_items, next_token_loss
from trainer.preflight import first_rows
from trainer.rewards import build, check_prompts
from trainer.rollout import check_agreement, join, micro_batches, put_back, sample, score
from trainer.state import latest


def at_least(cfg, least, *names):
    """UserError for one of these settings that is below `least`, or no number."""
    for name in names:
        if not least <= getattr(cfg, name) < float("inf"):
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {least}")


def check(cfg, world_size):
    """UserError for sizes of a step that cannot be."""
    group, steps = cfg.num_generations, cfg.minibatches
    at_least(cfg, 1, "num_generations", "minibatches", "inner_epochs", "max_new_tokens", "replay_rows", "gate_prompts")
    at_least(cfg, 0, "replay", "min_pass", "pass_k", "canaries")
    if not 0 < cfg.temperature < float("inf"):
        raise UserError(f"--temperature {cfg.temperature}: must be above 0: a policy that never varies learns nothing")
    if cfg.batch_size % (group * world_size * steps):
        raise UserError(f"--batch_size {cfg.batch_size}: must be a multiple of --num_generations {group} x "
                        f"--minibatches {steps} x {world_size} rank(s)")


def prepare(run, model, tokenizer, kind, val_kind, longest=0):
    """(train, val, judge, replay): the prompts of --data and the held-out ones, which of the built-in world are `kind`
    and `val_kind`; what judges answers of up to `longest` tokens (0: --max_new_tokens); what is learnt beside."""
    cfg = run.cfg
    val_path = resolve(cfg.val_data or ("builtin" if cfg.data == "builtin" else ""), val_kind)
    train, val = run.datasets(PromptDataset, resolve(cfg.data, kind), tokenizer, val_path)
    judge = build(cfg.reward, tokenizer, run.device, longest or cfg.max_new_tokens, cfg.seed, cfg.evaluator,
                  cfg.calibrate, model)
    check_prompts(judge, train)
    run.canary_limit = cfg.canaries if judge.can_be_fooled else 0
    return train, val, judge, Replay(run, tokenizer)


def prompts(data, cfg, run, start, choose=None):
    """Yield (step, items, numbers) after `start` until `run.total_steps`: this rank's prompts and their numbers.

    An item is the prompt of the data with its "row". choose(step): the step's {"row", …}, on every rank the same ones,
    where they do not simply follow one another.
    """
    step, stream, size = start, row_stream(data, cfg.seed), run.rows_per_step
    while step < run.total_steps and not run.stop_requested():
        step += 1
        at = 1 if cfg.overfit_batch else step
        if choose is None:                       # the last step goes on where the stream would end: groups are whole
            chosen = [{"row": stream(place)} for place in range((at - 1) * size, at * size)]
        else:
            chosen = choose(at)
        mine = slice(run.rank, None, run.world_size)
        numbers = [(step - 1) * size + place for place in range(size)]
        yield step, [{**data[entry["row"]], **entry} for entry in chosen[mine]], numbers[mine]
        run.end_of_step(step)


def act(run, sampler, tokenizer, items, numbers, step, sample=sample):
    """A step's completions by the policy as it is now; sample: what makes them. With --rescore their log-probabilities
    are those of the model that is trained, in place of those that its copy for sampling gave."""
    cfg = run.cfg
    rollout = sample(sampler.refresh(), tokenizer, items, cfg.num_generations, cfg.max_new_tokens, cfg.temperature,
                     cfg.seed * 2**32 + step, numbers, weights_version=(step - 1) * cfg.inner_epochs * cfg.minibatches)
    if cfg.rescore:
        rollout = replace(rollout, old_logprobs=score(sampler.policy, rollout, cfg.temperature, cfg.micro_batch_size))
    return rollout


def replace_flat(run, sampler, tokenizer, data, rollout, rewards, judge, numbers, step):
    """(rollout, rewards) in which other prompts stand for those whose completions all got the same reward, as far as
    --resample rounds of trying find any; what then is left of them counts nothing (DAPO's dynamic sampling, Yu et al.
    2025, arXiv:2503.14476, section 3.2).

    Each prompt has its own substitutes, one per round: the prompts at its place in later passes over the data.
    """
    cfg, stream = run.cfg, row_stream(data, run.cfg.seed)
    for again in range(1, cfg.resample + 1):
        flat = degenerate(rewards, rollout.groups)                                                 # (B,)
        if not flat.any():
            break
        others = [numbers[group] + again * run.total_steps * run.rows_per_step for group in flat.nonzero()[:, 0]]
        rows = [stream(place) for place in others]
        fresh = act(run, sampler, tokenizer, [{**data[row], "row": row} for row in rows], others, step)
        fresh_rewards, _ = judge(fresh)
        keep = ~flat[rollout.groups]                                                               # (N,)
        places = torch.cat([rollout.groups[keep], flat.nonzero()[:, 0][fresh.groups]])
        order = places.argsort(stable=True)                                                        # as they stood
        rollout = join([rollout.select(keep), fresh] if keep.any() else [fresh], tokenizer.pad_id).select(order)
        rollout = replace(rollout, groups=places[order])
        rewards = torch.cat([rewards[keep], fresh_rewards])[order]
    left = degenerate(rewards, rollout.groups)[rollout.groups]                                     # (N,)
    return without(rollout, left), rewards


def without(rollout, rows):
    """The rollout with rows (N,) bool in which no token counts."""
    mask = rollout.completion_mask & ~rows[:, None]
    return replace(rollout, completion_mask=mask, old_logprobs=rollout.old_logprobs * mask)


def rows_of(path, *args, **options):
    """The dataset of a file of conversations or of text."""
    return kind_of(path)(path, *args, **options)


class Replay:
    """Conversations and text on which a policy is held where it was, or goes on learning, while it practises something
    else; which rows follows from the step.

    Off, `rows` is None: where --replay is 0, or neither --replay_data nor the built-in world says what.
    """

    def __init__(self, run, tokenizer):
        cfg = run.cfg
        path = cfg.replay_data or ("builtin:sft:0.75,builtin:pretrain:0.25" if cfg.data == "builtin" else "")
        self.rows = None
        if cfg.replay and path:
            self.rows = load_rows(rows_of, resolve(path, "sft"), tokenizer, cfg.max_len, "train",
                                  val_fraction=cfg.val_fraction, on_bad_record=cfg.on_bad_record)
            self.stream = row_stream(self.rows, cfg.seed)
        self.needs_reference = self.rows is not None and cfg.replay_loss == "kl"

    def micro_batches(self, run, number, num_items, num_tokens):
        """This rank's rows for optimizer step `number` of the run, scaled to what `num_items` divides, and for the log
        to what `num_tokens`, the sampled ones, divides."""
        cfg = run.cfg
        if self.rows is None:
            return []
        rows = [self.stream(place) for place in range(number * cfg.replay_rows, (number + 1) * cfg.replay_rows)]
        batches = share_of_rank(self.rows, rows, run.rank, run.world_size, cfg.micro_batch_size)
        targets = max(run.sum_over_ranks(sum(self.rows.count(batch) for batch in batches)), 1)
        scales = {"scale": torch.tensor(num_items / targets), "log_scale": torch.tensor(num_tokens / targets)}
        return [{**batch, **scales} for batch in batches]


def replay_loss(model, reference, batch, cfg, aux_coef):
    """Summed loss of a micro-batch of `Replay`, and the parts and log-probabilities of a script's compute_loss.

    KL(reference‖π) per token of the whole next-token distribution has no gradient where the policy is what it was: a
    reward that says nothing then leaves it so. Cross-entropy teaches the rows themselves.
    """
    mask, rows = batch["loss_mask"], (batch["input_ids"], batch["segment_ids"], batch["positions"])
    if cfg.replay_loss == "kl":
        _, distances, aux = token_distances(model, reference.model, *rows, around=reference)
        loss = (distances * mask).sum()
    else:
        logprobs, aux = token_logprobs(model, rows[0], None, *rows[1:])
        loss = next_token_loss(logprobs, mask)
    total = cfg.replay * batch["scale"] * (loss + aux_coef * balance_loss(aux, mask))
    return total, {"replay_loss": batch["log_scale"] * loss}, None


def updates(run, rollout, columns, step, reduction, replay):
    """Yield (update, part, micro_batches, num_items) for each optimizer step on a rollout: its number, counted from 0,
    its rows, and the same as batches.

    columns: {name: (N,) or (N, T) tensor} that goes beside the rollout's own, such as advantages. In each of
    --inner_epochs passes the completions are dealt to --minibatches optimizer steps, all of a prompt to the same one.
    num_items: the divisor of the summed loss, over all micro-batches and ranks, see `losses.token_weights`.
    """
    cfg = run.cfg
    columns = {**columns, "rows": torch.tensor([item["row"] for item in rollout.items])}
    update = 0
    for epoch in range(cfg.inner_epochs):
        dealt = np.random.default_rng((cfg.seed, step, epoch)).permutation(run.rows_per_step) % cfg.minibatches
        dealt = torch.from_numpy(dealt[run.rank::run.world_size])[rollout.groups]                  # (N,) to which one
        for number in range(cfg.minibatches):
            rows = (dealt == number).nonzero()[:, 0]
            part = rollout.select(rows)
            size = cfg.micro_batch_size or max(len(rows), 1)
            count = max(run.gather(-(-len(rows) // size)))             # every backward pass meets the other ranks
            batches = micro_batches(part, size, count, **{name: value[rows] for name, value in columns.items()})
            items = sum(count_items(batch["completion_mask"], reduction) for batch in batches)
            items = max(run.sum_over_ranks(items), 1)                  # where nothing counts, all gradients are 0
            tokens = run.sum_over_ranks(int(part.completion_mask.sum()))
            again = replay.micro_batches(run, (step - 1) * cfg.inner_epochs * cfg.minibatches + update, items, tokens)
            yield update, part, [run.to_device(batch) for batch in [*batches, *again]], items
            update += 1


def agreement(run, sampler, part, batches, logprobs):
    """Figures of how well scoring agrees with sampling, of the first optimizer step on a rollout; UserError on a rank
    where it does not. logprobs: one (b, T) per batch."""
    dtype = min(run.dtype, sampler.dtype or run.dtype, key=lambda dtype: torch.finfo(dtype).bits)   # the coarser one
    logprobs = [values for values in logprobs if values is not None]                           # without replay
    figures = run.gather(check_agreement(part, put_back(part, batches[:len(logprobs)], logprobs), dtype))
    means, largest = zip(*figures, strict=True)
    return {"log_ratio": sum(means) / len(means), "max_log_ratio": max(largest)}


def gate_start(run, model, tokenizer, train, judge, sample=sample):
    """Try the start policy on some prompts (trainer/gate.py), and time how long a step's sampling takes. A run that
    continues was let in already."""
    cfg = run.cfg
    if not (cfg.overwrite or cfg.dry_run) and run.on_main(lambda: latest(run.out)[1]):
        return
    prompts, samples = min(cfg.gate_prompts, len(train)), max(cfg.num_generations, 2)
    start = time.perf_counter()
    with run.sampling(model):
        report = gate(run, model, tokenizer, train, judge, prompts, samples, samples, cfg.min_pass,
                      max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, sample=sample)
    if report:
        run.sampling_seconds = (time.perf_counter() - start) * cfg.batch_size / (prompts * samples)


def score_reference(run, reference, rollout):
    """Log-probabilities (N, T) of a rollout under the policy before training."""
    with reference() as model:
        return score(model, rollout, run.cfg.temperature, run.cfg.micro_batch_size)


def score_values(run, critic, rollout):
    """V(s_t) of the states before each token (N, T), by the critic as it is now."""
    batches, values = micro_batches(rollout, run.cfg.micro_batch_size), []
    with inference(critic):
        for batch in batches:
            ids, mask = batch["input_ids"].to(run.device), batch["attention_mask"].to(run.device)
            values.append(values_before(critic(ids, mask).logits))
    return put_back(rollout, batches, values) * rollout.completion_mask


def moved(run, part, batches, logprobs):
    """KL(π_old‖π) per token of the rows of an update, estimated (k3 the other way round), over all ranks: how far the
    policy has gone from the one that sampled. logprobs: one (b, T) per batch."""
    mask = part.completion_mask
    logprobs = [values for values in logprobs if values is not None]                           # without replay
    gap = (put_back(part, batches[:len(logprobs)], logprobs) - part.old_logprobs)[mask]
    return run.sum_over_ranks(float((gap.exp() - 1 - gap).sum())) / max(run.sum_over_ranks(int(mask.sum())), 1)


def mean_over_rows(run, values):
    """Mean of (N,) over the rows of all ranks."""
    return run.sum_over_ranks(float(values.sum())) / run.sum_over_ranks(len(values))


class Reference:
    """The policy as it was before training: with `reference() as model` it can be scored with.

    Of a policy that learns through an adapter it is the same weights with the adapter switched off, else a copy.
    """

    def __init__(self, model, device="cpu"):
        self.shared = has_adapters(model)
        self.model = model
        if not self.shared:                                          # a model that will be cut up is not there yet
            self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)

    @contextmanager
    def __call__(self):
        if self.shared:
            with disabled(self.model):
                yield self.model
        else:
            yield self.model


def long_rows(run, width=0, **columns):
    """A batch of this rank as large as the first prompts and their longest completions make it, for the rehearsal: what
    its tokens are does not matter. width: another one. columns: {name: dimensions}, 1 for (b,), 2 for (b, T)."""
    cfg = run.cfg
    items = [run.train[row] for row in first_rows(run)]
    limits = [min(item["max_new_tokens"] or cfg.max_new_tokens, cfg.max_new_tokens) for item in items]
    width = width or max(len(item["prompt_ids"]) + limit for item, limit in zip(items, limits, strict=True))
    shape = (cfg.batch_size // cfg.minibatches // run.world_size, width)
    ones = torch.ones(shape, dtype=torch.long)
    completion = torch.arange(width).expand(shape) >= width - max(limits)
    extra = {name: torch.zeros(shape[:dimensions]) for name, dimensions in columns.items()}
    return {"input_ids": ones, "attention_mask": ones.bool(), "segment_ids": ones, "completion_mask": completion,
            "old_logprobs": torch.zeros(shape), "rows": torch.zeros(shape[0], dtype=torch.long), **extra}
