"""How a run of several processes ends: told to stop, by a mistake on one rank, or because a host is gone."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.checkpoint import load_model
from model.errors import UserError
from model.errors import run as run_script
from trainer import state, train_pretrain
from trainer.runtime import Run

SCRIPT = Path(__file__).resolve().parents[1] / "trainer" / "train_pretrain.py"
FLAGS = {"size": "1x32", "tokenizer": "nano", "max_len": 48, "batch_size": 8, "log_every": 1, "eval_every": 0,
         "sample_every": 0, "save_every": 10, "warmup_steps": 2, "max_steps": 150, "device": "cpu", "dtype": "float64",
         "optimizer": "adamw"}
BOUND = 60               # seconds within which everything must have ended; on an idle machine it takes six


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A process, and what it has printed so far."""

    def __init__(self, launcher, documents, out, env=(), **changes):
        flags = {**FLAGS, "data": documents, "out": out, **changes}
        command = [sys.executable, *launcher, str(SCRIPT), *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
        self.lines = []
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def ends(self):
        """(exit code, all that it printed)."""
        code = self.process.wait(BOUND)
        self.reader.join(BOUND)
        return code, "".join(self.lines)


def two_ranks(documents, out, **changes_of_rank_1):
    """Two ranks without torchrun, and many steps to go."""
    port = str(free_port())
    return [Started([], documents, out, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                    max_steps=5000, **(changes_of_rank_1 if rank else {})) for rank in range(2)]


def wait_for_step(started, step):
    """Until one of the processes shows that step; those that do not print are not rank 0."""
    end = time.monotonic() + 2 * BOUND
    while not any(line.startswith(f"{step}/") for one in started for line in one.lines):
        assert time.monotonic() < end, "\n".join("".join(one.lines) for one in started)
        time.sleep(0.01)


def test_a_signal_to_one_rank_stops_all_and_saves(documents, tmp_path):
    ranks = two_ranks(documents, tmp_path / "run")
    wait_for_step(ranks, 15)
    ranks[1].process.send_signal(signal.SIGTERM)
    (code, told), other = (rank.ends() for rank in ranks)
    assert code == other[0] == 128 + signal.SIGTERM
    step = state.latest(tmp_path / "run")[1]["step"]
    assert step >= 15 and f"stopped after step {step}; the same command continues" in told and "Traceback" not in told
    load_model(tmp_path / "run")


def test_a_mistake_on_one_rank_is_told_there_and_ends_the_others(documents, tmp_path):
    (code, told), (other, mistake) = (rank.ends() for rank in
                                      two_ranks(documents, tmp_path / "run", data=tmp_path / "nowhere.jsonl"))
    assert other == 2 and "error: " in mistake and "nowhere.jsonl" in mistake
    assert code == 1 and f"no answer from rank 1 ({socket.gethostname()})" in told
    assert "Traceback" not in told + mistake


def test_two_hosts_train_together_and_the_loss_of_one_is_told(documents, tmp_path):
    """Two torchrun agents that meet at a port, as on two machines; one is killed with all it started."""
    meet = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "one"]
    hosts = [Started(meet, documents, tmp_path / "run") for _ in range(2)]
    wait_for_step(hosts, 25)
    lost, survivor = sorted(hosts, key=lambda host: any(line.startswith("25/") for line in host.lines))
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(lost.process.pid)], capture_output=True, text=True)
    for pid in (lost.process.pid, *map(int, workers.stdout.split())):
        os.kill(pid, signal.SIGKILL)
    code, told = survivor.ends()
    before, _, after = told.partition("error: ")                         # after this line torchrun tells its part
    assert code != 0 and "Traceback" not in before
    assert after.startswith("no answer from rank 1") and "continues from the last save" in after.splitlines()[0]
    for name in ("whole", "run"):
        train_pretrain.main(train_pretrain.Config(**{**FLAGS, "data": str(documents), "out": str(tmp_path / name)}))
    alone, together = (load_model(tmp_path / name, dtype=torch.float64)[0].state_dict() for name in ("whole", "run"))
    assert all(torch.allclose(alone[name], together[name], rtol=0, atol=1e-6) for name in alone)


def raise_(error):
    raise error


def test_a_full_disk_is_one_line_wherever_it_is_noticed(capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(raise_, OSError(28, "No space left on device", "metrics.jsonl"))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: no space left on the disk of metrics.jsonl;")
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("shapes do not fit"),
                                   RuntimeError("Connection closed by peer, says gloo")])
def test_defects_keep_their_traceback(error):
    """And so does what looks like a lost rank in a run that has but one."""
    with pytest.raises(type(error)) as seen:
        run_script(raise_, error)
    assert seen.value is error


# --------------------------------------------------------------------- hosts that were not started alike


def a_rank(**values):
    """The part of a Run on rank 0 of two that the checks ask."""
    return SimpleNamespace(world_size=2, is_main=True, control=None, on_main=lambda function: function(), **values)


def test_hosts_must_have_the_same_flags_and_data(monkeypatch):
    monkeypatch.setattr(torch.distributed, "monitored_barrier", lambda *_, **__: None)
    cfg = train_pretrain.Config(lr=0.003, data="/a/x.jsonl", out="/a/out")

    def other(rows=65, **changes):
        theirs = train_pretrain.Config(**{**vars(cfg), **changes})
        mine = a_rank(cfg=cfg, train_rows=65)

        def gather(value):
            told = []
            Run.check_agreement(a_rank(cfg=theirs, train_rows=rows, gather=lambda its: told.append(its) or [its, its]))
            return [value, *told]

        mine.gather = gather
        Run.check_agreement(mine)

    other(data="/b/x.jsonl", out="/b/out", micro_batch_size=2)           # where things lie may differ
    with pytest.raises(UserError, match=r"rank 1 .* --lr 0.01, and rank 0 .* --lr 0.003"):
        other(lr=0.01)
    with pytest.raises(UserError, match="64 rows of data, and rank 0 .* 65 rows of data"):
        other(rows=64)


@pytest.mark.parametrize("steps, told", [((20, 0), ""), ((20, 20), ""), ((0, 0), ""),
                                         ((10, 20), "rank 1 .* after step 20 .* rank 0 .* after step 10"),
                                         ((0, 20), "copy .*resume")])
def test_a_host_that_is_ahead_of_rank_0_is_not_thrown_back(steps, told, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "latest", lambda out: (out, {"step": steps[0]} if steps[0] else None))
    run = a_rank(cfg=train_pretrain.Config(), out=tmp_path, gather=lambda value: [value, (steps[1], "there")])
    if told:
        with pytest.raises(UserError, match=told):
            Run.check_newest_state(run)
    else:
        Run.check_newest_state(run)
