"""What happens inside a decoder while it reads a text, as tensors to look at.

    trace(model, ids)           one forward pass, written down: everything below reads from it

    next_tokens, entropy, surprise    what the model expects after each token, how sure it is, how wrong it was
    attention_map               where a head looks
    router_choices              which experts a mixture sends each token to
    logit_lens                  what the model would say if it stopped after layer n
                                (nostalgebraist 2020, "interpreting GPT: the logit lens")

The maps are not taken out of the fused kernels, which never write them down: they are computed again from what each
layer was given, by the formula of model/transformer.py `slow_attention`. Entropy and surprise are in bits.
"""

import math
from dataclasses import dataclass, field

import torch

from model.errors import UserError
from model.kernels import rotate


@dataclass
class Trace:
    """One forward pass over ids (T,). V vocabulary, D width, L layers, S = T keys, virtual tokens of an adapter before.

    Tensors lie on the model's device.
    """
    ids: list
    logits: torch.Tensor = None                        # (T, V) of the next token, float32 or more
    residual: dict = field(default_factory=dict)       # {0: the embedding (T, D), n: what layer n left behind}
    attention: dict = field(default_factory=dict)      # {layer: what its attention was called with}
    routes: dict = field(default_factory=dict)         # {layer: (gates (T, k), experts (T, k), probabilities (T, E))}


@torch.inference_mode()
def trace(model, ids):
    """Run a CausalLM over ids, a list of T token ids, and return the `Trace`. An adapter that is active takes part.

    UserError where the ids do not fit: none at all, more than the model's positions, or not of its vocabulary.
    """
    config = model.config
    if not 1 <= len(ids) <= config.max_position_embeddings:
        raise UserError(f"the text has {len(ids)} tokens; the model reads 1 to {config.max_position_embeddings}")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(f"the text holds an id outside 0..{config.vocab_size - 1}: is this the model's own tokenizer?")
    seen, handles = Trace(list(ids)), []

    def keep_inputs(module, kept, key, what):
        handles.append(module.register_forward_pre_hook(lambda _, inputs: kept.update({key: what(inputs)})))

    try:
        # Virtual tokens of prompt tuning pass through the layers first; the text comes last and is what stays.
        for layer, block in enumerate(model.model.layers):
            keep_inputs(block, seen.residual, layer, lambda inputs: inputs[0][0])
            keep_inputs(block.self_attn, seen.attention, layer, tuple)
            if block.sparse:
                handles.append(block.mlp.gate.register_forward_hook(
                    lambda _, inputs, output, layer=layer: seen.routes.update({layer: output})))
        keep_inputs(model.model.norm, seen.residual, len(model.model.layers), lambda inputs: inputs[0][0])
        logits = model(torch.tensor([ids], device=model.lm_head.weight.device)).logits[0]      # (T, V)
    finally:
        for handle in handles:
            handle.remove()
    seen.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return seen


def next_tokens(logits, k):
    """The k likeliest tokens of a distribution given by logits (V,): [(id, probability)], likeliest first."""
    values, ids = logits.softmax(-1).topk(min(k, len(logits)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def entropy(logits):
    """H_t = -Σ_v p_tv log2 p_tv of softmax(logits), in bits: 0 is certain, log2 V knows nothing. (T, V) → (T,)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1) / math.log(2)


def surprise(logits, ids):
    """-log2 p(ids[t+1] | ids[..t]), in bits: what each token but the first was worth. (T, V), T ids → (T - 1,)."""
    following = torch.tensor(ids[1:], dtype=torch.long, device=logits.device)[:, None]          # (T - 1, 1)
    return -logits[:-1].log_softmax(-1).gather(1, following)[:, 0] / math.log(2)


@torch.inference_mode()
def attention_map(model, seen, layer, head):
    """softmax(q kᵀ / sqrt(d)) of one query head: (T, S), row t says how token t divides its attention.

    S = k + T where an adapter puts k virtual tokens before the text (prompt or prefix tuning), else S = T.
    """
    attention = model.model.layers[layer].self_attn
    x, cos, sin, mask, cache = seen.attention[layer]
    _, T, _ = x.shape
    q = attention.q_norm(attention.q_proj(x).view(1, T, -1, attention.d))                      # (1, T, H, d)
    k = attention.k_norm(attention.k_proj(x).view(1, T, -1, attention.d))                      # (1, T, K, d)
    q, k = (rotate(part, cos, sin).transpose(1, 2).float() for part in (q, k))                 # (1, H or K, T, d)
    if cache is not None:                              # virtual tokens: their keys come first
        k = cache.update(layer, k, k)[0]                                                       # (1, K, S, d)
    H, K, S = q.shape[1], k.shape[1], k.shape[2]
    scores = q[0, head] @ k[0, head // (H // K)].T / math.sqrt(attention.d)                    # (T, S)
    seen_by = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if mask is None else mask
    return scores.masked_fill(~seen_by.reshape(T, S), float("-inf")).softmax(-1)


def router_choices(seen, layer):
    """What a layer's router did: (gates (T, k), experts (T, k), probabilities (T, E)), as model/moe.py `Router` says.

    UserError for a layer without experts.
    """
    if layer not in seen.routes:
        raise UserError(f"layer {layer} has no experts; layers with: {', '.join(map(str, seen.routes)) or 'none'}")
    return seen.routes[layer]


@torch.inference_mode()
def logit_lens(model, seen, position):
    """Logits (L + 1, V) that the model's own last norm and head make of the residual stream at one position.

    Row 0 reads the embedding, row n what layer n left behind; the last row is the model's answer.
    """
    stream = torch.stack([x[position] for _, x in sorted(seen.residual.items())])              # (L + 1, D)
    logits = model.lm_head(model.model.norm(stream))                                           # (L + 1, V)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
