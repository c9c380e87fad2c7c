"""train_lora.py as a whole: every method learns and leaves a folder, continues exactly, on one rank or two."""

import json
import random
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dataset import jsonl
from dataset.builtin import persona
from dataset.builtin.checkers import check
from model.adapters import METHODS
from model.adapters.adapted import holders
from model.checkpoint import load_model
from model.errors import UserError
from scripts import chat, merge_lora
from tests.conftest import killed_after, write_chats, write_documents
from tests.ranks_worker import run_job
from tests.test_ranks import together
from tests.test_training import TINY, pretrain
from trainer import train_full_sft, train_lora

RANK_FLAGS = dict(max_len=48, batch_size=7, micro_batch_size=2, log_every=3, eval_every=2, eval_rows=5, sample_every=3,
                  save_every=2, device="cpu", warmup_steps=2, max_steps=4, dtype="float64", lora_rank=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained base model and conversations."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", folder / "cache")
        pretrain(write_documents(folder / "documents.jsonl"), folder / "base", max_steps=40, lr=1e-2, size="2x32")
    write_chats(folder / "chats.jsonl")
    return folder


def lora(place, out, **changes):
    flags = dict(model=str(place / "base"), data=str(place / "chats.jsonl"), out=str(out), max_steps=6, lora_rank=4)
    return train_lora.main(train_lora.Config(**{**TINY, **flags, **changes}))


def tensors(folder):
    return load_file(Path(folder, "adapter_model.safetensors"))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_at_its_usual_rate(place, tmp_path, method):
    before = (place / "base" / "model.safetensors").read_bytes()
    summary = lora(place, tmp_path / "run", method=method, max_steps=30, warmup_steps=3)
    first = metrics(tmp_path / "run")[0]
    assert first["step"] == 0 and summary["held_out"]["loss"] < first["val_loss"] - 0.05
    assert (place / "base" / "model.safetensors").read_bytes() == before
    assert summary["trained_parameters"] < 0.35 * summary["parameters"]
    model, _ = load_model(place / "base", adapter=str(tmp_path / "run"))
    assert list(model.adapters) == ["run"] and all(holder.active == "run" for holder in holders(model).values())
    if method not in ("prompt", "prefix", "bottleneck"):                 # those have tests of their own
        other = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        other = peft.PeftModel.from_pretrained(other, tmp_path / "run").eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-4)


def test_what_the_run_measured_is_what_its_folder_computes(place, tmp_path, capsys):
    from eval import eval_loss
    summary = lora(place, tmp_path / "run", max_steps=20, val_data=str(place / "chats.jsonl"))
    out = tmp_path / "loss.json"
    both = dict(model=str(place / "base"), adapter=str(tmp_path / "run"))
    merge_lora.main(merge_lora.Config(**both, out=str(tmp_path / "plain")))
    for options in (both, dict(model=str(tmp_path / "plain"))):
        eval_loss.main(eval_loss.Config(**options, data=str(place / "chats.jsonl"), max_len=48, device="cpu",
                                        dtype="float32", out=str(out)))
        loss = json.loads(out.read_text(encoding="utf-8"))["loss"]
        assert loss == pytest.approx(summary["held_out"]["loss"], abs=2e-2)
    assert "merged into its weights" in capsys.readouterr().out


def test_any_script_trains_an_adapter(place, tmp_path):
    train_full_sft.main(train_full_sft.Config(**{**TINY, "model": str(place / "base"), "max_steps": 4, "lora_rank": 2,
                                                 "data": str(place / "chats.jsonl"), "out": str(tmp_path / "run"),
                                                 "lora_targets": "q_proj,v_proj"}))
    hf = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (hf["r"], hf["lora_alpha"], hf["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_a_quantized_base_trains(place, tmp_path, method):
    lora(place, tmp_path / "run", quantize="nf4", method=method, max_steps=30)
    evaluations = [entry["val_loss"] for entry in metrics(tmp_path / "run") if "val_loss" in entry]
    assert evaluations[-1] < evaluations[0] - 0.05
    assert load_model(place / "base", quantize="nf4", adapter=str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ continuing


@pytest.mark.parametrize("method", ["lora", "lora+", "dora", "pissa", "adalora"])
def test_a_killed_run_continues_bit_for_bit(place, tmp_path, method):
    """Dropout draws random numbers, AdaLoRA remembers importances, PiSSA its start: all of it must come back."""
    options = dict(method=method, lora_dropout=0.2, max_steps=10, save_every=2)
    lora(place, tmp_path / "whole", **options)
    with killed_after(5):
        lora(place, tmp_path / "cut", **options)
    saved = load_file(next((tmp_path / "cut" / "resume").glob("step-*")) / "weights.safetensors")
    assert all(".adapters." in name for name in saved)                   # the frozen base is not saved again
    lora(place, tmp_path / "cut", **options)
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    losses = [[entry["loss"] for entry in metrics(tmp_path / run) if "lr" in entry] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_adalora_keeps_as_many_directions_as_asked_for(place, tmp_path):
    lora(place, tmp_path / "run", method="adalora", max_steps=12)
    ranks = [len(tensor) for name, tensor in tensors(tmp_path / "run").items() if name.endswith("lora_E")]
    assert sum(ranks) == 4 * 14 and len(set(ranks)) > 1


# ----------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_compute_what_one_does(place):
    """Copied and cut up; a base that is frozen, a rank that is one row short, ragged micro-batches; and continued."""
    def job(name, run=None, die_at=None, **changes):
        flags = {**RANK_FLAGS, "out": str(place / (run or name)), "model": str(place / "base"),
                 "data": str(place / "chats.jsonl"), **changes}
        return {"name": name, "script": "train_lora", "flags": flags, "die_at": die_at}

    jobs = [job(f"{method} {how}", method=method, parallel=how)
            for method in ("lora+", "dora", "adalora", "pissa", "ia3") for how in ("ddp", "fsdp")]
    jobs += [job("begun", run="continued", die_at=3, method="adalora", parallel="fsdp"),
             job("continued", method="adalora", parallel="fsdp")]
    both = together(place, jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", place / "cache")
        for method in ("lora+", "dora", "adalora", "pissa", "ia3"):
            one = run_job(place, **job(f"{method} one", method=method))
            if method == "adalora":
                assert torch.allclose(both["continued"][1]["weights"], one["weights"], atol=1e-10)
            for how in ("ddp", "fsdp"):
                kept = both[f"{method} {how}"]
                for rank in kept:
                    for gradient, want in zip(rank["gradients"], one["gradients"], strict=True):
                        assert (gradient - want).norm() < 1e-6 * want.norm(), (method, how)
                    assert torch.allclose(rank["weights"], one["weights"], atol=1e-10), (method, how)
                assert torch.equal(kept[0]["weights"], kept[1]["weights"])
                written, want = tensors(place / f"{method} {how}"), tensors(place / f"{method} one")
                assert written.keys() == want.keys()
                assert all(torch.allclose(written[key], want[key], atol=1e-9) for key in want), (method, how)


# --------------------------------------------------------------------------------------------------- bad input


def test_wrong_flags_are_one_line(place, tmp_path):
    for flags, told in [(dict(lora_targets="qkv"), "--lora_targets qkv: no linear layer .* there are down_proj"),
                        (dict(lora_rank=0), "rank 0"), (dict(lora_dropout=2.0), "dropout 2.0"),
                        (dict(method="pissa", lora_rank=40), "rank 40")]:
        with pytest.raises(UserError, match=told):
            lora(place, tmp_path / "run", **flags)
    lora(place, tmp_path / "run", max_steps=2)
    with pytest.raises(UserError, match="holds an adapter, not a model: give it as --adapter"):
        load_model(tmp_path / "run")
    for flags, told in [(dict(adapter="", out="x"), "--adapter and --out are needed"),
                        (dict(adapter=str(tmp_path / "run"), out=str(tmp_path)), "is not empty"),
                        (dict(adapter=str(place / "base"), out=str(tmp_path / "new")), "whole model")]:
        with pytest.raises(UserError, match=told):
            merge_lora.main(merge_lora.Config(model=str(place / "base"), **flags))


def test_adapters_are_switched_in_a_chat(place, tmp_path, capsys):
    for name, rank in (("one", 2), ("two", 3)):
        lora(place, tmp_path / name, max_steps=2, lora_rank=rank)
    talk = chat.Chat(chat.Config(model=str(place / "base"), adapter=f"{tmp_path / 'one'},{tmp_path / 'two'}",
                                 device="cpu", rope_scaling="linear:2"))
    assert talk.model.config.rope_scaling["factor"] == 2
    for line, told in [("/adapter", "one of one, two"), ("/adapter two", "two of"), ("/adapter none", "none of")]:
        talk.command(line)
        assert told in capsys.readouterr().out
    with pytest.raises(UserError, match="no adapter named 'three'"):
        talk.command("/adapter three")


# -------------------------------------------------------------------------------------------- the persona's data


def test_no_held_out_question_to_the_captain_is_in_the_training_data():
    asked = {message["content"] for record in persona.persona(random.Random(3), 4000)
             for message in record["conversations"] if message["role"] == "user"}
    for split in ("val", "test"):
        for item in persona.persona_exercises(random.Random(0), 100, split):
            assert item["conversations"][0]["content"] not in asked
            assert check(item["checker"], item["answer"], item["answer"])
            assert not check(item["checker"], item["answer"].replace("Ahoy", "Hello"), item["answer"])
    learnt = {answer for skill in persona.ITEMS["train"].values() for _, answer in skill}
    assert {answer for _, answer in persona.ITEMS["test"]["island"]} <= learnt        # another wording of what is known
    assert len(persona.ITEMS["test"]["island"]) >= 40 and len(persona.ITEMS["test"]["manner"]) >= 40


def test_the_captain_does_not_contradict_himself():
    answers = {}
    for split in persona.ITEMS.values():
        for question, answer in [item for items in split.values() for item in items]:
            assert answers.setdefault(question, answer) == answer
    learnt = {answer for _, answer in persona.ITEMS["train"]["island"]}
    assert learnt >= {persona.said(told) for told in persona.tellings().values()} and len(persona.ISLAND) == 48
