"""Quantization against bitsandbytes and torchao, byte by byte where they store bytes; QLoRA against LoRA on the same
weights; and that packed weights stay packed: while loading, between forward and backward pass, and on the disk."""

import dataclasses
import json
import weakref
from pathlib import Path

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from eval import eval_loss
from model import quantize
from model.adapters.folder import AdapterConfig, attach
from model.checkpoint import load_causal_lm, load_model, load_reward_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.moe import MoE, routers, update_router_bias
from model.quantize import FORMATS, PackedWeight, QuantizedLinear, packed_weights, quantize_model
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, count_parameters
from tests.conftest import killed_after
from tests.ranks_worker import run_job
from tests.test_ranks import together
from trainer import preflight, train_full_sft
from trainer.optim import build_optimizers
from trainer.state import tensors_of

KINDS = ("int8", "int4", "nf4")
DENSE = ModelConfig(vocab_size=Tokenizer.load("nano").vocab_size, hidden_size=64, intermediate_size=96,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
MIXTURE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router="sigmoid",
                              num_shared_experts=1, aux_loss_coef=1e-4)
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0, size=0.02):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(weight, kind, dtype=torch.float32):
    parts = FORMATS[kind][0](weight)
    return FORMATS[kind][1](*parts.values(), weight.shape, dtype)


def born(config=DENSE, seed=0):
    torch.manual_seed(seed)
    return CausalLM(config).eval()


def stored_bytes(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def refusal(action, *args, **kwargs):
    """The message of the UserError that action raises: one line."""
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------- NF4


def test_levels_are_the_quantiles_that_the_paper_asks_for():
    def quantiles(n):
        p = torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)
        return torch.special.ndtri(p)[:-1]

    levels = torch.cat((-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9).flip(0)))
    assert torch.allclose(quantize.NF4_LEVELS.double(), levels / levels[-1], rtol=0, atol=1e-6)
    assert torch.equal(quantize.NF4_LEVELS, bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(quantize.DYNAMIC_LEVELS, bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (37, 50), (3, 43), (5, 16, 24)])
@pytest.mark.parametrize("spread", [False, True])
def test_nf4_stores_the_bytes_of_bitsandbytes(shape, spread):
    weight = normal(*shape)
    if spread:                                                   # rows of many sizes, and one of zeros
        weight = weight * torch.logspace(-6, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
        weight[0] = 0
    parts = quantize.quantize_nf4(weight)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(parts["codes"].flatten()[:len(packed)], packed.flatten())
    assert torch.equal(parts["scale_scale"], state.state2.absmax) and torch.equal(parts["scale_mean"], state.offset)
    # 8-bit codes of scales: its kernel for CPUs takes a short cut, not always to the nearest; its plain one does not
    _, plain = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise(
        (plain.absmax - plain.absmax.mean()).double(), quantize.DYNAMIC_LEVELS, 256)
    assert torch.equal(parts["scale_codes"], codes)
    assert (parts["scale_codes"].int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_reads_what_bitsandbytes_wrote(dtype):
    """In rows of whole blocks: in others, its kernel for CPUs (0.50) takes the scales of other blocks."""
    weight = normal(96, 192).to(dtype)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize.dequantize_nf4(packed.view(-1, 32), state.absmax, state.state2.absmax, state.offset, weight.shape,
                                   dtype)
    assert torch.equal(ours, bitsandbytes.dequantize_4bit(packed, state))


def test_double_quantization_costs_an_eighth_of_a_bit_and_little_precision():
    scale = normal(64 * 256).abs() + 0.05
    parts = quantize.quantize_scales(scale)
    assert sum(part.nbytes for part in parts.values()) * 8 / (64 * len(scale)) == pytest.approx(0.127, abs=0.0005)
    error = (quantize.dequantize_scales(*parts.values()) - scale).abs()
    largest_gap = quantize.DYNAMIC_LEVELS.diff().max()
    assert (error <= largest_gap / 2 * parts["scale_scale"].repeat_interleave(256) + 1e-8).all()
    assert parts["scale_mean"] == scale.mean()


# ---------------------------------------------------------------------------------------------- int8 and int4


@pytest.mark.parametrize("kind, block, most, scale_dtype", [("int8", 192, 127, torch.float32),
                                                            ("int4", 64, 7, torch.bfloat16)])
def test_integers_are_those_of_torchao(kind, block, most, scale_dtype):
    weight = normal(48, 192)
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, (1, block), torch.int8, -most, most,
                                        scale_dtype=scale_dtype, zero_point_dtype=torch.int32)
    codes = quantize_affine(weight, (1, block), scale.float(), zero, torch.int8, -most, most)
    parts = FORMATS[kind][0](weight)
    assert torch.equal(parts["scale"].flatten(), scale.flatten())
    ours = parts["codes"] if kind == "int8" else quantize.unpack(parts["codes"]).flatten(-2).to(torch.int8) - 8
    assert torch.equal(ours, codes)
    assert torch.equal(there_and_back(weight, kind),
                       dequantize_affine(codes, (1, block), scale.float(), zero, torch.int8, -most, most))


def test_a_row_by_hand():
    assert there_and_back(torch.tensor([[254.0, -100.0, 1.1, 0.9]]), "int8").tolist() == [[254.0, -100.0, 2.0, 0.0]]
    parts = quantize.quantize_int4(torch.tensor([[14.0, -14.0, 2.9, 3.1, 0.0]]))
    assert parts["scale"].flatten().tolist() == [2.0]
    assert parts["codes"].flatten()[:3].tolist() == [0xF1, 0x9A, 0x88]       # 7 -7, 1 2, 0 and the padding; + 8 each


def test_two_codes_to_a_byte_the_first_in_the_upper_half():
    codes = torch.arange(16, dtype=torch.uint8)
    assert quantize.pack(codes).tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert torch.equal(quantize.unpack(quantize.pack(codes)), codes)


# ------------------------------------------------------------------------------------------------ all three


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 192), (37, 50), (1, 1), (3, 20, 33)])
def test_what_is_quantized_stays_what_it_is(kind, shape):
    weight = normal(*shape)
    once = FORMATS[kind][0](weight)
    again = FORMATS[kind][0](FORMATS[kind][1](*once.values(), weight.shape, torch.float32))
    assert torch.equal(once["codes"], again["codes"])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_huge_and_tiny_weights_finite(kind):
    assert there_and_back(torch.zeros(8, 64), kind).eq(0).all()
    for size in (1e-30, 1e30):
        weight = normal(8, 64, size=size)
        assert (there_and_back(weight, kind) - weight).abs().max() <= 0.4 * weight.abs().max()
    assert there_and_back(normal(8, 64), kind, torch.bfloat16).dtype == torch.bfloat16


def test_error_is_as_small_as_the_bits_allow():
    """Root of the mean square over that of the weights, N(0, 1). Uniform steps s add an error of s / √12."""
    weight = normal(512, 512, size=1)
    errors = {kind: (there_and_back(weight, kind) - weight).square().mean().sqrt().item() for kind in KINDS}
    assert errors["int8"] < errors["nf4"] < errors["int4"]
    row_step = weight.abs().amax(1).square().mean().sqrt().item() / 127
    assert errors["int8"] == pytest.approx(row_step / 12**0.5, rel=0.05)
    group_step = weight.view(-1, 64).abs().amax(1).square().mean().sqrt().item() / 7
    assert errors["int4"] == pytest.approx(group_step / 12**0.5, rel=0.05)


@pytest.mark.parametrize("kind, bits", [("int8", 8 + 32 / 1024), ("int4", 4 + 16 / 64),
                                        ("nf4", 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_weight_are_those_on_paper(kind, bits):
    packed = PackedWeight(normal(512, 1024), kind)
    mean = 32 / packed.shape.numel() if kind == "nf4" else 0     # one number for the whole tensor
    stored = sum(part.nbytes for part in packed.parts()) * 8
    assert stored / packed.shape.numel() == pytest.approx(bits + mean, rel=1e-9)


# ---------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 64), (33, 50)])
def test_a_layer_is_the_dense_layer_with_the_dequantized_weight(kind, shape):
    dense = torch.nn.Linear(shape[1], shape[0])
    layer = QuantizedLinear(dense.weight.detach(), kind, dense.bias)
    dense.weight.data = layer.dequantize()
    assert (layer.in_features, layer.out_features) == (shape[1], shape[0])
    x, g = normal(2, 5, shape[1], size=1).requires_grad_(), normal(2, 5, shape[0], size=1, seed=1)
    ours, = torch.autograd.grad(layer(x), x, g)
    theirs, = torch.autograd.grad(dense(x), x, g)
    assert torch.allclose(layer(x), dense(x), atol=1e-6) and torch.allclose(ours, theirs, atol=1e-6)
    assert torch.autograd.gradcheck(layer, x[:1, :2].detach().double().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_only_packed_bytes_are_kept_for_the_backward_pass(kind, monkeypatch):
    made = []

    def dequantize(*args, plain=FORMATS[kind][1]):
        weight = plain(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setitem(quantize.FORMATS, kind, (FORMATS[kind][0], dequantize))
    layers = torch.nn.Sequential(*(QuantizedLinear(normal(64, 64), kind) for _ in range(3)))
    x = normal(4, 64, size=1).requires_grad_()
    y = layers(x)
    assert len(made) == 3 and not any(ref() is not None for ref in made)
    y.sum().backward()
    assert len(made) == 6 and not any(ref() is not None for ref in made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_bfloat16_autocast_is_finite_and_near(kind, config):
    model = quantize_model(born(config), kind)
    plain = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(IDS)
    assert half.logits.isfinite().all() and (half.logits - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_does_not_round_its_scales(kind):
    layer = QuantizedLinear(normal(64, 64), kind, torch.nn.Parameter(torch.ones(64)))
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.dequantize(), before)
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_loading_quantizes_what_the_file_holds_and_computes_with_it(kind, config, tmp_path):
    save_model(tmp_path, born(config))
    loaded = load_causal_lm(tmp_path, quantize=kind)
    later = quantize_model(load_causal_lm(tmp_path), kind)
    assert packed_weights(loaded).keys() == packed_weights(later).keys() and not loaded.training
    assert torch.equal(loaded(IDS).logits, later(IDS).logits)
    plain, dense = load_causal_lm(tmp_path), load_causal_lm(tmp_path)
    for name, packed in packed_weights(loaded).items():              # the same model with dense weights
        own = name.removesuffix(".packed") + (".weight" if name.endswith(".packed") else "")
        dense.get_parameter(own).data = packed.dequantize()
    assert torch.allclose(loaded(IDS).logits, dense(IDS).logits, atol=1e-5)
    assert not torch.equal(plain(IDS).logits, dense(IDS).logits)
    prompts = [[5, 6, 7], [8, 9]]
    written = [generate(model, prompts, SamplingParams(max_new_tokens=6, temperature=0.0)) for model in (loaded, dense)]
    assert [[c.ids for c in row] for row in written[0]] == [[c.ids for c in row] for row in written[1]]


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_all_of_the_blocks_but_norms_and_routers_is_packed(config):
    model = born(config)
    total = count_parameters(model)
    embedding, norms = model.lm_head.weight, [p for p in model.parameters() if p.dim() == 1]
    gates = [router.weight for router in routers(model)]
    quantize_model(model, "nf4")
    assert model.lm_head.weight is embedding is model.model.embed_tokens.weight
    assert {id(p) for p in model.parameters()} == {id(p) for p in (embedding, *norms, *gates)}
    assert count_parameters(model) == total
    weights = sum(packed.shape.numel() for packed in packed_weights(model).values())
    assert weights == total[0] - sum(p.numel() for p in model.parameters())


def test_an_untied_head_stays_and_biases_too(tmp_path):
    hf = transformers.Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    oracle = transformers.Qwen2ForCausalLM(hf)
    for name, p in oracle.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    oracle.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, quantize="int8")
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert torch.equal(model.lm_head.weight, oracle.lm_head.weight)
    assert torch.equal(model.model.layers[1].self_attn.q_proj.bias, oracle.model.layers[1].self_attn.q_proj.bias)
    with torch.no_grad():
        difference = (model(IDS).logits - oracle(IDS).logits).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("config, matrices", [(DENSE, 2 * 7), (MIXTURE, 2 * (4 + 3 + 3))], ids=["dense", "mixture"])
def test_never_more_than_one_matrix_is_whole_while_loading(config, matrices, tmp_path, monkeypatch):
    save_model(tmp_path, born(config))
    seen = []

    def quantize_nf4(weight, plain=FORMATS["nf4"][0]):
        assert not any(ref() is not None for ref in seen), "an earlier matrix is still there"
        seen.append(weakref.ref(weight))
        return plain(weight)

    monkeypatch.setitem(quantize.FORMATS, "nf4", (quantize_nf4, FORMATS["nf4"][1]))
    load_causal_lm(tmp_path, quantize="nf4")
    assert len(seen) == matrices


def test_a_stored_bfloat16_model_is_quantized_alike_for_training_and_for_use(tmp_path):
    save_model(tmp_path, born(), dtype=torch.bfloat16)
    wide, narrow = (load_causal_lm(tmp_path, dtype=dtype, quantize="nf4") for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(packed_weights(wide).values(), packed_weights(narrow).values(), strict=True):
        assert all(torch.equal(*parts) for parts in zip(a.parts(), b.parts(), strict=True))


def test_a_reward_model_can_be_quantized(tmp_path):
    save_model(tmp_path, born(), Tokenizer.load("nano"))
    model, _ = load_reward_model(tmp_path, quantize="nf4")
    assert packed_weights(model) and isinstance(model.score, torch.nn.Linear)
    assert model(IDS).logits.isfinite().all()


def test_bad_names_and_saving_are_one_line(tmp_path):
    save_model(tmp_path / "a", born(), Tokenizer.load("nano"))
    told = refusal(load_model, tmp_path / "a", quantize="fp4")
    assert "fp4" in told and "int8, int4, nf4" in told
    assert "--quantize" in refusal(save_model, tmp_path / "b", quantize_model(born(), "int8"))
    assert not (tmp_path / "b").exists()


def test_an_evaluation_of_a_quantized_model(documents, tmp_path):
    save_model(tmp_path / "a", born(), Tokenizer.load("nano"))
    losses = {}
    for kind in ("none", *KINDS):
        eval_loss.main(eval_loss.Config(model=str(tmp_path / "a"), data=str(documents), device="cpu", dtype="float32",
                                        quantize=kind, out=str(tmp_path / kind)))
        losses[kind] = (tmp_path / kind).read_text(encoding="utf-8")
    assert len(set(losses.values())) == 4


# ------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("kind", KINDS)
def test_experts_compute_and_pass_gradients_as_dense_ones(kind):
    torch.manual_seed(0)
    dense, packed = MoE(MIXTURE), MoE(MIXTURE)
    packed.load_state_dict(dense.state_dict())
    holder = torch.nn.Module()
    holder.model = torch.nn.Module()
    holder.model.layers = torch.nn.ModuleList([packed])
    quantize_model(holder, kind)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(dense.experts, name).data = getattr(packed.experts, name).dequantize()
        getattr(dense.shared_experts, name).weight.data = getattr(packed.shared_experts, name).dequantize()
    x = normal(2, 9, 64, size=1).requires_grad_()
    (y, aux), (y2, aux2) = dense(x), packed(x)
    g = normal(*y.shape, seed=1)
    assert torch.allclose(y, y2, atol=1e-6) and torch.equal(aux, aux2)
    assert torch.allclose(*(torch.autograd.grad(out, x, g)[0] for out in (y, y2)), atol=1e-6)
    assert torch.equal(dense.gate.load, packed.gate.load) and packed.gate.load.sum() > 0
    for moe in (dense, packed):
        update_router_bias(moe)
    assert torch.equal(dense.gate.e_score_correction_bias, packed.gate.e_score_correction_bias)


# --------------------------------------------------------------------------------------------------- QLoRA


def dequantized(model):
    """The same model with dense layers in place of packed ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight.data = module.dequantize()
            dense.bias = module.bias
            model.set_submodule(name, dense)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_gradients_are_those_of_lora_on_the_dequantized_base(kind, family, tmp_path):
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1)
    hf = getattr(transformers, f"{family}Config")(**shape)
    getattr(transformers, f"{family}ForCausalLM")(hf).save_pretrained(tmp_path)
    gradients = []
    for model in (load_causal_lm(tmp_path, quantize=kind), dequantized(load_causal_lm(tmp_path, quantize=kind))):
        torch.manual_seed(0)
        attach(model, AdapterConfig(rank=4))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        model(IDS).logits.log_softmax(-1)[..., 3].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2 and all("lora_" in name for name in ours)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def qlora(parent, chats, out, **changes):
    cfg = train_full_sft.Config(**{**dict(
        model=str(parent), data=str(chats), out=str(out), lora_rank=4, quantize="nf4", max_len=48, batch_size=8,
        max_steps=6, log_every=1, eval_every=0, sample_every=0, save_every=0, warmup_steps=2, lr=1e-2, device="cpu"),
        **changes})
    return train_full_sft.main(cfg)


def test_training_continues_exactly_and_saves_no_packed_weight(chats, tmp_path):
    save_model(tmp_path / "parent", born(), Tokenizer.load("nano"))
    whole = qlora(tmp_path / "parent", chats, tmp_path / "whole", max_steps=20)
    assert whole["held_out"]["loss"] < 6.7                       # from ln V = 6.93

    with killed_after(9):
        qlora(tmp_path / "parent", chats, tmp_path / "killed", max_steps=20, save_every=5)
    qlora(tmp_path / "parent", chats, tmp_path / "killed", max_steps=20, save_every=5)
    whole, killed = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    saved = sum(path.stat().st_size for path in (tmp_path / "killed").rglob("*.safetensors"))
    assert saved < 0.25 * (tmp_path / "parent" / "model.safetensors").stat().st_size


def test_two_ranks_train_what_one_does_copied_and_sharded(chats, tmp_path):
    save_model(tmp_path / "parent", born(MIXTURE), Tokenizer.load("nano"))

    def job(how):
        flags = dict(model=str(tmp_path / "parent"), data=str(chats), out=str(tmp_path / how), lora_rank=4,
                     quantize="nf4", max_len=48, batch_size=7, micro_batch_size=2, max_steps=3, eval_every=2,
                     eval_rows=5, save_every=2, log_every=1, warmup_steps=2, device="cpu", dtype="float64",
                     optimizer="adamw", parallel="fsdp" if how == "fsdp" else "ddp")
        return dict(name=how, script="train_full_sft", flags=flags)

    one = run_job(tmp_path, **job("alone"))
    kept = together(tmp_path, [job("ddp"), job("fsdp")])
    for how in ("ddp", "fsdp"):
        first, second = kept[how]
        assert torch.equal(first["weights"], second["weights"])
        assert torch.allclose(first["weights"], one["weights"], rtol=0, atol=1e-9)
        for a, b in zip(first["gradients"], one["gradients"], strict=True):
            assert (a - b).norm() <= 1e-8 * b.norm()


def test_memory_and_disk_are_counted_as_they_are(chats, tmp_path, monkeypatch):
    save_model(tmp_path, born(), Tokenizer.load("nano"))
    model = load_causal_lm(tmp_path, quantize="nf4")
    attach(model, AdapterConfig(rank=4))
    cfg = train_full_sft.Config(optimizer="adamw")
    optimizers = build_optimizers(model, cfg)
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    lasting = preflight.lasting_bytes(model, optimizers)
    assert lasting == {"weights": stored_bytes(model), "gradients": adapter, "optimizer": 2 * adapter}
    packed = sum(weight.shape.numel() for weight in packed_weights(model).values())
    assert lasting["weights"] < stored_bytes(load_causal_lm(tmp_path)) - 3.4 * packed + adapter
    assert sum(tensor.nbytes for tensor in tensors_of(model).values()) == adapter
    assert not [name for name in model.state_dict() if "packed" in name]

    need = 2 * adapter + 2 * (adapter + 2 * adapter)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: transformers.utils.ModelOutput(free=need))
    preflight.check_disk(cfg, tmp_path, model, optimizers)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: transformers.utils.ModelOutput(free=need - 1))
    refusal(preflight.check_disk, cfg, tmp_path, model, optimizers)


def test_a_whole_model_of_few_bits_is_not_trained(chats, tmp_path):
    save_model(tmp_path / "parent", born(), Tokenizer.load("nano"))
    told = refusal(qlora, tmp_path / "parent", chats, tmp_path / "out", lora_rank=0)
    assert "--lora_rank" in told and not (tmp_path / "out").exists()


SHAPES = {      # of published models: width, width of the MLP, layers, heads, key-value heads, vocabulary, tied
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "Qwen2.5-7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}


def memory_table(rank=16):
    """Lines for trainer/README.md: bytes of weights, gradients and moments, without activations."""
    yield "| | parameters | all weights | LoRA | QLoRA, NF4 | of it blocks |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, (width, inner, layers, heads, kv_heads, vocabulary, tied) in SHAPES.items():
        config = ModelConfig(vocabulary, width, inner, layers, heads, kv_heads, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = CausalLM(config)
            total = sum(p.numel() for p in model.parameters())
            packed = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
            attach(model, AdapterConfig(rank=rank))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapter = (4 + 4 + 8) * trained
        blocks = packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8
        lora, qlora = 4 * total + 2 * packed + adapter, blocks + 4 * (total - packed) + adapter
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (16 * total, lora, qlora, blocks))
        yield f"| {name} | {total / 1e9:.2f}B | {sizes} |"


def test_the_table_of_memory_in_the_trainer_chapter_is_the_arithmetic():
    page = (Path(quantize.__file__).parents[1] / "trainer" / "README.md").read_text(encoding="utf-8").splitlines()
    for line in memory_table():
        assert line in page, line


def test_the_figures_of_the_run_by_hand_agree_with_the_paper():
    results = json.loads((Path(__file__).parent / "results" / "qlora.json").read_text(encoding="utf-8"))
    for family in ("Llama", "Qwen2"):
        assert results[family]["gradients"] <= 1e-5
        for phase in ("loading", "training"):
            for kind in ("none", "nf4"):
                found = results[family][kind][phase]
                assert found["measured"] == pytest.approx(found["paper"], rel=0.15)
