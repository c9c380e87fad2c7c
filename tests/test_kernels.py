"""Derivatives written by hand: equal to autograd's own on the plain formula, in every number format."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import kernels
from model.config import ModelConfig
from model.kernels import linear_logprobs, rms_norm, rotate, silu_mul
from model.logprobs import token_logprobs
from model.transformer import CausalLM, attention_mask_for, slow_attention


def plain_norm(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def plain_rotation(x, cos, sin):
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())        # x_i + i·x_{i+d/2}
    turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    return torch.cat(turned.unbind(-1), -1)


def plain_logprobs(hidden, weight, targets, temperature):
    return -F.cross_entropy(hidden @ weight.T / temperature, targets, reduction="none")


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


ANGLES = torch.randn(1, 5, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = torch.tensor([0, 6, 3, 3, 1, 5, 2, 0, 4])
CASES = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-5), plain_norm, [(2, 5, 8), (8,)]),
    "rotate": (lambda x: rotate(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),
               lambda x: plain_rotation(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)), [(2, 5, 3, 8)]),
    "swiglu": (silu_mul, lambda gate, up: F.silu(gate) * up, [(3, 7), (3, 7)]),
    "head": (lambda h, w: linear_logprobs(h, w, TARGETS, 0.7), lambda h, w: plain_logprobs(h, w, TARGETS, 0.7),
             [(9, 4), (7, 4)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
def test_values_and_gradients_are_those_of_the_formula(name, dtype, close, monkeypatch):
    fast, plain, shapes = CASES[name]
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 2 * 7)                              # two rows of logits at a time
    tensors = draw(*shapes, dtype=dtype)
    expected, got = plain(*tensors), fast(*tensors)
    assert got.dtype == dtype
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, atol=close, rtol=close)
    for a, b in zip(torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(expected, tensors, upstream),
                    strict=True):
        torch.testing.assert_close(a, b, atol=4 * close, rtol=4 * close)


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_they_round_once(name):
    """bfloat16 comes out (but for log-probabilities) and the values are those of float32, rounded."""
    fast, plain, shapes = CASES[name]
    tensors = draw(*shapes, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(*tensors)
    expected = plain(*tensors)
    if name == "swiglu":                                    # elementwise on what matrix products gave: keeps its format
        assert got.dtype == torch.float32
    else:
        assert got.dtype == (torch.float32 if name == "head" else torch.bfloat16)
    assert (got - expected).norm() < 1e-2 * expected.norm()
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert a.dtype == torch.float32                      # gradients of float32 weights are float32
        assert (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (3, 1)])
def test_attention_backward_by_blocks(masked, H, K, monkeypatch):
    """Ten queries in blocks of four: the same gradients as autograd through softmax(q kᵀ / sqrt(d)) v."""
    monkeypatch.setattr(kernels, "ATTENTION_BLOCK", 4)
    q, k, v, upstream = draw((2, H, 10, 8), (2, K, 10, 8), (2, K, 10, 8), (2, H, 10, 8))
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 2, 0, 0, 0]])
    mask = attention_mask_for(10, 0, "cpu", segment_ids=segments) if masked else None
    expected, got = slow_attention(q, k, v, mask), kernels.BlockAttention.apply(q, k, v, mask)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream),
                    strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)           # dk and dv are summed in float32


def test_a_huge_score_that_is_masked_does_no_harm():
    """exp of a hidden score minus the logsumexp of the visible ones overflows: its gradient is still 0, not NaN."""
    q, k, v = (x.detach().float() for x in draw((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8)))
    k[:, :, 0] = 1000 * q[:, :, 3]                                       # what the last query must not see
    tensors = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    mask = attention_mask_for(4, 0, "cpu", segment_ids=torch.tensor([[1, 1, 2, 2]]))
    kernels.attention(*tensors, mask).sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)


def test_attention_in_bfloat16_uses_it():
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in draw((2, 4, 150, 32), (2, 2, 150, 32), (2, 2, 150, 32)))
    out = kernels.attention(q, k, v)
    assert "BlockAttention" in type(out.grad_fn).__name__
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    for a, b in zip(got, torch.autograd.grad(kernels.attention(*exact), exact, upstream.float()), strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()


def check_flex(device, close, backward):
    q, k, v = (x.detach().to(device).requires_grad_(backward)
               for x in draw((2, 4, 200, 16), (2, 2, 200, 16), (2, 2, 200, 16), dtype=torch.float32))
    lengths = torch.tensor([[130, 3, 60, 7], [1, 100, 50, 49]])
    segments = torch.stack([torch.arange(1, 5).repeat_interleave(row) for row in lengths]).to(device)
    got = kernels.attention(q, k, v, kernels.segment_blocks(segments))
    expected = slow_attention(q, k, v, attention_mask_for(200, 0, device, segment_ids=segments))
    torch.testing.assert_close(got, expected, atol=close, rtol=0)
    if backward:
        upstream = torch.randn_like(got)
        expected = torch.autograd.grad(expected, (q, k, v), upstream)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), expected, strict=True):
            torch.testing.assert_close(a, b, atol=10 * close, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_on_packed_rows_is_attention_under_their_mask():
    """What CUDA uses for packed rows; on a CPU torch has no compiled one and no derivative."""
    check_flex("cpu", 1e-5, backward=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flex_attention_on_a_gpu():
    assert kernels.has_flex()
    check_flex("cuda", 1e-2, backward=True)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and "split" not in func.__name__:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_logits_are_never_all_there(monkeypatch):
    N, V, D = 640, 50, 4
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 32 * V)
    hidden, weight = draw((N, D), (V, D), dtype=torch.float32)
    with Largest() as largest:
        linear_logprobs(hidden, weight, torch.arange(N) % V).sum().backward()
    assert largest.numel == max(32 * V, N * D) < N * V


def test_a_frozen_head_costs_no_gradient():
    hidden, weight = draw((3, 8), (50, 8), dtype=torch.float32)
    with FlopCounterMode(display=False) as trained:
        expected, _ = torch.autograd.grad(linear_logprobs(hidden, weight, torch.arange(3)).sum(), (hidden, weight))
    with FlopCounterMode(display=False) as frozen:
        got, = torch.autograd.grad(linear_logprobs(hidden, weight.detach(), torch.arange(3)).sum(), hidden)
    assert torch.equal(got, expected)
    assert frozen.get_total_flops() == 3 / 4 * trained.get_total_flops()       # logits twice, and d hidden


def test_the_loss_is_cross_entropy():
    config = ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    model = CausalLM(config)
    ids = torch.randint(0, 97, (3, 11))
    loss = -token_logprobs(model, ids)[0].sum() / 30
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(loss.item(), expected.item(), abs_tol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert (a - b).norm() <= 1e-6 * max(b.norm(), 1)


def test_checkpointing_changes_nothing_but_memory():
    """With activation checkpointing a block keeps its input only; loss and gradients stay the same bits."""
    config = ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32, qk_norm=True)
    model, ids = CausalLM(config), torch.randint(0, 97, (2, 9))
    results, kept = [], []
    for checkpointing in (False, True):
        model.model.activation_checkpointing = checkpointing
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = -token_logprobs(model, ids)[0].sum()
        kept.append(sum(saved))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]
