"""Saving is all or nothing, loading is strict: every way in which a folder can be wrong has its one line."""

import builtins
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model.checkpoint as checkpoint
from model.checkpoint import load_causal_lm, load_config, load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.moe import routers
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

DENSE = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)
MOE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router="sigmoid",
                          num_shared_experts=1, aux_loss_coef=1e-4)
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def born(config=DENSE, seed=0):
    torch.manual_seed(seed)
    return CausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def same(a, b):
    return torch.equal(logits(a), logits(b))


def refusal(action, *args, **kwargs):
    """The message of the UserError that action raises: one line."""
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("config", [DENSE, dataclasses.replace(DENSE, tie_word_embeddings=False), MOE],
                         ids=["tied", "untied", "moe"])
def test_saved_and_loaded_is_the_same_model(config, tmp_path):
    model = born(config)
    for router in routers(model):
        router.e_score_correction_bias.normal_()
    save_model(tmp_path / "a" / "b", model)
    loaded = load_causal_lm(tmp_path / "a" / "b")
    assert loaded.config == config and same(model, loaded) and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == config.tie_word_embeddings
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"config.json", "generation_config.json",
                                                                       "model.safetensors"}
    loaded(IDS).logits.sum().backward()
    with torch.no_grad():                       # the memory is ours: writing to it changes no file
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert same(model, load_causal_lm(tmp_path / "a" / "b"))


def test_names_in_the_file_are_those_of_transformers(tmp_path):
    save_model(tmp_path, born(MOE))
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_config(hf)
    oracle.save_pretrained(tmp_path / "oracle")
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "oracle" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in ours and "lm_head.weight" not in ours
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    model = born(MOE)
    save_model(tmp_path, model, dtype=dtype)
    assert next(model.parameters()).dtype == torch.float32
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "bias" not in name} == {dtype}
    rounded = load_causal_lm(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(rounded.get_parameter(name), parameter.to(dtype).float())
    half = load_causal_lm(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype} and half.model.theta.dtype == torch.float32
    assert torch.equal(half.model.theta, model.model.theta)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert oracle.dtype == dtype
    again = load_causal_lm(tmp_path, dtype=dtype)
    save_model(tmp_path / "again", again)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()
    assert all(torch.equal(t, stored[n]) for n, t in load_file(tmp_path / "again" / "model.safetensors").items())


def test_tokenizer_card_and_generation_settings(tmp_path):
    tokenizer = Tokenizer.load("nano")
    model = born(dataclasses.replace(DENSE, vocab_size=tokenizer.vocab_size))
    save_model(tmp_path, model, tokenizer, card="# A model\n")
    loaded, again = load_model(tmp_path)
    assert same(model, loaded) and again.fingerprint == tokenizer.fingerprint
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# A model\n"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert set(generation.eos_token_id) == set(tokenizer.stop_ids) and generation.pad_token_id == tokenizer.pad_id
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    save_model(tmp_path, model)                 # without a tokenizer: the one that is there stays, and so does the card
    assert load_model(tmp_path)[1].fingerprint == tokenizer.fingerprint
    assert (tmp_path / "README.md").exists()


def test_everybody_may_read_the_files(tmp_path):
    save_model(tmp_path, born())
    assert len({(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}) == 1


def test_other_files_in_the_folder_stay_and_old_weights_and_tokenizers_go(tmp_path):
    tokenizer = Tokenizer.load("nano")
    model = born(dataclasses.replace(DENSE, vocab_size=tokenizer.vocab_size))
    (tmp_path / "resume").mkdir()
    for name in ("metrics.jsonl", "resume/state.json", "tokenizer.model", "merges.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    save_model(tmp_path, model, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and (tmp_path / "tokenizer.model").exists()
    save_model(tmp_path, model, tokenizer)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"metrics.jsonl", "resume", "model.safetensors", "tokenizer.json"} <= names
    assert not any("-of-" in name or "index" in name for name in names)
    assert not {"tokenizer.model", "merges.txt", ".saving", ".saved"} & names


def test_shards(tmp_path):
    model = born(MOE)
    save_model(tmp_path, model, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert all(path.stat().st_size < max(20_000, largest) + 5_000 for path in shards)
    assert same(model, load_causal_lm(tmp_path))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(oracle) - logits(model)).abs().max() < 1e-5
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*"))) > 3
    assert same(model, load_causal_lm(tmp_path / "theirs"))

    shards[1].unlink()
    assert shards[1].name in refusal(load_causal_lm, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "index.json is damaged" in refusal(load_causal_lm, tmp_path)


# ----------------------------------------------------------------------------------------------- all or nothing


class Killed(BaseException):
    """Stands for the process ending here: no `except Exception` of the code under test may catch it."""


def interrupt(monkeypatch, target, name, after, error):
    """Let target.name succeed `after` times and then raise."""
    real, calls = getattr(target, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] > after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, call)


STAGES = [(os, "replace"), (os, "fsync"), (os, "open"), (builtins, "open"), (Path, "mkdir"), (Path, "write_text"),
          (Path, "unlink"), (Path, "iterdir"), (shutil, "rmtree"), (shutil, "copyfile"), (shutil, "copymode"),
          (checkpoint, "save_file")]


@pytest.mark.parametrize("target, name", STAGES, ids=[f"{t.__name__}.{n}" for t, n in STAGES])
@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
@pytest.mark.parametrize("shrinks", [False, True], ids=["same shape", "new shape"])
def test_interrupted_anywhere_the_old_or_the_new_checkpoint_loads(target, name, error, shrinks, tmp_path):
    """Also when the new one has another shape: old config.json with new weights would not load at all."""
    tokenizer = Tokenizer.load("nano")
    config = dataclasses.replace(DENSE, vocab_size=tokenizer.vocab_size)
    old = born(config)
    new = born(dataclasses.replace(config, num_hidden_layers=1) if shrinks else config, seed=1)
    outcomes = set()
    for after in range(40):
        folder = tmp_path / str(after)
        save_model(folder, old, tokenizer, max_shard_bytes=100_000)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, target, name, after, error)
            try:
                save_model(folder, new, tokenizer)
                finished = True
            except Killed:
                finished = False
            except UserError as told:
                assert "No space left" in str(told)
                finished = False
        loaded, _ = load_model(folder)
        outcomes.add(was := "new" if same(loaded, new) else "old")
        assert was == "new" or same(loaded, old)
        if finished:
            assert was == "new"
            break
        save_model(folder, new, tokenizer)      # and the next save finds nothing in its way
        assert same(load_model(folder)[0], new) and not list(folder.glob(".sav*"))
    assert finished and "new" in outcomes
    if (target, name) == (os, "replace"):
        assert outcomes == {"old", "new"} and after > 6


def test_a_first_save_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    interrupt(monkeypatch, os, "replace", 0, Killed())
    with pytest.raises(Killed):
        save_model(tmp_path / "m", born())
    assert "config.json" in refusal(load_causal_lm, tmp_path / "m")


def test_a_half_written_file_never_counts(tmp_path, monkeypatch):
    """The disk fills in the middle of the weights."""
    save_model(tmp_path, born())

    def save_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_half)
    message = refusal(save_model, tmp_path, born(seed=1))
    assert "No space left" in message and str(tmp_path) in message
    assert same(load_causal_lm(tmp_path), born())


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "m").write_text("x", encoding="utf-8")
    assert "cannot save" in refusal(save_model, tmp_path / "m", born())


# -------------------------------------------------------------------------------------------------- strictness


NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.0.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(NORM), [NORM, "(32,)", "missing"]),
    (lambda t: t.pop(EXPERT), [EXPERT, "(32, 16)", "missing"]),
    (lambda t: t.update({NORM: torch.ones(31)}), [NORM, "(31,)", "(32,)", "model.safetensors"]),
    (lambda t: t.update({EXPERT: torch.ones(16, 32)}), [EXPERT, "(16, 32)", "(32, 16)", "model.safetensors"]),
    (lambda t: t.update({"score.weight": torch.ones(1, 32)}), ["score.weight", "model.safetensors", "no part"]),
    (lambda t: t.update({"model.layers.2.mlp.x": torch.ones(1)}), ["model.layers.2.mlp.x", "no part"]),
    (lambda t: t.update({"model.layers.0.mlp.experts.4.up_proj.weight": torch.ones(16, 32)}), ["experts.4"]),
    (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq.x": torch.ones(4)}), ["inv_freq.x"]),
    (lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}), ["lm_head.weight", "differs", "tie_word"]),
], ids=range(9))
def test_wrong_tensors_are_named(change, said, tmp_path):
    save_model(tmp_path, born(MOE))
    rewrite(tmp_path / "model.safetensors", change)
    message = refusal(load_causal_lm, tmp_path)
    assert all(part in message for part in [*said, str(tmp_path)]), message


def test_harmless_extras_are_accepted(tmp_path):
    model = born()
    save_model(tmp_path, model)
    rewrite(tmp_path / "model.safetensors", lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"].clone(),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(load_causal_lm(tmp_path), model)


def test_an_untied_model_needs_its_head(tmp_path):
    save_model(tmp_path, born())
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(load_causal_lm, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 300, 0.5, 0.999])
def test_a_truncated_file_is_told_so(keep, tmp_path):
    save_model(tmp_path, born())
    path = tmp_path / "model.safetensors"
    os.truncate(path, int(keep * path.stat().st_size) if keep < 1 else keep)
    message = refusal(load_causal_lm, tmp_path)
    assert "damaged or cut short" in message and str(path) in message


def test_garbage_is_told_so(tmp_path):
    save_model(tmp_path, born())
    (tmp_path / "model.safetensors").write_bytes(os.urandom(5000))
    assert "damaged" in refusal(load_causal_lm, tmp_path)
    for text in ("{", "[1]", "\udcff"):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert "config.json" in refusal(load_config, tmp_path)


def test_folders_that_are_no_checkpoints(tmp_path):
    assert "no model folder" in refusal(load_model, tmp_path / "absent")
    assert "no config.json" in refusal(load_model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "--adapter" in refusal(load_model, tmp_path)
    save_model(tmp_path, born())
    (tmp_path / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(load_model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    message = refusal(load_model, tmp_path)
    assert "pytorch_model.bin" in message and "scripts/convert_model.py" in message
    save_model(tmp_path, born())
    assert "tokenizer" in refusal(load_model, tmp_path)
    edit_json(tmp_path / "config.json", architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in refusal(load_causal_lm, tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tokenizer = Tokenizer.load("nano")
    message = refusal(save_model, tmp_path, born(), tokenizer)
    assert "64" in message and str(tokenizer.vocab_size) in message and not (tmp_path / "config.json").exists()
    save_model(tmp_path, born())
    tokenizer.save(tmp_path)
    assert str(tokenizer.vocab_size) in refusal(load_model, tmp_path)


def test_loading_draws_no_random_numbers_and_builds_on_the_device(tmp_path):
    save_model(tmp_path, born(MOE))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = load_causal_lm(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers(), *(r.load for r in routers(model))])
