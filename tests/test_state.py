"""The training state: whatever ends a save, what `latest` names is whole; and a continued run has every bit of it."""

import builtins
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.config import named_size
from model.errors import UserError
from model.transformer import CausalLM
from trainer import state
from trainer.config import TrainConfig
from trainer.optim import build_optimizers, optimizer_step

CFG = TrainConfig(lr=1e-2)
CPU = torch.device("cpu")
FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)          # nothing here could see what it does


class Killed(BaseException):
    """Stands for the process ending here: no `except Exception` of the code under test may catch it."""


def a_run(folder):
    """The part of a Run that state.py asks."""
    return SimpleNamespace(out=Path(folder), rank=0, world_size=1, device=CPU, keeps={},
                           on_main=lambda function: function(), gather=lambda value: [value],
                           state=lambda: {"watch": {"best": {}}}, restore=lambda saved: None, print=lambda text: None)


class Trained:
    """A small model with its optimizers, and what it is after each step."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = CausalLM(named_size("1x32", 64))
        self.optimizers = build_optimizers(self.model, CFG)
        self.after = {0: self.bits()}
        self.step = 0

    def bits(self):
        return (torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone(),
                [tensor.clone() for o in self.optimizers for s in o.state.values() for tensor in s.values()],
                state.random_state(CPU))

    def train(self):
        torch.randn(1), np.random.rand(), random.random()
        self.model(torch.arange(9)[None]).logits.square().mean().backward()
        optimizer_step(self.model, self.optimizers, 1e-2, 1.0)
        self.step += 1
        self.after[self.step] = self.bits()

    def save(self, folder, cfg=CFG):
        state.restore_random_state(self.after[self.step][2], CPU)
        state.save(cfg, a_run(folder), self.step, state.tensors_of(self.model), self.optimizers)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        a, b = list(a.values()), list(b.values())
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


def resumed(folder):
    """(step, bits) that a new process would go on from."""
    fresh = Trained(seed=1)
    return state.resume(a_run(folder), fresh.model, fresh.optimizers), fresh.bits()


def interrupt(patch, target, name, after, error, wrote=1.0):
    """Let target.name succeed `after` times and then raise; of a file it was to write, that share is on the disk."""
    real, calls = getattr(target, name), [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] <= after:
            return real(*args, **kwargs)
        if name == "write":
            real(*args, **kwargs)
            os.truncate(args[0], int(wrote * args[0].stat().st_size))
        raise error

    patch.setattr(target, name, call)


PLACES = [(state, "write", 0.0), (state, "write", 0.01), (state, "write", 0.5), (state, "write", 1.0), (os, "fsync", 1),
          (os, "replace", 1), (os, "open", 1), (builtins, "open", 1), (Path, "mkdir", 1), (Path, "write_text", 1),
          (shutil, "rmtree", 1), (state, "save_file", 1), (torch, "save", 1)]


@pytest.mark.parametrize("target, name, wrote", PLACES, ids=[f"{t.__name__}.{n} {w}" for t, n, w in PLACES])
@pytest.mark.parametrize("error", [Killed(), FULL], ids=["killed", "full"])
def test_interrupted_anywhere_a_whole_state_is_left(error, target, name, wrote, tmp_path):
    """At the n-th of every kind of call that a save makes, for every n; and the next save finds nothing in its way."""
    if name == "rmtree" and error is FULL:
        pytest.skip("removing needs no room")
    trained, outcomes = Trained(), set()
    for _ in range(3):
        trained.train()
    for after in range(40):
        folder = tmp_path / str(after)
        older = Trained()
        older.train()
        older.save(folder)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, target, name, after, error, wrote)
            try:
                trained.save(folder)
                ended = True
            except Killed:
                ended = False
            except UserError as told:
                assert "No space left on device" in str(told) and "\n" not in str(told) and str(folder) in str(told)
                ended = False
        step, bits = resumed(folder)
        outcomes.add(step)
        assert equal(bits, {1: older, 3: trained}[step].after[step])
        if ended:
            break
        trained.save(folder)
        step, bits = resumed(folder)
        assert step == 3 and equal(bits, trained.after[3])
        assert [path.name for path in (folder / "resume").glob("step-*")] == ["step-00000003"]
    assert ended and after >= 1 and 3 in outcomes


def test_a_full_disk_takes_nothing_with_it(tmp_path, monkeypatch):
    """The half-written folder makes room again, and the line names what to do."""
    trained = Trained()
    trained.train()
    trained.save(tmp_path)
    trained.train()
    interrupt(monkeypatch, torch, "save", 0, FULL)
    with pytest.raises(UserError, match="make room and start the same command again"):
        trained.save(tmp_path)
    assert [path.name for path in (tmp_path / "resume").iterdir() if path.is_dir()] == ["step-00000001"]


def test_torchs_own_error_of_a_full_disk_is_told_by_its_cause(tmp_path, monkeypatch):
    class Disk:
        def write(self, data):
            raise FULL

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    trained = Trained()
    monkeypatch.setattr(state, "save_tensors", lambda value, path: torch.save({"a": torch.ones(9)}, Disk()))
    with pytest.raises(UserError, match="No space left on device"):
        trained.save(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizers.pt", "rng.pt", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_one_line(name, share, tmp_path):
    trained = Trained()
    trained.train()
    trained.save(tmp_path)
    path = tmp_path / "resume" / "step-00000001" / name
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match="cannot be read") as told:
        resumed(tmp_path)
    assert "\n" not in str(told.value) and "step-00000001" in str(told.value)


def test_the_last_saves_are_kept_and_one_can_go_back(tmp_path):
    trained, cfg = Trained(), TrainConfig(keep_saves=3)
    names = {}
    for step in range(1, 6):
        trained.train()
        trained.save(tmp_path, cfg)
        names[step] = sorted(path.name for path in (tmp_path / "resume").glob("step-*"))
    assert names[5] == ["step-00000003", "step-00000004", "step-00000005"] and len(names[2]) == 2
    (tmp_path / "resume" / "latest").write_text("step-00000003\n", encoding="utf-8")
    step, bits = resumed(tmp_path)
    assert step == 3 and equal(bits, trained.after[3])
    trained.step = 4                                                    # a new step 4, from where the old 5 was left
    trained.save(tmp_path, cfg)
    assert state.latest(tmp_path)[1]["step"] == 4 and resumed(tmp_path)[0] == 4


def test_a_finished_run_is_marked_after_all_else_and_needs_its_best_weights_no_more(tmp_path):
    trained = Trained()
    trained.train()
    trained.save(tmp_path)
    state.save_best(a_run(tmp_path), 1, trained.model)
    assert not state.latest(tmp_path)[1]["finished"]
    assert state.check(CFG, tmp_path) == ""
    fresh = Trained(seed=1)
    state.load_best(a_run(tmp_path), 1, fresh.model)
    assert torch.equal(fresh.bits()[0], trained.bits()[0])
    (tmp_path / "resume" / "state").mkdir()
    state.finish(a_run(tmp_path))
    assert state.latest(tmp_path)[1]["finished"] and not list((tmp_path / "resume").glob("best*"))
