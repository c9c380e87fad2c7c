"""The five places where a step spends its time outside matrix products, with their derivatives written by hand.

    rms_norm(x, w)           y = x / sqrt(mean(x²) + eps) · w
    rotate(x, cos, sin)      rotary positions: every pair of dimensions turned by its angle
    attention(q, k, v, mask) softmax(q kᵀ / sqrt(d)) v, never all of its T x T scores at once
    silu_mul(gate, up)       silu(gate) · up, the heart of SwiGLU
    linear_logprobs(h, W, y) log softmax(h Wᵀ)_y, the logits only ever there for some rows at a time; with the entropy
                             of the same distributions: linear_logprobs_and_entropy

Autograd would get the same gradients from the formulas alone, but it keeps every intermediate result and walks through
memory once for each elementary operation: on these five that is most of the memory and half of the time of a step.
A derivative by hand keeps only its inputs and computes the rest again. tests/test_kernels.py holds each of them to
autograd's own derivative of the plain formula.

Inside, everything is computed in float32 or better; results come out in the format that matrix products use (bfloat16
under autocast), because a matrix product is what comes next.
"""

import functools
import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

LOGITS_AT_ONCE = 2**27 if torch.cuda.is_available() else 2**23     # float32 numbers: 512 MB, on a CPU 32 MB
ATTENTION_BLOCK = 128                                              # queries of one block in the derivative


def matmul_dtype(x):
    """The format in which autocast computes matrix products on x's device; x's own outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------ RMSNorm


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension D (arXiv:1910.07467, eq. 4). x (..., D), w (D,)."""
    return RMSNormFunction.apply(x, weight, eps, matmul_dtype(x))


class RMSNormFunction(Function):
    """With n = x / rms(x):   dw = Σ g n   and   dx = (g w - n · mean(g w n)) / rms(x): no part of it along n."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        r = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)          # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (wide(x) * r * weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        n, g = wide(x) * r, wide(g)
        gn = g * n
        along = (gn @ wide(weight)).unsqueeze(-1) / x.shape[-1]                  # mean(g w n)  (..., 1)
        dx = torch.addcmul(g * weight, n, along, value=-1).mul_(r)
        return dx.to(x.dtype), gn.flatten(0, -2).sum(0).to(weight.dtype), None, None


# ------------------------------------------------------------------------------------ rotary positions


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + d/2}) by its angle. x (B, T, heads, d); cos, sin (B or 1, T, 1, d/2)."""
    return RotateFunction.apply(x, cos, sin, matmul_dtype(x))


class RotateFunction(Function):
    """The gradient of a rotation is the rotation back: cos stays, sin changes its sign."""

    @staticmethod
    def forward(ctx, x, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return turn(x, cos, sin).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return turn(g, cos, -sin).to(ctx.dtype), None, None, None


def turn(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# ------------------------------------------------------------------------------------------ attention


def attention(q, k, v, mask=None):
    """Causal attention, or what `mask` allows. q (B, H, T, d); k, v (B, K, S, d): each serves H/K query heads;
    mask bool, broadcastable to (B, 1, T, S), True = may be seen, or a BlockMask; None = causal -> (B, H, T, d).

    torch's fused kernels: FlexAttention for a BlockMask, SDPA for the rest. One exception: on a CPU in bfloat16 the
    derivative is the one below. It skips the blocks above the diagonal, which torch's CPU kernel multiplies through,
    and takes about half its time. (A compiled model keeps torch's: the compiler would unroll the blocks.)
    """
    if isinstance(mask, BlockMask):
        fused = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        return fused(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    causal = mask is None and q.shape[2] == k.shape[2]
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if on_cpu and q.shape[2] == k.shape[2] and q.requires_grad and not torch.compiler.is_compiling():
        return BlockAttention.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def segment_blocks(segment_ids, virtual=0):
    """The BlockMask of packed rows, segment_ids (B, T): causal, and each text sees itself only. Whole blocks of the
    T x T scores in which nobody may see anybody are never computed, so a row of short texts costs what they cost.
    virtual: so many keys that every token sees stand before the T own ones."""
    B, T = segment_ids.shape

    def visible(b, h, query, key):
        return (key <= query) & (segment_ids[b, query] == segment_ids[b, key])

    def visible_after_virtual(b, h, query, key):
        return (key < virtual) | visible(b, h, query, (key - virtual).clamp(min=0))

    return create_block_mask(visible_after_virtual if virtual else visible, B, None, T, virtual + T,
                             device=segment_ids.device)


@functools.cache
def compiled_flex():
    """FlexAttention as a fused kernel; uncompiled, on a CPU, it is only good for comparison."""
    return torch.compile(flex_attention) if torch.cuda.is_available() else flex_attention


@torch.compiler.assume_constant_result
@functools.cache
@torch.enable_grad()
def has_flex():
    """Whether FlexAttention works on this GPU: tried once, forward and backward, against SDPA."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    q, k, v = torch.randn(3, 2, 2, 256, 64, device="cuda", dtype=torch.float16).requires_grad_().unbind()
    segments = (torch.arange(256, device="cuda") // 100).expand(2, 256)
    try:
        got = attention(q, k, v, segment_blocks(segments))
        got.sum().backward()
    except Exception as error:        # compilers for GPUs fail in many ways; SDPA with a mask computes the same
        warnings.warn(f"FlexAttention does not work here ({str(error).splitlines()[0]}); packed rows take longer",
                      stacklevel=2)
        return False
    mask = (segments[0][:, None] == segments[0]).tril()
    return torch.allclose(got, attention(q, k, v, mask[None, None]), atol=1e-2)


class BlockAttention(Function):
    """The derivative of attention from q, k, v and log Σ_s exp(score_ts) alone  (FlashAttention-2, arXiv:2307.08691).

        P = exp(q kᵀ/√d - logsumexp)    dv = Pᵀ do    dS = P ⊙ (do vᵀ - Σ do ⊙ o)    dq = dS k/√d    dk = dSᵀ q/√d

    One block of queries after the other, each against the keys before it. The query heads that share a key/value head
    are rows of one matrix, so grouped heads need no repeated keys.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=bias)                          # (B, H, T, d), (B, H, T)
        ctx.save_for_backward(q, k, v, mask, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, mask, out, logsumexp = ctx.saved_tensors
        (B, H, T, d), K, scale = q.shape, k.shape[1], q.shape[3] ** -0.5

        def grouped(x):                                                          # (B, H, T, n) -> (B·K, H/K, T, n)
            return x.reshape(B * K, H // K, T, -1)

        delta = (wide(out) * g).sum(-1).to(q.dtype)                              # Σ do ⊙ o  (B, H, T)
        q, g, logsumexp, delta = grouped(q), grouped(g), grouped(logsumexp.to(q.dtype)), grouped(delta)
        k, v = k.reshape(B * K, T, d), v.reshape(B * K, T, d)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros(2, B * K, T, d, dtype=torch.float32, device=q.device)
        for start in range(0, T, ATTENTION_BLOCK):
            stop = min(start + ATTENTION_BLOCK, T)
            n = stop - start

            def rows(x, start=start, stop=stop):                                 # (B·K, H/K · n, …) of this block
                return x[:, :, start:stop].flatten(1, 2)

            p = torch.baddbmm(rows(logsumexp), rows(q), k[:, :stop].mT, beta=-1, alpha=scale).exp_()
            if mask is None:
                p.view(B * K, H // K, n, stop)[..., start:].tril_()
            else:
                p.view(B, H, n, stop).masked_fill_(~mask[:, :, start:stop, :stop], 0)  # not · 0: inf there, perhaps
            ds = torch.baddbmm(rows(delta), rows(g), v[:, :stop].mT, beta=-1).mul_(p)
            dv[:, :stop] += p.mT @ rows(g)
            dk[:, :stop] += ds.mT @ rows(q)
            dq[:, :, start:stop] = (ds @ k[:, :stop]).mul_(scale).view(B * K, H // K, n, d)
        return dq.view(B, H, T, d), dk.mul_(scale).view(B, K, T, d).to(k.dtype), dv.view(B, K, T, d).to(v.dtype), None


# --------------------------------------------------------------------------------------------- SwiGLU


def silu_mul(gate, up):
    """silu(gate) · up with silu(z) = z · sigmoid(z), elementwise."""
    return SiluMulFunction.apply(gate, up)


class SiluMulFunction(Function):
    """d up = g · silu(gate),   d gate = g · up · silu'(gate)   with silu'(z) = σ(z) (1 + z (1 - σ(z)))."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


# --------------------------------------------------------------- language-model head and cross-entropy


def linear_logprobs(hidden, weight, targets, temperature=1.0):
    """log p_n = log softmax(W h_n / temperature)[y_n] for rows hidden (N, D), weight (V, D), targets (N,) -> (N,).

    At least float32. The logits, N x V numbers, are by far the largest thing in training a small model: here they
    exist for some rows at a time and are computed again for the derivative (one matrix product more).
    """
    dtype = matmul_dtype(hidden)
    return LinearLogprobs.apply(hidden.to(dtype), weight.to(dtype), targets, temperature)


class LinearLogprobs(Function):
    """d log p_n / d logits = onehot(y_n) - softmax(logits_n), and from there back through the product h Wᵀ."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        logprobs = []
        for h, y in zip(*in_chunks(weight, hidden, targets), strict=True):
            logprobs.append(logits_of(h, weight, temperature).log_softmax(-1).gather(1, y[:, None]).squeeze(1))
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, targets = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(wide(weight)) if ctx.needs_input_grad[1] else None     # not beside adapters
        for h, dh, y, upstream in zip(*in_chunks(weight, hidden, dhidden, targets, g), strict=True):
            d = logits_of(h, weight, ctx.temperature).softmax(-1).neg_()         # (n, V)
            d[torch.arange(len(y), device=y.device), y] += 1                     # onehot - softmax
            d = d.mul_(upstream[:, None] / ctx.temperature).to(weight.dtype)
            torch.mm(d, weight, out=dh)
            if dweight is not None:
                dweight += d.mT @ h
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None


def linear_logprobs_and_entropy(hidden, weight, targets, temperature=1.0):
    """`linear_logprobs`, and beside it the entropy H_n = - Σ_v p_v log p_v of the same distributions: (N,) each."""
    dtype = matmul_dtype(hidden)
    return LinearLogprobsEntropy.apply(hidden.to(dtype), weight.to(dtype), targets, temperature)


class LinearLogprobsEntropy(Function):
    """d log p_n / d logits = onehot(y_n) - p   and   dH / d logits = - p (log p + H)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.temperature = temperature
        logprobs, entropies = [], []
        for h, y in zip(*in_chunks(weight, hidden, targets), strict=True):
            logp = logits_of(h, weight, temperature).log_softmax(-1)             # (n, V)
            logprobs.append(logp.gather(1, y[:, None]).squeeze(1))
            entropies.append(-(logp.exp() * logp).sum(-1))
        logprobs, entropies = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_entropies):
        hidden, weight, targets, entropies = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(wide(weight)) if ctx.needs_input_grad[1] else None     # not beside adapters
        chunks = in_chunks(weight, hidden, dhidden, targets, entropies, g_logprobs, g_entropies)
        for h, dh, y, H, up_logprob, up_entropy in zip(*chunks, strict=True):
            logp = logits_of(h, weight, ctx.temperature).log_softmax(-1)         # (n, V)
            d = (logp + H[:, None]).mul_(-up_entropy[:, None]).sub_(up_logprob[:, None]).mul_(logp.exp_())
            d[torch.arange(len(y), device=y.device), y] += up_logprob
            d = d.div_(ctx.temperature).to(weight.dtype)
            torch.mm(d, weight, out=dh)
            if dweight is not None:
                dweight += d.mT @ h
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None


def logits_of(h, weight, temperature):
    """h (n, D), weight (V, D) -> logits (n, V) in at least float32; temperature 1 costs no pass over them."""
    logits = wide(h @ weight.mT)
    return logits if temperature == 1 else logits.div_(temperature)


def in_chunks(weight, *tensors):
    """Tensors of N rows, each cut into chunks of as many rows as LOGITS_AT_ONCE allows."""
    return [tensor.split(max(LOGITS_AT_ONCE // len(weight), 1)) for tensor in tensors]
