"""
The curves of a run: drawn, and compared with those that a learner should see.

    python trainer/curves.py --run out/pretrain                draws curves.png again, also while the run is going on
    python trainer/curves.py --run out/a,out/b,out/c --make trainer/results/expected/pretrain.json

The second command makes an expected curve from runs that differ in their seed only. Its band at every evaluation is a
95 % prediction interval: where one more run with another seed would lie. With the logarithms y of n runs,

    mean(y) ± t(0.975, n - 1) · s · sqrt(1 + 1/n)

s² is the variance between the seeds, averaged over all evaluations after step 0: a variance of three numbers at one
point is itself so uncertain that the band would have waists by chance.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not trainer/

import fnmatch
import json
import math
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

from model.cli import arg, parse_args
from model.errors import UserError, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "trainer" / "results" / "expected"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}      # runs: t(0.975, runs - 1)
# Settings that shape the curve. The seed may differ, and the number of steps: see last_comparable_step.
SHAPING = ("optimizer", "lr", "schedule", "warmup_steps", "weight_decay", "grad_clip", "batch_size", "max_len",
           "isolate", "overfit_batch")


@dataclass
class Config:
    run: str = arg("out/pretrain", "run folder; with --make several by commas, equal but for the seed")
    make: str = arg("", "write their expected curve to this JSON file")


# --------------------------------------------------------------------------------------------------- reading a run


def read(folder):
    """The entries of a run's metrics.jsonl, [] without one. A line that a kill cut short is left out."""
    path = pathlib.Path(folder, "metrics.jsonl")
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def held_out(entries):
    """The evaluations among `entries`: [{"step", "tokens", "minutes", "loss", "bits_per_byte" or "accuracy" …}]."""
    return [{**{name: entry[name] for name in ("step", "tokens", "minutes") if name in entry},
             **{name.removeprefix("val_"): value for name, value in entry.items()
                if name.startswith("val_") and isinstance(value, int | float)}}
            for entry in entries if "val_loss" in entry]


def read_summary(folder):
    """A run's summary.json; None where there is none that can be read, as in a checkpoint from elsewhere."""
    try:
        return json.loads(pathlib.Path(folder, "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def settings(summary):
    """Of a summary what decides where the curve of the run lies; "parent" is the same of the run it started from."""
    config, data = summary.get("config", {}), summary.get("data", {})
    return {**{name: summary.get(name) for name in ("stage", "parameters", "planned_steps", "parent")},
            **{name: config[name] for name in SHAPING if name in config},
            "records": data.get("records"), "tokens": data.get("tokens")}


# ------------------------------------------------------------------------------------------------ the expected curve


def expected(summary):
    """The points of the stage's expected curve with which this run can be compared; [] when there are none."""
    path = EXPECTED / f"{summary['stage']}.json"
    if not path.exists():
        return []
    curve = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = settings(summary), curve["settings"]
    if differences(ours, theirs):
        return []
    last = last_comparable_step(ours, theirs)
    return [point for point in curve["points"] if point["step"] <= last]


def differences(ours, theirs):
    """Names of settings for which two runs cannot have the same curve.

    The number of data tokens may differ by a hundredth: the same records, cut by a tokenizer hardly different.
    """
    def same(name):
        a, b = ours.get(name), theirs.get(name)
        if name == "parent" and a and b:
            return a["planned_steps"] == b["planned_steps"] and not differences(a, b)
        if name == "tokens" and a and b:
            return math.isclose(a, b, rel_tol=0.01)
        return name == "planned_steps" or a == b

    return [name for name in sorted({*ours, *theirs}) if not same(name)]


def last_comparable_step(ours, theirs):
    """Up to which step two runs of the same settings, but for the number of steps, had the same learning rates.

    With wsd that is the flat part of the shorter run: where its rate goes down, its loss falls below the other's.
    """
    from trainer.optim import lr_at            # torch takes a second, --help does not need it
    total = ours["planned_steps"], theirs["planned_steps"]
    for step in range(1, min(total) + 1):
        if lr_at(step, total[0], SimpleNamespace(**ours)) != lr_at(step, total[1], SimpleNamespace(**theirs)):
            return step - 1
    return min(total)


def verdict(tests, band):
    """One line: does the last of the evaluations `tests` lie in the band of the expected points? None without a pair.

    Evaluations are compared at the same step and on the same held-out rows, but for the tokenizer.
    """
    pairs = [(test, point) for test in tests for point in band if test["step"] == point["step"] > 0
             and math.isclose(test["targets"], point["targets"], rel_tol=0.02)]
    if not pairs:
        return None
    test, point = pairs[-1]
    value, (low, _, high) = test["bits_per_byte"], point["bits_per_byte"]
    place = "below" if value < low else "above" if value > high else "inside"
    advice = "; trainer/README.md: Is my loss normal?" if place == "above" else ""
    return (f"held-out bpb {value:.3f} at {test['tokens'] / 1e6:.1f}M tokens: {place} the expected "
            f"{low:.3f} to {high:.3f}{advice}")


def make(folders):
    """The expected curve of finished runs that differ in their seed: what trainer/results/expected/ holds."""
    summaries = [read_summary(folder) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary is None:
            raise UserError(f"--run {folder}: no summary.json there; give folders of finished runs")
        differing = differences(settings(summary), settings(summaries[0]))
        if differing or summary["planned_steps"] != summaries[0]["planned_steps"]:
            raise UserError(f"--run {folder}: differs from {folders[0]} in {', '.join(differing) or 'its steps'}; "
                            "only the seed may differ")
    if len(folders) not in STUDENT:
        raise UserError(f"--run: {len(folders)} folders; a band needs {min(STUDENT)} to {max(STUDENT)} runs")
    curves = [{point["step"]: point for point in summary["curve"]} for summary in summaries]
    columns = [[curve[step] for curve in curves] for step in curves[0] if all(step in curve for curve in curves)]
    first = summaries[0]
    return {"settings": settings(first), "seeds": [summary["config"]["seed"] for summary in summaries],
            "torch": first["torch"], "machine": first["machine"], "dtype": first["dtype"],
            "points": [{"step": column[0]["step"], "tokens": column[0]["tokens"], "targets": column[0]["targets"],
                        "loss": loss, "bits_per_byte": bits}
                       for column, loss, bits in zip(columns, bands(columns, "loss"), bands(columns, "bits_per_byte"),
                                                     strict=True)]}


def bands(columns, name):
    """[low, middle, high] of the values `name` in each of `columns`, which hold one evaluation of every run."""
    logs = [[math.log(point[name]) for point in column] for column in columns]
    runs = len(columns[0])
    variance = statistics.fmean(statistics.variance(values) for values, column in zip(logs, columns, strict=True)
                                if column[0]["step"] > 0)
    width = STUDENT[runs] * math.sqrt(variance * (1 + 1 / runs))
    return [[round(math.exp(statistics.fmean(values) + side * width), 4) for side in (-1, 0, 1)] for values in logs]


# --------------------------------------------------------------------------------------------------------- the plot


def report(folder):
    """Draw the curves of a run folder into its curves.png, and say where it lies if an expected curve fits it."""
    entries, summary = read(folder), read_summary(folder)
    if any("reward" in entry for entry in entries):
        draw_dashboard(entries, folder)
        return
    band = expected(summary) if summary else []
    draw(entries, pathlib.Path(folder), band)
    line = verdict(held_out(entries), band)
    if line:
        print(f"    {line}", flush=True)


# The panels of a run that samples: title -> (what is drawn, None = 0 to as much as there is, or the limits).
DASHBOARD = {
    "held out: accuracy": (("val_accuracy", "val_pass_1", "val_pass_*"), (0, 1)),
    "reward, as trained on": (("reward", "reward_*", "val_reward"), None),
    "entropy, nats per token": (("val_entropy",), None),
    "KL to the policy before training": (("val_kl", "kl_to_ref"), None),
    "clipped tokens": (("clip_low", "clip_high"), None),
    "|log ratio| of sampling and scoring": (("log_ratio", "max_log_ratio"), None),
    "prompts that teach nothing; different answers": (("degenerate", "unique"), (0, 1)),
    "tokens of a completion": (("length", "val_length"), None),
    "cut off; explained variance of the critic": (("truncated", "val_truncated", "explained_variance"), None),
    "canaries, and the reward of the policy": (("val_canary_*", "val_reward"), None),
}


def draw_dashboard(entries, folder):
    """Write folder/curves.png of a run of reinforcement learning: what trainer/dashboard.py watches, over the steps."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for entry in entries for name, value in entry.items() if value is not None))
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(4, 3).flatten()
    for axis in axes[len(DASHBOARD):]:
        axis.remove()
    for axis, (title, (patterns, limits)) in zip(axes[:len(DASHBOARD)], DASHBOARD.items(), strict=True):
        shown = [name for pattern in patterns for name in names if fnmatch.fnmatch(name, pattern)
                 and not name.endswith(("_interval", "_std", "_wins"))]
        for name in dict.fromkeys(shown):
            points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
            line, = axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", linewidth=1.2,
                              label=name.removeprefix("val_") + (", held out" if name.startswith("val_") else ""))
            bands = [(entry["step"], *entry[f"{name}_interval"]) for entry in entries if f"{name}_interval" in entry]
            if bands:
                axis.fill_between(*zip(*bands, strict=True), color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        if limits:
            axis.set_ylim(*limits)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7)
    figure.suptitle(str(folder))
    figure.savefig(pathlib.Path(folder, "curves.png"), dpi=110)


def draw(entries, folder, band=()):
    """Write folder/curves.png: loss, learning rate, gradient norm and speed over the tokens seen.

    `band` holds the points of an expected curve as far as the run can be compared with it.
    """
    from matplotlib import ticker                           # half a second to import: only where something is drawn
    from matplotlib.figure import Figure                    # without pyplot: no window, no display needed

    steps, tests = [entry for entry in entries if "lr" in entry], held_out(entries)
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "lr"], ["loss", "grad_norm"], ["loss", "tokens_per_second"]],
                                 width_ratios=[2, 1])

    def curve(axis, points, name, **style):
        axis.plot([point["tokens"] for point in points], [point[name] for point in points],
                  marker="" if len(points) > 60 else ".", **style)

    loss = axes["loss"]
    if band:
        low, _, high = zip(*(point["loss"] for point in band), strict=True)
        loss.fill_between([point["tokens"] for point in band], low, high, color="tab:green", alpha=0.25,
                          linewidth=0, label="expected, held out")
    curve(loss, [entry for entry in steps if "loss" in entry], "loss", label="training", color="tab:blue", alpha=0.6)
    curve(loss, tests, "loss", label="held out", color="tab:orange")
    values = [entry["loss"] for entry in (*steps, *tests) if "loss" in entry]
    if values and max(values) > 3 * min(values) > 0:
        loss.set_yscale("log")                              # the way from 1.0 to 0.9 is as long as from 7.0 to 6.3
        loss.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        loss.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        loss.yaxis.set_minor_locator(ticker.NullLocator())
    ends = [f", {tests[-1][name]:.3f} {name.replace('_', ' ')} held out at the end"
            for name in ("bits_per_byte", "accuracy") if tests and name in tests[-1]]
    loss.set_title("loss (nats per item)" + "".join(ends), loc="left", fontsize=10)
    loss.legend(frameon=False)
    for name, title in (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens/s")):
        curve(axes[name], steps, name, color="tab:gray", linewidth=1)
        axes[name].set_title(title, loc="left", fontsize=10)
        axes[name].axhline(0, alpha=0)                      # counts for the limits: 0 and some room above the curve
        axes[name].set_ylim(bottom=0)
    axes["tokens_per_second"].yaxis.set_major_formatter(ticker.EngFormatter(sep=""))          # 1200 is 1.2k
    for name, axis in axes.items():
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.set_xlabel("tokens" if name in ("loss", "tokens_per_second") else "")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(folder))
    figure.savefig(folder / "curves.png", dpi=120)


def main(cfg):
    folders = [pathlib.Path(folder.strip()) for folder in cfg.run.split(",")]
    if cfg.run == Config.run and not folders[0].exists():
        folders = [ROOT / cfg.run]
    if not cfg.make:
        for folder in folders:
            if not read(folder):
                raise UserError(f"--run {folder}: no metrics.jsonl there; give the folder of a run")
            report(folder)
            print(folder / "curves.png")
        return
    path = pathlib.Path(cfg.make)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(make(folders), indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
