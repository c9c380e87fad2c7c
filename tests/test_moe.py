"""Mixture of experts: against transformers, against a loop over tokens, and the properties that balancing needs."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dots1Config, Qwen3MoeConfig
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from model.checkpoint import load_causal_lm, save_model
from model.moe import MoE, expert_load, routers, update_router_bias
from model.transformer import CausalLM
from tests import moe_rank
from tests.moe_rank import SIGMOID, SOFTMAX

BOTH = pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])


def build(config, seed=0, std=0.3, **changes):
    """An MoE whose weights, and whose bias, are large enough to matter."""
    torch.manual_seed(seed)
    moe = MoE(dataclasses.replace(config, **changes))
    for weight in moe.parameters():
        nn.init.normal_(weight, std=std)
    for bias in moe.buffers():
        nn.init.normal_(bias, std=0.2)
    return moe


def inputs(B=3, T=10, seed=1):
    return torch.randn(B, T, SOFTMAX.hidden_size, generator=torch.Generator().manual_seed(seed))


def feed_forward(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def one_token_at_a_time(moe, config, x):
    """The docstring of model/moe.py as loops: x (B, T, D) -> y (B, T, D)."""
    rows = []
    for token in x.flatten(0, 1):
        logits = moe.gate.weight @ token
        scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
        preference = scores if config.router == "softmax" else scores + moe.gate.e_score_correction_bias
        chosen = preference.topk(config.num_experts_per_tok).indices
        total = scores[chosen].sum() if config.norm_topk_prob and len(chosen) > 1 else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            gate = scores[e] / total * config.routed_scaling_factor
            experts = moe.experts
            y = y + gate * feed_forward(token, experts.gate_proj[e], experts.up_proj[e], experts.down_proj[e])
        if config.num_shared_experts:
            shared = moe.shared_experts
            y = y + feed_forward(token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("norm", [True, False])
def test_equals_a_loop_over_tokens(config, k, norm):
    config = dataclasses.replace(config, num_experts_per_tok=k, norm_topk_prob=norm)
    moe = build(config)
    y, _ = moe(inputs())
    torch.testing.assert_close(y, one_token_at_a_time(moe, config, inputs()), atol=1e-5, rtol=1e-5)


def copy_experts(moe, hf):
    """Put our weights into transformers' block of the same shape."""
    hf.gate.weight.data.copy_(moe.gate.weight)
    hf.experts.gate_up_proj.data.copy_(torch.cat([moe.experts.gate_proj, moe.experts.up_proj], dim=1))
    hf.experts.down_proj.data.copy_(moe.experts.down_proj)


@pytest.mark.parametrize("norm", [True, False])
def test_equals_the_qwen3_moe_block(norm):
    moe = build(SOFTMAX, norm_topk_prob=norm)
    hf = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(hidden_size=32, num_experts=4, num_experts_per_tok=2,
                                               moe_intermediate_size=24, norm_topk_prob=norm))
    copy_experts(moe, hf)
    torch.testing.assert_close(moe(inputs())[0], hf(inputs()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_equals_the_dots1_block(norm):
    moe = build(SIGMOID, norm_topk_prob=norm, num_shared_experts=2)
    hf = Dots1MoE(Dots1Config(hidden_size=32, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2,
                              moe_intermediate_size=24, norm_topk_prob=norm, routed_scaling_factor=2.5))
    copy_experts(moe, hf)
    hf.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias)
    hf.shared_experts.load_state_dict(moe.shared_experts.state_dict())
    torch.testing.assert_close(moe(inputs())[0], hf(inputs()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_auxiliary_loss_of_a_row_is_that_of_transformers_over_k(k):
    moe, x = build(SOFTMAX, num_experts_per_tok=k), inputs(B=3)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, :4] = mask[2, 7:] = False
    aux = moe(x, mask)[1]
    for row in range(3):
        logits = F.linear(x[row], moe.gate.weight)
        expected = load_balancing_loss_func((logits,), 4, k, attention_mask=mask[row : row + 1].long())
        torch.testing.assert_close(aux[row], expected / k)


def test_identical_experts_are_one_dense_network():
    moe = build(SOFTMAX)
    for weight in moe.experts.parameters():
        weight.data.copy_(weight.data[:1].expand_as(weight))
    e = moe.experts
    dense = feed_forward(inputs(), e.gate_proj[0], e.up_proj[0], e.down_proj[0])
    torch.testing.assert_close(moe(inputs())[0], dense, atol=1e-5, rtol=1e-5)


def test_all_experts_chosen_is_the_softmax_weighted_sum():
    moe = build(SOFTMAX, num_experts_per_tok=4)
    x, e = inputs(), moe.experts
    probs = F.linear(x, moe.gate.weight).softmax(-1)
    outputs = torch.stack([feed_forward(x, e.gate_proj[i], e.up_proj[i], e.down_proj[i]) for i in range(4)], dim=-1)
    torch.testing.assert_close(moe(x)[0], (outputs * probs.unsqueeze(2)).sum(-1), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_the_task_loss_reaches_the_router(config, k, norm):
    """A gate renormalised with k = 1 is the constant 1: the router would learn nothing from the task."""
    moe = build(config, num_experts_per_tok=k, norm_topk_prob=norm)
    moe(inputs())[0].square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 1e-3


@BOTH
def test_training_and_evaluation_compute_the_same_bits(config):
    moe = build(config)
    train, evaluation = moe.train()(inputs()), moe.eval()(inputs())
    assert torch.equal(train[0], evaluation[0]) and torch.equal(train[1], evaluation[1])


@BOTH
def test_permuting_tokens_permutes_outputs(config):
    moe, x = build(config), inputs()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x[:, order])[0], moe(x)[0][:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moe(x[:, order])[1], moe(x)[1])


@BOTH
def test_padding_changes_nothing(config):
    moe, x = build(config).train(), inputs(B=2)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = mask[1, 6:] = False
    y, aux = moe(x, mask)
    load = moe.gate.load
    assert load.sum() == mask.sum() * 2
    moe.gate.load = torch.zeros_like(load)
    changed = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn_like(x))
    y_changed, aux_changed = moe(changed, mask)
    torch.testing.assert_close(y_changed[mask], y[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(aux_changed, aux) and torch.equal(moe.gate.load, load)
    for row in range(2):
        alone, aux_alone = moe(x[row, mask[row]][None])
        torch.testing.assert_close(alone[0], y[row, mask[row]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(aux_alone[0], aux[row])
    assert moe(x, torch.zeros(2, 10, dtype=torch.bool))[1].tolist() == [0, 0]


@BOTH
def test_auxiliary_loss_is_1_when_balanced_and_E_when_collapsed(config):
    moe = build(config, num_experts_per_tok=1)
    nn.init.zeros_(moe.gate.weight)
    torch.testing.assert_close(moe(inputs())[1], torch.ones(3))
    moe.gate.weight.data[0] = 100.0
    if config.router == "sigmoid":                                # the others must score 0, not sigmoid(0) = 1/2
        moe.gate.weight.data[1:] = -100.0
        moe.gate.e_score_correction_bias.zero_()
    torch.testing.assert_close(moe(inputs().abs())[1], torch.full((3,), 4.0))


def test_without_coefficient_there_is_no_auxiliary_loss():
    assert build(SOFTMAX, aux_loss_coef=0.0)(inputs())[1].tolist() == [0, 0, 0]


@BOTH
def test_an_expert_without_tokens_has_a_zero_gradient(config):
    moe = build(config, num_experts_per_tok=1)
    nn.init.zeros_(moe.gate.weight)
    moe.gate.weight.data[2] = 1.0
    for bias in moe.gate.buffers():
        bias.zero_()
    moe(inputs().abs())[0].sum().backward()                       # every token goes to expert 2
    for weight in moe.experts.parameters():
        assert weight.grad[2].abs().max() > 0
        assert weight.grad[[0, 1, 3]].abs().max() == 0


def test_router_is_float32_under_autocast_and_sums_beyond_half_precision_stay_finite():
    moe = build(SIGMOID, num_shared_experts=0)
    for weight in moe.experts.parameters():
        nn.init.constant_(weight, 2.0)
    x = torch.full((1, 4, 32), 1.0)
    plain = moe.gate(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(moe.gate(x[0]), plain, strict=True))
    y = feed_forward(x, moe.experts.gate_proj[0], moe.experts.up_proj[0], moe.experts.down_proj[0]).max() * 2.5
    assert y > 65504 > y / 2.5 / 4
    with torch.autocast("cpu", torch.float16):
        moe.experts.down_proj.data /= 4                           # each expert fits into float16, their sum does not
        out = moe(x)[0]
    assert out.dtype == torch.float32 and out.isfinite().all() and out.max() > 65504


def test_bias_moves_load_away_from_an_overloaded_expert():
    moe = build(SIGMOID, num_experts=8).train()
    nn.init.zeros_(moe.gate.e_score_correction_bias)
    x = inputs(B=8, T=32) + 1.0                                   # a common direction that the router favours or not
    moe(x)
    before = expert_load(moe)[0]
    counted = moe.gate.load.clone()
    update_router_bias(moe, u=0.01)
    mean = counted.float().mean()
    assert torch.equal(moe.gate.e_score_correction_bias, 0.01 * torch.sign(mean - counted))
    assert moe.gate.load.sum() == 0
    for _ in range(200):
        moe(x)
        after = expert_load(moe)[0]
        update_router_bias(moe, u=0.01)
    assert before.max() > 1.7 / 8, "the test needs an unbalanced start"
    assert after.max() < 1.3 / 8 and after.min() > 0.7 / 8
    assert moe.gate.e_score_correction_bias.grad_fn is None and not moe.gate.e_score_correction_bias.requires_grad
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())


@BOTH
def test_load_is_counted_in_training_only_and_accumulates_over_micro_batches(config):
    model = CausalLM(config)
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(3))
    model.eval()(ids)
    assert expert_load(model).sum() == 0
    model.train()(ids)
    model(ids)
    sparse = len(routers(model))
    assert sparse == config.num_hidden_layers - config.first_k_dense
    assert all(router.load.sum() == 2 * ids.numel() * 2 for router in routers(model))
    torch.testing.assert_close(expert_load(model).sum(dim=1), torch.ones(sparse))
    update_router_bias(model)
    assert expert_load(model).sum() == 0
    dense = CausalLM(dataclasses.replace(config, num_experts=0))
    update_router_bias(dense)
    assert expert_load(dense).numel() == 0


def test_the_padding_of_packed_rows_is_not_counted():
    model = CausalLM(SIGMOID).train()
    ids = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    aux = model(ids, segment_ids=segments, positions=positions).aux_loss
    assert routers(model)[0].load.sum() == 5 * 2
    other = torch.where(segments > 0, ids, 63 - ids)
    torch.testing.assert_close(model(other, segment_ids=segments, positions=positions).aux_loss, aux)


def test_balance_loss_does_not_depend_on_how_a_batch_is_cut():
    torch.manual_seed(4)
    model = CausalLM(dataclasses.replace(SOFTMAX, initializer_range=0.3)).eval()
    ids = torch.randint(64, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = mask[3, 9:] = 0
    whole = model(ids, attention_mask=mask).aux_loss              # (B,)
    parts = torch.cat([model(ids[i : i + 2], attention_mask=mask[i : i + 2]).aux_loss for i in (0, 2)])
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (4,) and (whole > 0.5).all()


def test_the_bias_is_saved_and_stays_float32(tmp_path):
    model = CausalLM(SIGMOID)
    bias = torch.tensor([0.1234567, -0.2, 0.3, 1e-4])
    routers(model)[0].e_score_correction_bias.copy_(bias)
    save_model(tmp_path / "m", model, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        router = routers(load_causal_lm(tmp_path / "m", dtype=dtype))[0]
        assert torch.equal(router.e_score_correction_bias, bias) and router.weight.dtype == dtype
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(routers(half)[0].e_score_correction_bias, bias)
    assert half(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_two_ranks_share_one_bias_and_one_gradient(tmp_path):
    torch.multiprocessing.spawn(moe_rank.run, args=(str(tmp_path),), nprocs=2)
    (bias, grads), (bias_1, grads_1) = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert torch.equal(bias, bias_1) and bias.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_1, strict=True))
