"""Credit: advantages of groups, GAE, whitening, KL coefficients and SPO's tracker."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from trainer.credit import (
    adapted_kl_coef,
    degenerate,
    explained_variance,
    gae,
    group_advantages,
    mean_and_std,
    moments,
    overlong_penalty,
    rloo_advantages,
    token_rewards,
    values_before,
    whiten,
)
from trainer.spo_tracker import PromptTracker, divergence

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "rl.json").read_text(encoding="utf-8"))
DATA = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDENS["inputs"].items()}
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 3.0, 2.0, 2.0, 5.0], dtype=torch.float64)


def rows(*shape, low=-1.0, high=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def mask_of(*lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


# --- groups


def test_group_advantages_worked_example():
    first, second = REWARDS[:4], REWARDS[4:]
    centred = torch.cat([first - first.mean(), second - second.mean()])
    assert torch.allclose(group_advantages(REWARDS, GROUPS, "none"), centred)
    stds = torch.tensor([np.std(part.numpy(), ddof=1) for part in (first, second)]).repeat_interleave(4)
    assert torch.allclose(group_advantages(REWARDS, GROUPS), centred / (stds + 1e-4))
    spread = np.std(REWARDS.numpy(), ddof=1)
    assert torch.allclose(group_advantages(REWARDS, GROUPS, "batch"), centred / (spread + 1e-4))
    with pytest.raises(ValueError, match="group, none or batch"):
        group_advantages(REWARDS, GROUPS, "all")


def test_batch_scale_over_ranks_is_that_of_the_whole_batch():
    whole = group_advantages(REWARDS, GROUPS, "batch")
    _, std = mean_and_std(moments(REWARDS[:4]) + moments(REWARDS[4:]))
    parts = [group_advantages(REWARDS[part], GROUPS[part], "batch", std) for part in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(torch.cat(parts), whole)


def test_rloo_compares_with_the_others():
    got = rloo_advantages(REWARDS, GROUPS)
    for i in range(8):
        others = [float(REWARDS[j]) for j in range(8) if GROUPS[j] == GROUPS[i] and j != i]
        assert got[i].item() == pytest.approx(float(REWARDS[i]) - sum(others) / 3)


def test_another_scale_of_rewards():
    """R → aR + b: GRPO does not notice (but for the 1e-4), Dr. GRPO and RLOO scale by a."""
    other = 7 * REWARDS + 3
    assert torch.allclose(group_advantages(other, GROUPS), group_advantages(REWARDS, GROUPS), rtol=1e-3)
    assert torch.allclose(group_advantages(other, GROUPS, "none"), 7 * group_advantages(REWARDS, GROUPS, "none"))
    assert torch.allclose(rloo_advantages(other, GROUPS), 7 * rloo_advantages(REWARDS, GROUPS))


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_permuting_prompts_permutes_advantages_and_groups_do_not_mix(scale):
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    got = group_advantages(REWARDS, GROUPS, scale)
    assert torch.allclose(group_advantages(REWARDS[order], 1 - GROUPS, scale), got[order])
    if scale != "batch":
        changed = REWARDS.clone()
        changed[5] = 100.0
        assert torch.equal(group_advantages(changed, GROUPS, scale)[:4], got[:4])


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.7])
def test_equal_rewards_are_exactly_nothing(scale, reward):
    rewards = torch.tensor([reward] * 7 + [1.0, 0.0, 0.5, 0.0, 0.0, 0.5, 1.0])
    groups = torch.tensor([0] * 7 + [1] * 7)
    assert (group_advantages(rewards, groups, scale)[:7] == 0).all()
    assert (rloo_advantages(rewards, groups)[:7] == 0).all()
    assert degenerate(rewards, groups).tolist() == [True, False]


@pytest.mark.parametrize("groups", [[0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 2, 3]])
def test_groups_that_are_none(groups):
    for function in group_advantages, rloo_advantages, degenerate:
        with pytest.raises(AssertionError):
            function(torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor(groups))


def test_overlong_penalty_equals_trl():
    case = GOLDENS["overlong"]
    got = overlong_penalty(torch.tensor(case["lengths"]), case["longest"], case["cache"])
    assert got.tolist() == pytest.approx(case["penalty"])
    each = overlong_penalty(torch.tensor([9, 9]), torch.tensor([10, 20]), 4)             # every prompt its own limit
    assert each.tolist() == [-0.75, 0.0]


# --- tokens


def test_rewards_and_gae_equal_torchtune():
    """torchtune whitens the advantages and adds their mean again."""
    case, mask = GOLDENS["gae"], DATA["mask"].long()[:-1]
    data = {name: value[:-1] for name, value in DATA.items()}
    rewards = token_rewards(data["scores"], data["old_logprobs"], data["ref_logprobs"], mask, case["kl_coef"],
                            torch.ones(5).bool())
    assert torch.allclose(rewards, torch.tensor(case["rewards"], dtype=torch.float64))
    advantages, returns = gae(rewards, data["values"], mask, case["gamma"], case["lam"])
    assert torch.allclose(returns, torch.tensor(case["returns"], dtype=torch.float64))
    mean, _ = mean_and_std(moments(advantages, mask))
    theirs = torch.tensor(case["advantages_plus_mean"], dtype=torch.float64)
    assert torch.allclose((whiten(advantages, mask) + mean) * mask, theirs, atol=1e-6)


def test_token_rewards_sum_to_the_reward_minus_the_kl():
    old, ref, rewards = rows(4, 6, low=-3, high=0), rows(4, 6, low=-3, high=0, seed=1), rows(4, seed=2)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    finished = torch.tensor([True, False, True, True])
    got = token_rewards(rewards, old, ref, mask, 0.1, finished, missing_eos_penalty=1.0)
    assert (got[mask == 0] == 0).all()
    wanted = rewards - torch.tensor([0.0, 1.0, 0.0, 0.0]) - 0.1 * ((old - ref) * mask).sum(1)
    assert torch.allclose(got.sum(1)[:3], wanted[:3]) and got[3].sum() == 0
    free = token_rewards(rewards, old, None, mask, 0.0, finished)
    assert [row.nonzero().flatten().tolist() for row in free] == [[2], [5], [4], []]     # at the last token, and there
    assert torch.allclose(free.sum(1)[:3], rewards[:3])
    assert (token_rewards(rewards, old - 1, ref, mask, 0.1, finished)[mask == 1] >
            token_rewards(rewards, old, ref, mask, 0.1, finished)[mask == 1]).all()      # likelier than ref costs


def by_definition(rewards, values, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k} of one completion."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


def test_gae_by_its_definition_over_the_sampled_tokens():
    """Tokens of a tool between two turns, prompt and padding are passed over, whatever stands there."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0] * 6])
    values, rewards = rows(5, 6), rows(5, 6, seed=1)
    advantages, returns = gae(rewards * mask, values, mask, 0.9, 0.8)
    for row in range(5):
        at = mask[row].nonzero().flatten()
        wanted = by_definition(rewards[row, at].tolist(), values[row, at].tolist(), 0.9, 0.8)
        assert advantages[row, at].tolist() == pytest.approx(wanted)
        assert returns[row, at].tolist() == pytest.approx((advantages + values)[row, at].tolist())
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_limits_of_gae():
    mask, values = mask_of(5, 3, 1), rows(3, 5)
    rewards = rows(3, 5, seed=1) * mask
    to_come = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(advantages, (to_come - values) * mask) and torch.allclose(returns, to_come * mask)
    after = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    assert torch.allclose(gae(rewards, values, mask, 0.9, 0.0)[0], (rewards + 0.9 * after - values) * mask)
    # no critic and no KL: every token gets the reward of the whole
    final = token_rewards(rows(3, seed=2), values, values, mask, 0.0, torch.ones(3).bool())
    flat, _ = gae(final, torch.zeros(3, 5, dtype=torch.float64), mask, 1.0, 0.95 / 0.95)
    assert torch.allclose(flat, rows(3, seed=2)[:, None] * mask)


def test_padding_changes_neither_advantages_nor_statistics():
    mask, values, rewards = mask_of(4, 2), rows(2, 4), rows(2, 4, seed=1)
    wide = [torch.cat([x, torch.full((2, 3), 9.0 if x is values else 0.0).to(x)], 1) for x in
            (rewards * mask, values, mask)]
    for narrow, padded in zip(gae(rewards * mask, values, mask), gae(*wide), strict=True):
        assert torch.equal(padded[:, :4], narrow) and (padded[:, 4:] == 0).all()
        assert torch.equal(whiten(padded, wide[2])[:, :4], whiten(narrow, mask))


def test_the_value_of_a_state_does_not_know_the_token():
    """A critic whose score at t is a function of tokens ≤ t gives values at t of tokens < t."""
    ids = torch.arange(12).view(2, 6)
    values = values_before(ids.cumsum(1))
    assert (values[:, 0] == 0).all() and torch.equal(values[:, 1:], ids.cumsum(1)[:, :-1])


# --- statistics


def test_whiten():
    assert torch.allclose(whiten(DATA["token_advantages"], DATA["mask"]),
                          torch.tensor(GOLDENS["whitened"], dtype=torch.float64))
    x, mask = rows(4, 6, low=2, high=9), mask_of(6, 1, 3, 2)
    white = whiten(x, mask)
    on = white[mask.bool()]
    assert on.mean().abs() < 1e-9 and on.std().item() == pytest.approx(1) and (white[mask == 0] == 0).all()
    parts = [whiten(x[part], mask[part], moments(x[:1], mask[:1]) + moments(x[1:], mask[1:]))
             for part in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(torch.cat(parts), white)                                       # two ranks agree
    assert torch.allclose(whiten(x[0]), (x[0] - x[0].mean()) / x[0].std())
    for nothing in torch.full((5,), 0.3), torch.ones(1), torch.zeros(0):
        assert (whiten(nothing).abs() < 1e-3).all()


def test_explained_variance():
    returns, mask = rows(4, 6), mask_of(6, 2, 3, 2)

    def of(values):
        return explained_variance(moments(returns, mask), moments(returns - values, mask))

    assert of(returns) == 1 and of(torch.full_like(returns, 0.7)) == pytest.approx(0) and of(-returns) < 0
    assert explained_variance(moments(torch.ones(3)), moments(torch.zeros(3))) == 0


def test_adapted_kl_coef():
    assert adapted_kl_coef(0.05, 6.0, 6.0) == 0.05
    assert adapted_kl_coef(0.05, 6.6, 6.0) == pytest.approx(0.05 * 1.01)
    assert adapted_kl_coef(0.05, 100.0, 6.0) == pytest.approx(0.05 * 1.02)               # no more than ±20 % counts
    assert adapted_kl_coef(0.05, 0.0, 6.0) == pytest.approx(0.05 * 0.98)


# --- SPO


class NumpySPO:
    """The formulas of the paper and of its authors' program, once more, one prompt after the other."""

    def __init__(self, scores, rho_min=0.875, rho_max=0.96, half_life=0.06):
        self.rho_min, self.rho_max, self.half_life = rho_min, rho_max, half_life
        n0 = 1 / (1 - rho_min)
        self.alpha = np.array([n0 * (np.sum(r) + 0.5) / (len(r) + 1) for r in scores])
        self.beta = np.array([n0 * (len(r) - np.sum(r) + 0.5) / (len(r) + 1) for r in scores])
        self.kept = {}

    def v(self, x):
        return self.alpha[x] / (self.alpha[x] + self.beta[x])

    def probabilities(self):
        weights = np.array([math.sqrt(self.v(x) * (1 - self.v(x))) + 0.05 for x in range(len(self.alpha))])
        return weights / weights.sum()

    def step(self, prompts, rewards, now, sampled):
        """now: of the prompts with a kept completion, its log-probabilities now. Returns the advantages."""
        raw = np.array([r - self.v(x) for x, r in zip(prompts, rewards, strict=True)])
        advantages = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-8)
        for x, r, new in zip(prompts, rewards, sampled, strict=True):
            d = np.mean(np.abs(now[x] - self.kept[x])) if x in self.kept else 0.0
            rho = min(max(2 ** (-d / self.half_life), self.rho_min), self.rho_max)
            n = rho * (self.alpha[x] + self.beta[x]) + 1                        # v ← v + (r - v) / (ρN + 1)
            v = self.v(x) + (r - self.v(x)) / n
            self.alpha[x], self.beta[x] = v * n, (1 - v) * n
            self.kept[x] = new
        return advantages


def spo_step(tracker, prompts, rewards, now, sampled):
    """As NumpySPO.step, by the tracker; the rows have a prompt of two tokens."""
    advantages = whiten(rewards - tracker.values(prompts).double())
    rows, _, _, mask, then = tracker.recall(prompts)
    moved = torch.zeros(len(prompts))
    if len(rows):
        logprobs = torch.zeros_like(then)
        logprobs[mask] = torch.tensor(np.concatenate([now[int(prompts[row])] for row in rows])).float()
        moved[rows] = divergence(logprobs, then, mask)
    tracker.update(prompts, rewards, moved)
    real = mask_of(*(len(x) + 2 for x in sampled)).bool()
    mask, logprobs = real & (torch.arange(real.shape[1]) >= 2), torch.zeros(real.shape)
    logprobs[mask] = torch.tensor(np.concatenate(sampled)).float()
    tracker.remember(prompts, torch.full(real.shape, 5), real, mask, logprobs)
    return advantages


def test_spo_equals_a_port_of_its_formulas():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, (7, 4))
    ours, port = PromptTracker(7), NumpySPO(scores)
    ours.initialise(torch.tensor(scores))
    clipped = set()
    for _ in range(30):
        prompts = rng.permutation(7)[:4]
        rewards = rng.choice([0.0, 0.25, 1.0], 4)
        sampled = [rng.uniform(-3, 0, rng.integers(1, 6)) for _ in prompts]
        now = {x: port.kept[x] + rng.uniform(-0.02, 0.02, len(port.kept[x])) for x in prompts if x in port.kept}
        for x in now:
            rho = 2 ** (-np.abs(now[x] - port.kept[x]).mean() / 0.06)
            clipped.add(int(rho > 0.96) - int(rho < 0.875))
        got = spo_step(ours, torch.tensor(prompts), torch.tensor(rewards), now, sampled)
        assert got.tolist() == pytest.approx(port.step(prompts, rewards, now, sampled), abs=1e-5)
        assert ours.alpha.tolist() == pytest.approx(port.alpha, rel=1e-4)
        assert ours.beta.tolist() == pytest.approx(port.beta, rel=1e-4)
        assert (ours.weights() / ours.weights().sum()).tolist() == pytest.approx(port.probabilities(), abs=1e-6)
    assert clipped == {-1, 0, 1}                              # what is clipped below, above and not was all seen


@pytest.mark.parametrize("moved, memory", [(0.0, 25.0), (1.0, 8.0)])
def test_spo_converges_to_the_rate_of_success(moved, memory):
    """Of a prompt solved with probability 0.3 v → 0.3 on average, and 1 / (1 - ρ) samples count."""
    tracker, rng, seen = PromptTracker(2), np.random.default_rng(0), []
    one, moved = torch.tensor([1]), torch.tensor([moved])
    for step in range(3000):
        tracker.update(one, torch.tensor([float(rng.random() < 0.3)]), moved)
        if step > 200:
            seen.append(float(tracker.values(one)))
    assert np.mean(seen) == pytest.approx(0.3, abs=0.03)
    assert float(tracker.alpha[1] + tracker.beta[1]) == pytest.approx(memory, rel=1e-3)
    assert float(tracker.alpha[0]) == float(tracker.beta[0]) == 4    # the other prompt is untouched


def test_spo_forgets_by_its_own_divergence():
    tracker = PromptTracker(4)
    tracker.update(torch.tensor([0, 1, 2, 3]), torch.ones(4), torch.tensor([0.0, 0.06, 0.005, 0.01]))
    kept = (tracker.beta / 4).tolist()                                                   # β ← ρ β where r = 1
    assert kept == pytest.approx([0.96, 0.875, 2 ** (-1 / 12), 2 ** (-1 / 6)])
    assert 2 ** (-0.06 / 0.06) == 0.5                                                    # raw, before the clip


def test_spo_counts_a_prompt_twice_one_after_the_other():
    together, apart = PromptTracker(3), PromptTracker(3)
    together.update(torch.tensor([1, 1]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.01]))
    apart.update(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([0.0]))
    apart.update(torch.tensor([1]), torch.tensor([0.0]), torch.tensor([0.01]))
    assert torch.equal(together.alpha, apart.alpha) and torch.equal(together.beta, apart.beta)


def test_spo_takes_rewards_between_0_and_1_only():
    tracker = PromptTracker(2)
    for reward in 1.1, -0.1, float("nan"):
        with pytest.raises(UserError, match=r"outside \[0, 1\]"):
            tracker.update(torch.tensor([0]), torch.tensor([reward]), torch.zeros(1))
        with pytest.raises(UserError, match=r"outside \[0, 1\]"):
            tracker.initialise(torch.tensor([[0.0, 1.0], [0.5, reward]]))
    for extreme in 0.0, 1.0:
        for _ in range(500):
            tracker.update(torch.tensor([0]), torch.tensor([extreme]), torch.ones(1))
        assert tracker.alpha[0] > 0 and tracker.beta[0] > 0 and 0 <= tracker.values(torch.tensor([0])) <= 1


def test_spo_baseline_is_that_of_before():
    """What is asked before an update does not know its rewards; and A has mean 0 and std 1 over the step."""
    prompts, rewards = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    trackers = PromptTracker(4), PromptTracker(4)
    values = [tracker.values(prompts) for tracker in trackers]
    trackers[0].update(prompts, rewards, torch.zeros(4))
    trackers[1].update(prompts, 1 - rewards, torch.zeros(4))
    assert torch.equal(*values) and not torch.equal(*(tracker.values(prompts) for tracker in trackers))
    advantages = whiten(rewards - values[0])
    assert advantages.mean().abs() < 1e-6 and advantages.std().item() == pytest.approx(1)


def test_spo_draws_the_undecided_most_and_the_others_still():
    tracker = PromptTracker(3)
    tracker.alpha, tracker.beta = (torch.tensor(x, dtype=torch.float64) for x in ([10.0, 5.0, 1e-9], [1e-9, 5.0, 10.0]))
    assert tracker.weights().tolist() == pytest.approx([0.05, 0.55, 0.05], abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([tracker.draw(1, generator) for _ in range(2000)])
    assert (drawn.bincount(minlength=3) / 2000).tolist() == pytest.approx([1 / 13, 11 / 13, 1 / 13], abs=0.02)
    assert sorted(tracker.draw(3, generator).tolist()) == [0, 1, 2]                      # without replacement
    with pytest.raises(UserError, match="only 3"):
        tracker.draw(4, generator)


def test_spo_remembers_the_last_completion_of_each_prompt_alone():
    tracker = PromptTracker(5)
    rows_, ids, real, sampled, logprobs = tracker.recall(torch.tensor([0, 1]))
    assert len(rows_) == 0 and divergence(logprobs, logprobs, sampled).shape == (0,)
    real = mask_of(4, 2).bool()
    sampled = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    for shift in 0.0, 0.5:                                                               # the second one replaces
        tracker.remember(torch.tensor([3, 1]), ids, real, sampled, (rows(2, 4).float() + shift) * sampled)
    asked = torch.tensor([0, 1, 3, 4])
    places, got_ids, got_real, got_sampled, then = tracker.recall(asked, pad_id=9)
    assert places.tolist() == [1, 2] and got_ids.tolist() == [[5, 6, 9, 9], [1, 2, 3, 4]]
    assert torch.equal(got_real, real[[1, 0]]) and torch.equal(got_sampled, sampled[[1, 0]])
    assert torch.allclose(then, ((rows(2, 4).float() + 0.5) * sampled)[[1, 0]])


def test_spo_divergence_is_a_mean_over_sampled_tokens():
    now = torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    then, mask = torch.zeros(3, 3), torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert divergence(now, then, mask).tolist() == divergence(then, now, mask).tolist() == [1.5, 1.0, 0.0]


def test_spo_continues_from_its_saved_table(tmp_path):
    tracker = PromptTracker(4)
    empty = tracker.state_dict()
    tracker.initialise(torch.tensor([[1.0, 0.0]] * 4))
    sampled = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    tracker.remember(torch.tensor([2, 0]), torch.tensor([[1, 2, 3], [4, 5, 0]]), mask_of(3, 2).bool(), sampled,
                     rows(2, 3).float())
    tracker.update(torch.tensor([2, 0]), torch.tensor([1.0, 0.5]), torch.zeros(2))
    torch.save(tracker.state_dict(), tmp_path / "spo.pt")
    again = PromptTracker(4)
    again.load_state_dict(torch.load(tmp_path / "spo.pt", weights_only=True))
    asked = torch.arange(4)
    assert torch.equal(again.values(asked), tracker.values(asked)) and torch.equal(again.beta, tracker.beta)
    for ours, theirs in zip(again.recall(asked), tracker.recall(asked), strict=True):
        assert torch.equal(ours, theirs) and len(ours) == 2
    again.load_state_dict(empty)
    assert not again.last and torch.equal(again.alpha, PromptTracker(4).alpha)
    again.update(torch.tensor([0]), torch.ones(1), torch.zeros(1))
    assert torch.equal(empty["alpha"], PromptTracker(4).alpha)                            # what was saved stays
    with pytest.raises(UserError, match="the data has 3"):
        PromptTracker(3).load_state_dict(tracker.state_dict())
