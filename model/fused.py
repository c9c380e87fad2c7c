"""A copy of a decoder's weights that writes quickly: for sampling only, filled anew whenever the model has learnt.

    fused = FusedLM(model, torch.bfloat16)      then generate(fused, prompts, …), as with the model itself
    fused.refresh()                             after the model has changed

It computes what the model computes under autocast: products of matrices in `dtype`, the residual stream, norms and
angles in the format of the model. What is saved lies around the products:
  - weights are cast once and not by autocast again and again; adapters are merged, which saves two products each;
  - q, k and v are one product, gate and up another; one norm and one rotation serve all heads of q and k;
  - on a CPU, weights of 16 bits lie in memory as its matrix units read them (see `pack`).
The embedding, the norms and the experts of a mixture stay the model's own modules.
"""

import torch
import torch.nn.functional as F

from model.adapters.adapted import Adapted, holders, merged_layer
from model.adapters.lora import dense_weight
from model.errors import UserError
from model.kernels import attention, turn, wide
from model.transformer import Output, attention_mask_for

HALVES = (torch.bfloat16, torch.float16)


def pack(weight):
    """weight (out, in), on a CPU in bfloat16 laid out as oneDNN's kernels read it; elsewhere as it is.

    Otherwise every product begins with laying out the whole weight anew, and for few rows that is half of its time.
    """
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    if not (fits and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def rms_normed(x, norm):
    """What the RMSNorm module `norm` makes of x, without what its derivative would need."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def merged(layer):
    """A linear layer with the adapter that is in use on it added to its weight."""
    if not isinstance(layer, Adapted):
        return layer
    return merged_layer(layer, {layer.active: 1.0}) if layer.active else layer.base_layer


class Fused:
    """Linear layers with the same input, as one layer. It holds no weights before the first `refresh`."""

    def __init__(self, *layers):
        self.layers, self.weight, self.bias = layers, None, None

    def refresh(self, dtype):
        layers = [merged(layer) for layer in self.layers]
        biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]
        self.weight = pack(torch.cat([dense_weight(layer).to(dtype) for layer in layers]))
        self.bias = torch.cat(biases) if biases else None

    def __call__(self, x):
        x = x.to(self.weight.dtype)
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class FusedBlock:
    """`model.transformer.Block`, the same arithmetic in fewer steps."""

    def __init__(self, block, config):
        own, mlp = block.self_attn, block.mlp
        self.block, self.config = block, config
        self.qkv, self.out = Fused(own.q_proj, own.k_proj, own.v_proj), Fused(own.o_proj)
        self.gate_up, self.down = (None, None) if block.sparse else (Fused(mlp.gate_proj, mlp.up_proj),
                                                                     Fused(mlp.down_proj))

    def refresh(self, dtype):
        for part in (self.qkv, self.out, self.gate_up, self.down):
            if part is not None:
                part.refresh(dtype)
        own, H, K = self.block.self_attn, self.config.num_attention_heads, self.config.num_key_value_heads
        if self.config.qk_norm:
            self.gain = torch.cat((own.q_norm.weight.expand(H, -1), own.k_norm.weight.expand(K, -1)))     # (H + K, d)

    def __call__(self, x, cos, sin, mask, cache, real):
        x = x + self.attend(rms_normed(x, self.block.input_layernorm), cos, sin, mask, cache)
        h = rms_normed(x, self.block.post_attention_layernorm)
        if self.block.sparse:
            return x + self.block.mlp(h, real)[0]
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return x + self.down(F.silu(gate).mul_(up))

    def attend(self, x, cos, sin, mask, cache):
        (B, T, _), H, K = x.shape, self.config.num_attention_heads, self.config.num_key_value_heads
        heads = self.qkv(x).view(B, T, H + 2 * K, -1)                             # (B, T, H + 2K, d)
        qk, v = heads.split((H + K, K), dim=2)
        if self.config.qk_norm:
            eps = self.config.rms_norm_eps
            qk = (F.rms_norm(wide(qk), qk.shape[-1:], None, eps) * self.gain).to(v.dtype)
        qk = turn(wide(qk), cos, sin).to(v.dtype).transpose(1, 2)                 # (B, H + K, T, d)
        q, k = qk.split((H, K), dim=1)
        k, v = cache.update(self.block.self_attn.layer, k, v.transpose(1, 2))     # (B, K, S, d)
        out = attend_once(q, k, v, mask) if T == 1 and x.device.type != "cpu" else attention(q, k, v, mask)
        return self.out(out.transpose(1, 2).reshape(B, T, -1))


def attend_once(q, k, v, mask):
    """`attention` of a single new token, q (B, H, 1, d). The query heads that share a key/value head become queries of
    one head: on a GPU no kernel that takes a mask knows grouped heads, and all keys would be repeated for each."""
    B, H, _, d = q.shape
    q = q.reshape(B, k.shape[1], -1, d)                                           # (B, K, H/K, d)
    return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, H, 1, d)


class FusedLM:
    """A CausalLM to sample from, its products in `dtype`; for `generate` it is one. No gradients, no loss.

    Its weights are those that the model had at the last `refresh`. Raises UserError where an adapter that is in use
    cannot be merged into weights.
    """

    def __init__(self, model, dtype):
        if not can_fuse(model):
            raise UserError(f"--rollout_dtype {str(dtype).removeprefix('torch.')}: the adapter of this model is no "
                            "change of weights, which a copy for sampling could hold; use --rollout_dtype auto")
        self.model, self.config, self.dtype = model, model.config, dtype
        self.blocks = [FusedBlock(block, model.config) for block in model.model.layers]
        self.lm_head = Fused(model.lm_head)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Take over the model's weights as they are now."""
        for part in (*self.blocks, self.lm_head):
            part.refresh(self.dtype)

    def autocast(self):
        """The context in which the experts of a mixture, too, compute in `dtype`, whatever holds outside."""
        return torch.autocast(self.lm_head.weight.device.type, self.dtype if self.dtype in HALVES else None,
                              enabled=self.dtype in HALVES)

    def __call__(self, ids, attention_mask=None, positions=None, cache=None, head=None):
        """As `CausalLM.forward`, with a cache."""
        decoder, T, past = self.model.model, ids.shape[1], cache.length
        real = None if attention_mask is None else attention_mask[:, past:].bool()               # (B, T)
        if positions is None:
            positions = (torch.arange(past, past + T, device=ids.device)[None] if attention_mask is None
                         else (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:])
        mask = attention_mask_for(T, past, ids.device, attention_mask, None, self.config.sliding_window)
        cos, sin = decoder.rotation(positions)
        x = decoder.embed_tokens(ids)                                                            # (B, T, D)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache, real)
        cache.advance(T)
        x = rms_normed(x, decoder.norm)
        return Output(self.lm_head(x) if head is None else head(x, self.lm_head), None)

    # whether it is in training is the model's own affair: its experts count their tokens there

    @property
    def training(self):
        return self.model.training

    def train(self):
        self.model.train()

    def eval(self):
        self.model.eval()


def can_fuse(model):
    """Whether all adapters in use are changes of weights: LoRA and its kin, not virtual tokens or added layers."""
    active = [(holder, holder.adapters[holder.active]) for holder in holders(model).values() if holder.active]
    return all(isinstance(holder, Adapted) and hasattr(adapter, "delta") for holder, adapter in active)
