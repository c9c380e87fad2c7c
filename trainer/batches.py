"""Which examples a rank sees at a step: a pure function of (seed, step, rank, world size).

All epochs form one endless stream of row numbers: epoch e is the permutation of all rows that (seed, e) gives. Step s,
counted from 1, takes the places (s-1)·batch_size … s·batch_size - 1 of the stream; rank r takes every world_size-th of
them. Nothing needs to be stored to continue a run, and the global order is the same for any number of ranks.
"""

import functools

import numpy as np

from dataset.lm_dataset import collate


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order of n rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def rows_of_step(n, cfg, step, last_place):
    """Row numbers of one step over all ranks: batch_size of them, fewer where the stream ends at `last_place`."""
    places = range((step - 1) * cfg.batch_size, min(step * cfg.batch_size, last_place))
    return [int(permutation(cfg.seed, place // n, n)[place % n]) for place in places]


def share_of_rank(data, rows, rank, world_size, micro_batch_size):
    """The micro-batches of one rank: dicts of tensors (b, T).

    Every rank gets the same number of micro-batches, because each backward pass meets the other ranks: a rank that is
    short of rows takes one that is all padding. Where a micro-batch holds padding, "attention_mask" (b, T) says so.
    """
    shares = -(-len(rows) // world_size)                                   # rows of the best-served rank
    size = min(micro_batch_size or shares, shares)
    mine = [data[row] for row in rows[rank::world_size]]
    if len(mine) < shares:
        mine.append({**data[rows[0]], "loss_mask": np.zeros_like(data[rows[0]]["loss_mask"]),
                     "segment_ids": np.zeros_like(data[rows[0]]["segment_ids"])})
    micro_batches = [collate(mine[i:i + size]) for i in range(0, shares, size)]
    for batch in micro_batches:
        real = batch["segment_ids"] > 0
        if not real.all():
            batch["attention_mask"] = real
    return micro_batches


def batches(data, cfg, run, start):
    """Yield (step, micro_batches, num_targets) for the steps after `start` until `run.total_steps`.

    num_targets counts the loss targets of the step over all micro-batches and ranks: the divisor of the summed loss.
    A step without any target is passed over. `run.total_steps` may shrink on the way (see Run.fit_to_budget).
    """
    step = start
    while step < run.total_steps and not run.stop_requested():
        step += 1
        rows = rows_of_step(len(data), cfg, 1 if cfg.overfit_batch else step, run.last_place)
        micro_batches = share_of_rank(data, rows, run.rank, run.world_size, cfg.micro_batch_size)
        num_targets = run.sum_over_ranks(sum(int(batch["loss_mask"].sum()) for batch in micro_batches))
        if num_targets:
            yield step, [run.to_device(batch) for batch in micro_batches], num_targets
        run.end_of_step(step)
