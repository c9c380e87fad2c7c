"""scripts/export_gguf.py: every tensor and key read back by the gguf package; a decoder written here after llama.cpp's
conventions, and transformers' own reader, compute from the file what the model computes; llama.cpp too, where it is."""

import importlib.util
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from jinja2 import Environment

from model.adapters.adapted import AdapterConfig, attach
from model.adapters.folder import save_adapter
from model.checkpoint import load_causal_lm, load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel
from model.moe import routers
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts.export_gguf import CHATML, Config, inference_template, main
from tests.test_tokenizer import LLAMA3, MISTRAL, TEXTS, byte_level, sentencepiece_like
from trainer.train_tokenizer import train_sentencepiece

ROOT = pathlib.Path(__file__).resolve().parents[1]
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
NANO = Tokenizer.load("nano")
QWEN3 = ModelConfig(1024, 128, 96, 2, 4, 2, max_position_embeddings=128, initializer_range=0.1, rope_theta=5000.0)
LLAMA = replace(QWEN3, qk_norm=False)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "qwen3": QWEN3,
    "qwen3 wide": replace(QWEN3, head_dim=128, tie_word_embeddings=False),
    "qwen3 yarn": replace(QWEN3, head_dim=64, rope_scaling=YARN),
    "qwen3 yarn, own temperature": replace(QWEN3, rope_scaling=YARN | {"attention_factor": 1.3}),
    "qwen2 linear": replace(QWEN3, qk_norm=False, qkv_bias=True, tie_word_embeddings=False,
                            rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama": replace(LLAMA, head_dim=64, num_key_value_heads=4, tie_word_embeddings=False),
    "llama biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama llama3": replace(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral": replace(LLAMA, sliding_window=50),
    "qwen3moe": replace(QWEN3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "dots1": replace(QWEN3, num_experts=4, num_experts_per_tok=2, num_shared_experts=2, moe_intermediate_size=64,
                     router="sigmoid", first_k_dense=1, routed_scaling_factor=2.5),
    "dots1 untied": replace(QWEN3, num_experts=4, num_experts_per_tok=1, num_shared_experts=1, moe_intermediate_size=64,
                            router="sigmoid", tie_word_embeddings=False),
}
IDS = torch.randint(1024, (1, 40), generator=torch.Generator().manual_seed(0))


def born(config):
    """A model none of whose tensors is at its start: norms, biases and the bias of routers count."""
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    for router in routers(model):
        if router.kind == "sigmoid":
            router.e_score_correction_bias.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(name of a config, type) -> (folder, model, GGUFReader), made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name, kind="f32"):
        if (name, kind) not in made:
            folder = root / name.replace(" ", "_")
            if not folder.exists():
                save_model(folder, born(CONFIGS[name]), NANO)
            main(Config(model=str(folder), out=str(root / "gguf"), type=kind))
            reader = gguf.GGUFReader(root / "gguf" / f"{folder.name}-{kind}.gguf")
            made[name, kind] = folder, load_causal_lm(folder), reader
        return made[name, kind]

    return get


def keys_of(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors_of(reader):
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)).view(*t.shape[::-1].tolist())
            for t in reader.tensors}


def refusal(**options):
    with pytest.raises(UserError) as error:
        main(Config(**options))
    assert "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------- what the file computes


def rotation(keys, arch, d, factors, T):
    """cos and sin (T, d/2) as llama.cpp makes them from the keys."""
    speed = keys[f"{arch}.rope.freq_base"] ** (-torch.arange(0, d, 2).double() / d) / factors
    kind, s = keys.get(f"{arch}.rope.scaling.type", "none"), keys.get(f"{arch}.rope.scaling.factor", 1.0)
    length = 1.0
    if kind == "linear":
        speed = speed / s
    if kind == "yarn":
        trained, base = keys[f"{arch}.rope.scaling.original_context_length"], keys[f"{arch}.rope.freq_base"]
        low, high = (d * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
        low, high = max(0, math.floor(low)), min(d - 1, math.ceil(high))
        keep = 1 - ((torch.arange(d // 2) - low) / max(0.001, high - low)).clamp(0, 1)
        speed = speed / s * (1 - keep) + speed * keep
        length = (1 + 0.1 * math.log(s)) * keys.get(f"{arch}.rope.scaling.attn_factor", 1.0)
    angles = torch.arange(T).double()[:, None] * speed
    return (angles.cos() * length).float(), (angles.sin() * length).float()


@torch.no_grad()
def decode(reader, ids):
    """Logits (T, V) of a GGUF file, by nothing but its keys and tensors."""
    keys, W = keys_of(reader), tensors_of(reader)
    arch = keys["general.architecture"]
    H, K = keys[f"{arch}.attention.head_count"], keys[f"{arch}.attention.head_count_kv"]
    d, eps = keys[f"{arch}.attention.key_length"], keys[f"{arch}.attention.layer_norm_rms_epsilon"]
    T, used = len(ids), set()

    def w(name):
        used.add(name)
        return W[name]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * w(name)

    def linear(x, name):
        y = x @ w(f"{name}.weight").T
        return y + w(f"{name}.bias") if f"{name}.bias" in W else y

    def rotate(x):                                                          # (T, heads, d)
        cos, sin = (part[:, None] for part in angles)
        a, b = (x[..., 0::2], x[..., 1::2]) if arch == "llama" else x.chunk(2, -1)
        turned = a * cos - b * sin, b * cos + a * sin
        return torch.stack(turned, -1).flatten(-2) if arch == "llama" else torch.cat(turned, -1)

    def mlp(x, end, layer):
        gate = linear(x, f"{layer}ffn_gate{end}")
        return linear(torch.nn.functional.silu(gate) * linear(x, f"{layer}ffn_up{end}"), f"{layer}ffn_down{end}")

    def mixture(x, layer):
        logits = x @ w(f"{layer}ffn_gate_inp.weight").T
        sigmoid = keys.get(f"{arch}.expert_gating_func") == 2
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        order = scores + w(f"{layer}exp_probs_b.bias") if sigmoid else scores
        chosen = order.topk(keys[f"{arch}.expert_used_count"]).indices
        gates = scores.gather(1, chosen)
        if keys.get(f"{arch}.expert_weights_norm", arch == "qwen3moe"):
            gates = gates / gates.sum(-1, keepdim=True)
        gates = gates * keys.get(f"{arch}.expert_weights_scale", 1.0)
        up, gate, down = (w(f"{layer}ffn_{name}_exps.weight") for name in ("up", "gate", "down"))
        rows = []
        for t in range(T):
            each = [down[e] @ (torch.nn.functional.silu(gate[e] @ x[t]) * (up[e] @ x[t])) for e in chosen[t]]
            rows.append(sum(g * y for g, y in zip(gates[t], each, strict=True)))
        y = torch.stack(rows)
        return y + mlp(x, "_shexp", layer) if f"{layer}ffn_up_shexp.weight" in W else y

    angles = rotation(keys, arch, d, w("rope_freqs.weight").double() if "rope_freqs.weight" in W else 1.0, T)
    h = w("token_embd.weight")[ids]
    for i in range(keys[f"{arch}.block_count"]):
        layer = f"blk.{i}."
        x = norm(h, f"{layer}attn_norm.weight")
        q, k, v = (linear(x, f"{layer}attn_{name}").view(T, -1, d) for name in "qkv")
        if f"{layer}attn_q_norm.weight" in W:
            q, k = norm(q, f"{layer}attn_q_norm.weight"), norm(k, f"{layer}attn_k_norm.weight")
        q, k = rotate(q).transpose(0, 1), rotate(k).transpose(0, 1)         # (H, T, d), (K, T, d)
        k, v = (part.repeat_interleave(H // K, 0) for part in (k, v.transpose(0, 1)))
        scores = (q @ k.mT / math.sqrt(d)).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        h = h + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), f"{layer}attn_output")
        x = norm(h, f"{layer}ffn_norm.weight")
        h = h + (mixture(x, layer) if f"{layer}ffn_gate_inp.weight" in W else mlp(x, "", layer))
    logits = norm(h, "output_norm.weight") @ w("output.weight" if "output.weight" in W else "token_embd.weight").T
    assert used == W.keys()                                                 # nothing is there for nobody
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_of_the_file_computes_what_the_model_computes(name, exported):
    _, model, reader = exported(name)
    with torch.no_grad():
        expected = model(IDS).logits[0]
    torch.testing.assert_close(decode(reader, IDS[0]), expected, atol=1e-4, rtol=1e-4)
    assert keys_of(reader)["general.architecture"] == name.split()[0].replace("mistral", "llama")


@pytest.mark.parametrize("name", ["qwen3 wide", "qwen2 linear", "llama"])
def test_transformers_reads_the_file(name, exported):
    """An oracle by others, of weights and vocabulary. (It passes over rope scaling, over the width of Qwen3's heads,
    which it takes for 128, and over that of experts.)"""
    _, model, reader = exported(name)
    path = pathlib.Path(reader.data.filename)
    stock = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    with torch.no_grad():
        if name == "qwen2 linear":
            model = CausalLM(replace(model.config, rope_scaling=None)).eval()
            model.load_state_dict(exported(name)[1].state_dict())
        torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    if name == "qwen3 wide":
        vocabulary = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for text in TEXTS[:8]:
            assert vocabulary(text)["input_ids"] == NANO.encode(text)
        assert (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token) == (
            "<|endoftext|>", "<|im_end|>", "<|pad|>")


# ------------------------------------------------------------------------------------- formats, keys, refusals


@pytest.mark.parametrize("name", ["qwen3", "dots1"])
def test_rounding_is_that_of_each_format(name, exported):
    exact, half, eight = (tensors_of(exported(name, kind)[2]) for kind in ("f32", "f16", "q8_0"))
    kinds = {t.name: t.tensor_type.name for t in exported(name, "q8_0")[2].tensors}
    assert exact.keys() == half.keys() == eight.keys()
    for key, tensor in exact.items():
        if tensor.ndim == 1 or "ffn_gate_inp" in key:
            assert kinds[key] == "F32" and torch.equal(half[key], tensor) and torch.equal(eight[key], tensor)
            continue
        assert kinds[key] == "Q8_0" and torch.equal(half[key], tensor.half().float())
        blocks = tensor.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        assert ((eight[key].reshape(-1, 32) - blocks).abs() <= 0.5 * scale + 127 * scale * 2 ** -11).all()
        assert not torch.equal(eight[key], tensor)
    files = [keys_of(exported(name, kind)[2])["general.file_type"] for kind in ("f32", "f16", "q8_0")]
    assert files == [0, 1, 7]                                               # llama.cpp's enum llama_ftype
    assert keys_of(exported(name, "q8_0")[2])["general.quantization_version"] == 2


def test_keys_say_what_the_config_says(exported):
    keys = keys_of(exported("mistral")[2])
    assert keys["llama.context_length"] == 50                               # where plain attention is the same
    keys = keys_of(exported("dots1")[2])
    expected = {"vocab_size": 1024, "context_length": 128, "embedding_length": 128, "block_count": 2,
                "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 4,
                "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
                "rope.freq_base": 5000.0, "expert_count": 4, "expert_used_count": 2, "expert_shared_count": 2,
                "expert_feed_forward_length": 64, "expert_weights_scale": 2.5, "expert_weights_norm": True,
                "expert_gating_func": 2, "leading_dense_block_count": 1}
    for key, value in expected.items():
        assert keys[f"dots1.{key}"] == value, key
    assert keys["dots1.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["general.name"] == "dots1"
    assert not any("rope.scaling" in key for key in keys)
    assert keys_of(exported("dots1 untied")[2])["dots1.expert_weights_norm"] is False


def test_rope_scaling_at_export(exported, tmp_path):
    folder = exported("qwen3")[0]
    main(Config(model=str(folder), out=str(tmp_path), type="f32", rope_scaling="yarn:4"))
    reader = gguf.GGUFReader(tmp_path / f"{folder.name}-f32.gguf")
    assert keys_of(reader)["qwen3.context_length"] == 512
    with torch.no_grad():
        expected = load_causal_lm(folder, rope_scaling="yarn:4")(IDS).logits[0]
    torch.testing.assert_close(decode(reader, IDS[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes, words", [
    (dict(qkv_bias=True, o_bias=True), "no bias in the attention's output"),
    (dict(qk_norm=False, qkv_bias=True, head_dim=64), "qwen2 needs head_dim"),
    (dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=64), "always divides"),
    (dict(rope_scaling=CONFIGS["llama llama3"].rope_scaling), "no Llama-3 rope scaling"),
    (dict(rope_scaling=YARN | {"beta_fast": 16}), "beta_fast 32"),
    (dict(rope_scaling=YARN | {"truncate": False}), "beta_fast 32")])
def test_what_llama_cpp_computes_otherwise_is_refused(changes, words, tmp_path):
    save_model(tmp_path / "m", CausalLM(replace(QWEN3, **changes)), NANO)
    assert words in refusal(model=str(tmp_path / "m"), out=str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_folders_and_numbers_that_cannot_be_exported(tmp_path):
    model = born(QWEN3)
    out = str(tmp_path / "out")
    save_model(tmp_path / "m", model, NANO)
    assert "no model folder" in refusal(model=str(tmp_path / "nowhere"), out=out)
    main(Config(model=str(tmp_path / "m"), out=out))
    assert "--overwrite" in refusal(model=str(tmp_path / "m"), out=out)
    main(Config(model=str(tmp_path / "m"), out=out, overwrite=True))
    save_model(tmp_path / "reward", ScalarModel(QWEN3), NANO)
    assert "Qwen3ForSequenceClassification; needed here is a language model" in refusal(
        model=str(tmp_path / "reward"), out=out)
    attach(model, AdapterConfig("lora", rank=2))
    save_adapter(tmp_path / "lora", model, base=str(tmp_path / "m"))
    assert "scripts/merge_lora.py" in refusal(model=str(tmp_path / "lora"), out=out)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"bits": 4}}))
    assert "quantized" in refusal(model=str(tmp_path / "m"), out=out, overwrite=True)
    large = born(QWEN3)
    large.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    save_model(tmp_path / "large", large, NANO)
    assert "use --type f32" in refusal(model=str(tmp_path / "large"), out=out)
    save_model(tmp_path / "odd", CausalLM(replace(QWEN3, intermediate_size=40)), NANO)
    assert "multiple of 32; use --type f16" in refusal(model=str(tmp_path / "odd"), out=out, type="q8_0")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m-f16.gguf", "m-f16.Modelfile"}


# ----------------------------------------------------------------------------------------------------- tokenizer


def test_the_vocabulary_of_the_file_cuts_as_ours(exported):
    keys = keys_of(exported("qwen3")[2])
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    pieces, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(pieces) == len(kinds) == 1024
    for text, index in NANO.special.items():
        user_defined = text.strip("</>") in ("think", "answer", "tool_call", "tool_response")
        assert pieces[index] == text and kinds[index] == (4 if user_defined else 3)
    special = set(NANO.special.values())
    assert all(kind == 1 for index, kind in enumerate(kinds) if index not in special)
    assert {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "padding")} == {
        "bos": 1, "eos": 3, "eot": 3, "padding": 0}
    assert keys["tokenizer.ggml.add_bos_token"] is False

    # llama.cpp's regular expression for "qwen2", and merges by rank
    pattern = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    merges = [tuple(pair.split(" ")) for pair in keys["tokenizer.ggml.merges"]]
    rebuilt = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(pieces)}, merges))
    rebuilt.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for text in TEXTS:
        assert rebuilt.encode(text).ids == NANO.encode(text)


def check_llama_cpp_cuts(path, tokenizer):
    """Where llama.cpp is installed, it makes the same ids of texts. (One ends at 0 there; <think> is a token.)"""
    if HAS_LLAMA_CPP:
        import llama_cpp
        llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in TEXTS[1:]:
            if "\x00" not in text and "<" not in text:
                assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text


def spm(text, keys):
    """llama.cpp's tokenizer "llama": of all neighbours the two whose union scores highest become one, and again."""
    pieces, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    index = {piece: i for i, piece in enumerate(pieces)}
    parts = list((" " * keys["tokenizer.ggml.add_space_prefix"] + text).replace(" ", "▁"))
    while True:
        pairs = [(-scores[index[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in index]
        if not pairs:
            return [i for part in parts for i in ([index[part]] if part in index else
                                                  [index[f"<0x{byte:02X}>"] for byte in part.encode()])]
        at = min(pairs)[1]
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_vocabularies(form, tmp_path):
    folder = tmp_path / "vocabulary"
    if form == "tokenizer.model":
        folder.mkdir()
        words = [f"{a} {b}, the bell rang; die Glocke läutet {a}!" for a in "abcdef" for b in ("one", "two  ", "three")]
        (folder / form).write_bytes(train_sentencepiece(words * 3, 400, num_spare=0))
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    else:
        sentencepiece_like(folder, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                                    "chat_template": MISTRAL}, True)
    tokenizer = Tokenizer.load(folder)
    save_model(folder, born(replace(QWEN3, vocab_size=tokenizer.vocab_size + 3)), tokenizer)
    main(Config(model=str(folder), out=str(tmp_path)))
    keys = keys_of(gguf.GGUFReader(tmp_path / "vocabulary-f16.gguf"))
    assert keys["tokenizer.ggml.model"] == "llama" and len(keys["tokenizer.ggml.scores"]) == tokenizer.vocab_size + 3
    for text in ("the bell", " hello  the fox", "läutet 中文 😀\n", "a b c one, two"):
        assert spm(text, keys) == tokenizer.encode(text)
    check_llama_cpp_cuts(tmp_path / "vocabulary-f16.gguf", tokenizer)
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[-3:] == [5, 5, 5] and kinds.count(2) == 1 and kinds.count(6) == 256    # unused, unknown, bytes
    for text, index in tokenizer.special.items():
        assert keys["tokenizer.ggml.tokens"][index] == text and kinds[index] == (2 if text == "<unk>" else 3)
    ends = {"tokenizer.model": "<|im_end|>", "tokenizer.json": "</s>"}
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.special[ends[form]]
    assert keys.get("tokenizer.ggml.add_bos_token", False) is (form == "tokenizer.json")


def test_pre_tokenizers_by_name_and_unknown_ones(tmp_path):
    def named(change, name):
        folder = byte_level(tmp_path / name, ["<|end_of_text|>", "<|begin_of_text|>"], ["<think>"],
                            {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>", "chat_template": LLAMA3})
        spec = json.loads((folder / "tokenizer.json").read_text())
        change(spec)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        tokenizer = Tokenizer.load(folder)
        save_model(folder, CausalLM(replace(QWEN3, vocab_size=tokenizer.vocab_size)), tokenizer)
        main(Config(model=str(folder), out=str(tmp_path)))
        keys = keys_of(gguf.GGUFReader(tmp_path / f"{name}-f16.gguf"))
        check_llama_cpp_cuts(tmp_path / f"{name}-f16.gguf", tokenizer)
        assert keys["tokenizer.ggml.add_bos_token"] is True             # its post-processor puts one before a text
        return keys["tokenizer.ggml.pre"]

    def llama3(spec):
        cut = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
               r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+"}}
        to_bytes = spec["pre_tokenizer"] | {"use_regex": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, to_bytes]}

    def digits(spec):
        each = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [each, spec["pre_tokenizer"]]}
        spec["model"]["ignore_merges"] = False

    assert named(llama3, "llama3") == "llama-bpe"
    assert named(digits, "smollm") == "smollm"
    assert named(lambda spec: spec["model"].update(ignore_merges=False), "minimind") == "gpt-2"
    for name, change in {"whole words": lambda spec: None,
                         "prefix": lambda spec: (spec["model"].update(ignore_merges=False),
                                                 spec["pre_tokenizer"].update(use_regex=False)),
                         "lower": lambda spec: (spec["model"].update(ignore_merges=False),
                                                spec.update(normalizer={"type": "Lowercase"}))}.items():
        with pytest.raises(UserError, match="llama.cpp has no name for"):
            named(change, name)


MESSAGES = [
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\n\n b "}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "old"},
     {"role": "user", "content": "6*7?"},
     {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
         {"name": "calculator", "arguments": {"expression": "6*7"}}, {"name": "book", "arguments": {}}]},
     {"role": "tool", "content": "42"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "first", "tool_calls": [
        {"name": "book", "arguments": {}}]}, {"role": "tool", "content": "?"}, {"role": "tool", "content": "!"}],
]
TOOLS = [{"type": "function", "function": {"name": "book"}}, {"type": "function", "function": {"name": "calculator"}}]


def test_the_template_in_the_file_is_ours_without_training_marks(exported):
    template = keys_of(exported("qwen3")[2])["tokenizer.chat_template"]
    assert "generation %" not in template and inference_template(None) is None
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    for messages in MESSAGES:
        for switch in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            text = plain.render(messages=messages, add_generation_prompt=True, **switch)
            ids, _ = NANO.render(messages, None, True, switch.get("enable_thinking"))
            assert text == NANO.decode(ids, skip_special=False)


def go(source, data):
    """Text of a template of Go's text/template: the part of the language that CHATML uses."""
    parts = re.split(r"(\{\{.*?\}\})", source)
    for i in range(1, len(parts), 2):                                       # {{- trims what is before, -}} what follows
        if parts[i].startswith("{{- "):
            parts[i - 1] = parts[i - 1].rstrip()
        if parts[i].endswith(" -}}"):
            parts[i + 1] = parts[i + 1].lstrip()
    tokens = [re.sub(r"^\{\{-? *| *-?\}\}$", "", part) if i % 2 else part for i, part in enumerate(parts)]

    def block(at):
        """The nodes from token `at` to the {{ else }} or {{ end }} that closes them, and where that is."""
        nodes = []
        while at < len(tokens) and not (at % 2 and tokens[at].split()[0] in ("else", "end")):
            word = tokens[at].split()[0] if at % 2 else ""
            if word in ("if", "range"):
                branches, at, condition = [], at, tokens[at].removeprefix(word)
                while True:
                    body, at = block(at + 1)
                    branches.append((condition, body))
                    if tokens[at] == "end":
                        break
                    condition = tokens[at].removeprefix("else").strip().removeprefix("if") or "true"
                nodes.append((word, branches))
            else:
                nodes.append(("do" if at % 2 else "text", tokens[at]))
            at += 1
        return nodes, at

    def value(text, dot, names):
        words = re.findall(r'\(|\)|"[^"]*"|[^\s()]+', text)

        def term():
            word = words.pop(0)
            if word == "(":
                result = call()
                words.pop(0)
                return result
            if word[0] in '"-0123456789':
                return json.loads(word)
            start = names[word.split(".")[0]] if word[0] == "$" else dot
            for key in filter(None, word.split(".")[1:]):
                start = start.get(key) if start else None
            return start

        def call():
            if words[0] not in ("and", "or", "not", "eq", "gt", "true"):
                return term()
            name, values = words.pop(0), []
            while words and words[0] != ")":
                values.append(term())
            known = {"and": lambda *v: next((x for x in v if not x), v[-1]), "eq": lambda a, b: a == b,
                     "or": lambda *v: next((x for x in v if x), v[-1]), "gt": lambda a, b: a > b,
                     "not": lambda v: not v, "true": lambda: True}
            return known[name](*values)

        return call()

    def write(nodes, dot, names):
        out = ""
        for kind, content in nodes:
            if kind == "text":
                out += content
            elif kind == "if":
                out += next((write(body, dot, names) for test, body in content if value(test, dot, names)), "")
            elif kind == "range":
                test, body = content[0]
                variables, _, items = test.rpartition(":=")
                for i, item in enumerate(value(items, dot, names) or []):
                    new = dict(zip([name.strip(" ,") for name in variables.split()], (i, item), strict=False))
                    inner = names | new
                    out += write(body, item, inner)
                    names.update({name: inner[name] for name in names if name not in new})
            elif "=" in content:
                name, _, rest = content.partition("=")
                names[name.strip(" :")] = value(rest, dot, names)
            else:
                result = value(content, dot, names)
                out += json.dumps(result, separators=(",", ":")) if isinstance(result, dict) else str(result or "")
        return out

    nodes, _ = block(0)
    return write(nodes, data, {"$": data})


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", MESSAGES)
def test_the_template_of_the_modelfile_is_ours(messages, tools):
    """As Ollama fills it in: names in Go's spelling, system messages apart; its JSON has no spaces."""
    spelled = [{"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content"), "ToolCalls": [
        {"Function": {"Name": c["name"], "Arguments": c["arguments"]}} for c in m.get("tool_calls", [])]}
        for m in messages]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    for think, switch in ((None, None), (True, None), (False, False)):
        data = {"Messages": spelled, "System": system, "Tools": tools, "Think": think, "IsThinkSet": think is not None}
        ids, _ = NANO.render(messages, tools, True, switch)
        expected = NANO.decode(ids, skip_special=False)
        for value in [*(tools or []), *(c["arguments"] for m in messages for c in m.get("tool_calls", []))]:
            expected = expected.replace(json.dumps(value), json.dumps(value, separators=(",", ":")))
        assert go(CHATML, data) == expected


def test_modelfiles(exported, tmp_path, capsys):
    folder = exported("qwen3")[0]
    text = (pathlib.Path(exported("qwen3")[2].data.filename).with_suffix(".Modelfile")).read_text(encoding="utf-8")
    assert text.startswith("FROM ./qwen3-f32.gguf\nTEMPLATE \"\"\"") and CHATML in text
    for line in ('stop "<|endoftext|>"', 'stop "<|im_end|>"', "num_ctx 128", "temperature 0.85", "repeat_penalty 1.0"):
        assert f"\nPARAMETER {line}\n" in text
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = None
    save_model(tmp_path / "base", model, tokenizer)
    main(Config(model=str(tmp_path / "base"), out=str(tmp_path)))
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "base-f16.Modelfile").read_text()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_model(tmp_path / "foreign", model, tokenizer)
    capsys.readouterr()
    main(Config(model=str(tmp_path / "foreign"), out=str(tmp_path)))
    assert "TEMPLATE" not in (tmp_path / "foreign-f16.Modelfile").read_text()
    assert "not this project's" in capsys.readouterr().out


def test_the_command(exported, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "export_gguf.py"), "--model", str(exported("qwen3")[0])]
    done = subprocess.run([*command, "--out", "there", "--type", "q8_0"], cwd=tmp_path, capture_output=True,
                          encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "") and "qwen3 in q8_0" in done.stdout
    assert (tmp_path / "there" / "qwen3-q8_0.gguf").is_file()


# ----------------------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_writes_the_same(name, kind, exported):
    """Greedy text of 32 tokens, in float32 also the logits of a prompt, and the ids of texts.

    In float16 it rounds what it multiplies, so that of two tokens of a model without training, next to equally likely,
    it may take the other one.
    """
    import llama_cpp

    _, model, reader = exported(name, kind)
    llama = llama_cpp.Llama(str(reader.data.filename), n_ctx=64, n_threads=1, logits_all=True, verbose=False,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)        # else float16
    if kind == "f32":
        llama.eval(IDS[0].tolist())
        with torch.no_grad():
            expected = model(IDS).logits[0]
        torch.testing.assert_close(torch.from_numpy(np.array(llama.scores[:40])), expected, atol=2e-3, rtol=2e-3)
        check_llama_cpp_cuts(reader.data.filename, NANO)
        llama.reset()
    prompt = IDS[0, :8].tolist()
    generator = llama.generate(prompt, temp=0.0, repeat_penalty=1.0, top_k=0, top_p=1.0, min_p=0.0)
    written = torch.tensor([next(generator) for _ in range(32)])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written.tolist()])).logits[0, 7:-1]              # (32, V)
    lost = logits.amax(1) - logits.gather(1, written[:, None])[:, 0]
    assert lost.max() <= (0.0 if kind == "f32" else 0.05)
