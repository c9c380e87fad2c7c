"""Objectives of reinforcement learning against TRL, torchtune, closed forms and by their properties."""

import json
from pathlib import Path

import pytest
import torch

from model.config import named_size
from model.distill import token_distances
from model.kernels import linear_logprobs, linear_logprobs_and_entropy
from model.logprobs import token_logprobs, token_logprobs_and_entropy
from model.transformer import CausalLM
from trainer.credit import group_advantages
from trainer.losses import (
    cispo_objective,
    clipped_objective,
    count_items,
    k1,
    k2,
    k3,
    policy_kl_loss,
    sequence_clipped_objective,
    token_weights,
    value_loss,
)

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "rl.json").read_text(encoding="utf-8"))
DATA = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDENS["inputs"].items()}
HOW = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token", "gspo": "sequence"}
CLIP = dict(clip_low=0.2, clip_high=0.2)


def rows(*shape, low=-3.0, high=-0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def mask_of(*lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def objective(name, logprobs, old, advantages, mask):
    """The three objectives with settings that suit them, by name."""
    if name == "gspo":
        return sequence_clipped_objective(logprobs, old, advantages, mask, 0.01, 0.02)
    if name == "cispo":
        return cispo_objective(logprobs, old, advantages, 1.28)
    return clipped_objective(logprobs, old, advantages, **CLIP)


def gradient(name, logprobs, old, advantages, mask, how, length=8):
    """d loss / d logprobs of a whole step."""
    logprobs = logprobs.clone().requires_grad_()
    losses, _, _ = objective(name, logprobs, old, advantages, mask)
    ((token_weights(mask, how, length) * losses).sum() / count_items(mask, how)).backward()
    return logprobs.grad


# --- the references


@pytest.mark.parametrize("name", GOLDENS["grpo"])
def test_grpo_and_its_variants_equal_trl(name):
    case, mask = GOLDENS["grpo"][name], DATA["mask"].long()
    logprobs = DATA["logprobs"].clone().requires_grad_()
    clip = case["clip_low"], case["clip_high"]
    if case["level"] == "sequence":
        losses, low, high = sequence_clipped_objective(logprobs, DATA["old_logprobs"], DATA["advantages"], mask, *clip)
    else:
        losses, low, high = clipped_objective(logprobs, DATA["old_logprobs"], DATA["advantages"], *clip)
    losses = losses + case["beta"] * k3(logprobs, DATA["ref_logprobs"])
    how = HOW[name]
    items = {"sequence": len(mask), "constant": len(mask), "token": int(mask.sum())}[how]   # with the row that is empty
    items = GOLDENS["items"] if name == "dapo" else items                      # with the rest of the step
    loss = (token_weights(mask, how, GOLDENS["longest"]) * losses).sum() / items
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    assert torch.allclose(logprobs.grad, torch.tensor(case["gradient"], dtype=torch.float64), atol=1e-7)
    assert case["high"] > 0
    for clipped, share in (low, case["low"]), (high, case["high"]):
        measured = clipped[:, 0].double().mean() if name == "gspo" else clipped[mask.bool()].double().mean()
        assert measured.item() == pytest.approx(share, rel=1e-5)


def test_ppo_equals_torchtune():
    case, mask = GOLDENS["ppo"], DATA["mask"].long()
    logprobs, values = (DATA[name].clone().requires_grad_() for name in ("logprobs", "new_values"))
    losses, low, high = clipped_objective(logprobs, DATA["old_logprobs"], DATA["token_advantages"], case["clip"],
                                          case["clip"])
    policy = (token_weights(mask, "token") * losses).sum() / count_items(mask, "token")
    value = value_loss(values, DATA["values"], DATA["returns"], case["value_clip"])
    value = (token_weights(mask, "token") * value).sum() / count_items(mask, "token")
    policy.backward(), value.backward()
    assert policy.item() == pytest.approx(case["policy_loss"]) and value.item() == pytest.approx(case["value_loss"])
    assert ((low | high) & mask.bool()).sum() / mask.sum() == pytest.approx(case["clipped"]) and case["clipped"] > 0
    assert torch.allclose(logprobs.grad, torch.tensor(case["gradient"], dtype=torch.float64), atol=1e-8)
    assert torch.allclose(values.grad, torch.tensor(case["value_gradient"], dtype=torch.float64), atol=1e-8)


# --- where they are flat and where not


@pytest.mark.parametrize("ratio, advantage, flat", [
    (1.3, 1.0, True), (1.3, -1.0, False), (0.7, -1.0, True), (0.7, 1.0, False), (1.1, 1.0, False), (0.9, -1.0, False),
    (1.25, 1.0, False), (0.85, -1.0, False)])
def test_clipping_is_flat_only_where_the_token_has_already_moved_the_way_it_should(ratio, advantage, flat):
    """ε_low = 0.2, ε_high = 0.28."""
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    losses, low, high = clipped_objective(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), 0.2, 0.28)
    losses.sum().backward()
    assert bool(logprobs.grad == 0) == flat
    assert bool(low | high) == flat and bool(high) == (flat and advantage > 0)
    if not flat:
        assert logprobs.grad.item() == pytest.approx(-ratio * advantage)          # d(w A) = w A dlogπ


def test_cispo_bounds_the_weight_and_never_the_gradient():
    logprobs = torch.tensor([[3.0, 1.1, 0.2]]).log().requires_grad_()
    losses, low, high = cispo_objective(logprobs, torch.zeros(1, 3), torch.tensor([1.5]), 1.28)
    losses.sum().backward()
    assert torch.allclose(logprobs.grad, -1.5 * torch.tensor([[1.28, 1.1, 0.2]]))
    assert high.tolist() == [[True, False, False]] and not low.any()


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_a_good_completion_becomes_likelier_and_advantages_get_no_gradient(name):
    old, mask = rows(4, 5), mask_of(5, 3, 1, 2)
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64, requires_grad=True)
    got = gradient(name, old, old, advantages, mask, "sequence")
    assert advantages.grad is None
    moved = -got * mask
    assert (moved.sum(1).sign() == advantages.sign()).all()
    assert (got[mask == 0] == 0).all() and (got[mask == 1] != 0).all()


# --- the first step on a batch


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_first_step_is_the_policy_gradient(name, how):
    """w = 1: the gradient of -Σ weight · A · log π, REINFORCE with (R - mean) / std; so CISPO's is GRPO's."""
    old, mask = rows(8, 5), mask_of(5, 3, 1, 2, 4, 5, 5, 1)
    rewards, groups = rows(8, low=0, high=1, seed=3), torch.tensor([0] * 4 + [1] * 4)
    advantages = group_advantages(rewards, groups)
    wanted = torch.zeros_like(old)
    for i in range(8):
        group = rewards[groups == groups[i]]
        a = (rewards[i] - group.mean()) / (group.std() + 1e-4)
        for t in range(int(mask[i].sum())):
            share = {"token": 1 / mask.sum(), "sequence": 1 / (8 * mask[i].sum()), "constant": 1 / (8 * 8)}[how]
            wanted[i, t] = -a * share
    assert torch.allclose(gradient(name, old, old, advantages, mask, how), wanted, atol=1e-12)
    _, low, high = objective(name, old, old, advantages, mask)
    assert not low.any() and not high.any()


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_equal_rewards_give_exactly_no_gradient(name):
    old, mask = rows(6, 5), mask_of(5, 3, 1, 2, 4, 5)
    advantages = group_advantages(torch.full((6,), 0.1), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert (gradient(name, old + 0.1, old, advantages, mask, "token") == 0).all()


# --- reductions


def test_token_weights_worked_example():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    losses = torch.tensor([[9.0, 1.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0]])

    def loss(how):
        return ((token_weights(mask, how, 10) * losses).sum() / count_items(mask, how)).item()

    assert loss("token") == pytest.approx((4 + 10) / 6)
    assert loss("sequence") == pytest.approx((4 / 2 + 10 / 4) / 2)
    assert loss("constant") == pytest.approx((4 + 10) / (2 * 10))
    with pytest.raises(ValueError, match="token, sequence or constant"):
        token_weights(mask, "mean")


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_neither_the_split_nor_padding_nor_a_masked_row_changes_the_step(name, how):
    old, mask = rows(5, 6), mask_of(6, 3, 0, 2, 4)
    logprobs, advantages = old + rows(5, 6, low=-0.3, high=0.3, seed=1), rows(5, low=-1, high=1, seed=2)
    whole = gradient(name, logprobs, old, advantages, mask, how)
    assert whole.isfinite().all() and (whole[2] == 0).all()
    items, parts = count_items(mask, how), []
    for part in slice(0, 1), slice(1, 3), slice(3, 5):
        width = 6 if part.start == 0 else 4
        args = [x[part, :width] for x in (logprobs, old)]
        mine = gradient(name, *args, advantages[part], mask[part, :width], how)
        parts.append(torch.nn.functional.pad(mine, (0, 6 - width)) * count_items(mask[part], how) / items)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)


def test_a_micro_batch_of_masked_rows_alone_adds_nothing():
    mask = torch.zeros(2, 4).long()
    for how in "token", "sequence", "constant":
        losses, _, _ = clipped_objective(rows(2, 4), rows(2, 4), torch.ones(2), **CLIP)
        assert (token_weights(mask, how, 4) * losses).sum() == 0


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_permuting_rows_permutes_losses(name):
    old, mask, order = rows(5, 6), mask_of(6, 3, 1, 2, 4), torch.tensor([3, 0, 4, 1, 2])
    logprobs, advantages = old + rows(5, 6, low=-0.3, high=0.3, seed=1), rows(5, low=-1, high=1, seed=2)
    losses, _, _ = objective(name, logprobs, old, advantages, mask)
    permuted, _, _ = objective(name, logprobs[order], old[order], advantages[order], mask[order])
    assert torch.equal(permuted, losses[order])


def test_gspo_is_grpo_for_completions_of_one_token_and_one_ratio_otherwise():
    old, advantages = rows(4, 1), rows(4, low=-1, high=1, seed=2)
    logprobs, mask = old + rows(4, 1, low=-0.3, high=0.3, seed=1), torch.ones(4, 1)
    for ours, plain in zip(sequence_clipped_objective(logprobs, old, advantages, mask, 0.2, 0.2),
                           clipped_objective(logprobs, old, advantages, 0.2, 0.2), strict=True):
        assert torch.equal(ours, plain)
    mask = torch.tensor([[0, 1, 0, 1, 0]])                                # tokens of a tool between the two
    old, new = torch.zeros(1, 5), torch.tensor([[5.0, 0.3, 7.0, -0.1, 9.0]])
    losses, _, _ = sequence_clipped_objective(new, old, torch.ones(1), mask, 0.5, 0.5)
    assert losses.shape == (1, 5) and torch.allclose(losses, -torch.tensor(0.1).exp())


# --- KL: what its estimators are worth, exactly, over all tokens of a small vocabulary


def expected(loss, policy_logits, sampled_by=None):
    """Σ_v π_old(v) loss(v), with gradient by the logits of π inside the loss alone: what sampling sees on average."""
    logprobs = policy_logits.log_softmax(-1)
    p = (logprobs if sampled_by is None else sampled_by).detach().exp()
    return (p * loss(logprobs)).sum()


def test_kl_estimators_as_figures_and_as_losses():
    logits, ref, old = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = logits.clone().requires_grad_()
    ref, old = ref.log_softmax(-1), old.log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    reverse = (ref.exp() * (ref - logprobs)).sum()

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    wanted = grad(kl)
    assert expected(lambda lp: k1(lp, ref), logits).item() == pytest.approx(kl.item())
    assert expected(lambda lp: k3(lp, ref), logits).item() == pytest.approx(kl.item())
    assert (k3(logprobs, ref) >= 0).all()
    # as losses on samples of π itself
    assert torch.allclose(grad(expected(lambda lp: k1(lp, ref), logits)), torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(grad(expected(lambda lp: k2(lp, ref), logits)), wanted)
    assert torch.allclose(grad(expected(lambda lp: k3(lp, ref), logits)), grad(reverse))
    assert not torch.allclose(grad(reverse), wanted, atol=1e-2)
    # on samples of an older policy
    ours = expected(lambda lp: policy_kl_loss(lp, old, ref), logits, old)
    assert ours.item() == pytest.approx(kl.item()) and torch.allclose(grad(ours), wanted)
    assert torch.allclose(grad(expected(lambda lp: policy_kl_loss(lp, logprobs.detach(), ref), logits)), wanted)
    assert not torch.allclose(grad(expected(lambda lp: k2(lp, ref), logits, old)), wanted, atol=1e-2)


def test_k2_is_near_the_kl_of_near_distributions():
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = (logits + 0.01 * torch.randn(9, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - near)).sum().item()
    assert (logprobs.exp() * k2(logprobs, near)).sum().item() == pytest.approx(kl, rel=0.02) and kl > 0


# --- the critic


def test_value_loss_worked_example():
    """V_old = 0, ε = 0.2. Beyond ε on the way to the return it is flat, on the way from it it is not."""
    values = torch.tensor([[0.1, 0.5, -0.5, 0.5]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0, 0.3]])
    losses = value_loss(values, torch.zeros(1, 4), returns, 0.2)
    assert torch.allclose(losses, torch.tensor([[0.81, 0.64, 2.25, 0.04]]) / 2)
    losses.sum().backward()
    assert torch.allclose(values.grad, torch.tensor([[-0.9, 0.0, -1.5, 0.2]]))
    free = value_loss(values.detach(), torch.zeros(1, 4), returns, float("inf"))
    assert torch.allclose(free, (values.detach() - returns).square() / 2)


# --- log-probabilities with entropy


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalLM(named_size("2x32", 50)).double()


IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_distribution_the_token_was_drawn_from(model, temperature):
    logprobs, entropy, _ = token_logprobs_and_entropy(model, IDS, temperature=temperature)
    full = (model(IDS).logits / temperature).log_softmax(-1)
    assert torch.allclose(logprobs, token_logprobs(model, IDS, temperature=temperature)[0])
    assert torch.allclose(entropy[:, 1:], -(full.exp() * full).sum(-1)[:, :-1]) and (entropy[:, 0] == 0).all()


def test_derivative_of_logprobs_and_entropy(monkeypatch):
    monkeypatch.setattr("model.kernels.LOGITS_AT_ONCE", 3 * 7)                   # three rows at a time
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (8, 7))
    targets = torch.randint(0, 7, (8,), generator=g)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs_and_entropy(h, w, targets, 0.7), (hidden, weight))
    both = linear_logprobs_and_entropy(hidden, weight, targets, 0.7)[0]
    assert torch.equal(both, linear_logprobs(hidden, weight, targets, 0.7))


def test_exact_kl_to_a_reference(model):
    """KL(π‖ref) at every token, from whole distributions: token_distances with β = 1."""
    torch.manual_seed(1)
    reference = CausalLM(named_size("2x32", 50)).double()
    with torch.no_grad():
        _, kl, _ = token_distances(model, reference, IDS, beta=1.0, temperature=0.7)
    p, q = ((m(IDS).logits / 0.7).log_softmax(-1)[:, :-1] for m in (model, reference))
    assert torch.allclose(kl[:, 1:], (p.exp() * (p - q)).sum(-1)) and (kl[:, 1:] > 0).all()


# --- learning


def bandit(reward, steps=150, lr=0.05, kl=0.0):
    """Two arms: GRPO's step on 16 samples of one token, again and again -> probability of arm 1, and KL from ½."""
    torch.manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        old = logits.detach().log_softmax(-1)
        arms = old.exp().multinomial(16, replacement=True, generator=generator)
        advantages = group_advantages(reward(arms, generator), torch.zeros(16).long(), scale="none")
        logprobs = logits.log_softmax(-1)[arms][:, None]
        losses, _, _ = clipped_objective(logprobs, old[arms][:, None], advantages, **CLIP)
        losses = losses + kl * policy_kl_loss(logprobs, old[arms][:, None], torch.tensor(0.5).log())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    p = logits.detach().softmax(-1)
    return p[1].item(), (p * (2 * p).log()).sum().item()


def test_a_bandit_learns_the_paying_arm():
    p, _ = bandit(lambda arms, generator: arms.float())
    assert p > 0.95


def test_a_bandit_with_rewards_by_lot_stays_near_the_reference():
    _, kl = bandit(lambda arms, generator: torch.rand(16, generator=generator).round(), kl=0.1)
    assert kl < 0.05
