"""What surrounds the loop of every train script: device and ranks, the plan, progress, records, signals, the end.

`run = setup(cfg, "pretrain")` at the top of main, then in the order of the scripts: `run.plan`, `run.wrap`, in the loop
`run.accumulate`, `run.log`, `run.due`, `run.log_held_out`, and `run.finish` after it. Nothing here knows an objective.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from eval.eval_loss import evaluate_loss
from model import device as devices
from model.checkpoint import save_model
from model.errors import UserError
from model.transformer import count_parameters
from trainer import state
from trainer.config import STARTED

ROOT = Path(__file__).resolve().parents[1]
MANY_EPOCHS = 1000        # a wall-clock budget alone decides how long to train
TRIAL_STEPS = (3, 8)      # with a wall-clock budget, the steps after the 3rd up to the 8th are timed to fit the rest


def setup(cfg, stage):
    """Start a run: ranks, device, seeds, folder. Returns the Run that the rest of the script asks."""
    return Run(cfg, stage)


class Run:
    def __init__(self, cfg, stage):
        for name in ("batch_size", "max_len", "log_every"):
            if getattr(cfg, name) < 1:
                raise UserError(f"--{name} {getattr(cfg, name)}: must be at least 1")
        self.cfg, self.stage = cfg, stage
        self.out = Path(cfg.out or ROOT / "out" / stage)
        self.device = devices.pick_device(cfg.device)
        self.rank, self.world_size = devices.start_process_group(self.device)
        self.is_main = self.rank == 0
        # small messages between ranks go over the CPU, so that they never wait for the GPU
        self.control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.dtype = devices.pick_dtype(cfg.dtype, self.device)
        self.weights_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32      # master weights
        self.muon_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else self.weights_dtype
        devices.seed_all(cfg.seed)
        state.check(cfg, self.out)
        self.total_steps = self.last_place = 0
        self.tokens, self.earlier_seconds, self.budget_fitted = 0, 0.0, False
        self.aside = 0.0                       # seconds spent on evaluation, samples and saving since the last log line
        self.seconds_per_row = 0.0             # of a held-out evaluation
        self.sums, self.window_targets, self.window_tokens = {}, 0, 0
        self.window_start = self.step_start = time.perf_counter()
        self.trial = []
        self.metrics, self.held_out, self.signal = {}, {}, 0
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)

    # ------------------------------------------------------------------------------------------- ranks

    def print(self, *args):
        """Print on rank 0."""
        if self.is_main:
            print(*args, flush=True)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier(self.control)

    def sum_over_ranks(self, number):
        """Sum of an int over all ranks, on every rank."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.control)
        return int(total)

    def wrap(self, model):
        """The module that the loss goes through: `model` itself, or DDP around it, which sums gradients over ranks."""
        model.train()
        if self.cfg.compile:
            model.compile()                    # in place: names of parameters stay as they are
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def accumulate(self, wrapped, micro_batches):
        """The micro-batches of a step; ranks exchange gradients only in the last backward pass."""
        for number, batch in enumerate(micro_batches, start=1):
            if self.world_size > 1:
                wrapped.require_backward_grad_sync = number == len(micro_batches)
            yield batch

    def autocast(self):
        return devices.autocast(self.device, self.dtype)

    def to_device(self, batch):
        """A batch on the device; how many real tokens and targets it has goes into the counts of the log."""
        self.window_tokens += int((batch["segment_ids"] > 0).sum())
        self.window_targets += int(batch["loss_mask"].sum())
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # -------------------------------------------------------------------------------------------- plan

    def parent(self, folder):
        """The checkpoint folder a stage starts from: as given, or under the project root when it is a default."""
        default = next(field.default for field in dataclasses.fields(self.cfg) if field.name == "model")
        return ROOT / folder if folder == default and not Path(folder).exists() else folder

    def datasets(self, kind, path, tokenizer):
        """(train, held-out) datasets of class `kind`: --val_data, or a part that is kept out of training."""
        cfg = self.cfg
        common = dict(val_fraction=cfg.val_fraction, on_bad_record=cfg.on_bad_record)
        if cfg.val_data:
            return (kind(path, tokenizer, cfg.max_len, "all", **common),
                    kind(cfg.val_data, tokenizer, cfg.max_len, "all", **common))
        return tuple(kind(path, tokenizer, cfg.max_len, split, **common) for split in ("train", "val"))

    def plan(self, model, train, val, tokenizer):
        """Fix how many steps there are, say what will be trained on what, and stop here in a dry run."""
        cfg, rows = self.cfg, len(train)
        epochs = cfg.epochs or (MANY_EPOCHS if cfg.max_minutes else 1)
        self.last_place = cfg.max_steps * cfg.batch_size if cfg.max_steps else math.ceil(epochs * rows)
        self.total_steps = -(-self.last_place // cfg.batch_size)
        self.train_rows, self.val_rows = rows, len(val)
        total, active = count_parameters(model)
        config = model.config
        # forward and backward cost 6 FLOPs per parameter and token, attention 12 · layers · width · T / 2 (causal)
        self.flops_per_token = 6 * active + 6 * config.num_hidden_layers * config.num_attention_heads * (
            config.head_dim * cfg.max_len)
        self.peak = devices.matmul_peak(self.device, self.dtype) if self.dtype != torch.float64 else math.inf
        report = train.report
        self.print(f"{self.stage}: {total / 1e6:.2f}M parameters"
                   + (f" ({active / 1e6:.2f}M active per token)" if active < total else "")
                   + f", {config.num_hidden_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size}")
        self.print(f"  data    {report['records']:,} records, {report['tokens']:,} tokens in {rows:,} rows of "
                   f"{cfg.max_len}, {report['padding']:.1%} padding; {len(val):,} rows held out")
        self.print(f"  device  {self.device}, {str(self.dtype).removeprefix('torch.')}, {self.world_size} rank(s), "
                   f"matrix products at {self.peak / 1e9:,.0f} GFLOP/s")
        steps = "as many" if epochs == MANY_EPOCHS and not cfg.max_steps else f"{self.total_steps:,}"
        self.print(f"  plan    {steps} steps of {cfg.batch_size} rows"
                   + (f" as fit into {cfg.max_minutes:g} minutes" if cfg.max_minutes else ""))
        if cfg.dry_run:
            self.print(show_row(train[0], tokenizer))
            raise SystemExit(0)
        self.claim_folder()
        self.window_start = time.perf_counter()            # what came before was not training

    def claim_folder(self):
        """All inputs are good: make the run folder and write the settings. UserError when it cannot be written."""
        record = {"stage": self.stage, "command": " ".join(sys.argv), "commit": git_commit(),
                  "torch": torch.__version__, **dataclasses.asdict(self.cfg)}
        try:
            if self.is_main and self.cfg.overwrite:
                state.clear(self.out)
            self.barrier()                                 # nobody looks for a state to resume before it is gone
            if self.is_main:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "train_config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror}); choose another folder") from None

    def state(self):
        """What of this object a continued run needs."""
        return {"total_steps": self.total_steps, "budget_fitted": self.budget_fitted, "train_rows": self.train_rows,
                "tokens": self.tokens, "seconds": self.seconds()}

    def restore(self, saved):
        """Undo `state`, and cut metrics.jsonl back to the step that the run continues from."""
        if saved["train_rows"] != self.train_rows:
            raise UserError(f"the data has {self.train_rows} rows now and had {saved['train_rows']} when {self.out} "
                            "was saved; give the same data, or --overwrite to start over")
        self.total_steps, self.budget_fitted = saved["total_steps"], saved["budget_fitted"]
        self.tokens, self.earlier_seconds = saved["tokens"], saved["seconds"]
        path = self.out / "metrics.jsonl"
        if self.is_main and path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= saved["step"]]
            path.write_text("".join(kept), encoding="utf-8")

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
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def due(self, step, every):
        """Whether something that happens every so many steps happens now. The last step has its own ending."""
        return every > 0 and step % every == 0 and step < self.total_steps

    def log(self, step, lr, grad_norm):
        """Every log_every steps: one line on the screen, one object in metrics.jsonl."""
        if step % self.cfg.log_every and step != self.total_steps:
            return
        names = sorted(self.sums)
        totals = torch.tensor([float(self.sums[name]) for name in names] + [self.window_targets, self.window_tokens],
                              dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(totals, group=self.control)
        *sums, targets, tokens = totals.tolist()
        means = {name: value / max(targets, 1) for name, value in zip(names, sums, strict=True)}
        elapsed = max(time.perf_counter() - self.window_start - self.aside, 1e-9)
        self.tokens += int(tokens)
        speed = tokens / elapsed
        left = (self.total_steps - step) * elapsed / (step % self.cfg.log_every or self.cfg.log_every)
        self.metrics = {"step": step, "tokens": self.tokens, **means, "lr": lr, "grad_norm": float(grad_norm),
                        "tokens_per_second": round(speed, 1), "minutes": round(self.seconds() / 60, 3),
                        "mfu": round(speed * self.flops_per_token / self.peak / self.world_size, 4),
                        "memory_gb": round(devices.memory_in_use(self.device) / 1e9, 3)}
        if not math.isfinite(self.metrics["grad_norm"]):
            raise UserError(f"step {step}: the gradient is not finite; lower --lr or --grad_clip, or raise "
                            "--warmup_steps, and start again: it continues from the last saved step")
        self.record(self.metrics)
        known = self.budget_fitted or not self.cfg.max_minutes       # else the number of steps is still to be measured
        parts = [f"step {step:>6,}/{self.total_steps if known else '?'}", *(f"{k} {v:.4f}" for k, v in means.items())]
        if self.held_out:
            parts.append(f"bpb {self.held_out['bits_per_byte']:.3f}")
        parts += [f"lr {lr:.1e}", f"|g| {float(grad_norm):.2f}", f"{speed:,.0f} tok/s",
                  f"mfu {self.metrics['mfu']:.0%}", f"{self.metrics['memory_gb']:.1f} GB",
                  f"eta {clock(left) if known else '?'}"]
        self.print("  ".join(parts))
        self.sums, self.window_targets, self.window_tokens = {}, 0, 0
        self.window_start, self.aside = time.perf_counter(), 0.0

    def record(self, entry):
        """Append one object to metrics.jsonl."""
        if self.is_main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def evaluate(self, step, model, val, tokenizer, rows=0):
        """Held-out loss of `model` (0 rows = all), shared between ranks; logged, recorded and returned."""
        start = time.perf_counter()
        with self.autocast():
            scores = evaluate_loss(model, val, tokenizer, self.device, max_rows=rows, rank=self.rank,
                                   world_size=self.world_size)
        self.held_out = scores
        self.record({"step": step, **{f"val_{name}": value for name, value in scores.items()}})
        interval = scores["bits_per_byte_interval"]
        self.print(f"{'':>4}held out after step {step:,}: loss {scores['loss']:.4f}, {scores['bits_per_byte']:.4f} "
                   f"bits per byte [{interval[0]:.3f}, {interval[1]:.3f}]")
        seconds = time.perf_counter() - start
        self.seconds_per_row = seconds / min(rows or len(val), len(val))
        self.aside += seconds
        return scores

    def sample(self, text):
        """Show a text of the model's, indented and with odd characters escaped."""
        safe = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        self.print("    | " + safe.replace("\n", "\n    | "))

    # --------------------------------------------------------------------------------------------- end

    def on_signal(self, number, frame):
        if self.signal:                        # asked twice: do not wait for the step to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        print(f"\n{signal.Signals(number).name}: saving after this step (again = stop at once)", flush=True)

    def stop_requested(self):
        """Whether any rank was told to stop; the same answer on every rank."""
        return self.sum_over_ranks(self.signal) > 0

    def save(self, step, model, tokenizer, optimizers, finished=False, scores=None):
        """Save the training state, and export the Hugging Face folder from it."""
        start = time.perf_counter()
        if self.is_main:
            save_model(self.out, model, tokenizer, card=self.card(step, model, scores))
        state.save(self.cfg, self, step, model, optimizers, finished)
        self.aside += time.perf_counter() - start

    def finish(self, step, model, val, tokenizer, optimizers):
        """After the loop: save, and either leave as the signal asks or evaluate on all held-out rows and sum up."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal:
            self.save(step, model, tokenizer, optimizers)
            self.print(f"stopped after step {step:,}; the same command continues")
            raise SystemExit(128 + self.signal)
        scores = self.evaluate(step, model, val, tokenizer)
        summary = {"stage": self.stage, "steps": step, "tokens": self.tokens, "minutes": round(self.seconds() / 60, 3),
                   "parameters": count_parameters(model)[0], "held_out": scores, "last": self.metrics,
                   "memory_gb": round(devices.memory_in_use(self.device) / 1e9, 3)}
        self.save(step, model, tokenizer, optimizers, finished=True, scores=scores)
        if self.is_main:
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.print(f"done: {self.out} after {step:,} steps, {self.tokens:,} tokens, {self.seconds() / 60:.1f} minutes")
        return summary

    def card(self, step, model, scores):
        """README.md of the folder: where this checkpoint comes from."""
        cfg = self.cfg
        total, active = count_parameters(model)
        lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
                 f"# {self.out.name}", "", f"Stage `{self.stage}`, {step:,} steps, {self.tokens:,} tokens.", "",
                 f"- parameters: {total:,} ({active:,} active per token)",
                 f"- parent: {cfg.model or 'none, trained from scratch'}",
                 f"- data: {cfg.data}",
                 f"- code: {git_commit() or 'unknown'}"]
        if scores:
            lines.append(f"- held-out bits per byte: {scores['bits_per_byte']:.4f} "
                         f"{[round(x, 4) for x in scores['bits_per_byte_interval']]}")
        settings = json.dumps(dataclasses.asdict(cfg), indent=1)
        return "\n".join([*lines, "", "```json", settings, "```", ""])


def show_row(row, tokenizer):
    """A row as text, tokens that carry loss in [brackets]."""
    shown = []
    for index, loss, segment in zip(row["input_ids"], row["loss_mask"], row["segment_ids"], strict=True):
        if segment:
            text = tokenizer.decode([int(index)], skip_special=False)
            shown.append(f"[{text}]" if loss else text)
    return "".join(shown)


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
