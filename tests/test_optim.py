"""The optimizers, the schedule and the step."""

import math
from types import SimpleNamespace

import pytest
import torch

from model.config import named_size
from model.transformer import CausalLM
from trainer.optim import Muon, build_optimizers, lr_at, optimizer_step, orthogonalize

CFG = SimpleNamespace(optimizer="muon", lr=1e-2, weight_decay=0.1, warmup_steps=10, schedule="wsd")


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_muon_is_torchs_muon(shape, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)       # the oracle's products in float32, like ours
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    muon = Muon([ours], lr=0.01, weight_decay=0.1)
    oracle = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        oracle.step()
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions():
    u = torch.randn(3, 20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(u)
    assert ((torch.linalg.svdvals(out) > 0.6) & (torch.linalg.svdvals(out) < 1.3)).all()
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    assert (torch.diagonal(left.mT @ out @ right.mT, dim1=-2, dim2=-1) > 0.6).all()


def test_muon_treats_stacked_experts_one_by_one():
    grads = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0))
    together = torch.nn.Parameter(torch.zeros(4, 24, 16))
    together.grad = grads.clone()
    Muon([together], lr=0.1).step()
    for expert in range(4):
        alone = torch.nn.Parameter(torch.zeros(24, 16))
        alone.grad = grads[expert].clone()
        Muon([alone], lr=0.1).step()
        assert torch.allclose(together[expert], alone, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("size", ["2x32", "moe"])
def test_every_parameter_has_one_owner_and_only_matrices_decay(optimizer, size):
    config = named_size(size, 300)
    with torch.device("meta"):
        model = CausalLM(config)
    cfg = SimpleNamespace(**{**vars(CFG), "optimizer": optimizer})
    groups = [group for o in build_optimizers(model, cfg) for group in o.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() >= 2)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_learning_rate_goes_from_zero_up_to_lr_and_down_to_a_tenth(schedule):
    cfg = SimpleNamespace(lr=0.5, warmup_steps=10, schedule=schedule)
    rates = [lr_at(step, 100, cfg) for step in range(101)]
    assert rates[0] == 0 and rates[10] == 0.5 and rates[100] == pytest.approx(0.05)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a >= b for a, b in zip(rates[10:-1], rates[11:], strict=True))


def test_schedule_of_very_short_runs_is_defined():
    for total in (1, 2, 3):
        assert all(0 <= lr_at(step, total, CFG) <= CFG.lr for step in range(1, total + 1))


def test_optimizer_step_clips_updates_and_clears():
    model = CausalLM(named_size("1x32", 64))
    cfg = SimpleNamespace(**{**vars(CFG), "optimizer": "adamw"})
    optimizers = build_optimizers(model, cfg)
    before = [p.detach().clone() for p in model.parameters()]
    (1000 * model(torch.arange(8)[None]).logits.square().sum()).backward()
    norm = optimizer_step(model, optimizers, 1e-3, 1.0)
    assert norm > 1 and math.isfinite(norm)
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(group["lr"] == 1e-3 for o in optimizers for group in o.param_groups)
