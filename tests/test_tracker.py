"""Trackers: the real packages offline, the same run after a kill, and no failure of theirs that costs a training."""

import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import socket
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from model.checkpoint import load_model
from model.errors import UserError
from tests.conftest import killed_after
from trainer import curves, runtime, state, tracker, train_pretrain


def pretrain(documents, out, **changes):
    cfg = train_pretrain.Config(**{**dict(
        max_len=48, batch_size=4, log_every=2, eval_every=4, eval_rows=2, sample_every=3, save_every=2, device="cpu",
        warmup_steps=2, size="1x32", tokenizer="nano", data=str(documents), out=str(out), max_steps=6,
        tracker_mode="offline"), **changes})
    return train_pretrain.main(cfg)


def pretrain_killed_once(documents, out, **changes):
    """The run dies after step 5, before anything of that step is saved, and is started again."""
    with killed_after(5):
        pretrain(documents, out, **changes)
    return pretrain(documents, out, **changes)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The packages find no key, write under tmp_path only, and a connection to anywhere else than here is an error."""
    for name in list(os.environ):
        if name.startswith(("SWANLAB_", "WANDB_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name in ("SWANLAB_ROOT", "SWANLAB_LOG_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR",
                 "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")         # as the tracker sets it: here to be taken back
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


# -------------------------------------------------------------------------------------------------- the real packages


def stored(folder, pattern):
    """The raw records of the tracker runs in `folder`, in the order they were started."""
    return [path.read_bytes() for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)]


def test_swanlab_offline_continues_its_run_after_a_kill(documents, tmp_path, offline):
    pytest.importorskip("swanlab")
    out = tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    pretrain_killed_once(documents, out, tracker="swanlab")
    name = state.latest(out)[1]["tracker_id"]
    first, second = stored(out / "swanlog", f"run-*-{name}/run-{name}.swanlab")        # two parts, one id
    assert sum(1 for _ in (out / "swanlog").glob("run-*")) == 2
    for entry in curves.read(out):
        part = second if entry["step"] > 4 else first
        for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
            if key in entry:
                assert key.encode() in part and struct.pack("<d", entry[key]) in part, (entry["step"], key)
    assert b"val_bits_per_byte_interval_low" in first and b"final_bits_per_byte" in second and b"sample" in first
    assert b"final_tokens_per_second" in second and b"final_" not in first
    texts = list((out / "swanlog").glob("run-*/media/text/*"))
    assert len(texts) == 1 and texts[0].read_text(encoding="utf-8")
    config = next((out / "swanlog").glob("run-*/files/config.yaml")).read_text(encoding="utf-8")
    assert "warmup_steps" in config and "commit" in config
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_wandb_offline_continues_its_run_after_a_kill(documents, tmp_path, offline):
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    pretrain_killed_once(documents, out, tracker="wandb")
    name = state.latest(out)[1]["tracker_id"]
    first, second = stored(out / "wandb", f"offline-run-*-{name}/run-{name}.wandb")
    for entry in curves.read(out):
        part = second if entry["step"] > 4 else first
        for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
            if key in entry:
                assert key.encode() in part and repr(entry[key]).encode() in part, (entry["step"], key)
    assert b"final_bits_per_byte" in second and b"final_" not in first and b"warmup_steps" in first
    assert len(list((out / "wandb").glob("offline-run-*/files/media/html/sample_*.html"))) == 1
    assert not (tmp_path / "wandb").exists()                                           # nothing beside the run folder


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_disabled_writes_nothing(name, documents, tmp_path, offline):
    pytest.importorskip(name)
    pretrain(documents, tmp_path / "run", tracker=name, tracker_mode="disabled")
    assert not (tmp_path / "run" / "swanlog").exists() and not (tmp_path / "run" / "wandb").exists()


# ----------------------------------------------------------------------------------- a package that fails as it likes


class Package(ModuleType):
    """A stand-in for wandb that keeps what it is told, takes the signal handlers, and fails where it is told to."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.fails, self.calls, self.logged = fails, [], []
        self.Html = lambda text: text

    def do(self, what, **details):
        random.random()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.calls.append((what, details))
        if self.fails == what:
            raise RuntimeError(f"no {what}\nSettings(api_key=secret)")
        if self.fails == f"exit in {what}":
            sys.exit(0)

    def init(self, **details):
        self.do("init", **details)
        return SimpleNamespace(log=self.log, finish=lambda: self.do("finish"))

    def log(self, figures, step):
        self.do("log", step=step)
        self.logged.append((step, figures))


@pytest.fixture
def package(monkeypatch):
    def install(fails=""):
        made = Package(fails)
        monkeypatch.setitem(sys.modules, "wandb", made)
        return made

    return install


def test_what_is_sent(documents, tmp_path, monkeypatch, package):
    wandb = package()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    pretrain_killed_once(documents, tmp_path / "run", tracker="wandb", tracker_project="oak")
    first, second = [details for what, details in wandb.calls if what == "init"]
    assert first["id"] == second["id"] == state.latest(tmp_path / "run")[1]["tracker_id"]
    assert first["project"] == "oak" and first["name"] == "run" and first["resume"] == "allow"
    assert first["mode"] == "offline" and first["config"]["batch_size"] == 4 and first["config"]["stage"] == "pretrain"
    assert [what for what, _ in wandb.calls].count("finish") == 1                      # the killed one could not
    assert [step for step, _ in wandb.logged] == [0, 2, 3, 4, 4, 6, 6, 6]              # 3: the sample
    sent = {step: {} for step, _ in wandb.logged}
    for step, figures in wandb.logged:
        sent[step] |= figures
    for entry in curves.read(tmp_path / "run"):
        assert all(sent[entry["step"]][name] == entry[name] for name in ("loss", "val_loss", "tokens") if name in entry)
    assert sent[0]["val_bits_per_byte_interval_low"] < sent[0]["val_bits_per_byte_interval_high"]
    assert sent[3]["sample"].startswith("<pre>") and sent[6]["final_bits_per_byte"] == sent[6]["val_bits_per_byte"]
    written = [path for path in (tmp_path / "run").rglob("*.json*")]
    assert len(written) >= 5 and not any(b"0123456789abcdef" in path.read_bytes() for path in written)


@pytest.mark.parametrize("fails", ["init", "log", "finish", "exit in init"])
def test_no_failure_of_a_tracker_changes_a_training(fails, documents, tmp_path, monkeypatch, package, capsys):
    wandb = package(fails)
    handlers = signal.getsignal(signal.SIGINT)
    seen = []
    evaluate = runtime.Run.evaluate

    def watched(self, *args, **options):
        scores = evaluate(self, *args, **options)
        seen.append((signal.getsignal(signal.SIGINT) == self.on_signal, random.getstate()))
        return scores

    monkeypatch.setattr(runtime.Run, "evaluate", watched)
    tracked = pretrain(documents, tmp_path / "tracked", tracker="wandb")
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1 and "--tracker wandb is off from here on" in shown and "api_key" not in shown
    assert [what for what, _ in wandb.calls].count(fails.split()[-1]) == 1             # not tried again
    assert all(ours for ours, _ in seen[:-1])                                          # Ctrl-C still saves
    assert signal.getsignal(signal.SIGINT) == handlers
    states = [drawn for _, drawn in seen]
    seen.clear()
    plain = pretrain(documents, tmp_path / "plain")
    assert states == [drawn for _, drawn in seen]
    assert tracked["held_out"] == plain["held_out"]
    first, second = (load_model(tmp_path / name)[0].state_dict() for name in ("tracked", "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_key_in_an_error_is_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("SWANLAB_API_KEY", "s3cr3t")
    assert not tracker.warn_if_it_fails("off", lambda: open("no/such/s3cr3t"))
    assert "FileNotFoundError" in (shown := capsys.readouterr().out) and "s3cr3t" not in shown


def test_other_ranks_and_runs_without_a_tracker_touch_no_package(tmp_path, package):
    wandb = package()
    for name, is_main in (("wandb", False), ("none", True)):
        silent = tracker.Tracker(train_pretrain.Config(tracker=name), tmp_path, is_main)
        silent.log(1, {"loss": 1.0})
        silent.sample(1, "text")
        silent.finish()
    assert wandb.calls == []


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, missing, told", [
    (dict(tracker="swanlab"), "swanlab", "python -m pip install swanlab"),
    (dict(tracker="wandb"), "wandb", "python -m pip install wandb"),
    (dict(tracker="swanlab", tracker_mode="local"), "swanboard", r"swanlab\[dashboard\]"),
    (dict(tracker="wandb", tracker_mode="local"), "", "cloud, offline, disabled"),
    (dict(tracker="tensorboard"), "", "none, swanlab or wandb")])
def test_what_cannot_be_tracked_is_one_line_before_anything_starts(flags, missing, told, documents, tmp_path,
                                                                  monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UserError, match=told) as error:
        pretrain(documents, tmp_path / "run", **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_tracker_may_change_when_a_run_continues(tmp_path):
    cfg = train_pretrain.Config()
    other = train_pretrain.Config(tracker="wandb", tracker_mode="offline", tracker_project="oak")
    assert state.settings(cfg) == state.settings(other)
    assert json.dumps(state.settings(cfg))
