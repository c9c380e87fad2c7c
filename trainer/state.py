"""Training state that survives anything: what is needed to go on bit for bit, written atomically.

    out/<stage>/resume/step-00000120/    weights.safetensors   float32 weights and buffers
                                         optimizers.pt         moments and counters (tensors only: weights_only=True)
                                         rng.pt                random states of each rank
                                         algorithm.pt          what else the method keeps (critic, tracker …), if any
                                         state.json            step, planned steps, settings, size of the data
    out/<stage>/resume/latest            the name of the folder to continue from, and " finished" once all is done

A step folder is written and flushed completely before `latest` is replaced (one atomic rename), and older folders are
removed only after that: at every instant `latest` names a whole state. Which data comes next needs no storing: it is a
function of the step (trainer/batches.py). The Hugging Face files in out/<stage>/ are an export of this state.

Only rank 0 reads and writes these files, so that the hosts of a run need not share a folder; the other ranks send it
their part and get theirs from it. With --keep_saves 3 the last three folders stay: to go back to one of them, write its
name into `latest`.
"""

import dataclasses
import json
import os
import pickle
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.errors import UserError
from trainer import parallel

# Settings that may change between the parts of a run: they do not change what is computed.
FREE = {"overwrite", "device", "dry_run", "log_every", "eval_every", "eval_rows", "sample_every", "save_every",
        "keep_saves", "parallel", "tracker", "tracker_mode", "tracker_project", "on_nonfinite", "price_per_hour"}
# These change the order of sums or how often they are rounded, hence the last bits, and no more.
FREE |= {"micro_batch_size", "compile", "activation_checkpointing"}


def settings(cfg):
    """The settings of a run that a continuation must share. (Evaluations decide something when they can end it.)"""
    free = FREE - {"eval_every", "eval_rows"} if cfg.early_stop else FREE
    return {key: value for key, value in dataclasses.asdict(cfg).items() if key not in free}


def latest(out):
    """(folder, state) of the newest saved step of a run, or (None, None)."""
    pointer = Path(out, "resume", "latest")
    if not pointer.exists():
        return None, None
    name, _, mark = pointer.read_text(encoding="utf-8").strip().partition(" ")
    folder = pointer.parent / name
    with reading(folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return folder, {**state, "finished": mark == "finished"}


def check(cfg, out):
    """Before anything is built: may this run write to `out`? Returns "", or the line to end with: the run is finished.

    UserError when the folder holds a run with other settings, or a checkpoint that no run of ours wrote.
    """
    out = Path(out)
    if cfg.overwrite or cfg.dry_run:
        return ""
    _, state = latest(out)
    if state is None:
        if (out / "config.json").exists():
            raise UserError(f"{out} already holds a checkpoint; choose another --out, or --overwrite to replace it")
        return ""
    now, then = settings(cfg), state["settings"]
    changed = [f"--{key} {then.get(key)} → {now.get(key)}" for key in sorted({*now, *then})
               if now.get(key) != then.get(key)]
    if changed:
        raise UserError(f"{out} holds a run with other settings ({', '.join(changed)}); "
                        "use the same settings to continue it, another --out, or --overwrite to start over")
    return f"{out} is finished ({state['step']} steps); --overwrite trains it again" if state["finished"] else ""


def clear(out):
    """Forget the run in `out` (--overwrite). Called when the new run is about to start, not before: a mistyped flag
    must not cost the old one. The old checkpoint stays until the first save replaces it."""
    shutil.rmtree(out / "resume", ignore_errors=True)
    for name in ("metrics.jsonl", "summary.json", "curves.png"):
        (out / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------- saving


def tensors_of(model):
    """The tensors of a model by name, each once: of tied weights only the first.

    Of a model that is frozen in part, only those of the modules that are trained: what is frozen, the run finds again
    where it found it before.
    """
    first = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
    if all(p.requires_grad for p in model.parameters()):
        return tensors
    trained = {f"{prefix}.{name}" for prefix, module in model.named_modules()
               if any(p.requires_grad for p in module.parameters(recurse=False))
               for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in tensors.items() if name in trained}


def save(cfg, run, step, weights, optimizers):
    """Write the state after `step`. Every rank calls it; weights: `tensors_of` the model, gathered."""
    moments = parallel.gather([optimizer.state_dict() for optimizer in optimizers])
    random_states = run.gather(random_state(run.device))
    kept = {name: parallel.gather(part.state_dict()) for name, part in run.keeps.items()}
    state = json.dumps({"step": step, "world_size": run.world_size, "settings": settings(cfg), **run.state()}, indent=1)

    def write_all():
        root = run.out / "resume"
        folder = root / f"step-{step:08d}"
        if latest(run.out)[0] != folder:                      # else saved already: never touch what `latest` names
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write(folder / "weights.safetensors", lambda path: save_file(weights, path))
                write(folder / "optimizers.pt", lambda path: save_tensors(moments, path))
                write(folder / "rng.pt", lambda path: save_tensors(random_states, path))
                if kept:
                    write(folder / "algorithm.pt", lambda path: save_tensors(kept, path))
                write(folder / "state.json", lambda path: path.write_text(state, encoding="utf-8"))
                flush_folder(folder)
            with writing(root):
                point_to(root, folder.name)
        steps = sorted(root.glob("step-*"), key=lambda path: (path.name <= folder.name, path.name))
        for old in steps[:-cfg.keep_saves]:                   # first those of a later step, which were never finished
            shutil.rmtree(old, ignore_errors=True)

    run.on_main(write_all)


def finish(run):
    """Note that nothing is left to do in this run, and remove what only a continuation would have needed."""
    def mark():
        root = run.out / "resume"
        with writing(root):
            point_to(root, f"{latest(run.out)[0].name} finished")
            keep_best(root)

    run.on_main(mark)


def point_to(root, text):
    """Replace the text of `latest`, in one step."""
    beside = root / "latest.new"
    write(beside, lambda path: path.write_text(text, encoding="utf-8"))
    os.replace(beside, root / "latest")
    flush_folder(root)


def save_best(run, step, model):
    """Keep the weights after `step` as the best so far. Those that the saved state calls the best stay, too: a run that
    is killed now continues from there."""
    root = run.out / "resume"
    weights = parallel.gather(tensors_of(model))

    def write_best():
        with writing(root):
            root.mkdir(exist_ok=True)
            write(root / "best.new", lambda path: save_file(weights, path))
            os.replace(root / "best.new", root / f"best-{step:08d}.safetensors")
            flush_folder(root)
        _, saved = latest(run.out)
        keep_best(root, step, saved and saved["watch"]["best"].get("step"))

    run.on_main(write_best)


def keep_best(root, *steps):
    """Remove the kept weights of all other steps."""
    for path in root.glob("best-*.safetensors"):
        if path.name not in [f"best-{step:08d}.safetensors" for step in steps if step is not None]:
            path.unlink()


def save_tensors(value, path):
    """torch.save through a file of ours, whose errors say more than its own."""
    with open(path, "wb") as file:
        torch.save(value, file)


def write(path, writer):
    """Let `writer(path)` write a file and flush it to the disk."""
    writer(path)
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(folder):
    """Make the names in a folder durable (a no-op on Windows, where folders cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(folder):
    """A disk that does not take what is written to it ends the run in one line, and an unfinished step folder goes."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:          # RuntimeError: torch.save, around an OSError
        if folder.name.startswith("step-"):
            shutil.rmtree(folder, ignore_errors=True)
        reason = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        raise UserError(f"{folder} cannot be written ({reason}); what was saved before is whole: make room and start "
                        "the same command again, it continues from there") from error


# --------------------------------------------------------------------------------------------- resuming


def resume(run, model, optimizers):
    """Fill model and optimizers from the saved state of run.out and return its step; 0 when there is none."""
    folder, state = run.on_main(lambda: latest(run.out))
    if folder is None:
        return 0
    run.restore(state)
    fill(run, model, folder / "weights.safetensors")
    saved = []                                                         # filled on rank 0

    def read():
        with reading(folder):
            saved.extend(torch.load(folder / "optimizers.pt", map_location="cpu", mmap=True, weights_only=True))
            kept = torch.load(folder / "algorithm.pt", weights_only=True) if run.keeps else {}
            return outline_of(saved), torch.load(folder / "rng.pt", weights_only=True), kept

    outlines, random_states, kept = run.on_main(read)
    for name, part in run.keeps.items():
        if isinstance(part, torch.nn.Module):                          # which may be sharded
            for key, target in part.state_dict().items():
                parallel.share(kept[name][key], target)
        else:
            part.load_state_dict(kept[name])
    for optimizer, outline, whole in zip(optimizers, outlines, saved or [None] * len(outlines), strict=True):
        fill_optimizer(optimizer, outline, whole)
    if len(random_states) == run.world_size:
        restore_random_state(random_states[run.rank], run.device)
    run.print(f"continuing {run.out} after step {state['step']}")
    return state["step"]


def load_best(run, step, model):
    """Fill the model with the weights that `save_best` kept."""
    fill(run, model, run.out / "resume" / f"best-{step:08d}.safetensors")


def fill(run, model, path):
    """Copy the weights in a file that rank 0 has into the model, on every rank its part."""
    weights, wanted = {}, tensors_of(model)

    def read():
        with reading(path):
            weights.update(load_file(path))
        if weights.keys() != wanted.keys():
            raise UserError(f"{path}: holds other tensors than the model, for example "
                            f"{min(weights.keys() ^ wanted.keys())}; start over with --overwrite")

    run.on_main(read)
    for name, target in wanted.items():
        parallel.share(weights.get(name), target)


def outline_of(state):
    """A state dict with shapes in place of tensors: small enough to send to every rank."""
    if isinstance(state, dict):
        return {key: outline_of(value) for key, value in state.items()}
    if isinstance(state, list):
        return [outline_of(value) for value in state]
    return state.to("meta") if isinstance(state, torch.Tensor) else state


def fill_optimizer(optimizer, outline, saved):
    """Optimizer.load_state_dict, of a state dict that only rank 0 has (None elsewhere); all ranks know its outline."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in outline["state"].items():
        p = params[number]
        for name, value in values.items():
            like = p if value.shape == p.shape else torch.empty(value.shape, device=p.device)  # a moment, or a count
            values[name] = torch.empty_like(like, dtype=value.dtype)
            parallel.share(saved and saved["state"][number][name], values[name])
    optimizer.load_state_dict(outline)
    outline["state"].clear()                                  # what it does not hold itself must not stay on the device


@contextmanager
def reading(path):
    """A damaged training state is one line."""
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: the saved training state cannot be read ({reason}); start over with --overwrite, or "
                        "write the name of an older folder beside it, if there is one, into `latest`") from error


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
