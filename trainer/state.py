"""Training state that survives anything: what is needed to go on bit for bit, written atomically.

    out/<stage>/resume/step-00000120/    weights.safetensors   float32 weights and buffers
                                         optimizers.pt         moments and counters (tensors only: weights_only=True)
                                         state.json            step, planned steps, settings, size of the data
                                         rng-<rank>.pt         random states of each rank
    out/<stage>/resume/latest            the name of the folder to continue from

A step folder is written and flushed completely before `latest` is replaced (one atomic rename), and the folder before
it is removed only after that: at every instant `latest` names a whole state. Which data comes next needs no storing: it
is a function of the step (trainer/batches.py). The Hugging Face files in out/<stage>/ are an export of this state.
"""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from model.errors import UserError

# Settings that may change between the parts of a run: they do not change what is computed.
FREE = {"overwrite", "device", "dry_run", "log_every", "eval_every", "eval_rows", "sample_every", "save_every"}


def settings(cfg):
    """The settings of a run that a continuation must share."""
    return {key: value for key, value in dataclasses.asdict(cfg).items() if key not in FREE}


def latest(out):
    """(folder, state) of the newest saved step of a run, or (None, None)."""
    pointer = Path(out, "resume", "latest")
    if not pointer.exists():
        return None, None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    try:
        return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the saved training state cannot be read ({error}); start over with --overwrite"
                        ) from None


def check(cfg, out):
    """Before anything is built: may this run write to `out`? Ends the program when the run there is finished.

    UserError when the folder holds a run with other settings, or a checkpoint that no run of ours wrote.
    """
    out = Path(out)
    if cfg.overwrite or cfg.dry_run:
        return
    _, state = latest(out)
    if state is None:
        if (out / "config.json").exists():
            raise UserError(f"{out} already holds a checkpoint; choose another --out, or --overwrite to replace it")
        return
    now, then = settings(cfg), state["settings"]
    changed = [f"--{key} {then.get(key)} → {now.get(key)}" for key in sorted({*now, *then})
               if now.get(key) != then.get(key)]
    if changed:
        raise UserError(f"{out} holds a run with other settings ({', '.join(changed)}); "
                        "use the same settings to continue it, another --out, or --overwrite to start over")
    if state["finished"]:
        print(f"{out} is finished ({state['step']} steps); --overwrite trains it again")
        raise SystemExit(0)


def clear(out):
    """Forget the run in `out` (--overwrite). Called when the new run is about to start, not before: a mistyped flag
    must not cost the old one. The old checkpoint stays until the first save replaces it."""
    shutil.rmtree(out / "resume", ignore_errors=True)
    for name in ("metrics.jsonl", "summary.json"):
        (out / name).unlink(missing_ok=True)


def save(cfg, run, step, model, optimizers, finished=False):
    """Write the state after `step`. Every rank calls it; rank 0 writes all but the random states of the others."""
    root = run.out / "resume"
    folder = root / f"step-{step:08d}{'-end' if finished else ''}"
    if latest(run.out)[0] == folder:                          # saved already: never touch what `latest` names
        return
    if run.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run.barrier()
    write(folder / f"rng-{run.rank}.pt", lambda path: torch.save(random_state(run.device), path))
    if run.is_main:
        write(folder / "weights.safetensors", lambda path: save_model(model, str(path)))
        write(folder / "optimizers.pt",
              lambda path: torch.save([optimizer.state_dict() for optimizer in optimizers], path))
        state = {"step": step, "finished": finished, "world_size": run.world_size, "settings": settings(cfg),
                 **run.state()}
        write(folder / "state.json", lambda path: path.write_text(json.dumps(state, indent=1), encoding="utf-8"))
    run.barrier()
    if run.is_main:
        flush_folder(folder)
        beside = root / "latest.new"
        write(beside, lambda path: path.write_text(folder.name, encoding="utf-8"))
        os.replace(beside, root / "latest")
        flush_folder(root)
        for old in root.glob("step-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    run.barrier()


def resume(run, model, optimizers):
    """Fill model and optimizers from the saved state of run.out and return its step; 0 when there is none."""
    folder, state = latest(run.out)
    if folder is None:
        return 0
    run.restore(state)
    missing, unexpected = load_model(model, str(folder / "weights.safetensors"), strict=True, device=str(run.device))
    assert not missing and not unexpected
    saved = torch.load(folder / "optimizers.pt", map_location=run.device, weights_only=True)
    for optimizer, part in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(part)
    if state["world_size"] == run.world_size:
        restore_random_state(torch.load(folder / f"rng-{run.rank}.pt", weights_only=True), run.device)
    run.print(f"continuing {run.out} after step {state['step']}")
    return state["step"]


def random_state(device):
    """The states of all random generators of this process, as tensors, numbers and tuples."""
    numpy_state = np.random.get_state()
    state = {"python": random.getstate(), "torch": torch.get_rng_state(),
             "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:])}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state, device):
    """Undo `random_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def write(path, writer):
    """Let `writer(path)` write a file and flush it to the disk."""
    writer(path)
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder):
    """Make the names in a folder durable (a no-op on Windows, where folders cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
