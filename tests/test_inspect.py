"""model/inspect.py: what is shown of a model is what the model does."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model import inspect, transformer
from model.adapters.adapted import AdapterConfig, attach
from model.config import ModelConfig
from model.errors import UserError
from model.transformer import CausalLM

IDS = [5, 9, 2, 9, 30, 11, 7]


def build(adapter="", **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "initializer_range": 0.3} | options
    model = CausalLM(ModelConfig(**shape)).eval()
    if adapter:
        attach(model, AdapterConfig(adapter, rank=3))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


KINDS = {"plain": {}, "one head": {"num_attention_heads": 1, "num_key_value_heads": 1}, "no norms": {"qk_norm": False},
         "window": {"sliding_window": 3}, "biased": {"qkv_bias": True}, "lora": {"adapter": "lora"},
         "prompt": {"adapter": "prompt"}, "prefix": {"adapter": "prefix"},
         "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_the_attention_that_the_model_pays(kind, monkeypatch):
    """weights @ values must be what came out of the fused kernel, head by head."""
    model, called, fused = build(**KINDS[kind]), [], transformer.attention

    def attention(q, k, v, mask):
        out = fused(q, k, v, mask)
        called.append((v, out))
        return out

    monkeypatch.setattr(transformer, "attention", attention)
    seen = inspect.trace(model, IDS)
    called = called[-model.config.num_hidden_layers:]                      # before: virtual tokens, if any
    for layer, (v, out) in enumerate(called):
        for head in range(model.config.num_attention_heads):
            weights = inspect.attention_map(model, seen, layer, head)
            assert weights.shape == (len(IDS), v.shape[2])
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(IDS)))
            own = v[0, head // (model.config.num_attention_heads // model.config.num_key_value_heads)]
            torch.testing.assert_close(weights @ own, out[0, head], rtol=1e-4, atol=1e-5)
    assert len(called) == model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["plain", "prompt"])
def test_the_lens_is_a_model_that_stops_after_a_layer(kind):
    model = build(**KINDS[kind])
    seen = inspect.trace(model, IDS)
    lens = inspect.logit_lens(model, seen, 4)
    torch.testing.assert_close(seen.logits, model(torch.tensor([IDS])).logits[0])
    torch.testing.assert_close(lens[-1], seen.logits[4])
    torch.testing.assert_close(lens[0], model.lm_head(model.model.norm(model.model.embed_tokens.weight[IDS[4]])))
    layers = model.model.layers
    for count in range(1, len(layers)):
        model.model.layers = layers[:count]
        torch.testing.assert_close(lens[count], model(torch.tensor([IDS])).logits[0, 4])


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@torch.inference_mode()
def test_the_router_s_choices(router):
    model = build(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, router=router, first_k_dense=1)
    seen = inspect.trace(model, IDS)
    assert list(seen.routes) == [1, 2]
    for layer in (1, 2):
        gates, experts, probabilities = inspect.router_choices(seen, layer)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(IDS)))
        assert torch.equal(experts, probabilities.topk(2).indices) and gates.shape == experts.shape == (len(IDS), 2)
        # what the layer added to the stream is what these experts make of it
        block = model.model.layers[layer]
        up, down = block.mlp.experts, block.mlp.experts.down_proj
        h = seen.residual[layer] + block.self_attn(*seen.attention[layer])[0]
        x, expected = block.post_attention_layernorm(h), h.clone()
        for t, n in itertools.product(range(len(IDS)), range(2)):
            e = experts[t, n]
            expected[t] += gates[t, n] * (down[e] @ (F.silu(up.gate_proj[e] @ x[t]) * (up.up_proj[e] @ x[t])))
        torch.testing.assert_close(seen.residual[layer + 1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="layer 0 has no experts; layers with: 1, 2"):
        inspect.router_choices(seen, 0)


def test_entropy_surprise_and_likeliest():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(2), 0.0, -1e9, -1e9]])
    torch.testing.assert_close(inspect.entropy(logits), torch.tensor([2.0, 0.0, math.log2(3) - 2 / 3]))
    torch.testing.assert_close(inspect.surprise(logits, [3, 1, 0]), torch.tensor([2.0, 0.0]))
    assert inspect.surprise(logits, [3, 1, 1])[1] > 100
    assert inspect.surprise(logits[:1], [3]).shape == (0,)
    likeliest = inspect.next_tokens(logits[2], 2)
    assert [index for index, _ in likeliest] == [0, 1]
    assert [p for _, p in likeliest] == pytest.approx([2 / 3, 1 / 3])
    assert len(inspect.next_tokens(logits[0], 10)) == 4


def test_nothing_stays_behind():
    model = build(num_experts=4, moe_intermediate_size=16)

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    inspect.trace(model, IDS)
    assert hooks() == 0
    model.lm_head.forward = None                                           # a forward pass that fails
    with pytest.raises(TypeError):
        inspect.trace(model, IDS)
    assert hooks() == 0


@pytest.mark.parametrize("ids, words", [([], "has 0 tokens"), ([1] * 65, "reads 1 to 64"), ([40], "outside 0..39"),
                                        ([-1], "outside 0..39")])
def test_refusals(ids, words):
    with pytest.raises(UserError, match=words):
        inspect.trace(build(), ids)
