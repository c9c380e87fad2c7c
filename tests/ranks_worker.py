"""Run train scripts as one of several ranks, one after the other, and keep what they computed.

    RANK=0 WORLD_SIZE=2 … python tests/ranks_worker.py FOLDER '[{"name": …, "script": "train_pretrain", "flags": {…}}]'

A job with "die_at": n ends, as if killed, once it has computed n gradients. FOLDER gets <name>-<rank>.pt with
{"gradients": the reduced gradient of each step, flat, "weights": flat, "rows": numbers of the rows of each step that
this rank computed, "elements": of all parameters on this rank}. Sharded tensors are kept whole.
"""

import importlib
import json
import os
import pathlib
import sys
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch

from dataset import jsonl
from model import device as devices
from trainer import curves, parallel
from trainer.parallel import full
from trainer.preflight import local


class Killed(BaseException):
    """Stands for the process dying at a place: nothing may catch it."""


def run_job(folder, name, script, flags, die_at=None):
    """Train in this process; returns what is kept. Of a script that updates two models (PPO), gradients take turns."""
    script = importlib.import_module(f"trainer.{script}")
    update, batches, wrap = script.optimizer_step, getattr(script, "batches", None), parallel.wrap
    seen, weights = {"gradients": [], "rows": []}, {}

    def keep(model, *args):
        seen["gradients"].append(torch.cat([full(p.grad).flatten() for p in model.parameters() if p.requires_grad]))
        seen["elements"] = sum(local(p).numel() for p in model.parameters())
        if len(seen["gradients"]) == die_at:
            raise Killed
        norm = update(model, *args)
        weights[id(model)] = torch.cat([full(p.detach()).flatten() for p in model.parameters()])
        seen["weights"] = torch.cat(list(weights.values()))
        return norm

    def watch(*args):
        for step, micro_batches, num_targets in batches(*args):
            real = [row for b in micro_batches for row in b["rows"][b["segment_ids"].any(1)].tolist()]
            seen["rows"].append(real)
            yield step, micro_batches, num_targets

    def wrap_another(model, *args):
        for p in model.parameters():                      # what the other ranks bring along must not matter
            p.data += int(os.environ.get("RANK", 0))
        return wrap(model, *args)

    with (mock.patch.multiple(script, optimizer_step=keep, **({"batches": watch} if batches else {})),
          mock.patch.object(parallel, "wrap", wrap_another),
          mock.patch.object(curves, "report"), mock.patch.object(devices, "matmul_peak", lambda *_: 1e12)):   # slow
        try:
            script.main(script.Config(**flags))
        except Killed:
            pass
    torch.save(seen, pathlib.Path(folder, f"{name}-{os.environ.get('RANK', 0)}.pt"))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    jsonl.CACHE = pathlib.Path(sys.argv[1], "cache")
    for job in json.loads(sys.argv[2]):
        run_job(sys.argv[1], **job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
