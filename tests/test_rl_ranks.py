"""GRPO, SPO and PPO on several ranks: they sample, judge, credit and learn what one rank does."""

import json
from pathlib import Path

import pytest
import torch

from dataset import jsonl
from model.checkpoint import load_model, save_model
from model.tokenizer import Tokenizer
from tests.ranks_worker import run_job
from tests.test_ranks import far, together
from tests.test_rl import OWN, TINY, kept, metrics, numbers, same, undecided, write_chats, write_prompts

# 4 prompts a step, 2 for each rank, and their 8 completions three at a time: 3 micro-batches on one rank, 2 on each of
# two. Where completions are dealt to several optimizer steps a rank may get none. In float64 equal means equal.
FLAGS = dict(dtype="float64", micro_batch_size=3, max_steps=3, eval_every=2, log_every=2, sample_every=2, replay=0.3,
             replay_rows=3, beta=0.05, num_generations=2)
CASES = {
    "grpo": ("grpo", dict(minibatches=2, loss="grpo")),
    "grpo, resample": ("grpo", dict(resample=2, mask_truncated=True, replay=0.0, beta=0.0, scale="batch")),
    "grpo, lora": ("grpo", dict(lora_rank=2, inner_epochs=2)),
    "spo": ("spo", dict(inner_epochs=2, model="moe")),
    "ppo": ("ppo", dict(num_generations=1, minibatches=4, kl_target=0.5)),
}
SHARDED = ("grpo", "grpo, lora", "spo", "ppo")


def job(place, name, script, changes, die_at=None, run=None):
    if "model" in changes:
        changes = {**changes, "model": str(place / changes["model"])}
    if name.startswith("grpo, resample"):
        changes = {**changes, "val_data": str(place / "one.jsonl")}       # fewer held-out prompts than ranks
    flags = {**TINY, **OWN[script], **FLAGS, "model": str(place / "base"), "data": str(place / "prompts.jsonl"),
             "replay_data": str(place / "chats.jsonl"), "out": str(place / (run or name)), **changes}
    return {"name": name, "script": f"train_{script}", "flags": flags, "die_at": die_at}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(folder, {name: what each rank kept}): everything runs once, on two ranks started once, and here."""
    place = tmp_path_factory.mktemp("ranks")
    save_model(place / "base", undecided(), Tokenizer.load("nano"))
    save_model(place / "moe", undecided(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                        router="softmax", aux_loss_coef=0.01), Tokenizer.load("nano"))
    write_prompts(place / "prompts.jsonl", count=30)
    write_chats(place / "chats.jsonl")
    write_prompts(place / "one.jsonl", count=1, prefix="held out ")
    whole = dict(max_steps=6, save_every=2, critic_warmup=1, target_kl=0.0, kl_target=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", place / "cache")
        here = [*(job(place, f"{name}, alone", *case) for name, case in CASES.items()),
                job(place, "whole", "ppo", whole),
                job(place, "1 of 3", "ppo", whole, die_at=20, run="parts")]          # 2 models x 4 updates in a step
        found = {about["name"]: [run_job(place, **about)] for about in here}
        found |= together(place, [
            *(job(place, name, *case) for name, case in CASES.items()),
            *(job(place, f"{name}, sharded", CASES[name][0], {**CASES[name][1], "parallel": "fsdp"})
              for name in SHARDED),
            job(place, "2 of 3", "ppo", {**whole, "parallel": "fsdp"}, die_at=20, run="parts")])
        found["3 of 3"] = [run_job(place, **job(place, "3 of 3", "ppo", whole, run="parts"))]
    return place, found


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, sharded" for name in SHARDED)])
def test_two_ranks_equal_one(name, results):
    place, found = results
    (one,), two = found[f"{name.removesuffix(', sharded')}, alone"], found[name]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert len(one["gradients"]) == len(two[0]["gradients"]) and any(g.any() for g in one["gradients"])
    for a, b in zip(one["gradients"], two[0]["gradients"], strict=True):
        assert torch.equal(a, b) or far(b, a) <= 1e-6
    assert torch.allclose(one["weights"], two[0]["weights"], rtol=0, atol=1e-7)
    alone, shared = (list(map(numbers, metrics(place / out)))
                     for out in (f"{name.removesuffix(', sharded')}, alone", name))
    assert len(alone) == 5                                      # 2 progress lines, 3 evaluations
    for a, b in zip(alone, shared, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["spo", "ppo", "spo, sharded", "ppo, sharded"])
def test_what_a_method_keeps_is_the_same(name, results):
    place, _ = results
    one, two = kept(place / f"{name.removesuffix(', sharded')}, alone"), kept(place / name)
    assert one.keys() == two.keys()
    for part in one:
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.allclose(value.double(), two[part][key].double(), rtol=0, atol=1e-6), key


def test_a_run_continues_on_other_ranks(results):
    """PPO on one rank, killed in step 3; sharded on two, killed in step 5; on one again: critic and beta go along."""
    place, found = results
    whole, parts = kept(place / "whole"), kept(place / "parts")
    assert torch.allclose(found["whole"][0]["weights"], found["3 of 3"][0]["weights"], rtol=0, atol=1e-7)
    assert all(torch.allclose(whole["critic"][key], parts["critic"][key], rtol=0, atol=1e-6) for key in whole["critic"])
    assert float(whole["beta"]["beta"]) == pytest.approx(float(parts["beta"]["beta"]))
    assert not same(load_model(place / "base")[0].state_dict(), load_model(place / "parts")[0].state_dict())
    losses = [[entry.get("loss", entry.get("val_loss")) for entry in map(json.loads, Path(
        place, out, "metrics.jsonl").read_text(encoding="utf-8").splitlines())] for out in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
