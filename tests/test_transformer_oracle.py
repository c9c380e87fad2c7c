"""The decoder against transformers: every family, both directions, every rope scaling; and against itself."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.checkpoint import load_causal_lm, load_config, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import KVCache
from model.moe import routers
from model.transformer import CausalLM, attention_mask_for, rope_frequencies, slow_attention

GOLDENS = Path(__file__).parent / "goldens" / "hf457"
V, T = 64, 24
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
DOTS = dict(**SHAPE, **EXPERTS, n_routed_experts=4, n_shared_experts=2, routed_scaling_factor=2.5)
YARN = dict(rope_type="yarn", original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=0.2, high_freq_factor=1.5,
              original_max_position_embeddings=16)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama head_dim": transformers.LlamaConfig(**SHAPE, head_dim=12),
    "llama one kv head": transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "llama no gqa": transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": None}),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
    "mistral window": transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2 window": transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 biases": transformers.Qwen3Config(**SHAPE, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, norm_topk_prob=True),
    "qwen3_moe no norm": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, norm_topk_prob=False),
    "qwen3_moe k=1": transformers.Qwen3MoeConfig(**{**SHAPE, **EXPERTS, "num_experts_per_tok": 1}, num_experts=4),
    "qwen3_moe window": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=4, head_dim=16,
                                                    use_sliding_window=True, sliding_window=7),
    "dots1": transformers.Dots1Config(**DOTS, norm_topk_prob=True),
    "dots1 first dense": transformers.Dots1Config(**DOTS, norm_topk_prob=False, first_k_dense_replace=1),
    "dots1 k=1": transformers.Dots1Config(**{**DOTS, "num_experts_per_tok": 1}, norm_topk_prob=False),
    "yarn": transformers.LlamaConfig(**SHAPE, rope_parameters=dict(**YARN, factor=4.0, rope_theta=1e4)),
    "yarn qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, rope_parameters=dict(
        **YARN, factor=2.0, rope_theta=1e6, attention_factor=1.25, beta_fast=4.0, beta_slow=0.5)),
    "llama3": transformers.LlamaConfig(**SHAPE, rope_parameters=dict(**LLAMA3, rope_theta=5e5)),
    "linear": transformers.LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
}
IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomise(model):
    """Weights large enough that every part of the model moves the logits."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.normal(1.0 if "norm" in name else 0.0, 0.15, tensor.shape))
    return model.eval()


def from_oracle(config):
    return randomise(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def difference(ours, theirs, ids=IDS, **kwargs):
    a, b = ours(ids, **kwargs).logits, theirs(ids, **kwargs).logits
    assert b.std() > 0.3, "the logits are too small to compare anything"
    return (a - b).abs().max().item()


# --------------------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_in_both_directions(name, tmp_path):
    theirs = from_oracle(FAMILIES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_causal_lm(tmp_path / "theirs")
    assert difference(ours, theirs) < 1e-5

    save_model(tmp_path / "ours", ours)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert again.dtype == torch.float32
    assert type(again) is type(theirs) or name == "mistral"      # without a window a Mistral is a Llama
    assert difference(ours, again.eval()) < 1e-5
    assert load_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("kind", ["dense", "qk_norm", "softmax", "sigmoid", "yarn", "llama3"])
def test_a_model_born_here_opens_in_transformers(kind, tmp_path):
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64)
    moe = dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16)
    expected, changes = {
        "dense": ("LlamaForCausalLM", dict(qk_norm=False)),
        "qk_norm": ("Qwen3ForCausalLM", dict(tie_word_embeddings=False, head_dim=16)),
        "softmax": ("Qwen3MoeForCausalLM", moe),
        "sigmoid": ("Dots1ForCausalLM", dict(**moe, router="sigmoid", num_shared_experts=1, first_k_dense=1)),
        "yarn": ("Qwen3ForCausalLM", dict(rope_scaling=dict(YARN, factor=4.0))),
        "llama3": ("LlamaForCausalLM", dict(rope_scaling=LLAMA3, qk_norm=False)),
    }[kind]
    ours = randomise(CausalLM(ModelConfig(**shape, **changes)))
    save_model(tmp_path, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == expected
    assert difference(ours, theirs) < 1e-5
    assert difference(load_causal_lm(tmp_path), ours) == 0


@pytest.mark.parametrize("folder", sorted(GOLDENS.iterdir()), ids=lambda folder: folder.name)
def test_what_transformers_4_saved_loads(folder):
    expected = load_file(folder / "expected.safetensors")
    model = load_causal_lm(folder)
    assert (model(expected["ids"]).logits - expected["logits"]).abs().max() < 1e-5
    # What we would write says the same in transformers 4's own spelling.
    theirs, written = json.loads((folder / "config.json").read_text(encoding="utf-8")), model.config.to_hf()
    spelled_alike = {key for key in theirs if key in written} - {"max_window_layers", "sliding_window", "head_dim"}
    assert {"rope_theta", "model_type", "architectures", "tie_word_embeddings"} <= spelled_alike
    for key in spelled_alike - {"rope_scaling", "bos_token_id", "eos_token_id"}:
        assert written[key] == theirs[key], key
    scaling = {key: value for key, value in (theirs["rope_scaling"] or {}).items() if key != "type"} \
        if "rope_scaling" in theirs else {}
    assert written.get("rope_scaling", {}).items() >= scaling.items()


def test_at_far_positions_and_in_a_long_context():
    """Angles are positions times speeds: at position 30000 a last-bit difference in a speed would show."""
    theirs = from_oracle(transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 32768, "head_dim": 64}))
    ours = CausalLM(ModelConfig.from_hf(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    positions = torch.arange(30000, 30000 + T)[None]
    a, b = ours(IDS, positions=positions).logits, theirs(IDS, position_ids=positions.expand(2, -1)).logits
    assert (a - b).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------ rope scaling


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("s", [1, 2, 4, 16])
@pytest.mark.parametrize("options", [
    {}, dict(attention_factor=1.5), dict(beta_fast=16.0, beta_slow=2.0), dict(mscale=0.8, mscale_all_dim=0.4),
    dict(truncate=False), dict(L0=16), dict(L0=4), dict(L0=10**6), dict(L0=10**9)],
    ids=str)
def test_yarn_speeds_equal_transformers(base, d, s, options):
    options = dict(options)
    L0 = options.pop("L0", 2048)
    scaling = dict(rope_type="yarn", factor=float(s), original_max_position_embeddings=L0, **options)
    shape = {**SHAPE, "hidden_size": 4 * d, "max_position_embeddings": L0 * s}
    check_rope("yarn", transformers.LlamaConfig(**shape, rope_parameters={**scaling, "rope_theta": base}))


@pytest.mark.parametrize("kind, scaling", [
    ("linear", dict(factor=3.0)), ("llama3", LLAMA3), ("llama3", dict(LLAMA3, factor=32, low_freq_factor=1,
                                                                      high_freq_factor=4, L0=8192))], ids=str)
def test_other_speeds_equal_transformers(kind, scaling):
    scaling = dict(scaling, rope_type=kind)
    if "L0" in scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("L0")
    check_rope(kind, transformers.LlamaConfig(**{**SHAPE, "hidden_size": 256},
                                              rope_parameters={**scaling, "rope_theta": 5e5}))


def check_rope(kind, config):
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config)
    speeds, factor = rope_frequencies(ModelConfig.from_hf(config.to_dict()))
    torch.testing.assert_close(speeds, expected, atol=0, rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-6)


@pytest.mark.parametrize("scaling", [dict(YARN, factor=4.0), dict(YARN, factor=2.0, attention_factor=1.1), LLAMA3,
                                     dict(rope_type="linear", factor=2.0)], ids=lambda s: s["rope_type"])
def test_every_spelling_of_rope_scaling_is_read_alike(scaling):
    hf = {**SHAPE, "model_type": "llama"}
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    configs = [
        ModelConfig.from_hf({**hf, "rope_theta": 5e5, "rope_scaling": scaling}),
        ModelConfig.from_hf({**hf, "rope_theta": 5e5, "rope_scaling": old}),
        ModelConfig.from_hf({**hf, "rope_theta": 5e5, "rope_scaling": {**scaling, **old}}),
        ModelConfig.from_hf({**hf, "rope_parameters": {**scaling, "rope_theta": 5e5}}),
        ModelConfig.from_hf({**hf, "rope_theta": 1e4, "rope_parameters": {**scaling, "rope_theta": 5e5}}),
    ]
    assert all(config == configs[0] for config in configs)
    assert configs[0].rope_theta == 5e5 and configs[0].rope_scaling["factor"] == scaling["factor"]
    assert ModelConfig.from_hf(configs[0].to_hf()) == configs[0]


def test_yarn_by_its_definition():
    """Fast pairs keep their speed, slow ones go at 1/s of it, a ramp between; s = 1 changes nothing."""
    def speeds(**scaling):
        return rope_frequencies(ModelConfig.from_hf(dict(
            SHAPE, model_type="llama", hidden_size=256, max_position_embeddings=2048,
            rope_scaling=dict(rope_type="yarn", original_max_position_embeddings=2048, **scaling))))
    plain, _ = rope_frequencies(ModelConfig.from_hf(dict(SHAPE, model_type="llama", hidden_size=256)))
    torch.testing.assert_close(speeds(factor=1.0)[0], plain)
    assert speeds(factor=1.0)[1] == 1.0
    ratio = speeds(factor=4.0)[0] / plain
    turns = 2048 * plain / (2 * torch.pi)
    torch.testing.assert_close(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))
    torch.testing.assert_close(ratio[turns < 0.7], torch.full_like(ratio[turns < 0.7], 0.25))
    assert (ratio.diff() <= 1e-6).all() and ((ratio > 0.3) & (ratio < 0.95)).any()
    assert speeds(factor=4.0)[1] == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)


@pytest.mark.parametrize("spec", ["yarn:4", "linear:2.5"])
def test_a_context_stretched_at_loading_equals_transformers(spec, tmp_path):
    kind, factor = spec.split(":")
    theirs = from_oracle(FAMILIES["qwen3"])
    theirs.save_pretrained(tmp_path)
    scaling = {"rope_type": kind, "factor": float(factor), "rope_theta": 1e4}
    scaling.update({"original_max_position_embeddings": 64} if kind == "yarn" else {})
    stretched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=scaling).eval()
    model = load_causal_lm(tmp_path, rope_scaling=spec)
    assert difference(model, stretched) < 1e-5 < difference(model, theirs)
    assert model.config.max_position_embeddings == 64 * float(factor)
    assert ModelConfig.from_hf(model.config.to_hf()) == model.config
    with pytest.raises(UserError, match="already"):
        model.config.stretched("yarn:2")


@pytest.mark.parametrize("spec", ["yarn", "yarn:", "yarn:0.5", "yarn:x", "yarn:inf", "yarn:nan", "llama3:8", "4"])
def test_a_wrong_stretch_is_refused(spec):
    with pytest.raises(UserError, match="yarn:F"):
        ModelConfig.from_hf({**SHAPE, "model_type": "llama"}).stretched(spec)


def test_only_distances_matter_also_under_yarn():
    model = load_causal_lm(GOLDENS / "llama_yarn")
    positions = torch.arange(T)[None]
    near, far = (model(IDS, positions=positions + shift).logits for shift in (0, 37))
    torch.testing.assert_close(near, far, atol=2e-5, rtol=0)


# ------------------------------------------------- one row alone, in a batch, cached, in pieces, in half precision


def ours(name):
    """One of the families above as our model, without a folder in between."""
    theirs = from_oracle(FAMILIES[name])
    config = ModelConfig.from_hf(theirs.config.to_dict())
    model = randomise(CausalLM(config))
    for router in routers(model):       # transformers and we stack experts differently; any weights will do here
        assert router.weight.std() > 0.1
    return model


EVERY_KIND = pytest.mark.parametrize("name", ["llama tied", "mistral window", "qwen2", "qwen3", "qwen3_moe",
                                              "dots1 first dense", "yarn qwen3", "llama3"])


def ragged(side):
    """Rows of 24, 17, 5 and 1 tokens in one batch: ids (4, T), mask (4, T)."""
    lengths = torch.tensor([T, 17, 5, 1])[:, None]
    slots = torch.arange(T)[None]
    mask = slots >= T - lengths if side == "left" else slots < lengths
    ids = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(2))
    return torch.where(mask, ids, 3), mask.long()


@EVERY_KIND
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(name, side):
    model, (ids, mask) = ours(name), ragged(side)
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = model(ids[row, real][None]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral window", "qwen3_moe", "dots1"])
@torch.no_grad()
def test_left_padding_equals_transformers(name):
    """Once more with an oracle, because here the masks of both sides could be wrong in the same way."""
    theirs, (ids, mask) = from_oracle(FAMILIES[name]), ragged("left")
    config = ModelConfig.from_hf(theirs.config.to_dict())
    model = CausalLM(config)
    load_from(model, theirs)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    got = model(ids, attention_mask=mask).logits
    assert (got - expected)[mask.bool()].abs().max() < 1e-5


def load_from(model, theirs):
    """Copy transformers' weights in memory: its experts hold gate and up in one tensor."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            state[name.replace("gate_up", "gate")], state[name.replace("gate_up", "up")] = gate, up
        else:
            state[name] = tensor
    model.load_state_dict(state)


@EVERY_KIND
@pytest.mark.parametrize("chunk", [1, 3, T])
@torch.no_grad()
def test_cached_equals_uncached(name, chunk):
    model = ours(name)
    whole = model(IDS).logits
    cache = KVCache(model.config, 2, T, torch.device("cpu"), torch.float32)
    pieces = [model(IDS[:, i : i + chunk], cache=cache).logits for i in range(0, T, chunk)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)
    assert cache.length == T


@EVERY_KIND
@torch.no_grad()
def test_cached_with_left_padding(name):
    model, (ids, mask) = ours(name), ragged("left")
    whole = model(ids, attention_mask=mask).logits
    cache = KVCache(model.config, len(ids), T, torch.device("cpu"), torch.float32)
    pieces = [model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits
              for a, b in [(0, 20), (20, 21), (21, 24)]]
    got = torch.cat(pieces, dim=1)
    torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)


@EVERY_KIND
@torch.no_grad()
def test_continuing_right_padded_rows(name):
    """New tokens stand behind the padding of the shorter rows, at positions (and in a window) that do not count it."""
    model, (ids, mask) = ours(name), ragged("right")
    new = torch.randint(V, (len(ids), 4), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, len(ids), T + 4, torch.device("cpu"), torch.float32)
    model(ids, attention_mask=mask, cache=cache)
    mask = torch.cat([mask, torch.ones(len(ids), 4, dtype=mask.dtype)], dim=1)
    got = model(new, attention_mask=mask, cache=cache).logits
    for row in range(len(ids)):
        whole = torch.cat([ids[row, mask[row, :T].bool()], new[row]])[None]
        torch.testing.assert_close(got[row], model(whole).logits[0, -4:], atol=1e-5, rtol=0)


@EVERY_KIND
@torch.no_grad()
def test_packed_texts_equal_the_texts_alone(name):
    model = ours(name)
    lengths = [10, 1, 8]
    segments = torch.tensor([sum(([i + 1] * n for i, n in enumerate(lengths)), []) + [0] * (T - sum(lengths))])
    positions = torch.cat([torch.arange(n) for n in lengths + [T - sum(lengths)]])[None]
    packed = model(IDS[:1], segment_ids=segments, positions=positions).logits[0]
    start = 0
    for n in lengths:
        alone = model(IDS[:1, start : start + n]).logits[0]
        torch.testing.assert_close(packed[start : start + n], alone, atol=1e-5, rtol=0)
        start += n
    assert packed.isfinite().all()


@EVERY_KIND
@torch.no_grad()
def test_the_future_and_the_padding_change_nothing(name):
    model, t = ours(name), 9
    changed = IDS.clone()
    changed[:, t] = (changed[:, t] + 1) % V
    before, after = model(IDS).logits, model(changed).logits
    torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
    assert (after[:, t] - before[:, t]).abs().max() > 1e-2
    for side in ("left", "right"):
        ids, mask = ragged(side)
        other = torch.where(mask.bool(), ids, 60)
        before, after = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
        torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-6, rtol=0)


def test_a_window_limits_what_a_token_sees():
    """Through two layers of window 7 a token reaches back 12 places and no further."""
    model = ours("mistral window")
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    moved = (model(changed).logits - model(IDS).logits).abs().amax(dim=(0, 2))
    assert (moved[:13] > 1e-5).all() and (moved[13:] < 1e-6).all()


@EVERY_KIND
@torch.no_grad()
def test_two_forwards_do_not_share_memory(name):
    model = ours(name)
    first = model(IDS)
    kept = first.logits.clone(), first.aux_loss.clone()
    second = model(IDS.flip(1))
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.aux_loss, kept[1])
    assert first.logits.data_ptr() != second.logits.data_ptr()


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_with_padding_is_finite_and_close(name, dtype):
    model, (ids, mask) = ours(name), ragged("left")
    exact = model(ids, attention_mask=mask).logits
    half = model.to(dtype)(ids, attention_mask=mask).logits
    assert half.dtype == dtype and half.isfinite().all()
    off = (half.float() - exact)[mask.bool()].abs()
    assert off.mean() < (0.01 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("case", ["causal", "padded", "window", "packed", "cached"])
def test_fused_attention_equals_the_slow_one(case):
    torch.manual_seed(0)
    B, H, K, d, past = 2, 4, 2, 16, 5 if case == "cached" else 0
    q, k, v = torch.randn(B, H, 9, d), torch.randn(B, K, past + 9, d), torch.randn(B, K, past + 9, d)
    padding = torch.ones(B, 9, dtype=torch.bool)
    padding[0, :4] = False
    options = dict(padded=dict(padding=padding), window=dict(window=3),
                   packed=dict(segment_ids=torch.tensor([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2]))).get(case, {})
    mask = attention_mask_for(9, past, q.device, **options)
    assert (mask is None) == (case == "causal")
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                             enable_gqa=True)
    torch.testing.assert_close(fused, slow_attention(q, k, v, mask), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("changes, said", [
    (dict(model_type="gpt2"), "gpt2"),
    (dict(model_type=None), "None"),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "longrope"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    (dict(rope_scaling=dict(rope_type="yarn")), "factor"),
    (dict(rope_scaling=dict(rope_type="yarn", factor="4")), "number"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default"), sliding_attention=dict())), "layers"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
     "partial_rotary_factor"),
    (dict(quantization_config=dict(quant_method="gptq")), "quantized"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(num_hidden_layers="two"), "num_hidden_layers"),
    (dict(num_attention_heads=3), "num_key_value_heads"),
    (dict(model_type="dots1", **EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=2), "n_group"),
    (dict(model_type="dots1", **EXPERTS, n_routed_experts=4, n_shared_experts=0), "shared"),
    (dict(model_type="dots1", **EXPERTS, n_shared_experts=1), "n_routed_experts"),
    (dict(model_type="qwen3_moe", **EXPERTS, num_experts=4, mlp_only_layers=[0]), "mlp_only_layers"),
    (dict(model_type="qwen3_moe", **EXPERTS, num_experts=4, decoder_sparse_step=2), "decoder_sparse_step"),
    (dict(model_type="qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=1,
          norm_topk_prob=True), "norm_topk_prob"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding window"),
    (dict(model_type="qwen3", use_sliding_window=True, sliding_window=8,
          layer_types=["full_attention", "sliding_attention"]), "sliding window"),
], ids=lambda value: str(value)[:40])
def test_what_is_not_computed_here_is_refused_in_one_line(changes, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", **changes}), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, hf", [("llama", transformers.LlamaConfig), ("mistral", transformers.MistralConfig),
                                      ("qwen2", transformers.Qwen2Config), ("qwen3", transformers.Qwen3Config),
                                      ("qwen3_moe", transformers.Qwen3MoeConfig), ("dots1", transformers.Dots1Config)])
def test_keys_left_out_mean_what_transformers_takes_them_to_mean(kind, hf):
    sizes = dict(vocab_size=V, hidden_size=4096, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32)
    if kind == "qwen3_moe":
        sizes.update(EXPERTS, num_experts=4)
    if kind == "dots1":
        sizes.update(EXPERTS, n_routed_experts=4, n_shared_experts=1)
    assert ModelConfig.from_hf({**sizes, "model_type": kind}) == ModelConfig.from_hf({
        **hf(**sizes, bos_token_id=None, eos_token_id=None).to_dict(), "model_type": kind})
