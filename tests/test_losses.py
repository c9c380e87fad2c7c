"""Log-probabilities, reductions and losses against torch's own and by their properties."""

import pytest
import torch
import torch.nn.functional as F

from model.config import named_size
from model.logprobs import masked_reduce, token_logprobs
from model.transformer import CausalLM
from trainer.losses import next_token_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalLM(named_size("2x32", 50)).double()


IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.6).long()
MASK[:, 0] = 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_log_softmax_of_the_position_before(model, temperature):
    logprobs, aux = token_logprobs(model, IDS, temperature=temperature)
    full = (model(IDS).logits / temperature).log_softmax(-1)
    for b in range(3):
        assert logprobs[b, 0] == 0
        for t in range(1, 12):
            assert torch.isclose(logprobs[b, t], full[b, t - 1, IDS[b, t]], atol=1e-10)
    assert (aux == 0).all()


def test_next_token_loss_is_cross_entropy_over_the_targets(model):
    loss = next_token_loss(token_logprobs(model, IDS)[0], MASK)
    labels = IDS.masked_fill(MASK == 0, -100)
    logits = model(IDS).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(loss, expected)


def test_first_loss_is_a_uniform_guess():
    torch.manual_seed(0)
    model = CausalLM(named_size("nano", 512))
    logprobs, _ = token_logprobs(model, torch.randint(0, 512, (4, 64)))
    assert -logprobs[:, 1:].mean().item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.1)


def test_positions_that_predict_no_target_get_no_gradient(model):
    logits = model(IDS).logits.detach().requires_grad_()
    logprobs = -F.pad(F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none"), (1, 0))
    next_token_loss(logprobs, MASK).backward()
    predicts = F.pad(MASK[:, 1:], (0, 1)).bool()                       # position t speaks of token t + 1
    assert (logits.grad[~predicts] == 0).all() and (logits.grad[predicts].abs().sum(-1) > 0).all()


def test_split_into_micro_batches_gives_the_same_gradient(model):
    def gradient(parts):
        model.zero_grad()
        for rows in parts:
            (next_token_loss(token_logprobs(model, IDS[rows])[0], MASK[rows]) / MASK.sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([slice(0, 3)])
    assert torch.dist(gradient([slice(0, 1), slice(1, 3)]), whole) < 1e-6 * whole.norm()


def test_row_without_targets_adds_nothing(model):
    mask = MASK.clone()
    mask[1] = 0
    model.zero_grad()
    loss = next_token_loss(token_logprobs(model, IDS)[0], mask)
    without = next_token_loss(token_logprobs(model, IDS[[0, 2]])[0], mask[[0, 2]])
    assert torch.allclose(loss, without)
    next_token_loss(token_logprobs(model, IDS)[0], torch.zeros_like(MASK)).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_masked_reduce_worked_example():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [1.0, 1.0, 1.0]])
    m = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert masked_reduce(x, m, "token") == (2 + 4 + 32) / 3
    assert masked_reduce(x, m, "sequence") == pytest.approx((3 + 32 + 0) / 3)
    assert masked_reduce(x, m, "constant", length=10) == pytest.approx(38 / 30)
    assert masked_reduce(x, m * 0, "token") == 0
    with pytest.raises(ValueError):
        masked_reduce(x, m, "mean")
