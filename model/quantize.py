"""Weights in 8 or 4 bits: a quarter or an eighth of float32's memory, for weights that do not change any more.

    w ≈ level(code) · scale        one code of 8 or 4 bits per weight, one scale per block of weights

    int8   code = round(w / s) in -127 … 127     s = max |w| / 127 of an output row              8.0 bits per weight
    int4   code = round(w / s) in   -7 … 7       s = max |w| / 7 of 64 neighbours in a row       4.25
    nf4    the nearest of 16 levels to w / s     s = max |w| of 64 neighbours                    4.127

**NF4** (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) puts its levels where weights are: trained weights are roughly
normal, so the 16 levels are quantiles of the normal distribution, close together near 0, and each is used about equally
often. The float32 scales of blocks of 64 alone would cost half a bit per weight. **Double quantization** stores them in
8 bits, too: less their mean, in blocks of 256, which leaves 8/64 + 32/(64 · 256) = 0.127 bits.

Only codes and scales stay in memory. A product makes its weight from them, uses it and forgets it, and the derivative
makes it again: `FrozenProduct`. Codes do not change, so there is no gradient for them, but one flows through to the
input. That is QLoRA: adapters in full precision learn around a frozen base of 4 bits (model/adapters/).

Quantized are the linear layers and the experts of the decoder's blocks, where almost all weights are. The embedding and
the output head (tied to it or not) stay as they are, which is what rare tokens need, and so do norms and routers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.errors import UserError
from model.kernels import matmul_dtype, silu_mul
from model.moe import Experts, grouped_linear

GROUP = 64                # weights that share a scale (int4, nf4)
SCALES_GROUP = 256        # scales of nf4 that share a scale of their own

# Appendix E of the paper: with Φ⁻¹ the quantiles of the normal distribution and p₀ = 0.9677, the positive levels are
# Φ⁻¹(p) / Φ⁻¹(p₀) at 9 probabilities p evenly from p₀ to ½, the negative ones its negatives at 8; both end at 0.
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], device="cpu")
INT4_LEVELS = torch.arange(-8.0, 8.0, device="cpu")       # code 0, which would be -8, is not used


# ------------------------------------------------------------------------------------------------ int8


def quantize_int8(weight):
    """weight (..., out, in) -> codes (..., out, in) int8 and scale (..., out, 1) float32."""
    weight = weight.float()
    scale = absmax(weight) / 127
    return {"codes": (weight / nonzero(scale)).round().to(torch.int8), "scale": scale}


def dequantize_int8(codes, scale, shape, dtype):
    return codes.float().mul_(scale).to(dtype)


def absmax(blocks):
    """The largest magnitude of each block: (..., n) -> (..., 1)."""
    return blocks.abs().amax(-1, keepdim=True)


def nonzero(scale):
    """A divisor for blocks of zeros."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)


# ------------------------------------------------------------------------------------------------ int4


def quantize_int4(weight, group=GROUP):
    """weight (..., out, in) -> codes (..., out, in / group, group / 2) uint8 and scale (..., in / group, 1) bfloat16.

    A row whose length no multiple of `group` is, is filled up with zeros. bfloat16 has the range of float32, and its
    coarse steps cost nothing: codes are chosen for the scale as it is stored.
    """
    blocks = F.pad(weight.float(), (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))  # (..., in/group, group)
    scale = (absmax(blocks) / 7).bfloat16()
    codes = (blocks / nonzero(scale).float()).round().clamp(-7, 7)
    return {"codes": pack((codes + 8).to(torch.uint8)), "scale": scale}


def dequantize_int4(codes, scale, shape, dtype):
    blocks = look_up(codes, INT4_PAIRS).mul_(scale.float())                      # (..., out, in / group, group)
    return blocks.flatten(-2)[..., :shape[-1]].to(dtype)


def pack(codes):
    """Two codes of 4 bits to a byte, the first one in its upper half: (..., n) -> (..., n / 2) uint8."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(packed):
    """Undo `pack`: (..., n / 2) -> (..., n) uint8."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


def pairs_of(levels):
    """The two float32 levels that each of the 256 bytes stands for, as one number of 64 bits: (256,) int64."""
    both = unpack(torch.arange(256, dtype=torch.uint8, device="cpu")[:, None])   # (256, 2) codes
    return levels[both.int()].view(torch.int64)[:, 0]


def look_up(packed, pairs):
    """The levels of packed codes, float32: (..., n / 2) -> (..., n). Both of a byte at once: three times as fast."""
    pairs = pairs.to(packed.device, non_blocking=True)
    return pairs.index_select(0, packed.flatten().int()).view(torch.float32).view(*packed.shape[:-1], -1)


INT4_PAIRS, NF4_PAIRS = pairs_of(INT4_LEVELS), pairs_of(NF4_LEVELS)


# ------------------------------------------------------------------------------------------------- nf4


def quantize_nf4(weight, group=GROUP):
    """weight, any shape -> codes (blocks, group / 2) uint8, and the double-quantized scales of the blocks.

    Blocks run through the whole tensor, row after row, as in bitsandbytes; the last one is filled up with zeros.
    """
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % group)).view(-1, group)
    scale = absmax(blocks)                                                       # (blocks, 1)
    codes = nearest(blocks * (1 / nonzero(scale)), NF4_LEVELS)
    return {"codes": pack(codes), **quantize_scales(scale.squeeze(1))}


def dequantize_nf4(codes, scale_codes, scale_scale, scale_mean, shape, dtype):
    scale = dequantize_scales(scale_codes, scale_scale, scale_mean)              # (blocks,)
    blocks = look_up(codes, NF4_PAIRS).mul_(scale[:, None])                      # (blocks, group)
    return blocks.view(-1)[:shape.numel()].view(shape).to(dtype)


def nearest(x, levels):
    """Index of the level nearest to each x, uint8: in how many of the intervals' middles does x exceed?"""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(x, middles.to(x.device), out_int32=True).to(torch.uint8)


def quantize_scales(scale):
    """Double quantization: scale (n,) float32 -> 8-bit codes (n,), scale of each SCALES_GROUP of them, their mean."""
    mean = scale.mean()
    blocks = F.pad(scale - mean, (0, -len(scale) % SCALES_GROUP)).view(-1, SCALES_GROUP)
    scale_scale = absmax(blocks)                                                 # (n / 256, 1)
    codes = nearest(blocks / nonzero(scale_scale), DYNAMIC_LEVELS)
    return {"scale_codes": codes.flatten()[:len(scale)].clone(), "scale_scale": scale_scale.squeeze(1),
            "scale_mean": mean}


def dequantize_scales(codes, scale_scale, mean):
    """Undo `quantize_scales`: (n,) float32."""
    fractions = DYNAMIC_LEVELS.to(codes.device, non_blocking=True)[codes.int()]
    return fractions * scale_scale.repeat_interleave(SCALES_GROUP)[:len(codes)] + mean


def dynamic_levels():
    """The 256 numbers of the dynamic 8-bit format (Dettmers et al. 2021, arXiv:2110.02861, section 1.3), ascending.

    ±10^(i-6) times 2^i evenly spaced fractions, i = 0 … 6: a wide range, and the more precise the larger; then 0 and 1.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        positive += (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([*positive, *(-level for level in positive), 0.0, 1.0]), device="cpu")


DYNAMIC_LEVELS = dynamic_levels()


# --------------------------------------------------------------------------- products with packed weights

FORMATS = {"int8": (quantize_int8, dequantize_int8), "int4": (quantize_int4, dequantize_int4),
           "nf4": (quantize_nf4, dequantize_nf4)}


def product(x, weight, ends):
    """x (..., in) times weight (out, in); with `ends` of E experts (model/moe.py), weight is a stack (E, out, in)."""
    return F.linear(x, weight) if ends is None else grouped_linear(x, weight, ends)


class FrozenProduct(Function):
    """y = x Wᵀ,  dx = g W. W exists while it is needed: what is kept for the derivative are the packed parts."""

    @staticmethod
    def forward(ctx, x, ends, kind, shape, parts):
        ctx.save_for_backward(ends, *parts)
        ctx.kind, ctx.shape = kind, shape
        return product(x, FORMATS[kind][1](*parts, shape, x.dtype), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ends, *parts = ctx.saved_tensors
        weight = FORMATS[ctx.kind][1](*parts, ctx.shape, g.dtype)
        return product(g, weight.mT, ends), None, None, None, None


class PackedWeight(nn.Module):
    """A frozen weight (out, in), or a stack of E of them, as codes and scales.

    They are no part of the state dict: whoever needs them again quantizes the same checkpoint again.
    """

    def __init__(self, weight, kind):
        super().__init__()
        self.kind, self.shape = kind, weight.shape
        quantize, _ = FORMATS[kind]
        with torch.no_grad():
            parts = quantize(weight)
        self.names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    def _apply(self, fn, recurse=True):
        """`model.to(bfloat16)` moves the scales and must not round them."""
        before = self.parts()
        super()._apply(fn, recurse)
        for name, part in zip(self.names, before, strict=True):
            setattr(self, name, part.to(getattr(self, name).device))
        return self

    def parts(self):
        return [getattr(self, name) for name in self.names]

    def dequantize(self, dtype=torch.float32):
        return FORMATS[self.kind][1](*self.parts(), self.shape, dtype)

    def forward(self, x, ends=None):
        """x (..., in) -> (..., out) in the format of matrix products; ends: see `product`."""
        return FrozenProduct.apply(x.to(matmul_dtype(x)), ends, self.kind, self.shape, self.parts())


class QuantizedLinear(nn.Module):
    """nn.Linear with a packed weight. The bias is as it was."""

    def __init__(self, weight, kind, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed, self.bias = PackedWeight(weight, kind), bias

    def dequantize(self, dtype=torch.float32):
        """The weight (out, in) that this layer multiplies with."""
        return self.packed.dequantize(dtype)

    def forward(self, x):
        y = self.packed(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.kind}"


class QuantizedExperts(nn.Module):
    """The stacked experts of a mixture (`model.moe.Experts`) with PackedWeights."""

    def __init__(self, gate_proj, up_proj, down_proj):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x, ends):
        return self.down_proj(silu_mul(self.gate_proj(x, ends), self.up_proj(x, ends)), ends)


# -------------------------------------------------------------------------------------- a whole model


def quantize_model(model, kind, read=None):
    """Replace, in place, the linear layers and experts of a CausalLM's blocks; returns the model. "none" does nothing.

    read(name) -> the weight of that name; default: the model's own. One after the other, so that `load_model` can read
    them from a file as they are needed, and a float copy of the model never exists.
    """
    if kind == "none":
        return model
    if kind not in FORMATS:
        raise UserError(f"--quantize {kind}: expected none, {', '.join(FORMATS)}")
    read = read or model.get_parameter
    wanted = [name for name, module in model.model.layers.named_modules(prefix="model.layers")
              if isinstance(module, nn.Linear | Experts)]
    for name in wanted:
        old = model.get_submodule(name)
        if isinstance(old, nn.Linear):
            new = QuantizedLinear(read(f"{name}.weight"), kind, old.bias)
        else:
            new = QuantizedExperts(*(PackedWeight(read(f"{name}.{projection}"), kind)
                                     for projection in ("gate_proj", "up_proj", "down_proj")))
        model.set_submodule(name, new.train(old.training))
    return model


def packed_weights(model):
    """The packed weights of a model, {name: PackedWeight}; empty when nothing is quantized."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def unpacked_bytes(model):
    """Bytes that the largest packed weight takes while it is used: levels (4 each), indices (2), 16-bit weight (2)."""
    return 8 * max((packed.shape.numel() for packed in packed_weights(model).values()), default=0)
