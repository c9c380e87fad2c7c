"""The gate before reinforcement learning: pass@k without bias, useless prompts, the floor, ranks."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from dataset.lm_dataset import PromptDataset
from eval.passes import informative_at_k, pass_at_k
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer import gate as gates
from trainer import rewards, rollout

NANO = Tokenizer.load("nano")


@pytest.mark.parametrize("n, k", [(6, 1), (6, 3), (6, 6), (5, 2)])
def test_pass_at_k_is_the_mean_over_all_sets_of_k_answers(n, k):
    for c in range(n + 1):
        sets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets))
        mixed = sum(0 < sum(answers) < k for answers in sets) / len(sets)
        assert informative_at_k(n, c, k) == pytest.approx(mixed)


def test_pass_at_k_is_unbiased():
    """The mean over c ~ Binomial(n, p) is 1 - (1 - p)^k exactly; the plug-in 1 - (1 - c/n)^k falls short of it."""
    from math import comb
    n, k, p = 8, 4, 0.15
    weights = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < 1 - (1 - p) ** k - 0.01
    useful = sum(w * informative_at_k(n, c, k) for c, w in enumerate(weights))
    assert useful == pytest.approx(1 - p**k - (1 - p) ** k)


def test_more_answers_than_were_sampled_cannot_be_spoken_of():
    with pytest.raises(UserError, match="sample at least 8"):
        pass_at_k(4, 1, 8)


COUNTS = [("add", 0), ("add", 4), ("copy", 2), ("copy", 4)]


def test_the_report_counts_what_is_useless_skill_by_skill():
    report = gates.report_of(COUNTS, 4, 2)
    assert (report["prompts"], report["pass_1"], report["all_wrong"], report["all_right"]) == (4, 10 / 16, 0.25, 0.5)
    assert report["pass_k"] == pytest.approx((0 + 1 + 5 / 6 + 1) / 4)
    assert report["useful"] == pytest.approx((4 / 6) / 4)
    assert report["skills"]["add"] == {"prompts": 2, "pass_1": 0.5, "pass_k": 0.5, "all_wrong": 0.5, "all_right": 0.5,
                                       "useful": 0.0}
    assert gates.report_of([("add", 3), ("add", 1)], 4, 2)["all_right"] == 0
    low, high = report["pass_1_interval"]
    assert low < 10 / 16 < high
    lines = list(gates.table(report))
    assert [line.split()[0] for line in lines[2:]] == ["add", "copy", "all"] and "pass@2" in lines[1]
    assert "62.5%" in lines[-1] and "25.0%" in lines[-1]


def test_below_the_floor_it_says_what_to_do():
    report = gates.report_of([("add", 0)] * 7 + [("copy", 1)], 8, 8)
    gates.check(report, 1 / 64)                                   # exactly at the floor
    gates.check(report, 0)
    with pytest.raises(UserError) as error:
        gates.check(report, 0.05)
    for word in ("1.6%", "--min_pass 0.05", "easier prompts (of copy)", "fine-tune", "--num_generations",
                 "generate_data.py --samples", "--min_pass 0 "):
        assert word in str(error.value), word
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:                       # nothing right anywhere: no answers to learn from
        gates.check(gates.report_of([("add", 0)], 8, 8), 0.05)
    assert "generate_data" not in str(error.value) and "(of " not in str(error.value)


# --- with a policy


def fake_run(rank=0, world_size=1, others=()):
    """A Run as the gate sees it; `others`: what the other ranks gather."""
    lines = []
    return SimpleNamespace(rank=rank, world_size=world_size, cfg=SimpleNamespace(seed=3), print=lines.append,
                           lines=lines, autocast=lambda: torch.autocast("cpu", enabled=False),
                           gather=lambda value: [value, *others], on_main=lambda function: function())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "word {i}", "answer": "{i}", "checker": "exact", "skill": "{i % 2}"}}\n'
                            for i in range(12)), encoding="utf-8")
    return PromptDataset(path, NANO, 32)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return CausalLM(ModelConfig(NANO.vocab_size, 32, 64, 1, 1, 1, head_dim=32)).eval()



def try_gate(run, policy, data, monkeypatch, min_pass=0.0, **options):
    """The gate with a checker that half of all texts pass."""
    monkeypatch.setitem(rewards.RULES, "checker", lambda answer: float(len(answer.text) % 2))
    judge = rewards.build("checker", NANO, max_new_tokens=6)
    return gates.gate(run, policy, NANO, data, judge, 8, 6, 3, min_pass, max_new_tokens=6, temperature=1.0, **options)


def test_the_policy_is_tried_on_some_prompts(policy, prompts, monkeypatch):
    run = fake_run()
    report = try_gate(run, policy, prompts, monkeypatch)
    assert (report["prompts"], report["samples"], report["k"]) == (8, 6, 3)
    assert 0.2 < report["pass_1"] < 0.8 and set(report["skills"]) == {"0", "1"}
    assert len(run.lines) == 5
    assert report == try_gate(fake_run(), policy, prompts, monkeypatch, batch_size=5)      # reproducible
    sampled = []

    def another(*args):
        sampled.append(rollout.sample(*args))
        return sampled[0]

    assert report == try_gate(fake_run(), policy, prompts, monkeypatch, sample=another) and len(sampled[0]) == 48
    with pytest.raises(UserError, match="min_pass"):
        try_gate(fake_run(), policy, prompts, monkeypatch, min_pass=0.9)


def test_ranks_share_the_prompts_and_see_the_same(policy, prompts, monkeypatch):
    whole = try_gate(fake_run(), policy, prompts, monkeypatch)
    found = []

    def keep(value):
        found.append(value)
        return [value]

    for rank in range(2):
        run = fake_run(rank, 2)
        run.gather = keep
        try_gate(run, policy, prompts, monkeypatch)
    assert [len(part) for part in found] == [4, 4]
    in_order = [count for pair in zip(*found, strict=True) for count in pair]
    assert gates.report_of(in_order, 6, 3) == whole


def test_a_reward_without_right_and_wrong_has_no_gate(policy, prompts):
    run = fake_run()
    judge = rewards.build("repetition", NANO)
    assert gates.gate(run, policy, NANO, prompts, judge, 8, 6, 3, 0.5, max_new_tokens=6, temperature=1.0) == {}
    assert "none" in run.lines[0]
