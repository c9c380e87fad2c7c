"""Every training objective as a pure function: tensors in, tensors out, the equation on top."""


def next_token_loss(logprobs, loss_mask):
    """L = - sum_t m_t log p(x_t | x_<t): the summed cross-entropy of the tokens the model must emit.

    logprobs (B, T) from model.logprobs.token_logprobs, loss_mask (B, T) with 1 = counts. A sum, not a mean: the caller
    divides by the number of targets over all micro-batches and ranks, so the result does not depend on the split.
    """
    return -(logprobs * loss_mask).sum()


def balance_loss(aux_loss, loss_mask):
    """The rows' MoE balance losses (B,), weighted by their targets: it adds to `next_token_loss` and divides alike."""
    return (aux_loss * loss_mask.sum(1)).sum()
