"""While training: numbers that are not finite, float16's scale, loss spikes, and the best weights of --early_stop."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import device as devices
from model.checkpoint import load_model
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from tests.conftest import killed_after
from trainer import runtime, state, train_pretrain
from trainer.optim import build_optimizers, optimizer_step
from trainer.watch import IN_A_ROW, Watch, is_spike

ROOT = Path(__file__).resolve().parents[1]
NANO = Tokenizer.load("nano").vocab_size
TINY = dict(max_len=48, batch_size=8, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
            warmup_steps=2, size="1x32", tokenizer="nano", max_steps=6, dtype="float32")


def pretrain(documents, out, **changes):
    return train_pretrain.main(train_pretrain.Config(**{**TINY, "data": str(documents), "out": str(out), **changes}))


def weights(folder):
    return {name: value.clone() for name, value in load_model(folder)[0].state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(folder):
    return [json.loads(line, parse_constant=pytest.fail)                  # no Infinity or NaN: they are not JSON
            for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def spoil(monkeypatch, when, how):
    """From now on, how(loss, model) is the loss of every micro-batch for which when(call, batch) holds. Call 0 is the
    first after the rehearsal."""
    compute_loss, calls = train_pretrain.compute_loss, []

    def rehearsed(self, *args):
        preflight(self, *args)
        calls.clear()

    def spoiled(model, batch, *args):
        calls.append(batch["rows"].tolist())
        loss, parts = compute_loss(model, batch, *args)
        if when(len(calls) - 1, batch):
            bad = how(loss, model)
            return bad, {"loss": bad}
        return loss, parts

    preflight = runtime.Run.preflight
    monkeypatch.setattr(runtime.Run, "preflight", rehearsed)
    monkeypatch.setattr(train_pretrain, "compute_loss", spoiled)
    return calls


def nan_loss(loss, model):
    return loss * math.nan


def nan_gradient(loss, model):
    """The same loss, but its derivative is 0 · inf."""
    return loss + (next(model.parameters()).sum() * 0).sqrt()


# ------------------------------------------------------------------------------------------------- stop


def test_a_loss_that_is_not_finite_names_the_records_of_its_micro_batch(documents, tmp_path, monkeypatch):
    calls = spoil(monkeypatch, lambda call, batch: call == 14, nan_loss)                 # step 4, third of four
    with pytest.raises(UserError, match="step 4: the loss is not finite") as error:
        pretrain(documents, tmp_path / "run", micro_batch_size=2, save_every=2)
    assert "\n" not in str(error.value) and "--on_nonfinite skip" in str(error.value)
    train = runtime_rows(documents, tmp_path)
    named = [place for row in calls[14] for place in train.where(row)]
    assert len(named) >= 2 and all(place in str(error.value) for place in named[:8])
    others = {place for rows in calls[:14] for row in rows for place in train.where(row)} - set(named)
    assert not any(f"{place}," in str(error.value) or f"{place}." in str(error.value) for place in others)
    assert state.latest(tmp_path / "run")[1]["step"] == 2
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "lr" in entry] == [1, 2, 3]


def runtime_rows(documents, tmp_path):
    from dataset.lm_dataset import PretrainDataset
    return PretrainDataset(str(documents), Tokenizer.load("nano"), 48, "train")


def test_a_gradient_that_is_not_finite_names_the_step(documents, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call, batch: call == 2, nan_gradient)
    with pytest.raises(UserError, match=r"step 3: the gradient is not finite.*documents\.jsonl:\d+.* and \d+ more"):
        pretrain(documents, tmp_path / "run")


@pytest.mark.parametrize("then", ["save", "evaluate", "log", "end"])
def test_a_gpu_is_checked_before_anything_is_kept_or_told(then, documents, tmp_path, monkeypatch):
    """On a GPU no step waits for the check; a bad one must come to light before the next save, score or line."""
    def later(self, step, grad_norm):
        self.pending.append((step, self.rows, [grad_norm, *self.losses]))
        self.losses, self.rows = [], []

    monkeypatch.setattr(Watch, "end_of_step", later)
    spoil(monkeypatch, lambda call, batch: call == 2, nan_loss)                          # step 3; all after it are bad
    every = {"save": dict(save_every=5), "evaluate": dict(eval_every=5), "log": dict(log_every=5), "end": {}}[then]
    with pytest.raises(UserError, match="step 3: the loss"):
        pretrain(documents, tmp_path / "run", **{"log_every": 100, **every})
    assert state.latest(tmp_path / "run") == (None, None)
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [0]                 # the score of the fresh model


def test_two_ranks_stop_at_the_same_step_and_name_the_record_of_one(tmp_path, documents):
    """A checkpoint that knows one token only as NaN, and one record with that token: whoever meets it must stop all."""
    tokenizer = Tokenizer.load("nano")
    config = ModelConfig(NANO, 32, 64, 1, 1, 1, head_dim=32, tie_word_embeddings=False)
    (tmp_path / "untied.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    pretrain(documents, tmp_path / "base", size=str(tmp_path / "untied.json"), max_steps=1)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.embed_tokens.weight"][tokenizer.encode("@")[0]] = math.nan
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    lines = documents.read_text(encoding="utf-8").splitlines()
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(lines[:5]) + "\n", encoding="utf-8")
    lines[37] = json.dumps({"text": "the cat @ the dog"})
    documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {**TINY, "data": str(documents), "val_data": str(held_out), "model": str(tmp_path / "base"),
             "out": str(tmp_path / "run"), "batch_size": 4, "micro_batch_size": 1, "max_steps": 30, "save_every": 1}
    command = [sys.executable, str(ROOT / "trainer" / "train_pretrain.py"),
               *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                                   "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
             for rank in (0, 1)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    told = [line for error in errors for line in error.splitlines() if line.startswith("error: ")]
    assert "the loss is not finite" in told[0] and "documents.jsonl:38" in told[0]
    step = int(told[0].split("step ")[1].split(":")[0])
    assert len(told) == 1
    saved = state.latest(tmp_path / "run")[1]
    assert (saved["step"] if saved else 0) == step - 1


# ------------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_skipped_update_changes_nothing(optimizer):
    config = ModelConfig(64, 32, 64, 2, 2, 1, head_dim=32, num_experts=4, num_experts_per_tok=2, router="sigmoid",
                         moe_intermediate_size=32, num_shared_experts=1)
    from model.moe import routers
    from model.transformer import CausalLM
    torch.manual_seed(0)
    model = CausalLM(config).train()
    cfg = SimpleNamespace(optimizer=optimizer, lr=1e-2, weight_decay=0.1, optimizer_state="device")
    optimizers = build_optimizers(model, cfg)

    def step(spoiled):
        loss = model(torch.arange(16)[None]).logits.square().sum()
        (nan_gradient(loss, model) if spoiled else loss).backward()
        return optimizer_step(model, optimizers, 1e-2, 1.0, on_nonfinite="skip")

    def everything():
        return [t.clone() for t in (*model.parameters(), *model.buffers())] + [
            value.clone() for o in optimizers for kept in o.state.values() for value in kept.values()]

    assert step(False).isfinite()
    before = everything()
    assert not step(True).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not any(r.load.any() for r in routers(model))
    step(False)
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_skipping_counts_and_goes_on(documents, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda call, batch: call in (4, 5, 9), nan_loss)                  # steps 3 and 5 of 2 x 4 rows
    summary = pretrain(documents, tmp_path / "run", on_nonfinite="skip", micro_batch_size=4, log_every=2)
    assert summary["skipped_steps"] == 2 and summary["steps"] == 6
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    lines = [entry for entry in metrics(tmp_path / "run") if "lr" in entry]
    assert [entry.get("skipped_steps", 0) for entry in lines] == [0, 1, 2]
    for entry in lines:                                                 # means over the micro-batches that are finite
        assert entry["loss"] == pytest.approx(math.log(NANO), abs=0.5)
    assert " skipped" in capsys.readouterr().out


def test_a_run_with_skipped_steps_continues_to_the_same_bits(documents, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call, batch: 7 in batch["rows"].tolist(), nan_loss)
    options = dict(on_nonfinite="skip", max_steps=9, save_every=2, log_every=3)
    whole = pretrain(documents, tmp_path / "whole", **options)
    with killed_after(7):
        pretrain(documents, tmp_path / "cut", **options)
    rest = pretrain(documents, tmp_path / "cut", **options)
    assert whole["skipped_steps"] == rest["skipped_steps"] >= 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    losses = [[entry.get("loss") for entry in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_a_stopped_run_may_continue_with_skip(documents, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, lambda call, batch: call == 3, nan_loss)
        with pytest.raises(UserError, match="step 4"):
            pretrain(documents, tmp_path / "run", save_every=2)
    assert pretrain(documents, tmp_path / "run", save_every=2, on_nonfinite="skip")["steps"] == 6


def test_a_run_of_nothing_but_skipped_steps_ends(documents, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call, batch: call > 3, nan_loss)
    with pytest.raises(UserError, match=f"{IN_A_ROW} steps in a row"):
        pretrain(documents, tmp_path / "run", on_nonfinite="skip", max_steps=200, batch_size=2, log_every=20)


# ------------------------------------------------------------------------------------------------- float16


def test_float16_learns_what_float32_learns_and_continues_exactly(documents, tmp_path):
    options = dict(dtype="float16", max_steps=8, save_every=3, lr=1e-2)
    half = pretrain(documents, tmp_path / "half", **options)
    full = pretrain(documents, tmp_path / "full", **{**options, "dtype": "float32"})
    assert half["held_out"]["loss"] == pytest.approx(full["held_out"]["loss"], abs=0.05)
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {torch.float32}
    with killed_after(5):
        pretrain(documents, tmp_path / "cut", **options)
    pretrain(documents, tmp_path / "cut", **options)
    assert same(weights(tmp_path / "half"), weights(tmp_path / "cut"))


def test_the_loss_is_scaled_and_the_gradient_is_not(documents, tmp_path):
    """Without a scale of 2^16 small gradients vanish in float16; the norm that is logged must not contain it."""
    norms = {}
    for dtype in ("float16", "float32"):
        pretrain(documents, tmp_path / dtype, dtype=dtype, max_steps=1)
        norms[dtype] = [entry["grad_norm"] for entry in metrics(tmp_path / dtype) if "lr" in entry]
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.05)
    assert state.latest(tmp_path / "float16")[1]["scaler"]["scale"] == 2.0 ** 16
    assert state.latest(tmp_path / "float32")[1]["scaler"] is None


def test_a_scale_that_is_too_large_comes_down_and_is_remembered(documents, tmp_path, monkeypatch):
    """The first steps overflow and are left out, whatever --on_nonfinite says; the state has the scale."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0 ** 40))
    options = dict(dtype="float16", save_every=5, log_every=5)
    summary = pretrain(documents, tmp_path / "run", max_steps=40, **options)
    assert 5 < summary["skipped_steps"] < 35
    assert 1 < state.latest(tmp_path / "run")[1]["scaler"]["scale"] < 2.0 ** 35
    assert summary["held_out"]["loss"] < metrics(tmp_path / "run")[0]["val_loss"]
    with killed_after(13):
        pretrain(documents, tmp_path / "cut", max_steps=40, **options)
    rest = pretrain(documents, tmp_path / "cut", max_steps=40, **options)
    assert rest["skipped_steps"] == summary["skipped_steps"]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("how, told", [(nan_loss, "step 3: the loss"), (nan_gradient, "the gradient is not finite")])
def test_in_float16_what_no_scale_can_cure_stops_too(how, told, documents, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call, batch: call >= 2, how)
    with pytest.raises(UserError, match=told):
        pretrain(documents, tmp_path / "run", dtype="float16", max_steps=60, log_every=60, batch_size=2)


@pytest.mark.parametrize("capability, dtype", [((6, 1), torch.float32), ((7, 5), torch.float16),
                                               ((8, 6), torch.bfloat16)])
def test_auto_takes_float16_on_gpus_with_tensor_cores_but_without_bfloat16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.pick_dtype("auto", torch.device("cuda")) == dtype
    assert devices.pick_dtype("auto", torch.device("cpu")) != torch.float16


# ------------------------------------------------------------------------------------------------- spikes


def alarms(losses):
    return [n for n, loss in enumerate(losses) if is_spike(loss, losses[max(0, n - 50):n])]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_noise_and_the_fall_at_the_start_are_no_spikes(noise):
    for seed in range(20):
        rng = random.Random(seed)
        assert alarms([2 + 5 * math.exp(-n / 80) + rng.gauss(0, noise) for n in range(600)]) == []


def test_a_jump_is_a_spike_once():
    rng = random.Random(0)
    losses = [2 + 5 * math.exp(-n / 80) + rng.gauss(0, 0.02) for n in range(600)]
    losses[400] += 1.0
    assert alarms(losses) == [400]
    told = []
    run = SimpleNamespace(print=told.append)
    watch = Watch(run)
    for step, loss in enumerate([*losses[:500], *(loss + 3 for loss in losses[500:])], start=1):   # and one that stays
        watch.window(step, loss)
    assert watch.spikes == 2 and len(told) == 2 and "step 401" in told[0] and "step 501" in told[1]


def test_spikes_are_counted_over_the_parts_of_a_run():
    run = SimpleNamespace(print=lambda text: None)
    whole, first = Watch(run), Watch(run)
    losses = [3.0] * 30 + [9.0] + [3.0] * 30 + [9.0]
    for step, loss in enumerate(losses):
        whole.window(step, loss)
    for step, loss in enumerate(losses[:40]):
        first.window(step, loss)
    second = Watch(run)
    second.restore(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(losses[40:], start=40):
        second.window(step, loss)
    assert second.state() == whole.state() and second.spikes == 2


# ------------------------------------------------------------------------------------------------- early stop


def scripted(monkeypatch, losses):
    """Held-out losses come from a list; whatever comes after them is 9."""
    evaluate, seen = runtime.evaluate_loss, []

    def scored(*args, **options):
        scores = evaluate(*args, **options)
        seen.append(losses[len(seen)] if len(seen) < len(losses) else 9.0)
        return {**scores, "loss": seen[-1]}

    monkeypatch.setattr(runtime, "evaluate_loss", scored)


EARLY = dict(max_steps=20, eval_every=2, save_every=3, early_stop=2)


def kept_after(monkeypatch, step):
    """The weights of the model after a step, filled in while training."""
    kept, log = {}, runtime.Run.log

    def copy(self, now, *args):
        log(self, now, *args)
        if now == step:
            kept.update({name: value.clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(runtime.Run, "log", copy)
    return kept


def test_early_stop_keeps_the_best_weights(documents, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [5, 4, 3, 3.5, 3.2])                           # steps 0, 2, 4, 6, 8
    best = kept_after(monkeypatch, 4)
    summary = pretrain(documents, tmp_path / "run", **EARLY)
    assert (summary["steps"], summary["best_step"], summary["best_loss"]) == (8, 4, 3)
    assert same(best, weights(tmp_path / "run"))
    assert "3.0000 after step 4" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "resume").glob("best*"))
    rates = [entry["lr"] for entry in metrics(tmp_path / "run") if "lr" in entry]
    assert rates[3:] == [TINY.get("lr", train_pretrain.Config.lr)] * 5    # the schedule is that of the planned steps
    with pytest.raises(SystemExit):
        pretrain(documents, tmp_path / "run", **EARLY)                   # it is finished


def test_a_run_that_goes_to_its_end_compares_the_last_step_too(documents, tmp_path, monkeypatch):
    scripted(monkeypatch, [5, 4, 3, 3.5, 2.9])                           # steps 0, 2, 4, 6, and 7, the last
    last = kept_after(monkeypatch, 7)
    summary = pretrain(documents, tmp_path / "run", **{**EARLY, "max_steps": 7})
    assert summary["best_step"] == 7 and same(last, weights(tmp_path / "run"))


@pytest.mark.parametrize("died_at", [4, 5, 7, 8])
def test_early_stop_continues_to_the_same_bits(died_at, documents, tmp_path, monkeypatch):
    """Killed before the best, between it and the next save, after it, and in the step it would have ended with."""
    def train(out):
        losses = {0: 5, 2: 4, 4: 3, 6: 3.5, 8: 3.2}
        evaluate = runtime.Run.evaluate

        def scored(self, step, *args, **options):
            scored.step = step
            return evaluate(self, step, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(runtime.Run, "evaluate", scored)
            real = runtime.evaluate_loss
            patch.setattr(runtime, "evaluate_loss", lambda *a, **k: {**real(*a, **k), "loss": losses[scored.step]})
            return pretrain(documents, out, **EARLY)

    whole = train(tmp_path / "whole")
    due = runtime.Run.due

    def die(self, step, every):
        if step == died_at and every == self.cfg.sample_every:           # after the evaluation, before the save
            raise KeyboardInterrupt
        return due(self, step, every)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime.Run, "due", die)
        train(tmp_path / "cut")
    kept = {path.name for path in (tmp_path / "cut" / "resume").glob("best*")}
    saved = state.latest(tmp_path / "cut")[1]["watch"]["best"]["step"]    # a continuation may need it again
    assert {f"best-{step:08d}.safetensors" for step in (saved, 4)} <= kept and len(kept) <= 2
    rest = train(tmp_path / "cut")
    assert (rest["steps"], rest["best_step"]) == (whole["steps"], whole["best_step"]) == (8, 4)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_evaluations_belong_to_the_settings_when_they_can_end_the_run(documents, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime.Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pretrain(documents, tmp_path / "run", **{**EARLY, "max_steps": 4})
    with pytest.raises(UserError, match="--eval_every 2 → 1"):
        pretrain(documents, tmp_path / "run", **{**EARLY, "max_steps": 4, "eval_every": 1})
    with_it, without = (state.settings(train_pretrain.Config(early_stop=number)) for number in (1, 0))
    assert "eval_every" in with_it and "eval_every" not in without
