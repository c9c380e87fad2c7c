"""The optimizers, the schedule and the step."""

import math
from types import SimpleNamespace

import pytest
import torch

from model.config import named_size
from model.errors import UserError
from model.transformer import CausalLM
from trainer.config import TrainConfig
from trainer.optim import Muon, build_optimizers, cut, keep_in_main_memory, lr_at, optimizer_step, orthogonalize
from trainer.preflight import check_flags

CFG = SimpleNamespace(optimizer="muon", lr=1e-2, weight_decay=0.1, warmup_steps=10, schedule="wsd",
                      optimizer_state="device")


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


# ----------------------------------------------------------------------------------- moments in main memory


def test_parameter_groups_are_cut_into_pieces_in_order():
    params = [torch.zeros(n) for n in (3, 3, 3, 20, 1)]
    pieces = list(cut([dict(params=params, weight_decay=0.1), dict(params=params[:1], weight_decay=0.0)], 6))
    assert [[len(p) for p in piece["params"]] for piece in pieces] == [[3, 3], [3], [20], [1], [3]]
    assert [piece["weight_decay"] for piece in pieces] == [0.1] * 4 + [0.0]


def test_moments_that_travel_give_the_same_bits_also_when_a_run_continues(monkeypatch):
    """There is no other device here: `to` is made to copy, as between devices, so what is not brought back is lost."""
    def start():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8))]
        return params, torch.optim.AdamW(params, lr=1e-2, fused=True)

    def step(params, optimizer, number):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        with monkeypatch.context() as travel:
            travel.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self.clone())
            optimizer.step()

    plain, optimizer = start()
    for number in range(6):
        step(plain, optimizer, number)

    travelling, first = start()
    keep_in_main_memory(first)
    for number in range(3):
        step(travelling, first, number)
    homes = {name: moment.data_ptr() for name, moment in first.state[travelling[0]].items()}
    _, second = start()
    keep_in_main_memory(second)
    second.load_state_dict(first.state_dict())
    places = [{moment.data_ptr() for moments in optimizer.state.values() for moment in moments.values()}
              for optimizer in (first, second)]
    assert not places[0] & places[1]                                     # what is loaded moves to main memory at once
    second.param_groups[0]["params"] = travelling
    second.state = {p: moments for p, moments in zip(travelling, second.state.values(), strict=True)}
    for number in range(3, 6):
        step(travelling, second, number)
    assert all(torch.equal(a, b) for a, b in zip(plain, travelling, strict=True))
    assert not first.in_main_memory and not second.in_main_memory
    step(travelling, first, 6)
    assert homes == {name: moment.data_ptr() for name, moment in first.state[travelling[0]].items()}    # one place


def test_without_a_gpu_and_with_sharded_moments_there_is_nothing_to_move():
    model = CausalLM(named_size("1x32", 64))
    optimizers = build_optimizers(model, SimpleNamespace(**{**vars(CFG), "optimizer_state": "cpu"}))
    assert len(optimizers) == 2 and not any(hasattr(optimizer, "in_main_memory") for optimizer in optimizers)
    with pytest.raises(UserError, match="--optimizer_state cpu: --parallel fsdp"):
        check_flags(TrainConfig(optimizer_state="cpu", parallel="fsdp"), world_size=2)
    check_flags(TrainConfig(optimizer_state="cpu", parallel="fsdp"), world_size=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves between a GPU and main memory: needs a GPU")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_moments_of_a_gpu_lie_in_pinned_main_memory(optimizer):
    models = []
    for place in ("device", "cpu"):
        torch.manual_seed(0)
        model = CausalLM(named_size("2x32", 64)).cuda()
        optimizers = build_optimizers(model, SimpleNamespace(**{**vars(CFG), "optimizer": optimizer,
                                                                "optimizer_state": place}))
        for _ in range(3):
            model(torch.arange(8, device="cuda")[None]).logits.square().sum().backward()
            optimizer_step(model, optimizers, 1e-2, 1.0)
        moments = [value for o in optimizers for values in o.state.values() for value in values.values()]
        assert all(moment.is_cuda if place == "device" else moment.is_pinned() for moment in moments)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
