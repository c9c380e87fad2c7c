"""scripts/convert_model.py: MiniMind's files computed by transformers and by our folder, there and back, and what is
refused."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from model.adapters.adapted import AdapterConfig, attach
from model.adapters.folder import load_adapter, save_adapter
from model.checkpoint import load_causal_lm, load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts.convert_model import Config, main

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCAB = str(ROOT / "model" / "vocab" / "nano")
IDS = torch.randint(1024, (2, 40), generator=torch.Generator().manual_seed(0))

# What MiniMind's own code says of a model of width 128 with 2 layers: MiniMind2, and minimind-3 with its mixture.
COMMON = dict(vocab_size=1024, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, rope_theta=1e6,
              max_position_embeddings=32768, tie_word_embeddings=True)
DENSE = transformers.LlamaConfig(**COMMON, intermediate_size=64 * -(-(128 * 8 // 3) // 64), num_key_value_heads=2,
                                 rms_norm_eps=1e-5)
WITH_NORM = transformers.Qwen3Config(**COMMON, intermediate_size=448, num_key_value_heads=4, head_dim=16,
                                     rms_norm_eps=1e-6)
SPARSE = transformers.Qwen3MoeConfig(**COMMON, intermediate_size=448, moe_intermediate_size=448, num_key_value_heads=4,
                                     head_dim=16, rms_norm_eps=1e-6, num_experts=4, num_experts_per_tok=2,
                                     norm_topk_prob=True)


def stock(config, seed=0):
    """A transformers model with random weights, norms included."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
        parameter.data = parameter.data.half().float()          # what a file of MiniMind's can hold
    return model


def state_dict(model):
    """A state dict as MiniMind saves it: one tensor for each matrix of each expert, the tied head too, in half."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):       # transformers 5 stacks them
            for expert, both in enumerate(tensor):
                for part, weight in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    state[f"{name.removesuffix('gate_up_proj')}{expert}.{part}.weight"] = weight
        elif name.endswith("experts.down_proj"):
            for expert, weight in enumerate(tensor):
                state[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = weight
        else:
            state[name] = tensor
    return {name: tensor.half().clone() for name, tensor in state.items()}


def write(path, state):
    torch.save(state, path)
    return str(path)


def refusal(**options):
    with pytest.raises(UserError) as error:
        main(Config(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def check_logits(folder, oracle):
    """Our reading of `folder` computes what transformers computes with the weights that were in the file."""
    model, tokenizer = load_model(folder)
    assert tokenizer.fingerprint == Tokenizer.load("nano").fingerprint
    torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("config, name, described", [
    (DENSE, "full_sft_128", None), (WITH_NORM, "full_sft_128", None),
    (SPARSE, "full_sft_128_moe", {"num_experts_per_tok": 2})], ids=["MiniMind2", "minimind-3", "mixture"])
def test_a_file_becomes_a_folder_that_computes_the_same_and_comes_back(config, name, described, tmp_path, capsys):
    oracle = stock(config)
    state = state_dict(oracle)
    file = write(tmp_path / f"{name}.pth", state)
    if described:
        (tmp_path / "its.json").write_text(json.dumps(described))
    settings = str(tmp_path / "its.json") if described else ""
    main(Config(model=file, out=str(tmp_path / "folder"), tokenizer=VOCAB, config=settings))
    assert f"{config.model_type.split('_')[0].capitalize()}" in capsys.readouterr().out
    check_logits(tmp_path / "folder", oracle)

    back = tmp_path / "sub" / "back.pth"
    main(Config(to="minimind", model=str(tmp_path / "folder"), out=str(back), dtype="float16"))
    assert equal(torch.load(back, weights_only=True), state)
    told = json.loads(back.with_suffix(".json").read_text())
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps",
                "max_position_embeddings"):
        assert told[key] == getattr(config, key)
    assert told["rope_theta"] == 1e6 and told["use_moe"] == (config is SPARSE)


def test_a_model_of_ours_survives_the_way_through_minimind(tmp_path):
    """The .json beside the file carries what the weights do not tell: here 2 heads, and the base of the rotation."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(1024, 64, 96, 2, 2, 1, rope_theta=5000.0, max_position_embeddings=77, qk_norm=False))
    save_model(tmp_path / "a", model, Tokenizer.load("nano"))
    main(Config(to="minimind", model=str(tmp_path / "a"), out=str(tmp_path / "b.pth")))
    main(Config(model=str(tmp_path / "b.pth"), out=str(tmp_path / "c"), tokenizer=VOCAB + "/tokenizer.json"))
    assert equal(load_causal_lm(tmp_path / "c").state_dict(), model.state_dict())
    assert load_causal_lm(tmp_path / "c").config == load_causal_lm(tmp_path / "a").config


@pytest.mark.parametrize("described", [None, {"model_type": "minimind", "num_attention_heads": 8, "rope_theta": 1e6}])
def test_a_cloned_folder_with_pickled_weights(described, tmp_path):
    """MiniMind2 as it may be cloned: pytorch_model.bin in two parts, config.json, tokenizer; nothing to name."""
    oracle = stock(DENSE)
    clone = tmp_path / "MiniMind2"
    Tokenizer.load("nano").save(clone)
    items = list(state_dict(oracle).items())
    write(clone / "pytorch_model-00001-of-00002.bin", dict(items[:7]))
    write(clone / "pytorch_model-00002-of-00002.bin", {**dict(items[7:]), "model.freqs_cos": torch.zeros(4, 4)})
    (clone / "config.json").write_text(json.dumps(described or DENSE.to_dict()))
    main(Config(model=str(clone), out=str(tmp_path / "out"), dtype="bfloat16"))
    got = load_causal_lm(tmp_path / "out").state_dict()
    for name, tensor in items:
        assert torch.equal(got[name], tensor.bfloat16().float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_folder_with_safetensors_and_minimind_s_own_config(tmp_path):
    oracle, clone = stock(DENSE), tmp_path / "clone"
    Tokenizer.load("nano").save(clone)
    save_file(state_dict(oracle), clone / "model.safetensors")
    (clone / "config.json").write_text(json.dumps({"model_type": "minimind", "num_attention_heads": 8}))
    main(Config(model=str(clone), out=str(tmp_path / "out")))
    check_logits(tmp_path / "out", oracle)


def test_what_training_saved_to_continue_is_read_too(tmp_path):
    oracle = stock(DENSE)
    state = {f"_orig_mod.{name}": tensor for name, tensor in state_dict(oracle).items()}
    file = write(tmp_path / "full_sft_128_resume.pth", {"model": state, "optimizer": {"state": {}}, "step": 7})
    main(Config(model=file, out=str(tmp_path / "out"), tokenizer=VOCAB))
    check_logits(tmp_path / "out", oracle)


# -------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    write(path / "m.pth", state_dict(stock(DENSE)))
    main(Config(model=str(path / "m.pth"), out=str(path / "folder"), tokenizer=VOCAB))
    return str(path / "folder")


def lora_state(rank=4):
    torch.manual_seed(1)
    return {f"model.layers.{i}.self_attn.{layer}.lora.{factor}.weight":
            torch.randn((rank, 128) if factor == "A" else (128, rank)).half()
            for i in range(2) for layer in ("q_proj", "o_proj") for factor in "AB"}


def test_a_lora_adds_what_minimind_adds_and_comes_back(base, tmp_path):
    state = lora_state()
    main(Config(model=write(tmp_path / "lora_identity_128.pth", state), base=base, out=str(tmp_path / "lora")))
    merged = load_causal_lm(base)
    for name in [name for name in state if ".A." in name]:          # MiniMind: W x + B(A x), with no other factor
        layer = merged.get_submodule(name.removesuffix(".lora.A.weight"))
        layer.weight.data += state[name.replace(".A.", ".B.")].float() @ state[name].float()
    adapted = load_causal_lm(base)
    load_adapter(adapted, tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)
    main(Config(to="minimind", model=str(tmp_path / "lora"), out=str(tmp_path / "back.pth"), dtype="float16"))
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_an_adapter_of_ours_on_some_square_layers(base, tmp_path):
    model = load_causal_lm(base)
    attach(model, AdapterConfig("lora", rank=4, alpha=12, targets="o_proj"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "lora", model, base=base)
    main(Config(to="minimind", model=str(tmp_path / "lora"), out=str(tmp_path / "lora.pth")))
    state = torch.load(tmp_path / "lora.pth", weights_only=True)
    assert state.keys() == lora_state().keys()                      # MiniMind wants all its square layers
    part = model.get_submodule("model.layers.1.self_attn.o_proj").adapters["default"]
    name = "model.layers.1.self_attn.o_proj.lora."
    assert torch.equal(state[name + "B.weight"] @ state[name + "A.weight"],
                       (3 * part.lora_B.weight) @ part.lora_A.weight)
    assert not state["model.layers.1.self_attn.q_proj.lora.B.weight"].any()


@pytest.mark.parametrize("method, targets, words", [("dora", "q_proj", "plain LoRA only"), ("ia3", "k_proj", "plain"),
                                                    ("lora", "q_proj,k_proj", "k_proj is not square")])
def test_an_adapter_that_minimind_cannot_hold(method, targets, words, base, tmp_path):
    model = load_causal_lm(base)
    attach(model, AdapterConfig(method, rank=4, targets=targets))
    save_adapter(tmp_path / "adapter", model, base=base)
    told = refusal(to="minimind", model=str(tmp_path / "adapter"), out=str(tmp_path / "x.pth"))
    assert words in told and "scripts/merge_lora.py" in told and not (tmp_path / "x.pth").exists()


# ---------------------------------------------------------------------------------------------------- refusals


class Hostile:
    """Pickled, it is a command to run."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    mark, file = tmp_path / "it_ran", tmp_path / "full_sft_512.pth"
    state = {"model.norm.weight": torch.ones(4), "x": Hostile(f"touch {mark}")}
    torch.save(state, file)
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "convert_model.py"), "--model", str(file), "--out",
                           str(tmp_path / "out"), "--tokenizer", VOCAB], capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {file}: refused, nothing was run: beside tensors it asks for ")
    assert ".system" in done.stderr and not mark.exists() and not (tmp_path / "out").exists()

    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert "refused, nothing was run" in refusal(model=str(file), out=str(tmp_path / "out"), tokenizer=VOCAB)
    file.write_bytes(pickle.dumps(state["x"]))
    assert "read safely" in refusal(model=str(file), out=str(tmp_path / "out"), tokenizer=VOCAB)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_damaged_files(content, tmp_path):
    file = tmp_path / "a.pth"
    file.write_bytes(content)
    assert str(file) in refusal(model=str(file), out=str(tmp_path / "out"), tokenizer=VOCAB)


def test_every_model_that_does_not_fit_is_told_why(tmp_path):
    def told(change, described=None, tokenizer=VOCAB, source=DENSE):
        state = state_dict(stock(source))
        change(state)
        (tmp_path / "m.json").unlink(missing_ok=True)
        if described is not None:
            (tmp_path / "m.json").write_text(json.dumps(described))
        return refusal(model=write(tmp_path / "m.pth", state), out=str(tmp_path / "out"), tokenizer=tokenizer)

    mlp = "model.layers.0.mlp."
    assert "give --tokenizer" in told(lambda state: None, tokenizer="")
    assert "before April 2025" in told(lambda state: state.update({"tok_embeddings.weight": torch.ones(2, 2)}))
    assert "shared experts" in told(lambda state: state.update({mlp + "shared_experts.0.up_proj.weight": IDS}))
    assert "one expert a token" in told(lambda state: None, source=SPARSE)      # what minimind-3's code says of it
    assert "no tensor model.embed" in told(lambda state: state.pop("model.embed_tokens.weight"))
    assert "critic.weight is (2, 40)" in told(lambda state: state.update({"critic.weight": IDS}))
    assert f"{mlp}up_proj.weight is nothing" in told(lambda state: state.pop(mlp + "up_proj.weight"))
    assert "lm_head.weight differs" in told(lambda state: state["lm_head.weight"].zero_())
    assert "do not fit 7 heads" in told(lambda state: None, {"num_attention_heads": 7})
    assert "rope_theta is 'a'" in told(lambda state: None, {"rope_theta": "a"})
    assert "hidden_act 'gelu'" in told(lambda state: None, {"hidden_act": "gelu"})
    assert "JSON object" in told(lambda state: None, [])
    assert "the tokenizer has 6400 tokens" in told(lambda state: None, tokenizer=VOCAB.replace("nano", "base"))
    assert "either a model or a LoRA" in refusal(
        model=write(tmp_path / "m.pth", lora_state() | {"model.norm.weight": torch.ones(4)}),
        base=folder_of(tmp_path / "own"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def folder_of(path, **changes):
    save_model(path, CausalLM(ModelConfig(1024, 64, 96, 1, 2, 1, **changes)), Tokenizer.load("nano"))
    return str(path)


def test_what_cannot_become_minimind_and_wrong_commands(base, tmp_path):
    def told(**changes):
        folder_of(tmp_path / "own", **changes)
        return refusal(to="minimind", model=str(tmp_path / "own"), out=str(tmp_path / "x.pth"))

    assert "no qwen2" in told(qk_norm=False, qkv_bias=True)
    assert "no biases" in told(qk_norm=False, qkv_bias=True, o_bias=True)
    assert "no sliding window" in told(sliding_window=8)
    assert "rope scaling" in told(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert "ends in .pth" in refusal(to="minimind", model=base, out=str(tmp_path / "x"))
    assert "no such file" in refusal(model=str(tmp_path / "nowhere.pth"), out=str(tmp_path / "x"))
    assert "--model and --out" in refusal(model="a.pth")
    assert "is there already" in refusal(model=base, out=base)
    lora = write(tmp_path / "lora.pth", lora_state())
    assert "--base ?" in refusal(model=lora, out=str(tmp_path / "x"))
    assert "is for another model" in refusal(model=lora, base=str(tmp_path / "own"), out=str(tmp_path / "x"))
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        write(two / f"{name}.pth", lora_state())
    assert "name one" in refusal(model=str(two), out=str(tmp_path / "x"))
