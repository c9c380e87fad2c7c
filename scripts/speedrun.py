"""
How fast from nothing to a goal that anybody can check. EXPERIMENTS.md keeps the records.

    cpu   a model of nano's size answers GOAL of the built-in exercises that no training record contains
    gpu   a model of base's size reaches so many bits per byte on the validation file of TinyStories, one GPU

The clock runs from the first step of the first stage to the last of the last: tokenising, training and saving count,
installing, downloading and the final evaluation do not. To beat the record, change anything but the goal.

reads   the built-in world; for gpu the public set `stories` (dataset/download.py)
writes  out/speedrun/…  and prints the row for the table of records
run     bash scripts/speedrun.sh          bash scripts/speedrun.sh gpu
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

import datetime
import json
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import run
from scripts.quickstart import script

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "dataset" / "data"
SKILLS_GOAL = 0.70               # mean exact match over the skills of the held-out test exercises
BITS_GOAL = 0.60                 # bits per byte of the validation stories


@dataclass
class Config:
    out: str = arg("out/speedrun", "folder for the checkpoints; what is there is trained again")
    pretrain_steps: int = arg(900, "cpu: optimizer steps of pretraining")
    sft_steps: int = arg(650, "cpu: optimizer steps of fine-tuning")
    minutes: float = arg(60.0, "gpu: wall-clock budget that the schedule fits itself to")


def on_cpu(cfg, out):
    """(reached, goal met, summaries): pretraining and fine-tuning on the built-in world, then all exercises."""
    quiet = ["--eval_every", 0, "--sample_every", 0, "--save_every", 0, "--overwrite"]
    script("trainer/train_pretrain.py", "--device", "cpu", "--max_steps", cfg.pretrain_steps, "--out", out / "pretrain",
           *quiet)
    script("trainer/train_full_sft.py", "--device", "cpu", "--model", out / "pretrain", "--max_steps", cfg.sft_steps,
           "--out", out / "full_sft", *quiet)
    script("eval/skills.py", "--model", out / "full_sft", "--out", out / "skills.json")
    scores = json.loads((out / "skills.json").read_text(encoding="utf-8"))
    low, high = scores["mean_interval"]
    return (f"{scores['mean']:.1%} [{low:.1%}, {high:.1%}] of the skills", scores["mean"] >= SKILLS_GOAL,
            [summary(out / stage) for stage in ("pretrain", "full_sft")])


def on_gpu(cfg, out):
    """(reached, goal met, summaries): pretraining on stories within the budget."""
    script("dataset/download.py", "--preset", "stories")
    script("trainer/train_pretrain.py", "--device", "cuda", "--size", "base", "--data", DATA / "tinystories.jsonl",
           "--val_data", DATA / "tinystories_valid.jsonl", "--max_len", 512, "--batch_size", 128, "--lr", 2e-3,
           "--max_minutes", cfg.minutes, "--eval_every", 500, "--sample_every", 0, "--out", out / "stories",
           "--overwrite")
    scores = summary(out / "stories")
    low, high = scores["held_out"]["bits_per_byte_interval"]
    bits = scores["held_out"]["bits_per_byte"]
    return f"{bits:.4f} [{low:.4f}, {high:.4f}] bits per byte", bits <= BITS_GOAL, [scores]


def summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def main(track, cfg):
    out = (ROOT / cfg.out).resolve() / track
    reached, met, stages = {"cpu": on_cpu, "gpu": on_gpu}[track](cfg, out)
    machine = stages[0]["machine"]
    minutes = " + ".join(f"{stage['minutes']:.1f}" for stage in stages)
    print(f"\n{'the goal is met' if met else 'NOT met: the goal is'}"
          + ("" if met else f" {SKILLS_GOAL:.0%} of the skills" if track == "cpu" else f" {BITS_GOAL} bits per byte"))
    print(f"| {datetime.date.today()} | {stages[0]['commit']} | {machine['gpu'] or machine['cpu']}, {machine['cores']} "
          f"cores | {sum(stage['minutes'] for stage in stages):.1f} ({minutes}) | {reached} | what changed |")
    return 0 if met else 1


if __name__ == "__main__":
    TRACK = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ("cpu", "gpu") else "cpu"
    sys.exit(run(main, TRACK, parse_args(Config, description=__doc__)))
