"""Log-probabilities of the tokens of a text under a model: the one definition for every trainer and evaluation."""

import torch.nn.functional as F

from model.kernels import linear_logprobs, linear_logprobs_and_entropy


def token_logprobs(model, input_ids, attention_mask=None, segment_ids=None, positions=None, temperature=1.0):
    """log p(x_t | x_<t) of every token, and the rows' auxiliary loss.

    input_ids, attention_mask, segment_ids, positions (B, T) as in `CausalLM.forward`.
    Returns (logprobs (B, T) in at least float32, aux_loss (B,)). Position t speaks of token t, predicted from position
    t - 1, so a mask over tokens ("1 = the model must emit this one") lines up with it; position 0, which nothing
    predicts, is 0. `temperature` divides the logits: score with the one that was sampled with.
    """
    def head(hidden, lm_head):                                          # hidden (B, T, D)
        rows, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        logprobs = linear_logprobs(rows, lm_head.weight, targets, temperature)           # (B·(T-1),)
        return F.pad(logprobs.view(len(input_ids), -1), (1, 0))         # (B, T)

    return model(input_ids, attention_mask, segment_ids, positions, head=head)


def token_logprobs_and_entropy(model, input_ids, attention_mask=None, segment_ids=None, positions=None,
                               temperature=1.0):
    """(logprobs (B, T), entropy (B, T), aux_loss (B,)): `token_logprobs`, and the entropy in nats of the distribution
    that each token was drawn from, at `temperature` too. Both have a derivative; position 0 is 0 in both."""
    def head(hidden, lm_head):                                          # hidden (B, T, D)
        rows, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        both = linear_logprobs_and_entropy(rows, lm_head.weight, targets, temperature)   # (B·(T-1),) each
        return [F.pad(x.view(len(input_ids), -1), (1, 0)) for x in both]                 # (B, T) each

    (logprobs, entropy), aux_loss = model(input_ids, attention_mask, segment_ids, positions, head=head)
    return logprobs, entropy, aux_loss


def segment_sums(x, segment_ids, num_segments):
    """Sums of x (B, T) over the tokens of each of the segments 1 … num_segments of a packed row -> (B, num_segments).

    segment_ids (B, T), 0 = padding. With x = logprobs · mask these are the log-probabilities of whole completions.
    """
    sums = x.new_zeros(len(x), num_segments + 1)
    return sums.scatter_add(1, segment_ids, x)[:, 1:]


def masked_reduce(x, mask, how, length=0):
    """Reduce per-token values x (B, T) under mask (B, T), 1 = counts.

    "token": sum(x m) / sum(m)   ·   "sequence": mean over rows of sum(x m) / sum(m) of the row   ·
    "constant": sum(x m) / (B · length). Denominators are at least 1, so a row without targets adds 0 and never NaN.
    """
    total = (x * mask).sum(1)                                           # (B,)
    if how == "token":
        return total.sum() / mask.sum().clamp(min=1)
    if how == "sequence":
        return (total / mask.sum(1).clamp(min=1)).mean()
    if how == "constant":
        return total.sum() / (len(x) * length)
    raise ValueError(f"how={how!r}: expected token, sequence or constant")
