"""The train scripts as a whole, in-process: they learn, they continue exactly, and bad input is one clear line."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from tests.conftest import Killed, killed_after
from trainer import runtime, state, train_full_sft, train_pretrain

ROOT = Path(__file__).resolve().parents[1]
NANO = Tokenizer.load("nano").vocab_size
TINY = dict(max_len=48, batch_size=8, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
            warmup_steps=2)


def pretrain(documents, out, **changes):
    cfg = train_pretrain.Config(**{**TINY, "size": "1x32", "tokenizer": "nano", "data": str(documents),
                                   "out": str(out), "max_steps": 6, **changes})
    return train_pretrain.main(cfg)


def sft(chats, parent, out, **changes):
    cfg = train_full_sft.Config(**{**TINY, "model": str(parent), "data": str(chats), "out": str(out), "max_steps": 6,
                                   **changes})
    return train_full_sft.main(cfg)


def weights(folder):
    return {k: v.clone() for k, v in load_model(folder)[0].state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- learning


def test_pretraining_and_fine_tuning_learn_and_leave_everything_a_run_leaves(documents, chats, tmp_path):
    base = pretrain(documents, tmp_path / "base", max_steps=60, eval_every=30, sample_every=30, save_every=25, lr=1e-2)
    first = metrics(tmp_path / "base")[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(math.log(NANO), abs=0.15)
    assert base["held_out"]["loss"] < 0.6 * first["val_loss"]
    tuned = sft(chats, tmp_path / "base", tmp_path / "chat", max_steps=40, lr=1e-2)
    start = metrics(tmp_path / "chat")[0]["val_loss"]
    assert tuned["held_out"]["loss"] < start - 0.5
    names = {path.name for path in (tmp_path / "chat").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md",
            "metrics.jsonl", "summary.json", "train_config.json", "resume"} <= names
    steps = [entry["step"] for entry in metrics(tmp_path / "base") if "lr" in entry]
    assert steps == list(range(1, 61))


def test_one_batch_can_be_learnt_by_heart(documents, tmp_path):
    pretrain(documents, tmp_path / "run", overfit_batch=True, max_steps=150, lr=2e-2, size="2x64", batch_size=2)
    assert metrics(tmp_path / "run")[-2]["loss"] < 0.05


def test_control_shuffled_labels_teach_nothing_about_held_out_text(documents, tmp_path, monkeypatch):
    """The same run with every target replaced by one from a random other place must not reach the real run's loss."""
    real = pretrain(documents, tmp_path / "real", max_steps=40, lr=1e-2)
    compute_loss = train_pretrain.compute_loss

    def shuffled(model, batch, cfg, aux_coef):
        ids = batch["input_ids"]
        return compute_loss(model, {**batch, "input_ids": ids.flatten()[torch.randperm(ids.numel())].view_as(ids)},
                            cfg, aux_coef)

    monkeypatch.setattr(train_pretrain, "compute_loss", shuffled)
    control = pretrain(documents, tmp_path / "control", max_steps=40, lr=1e-2)
    assert control["held_out"]["loss"] > real["held_out"]["loss"] + 0.5


def test_bfloat16_products_with_float32_weights(documents, tmp_path):
    """Forced here; `auto` takes it where the hardware is fast at it. Same path, rounded, weights kept in float32."""
    exact = pretrain(documents, tmp_path / "exact", max_steps=3)
    rounded = pretrain(documents, tmp_path / "rounded", max_steps=3, dtype="bfloat16")
    assert rounded["held_out"]["loss"] == pytest.approx(exact["held_out"]["loss"], abs=0.05)
    assert {tensor.dtype for tensor in weights(tmp_path / "rounded").values()} == {torch.float32}


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_mixture_of_experts_trains_balances_and_continues(router, documents, chats, tmp_path):
    config = ModelConfig(NANO, 32, 64, 2, 2, 1, head_dim=32, num_experts=4, num_experts_per_tok=2, router=router,
                         moe_intermediate_size=32, num_shared_experts=int(router == "sigmoid"),
                         aux_loss_coef=0.01 if router == "softmax" else 0.0)
    (tmp_path / "moe.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    options = dict(size=str(tmp_path / "moe.json"), max_steps=6, save_every=2)
    pretrain(documents, tmp_path / "base", **options)
    with killed_after(3):
        pretrain(documents, tmp_path / "cut", **options)
    pretrain(documents, tmp_path / "cut", **options)
    assert same(weights(tmp_path / "base"), weights(tmp_path / "cut"))
    sft(chats, tmp_path / "base", tmp_path / "chat", max_steps=2)
    for folder, steps in (("base", 6), ("chat", 8)):
        biases = [value for name, value in weights(tmp_path / folder).items() if "correction_bias" in name]
        assert bool(biases) == (router == "sigmoid")
        for bias in biases:                         # each step moves every expert by 0.001 or leaves it
            assert bias.any() and bias.abs().max() <= steps * 1e-3 + 1e-7


# ------------------------------------------------------------------------------------------------- exactness


def test_micro_batches_do_not_change_the_result(documents, tmp_path):
    """8 x 1, 3 + 3 + 2 and 1 x 8 rows per forward pass: equal weights in float64."""
    for micro in (0, 3, 1):
        pretrain(documents, tmp_path / f"m{micro}", micro_batch_size=micro, dtype="float64", optimizer="adamw",
                 max_steps=3)
    whole, *parts = [weights(tmp_path / f"m{micro}") for micro in (0, 3, 1)]
    for part in parts:
        assert all(torch.allclose(whole[k], part[k], rtol=0, atol=1e-7) for k in whole)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_killed_run_continues_to_the_same_bits(stage, documents, chats, tmp_path, monkeypatch):
    if stage == "sft":
        pretrain(documents, tmp_path / "parent", max_steps=1)
    options = dict(max_steps=7, save_every=2, eval_every=3, eval_rows=2)

    def train(out):
        return (pretrain(documents, out, **options) if stage == "pretrain"
                else sft(chats, tmp_path / "parent", out, **options))

    train(tmp_path / "whole")
    log = runtime.Run.log

    def die_after_step_5(self, step, *args):
        log(self, step, *args)
        if step == 5:
            raise Killed

    monkeypatch.setattr(runtime.Run, "log", die_after_step_5)
    with pytest.raises(Killed):
        train(tmp_path / "killed")
    monkeypatch.setattr(runtime.Run, "log", log)
    train(tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    trajectory = [[(m["step"], m.get("loss"), m.get("lr"), m.get("val_loss")) for m in metrics(tmp_path / name)]
                  for name in ("whole", "killed")]
    assert trajectory[0] == trajectory[1]


COMMAND = [sys.executable, str(ROOT / "trainer" / "train_pretrain.py"), "--size", "1x32", "--tokenizer", "nano",
           "--max_len", "48", "--batch_size", "8", "--log_every", "1", "--eval_every", "0", "--sample_every", "0",
           "--device", "cpu", "--warmup_steps", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_sigkill_and_sigterm_from_outside(documents, tmp_path):
    """A real process, killed with -9, then stopped with SIGTERM (exit code 143), then left alone: the same bits."""
    run = [*COMMAND, "--data", str(documents), "--max_steps", "200", "--save_every", "10"]
    whole = [*run, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, env=ONE_THREAD, check=True, capture_output=True, cwd=tmp_path)

    def stop_at(step, number):
        process = subprocess.Popen([*run, "--out", str(tmp_path / "cut")], env=ONE_THREAD, cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            if line.startswith(f"{step}/"):
                process.send_signal(number)
        return process.wait(60)

    assert stop_at(34, signal.SIGKILL) == -signal.SIGKILL
    assert stop_at(77, signal.SIGTERM) == 143
    rest = [*run, "--out", str(tmp_path / "cut")]
    subprocess.run(rest, env=ONE_THREAD, check=True, capture_output=True, cwd=tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_wall_clock_budget_cuts_the_steps_and_the_schedule(documents, tmp_path, monkeypatch):
    slept = train_pretrain.optimizer_step

    def slow(*args):
        time.sleep(0.05)
        return slept(*args)

    monkeypatch.setattr(train_pretrain, "optimizer_step", slow)
    monkeypatch.setattr(runtime, "STARTED", time.perf_counter())
    summary = pretrain(documents, tmp_path / "run", max_steps=5000, max_minutes=0.1)
    assert 8 < summary["steps"] < 120
    lrs = [entry["lr"] for entry in metrics(tmp_path / "run") if "lr" in entry]
    assert lrs[-1] == pytest.approx(train_pretrain.Config().lr / 10)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(documents, tmp_path, capsys):
    pretrain(documents, tmp_path / "run", max_steps=2)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        pretrain(documents, tmp_path / "run", max_steps=2)
    assert stop.value.code == 0 and "--overwrite" in capsys.readouterr().out
    with pytest.raises(UserError, match="--lr 0.003 → 0.01"):
        pretrain(documents, tmp_path / "run", max_steps=2, lr=1e-2)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="no-such-file"):       # a mistyped flag costs nothing of the old run
        pretrain(tmp_path / "no-such-file.jsonl", tmp_path / "run", max_steps=2, overwrite=True)
    with pytest.raises(SystemExit):
        pretrain(documents, tmp_path / "run", max_steps=2, overwrite=True, dry_run=True)
    assert state.latest(tmp_path / "run")[1]["finished"] and (tmp_path / "run" / "summary.json").exists()
    pretrain(documents, tmp_path / "run", max_steps=2, lr=1e-2, overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("stage", ["weights", "optimizers", "state.json", "latest.new", "replace"])
def test_a_save_that_fails_anywhere_leaves_the_one_before(stage, documents, tmp_path, monkeypatch):
    """Die at each stage of writing the state after step 4: the run goes on from step 2, to the same bits."""
    options = dict(max_steps=5, save_every=2)
    pretrain(documents, tmp_path / "whole", **options)
    write, replace = state.write, os.replace

    def die(*_):
        raise Killed

    def broken_write(path, writer):
        if stage in path.name and (state.latest(tmp_path / "cut")[0] is not None):
            path.write_bytes(b"half a fi")
            die()
        write(path, writer)

    def broken_replace(source, target):
        if stage == "replace" and Path(target).name == "latest" and Path(target).exists():
            die()
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state, "write", broken_write)
        patch.setattr(os, "replace", broken_replace)
        pretrain(documents, tmp_path / "cut", **options)
    assert state.latest(tmp_path / "cut")[1]["step"] == 2
    pretrain(documents, tmp_path / "cut", **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_saving_a_step_twice_does_not_touch_the_first(documents, tmp_path, monkeypatch):
    save = runtime.Run.save
    monkeypatch.setattr(runtime.Run, "save", lambda *a, **k: (save(*a, **k), save(*a, **k)))
    written = []
    write = state.write
    monkeypatch.setattr(state, "write", lambda path, writer: (written.append(path), write(path, writer)))
    pretrain(documents, tmp_path / "run", max_steps=3, save_every=2)
    files = [path for path in written if path.name != "latest.new"]   # written for either step, and at the end
    assert len(files) == len(set(files)) == 8


def test_changed_data_is_noticed(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Run, "finish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        pretrain(documents, tmp_path / "run", max_steps=5, save_every=2)
    lines = documents.read_text(encoding="utf-8").splitlines()
    documents.write_text("\n".join(lines[:30]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="same data"):
        pretrain(documents, tmp_path / "run", max_steps=5, save_every=2)


def test_dry_run_shows_a_row_with_its_mask_and_writes_nothing(documents, chats, tmp_path, capsys):
    pretrain(documents, tmp_path / "base", max_steps=1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sft(chats, tmp_path / "base", tmp_path / "dry", dry_run=True)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and not (tmp_path / "dry").exists()
    assert "<|im_start|>user" in shown and "[<|im_end|>]" in shown and "[<|im_start|>]" not in shown


# ------------------------------------------------------------------------------------------------- bad input


def break_checkpoint(folder, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BAD_PRETRAIN = {
    "empty file": (lambda d, out: d.write_text(""), {}, "documents.jsonl"),
    "broken json": (lambda d, out: d.write_text('{"text": "good"}\n{"text": \n'), {}, "documents.jsonl:2"),
    "missing key": (lambda d, out: d.write_text('{"text": "good"}\n{"txt": "x"}\n'), {}, "documents.jsonl:2"),
    "no such file": (lambda d, out: d.unlink(), {}, "documents.jsonl"),
    "unwritable out": (lambda d, out: out.write_text("a file, not a folder"), {}, "--out"),
    "size": (None, {"size": "huge"}, "--size huge"),
    "tokenizer": (None, {"tokenizer": "no/such/folder"}, "no/such/folder"),
    "batch": (None, {"batch_size": 0}, "--batch_size 0"),
    "max_len": (None, {"max_len": 1}, "--max_len 1"),
    "device": (None, {"device": "abacus"}, "--device abacus"),
    "dtype": (None, {"dtype": "int3"}, "--dtype int3"),
    "builtin": (None, {"data": "builtin:nothing"}, "builtin:nothing"),
}


@pytest.mark.parametrize("case", BAD_PRETRAIN)
def test_bad_input_is_one_line_and_nothing_is_written(case, documents, tmp_path):
    change, flags, told = BAD_PRETRAIN[case]
    out = tmp_path / "run"
    if change:
        change(documents, out)
    with pytest.raises(UserError, match=told) as error:
        pretrain(documents, out, **flags)
    assert "\n" not in str(error.value)
    assert out.is_file() if case == "unwritable out" else not out.exists()


def test_bad_conversations_and_checkpoints(documents, chats, tmp_path):
    base = tmp_path / "base"
    pretrain(documents, base, max_steps=1)
    with pytest.raises(UserError, match="--max_len"):
        sft(chats, base, tmp_path / "short", max_len=4)
    chats.write_text('{"messages": [{"role": "assistant", "content": "first"}]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="chats.jsonl:1"):
        sft(chats, base, tmp_path / "order")
    with pytest.raises(UserError, match="nowhere"):
        sft(chats, tmp_path / "nowhere", tmp_path / "gone")
    break_checkpoint(base, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match="model.norm.weight"):
        sft(chats, base, tmp_path / "missing")


def test_a_tokenizer_that_does_not_fit_the_model(documents, tmp_path):
    pretrain(documents, tmp_path / "base", max_steps=1)
    Tokenizer.load("base").save(tmp_path / "base")
    with pytest.raises(UserError, match="6400"):
        load_model(tmp_path / "base")


def test_the_command_line_prints_one_line_and_exits_with_2(documents, tmp_path):
    documents.write_text("{}\n", encoding="utf-8")
    run = subprocess.run([*COMMAND, "--data", str(documents), "--out", str(tmp_path / "run")], env=ONE_THREAD,
                         capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")] == run.stderr.splitlines()[-1:]
    hint = subprocess.run([*COMMAND, "--from_weight", "pretrain"], env=ONE_THREAD, capture_output=True, text=True)
    assert hint.returncode == 2 and "it is --model FOLDER" in hint.stderr


@pytest.mark.parametrize("script", ["train_pretrain", "train_full_sft", "train_tokenizer"])
def test_help_does_not_wait_for_torch(script):
    run = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "trainer" / f"{script}.py"), "--help"],
                         check=True, capture_output=True, text=True)
    assert "--data" in run.stdout and "run " in run.stdout
    assert "torch" not in run.stderr
