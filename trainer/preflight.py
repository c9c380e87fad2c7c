"""Before step 1: can this run work, how many rows fit into memory at once, how long will it take, what will it cost.

    check_flags, check_disk    refuse what cannot work, with the number to change
    rehearse                   forward, backward and update on the first batch: the micro-batch that fits, and seconds
    report                     the lines that say what the run will need

The rehearsal leaves no trace: training computes the same bits with it and without it. What it measured is stored in the
training state, and a continued run reads it there.
"""

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dataset.show import row_lines
from model import device as devices
from model.errors import UserError
from model.moe import routers
from model.quantize import unpacked_bytes
from trainer import parallel, state
from trainer.batches import row_stream, rows_of_step, share_of_rank
from trainer.optim import Muon, turning_points

AT_LEAST = {"batch_size": 1, "max_len": 2, "log_every": 1, "micro_batch_size": 0, "epochs": 0, "max_steps": 0,
            "max_minutes": 0, "warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "eval_every": 0, "eval_rows": 0,
            "sample_every": 0, "save_every": 0, "keep_saves": 1, "early_stop": 0, "price_per_hour": 0}
PAYS_AFTER = {"cuda": 4, "cpu": 15}      # minutes of a run from which compiling (about one) saves more than it takes
MARGIN = 0.9         # where memory is estimated and not tried, so much of what is free is used
ROWS_SHOWN = 4       # of the first batch, in a dry run
LEARNT_BY_HEART = 0.1    # nats: what a loss must fall below with --overfit_batch (the first token of a text is a guess)


def check_flags(cfg, world_size):
    """UserError for a setting that no run can have, whatever the data and the model."""
    for name, least in AT_LEAST.items():
        value = getattr(cfg, name)
        if not least <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not 0 < cfg.lr < math.inf:
        raise UserError(f"--lr {cfg.lr}: must be above 0; {type(cfg).lr:g} is the default")
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"--val_fraction {cfg.val_fraction}: must lie between 0 and 1, both excluded")
    if cfg.batch_size < world_size:
        raise UserError(f"--batch_size {cfg.batch_size}: {world_size} ranks share it, so it must be at least "
                        f"{world_size}; or start fewer ranks")
    if cfg.micro_batch_size > cfg.batch_size:
        raise UserError(f"--micro_batch_size {cfg.micro_batch_size}: must be at most --batch_size {cfg.batch_size}")
    if cfg.optimizer_state == "cpu" and parallel.is_sharded(cfg, world_size):
        raise UserError("--optimizer_state cpu: --parallel fsdp cuts the moments up already; leave one of them out")
    if cfg.early_stop and not cfg.eval_every:
        raise UserError(f"--early_stop {cfg.early_stop}: counts evaluations, so --eval_every must not be 0")


# --------------------------------------------------------------------------------------------- memory and disk


def free_memory(device):
    """Bytes that this process can still take on `device`; inf where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                   # they share the memory of the machine
    return min(free_memory_of_the_machine(), cgroup_room()) / ranks


def free_memory_of_the_machine():
    """Bytes of main memory that can be had without swapping; on macOS, which does not tell, all there is."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import ctypes
        status = (ctypes.c_ulonglong * 8)(64)       # MEMORYSTATUSEX: 64 bytes; the third number is what is free
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return math.inf


def cgroup_room(membership="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Bytes left under the memory limits of this process's control groups, as containers have them; inf without.

    Pages of files that the kernel would give back at need (inactive_file) do not count as used.
    """
    room = math.inf
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        return room
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":                                            # version 2: one tree
            top, limit, used, cache = Path(root), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used, cache = (Path(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes",
                                       "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):                           # the limits of all groups around it hold too
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError, KeyError):  # "max", or no such file: no limit here
                    most = int((folder / limit).read_text())
                    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    room = min(room, most - int((folder / used).read_text()) + int(counts[cache]))
    return max(room, 0)


def local(tensor):
    """The part of a tensor that lies on this rank: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def lasting_bytes(model, optimizers):
    """{"weights", "gradients", "optimizer"}: bytes on the device per rank. AdamW keeps two numbers per weight, Muon
    one; of moments that lie in main memory, only the most that visit the device at a time count."""
    staying, visiting = [], [0]
    for optimizer in optimizers:
        size = (1 if isinstance(optimizer, Muon) else 2) * sum(local_bytes(g["params"]) for g in optimizer.param_groups)
        (visiting if hasattr(optimizer, "in_main_memory") else staying).append(size)
    return {"weights": local_bytes([*model.parameters(), *model.buffers()]),
            "gradients": local_bytes(p for p in model.parameters() if p.requires_grad),
            "optimizer": sum(staying) + max(visiting)}


def check_disk(cfg, out, model, optimizers):
    """UserError when the disk of the run folder cannot hold what the run writes there.

    Weights twice and one training state more than are kept, since the old is removed only when the new is whole; and
    the best weights, if they are kept.
    """
    weights = sum(tensor.nbytes for tensor in state.tensors_of(model).values())
    moments = sum((1 if isinstance(optimizer, Muon) else 2) * p.nbytes
                  for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    need = 2 * weights + (cfg.keep_saves + 1) * (weights + moments) + bool(cfg.early_stop) * weights
    out = out.absolute()
    folder = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"--out {out}: checkpoints and training state need {size(need)} and {size(free)} are free on "
                        "that disk; make room or choose another folder")


# --------------------------------------------------------------------------------------------- the rehearsal


@dataclass
class Rehearsal:
    """What the rehearsal found out, per rank."""

    rows: int                # per forward pass
    seconds: float           # of forward and backward over so many rows
    update_seconds: float    # of the optimizers
    row_bytes: float         # activations of a row, and a block's share of their gradients
    fixed_bytes: float       # what a forward pass keeps besides, such as weights in the format of the products
    loss: float              # of the first batch, nats per target
    sampling_seconds: float = 0.0          # of what a step samples first


def rehearse(run, model, wrapped, optimizers, loss_of, room, batch=None):
    """Run the first step of this rank once more and once less: find the micro-batch that fits, and time it.

    loss_of(batch) → (summed loss, parts), the forward pass of the script; room: bytes free for activations. With
    --micro_batch_size 0 the whole share of the rank is taken if it fits; else the largest number that does: found on
    CUDA by trying and halving, with one row more than is used, elsewhere (and where weights are sharded, since no rank
    can fail alone there) from the bytes of a row. All ranks take the same. UserError when not even one row fits.
    batch: this rank's rows, where they are not those of the data but still to be sampled.
    """
    cfg = run.cfg
    batch = batch or share_of_rank(run.train, first_rows(run), run.rank, run.world_size, 0)[0]
    share = len(batch["input_ids"])
    wanted = min(cfg.micro_batch_size or share, share)
    sharded = parallel.is_sharded(cfg, run.world_size)

    def forward(number):
        part = {key: value[torch.arange(number) % share].to(run.device) for key, value in batch.items()}
        with run.autocast():
            loss, parts = loss_of(part)
        items = max(run.train.count(part), 1)
        return loss / items, float(parts.get("loss", loss).detach()) / items

    def forward_backward(number):
        model.zero_grad(set_to_none=True)
        loss, shown = forward(number)
        loss.backward()
        return shown

    def trial(number):
        """(loss, seconds) of so many rows; None unless every rank has the memory for them."""
        work = functools.partial(timed, run.device, functools.partial(forward_backward, number))
        done = work() if sharded else attempt(work)
        if all(run.gather(done is not None)):
            return done
        model.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    too_large = UserError(f"one row of --max_len {cfg.max_len} does not fit into memory ({size(max(room, 0))} are free "
                          "beside the model, its gradients and its optimizer); lower --max_len or take a smaller model")
    with no_trace(run, model, wrapped, optimizers):
        hopeless = min(run.gather(room)) < row_bytes_at_least(model.config, cfg.max_len)
        few = 0 if hopeless else next((number for number in (min(wanted, 2), 1) if trial(number)), 0)
        if not few:
            raise too_large
        row_bytes, fixed_bytes = activation_bytes(model, forward, few)
        update(optimizers)                             # allocates the optimizers' state, for which room must be left
        number, margin = wanted, 1                     # one row more than is used, because batches differ
        if sharded or run.device.type != "cuda":
            fixed_bytes = 0 if sharded else fixed_bytes              # gathered weights: there for a block at a time
            number, margin = int(min(wanted, *run.gather((MARGIN * room - fixed_bytes) / row_bytes))), 0
        while number > 0 and not (done := trial(number + margin if number > 1 else 1)):
            number //= 2
        if number < 1:
            raise too_large
        if number < min(cfg.micro_batch_size, share):
            raise UserError(f"--micro_batch_size {cfg.micro_batch_size}: does not fit into the memory of {run.device} "
                            f"({size(room)} free); use --micro_batch_size {number}, or 0 for as many as fit")
        even = -(-wanted // -(-wanted // number))      # no more passes than needed, of rows shared evenly
        if even < number or run.device.type != "cpu" or max(run.gather(done[1])) < 1:
            done = trial(even) or done                 # what a trial on a CPU takes that long for, a step will, too
        loss, seconds = done
        _, update_seconds = timed(run.device, functools.partial(update, optimizers))
    return Rehearsal(even, seconds, update_seconds, row_bytes, fixed_bytes, loss, run.sampling_seconds)


def first_rows(run):
    """Row numbers of the first step, over all ranks."""
    return rows_of_step(row_stream(run.train, run.cfg.seed), run.rows_per_step, 1, run.last_place)


@contextlib.contextmanager
def no_trace(run, model, wrapped, optimizers):
    """What is computed inside changes nothing outside. (That weights stay what they are is up to `update`.)"""
    random = state.random_state(run.device)
    saved = model.state_dict()                         # other buffers never change: rotation speeds, packed weights
    buffers = [(buffer, buffer.clone()) for name, buffer in model.named_buffers() if name in saved]
    loads = [(router, router.load.clone()) for router in routers(model)]
    parallel.accumulating(wrapped, last=False)         # under DDP every rank is on its own
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for optimizer in optimizers:
            optimizer.state.clear()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for router, load in loads:
            router.load = load
        state.restore_random_state(random, run.device)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)


def update(optimizers):
    """An optimizer step with gradients 0 at learning rate 0: as much work and memory as any, and no weight moves."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()


def timed(device, function):
    """(result, seconds) of a call."""
    devices.synchronize(device)
    start = time.perf_counter()
    result = function()
    devices.synchronize(device)
    return result, time.perf_counter() - start


def attempt(function):
    """What function() returns; None when it runs out of memory. Its tensors are gone then, which they would not be for
    a caller who catches the error: that holds on to them."""
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def activation_bytes(model, forward, few):
    """(bytes per row, bytes besides) that forward(rows) needs until its backward pass is done, from 1 and `few` rows.

    To what is kept in between comes what a block's backward pass makes: as much as a block keeps, or would keep if it
    were not for activation checkpointing.
    """
    one, more = (bytes_for_backward(model, functools.partial(forward, rows)) for rows in (1, few))
    per_row = (more - one) / (few - 1) if few > 1 else one
    model.model.activation_checkpointing, kept = False, model.model.activation_checkpointing
    plain = bytes_for_backward(model, functools.partial(forward, 1)) if kept else one
    model.model.activation_checkpointing = kept
    return per_row + plain / model.config.num_hidden_layers, max(one - per_row, 0) + unpacked_bytes(model)


def bytes_for_backward(model, function):
    """Bytes that a forward pass keeps for the backward pass, the weights themselves excepted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
           if not isinstance(tensor, DTensor)}
    kept = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        function()
    return sum(kept.values())


def row_bytes_at_least(config, max_len):
    """A lower bound of the activations of a row: the residual stream before each layer, in two bytes."""
    return 2 * max_len * config.num_hidden_layers * config.hidden_size


# --------------------------------------------------------------------------------------------- to compile or not


def compile_pays(device, minutes):
    """Whether a run of so many minutes gains more from compiled steps than compiling takes, and a compiler is there."""
    if device.type == "cuda":
        return minutes >= PAYS_AFTER["cuda"] and importlib.util.find_spec("triton") is not None
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return device.type == "cpu" and minutes >= PAYS_AFTER["cpu"] and compiler is not None and os.name == "posix"


# --------------------------------------------------------------------------------------------- what is told


def data_losses(report):
    """What of the data is not trained on, or not once, as words to append; "" when all of it is, once."""
    records = max(report["records"], 1)
    parts = [f"{report[key] / records:.1%} of the records {key}" for key in ("dropped", "shortened") if report[key]]
    lost = report["tokens_lost"]
    if lost:
        parts.append(f"{lost / (lost + report['tokens']):.1%} of the tokens lost")
    parts += [f"{Path(path).name} {times:.2f} x" for path, times in report.get("repeats", {}).items()]
    return "".join(f", {part}" for part in parts)


def rate_line(cfg, total_steps):
    """The learning-rate plan; total_steps 0 = not known yet."""
    if not total_steps:
        down = {"wsd": f"the last 30 % down to {cfg.lr / 10:g}", "cosine": f"cosine down to {cfg.lr / 10:g}",
                "constant": "constant"}
        return f"{cfg.lr:g} after {cfg.warmup_steps:,} steps, {down[cfg.schedule]}"
    warmup, down = turning_points(total_steps, cfg)
    cut = f" (not {cfg.warmup_steps:,}: the run is too short)" if warmup < cfg.warmup_steps else ""
    text = f"{cfg.lr:g} at step {max(warmup, 1):,}{cut}"
    if not down:
        return f"{text}, constant"
    start = "cosine" if cfg.schedule == "cosine" else f"flat, from step {max(int(total_steps - down), 1):,}"
    return f"{text}, {start} down to {cfg.lr / 10:g} at step {total_steps:,}"


def report(run, lasting, there, rehearsal, steps):
    """The lines of the plan that needed a rehearsal: memory on each rank against what there is, time, money.

    lasting, there: `lasting_bytes`, and bytes free, before it; steps: how many are expected.
    """
    cfg = run.cfg
    need = sum(lasting.values()) + rehearsal.fixed_bytes + rehearsal.rows * rehearsal.row_bytes
    parts = ", ".join(f"{name} {size(number)}" for name, number in lasting.items())
    each = " per rank" if run.world_size > 1 else ""
    lines = [f"  memory  {size(need)} of {size(there + lasting['weights'])}{each}: {parts}, {rehearsal.rows} rows x "
             f"{size(rehearsal.row_bytes)} of activations + {size(rehearsal.fixed_bytes)}"]
    seconds = step_seconds(cfg, run.world_size, rehearsal)
    minutes = f"{run.planned_minutes:.{1 if run.planned_minutes >= 10 else 2}f} minutes"
    cost = f" for {run.planned_minutes / 60 * cfg.price_per_hour:,.2f}" if cfg.price_per_hour else ""
    lines.append(f"  time    about {minutes}{cost}: {steps:,} steps of {seconds:.3g} s, {rehearsal.rows} rows at once"
                 f"{each}, and evaluation")
    if cfg.overfit_batch and hasattr(cfg, "num_generations"):
        lines.append("  check   the prompts of one batch again and again: their reward must rise to the highest one")
    elif cfg.overfit_batch:
        lines.append(f"  check   one batch again and again: its loss, now {rehearsal.loss:.4f} (a uniform guess has "
                     f"ln V = {math.log(run.model.config.vocab_size):.4f}), must go to zero")
    return lines


def overfit_verdict(metrics, step):
    """What --overfit_batch has shown, by the last line of the log."""
    if "reward" in metrics:
        return (f"one batch of prompts: mean reward {metrics['reward']:.4f} after {step:,} steps; well below the "
                "highest there is, raise --max_steps or --lr")
    loss = metrics.get("loss", math.nan)
    if loss < LEARNT_BY_HEART:
        return f"one batch: loss {loss:.4f} after {step:,} steps, learnt by heart, as it should be"
    return (f"one batch: loss {loss:.4f} after {step:,} steps, NOT learnt by heart; raise --max_steps or --lr, and if "
            "that does not help, something between data and loss is wrong: look at --dry_run")


def step_seconds(cfg, world_size, rehearsal):
    """Expected seconds of an optimizer step."""
    share = -(-cfg.batch_size // world_size)
    return -(-share // rehearsal.rows) * rehearsal.seconds + rehearsal.update_seconds + rehearsal.sampling_seconds


def expected(cfg, run, rehearsal):
    """(steps, minutes) to expect. A held-out row costs a forward pass, a third of forward and backward."""
    per_row = rehearsal.seconds / rehearsal.rows / 3 / run.world_size
    some = min(cfg.eval_rows or run.val_rows, run.val_rows)
    per_step = step_seconds(cfg, run.world_size, rehearsal) + (per_row * some / cfg.eval_every if cfg.eval_every else 0)
    around = per_row * (some + run.val_rows)                             # before the first step and after the last
    steps = run.total_steps
    if cfg.max_minutes:
        steps = max(min(steps, int((cfg.max_minutes * 60 - run.seconds() - around) / per_step)), 1)
    return steps, (steps * per_step + around) / 60


def show_batch(run):
    """Print the first rows of the first batch, where they come from, and which of their tokens carry loss."""
    rows = first_rows(run)
    for row in rows[:ROWS_SHOWN]:
        run.print("\n".join(["", *row_lines(run.train, row, run.tokenizer)]))
    if len(rows) > ROWS_SHOWN:
        run.print(f"\n… and {len(rows) - ROWS_SHOWN} more rows in the first batch")


def size(number):
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


# --------------------------------------------------------------------------------------------- out of memory


def is_out_of_memory(error):
    """Whether an exception says that a device, or the machine, has no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def explains_out_of_memory(main):
    """Decorator of a script's main(cfg): running out of memory becomes one line that says what to lower."""
    @functools.wraps(main)
    def explained(cfg):
        try:
            return main(cfg)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        micro = cfg.micro_batch_size or cfg.batch_size
        advice = [f"--micro_batch_size {micro // 2} (now {micro})"] if micro > 1 else []
        advice.append(f"a smaller --max_len (now {cfg.max_len})")
        advice += [text for flag, text in MORE_ADVICE.items() if getattr(cfg, flag, True) in (False, 0)]
        raise UserError(f"out of memory: try {', then '.join(advice)}. The micro-batch may change in a run: the same "
                        "command with another one continues from the last save")
    return explained


MORE_ADVICE = {"activation_checkpointing": "--activation_checkpointing", "lora_rank": "--lora_rank 16"}
