"""Bottleneck adapters: nothing at the start, the formula after it, and no trace when they are gone."""

import pytest
import torch
from torch.nn import functional as F

from model.adapters.adapted import AdapterConfig, attach, detach, disabled, merge, switch
from model.adapters.folder import load_adapter, save_adapter
from model.config import ModelConfig
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.logprobs import token_logprobs
from model.transformer import CausalLM

V = 97
SHAPE = dict(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, qk_norm=True)


def tiny(**changes):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def adapted(targets="all", **changes):
    model = tiny(**changes)
    attach(model, AdapterConfig("bottleneck", rank=6, targets=targets))
    return model


@torch.no_grad()
def shake(model):
    """Give the adapter weights that do something."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(V, (2, 9))


@torch.no_grad()
def test_it_starts_as_the_base_model_bit_for_bit(ids):
    assert torch.equal(adapted()(ids).logits, tiny()(ids).logits)


@torch.no_grad()
def test_it_is_the_formula_behind_the_last_layers_of_attention_and_mlp(ids):
    """The forward pass written out with the paper's function between sublayer and residual stream."""
    model, base = shake(adapted()), tiny()
    inner = base.model
    cos, sin = inner.rotation(torch.arange(9)[None])
    x = inner.embed_tokens(ids)

    def adapter(layer, h):
        a = model.get_submodule(f"model.layers.{layer}").adapters["default"]
        return h + F.silu(h @ a.bottleneck_down.weight.T + a.bottleneck_down.bias) @ a.bottleneck_up.weight.T + (
            a.bottleneck_up.bias)

    for n, block in enumerate(inner.layers):
        x = x + adapter(f"{n}.self_attn.o_proj", block.self_attn(block.input_layernorm(x), cos, sin, None, None))
        x = x + adapter(f"{n}.mlp.down_proj", block.mlp(block.post_attention_layernorm(x)))
    torch.testing.assert_close(model(ids).logits, base.lm_head(inner.norm(x)), atol=1e-5, rtol=1e-5)


def test_the_placement_of_pfeiffer_is_half_of_it():
    def places(model):
        return sorted(name.rpartition(".adapters")[0] for name, p in model.named_parameters()
                      if p.requires_grad and name.endswith("up.weight"))

    assert places(adapted()) == [f"model.layers.{n}.{place}" for n in (0, 1) for place in ("mlp.down_proj",
                                                                                           "self_attn.o_proj")]
    assert places(adapted("down_proj")) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    trained = sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    assert trained == 4 * (64 * 6 + 6 + 6 * 64 + 64)


def test_only_the_adapter_learns(ids):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        loss = -token_logprobs(model.train(), ids)[0].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained and all(".adapters.default.bottleneck_" in name for name in trained)


@torch.no_grad()
def test_it_is_saved_loaded_switched_and_taken_off(ids, tmp_path):
    model = shake(adapted())
    save_adapter(tmp_path / "one", model)
    again = tiny()
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    config = load_adapter(again, tmp_path / "one", "one")
    assert (config.method, config.rank) == ("bottleneck", 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    attach(again, AdapterConfig("lora", rank=4), "low")
    assert torch.equal(again(ids).logits, tiny()(ids).logits)            # a fresh LoRA changes nothing
    switch(again, "one")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with disabled(again):
        assert torch.equal(again(ids).logits, tiny()(ids).logits)
    with pytest.raises(UserError, match="'one' changes more than weights: it cannot be merged"):
        merge(again, "one")
    detach(again)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_folder_says_that_peft_cannot_read_it(tmp_path):
    save_adapter(tmp_path / "one", adapted())
    text = (tmp_path / "one" / "adapter_config.json").read_text(encoding="utf-8")
    assert '"peft_type": "BOTTLENECK"' in text and "PEFT has no such method" in text
    with pytest.raises(UserError, match="has shape .* it is for another model"):
        load_adapter(tiny(hidden_size=96, num_attention_heads=3, num_key_value_heads=3), tmp_path / "one")


@torch.no_grad()
def test_cached_generation_equals_the_whole_text_again(ids):
    model = shake(adapted())
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    for prompt, (completion,) in zip(prompts, generate(model, prompts, SamplingParams(8, 0.0)), strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert completion.ids == text[len(prompt):]


@torch.no_grad()
def test_a_mixture_gets_one_behind_attention_and_none_behind_its_experts(ids):
    model = shake(adapted(**MOE))
    places = {name.rpartition(".adapters")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert places == {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}
    assert not torch.equal(model(ids).logits, tiny(**MOE)(ids).logits)
