"""What is settled before step 1: refusals, the micro-batch that fits, and a rehearsal that leaves no trace."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.checkpoint import load_model
from model.config import ModelConfig, named_size
from model.errors import UserError
from model.logprobs import token_logprobs
from model.moe import routers
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer import preflight, runtime, state, train_distillation, train_full_sft, train_grpo, train_pretrain
from trainer.config import MINIMIND_FLAGS
from trainer.optim import build_optimizers, lr_at

NANO = Tokenizer.load("nano").vocab_size
TINY = dict(max_len=48, batch_size=8, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
            warmup_steps=2, size="1x32", tokenizer="nano", max_steps=4, dtype="float32")


def pretrain(documents, out, **changes):
    return train_pretrain.main(train_pretrain.Config(**{**TINY, "data": str(documents), "out": str(out), **changes}))


def weights(folder):
    return load_model(folder)[0].state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def limited(most):
    """A compute_loss that runs out of memory on more rows than `most` at once."""
    compute_loss = train_pretrain.compute_loss

    def loss(model, batch, *args):
        if len(batch["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return compute_loss(model, batch, *args)

    return loss


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("flags, told", [
    ({"lr": 0.0}, "--lr 0"), ({"lr": math.nan}, "--lr nan"), ({"epochs": -1.0}, "--epochs -1"),
    ({"max_minutes": -0.5}, "--max_minutes"), ({"val_fraction": 1.0}, "--val_fraction 1"),
    ({"micro_batch_size": 9}, "at most --batch_size 8"), ({"price_per_hour": -1.0}, "--price_per_hour"),
    ({"warmup_steps": -1}, "--warmup_steps"), ({"early_stop": 2}, "--eval_every"), ({"grad_clip": -1.0}, "--grad_clip"),
    ({"max_steps": -3}, "--max_steps -3"), ({"eval_every": -1}, "--eval_every -1")])
def test_impossible_settings_are_refused_before_anything_is_read(flags, told, tmp_path):
    with pytest.raises(UserError, match=told):
        pretrain(tmp_path / "no data is looked for", tmp_path / "run", **flags)


def test_fewer_rows_than_ranks():
    cfg = train_pretrain.Config(batch_size=3)
    preflight.check_flags(cfg, 3)
    with pytest.raises(UserError, match="at least 4"):
        preflight.check_flags(cfg, 4)


def test_a_disk_that_cannot_hold_the_checkpoints(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match="1 MB are free") as error:
        pretrain(documents, tmp_path / "run")
    weight = 4 * sum(p.numel() for p in CausalLM(named_size("1x32", NANO)).parameters())
    assert 4 * weight < int(re.search(r"need (\d+) KB|need (\d+) MB", str(error.value)).group(2)) * 1e6 < 10 * weight
    assert not (tmp_path / "run").exists()


def test_a_longer_row_than_the_model_knows_is_said_and_declared(documents, tmp_path, capsys):
    pretrain(documents, tmp_path / "short", max_steps=1, max_len=16)
    options = dict(max_steps=1, model=str(tmp_path / "short"))
    pretrain(documents, tmp_path / "long", max_len=32, **options)
    assert "knows 16 positions" in capsys.readouterr().out
    assert load_model(tmp_path / "long")[0].config.max_position_embeddings == 32
    pretrain(documents, tmp_path / "shorter", max_len=8, **options)
    assert load_model(tmp_path / "shorter")[0].config.max_position_embeddings == 16


# ------------------------------------------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize("optimizer, router", [("muon", ""), ("adamw", "sigmoid"), ("muon", "softmax")])
def test_the_rehearsal_leaves_no_trace(optimizer, router, documents, tmp_path, monkeypatch):
    size = "1x32"
    if router:
        config = ModelConfig(NANO, 32, 64, 2, 2, 1, head_dim=32, num_experts=4, num_experts_per_tok=2, router=router,
                             moe_intermediate_size=32, aux_loss_coef=0.01 if router == "softmax" else 0.0,
                             num_shared_experts=int(router == "sigmoid"))
        size = str(tmp_path / "moe.json")
        Path(size).write_text(json.dumps(config.to_hf()), encoding="utf-8")
    rehearse, seen = preflight.rehearse, []

    def watched(run, model, wrapped, optimizers, *rest):
        before = state.random_state(run.device)["torch"]
        found = rehearse(run, model, wrapped, optimizers, *rest)
        assert torch.equal(before, state.random_state(run.device)["torch"])
        assert all(p.grad is None for p in model.parameters()) and not any(o.state for o in optimizers)
        assert not any(r.load.any() for r in routers(model))
        seen.append(found)
        return found

    options = dict(size=size, optimizer=optimizer)
    monkeypatch.setattr(preflight, "rehearse", watched)
    pretrain(documents, tmp_path / "with", **options)
    monkeypatch.setattr(preflight, "rehearse", lambda *_: seen[0])
    pretrain(documents, tmp_path / "without", **options)
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert seen[0].rows == 8 and seen[0].seconds > 0 and seen[0].update_seconds > 0
    assert seen[0].loss == pytest.approx(math.log(NANO), abs=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_grow_by_the_same_bytes_with_every_row(dtype):
    """So that the rows that fit can be told from what one row and two rows take."""
    torch.manual_seed(0)
    model = CausalLM(named_size("2x64", 300))
    ids = torch.randint(300, (6, 40))

    def kept(rows, length=40):
        def forward():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                return token_logprobs(model, ids[:rows, :length])[0].sum()
        return preflight.bytes_for_backward(model, forward)

    row = kept(2) - kept(1)
    assert kept(6) == pytest.approx(kept(1) + 5 * row, rel=0.02)
    assert 40 * 2 * 64 * 4 < kept(2, 20) - kept(1, 20) < 0.6 * row       # more than the residual stream; half for half
    fixed = kept(1) - row
    if dtype == "bfloat16":                                              # weights in bfloat16: once, not per row
        assert fixed > 2 * 2 * (4 * 64 * 64)


def test_running_out_of_memory_halves_the_micro_batch_and_the_run_remembers(documents, tmp_path, monkeypatch, capsys):
    whole = dict(max_steps=5, save_every=2)
    pretrain(documents, tmp_path / "known", **whole, micro_batch_size=2)
    log = runtime.Run.log

    def die_after_step_3(self, step, *args):
        log(self, step, *args)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain, "compute_loss", limited(3))
        patch.setattr(runtime.Run, "log", die_after_step_3)
        with pytest.raises(KeyboardInterrupt):
            pretrain(documents, tmp_path / "run", **whole)
    assert "2 rows at once" in capsys.readouterr().out
    assert state.latest(tmp_path / "run")[1]["micro_batch_size"] == 2
    monkeypatch.setattr(preflight, "rehearse", None)                     # a continued run measures nothing
    summary = pretrain(documents, tmp_path / "run", **whole)
    assert summary["micro_batch_size"] == 2 and summary["planned_minutes"] > 0
    assert same(weights(tmp_path / "known"), weights(tmp_path / "run"))


def test_the_micro_batch_may_be_changed_on_the_way(documents, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pretrain(documents, tmp_path / "run", save_every=2, dtype="float64")
    assert pretrain(documents, tmp_path / "run", save_every=2, dtype="float64", micro_batch_size=3)["steps"] == 4


def test_memory_that_is_known_to_be_short(documents, tmp_path, monkeypatch):
    """On a CPU the rows are counted, not tried: a process that takes too much would be killed."""
    lines = []
    monkeypatch.setattr(runtime.Run, "print", lambda self, *text: lines.extend(text))
    summary = pretrain(documents, tmp_path / "all")
    assert summary["micro_batch_size"] == 8
    model = CausalLM(named_size("1x32", NANO, 48))
    cfg = train_pretrain.Config()
    lasting = preflight.lasting_bytes(model, build_optimizers(model, cfg))
    row = next(float(found[1]) for found in (re.search(r"x (\d+) KB of act", line) for line in lines) if found) * 1e3

    def free(rows):
        monkeypatch.setattr(preflight, "free_memory", lambda device: (
            lasting["gradients"] + lasting["optimizer"] + rows * row / preflight.MARGIN))

    free(5.2)                                                             # two passes are needed: of 4 rows each
    assert pretrain(documents, tmp_path / "some")["micro_batch_size"] == 4
    free(3.1)                                                             # 8 rows in passes of at most 3: 3 + 3 + 2
    assert pretrain(documents, tmp_path / "fewer")["micro_batch_size"] == 3
    with pytest.raises(UserError, match="use --micro_batch_size 3"):
        pretrain(documents, tmp_path / "asked", micro_batch_size=8)
    free(0.5)
    with pytest.raises(UserError, match="one row of --max_len 48 does not fit"):
        pretrain(documents, tmp_path / "none")


def test_not_even_one_row(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pretrain, "compute_loss", limited(0))
    with pytest.raises(UserError, match="lower --max_len"):
        pretrain(documents, tmp_path / "run")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")])
def test_running_out_of_memory_later_says_what_to_lower(error, documents, tmp_path, monkeypatch):
    update, steps = train_pretrain.optimizer_step, []

    def fail(*args):
        steps.append(1)
        if len(steps) == 3:
            raise error
        return update(*args)

    monkeypatch.setattr(train_pretrain, "optimizer_step", fail)
    with pytest.raises(UserError, match=r"--micro_batch_size 4 \(now 8\)") as told:
        pretrain(documents, tmp_path / "run", save_every=2)
    assert "\n" not in str(told.value)
    assert pretrain(documents, tmp_path / "run", save_every=2, micro_batch_size=4)["steps"] == 4


def test_other_errors_stay_what_they_are(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pretrain, "optimizer_step", lambda *_: {}["a defect"])
    with pytest.raises(KeyError):
        pretrain(documents, tmp_path / "run")


# ------------------------------------------------------------------------------------------------- what is told


def test_the_plan_is_told_before_the_first_step(documents, tmp_path, capsys):
    pretrain(documents, tmp_path / "run", max_steps=20, price_per_hour=3600.0)
    shown = capsys.readouterr().out.split("held out after step 0")[0]
    assert all(f"\n  {name:8}" in shown for name in ("data", "device", "plan", "rate", "memory", "time"))
    minutes, price = re.search(r"about ([\d.]+) minutes for ([\d.]+):", shown).groups()
    assert float(price) / 60 == pytest.approx(float(minutes), abs=0.01)
    planned = json.loads((tmp_path / "run" / "summary.json").read_text())["planned_minutes"]
    assert planned == pytest.approx(float(minutes), abs=0.01)


def test_expected_minutes_add_up():
    cfg = SimpleNamespace(batch_size=10, eval_every=5, eval_rows=4, max_minutes=0)
    run = SimpleNamespace(world_size=2, total_steps=100, val_rows=8, seconds=lambda: 6.0)
    rehearsal = preflight.Rehearsal(rows=3, seconds=0.9, update_seconds=0.5, row_bytes=0, fixed_bytes=0, loss=0)
    assert preflight.step_seconds(cfg, 2, rehearsal) == pytest.approx(2 * 0.9 + 0.5)      # 5 rows a rank: 3 + 2
    held_out_row = 0.1 / 2
    steps, minutes = preflight.expected(cfg, run, rehearsal)
    assert steps == 100 and minutes * 60 == pytest.approx(100 * 2.3 + 20 * 4 * held_out_row + 12 * held_out_row)
    cfg.max_minutes = 1
    steps, minutes = preflight.expected(cfg, run, rehearsal)
    assert steps == int((54 - 0.6) / 2.34) and minutes * 60 <= 54


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("total, warmup", [(100, 10), (1000, 40), (20, 40), (57, 0)])
def test_the_rate_line_is_what_lr_at_does(schedule, total, warmup):
    cfg = SimpleNamespace(lr=0.5, warmup_steps=warmup, schedule=schedule)
    line = preflight.rate_line(cfg, total)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"step ([\d,]+)", line)]
    assert lr_at(numbers[0], total, cfg) == pytest.approx(0.5, rel=0.01 if schedule == "cosine" else 1e-9)
    assert ("not 40" in line) == (warmup >= total)
    if schedule == "constant":
        return
    assert numbers[-1] == total and "0.05 at" in line
    if schedule == "wsd":
        assert lr_at(numbers[1], total, cfg) == 0.5 > lr_at(numbers[1] + 1, total, cfg)


def test_lost_data_is_told():
    report = {"records": 200, "tokens": 900, "dropped": 10, "shortened": 50, "tokens_lost": 100,
              "repeats": {"data/a.jsonl": 1.5}}
    told = preflight.data_losses(report)
    assert told == (", 5.0% of the records dropped, 25.0% of the records shortened, 10.0% of the tokens lost, "
                    "a.jsonl 1.50 x")
    assert preflight.data_losses({"records": 3, "tokens": 9, "dropped": 0, "shortened": 0, "tokens_lost": 0}) == ""


def test_a_dry_run_rehearses_shows_the_first_batch_and_writes_nothing(documents, chats, tmp_path, capsys):
    pretrain(documents, tmp_path / "base", max_steps=1)
    capsys.readouterr()
    flags = {key: value for key, value in TINY.items() if key not in ("size", "tokenizer")}
    with pytest.raises(SystemExit) as stop:
        train_full_sft.main(train_full_sft.Config(**{**flags, "model": str(tmp_path / "base"), "data": str(chats),
                                                     "out": str(tmp_path / "dry"), "dry_run": True}))
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and not (tmp_path / "dry").exists()
    assert "  memory  " in shown and "  time    " in shown
    assert shown.count("tokens with loss in [brackets]") == 4 and "4 more rows" in shown
    assert re.search(r"chats\.jsonl:\d+", shown) and "[<|im_end|>]" in shown and "[<|im_start|>]" not in shown


def test_overfitting_one_batch_says_where_it_starts_and_whether_it_got_there(documents, tmp_path, capsys):
    flags = dict(overfit_batch=True, size="2x64", batch_size=2, lr=1e-2, log_every=10)
    summary = pretrain(documents, tmp_path / "run", **{**flags, "max_steps": 0})
    shown = capsys.readouterr().out
    assert summary["steps"] == runtime.OVERFIT_STEPS
    first, uniform = map(float, re.search(r"now ([\d.]+) \(.*ln V = ([\d.]+)\)", shown).groups())
    assert uniform == pytest.approx(math.log(NANO), abs=1e-4) and first == pytest.approx(uniform, abs=0.3)
    assert "learnt by heart, as" in shown and "NOT" not in shown
    pretrain(documents, tmp_path / "short", **flags)
    assert "NOT learnt by heart" in capsys.readouterr().out


def test_flags_of_minimind_are_answered():
    """What its users type, stage by stage: each is a flag here too or is answered with what does it here."""
    typed = ("from_resume use_wandb wandb_project data_path learning_rate max_seq_len accumulation_steps save_interval "
             "log_interval from_weight save_weight save_dir hidden_size num_hidden_layers use_moe lora_name "
             "num_generations max_gen_len reasoning reward_model_path num_workers epochs batch_size device dtype "
             "grad_clip")
    ours = {field.name for field in dataclasses.fields(train_pretrain.Config)}
    for flag in typed.split():
        assert (flag in ours) != (flag in MINIMIND_FLAGS), flag
    every = ours | {field.name for script in (train_distillation, train_grpo)
                    for field in dataclasses.fields(script.Config)}
    for answer in MINIMIND_FLAGS.values():                               # and none names a flag of an earlier version
        named = re.findall(r"--(\w+)", answer)
        assert set(named) <= every | {"nproc_per_node"}, answer


# ------------------------------------------------------------------------------------------------- free memory


def test_limits_of_containers_count(tmp_path):
    root = tmp_path / "cgroup"
    inner = root / "jobs" / "mine"
    inner.mkdir(parents=True)

    def write(folder, limit, used, cache):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    membership = tmp_path / "membership"
    membership.write_text("0::/jobs/mine\n")
    assert preflight.cgroup_room(membership, root) == math.inf
    write(inner, "max", 100, 0)
    assert preflight.cgroup_room(membership, root) == math.inf
    write(inner, 1000, 400, 50)
    assert preflight.cgroup_room(membership, root) == 650
    write(root / "jobs", 500, 450, 20)                                    # the group around it is nearly full
    assert preflight.cgroup_room(membership, root) == 70
    membership.write_text("0::/outside/of/this/container\n")
    write(root, 300, 100, 0)
    assert preflight.cgroup_room(membership, root) == 200

    first = root / "memory" / "mine"                                      # version 1
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("900\n")
    (first / "memory.usage_in_bytes").write_text("300\n")
    (first / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 10\n")
    membership.write_text("9:cpu:/mine\n4:memory:/mine\n")
    assert preflight.cgroup_room(membership, root) == 610
    assert preflight.cgroup_room(tmp_path / "not there", root) == math.inf


def test_free_memory_is_a_number_of_this_machine():
    assert 1e8 < preflight.free_memory(torch.device("cpu")) < 1e14
