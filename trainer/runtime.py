"""What surrounds the loop of every train script: device and ranks, the plan, progress, records, signals, the end.

`run = setup(cfg, "pretrain")` at the top of main, then in the order of the scripts: `run.load_model`, `run.plan`,
`run.wrap`, in the loop `run.accumulate`, `run.log`, `run.due`, `run.evaluate`, and `run.finish` after it. Nothing here
knows an objective: what is averaged over says `data.count`, what is measured on held-out rows `run.measure`.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dataset.lm_dataset import load_rows
from eval.eval_loss import evaluate_loss
from model import device as devices
from model.adapters.adapted import AdapterConfig, attach, has_adapters
from model.adapters.folder import save_adapter
from model.checkpoint import load_model, save_model
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.heads import ScalarModel
from model.transformer import count_parameters
from trainer import curves, parallel, preflight, state
from trainer.config import STARTED
from trainer.tracker import Tracker, warn_if_it_fails
from trainer.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
MANY_EPOCHS = 1000        # a wall-clock budget alone decides how long to train
PATHS = {"data", "val_data", "model", "teacher", "out", "tokenizer", "chat_template"}     # may differ between hosts
OVERFIT_STEPS = 200       # are enough to learn one batch by heart
TRIAL_STEPS = (3, 8)      # with a wall-clock budget, the steps after the 3rd up to the 8th are timed to fit the rest


def setup(cfg, stage):
    """Start a run: ranks, device, seeds, folder. Returns the Run that the rest of the script asks."""
    return Run(cfg, stage)


class Run:
    def __init__(self, cfg, stage):
        self.cfg, self.stage = cfg, stage
        self.out = Path(cfg.out or ROOT / "out" / stage)
        self.device = devices.pick_device(cfg.device)
        self.rank, self.world_size = devices.start_process_group(self.device)
        self.is_main = self.rank == 0
        preflight.check_flags(cfg, self.world_size)
        # small messages between ranks go over the CPU, so that they never wait for the GPU
        self.control = (dist.new_group(backend="gloo", timeout=devices.RANK_TIMEOUT) if self.world_size > 1 else None)
        self.parent_process = os.getppid()
        self.dtype = devices.pick_dtype(cfg.dtype, self.device)
        self.weights_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32      # master weights
        self.muon_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else self.weights_dtype
        # float16 has no room for small gradients: the loss is scaled up, and the gradient down again before the update
        self.scaler = torch.amp.GradScaler(self.device.type) if self.dtype == torch.float16 else None
        devices.seed_all(cfg.seed)
        if done := self.on_main(lambda: state.check(cfg, self.out)):
            self.print(done)
            raise SystemExit(0)
        self.check_newest_state()
        # where a model is built: what will be cut up must not fill the device first
        self.build_device = torch.device("cpu") if parallel.is_sharded(cfg, self.world_size) else self.device
        # measure(model, data, tokenizer, device, max_rows, rank, world_size) -> held-out figures: "loss", the headline,
        # its "…_interval" and any more
        self.measure, self.headline = evaluate_loss, "bits_per_byte"
        self.canary_limit = 0                  # evaluations that canaries may win in a row; 0 = any number
        self.shown_notes = ()                  # which of the notes have a column on the screen
        self.total_steps = self.last_place = self.rows_per_step = 0
        self.sampling_seconds = 0.0            # of a step's rollout, where the script samples
        self.keeps = {}                        # what else a continued run needs: name -> object with a state_dict
        self.tokens, self.earlier_seconds, self.budget_fitted = 0, 0.0, False
        self.aside = 0.0                       # seconds spent on evaluation, samples and saving since the last log line
        self.seconds_per_row = 0.0             # of a held-out evaluation
        self.sums, self.window_items, self.window_tokens = {}, 0, 0         # since the last log line: on this rank
        self.notes = {}                        # name -> figures of the steps since then, equal on all ranks
        self.window_steps, self.window_seconds = 0, 0.0                     # and in earlier parts of the run
        self.train_seconds = 0.0               # in the steps of all lines so far: no evaluation, samples or saving
        self.window_start = self.step_start = time.perf_counter()
        self.trial = []
        self.metrics, self.held_out, self.signal, self.step = {}, {}, 0, 0
        self.table_open = ""                   # the header above the last thing printed, if that was a progress line
        self.tracker = Tracker(cfg, self.out, self.is_main)
        self.watch = Watch(self)
        self.planned_minutes = 0.0
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)

    # ------------------------------------------------------------------------------------------- ranks

    def print(self, *args):
        """Print on rank 0."""
        self.table_open = ""
        if self.is_main:
            print(*args, flush=True)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(self.control)

    def gather(self, value):
        """The values of all ranks in a list, on every rank."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, function):
        """What function() returns on rank 0, which alone reads and writes the run folder; on every rank.

        A UserError there ends all ranks, and is told once.
        """
        answer = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(answer, 0, group=self.control)
        result, error = answer
        if error is not None:
            raise error if self.is_main else SystemExit(2)
        return result

    def check_newest_state(self):
        """UserError when another host's run folder is ahead of rank 0's, so that continuing would lose work."""
        if self.world_size == 1 or self.cfg.overwrite or self.cfg.dry_run:
            return
        _, saved = state.latest(self.out)
        steps = self.gather((saved["step"] if saved else 0, socket.gethostname()))
        newest = steps.index(max(steps, key=lambda entry: entry[0]))
        if self.is_main and steps[newest][0] > steps[0][0]:
            raise UserError(f"rank {newest} on {steps[newest][1]} has a state after step {steps[newest][0]} in "
                            f"{self.out}, and rank 0 on {steps[0][1]}, which writes it, has one after step "
                            f"{steps[0][0]}: copy {self.out / 'resume'} there, or use a folder that both hosts see")

    def check_agreement(self):
        """Wait for all ranks, then UserError when one was started with other flags or found other data."""
        if self.world_size == 1:
            return
        dist.monitored_barrier(self.control, timeout=devices.SETUP_TIMEOUT)      # one may still be reading its data
        mine = {f"--{name} {value}" for name, value in state.settings(self.cfg).items() if name not in PATHS}
        everyone = self.gather((socket.gethostname(), mine | {f"{self.train_rows} rows of data"}))

        def compare():
            for rank, (host, settings) in enumerate(everyone):
                if settings != everyone[0][1]:
                    raise UserError(f"rank {rank} on {host} has {', '.join(sorted(settings - everyone[0][1]))}, and "
                                    f"rank 0 on {everyone[0][0]} {', '.join(sorted(everyone[0][1] - settings))}; give "
                                    "every host the same flags and the same data")

        self.on_main(compare)

    def sum_over_ranks(self, number):
        """Sum of a number over all ranks, on every rank."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)
        dist.all_reduce(total, group=self.control)
        return total.item()

    def wrap(self, model):
        """The module that the loss goes through: `model` itself, or what trainer/parallel.py makes of it."""
        return parallel.wrap(model.train(), self.cfg, self.device, self.dtype, self.world_size, self.control)

    def accumulate(self, wrapped, micro_batches):
        """The micro-batches of a step, each to be followed by its forward and backward pass."""
        for number, batch in enumerate(micro_batches, start=1):
            parallel.accumulating(wrapped, last=number == len(micro_batches))
            self.batch = batch
            yield batch

    def autocast(self):
        return devices.autocast(self.device, self.dtype)

    def scale(self, loss):
        """The loss to differentiate: itself, but in float16 multiplied by what `optimizer_step` divides by."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def count(self, batch, times=1):
        """Add the real tokens and items of a batch to the counts of the log; times -1 takes them back."""
        self.window_tokens += times * int((batch["segment_ids"] > 0).sum())
        self.window_items += times * self.train.count(batch)

    def to_device(self, batch):
        """A batch on the device; how many real tokens and items it has goes into the counts of the log."""
        self.count(batch)
        if self.device.type == "cuda":                     # copied while the GPU computes: only pinned memory can be
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # -------------------------------------------------------------------------------------------- plan

    def parent(self, folder):
        """The checkpoint folder a stage starts from: as given, or under the project root when it is a default."""
        default = next(field.default for field in dataclasses.fields(self.cfg) if field.name == "model")
        return ROOT / folder if folder == default and not Path(folder).exists() else folder

    def load_model(self, adapter=None, load=load_model, folder="", **of_adapter):
        """(model, tokenizer) of --model, with --chat_template, and either trained whole or, frozen and perhaps in few
        bits, through an adapter: --lora_rank, or the AdapterConfig that is given.

        load: what reads a folder, with the arguments of model.checkpoint.load_model; folder: another than --model;
        of_adapter: more of --lora_rank's AdapterConfig.
        """
        cfg = self.cfg
        if adapter is None and cfg.lora_rank:
            adapter = AdapterConfig(method="lora", rank=cfg.lora_rank, alpha=cfg.lora_alpha or 2 * cfg.lora_rank,
                                    targets=cfg.lora_targets, **of_adapter)
        if adapter is None and cfg.quantize != "none":
            raise UserError(f"--quantize {cfg.quantize}: weights of few bits cannot be trained themselves; give "
                            "--lora_rank 16 too, which trains an adapter beside them")
        model, tokenizer = load(folder or self.parent(cfg.model), self.build_device, self.weights_dtype,
                                quantize=cfg.quantize)
        if cfg.chat_template:
            tokenizer = tokenizer.with_chat_template(cfg.chat_template)
        if adapter is not None:
            attach(model, adapter)
        return model, tokenizer

    def datasets(self, kind, path, tokenizer, val_path=""):
        """(train, held-out) datasets of class `kind`: of val_path or --val_data, or a part kept out of training."""
        cfg = self.cfg
        common = dict(val_fraction=cfg.val_fraction, on_bad_record=cfg.on_bad_record)
        if val_path or cfg.val_data:
            return (load_rows(kind, path, tokenizer, cfg.max_len, "all", **common),
                    kind(val_path or cfg.val_data, tokenizer, cfg.max_len, "all", **common))
        return tuple(load_rows(kind, path, tokenizer, cfg.max_len, split, **common) for split in ("train", "val"))

    def plan(self, model, train, val, tokenizer):
        """Fix how many steps there are, and say what will be trained on what."""
        cfg, rows = self.cfg, len(train)
        self.model, self.train, self.tokenizer = model, train, tokenizer
        epochs = cfg.epochs or (MANY_EPOCHS if cfg.max_minutes else 1)
        max_steps = cfg.max_steps or (OVERFIT_STEPS if cfg.overfit_batch and not cfg.epochs else 0)
        # where a policy answers, a row of the data is a prompt, and the batch holds several answers to each
        self.rows_per_step = cfg.batch_size // getattr(cfg, "num_generations", 1)
        self.last_place = max_steps * self.rows_per_step if max_steps else math.ceil(epochs * rows)
        self.total_steps = -(-self.last_place // self.rows_per_step)
        self.train_rows, self.val_rows = rows, len(val)
        self.check_agreement()
        self.data = {"records": train.report["records"], "tokens": train.report["tokens"], "rows": rows,
                     "held_out_rows": len(val)}
        total, active = count_parameters(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = model.config
        if cfg.max_len > config.max_position_embeddings:             # rotary positions have no end: they can be learnt
            self.print(f"  note    the model knows {config.max_position_embeddings} positions; it is now trained on "
                       f"{cfg.max_len}, and its config.json will say so")
            config.max_position_embeddings = cfg.max_len
        # forward and backward cost 6 FLOPs per parameter and token, attention 12 · layers · width · T / 2 (causal)
        self.flops_per_token = 6 * active + 6 * config.num_hidden_layers * config.num_attention_heads * (
            config.head_dim * cfg.max_len)
        self.peak = devices.matmul_peak(self.device, self.dtype) if self.dtype != torch.float64 else math.inf
        report = train.report
        self.print(f"{self.stage}: {total / 1e6:.2f}M parameters"
                   + (f" ({active / 1e6:.2f}M active per token)" if active < total else "")
                   + (f", {trained:,} of them trained ({trained / total:.2%})" if trained < total else "")
                   + f", {config.num_hidden_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size}")
        size = f"{report['tokens']:,} tokens in {rows:,} rows of {cfg.max_len}, {report['padding']:.1%} padding"
        if hasattr(cfg, "num_generations"):
            size = f"prompts of {report['tokens'] / rows:.0f} tokens"
        self.print(f"  data    {report['records']:,} records, {size}; {len(val):,} held out"
                   f"{preflight.data_losses(report)}")
        self.print(f"  device  {self.device}, {str(self.dtype).removeprefix('torch.')}, {self.world_size} rank(s), "
                   f"matrix products at {self.peak / 1e9:,.0f} GFLOP/s")
        steps = "as many" if epochs == MANY_EPOCHS and not cfg.max_steps else f"{self.total_steps:,}"
        planned = self.last_place * cfg.max_len * (1 - report["padding"])
        each = f"{cfg.batch_size} rows"
        if hasattr(cfg, "num_generations"):
            each = f"{cfg.num_generations} completions of {self.rows_per_step} prompts"
        self.print(f"  plan    {steps} steps of {each}"
                   + (f" as fit into {cfg.max_minutes:g} minutes" if cfg.max_minutes else
                      f", {planned:,.0f} tokens, {self.last_place / rows:.3g} x the data"))
        known = 0 if cfg.max_minutes else self.total_steps
        self.print(f"  rate    {preflight.rate_line(cfg, known)}")

    def preflight(self, wrapped, optimizers, loss_of, batch=None, show=preflight.show_batch):
        """Rehearse a step, say what it will cost, and start the run folder; stop here in a dry run, after show(run).

        loss_of(batch) is the forward pass of the script; batch: see `preflight.rehearse`. A continued run takes over
        what was measured at its start.
        """
        cfg = self.cfg
        saved = None if cfg.overwrite or cfg.dry_run else self.on_main(lambda: state.latest(self.out)[1])
        if saved is None:
            self.on_main(lambda: preflight.check_disk(cfg, self.out, self.model, optimizers))
            lasting, there = preflight.lasting_bytes(self.model, optimizers), preflight.free_memory(self.device)
            room = there - lasting["gradients"] - lasting["optimizer"]
            rehearsal = preflight.rehearse(self, self.model, wrapped, optimizers, loss_of, room, batch)
            cfg.micro_batch_size = rehearsal.rows          # from here on a number
            steps, self.planned_minutes = preflight.expected(cfg, self, rehearsal)
            for line in preflight.report(self, lasting, there, rehearsal, steps):
                self.print(line)
            if cfg.compile == "auto":
                pays = preflight.compile_pays(self.device, self.planned_minutes)
                cfg.compile = "on" if self.on_main(lambda: pays) else "off"
        else:
            cfg.micro_batch_size = cfg.micro_batch_size or saved["micro_batch_size"]
            cfg.compile = saved["compile"] if cfg.compile == "auto" else cfg.compile
            self.planned_minutes = saved["planned_minutes"]
            self.print(f"  time    planned at its start: {self.planned_minutes:.3g} minutes; "
                       f"{cfg.micro_batch_size} rows at once")
        if cfg.compile == "on":
            self.print("  compile the first steps take about a minute")
            parallel.compile_in_place(self.model, parallel.is_sharded(cfg, self.world_size))
        if cfg.dry_run:
            show(self)
            raise SystemExit(0)
        self.claim_folder()
        self.window_start = time.perf_counter()            # what came before was not training

    def claim_folder(self):
        """All inputs are good: make the run folder and write the settings. UserError when it cannot be written."""
        record = {**self.origin(), **dataclasses.asdict(self.cfg)}

        def claim():
            try:
                if self.cfg.overwrite:
                    state.clear(self.out)
                self.out.mkdir(parents=True, exist_ok=True)
                if state.latest(self.out)[0] is None:      # killed before its first save: it starts again from nothing
                    (self.out / "metrics.jsonl").unlink(missing_ok=True)
                (self.out / "train_config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out {self.out}: cannot be written ({error.strerror}); choose another folder"
                                ) from None

        self.on_main(claim)

    def origin(self):
        """Where the figures of this run come from."""
        return {"stage": self.stage, "command": " ".join(sys.argv), "commit": git_commit(), "torch": torch.__version__}

    def state(self):
        """What of this object a continued run needs."""
        return {"total_steps": self.total_steps, "budget_fitted": self.budget_fitted, "train_rows": self.train_rows,
                "tokens": self.tokens, "seconds": self.seconds(), "train_seconds": self.train_seconds,
                "windows": self.windows, "tracker_id": self.tracker.id, "planned_minutes": self.planned_minutes,
                "micro_batch_size": self.cfg.micro_batch_size, "compile": self.cfg.compile,
                "watch": self.watch.state(),
                "scaler": self.scaler.state_dict() if self.scaler else None}

    def window(self):
        """The sums of this rank since the last log line, which a continued run goes on adding to."""
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "items": self.window_items,
                "tokens": self.window_tokens, "steps": self.window_steps, "seconds": self.window_elapsed(),
                "notes": self.notes}

    def restore_window(self, windows):
        """Undo `window`, given those of all ranks: one's own is continued, and those of ranks that are no more too."""
        self.window_steps, self.window_seconds = windows[0]["steps"], windows[0]["seconds"]
        self.notes = windows[0].get("notes", {})
        for window in windows[self.rank::self.world_size]:
            self.window_items += window["items"]
            self.window_tokens += window["tokens"]
            for name, value in window["sums"].items():
                self.sums[name] = self.sums.get(name, 0) + value

    def window_elapsed(self):
        """Seconds spent in the steps since the last log line, over all parts of the run."""
        return max(self.window_seconds + time.perf_counter() - self.window_start - self.aside, 1e-9)

    def restore(self, saved):
        """Undo `state`, and cut metrics.jsonl back to the step that the run continues from."""
        if saved["train_rows"] != self.train_rows:
            raise UserError(f"the data has {self.train_rows} rows now and had {saved['train_rows']} when {self.out} "
                            "was saved; give the same data, or --overwrite to start over")
        self.total_steps, self.budget_fitted = saved["total_steps"], saved["budget_fitted"]
        self.tokens, self.earlier_seconds = saved["tokens"], saved["seconds"]
        self.train_seconds, self.tracker.id = saved["train_seconds"], saved["tracker_id"]
        self.watch.restore(saved["watch"])
        if self.scaler:
            self.scaler.load_state_dict(saved["scaler"])
        self.restore_window(saved["windows"])
        if self.is_main:
            kept = [entry for entry in curves.read(self.out)             # the final evaluation will be made again
                    if entry["step"] <= saved["step"] and "final" not in entry]
            (self.out / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept),
                                                    encoding="utf-8")
            self.held_out = next(iter(curves.held_out(kept)[::-1]), {})

    def seconds(self):
        """Wall-clock seconds of this run, over all its parts."""
        return self.earlier_seconds + time.perf_counter() - STARTED

    def fit_to_budget(self, step):
        """With --max_minutes: time the first steps, then fix for good how many fit. They count as training steps.

        The learning rate of these steps does not depend on the total as long as they lie in the warm-up.
        """
        first, last = TRIAL_STEPS
        if not self.cfg.max_minutes or self.budget_fitted or step <= first:
            return
        self.trial.append(time.perf_counter() - self.step_start)
        if step < last:
            return
        seconds = sorted(self.trial)[len(self.trial) // 2]
        if self.cfg.eval_every:
            seconds += self.seconds_per_row * min(self.cfg.eval_rows, self.val_rows) / self.cfg.eval_every
        left = self.cfg.max_minutes * 60 - self.seconds() - self.seconds_per_row * self.val_rows
        steps = min(self.total_steps, step + max(int(left / seconds), 0))
        if self.world_size > 1:
            decided = torch.tensor(steps)
            dist.broadcast(decided, 0, group=self.control)
            steps = int(decided)
        self.print(f"  {seconds:.2f} s a step: {steps:,} steps in {self.cfg.max_minutes:g} minutes")
        self.total_steps, self.budget_fitted = steps, True

    def end_of_step(self, step):
        self.fit_to_budget(step)
        self.step_start = time.perf_counter()

    # -------------------------------------------------------------------------------------------- tell

    def add(self, **sums):
        """Add summed metrics of a micro-batch (0-d tensors) to the log window; no wait for the device."""
        counts = self.watch.seen(sum(sums.values()), self.batch["rows"])
        if not counts:
            self.window_items -= self.train.count(self.batch)
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + (value.detach() if counts else torch.zeros_like(value))

    def note(self, **figures):
        """Add figures of a step, the same numbers on all ranks, to the log window: what is logged is their mean over
        its steps, or the largest where the name begins with max."""
        for name, value in figures.items():
            self.notes.setdefault(name, []).append(float(value))

    def due(self, step, every):
        """Whether something that happens every so many steps happens now. The last step has its own ending."""
        return every > 0 and step % every == 0 and step < self.total_steps

    def log(self, step, lr, grad_norm):
        """Every log_every steps: one row on the screen, one object in metrics.jsonl and for the tracker."""
        self.step, self.window_steps = step, self.window_steps + 1
        self.watch.end_of_step(step, grad_norm)
        if step % self.cfg.log_every and step != self.total_steps:
            return
        self.watch.check()
        names = sorted(self.sums)
        totals = torch.tensor([float(self.sums[name]) for name in names] + [self.window_items, self.window_tokens],
                              dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(totals, group=self.control)
        *sums, items, tokens = totals.tolist()
        means = {name: value / items for name, value in zip(names, sums, strict=True) if items}
        notes = {name: max(values) if name.startswith("max") else sum(values) / len(values)
                 for name, values in self.notes.items()}
        grad_norm = float(grad_norm)
        elapsed = self.window_elapsed()
        self.tokens += int(tokens)
        self.train_seconds += elapsed
        speed = tokens / elapsed
        left = (self.total_steps - step) * elapsed / self.window_steps
        self.metrics = {"step": step, "tokens": self.tokens, **means, **notes, "lr": lr,
                        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                        "tokens_per_second": round(speed, 1), "minutes": round(self.seconds() / 60, 3),
                        "mfu": round(speed * self.flops_per_token / self.peak / self.world_size, 4),
                        "memory_gb": round(devices.memory_in_use(self.device) / 1e9, 3)}
        if self.watch.skipped:
            self.metrics["skipped_steps"] = self.watch.skipped
        self.record(self.metrics)
        self.show_progress({**means, **{name: notes[name] for name in self.shown_notes if name in notes}}, left)
        if "loss" in means:
            self.watch.window(step, means["loss"])
        self.sums, self.window_items, self.window_tokens, self.notes = {}, 0, 0, {}
        self.window_steps, self.window_seconds, self.aside = 0, 0.0, 0.0
        self.window_start = time.perf_counter()

    def show_progress(self, means, left):
        """The last metrics as one row of a table; its header comes again after anything else was printed."""
        now = self.metrics
        known = self.budget_fitted or not self.cfg.max_minutes       # else the number of steps is still to be measured
        held_out = f"{self.held_out[self.headline]:.3f}" if self.held_out else "-"
        short = {"bits_per_byte": "bpb"}.get(self.headline, self.headline)
        columns = [("step", "<13", f"{now['step']}/{self.total_steps if known else '?'}"),
                   *((name, f">{max(len(name), 8)}", f"{value:.4f}") for name, value in means.items()),
                   (short, f">{max(len(short), 6)}", held_out), ("lr", ">7", f"{now['lr']:.1e}"),
                   ("|g|", ">6", "-" if now["grad_norm"] is None else f"{now['grad_norm']:.2f}"),
                   *([("skipped", ">7", f"{self.watch.skipped}")] if self.watch.skipped else []),
                   ("tok/s", ">7", f"{now['tokens_per_second']:.0f}"), ("mfu", ">4", f"{now['mfu']:.0%}"),
                   ("GB", ">5", f"{now['memory_gb']:.1f}"), ("eta", ">8", clock(left) if known else "?")]
        names = "  ".join(f"{name:{place}}" for name, place, _ in columns)
        if self.table_open != names:
            self.print(names)
        self.print("  ".join(f"{text:{place}}" for _, place, text in columns))
        self.table_open = names

    def record(self, entry):
        """Append one object to metrics.jsonl, and show it in the tracker."""
        if self.is_main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self.tracker.log(entry["step"], entry)

    def evaluate(self, step, model, val, tokenizer, rows=0, final=False):
        """Held-out figures of `model` (0 rows = all), shared between ranks; logged, recorded and returned."""
        start = time.perf_counter()
        self.watch.check()
        with self.sampling(model):
            scores = self.measure(model, val, tokenizer, self.device, max_rows=rows, rank=self.rank,
                                  world_size=self.world_size)
        self.held_out = scores
        tokens = self.tokens + self.sum_over_ranks(self.window_tokens)
        self.record({"step": step, "tokens": tokens, "minutes": round(self.seconds() / 60, 3),
                     **({"final": True} if final else {}),
                     **{f"val_{name}": value for name, value in scores.items()}})
        interval = scores[f"{self.headline}_interval"]
        self.print(f"{'':>4}held out after step {step:,}: loss {scores['loss']:.4f}, {scores[self.headline]:.4f} "
                   f"{self.headline.replace('_', ' ')} [{interval[0]:.3f}, {interval[1]:.3f}]")
        seconds = time.perf_counter() - start
        self.seconds_per_row = seconds / min(rows or len(val), len(val))
        if self.cfg.early_stop and not final:
            self.watch.evaluated(step, model, scores["loss"])
        if self.canary_limit and step and not final:
            self.watch.canaries(step, scores["canary_wins"])
        self.aside += time.perf_counter() - start
        return scores

    def sample(self, write, model, *args):
        """Show the text write(model, *args), of rank 0, indented and with odd characters escaped."""
        with self.sampling(model):
            text = write(model, *args) if self.is_main else ""
        safe = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        self.print("    | " + safe.replace("\n", "\n    | "))
        self.tracker.sample(self.step, safe)

    @contextlib.contextmanager
    def sampling(self, *models):
        """Inside, the models are whole and can be sampled from and scored, at other shapes than those of training."""
        with self.autocast(), torch.compiler.set_stance("force_eager"), contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(parallel.whole(model))
            yield

    # --------------------------------------------------------------------------------------------- end

    def on_signal(self, number, frame):
        if self.signal:                        # asked twice: do not wait for the step to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        if self.is_main:                       # not print, which fails inside of another print
            told = f"\n{signal.Signals(number).name}: saving after this step (again = stop at once)\n"
            os.write(1, told.encode())

    def stop_requested(self):
        """Whether any rank was told to stop, or --early_stop or --canaries says so; the same answer on every rank."""
        return self.signalled() or self.watch.gives_up()

    def signalled(self):
        """Whether any rank was told to stop, or its launcher is gone; the same answer, and signal, on every rank."""
        if self.world_size > 1:
            if os.getppid() != self.parent_process and not self.signal:
                print(f"rank {self.rank}: torchrun is gone: saving after this step", flush=True)
                self.signal = signal.SIGTERM
            signals = torch.tensor(int(self.signal))
            dist.all_reduce(signals, dist.ReduceOp.MAX, group=self.control)
            self.signal = int(signals)
        return self.signal > 0

    def save(self, step, model, tokenizer, optimizers, scores=None):
        """Save the training state, and export the Hugging Face folder from it."""
        start = time.perf_counter()
        self.watch.check()                     # never weights that a bad step has touched
        self.windows = self.gather(self.window())
        weights = parallel.gather(state.tensors_of(model))
        state.save(self.cfg, self, step, weights, optimizers)
        card = self.card(step, model, scores)
        if has_adapters(model):
            base = str(self.parent(self.cfg.model))
            self.on_main(lambda: save_adapter(self.out, model, tokenizer, base, card=card, weights=weights))
        else:
            self.on_main(lambda: save_model(self.out, model, tokenizer, card=card, weights=weights))
        self.aside += time.perf_counter() - start

    def finish(self, step, model, val, tokenizer, optimizers):
        """After the loop: save, and either leave as the signal asks or evaluate on all held-out rows and sum up."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signalled():
            self.save(step, model, tokenizer, optimizers)
            self.tracker.finish()
            self.print(f"stopped after step {step:,}; the same command continues")
            raise SystemExit(128 + self.signal)
        if self.window_steps:                                            # stopped early, between two progress lines
            self.tokens += self.sum_over_ranks(self.window_tokens)
            self.train_seconds += self.window_elapsed()
            self.window_steps, self.window_tokens = 0, 0
        if self.cfg.early_stop:
            self.watch.take_best(step, model, val, tokenizer)
        scores = self.evaluate(step, model, val, tokenizer, final=True)
        self.save(step, model, tokenizer, optimizers, scores)
        summary = self.summary(step, model, scores)
        if self.is_main:
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        state.finish(self)
        if self.is_main:
            self.tracker.log(step, {f"final_{name}": value for name, value in {**scores, **summary}.items()})
            self.tracker.finish()
            warn_if_it_fails("all is saved but curves.png", lambda: curves.report(self.out))
        if self.cfg.overfit_batch:
            self.print(preflight.overfit_verdict(self.metrics, step))
        self.print(f"done: {self.out} after {step:,} steps, {self.tokens:,} tokens, {self.seconds() / 60:.1f} minutes")
        return summary

    def summary(self, step, model, scores):
        """What summary.json holds: everything to know about this run without its folder."""
        parent = self.cfg.model and curves.read_summary(self.parent(self.cfg.model))
        return {**self.origin(), "machine": devices.describe_machine(self.device),
                "ranks": self.world_size, "dtype": str(self.dtype).removeprefix("torch."),
                "config": dataclasses.asdict(self.cfg), "data": self.data,
                "parent": curves.settings(parent) if parent else None,
                "parameters": count_parameters(model)[0],
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "planned_steps": self.total_steps, "steps": step,
                "tokens": self.tokens, "minutes": round(self.seconds() / 60, 3),
                "planned_minutes": round(self.planned_minutes, 3), "micro_batch_size": self.cfg.micro_batch_size,
                **self.watch.summary(),
                "tokens_per_second": round(self.tokens / max(self.train_seconds, 1e-9), 1),
                "memory_gb": round(devices.memory_in_use(self.device) / 1e9, 3), "held_out": scores,
                "curve": curves.held_out(curves.read(self.out)), "last": self.metrics}

    def card(self, step, model, scores):
        """README.md of the folder: where this checkpoint comes from."""
        cfg = self.cfg
        total, active = count_parameters(model)
        task = "text-classification" if isinstance(model, ScalarModel) else "text-generation"
        lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "---", "",
                 f"# {self.out.name}", "", f"Stage `{self.stage}`, {step:,} steps, {self.tokens:,} tokens.", "",
                 f"- parameters: {total:,} ({active:,} active per token)",
                 f"- parent: {cfg.model or 'none, trained from scratch'}",
                 f"- data: {cfg.data}",
                 f"- code: {git_commit() or 'unknown'}"]
        if scores:
            lines.append(f"- held-out {self.headline.replace('_', ' ')}: {scores[self.headline]:.4f} "
                         f"{[round(x, 4) for x in scores[f'{self.headline}_interval']]}")
        if model.config.judge_template:
            lines.append(f"- asked with: `{json.dumps(model.config.judge_template)}`")
        settings = json.dumps(dataclasses.asdict(cfg), indent=1)
        return "\n".join([*lines, "", "```json", settings, "```", ""])


def first_answer(model, tokenizer, val, max_new_tokens=60):
    """The first held-out prompt and what the model answers, likeliest token by token, for `run.sample`."""
    row = val[0]
    prompt = row["input_ids"][:row["loss_mask"].nonzero()[0][0]].tolist()
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    answer = generate(model, [prompt], params, tokenizer)[0][0]
    return f"{tokenizer.decode(prompt)}{answer.text}"


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def git_commit():
    """The commit of this code, "" outside a git checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                              timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
