"""Run a train script as one of several ranks and keep what it computed: the reduced gradients and the final weights.

    torchrun --nproc_per_node 2 tests/ranks_worker.py train_pretrain FOLDER '{"data": ..., "out": ...}' [STEPS]

With STEPS the process dies, as if killed, once it has computed so many gradients. FOLDER gets <world size>-<rank>.pt
with {"gradients": one flat tensor per step, "weights": flat tensor}.
"""

import importlib
import json
import os
import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import torch

torch.set_num_threads(1)

name, folder, flags = sys.argv[1:4]
last = int(sys.argv[4]) if len(sys.argv) > 4 else None
script = importlib.import_module(f"trainer.{name}")
update, seen = script.optimizer_step, {"gradients": []}


def keep(model, *args):
    seen["gradients"].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    if len(seen["gradients"]) == last:
        os._exit(9)
    norm = update(model, *args)
    seen["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return norm


script.optimizer_step = keep
script.main(script.Config(**json.loads(flags)))
rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
torch.save(seen, pathlib.Path(folder, f"{world_size}-{rank}.pt"))
