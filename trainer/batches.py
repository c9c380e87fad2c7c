"""Which examples a rank sees at a step: a pure function of (seed, step, rank, world size).

All epochs form one endless stream of row numbers: epoch e is the permutation of all rows that (seed, e) gives. Step s,
counted from 1, takes the places (s-1)·batch_size … s·batch_size - 1 of the stream; rank r takes every world_size-th of
them. Nothing needs to be stored to continue a run, and the global order is the same for any number of ranks.

In a mixture every source has an endless stream of its own, and the places are dealt to the sources in blocks of 1000
(more, for very small shares): after every block each source had its share of all places so far, to within one row.
"""

import functools

import numpy as np
import torch

from dataset.lm_dataset import Mixture, collate


def endless(n, *seed):
    """The function place → row of an endless stream over n rows: epoch e is the permutation that (*seed, e) gives."""
    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng((*seed, epoch)).permutation(n)

    return lambda place: int(permutation(place // n)[place % n])


def row_stream(data, seed):
    """The function place → row number of the stream of a whole run."""
    if not isinstance(data, Mixture):
        return endless(len(data), seed)
    streams = [endless(len(source), seed, 1 + number) for number, source in enumerate(data.sources)]
    block = max(1000, round(2 / min(data.shares)))          # long enough for a row of every source in every block
    up_to = np.cumsum([0.0, *data.shares])
    up_to[-1] = 1.0                                         # sources 0 … k - 1 together have the share up_to[k]

    @functools.lru_cache(maxsize=2)
    def dealt(number):
        """For the places of a block: the source of each, and the place in that source's own stream."""
        before, after = (np.diff(np.floor(up_to * places).astype(np.int64))
                         for places in (number * block, (number + 1) * block))
        source = np.random.default_rng((seed, 0, number)).permutation(
            np.repeat(np.arange(len(streams)), after - before))
        own = np.empty(block, np.int64)
        for k in range(len(streams)):
            own[source == k] = np.arange(before[k], after[k])
        return source, own

    def row(place):
        source, own = dealt(place // block)
        k, nth = source[place % block], int(own[place % block])
        return data.firsts[k] + streams[k](nth)

    return row


def rows_of_step(stream, size, step, last_place):
    """Row numbers of one step over all ranks: `size` of them, fewer where the stream ends at `last_place`."""
    return [stream(place) for place in range((step - 1) * size, min(step * size, last_place))]


def share_of_rank(data, rows, rank, world_size, micro_batch_size):
    """The micro-batches of one rank: dicts of tensors (b, T), and "rows" (b,), their numbers in the data.

    Every rank gets the same number of micro-batches, because each backward pass meets the other ranks: a rank that is
    short of rows takes one that is all zeros, padding. Where a micro-batch holds padding, "attention_mask" (b, T) says
    so.
    """
    shares = -(-len(rows) // world_size)                                   # rows of the best-served rank
    size = min(micro_batch_size or shares, shares)
    mine = [{**data[row], "rows": np.int64(row)} for row in rows[rank::world_size]]
    if len(mine) < shares:
        blank = {name: np.zeros_like(value) for name, value in data[rows[0]].items()}
        mine.append({**blank, "rows": np.int64(rows[0])})
    micro_batches = [collate(mine[i:i + size]) for i in range(0, shares, size)]
    for batch in micro_batches:
        real = batch["segment_ids"] > 0
        if not real.all():
            batch["attention_mask"] = real
    return micro_batches


def batches(data, cfg, run, start):
    """Yield (step, micro_batches, num_items) for the steps after `start` until `run.total_steps`.

    num_items, the divisor of the summed loss, counts loss targets, or what else `data.count` counts (pairs), over all
    micro-batches and ranks of the step. A step without any is passed over. `run.total_steps` may shrink on the
    way (see Run.fit_to_budget).
    """
    step, stream = start, row_stream(data, cfg.seed)
    while step < run.total_steps and not run.stop_requested():
        step += 1
        rows = rows_of_step(stream, cfg.batch_size, 1 if cfg.overfit_batch else step, run.last_place)
        micro_batches = share_of_rank(data, rows, run.rank, run.world_size, cfg.micro_batch_size)
        num_items = run.sum_over_ranks(sum(data.count(batch) for batch in micro_batches))
        if num_items:
            yield step, [run.to_device(batch) for batch in micro_batches], num_items
        run.end_of_step(step)


def coins(rows, count, seed=0):
    """A fixed fair coin for each of the first `count` pairs of rows (B,): bool (B, count)."""
    first = (rows[:, None] + seed % 65_536 * 1_000_003) * 65_536                               # (B, 1)
    number = first + torch.arange(count, device=rows.device)                                   # (B, count)
    for _ in range(3):                                                                         # scrambled
        number = (number >> 16 ^ number) * 0x45D9F3B % 2**32
    return (number >> 16) % 2 == 1
