"""The decoder, in the order of a lecture: norm → rotary positions → attention → MLP → block → language model.

One token stream in, one distribution over the next token out:

    h = E[ids];   for each layer:  h += Attention(RMSNorm(h));  h += SwiGLU(RMSNorm(h));   logits = W · RMSNorm(h)

It is the architecture of Llama, Mistral, Qwen2 and Qwen3 (and, with model/moe.py, Qwen3-MoE and Dots1), with their
parameter names, so that a checkpoint of theirs is a checkpoint of ours and the other way round.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.kernels import attention, has_flex, rms_norm, rotate, segment_blocks, silu_mul
from model.moe import MoE
from model.quantize import packed_weights


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension, inside in float32 or more (arXiv:1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


# ------------------------------------------------------------------------------------- rotary positions


def rope_frequencies(config):
    """Rotation speed of each pair of dimensions, (d/2,), and the factor on cos and sin.

    Plain RoPE (arXiv:2104.09864, eq. 15): theta_i = b^(-2i/d). Scaling stretches a trained context of L0 tokens by s:
    linear slows every pair by s; Llama-3 and YaRN (arXiv:2309.00071, section 3.2) keep fast pairs, which tell near
    tokens apart, and slow only the pairs that turn less than about once within L0.
    """
    d, base = config.head_dim, config.rope_theta
    # In float32 and in this order, as published models were trained: at position 30000 the last bit counts.
    theta = 1.0 / base ** (torch.arange(0, d, 2).float() / d)                     # (d/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return theta, 1.0
    s = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return theta / s, 1.0

    L0 = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        turns = L0 * theta / (2 * math.pi)                                        # turns within the trained context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)                         # 1 = fast pair, left as it is
        return theta * keep + theta / s * (1 - keep), 1.0

    def pair_that_turns(n):                                                       # c(n): index of the pair, as a float
        return d * math.log(L0 / (2 * math.pi * n)) / (2 * math.log(base))

    lo, hi = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, d - 1)
    hi = hi if hi != lo else lo + 0.001
    ramp = ((torch.arange(d // 2).float() - lo) / (hi - lo)).clamp(0, 1)           # 1 = slow pair
    factor = scaling.get("attention_factor")
    if factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            factor = yarn_temperature(s, mscale) / yarn_temperature(s, mscale_all)
        else:
            factor = yarn_temperature(s)
    return theta * (1 - ramp) + theta / s * ramp, factor


def yarn_temperature(s, mscale=1.0):
    """0.1 · mscale · ln(s) + 1: cos and sin grow by it, attention logits by its square (YaRN, eq. 22)."""
    return 0.1 * mscale * math.log(s) + 1.0 if s > 1 else 1.0


# ------------------------------------------------------------------------------------------- attention


def attention_mask_for(T, past, device, padding=None, segment_ids=None, window=0):
    """Which of the S = past + T key slots each of the T queries may see: bool, broadcastable to (B, 1, T, S).

    Returns None where the mask is plainly causal with nothing cached (SDPA's own fast case), or where one new token
    sees everything. A query always sees itself, which keeps the softmax of a padding position finite.
    """
    if padding is None and segment_ids is None and not (window and past + T > window) and (past == 0 or T == 1):
        return None
    slots = torch.arange(past + T, device=device)                                 # (S,)
    queries = slots[past:, None]                                                  # (T, 1)
    mask = slots <= queries                                                       # (T, S) causal
    if window:      # counted in real tokens: padding between two tokens does not take them apart
        place = slots[None] if padding is None else padding.long().cumsum(1)      # (1 or B, S)
        mask = mask & (place[:, past:, None] - place[:, None, :] < window)[:, None]   # (1 or B, 1, T, S)
    if padding is not None:
        mask = mask & padding.bool()[:, None, None, :]                            # (B, 1, T, S) 1 = real token
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return mask | (slots == queries)


def slow_attention(q, k, v, mask=None):
    """softmax(q kᵀ / sqrt(d)) v, spelled out. q (B,H,T,d), k and v (B,K,S,d); mask as above, None = causal.

    The model calls torch's fused kernel instead; tests/test_transformer_oracle.py holds the two equal.
    """
    H, K, T, S = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))                   # (B, H, S, d): a kv head serves H/K
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                     # (B, H, T, S)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v                                                 # (B, H, T, d)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (GQA, arXiv:2305.13245): K key/value heads serve H query heads."""

    def __init__(self, config, layer):
        super().__init__()
        D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.d = layer, d
        self.q_proj = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.d))                    # (B, T, H, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.d))                    # (B, T, K, d)
        v = self.v_proj(x).view(B, T, -1, self.d)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)                                                     # (B, K, T, d)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                                 # (B, K, S, d)
        out = attention(q, k, v, mask)                                            # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down( silu(gate(x)) · up(x) )  (arXiv:2002.05202, eq. 6)."""

    def __init__(self, width, inner, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x += Attention(norm(x));  x += MLP(norm(x)). The residual stream x is only ever added to."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = config.num_experts > 0 and layer >= config.first_k_dense
        self.mlp = MoE(config) if self.sparse else SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x, cos, sin, mask, cache, real):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        h = self.post_attention_layernorm(x)
        if not self.sparse:
            return x + self.mlp(h), None
        out, aux = self.mlp(h, real)                                              # (B, T, D), (B,)
        return x + out, aux


# -------------------------------------------------------------------------------------- language model


class Decoder(nn.Module):
    """Embedding, the blocks, the final norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.activation_checkpointing = False        # keep only each block's input, compute the rest again for backward
        self.soft_prompt = None                      # virtual tokens before every text: model/adapters/soft_prompt.py
        theta, self.rope_factor = rope_frequencies(config)
        self.register_buffer("theta", theta, persistent=False)                    # (d/2,)

    def _apply(self, fn, recurse=True):
        """`model.to(bfloat16)` moves and casts everything; the rotation speeds must stay float32 to be right."""
        super()._apply(fn, recurse)
        self.theta = rope_frequencies(self.config)[0].to(self.theta.device)
        return self

    def rotation(self, positions):
        """cos and sin (B or 1, T, 1, d/2) of the rotary angles at positions (B or 1, T)."""
        with torch.autocast(positions.device.type, enabled=False):                # angles need float32
            angles = (positions[:, :, None].float() * self.theta)[:, :, None]     # (B or 1, T, 1, d/2)
            return angles.cos() * self.rope_factor, angles.sin() * self.rope_factor

    def forward(self, ids, attention_mask, segment_ids, positions, cache):
        (B, T), past = ids.shape, cache.length if cache is not None else 0
        real = None if attention_mask is None else attention_mask[:, past:].bool()    # (B, T)
        if segment_ids is not None:                                               # segment 0 is the padding of a row
            real = segment_ids > 0 if real is None else real & (segment_ids > 0)
        if positions is None:
            positions = (torch.arange(past, past + T, device=ids.device)[None] if attention_mask is None
                         else (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:])
        virtual = self.soft_prompt.size if self.soft_prompt is not None else 0
        x = self.embed_tokens(ids)                                                # (B, T, D)
        packed = segment_ids is not None and attention_mask is None and not self.config.sliding_window
        mask = (segment_blocks(segment_ids, virtual) if packed and ids.is_cuda and has_flex() else
                attention_mask_for(T, past, ids.device, attention_mask, segment_ids, self.config.sliding_window))
        if virtual:
            cache, mask, positions = self.soft_prompt.put_before(self, cache, mask, positions)
        cos, sin = self.rotation(positions)
        aux_losses = []
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, aux = checkpoint(block, x, cos, sin, mask, cache, real, use_reentrant=False)
            else:
                x, aux = block(x, cos, sin, mask, cache, real)
            if aux is not None:
                aux_losses.append(aux)
        if cache is not None:
            cache.advance(T)
        aux = torch.stack(aux_losses).mean(0) if aux_losses else x.new_zeros(B, dtype=torch.float32)
        return self.norm(x), aux


class Output(NamedTuple):
    logits: torch.Tensor      # (B, T, V), or whatever `head` made of the hidden states
    aux_loss: torch.Tensor    # (B,) balance loss of each row, averaged over MoE layers; 0 when dense


class CausalLM(nn.Module):
    """The decoder with a language-model head. `CausalLM(config)` is freshly initialised (see `init_weights`)."""

    fingerprint = ""          # of the folder its weights come from (model/checkpoint.py)
    adapters = {}             # name: AdapterConfig of what is attached (model/adapters/)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for every matrix; what writes into the residual stream starts smaller by sqrt(2 · layers).

        The 2L additions to the stream then leave its size independent of depth (GPT-2, section 2.3). Norm gains are
        1, biases 0. With tied embeddings of that size the first loss is ln V, a uniform guess.
        """
        std = self.config.initializer_range
        out_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=out_std if "o_proj" in name or "down_proj" in name else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, attention_mask=None, segment_ids=None, positions=None, cache=None, head=None):
        """Token ids (B, T) to `Output(logits (B, T, V), aux_loss (B,))`.

        attention_mask  (B, S) 1 = real token, over all S = cached + T slots; padding may stand left or right
        segment_ids     (B, T) rows packed with several texts: a token sees only its own segment
        positions       (B, T) rotary positions; default: the number of real tokens before
        cache           a model.generate.KVCache holding the slots before these T tokens; it is filled and advanced
        head            function(hidden (B, T, D), lm_head) whose result stands in place of the logits: a loss over
                        chunks of the vocabulary projection, or the last position only while generating
        """
        hidden, aux_loss = self.model(ids, attention_mask, segment_ids, positions, cache)
        logits = self.lm_head(hidden) if head is None else head(hidden, self.lm_head)
        return Output(logits, aux_loss)


def count_parameters(model):
    """(total, active): numbers of parameters held, and used by one token (embeddings once, k of the E experts)."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes.update({name: packed.shape.numel() for name, packed in packed_weights(model).items()})
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    config = model.config
    unused = experts * (1 - config.num_experts_per_tok / config.num_experts) if config.num_experts else 0
    return total, total - int(unused)
