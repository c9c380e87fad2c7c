"""Which rows come when: for any number of ranks and micro-batches the same, and none lost or repeated."""

from types import SimpleNamespace

import numpy as np
import pytest

from trainer.batches import batches, row_stream, rows_of_step, share_of_rank


class Rows:
    """A dataset whose row i holds the number i, with i % 3 + 1 targets."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    @staticmethod
    def count(batch):
        return int(batch["loss_mask"].sum())

    def __getitem__(self, i):
        mask = np.zeros(4, np.uint8)
        mask[1:2 + i % 3] = 1
        return {"input_ids": np.full(4, i), "loss_mask": mask, "segment_ids": np.ones(4), "positions": np.arange(4)}


class FakeRun:
    rank, world_size = 0, 1

    def __init__(self, steps, places):
        self.total_steps, self.last_place = steps, places

    def stop_requested(self):
        return False

    def sum_over_ranks(self, number):
        return number

    def to_device(self, batch):
        return batch

    def end_of_step(self, step):
        pass


def cfg(**changes):
    return SimpleNamespace(**{**dict(seed=3, batch_size=8, micro_batch_size=0, overfit_batch=False), **changes})


def test_an_epoch_is_a_permutation_and_epochs_differ():
    order = [row for step in range(1, 11) for row in rows_of_step(row_stream(Rows(40), 3), cfg().batch_size, step, 80)]
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40)) and order[:40] != order[40:]


def test_the_last_step_stops_where_the_data_does():
    assert [len(rows_of_step(row_stream(Rows(20), 3), cfg().batch_size, step, 20)) for step in (1, 2, 3)] == [8, 8, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [0, 1, 3])
@pytest.mark.parametrize("n", [8, 7, 1])
def test_ranks_share_a_step_without_loss_or_repeat(world_size, micro, n):
    rows = list(range(10, 10 + n))
    shares = [share_of_rank(Rows(30), rows, rank, world_size, micro) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1                      # all ranks meet in the same backward passes
    seen = [int(row[0]) for share in shares for batch in share
            for row, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True) if mask.any()]
    assert sorted(seen) == rows
    assert all(len(batch["input_ids"]) <= (micro or n) for share in shares for batch in share)


def test_targets_are_counted_over_the_whole_step_and_start_skips():
    data, config = Rows(24), cfg(micro_batch_size=3)
    whole = list(batches(data, config, FakeRun(3, 24), 0))
    assert [step for step, *_ in whole] == [1, 2, 3]
    assert sum(targets for *_, targets in whole) == sum(i % 3 + 1 for i in range(24))
    late = list(batches(data, config, FakeRun(3, 24), 2))
    assert [step for step, *_ in late] == [3] and (late[0][1][0]["input_ids"] == whole[2][1][0]["input_ids"]).all()


def test_overfit_batch_repeats_the_first_step():
    steps = list(batches(Rows(24), cfg(overfit_batch=True), FakeRun(3, 24), 0))
    assert all((step[1][0]["input_ids"] == steps[0][1][0]["input_ids"]).all() for step in steps)
