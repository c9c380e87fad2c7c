"""How far a student's next-token distribution is from a teacher's, at every token, without ever holding all logits.

    token_distances(student, teacher, ids, …)          log p_S(x_t | x_<t) and D(T_t, S_t) of every token
    linear_distill(h, W, teacher's h and W, y, …)      the same for rows of hidden states: what does the work

With t = softmax(teacher's logits / τ), s = softmax(student's logits / τ) over the V tokens that may come next:

    β = 0        D = Σ_v t (log t - log s)                                             forward KL(T‖S)
    β = 1        D = Σ_v s (log s - log t)                                             reverse KL(S‖T)
    0 < β < 1    D = β KL(T‖M) + (1 - β) KL(S‖M)   with   M = β T + (1 - β) S          generalized Jensen-Shannon

(Agarwal et al. 2023, arXiv:2306.13649, eq. 1; β as in TRL's GKDTrainer.) trainer/losses.py has them spelled out on
logits, and tests/test_distillation.py holds the two equal. Both models' logits, 2 · N · V numbers in float32, would be
the largest thing in memory by far: like `model.kernels.linear_logprobs`, this has them for some rows at a time, and
computes them again for the derivative. Only the student has one.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.kernels import in_chunks, logits_of, matmul_dtype, wide


def token_distances(student, teacher, input_ids, segment_ids=None, positions=None, beta=0.0, temperature=1.0,
                    around=nullcontext):
    """(logprobs (B, T), distances (B, T), aux_loss (B,)): `token_logprobs` of the student, and D at every token.

    Position t speaks of token t: both distributions are those given the tokens before it; position 0 is 0. `logprobs`
    are at temperature 1, `distances` at `temperature`, without the factor τ². `student` may be wrapped (DDP, FSDP);
    `teacher` is a CausalLM that nothing is learnt through. Its vocabulary may be longer than the student's: padding,
    which is left out of its distribution. It is asked inside `around()`: there an adapter of the student can be off,
    which makes teacher and student one model.
    """
    with torch.no_grad(), around():
        teacher_hidden, _ = teacher(input_ids, None, segment_ids, positions, head=lambda hidden, lm_head: hidden)

    def head(hidden, lm_head):                                                       # hidden (B, T, D)
        rows, teacher_rows = hidden[:, :-1].flatten(0, 1), teacher_hidden[:, :-1].flatten(0, 1)
        table = teacher.lm_head.weight[:len(lm_head.weight)]                         # (V, D of the teacher)
        both = linear_distill(rows, lm_head.weight, teacher_rows, table, input_ids[:, 1:].flatten(), beta, temperature)
        return [F.pad(x.view(len(input_ids), -1), (1, 0)) for x in both]             # (B, T) each

    (logprobs, distances), aux_loss = student(input_ids, None, segment_ids, positions, head=head)
    return logprobs, distances, aux_loss


def linear_distill(hidden, weight, teacher_hidden, teacher_weight, targets, beta=0.0, temperature=1.0):
    """log softmax(W h_n)_{y_n} and D(T_n, S_n) for N rows: two tensors (N,), in at least float32.

    hidden (N, D), weight (V, D) and targets (N,) of the student; teacher_hidden (N, E), teacher_weight (V, E).
    """
    dtype = matmul_dtype(hidden)
    tensors = [x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)]
    return LinearDistill.apply(*tensors, targets, beta, temperature)


class LinearDistill(Function):
    """d log p / d logits = onehot(y) - softmax(logits); `slope` is dD / d(logits / τ); and back through h Wᵀ."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, targets, beta, temperature):
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, targets)
        ctx.beta, ctx.temperature = beta, temperature
        logprobs, distances = [], []
        for h, teacher_h, y in zip(*in_chunks(weight, hidden, teacher_hidden, targets), strict=True):
            logits = logits_of(h, weight, 1)                                         # (n, V)
            logprobs.append(logits.gather(1, y[:, None]).squeeze(1) - logits.logsumexp(-1))
            teacher = logits_of(teacher_h, teacher_weight, temperature).log_softmax(-1)
            distances.append(distance(logits.div_(temperature).log_softmax(-1), teacher, beta))
        return torch.cat(logprobs), torch.cat(distances)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_distances):
        hidden, weight, teacher_hidden, teacher_weight, targets = ctx.saved_tensors
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(wide(weight))
        chunks = in_chunks(weight, hidden, dhidden, teacher_hidden, targets, g_logprobs, g_distances)
        for h, dh, teacher_h, y, up_logprob, up_distance in zip(*chunks, strict=True):
            logits = logits_of(h, weight, 1)                                         # (n, V)
            teacher = logits_of(teacher_h, teacher_weight, ctx.temperature).log_softmax(-1)
            d = slope((logits / ctx.temperature).log_softmax(-1), teacher, ctx.beta)
            d.mul_(up_distance[:, None] / ctx.temperature)
            d.sub_(logits.softmax(-1).mul_(up_logprob[:, None]))
            d[torch.arange(len(y), device=y.device), y] += up_logprob                # (onehot - softmax) · upstream
            d = d.to(weight.dtype)
            torch.mm(d, weight, out=dh)
            dweight += d.mT @ h
        return dhidden, dweight.to(weight.dtype), None, None, None, None, None


def distance(student, teacher, beta):
    """D (n,) of log-probabilities (n, V), see the top of this file."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = log_mixture(student, teacher, beta)
    return (beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)).sum(-1)


def slope(student, teacher, beta):
    """dD / d logits of the student (n, V).

    Forward KL: s - t. The others have the form c · s (a - Σ s a): reverse KL with c = 1, a = log s - log t, and
    Jensen-Shannon with c = 1 - β, a = log s - log M; what M depends on S cancels.
    """
    if beta == 0:
        return student.exp() - teacher.exp()
    s = student.exp()
    a = student - (teacher if beta == 1 else log_mixture(student, teacher, beta))
    return a.sub_((s * a).sum(-1, keepdim=True)).mul_(s).mul_(1 if beta == 1 else 1 - beta)


def log_mixture(student, teacher, beta):
    """log(β T + (1 - β) S)."""
    return torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
