"""What each method does on the built-in world: named lists of runs, their figures, and the tables made from them.

    python scripts/experiments.py --group lora            the runs of a group that are not done yet
    python scripts/experiments.py --group dpo --only seed42 --jobs 2
    python scripts/experiments.py --group lora --table    its table, from the committed figures

A run is a command that you could type yourself, with the folder it writes added: out/experiments/GROUP/NAME. Stopped
and started again it continues. Then its judges score what it trained, and the figures of the whole group go to
trainer/results/GROUP.json. All of them start from the quickstart's checkpoints (scripts/quickstart.sh).
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS = ROOT / "out" / "experiments"
RESULTS = ROOT / "trainer" / "results"


@dataclass
class Config:
    group: str = arg("", "which list of runs")
    only: str = arg("", "only runs with this in their name")
    jobs: int = arg(1, "runs at the same time, each with its share of the cores")
    table: bool = arg(False, "print the table of the group and stop")


@dataclass(frozen=True)
class Run:
    """One row of a table. `train` is a command without --seed and --out; "" judges `--model` of `base` as it is."""
    name: str
    train: str
    judges: tuple = ("skills",)
    seeds: tuple = (42,)
    base: str = "out/full_sft"        # what an adapter lies on


# What a judge writes to --out is kept, as far as it is a number or an interval.
JUDGES = {
    "skills": "eval/skills.py",
}

GROUPS = {}
COLUMNS = {}      # group -> {title of a column: (path to the figure in a run's record, format)}


# --------------------------------------------------------------------------------------------------- running


def python(command, *flags, threads):
    """Run one of the project's scripts; its words go to the screen when it fails, and end this program."""
    words = [*shlex.split(command), *map(str, flags)]
    print(f"$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise UserError(f"python {' '.join(words)} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")


def do(group, one, seed, threads):
    """Train and judge one seed of a run, as far as it is not done; its record."""
    folder = RUNS / group / f"{one.name}-seed{seed}"
    record = {"run": one.name, "seed": seed, "command": one.train}
    place = ("--model", one.base)
    if one.train:
        if not (folder / "summary.json").exists():
            python(one.train, "--seed", seed, "--out", folder, threads=threads)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        record |= {name: summary[name] for name in ("minutes", "steps", "tokens", "memory_gb", "parameters",
                                                    "trained_parameters", "machine", "commit")}
        record["held_out"] = numbers(summary["held_out"])
        adapted = (folder / "adapter_config.json").exists()
        place = ("--model", one.base, "--adapter", folder) if adapted else ("--model", folder)
    for judge in one.judges:
        scores = folder / f"{judge}.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not scores.exists():
            python(JUDGES[judge], *place, "--out", scores, threads=threads)
        record[judge] = numbers(json.loads(scores.read_text(encoding="utf-8")))
    return record


def numbers(figures):
    """Those values of a dict that are numbers or pairs of numbers; of a score by skill, each skill's accuracy too."""
    kept = {name: round_off(value) for name, value in figures.items() if round_off(value) is not None}
    for name, skill in figures.get("skills", {}).items():
        kept[name] = round_off(skill["accuracy"])
    return kept


def round_off(value):
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return None
    if isinstance(value, list):
        return [round(x, 5) for x in value] if value and all(isinstance(x, int | float) for x in value) else None
    return round(value, 5) if isinstance(value, float) else value


def run_group(group, only, jobs):
    """All runs of a group whose name holds `only`; their records are merged into the group's JSON as they come."""
    path = RESULTS / f"{group}.json"
    threads = max((os.cpu_count() or 1) // jobs, 1)
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    todo = [(one, seed) for one in GROUPS[group] for seed in one.seeds if only in f"{one.name}-seed{seed}"]
    order = {(one.name, seed): place for place, (one, seed) in
             enumerate((one, seed) for one in GROUPS[group] for seed in one.seeds)}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(do, group, *which, threads) for which in todo]):
            record = done.result()
            key = record["run"], record["seed"]
            records = [old for old in records if (old["run"], old["seed"]) in order
                       and (old["run"], old["seed"]) != key] + [record]
            records.sort(key=lambda record: order[record["run"], record["seed"]])
            path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", encoding="utf-8")
            print(" ", key, {judge: record.get(judge) for judge in JUDGES if judge in record}, flush=True)


# ---------------------------------------------------------------------------------------------------- tables


def table(group, records):
    """Lines of a Markdown table, a row for each run. Where a run has several seeds: mean (smallest to largest)."""
    columns = COLUMNS[group]
    yield f"| run | {' | '.join(columns)} |"
    yield f"|---|{'--:|' * len(columns)}"
    for name in dict.fromkeys(record["run"] for record in records):
        seeds = [record for record in records if record["run"] == name]
        yield f"| {name} | {' | '.join(cell(seeds, *column) for column in columns.values())} |"


def cell(seeds, path, style):
    """The figure at `path` ("skills.mean") of the seeds of a run; of a single seed with its interval, if it has one."""
    found = [value for record in seeds if (value := figure(record, path)) is not None]
    if not found:
        return ""
    if len(found) > 1:
        spread = f" ({min(found):{style}} to {max(found):{style}})" if max(found) > min(found) else ""
        return f"{statistics.fmean(found):{style}}{spread}"
    interval = figure(seeds[0], f"{path}_interval")
    return f"{found[0]:{style}}" + (f" [{interval[0]:{style}}, {interval[1]:{style}}]" if interval else "")


def figure(record, path):
    for name in path.split("."):
        record = record.get(name) if record is not None else None
    return record


def main(cfg):
    if cfg.group not in GROUPS:
        raise UserError(f"--group {cfg.group}: the groups are {', '.join(GROUPS)}")
    if not cfg.table:
        run_group(cfg.group, cfg.only, cfg.jobs)
    for line in table(cfg.group, json.loads((RESULTS / f"{cfg.group}.json").read_text(encoding="utf-8"))):
        print(line)


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
