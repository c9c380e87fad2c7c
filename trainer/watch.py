"""While training: numbers that are not finite, loss spikes, and the best held-out loss with its weights.

One object per run, fed by Run: `seen` for every micro-batch, `end_of_step` for every step, `window` for every progress
line, `evaluated` for every held-out evaluation. Everything it decides is the same on all ranks.
"""

import math
from statistics import median

import torch

from model.errors import UserError
from trainer import state

WINDOWS = 50             # a loss is compared with those of so many progress lines before it,
ENOUGH = 20              # once there are so many
IN_A_ROW = 50            # left-out updates after which nothing more is to be hoped for
NAMED = 8                # records in a message


class Watch:
    def __init__(self, run):
        self.run = run
        self.losses, self.rows = [], []        # of the micro-batches of the running step: 0-d and (b,) tensors
        self.pending = []                      # the steps not checked yet
        self.skipped = self.in_a_row = 0       # steps whose update was left out
        self.recent, self.spikes = [], 0       # losses of the last progress lines; jumps among all of them
        self.best, self.waited = {}, 0         # {"step", "loss"} of the best evaluation; evaluations since then
        self.fooled = 0                        # evaluations in a row that a canary won

    # --- not finite

    def seen(self, loss, rows):
        """Note the loss of a micro-batch, a 0-d tensor, and its rows; whether it belongs into the means of the log."""
        self.losses.append(loss.detach())
        self.rows.append(rows)
        return self.run.cfg.on_nonfinite == "stop" or bool(loss.isfinite())

    def end_of_step(self, step, grad_norm):
        """Note a step. A CPU checks it at once; a GPU is not waited for until a line, an evaluation or a save."""
        self.pending.append((step, self.rows, [grad_norm, *self.losses]))
        self.losses, self.rows = [], []
        if self.run.device.type == "cpu" or len(self.pending) == 100:
            self.check()

    def check(self):
        """Look at the steps since the last check: UserError at one whose loss or gradient is not finite.

        Where updates are left out instead (--on_nonfinite skip, and float16, whose gradients now and then exceed the
        largest number until the scale has come down), they are counted.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        flags = iter(torch.stack([value.isfinite() for *_, values in pending for value in values]).tolist())
        scaler = self.run.scaler
        overflows = scaler is not None and scaler.get_scale() >= 1
        for step, rows, values in pending:
            good_norm, *good_losses = [next(flags) for _ in values]
            self.in_a_row = 0 if good_norm else self.in_a_row + 1
            self.skipped += not good_norm
            bad = [part for part, good in zip(rows, good_losses, strict=True) if not good]
            if self.run.cfg.on_nonfinite == "skip":
                if self.in_a_row == IN_A_ROW:
                    raise UserError(f"step {step}: the gradients of {IN_A_ROW} steps in a row were not finite and were "
                                    "left out; start over with a lower --lr, or check what --model holds")
            elif self.run.sum_over_ranks(len(bad) + (not good_norm and not overflows)):
                self.stop(step, bad, rows)

    def stop(self, step, bad, rows):
        """UserError that names the records of the `bad` micro-batches of all ranks, or of the whole step."""
        run = self.run
        in_loss, in_step = ([int(row) for part in run.gather([n for tensor in tensors for n in tensor.tolist()])
                             for row in part] for tensors in (bad, rows))

        def tell():
            places = list(dict.fromkeys(place for row in in_loss or in_step for place in run.train.where(row)))
            more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
            raise UserError(f"step {step}: the {'loss' if in_loss else 'gradient'} is not finite; in the batch: "
                            f"{', '.join(places[:NAMED])}{more}. Nothing was saved since. Look at these records; "
                            "--on_nonfinite skip continues without such steps, --overwrite with a lower --lr (now "
                            f"{run.cfg.lr:g}) starts over")

        run.on_main(tell)

    # --- spikes

    def window(self, step, loss):
        """Warn once where the loss of a progress line jumps out of the ones before."""
        if is_spike(loss, self.recent) and not is_spike(self.recent[-1], self.recent[:-1]):
            self.spikes += 1
            self.run.print(f"    warning: loss spike at step {step:,}: {loss:.4f} after a median of "
                           f"{median(self.recent):.4f}; if it does not come back down, lower --lr")
        self.recent = [*self.recent, loss][-WINDOWS:]

    # --- the best held-out loss

    def evaluated(self, step, model, loss):
        """Compare a held-out loss with the best so far, and keep the weights if it is better."""
        if not self.best or loss < self.best["loss"]:
            self.best, self.waited = {"step": step, "loss": loss}, 0
            state.save_best(self.run, step, model)
        else:
            self.waited += 1

    def canaries(self, step, won):
        """Count evaluations in which an answer without merit earned more than the policy's median one."""
        self.fooled = self.fooled + 1 if won else 0
        if self.fooled:
            self.run.print(f"    warning: at step {step:,} an answer without merit earns more than the policy's median "
                           f"one (canary_… in metrics.jsonl); the run ends at {self.run.canary_limit} in a row, now "
                           f"{self.fooled}. Mend the reward, or go on with --canaries 0")

    def gives_up(self):
        """Whether --early_stop ends the run: so many evaluations in a row were no improvement; or --canaries does."""
        return 0 < self.run.cfg.early_stop <= self.waited or 0 < self.run.canary_limit <= self.fooled

    def take_best(self, step, model, val, tokenizer):
        """At the end of a run with --early_stop: fill the model with the best weights, the last ones among them."""
        run = self.run
        if not self.gives_up():                            # else the run ended with an evaluation
            run.evaluate(step, model, val, tokenizer, run.cfg.eval_rows)
        state.load_best(run, self.best["step"], model)
        run.print(f"    best held-out loss: {self.best['loss']:.4f} after step {self.best['step']:,}; it stays")

    # --- what of it is kept and told

    def state(self):
        kept = "skipped", "in_a_row", "recent", "spikes", "best", "waited", "fooled"
        return {name: getattr(self, name) for name in kept}

    def restore(self, saved):
        for name, value in saved.items():
            setattr(self, name, value)

    def summary(self):
        best = {"best_step": self.best["step"], "best_loss": self.best["loss"]} if self.best else {}
        return {"skipped_steps": self.skipped, "loss_spikes": self.spikes, **best}


def is_spike(loss, before):
    """Whether `loss` lies more than six standard deviations above the losses before it.

    Median and median deviation in place of mean and deviation: a spike must not hide the next one. A loss that hardly
    varies may do so by a hundredth of itself, and while it still falls the median lies above it: no alarm.
    """
    if len(before) < ENOUGH or not math.isfinite(loss):
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(x - middle) for x in before)
    return loss > middle + 6 * max(deviation, 0.01 * abs(middle))
