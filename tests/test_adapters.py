"""Adapters against PEFT (outputs, gradients, folders in both directions), and what must hold of each by itself."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file, save_file

from model.adapters import adalora
from model.adapters.adapted import Adapted, active_adapter, detach, holders, linear_layers, merge, unmerge
from model.adapters.folder import AdapterConfig, attach, disabled, has_adapters, load_adapter, save_adapter, switch
from model.checkpoint import load_causal_lm, load_reward_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.moe import routers, update_router_bias
from model.quantize import quantize_model
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer.optim import build_optimizers, optimizer_step

V, T = 64, 20
IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
# widths that differ everywhere, so that in and out cannot be taken for each other; biases, which DoRA must leave alone
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, max_position_embeddings=64, attention_bias=True)
LORAS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "lora+": {}}
WEIGHT_METHODS = ["lora", "rslora", "dora", "lora+", "pissa", "adalora", "ia3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder of a small Llama with weights that matter."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.normal(1.0 if "norm" in name else 0.0, 0.15, tensor.shape))
    model.save_pretrained(folder)
    return folder


def ours(base, method=None, fill=True, **options):
    """The base model, with an adapter of random parameters."""
    model = load_causal_lm(base)
    if method:
        torch.manual_seed(3)
        attach(model, AdapterConfig(method, **{"rank": 4, "alpha": 6, **options}))
        if fill:
            scramble(model)
    return model


def theirs(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


@torch.no_grad()
def scramble(model, size=0.2):
    """Move every adapter parameter away from its start."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * size)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def gradients(model):
    """{name: gradient} of the parameters that got one, of an arbitrary loss."""
    model.zero_grad()
    (model(IDS).logits * torch.linspace(-1, 1, V)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def peft_name(name):
    """Our name of an adapter's parameter -> PEFT's."""
    path, _, key = name.partition(".adapters.default.")
    part, dot, rest = key.partition(".")
    end = ".weight" if part == "lora_magnitude_vector" else dot + rest
    return f"base_model.model.{path}.{part}.default{end}"


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def close(a, b, tolerance=1e-5):
    assert torch.allclose(a, b, atol=tolerance, rtol=1e-4), f"they differ by {(a - b).abs().max():.2e}"


# ------------------------------------------------------------------------------------------- against PEFT


@pytest.mark.parametrize("method", [*LORAS, "adalora", "ia3"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_peft_loads_our_folder_and_computes_the_same_outputs_and_gradients(base, tmp_path, method, dropout):
    model = ours(base, method, dropout=dropout)
    save_adapter(tmp_path, model, base=str(base))
    other = peft.PeftModel.from_pretrained(theirs(base), tmp_path, is_trainable=True)
    assert (logits(model) - logits(load_causal_lm(base))).abs().max() > 0.1
    close(logits(model), logits(other.eval()))
    if method == "ia3" and dropout:
        return                                                           # it has none
    model.train(), other.train()
    torch.manual_seed(9)
    mine = gradients(model)
    torch.manual_seed(9)                                                 # the same inputs are dropped
    reference = gradients(other)
    # the optimizer's and PEFT's: AdaLoRA adds its penalty to the loss of a model that is given labels, not here
    assert {peft_name(name) for name in mine} == reference.keys()
    for name, gradient in mine.items():
        close(gradient, reference[peft_name(name)])
        assert gradient.abs().max() > 1e-7, name


PEFT_CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", lora_dropout=0.1),
    "rslora": peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "dora": peft.LoraConfig(r=4, target_modules=["k_proj", "up_proj"], use_dora=True, use_rslora=True),
    "patterns": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
                                alpha_pattern={"layers.1.self_attn.v_proj": 32}),
    "one layer": peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "a regular expression": peft.LoraConfig(r=4, target_modules=r".*layers\.0\.mlp\..*_proj"),
    "the head trained whole": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "pissa": peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "gate_proj"], init_lora_weights="pissa"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_load_pefts_folder(base, tmp_path, kind):
    PEFT_CONFIGS[kind].task_type = "CAUSAL_LM"
    other = peft.get_peft_model(theirs(base), PEFT_CONFIGS[kind]).eval()
    scramble(other)
    other.save_pretrained(tmp_path / "theirs")
    model = load_causal_lm(base)
    load_adapter(model, tmp_path / "theirs")
    close(logits(model), logits(other))
    if kind != "pissa":       # it changes the weights of PEFT's model
        with other.disable_adapter():
            close(logits(other), logits(load_causal_lm(base)))
    save_adapter(tmp_path / "again", model, base=str(base))
    close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again")), logits(other))
    model = load_causal_lm(base)
    load_adapter(model, tmp_path / "again")
    close(logits(model), logits(other))


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_where_peft_starts_and_learns_what_it_learns(base, tmp_path, rslora):
    model = ours(base, "pissa", fill=False, rslora=rslora, targets="q_proj,down_proj")
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", use_rslora=rslora))
    same = dict(other.named_parameters())
    for name, parameter in trained(model).items():
        close(parameter.abs(), same[peft_name(name)].abs())              # a singular vector may have either sign
        same[peft_name(name)].data.copy_(parameter)
    mine, reference = gradients(model), gradients(other)
    for name, gradient in mine.items():
        close(gradient, reference[peft_name(name)])
    scramble(model)
    for name, parameter in trained(model).items():
        same[peft_name(name)].data.copy_(parameter)
    close(logits(model), logits(other.eval()))
    save_adapter(tmp_path, model)                                        # plain LoRA of rank 8 on the untouched base
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["init_lora_weights"] is True
    close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path)), logits(model))


def test_dora_with_pissa_is_stored_as_dora(base, tmp_path):
    model = ours(base, "pissa", dora=True)
    save_adapter(tmp_path, model)
    close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path)), logits(model))


def test_a_reward_model_trains_its_head_whole_and_peft_reads_it(base, tmp_path):
    config = AdapterConfig(rank=4, modules_to_save=("score",), task_type="SEQ_CLS")
    Tokenizer.load("nano")
    torch.manual_seed(0)
    model = scalar_model(base)
    attach(model, config)
    assert model.score.weight.requires_grad and not model.model.norm.weight.requires_grad
    scramble(model)
    save_adapter(tmp_path, model, base=str(base))
    other = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    other = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    close(logits(other)[:, 0], logits(model)[:, -1])                     # transformers reads the last token
    again = scalar_model(base)
    load_adapter(again, tmp_path)
    close(logits(again), logits(model), 0)
    with pytest.raises(ValueError, match="score"), disabled(model):
        pass


def scalar_model(base):
    """The folder has no tokenizer of ours: read the model alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.checkpoint.Tokenizer", SimpleNamespace(load=lambda _: SimpleNamespace(vocab_size=V)))
        return load_reward_model(base)[0]


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_at_the_start_it_is_the_base_model(base, method):
    close(logits(ours(base, method, fill=False)), logits(ours(base)), 1e-6 if method == "dora" else 0)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_only_the_adapter_learns_and_the_base_keeps_its_bytes(base, method):
    model = ours(base, method)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, SimpleNamespace(optimizer="muon", weight_decay=0.1, lr=1e-2,
                                                         optimizer_state="device"))
    for _ in range(3):
        assert all(".adapters." in name for name in gradients(model))
        optimizer_step(model, optimizers, 1e-2, 1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (".adapters." in name), name
    reference = ours(base)
    with disabled(model):
        assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_merged_is_unmerged(base, method, tmp_path):
    model = ours(base, method)
    before = logits(model)
    merge(model)
    close(logits(model), before)
    with disabled(model):
        assert torch.equal(logits(model), logits(ours(base)))
    with pytest.raises(UserError, match="merged adapter already"):
        merge(model)
    unmerge(model)
    assert torch.equal(logits(model), before)
    merge(model)
    detach(model)
    assert not has_adapters(model) and not holders(model)
    save_model(tmp_path / "merged", model)                               # a plain folder
    close(logits(theirs(tmp_path / "merged")), before)


def test_a_weighted_sum_of_adapters_merges(base):
    model = ours(base, "lora")
    attach(model, AdapterConfig("ia3"), name="second")
    scramble(model)
    changes = {}
    for name in ("default", "second"):
        merge(model, name)
        changes[name] = merged_weights(model)
        unmerge(model)
    merge(model, {"default": 0.5, "second": -2.0})
    start = {path: module.base_layer.weight for path, module in holders(model).items()}
    for path, weight in merged_weights(model).items():
        first, second = (changes[name][path] - start[path] for name in ("default", "second"))
        close(weight, start[path] + 0.5 * first - 2 * second)
    assert sum(not torch.equal(a, changes["default"][path]) for path, a in changes["second"].items()) == 14


def merged_weights(model):
    return {path: module.merged.weight.clone() for path, module in holders(model).items()}


def test_the_change_has_the_rank_it_says_and_dora_the_lengths(base):
    model = ours(base, "lora")
    merge(model)
    for module in holders(model).values():
        change = module.merged.weight - module.base_layer.weight
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    model = ours(base, "dora")
    merge(model)
    for module in holders(model).values():
        close(module.merged.weight.norm(dim=1), module.adapters["default"].lora_magnitude_vector.abs())


def test_scale_is_alpha_over_rank_or_over_its_root(base):
    for options, scale in [({}, 6 / 4), ({"rslora": True}, 3.0), ({"alpha": 0}, 2.0)]:
        layer = ours(base, "lora", **options).model.layers[0].self_attn.k_proj
        adapter, x = layer.adapters["default"], torch.randn(3, 32)
        want = layer.base_layer(x) + scale * x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
        close(layer(x), want)


def test_the_first_factor_starts_uniform_and_the_second_at_zero(base):
    for adapter in [m.adapters["default"] for m in holders(ours(base, "lora", fill=False, rank=16)).values()]:
        bound = adapter.lora_A.in_features ** -0.5
        assert bound * 0.97 < adapter.lora_A.weight.abs().max() <= bound and not adapter.lora_B.weight.any()


def test_several_adapters_switch(base, tmp_path):
    outputs = {None: logits(ours(base))}
    for name, method in [("poet", "lora"), ("judge", "dora"), ("clerk", "ia3")]:
        model = ours(base, method)
        outputs[name] = logits(model)
        save_adapter(tmp_path / name, model)
    model = load_causal_lm(base)
    for name in ("poet", "judge", "clerk"):
        load_adapter(model, tmp_path / name, name)
    assert active_adapter(model) == "clerk" and list(model.adapters) == ["poet", "judge", "clerk"]
    for name in ("judge", None, "clerk", "poet", None):
        switch(model, name)
        assert torch.equal(logits(model), outputs[name])
    switch(model, "judge")
    with disabled(model):
        assert torch.equal(logits(model), outputs[None])
        switch(model, "clerk")
        with disabled(model):
            assert torch.equal(logits(model), outputs[None])
        assert torch.equal(logits(model), outputs["clerk"])
    assert active_adapter(model) == "judge"
    save_adapter(tmp_path / "copy", model, name="judge")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("judge", "copy"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_saving_takes_the_place_of_what_was_there(base, tmp_path):
    model = ours(base)
    save_model(tmp_path, model)
    attach(model, AdapterConfig())
    save_adapter(tmp_path, model)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    save_model(tmp_path, ours(base))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_experts_and_routers_of_a_mixture_are_left_alone(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(V, 32, 64, 2, 2, 1, head_dim=16, num_experts=4, num_experts_per_tok=2, router="sigmoid",
                         moe_intermediate_size=16, num_shared_experts=1, first_k_dense=1)
    model = CausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, AdapterConfig(rank=2))
    assert {path.rpartition(".")[2] for path in holders(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    optimizers = build_optimizers(model, SimpleNamespace(optimizer="adamw", weight_decay=0.1, lr=1e-2,
                                                         optimizer_state="device"))
    model.train()
    gradients(model)
    assert routers(model)[0].load.any()
    optimizer_step(model, optimizers, 1e-2, 1.0)
    assert not routers(model)[0].load.any()                              # counting starts anew
    detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    attach(model, AdapterConfig(rank=2))
    scramble(model)
    save_adapter(tmp_path / "adapter", model)
    detach(model)
    save_model(tmp_path / "base", model.eval())
    again = load_causal_lm(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter")
    close(logits(again), logits(other))
    with pytest.raises(UserError, match="there are down_proj, gate_proj, .*experts of a mixture get no adapter"):
        attach(again, AdapterConfig(targets="experts"), "second")
    attach(again, AdapterConfig(targets="shared_experts.up_proj"), "second")     # those may be named
    assert "model.layers.1.mlp.shared_experts.up_proj" in holders(again)


def test_a_router_that_is_trained_still_moves_its_bias():
    model = CausalLM(ModelConfig(V, 32, 64, 1, 2, 1, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                 router="sigmoid", moe_intermediate_size=16, num_shared_experts=1)).train()
    model(IDS)
    update_router_bias(model)
    assert routers(model)[0].e_score_correction_bias.any()


def test_sixteen_bits(base):
    """Under autocast the products are bfloat16 and what is trained stays float32; a bfloat16 base gets its like."""
    model = ours(base, "dora")
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model)
    assert rounded.dtype == torch.bfloat16 and 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert {p.dtype for p in gradients(model).values()} == {torch.float32}
    for method in WEIGHT_METHODS:
        model = load_causal_lm(base, dtype=torch.bfloat16)
        attach(model, AdapterConfig(method))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_a_quantized_base_gives_the_gradients_of_its_weights_in_full(base, method):
    packed = quantize_model(load_causal_lm(base), "nf4")
    full = load_causal_lm(base)
    for path, layer in linear_layers(packed).items():
        full.get_submodule(path).weight.data.copy_(layer.dequantize())
    for model in (packed, full):
        torch.manual_seed(3)
        attach(model, AdapterConfig(method, rank=4))
        scramble(model)
    close(logits(packed), logits(full))
    reference = gradients(full)
    for name, gradient in gradients(packed).items():
        close(gradient, reference[name])
    merge(packed), merge(full)
    close(logits(packed), logits(full))
    detach(packed)
    assert all(isinstance(layer, torch.nn.Linear) for path, layer in linear_layers(packed).items()
               if method != "ia3" or path.endswith(("k_proj", "v_proj", "down_proj")))


def test_it_compiles_and_can_still_be_switched(base):
    model = ours(base, "dora")
    before = logits(model)
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    close(logits(model), before)
    with disabled(model):
        close(logits(model), logits(ours(base)))
    close(logits(model), before)


def test_the_second_factor_of_lora_plus_learns_faster(base):
    model = ours(base, "lora+")
    before = {name: p.clone() for name, p in trained(model).items()}
    gradients(model)
    optimizer_step(model, build_optimizers(model, SimpleNamespace(
        optimizer="adamw", weight_decay=0.5, lr=1e-4, optimizer_state="device")), 1e-4, 0)
    for name, p in trained(model).items():                               # Adam's first step has size lr; nothing decays
        step = (p - before[name]).abs().median().item()
        assert step == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4, rel=0.05), name


# -------------------------------------------------------------------------------------------------- AdaLoRA


def test_importances_and_choices_are_pefts(base):
    """With the same parameters and gradients, step after step, the same directions are left."""
    model, total = ours(base, "adalora", start_rank=6, rank=3), 20
    config = model.adapters["default"]
    parts = trained(model)
    other = SimpleNamespace(named_parameters=lambda: [
        (name.replace(".adapters.default.", ".") + ".default", p) for name, p in parts.items()])
    allocator = RankAllocator(other, SimpleNamespace(beta1=adalora.BETA, beta2=adalora.BETA, target_r=3), "default")
    lambdas = {name: p for name, p in parts.items() if name.endswith("lora_E")}
    for step in range(1, 1 + total - round(adalora.SETTLED * total)):
        gradients(model)
        adalora.before_step(model)
        allocator.update_ipt(other)
        before = {name: p.clone() for name, p in lambdas.items()}
        adalora.after_step(model, config, step, total)
        after = {name: p.clone() for name, p in lambdas.items()}
        number = int(adalora.budget(step, total, config) * len(lambdas))
        if number < allocator.init_bgt:
            for name, p in lambdas.items():
                p.data.copy_(before[name])
            allocator.mask_to_budget(other, number)
            assert all(torch.equal(p, after[name]) for name, p in lambdas.items())
        for p in parts.values():                                         # as an optimizer would: everything moves
            p.data.add_(0.05 * torch.randn_like(p))
    assert number == 3 * 14 and sum(int(p.ne(0).sum()) for p in after.values()) == number


@pytest.mark.parametrize("total", [10, 37, 200])
def test_the_budget_goes_down_as_pefts(total):
    config = AdapterConfig("adalora", rank=4, start_rank=7)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.init_bgt, allocator.target_bgt = 7 * 11, 4 * 11
    begin, end = round(adalora.WARM * total), total - round(adalora.SETTLED * total)
    allocator.peft_config = SimpleNamespace(tinit=begin, tfinal=total - end, total_step=total, deltaT=1)
    for step in range(1, total + 1):
        assert int(adalora.budget(step, total, config) * 11 + 1e-9) == allocator.budget_schedule(step)[0]


def test_the_penaltys_gradient_is_the_derivative_of_what_is_told(base):
    model = ours(base, "adalora")
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    adalora.before_step(model)
    (adalora.ORTHOGONALITY * adalora.orthogonality(model)).backward(
        inputs=[p for name, p in trained(model).items() if not name.endswith("lora_E")], retain_graph=False)
    for name, p in trained(model).items():                               # both were added
        if not name.endswith("lora_E"):
            assert p.grad.abs().max() > 1e-3
    doubled = {name: p.grad.clone() for name, p in trained(model).items()}
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    adalora.before_step(model)
    for name, p in trained(model).items():
        close(doubled[name], 2 * p.grad, 1e-6)


def test_training_ends_with_the_budget_and_the_folder_has_no_more(base, tmp_path):
    model, total = ours(base, "adalora", start_rank=6, rank=4, fill=False), 12
    optimizers = build_optimizers(model, SimpleNamespace(optimizer="adamw", weight_decay=0.1, lr=3e-2,
                                                         optimizer_state="device"))
    for step in range(1, total + 1):
        gradients(model)
        adalora.before_step(model)
        optimizer_step(model, optimizers, 3e-2, 1.0)
        adalora.after_step(model, model.adapters["default"], step, total)
    left = {path: int(module.adapters["default"].lora_E.ne(0).sum()) for path, module in holders(model).items()}
    assert sum(left.values()) == 4 * 14 and len(set(left.values())) > 1
    save_adapter(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {path: len(tensors[f"base_model.model.{path}.lora_E"]) for path in left} == left
    again = load_causal_lm(base)
    load_adapter(again, tmp_path)
    close(logits(again), logits(model))
    close(logits(peft.PeftModel.from_pretrained(theirs(base), tmp_path)), logits(model))


def test_importances_of_a_step_that_is_not_finite_are_not_noted(base):
    model = ours(base, "adalora")
    gradients(model)
    adalora.before_step(model)
    layers = adalora.layers_of(model)
    before = [layer.mean_lora_A.clone() for layer in layers]
    assert all(tensor.any() for tensor in before)
    layers[0].lora_A.grad[0, 0] = float("nan")
    adalora.before_step(model)
    assert torch.equal(layers[0].mean_lora_A, before[0]) and not torch.equal(layers[1].mean_lora_A, before[1])


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("config, told", [
    (dict(targets="qkv_proj"), "qkv_proj: no linear layer .* down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
    (dict(targets="q_proj,lm_head"), "lm_head: no linear layer"),
    (dict(rank=0), "rank 0"),
    (dict(rank=-4), "rank -4"),
    (dict(dropout=1.0), "dropout 1.0"),
    (dict(method="loha"), "'loha': expected one of lora, "),
    (dict(method="pissa", rank=25), "rank 25: .* has only 24"),
    (dict(modules_to_save=("score",)), "score: the model does not have"),
])
def test_a_config_that_cannot_be_is_one_line(base, config, told):
    with pytest.raises(UserError, match=told):
        attach(load_causal_lm(base), AdapterConfig(**config))


def test_names_are_checked(base):
    model = ours(base, "lora")
    for name in ("default", "", "a.b"):
        with pytest.raises(UserError, match="name"):
            attach(model, AdapterConfig(), name)
    for use in (switch, merge):
        with pytest.raises(UserError, match="no adapter named 'poet'; the model has default"):
            use(model, "poet")


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    save_adapter(tmp_path / "adapter", ours(base, "lora"), base="out/full_sft")
    other = ours(base)
    other.model.layers[1].mlp.down_proj.weight.data += 0.05              # everything has the same shape
    save_model(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"trained on another base model \(out/full_sft\)"):
        load_adapter(load_causal_lm(tmp_path / "other"), tmp_path / "adapter")
    save_model(tmp_path / "copy", ours(base), dtype=torch.bfloat16, max_shard_bytes=10_000)
    load_adapter(load_causal_lm(tmp_path / "copy"), tmp_path / "adapter")     # the same weights, rounded and in shards
    load_adapter(quantize_model(load_causal_lm(base), "int8"), tmp_path / "adapter")


@pytest.mark.parametrize("damage, told", [
    (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json: it is not an adapter"),
    (lambda f: ((f / "adapter_config.json").unlink(), (f / "config.json").write_text("{}")), "give it as --model"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors; download"),
    (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"xy"), "damaged"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[1]"), "no peft_type"),
    (lambda f: change(f, peft_type="LOHA"), "of type LOHA"),
    (lambda f: change(f, lora_bias=True), "lora_bias=True"),
    (lambda f: change(f, bias="all"), "bias='all'"),
    (lambda f: change(f, init_lora_weights="olora"), "'olora' changed the base"),
    (lambda f: change(f, use_dora=True), "missing"),
    (lambda f: tensors(f, lambda t: t.pop(next(iter(t)))), "missing"),
    (lambda f: tensors(f, lambda t: t.update(extra=torch.zeros(2))), "extra is missing .* or too much"),
    (lambda f: tensors(f, lambda t: t.update({key: x[..., :3].clone() for key, x in t.items()})), "has shape"),
    (lambda f: tensors(f, lambda t: [t.update({key.replace("layers.1", "layers.7"): t.pop(key)}) for key in [*t]]),
     "layers.7"),
])
def test_a_folder_that_is_no_adapter_is_one_line(base, tmp_path, damage, told):
    save_adapter(tmp_path, ours(base, "lora"))
    damage(tmp_path)
    with pytest.raises(UserError, match=told):
        load_adapter(load_causal_lm(base), tmp_path)


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    edit(held)
    save_file(held, path)


def test_no_adapter_folder_is_one_line(base, tmp_path):
    with pytest.raises(UserError, match="no adapter folder"):
        load_adapter(load_causal_lm(base), tmp_path / "none")


def test_adapted_without_an_adapter_is_its_layer():
    layer = torch.nn.Linear(3, 4)
    assert torch.equal(Adapted(layer)(torch.ones(2, 3)), layer(torch.ones(2, 3)))
