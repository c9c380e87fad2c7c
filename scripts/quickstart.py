"""
Every stage on the built-in world, one after the other: tokenizer, pretraining, fine-tuning, evaluation, a conversation.

It runs the same commands that you would type, prints each, and sums up what they measured. The numbers of steps are
fixed, so that everybody gets the same model; the minutes are only a cap. Stopped and started again it continues.

writes  out/tokenizer  out/pretrain  out/full_sft  out/quickstart/report.md  out/quickstart/report.json
run     bash scripts/quickstart.sh              makes a virtual environment first
        python scripts/quickstart.py            where the requirements are installed
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

import json
import platform
import subprocess
import time
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import run

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclass
class Config:
    out: str = arg("out", "folder for the checkpoints and the report")
    vocab_size: int = arg(1024, "entries of the tokenizer")
    size: str = arg("nano", "size of the model")
    pretrain_steps: int = arg(250, "optimizer steps of pretraining")
    sft_steps: int = arg(160, "optimizer steps of fine-tuning")
    max_minutes: float = arg(6.0, "cap for each of the two training stages")
    eval_items: int = arg(0, "held-out items of every skill; 0 = all")


def main(cfg):
    out = (ROOT / cfg.out).resolve()
    report_folder = out / "quickstart"
    report_folder.mkdir(parents=True, exist_ok=True)
    if (report_folder / "report.md").exists():
        print((report_folder / "report.md").read_text(encoding="utf-8"))
        print(f"The quickstart is done. Talk to the model:  python scripts/chat.py --model {shown(out / 'full_sft')}\n"
              f"To run it again from nothing, remove {shown(out)}.")
        return
    tokenizer, pretrain, sft, untrained = (out / name for name in ("tokenizer", "pretrain", "full_sft", "untrained"))
    cap = ["--max_minutes", str(cfg.max_minutes)]

    if not (tokenizer / "tokenizer.json").exists():
        script("trainer/train_tokenizer.py", "--vocab_size", cfg.vocab_size, "--out", tokenizer)
    script("trainer/train_pretrain.py", "--size", cfg.size, "--tokenizer", tokenizer, "--max_steps", cfg.pretrain_steps,
           "--out", pretrain, *cap)
    script("trainer/train_full_sft.py", "--model", pretrain, "--max_steps", cfg.sft_steps, "--out", sft, *cap)
    save_untrained(pretrain, untrained)
    for folder in (untrained, pretrain, sft):
        scores = report_folder / f"skills_{folder.name}.json"
        if not scores.exists():
            script("eval/skills.py", "--model", folder, "--limit", cfg.eval_items, "--out", scores)
    conversation = script("scripts/chat.py", "--model", sft, "--prompts", "auto", "--temperature", 0, capture=True)
    write_report(report_folder, tokenizer, pretrain, sft, conversation)
    print((report_folder / "report.md").read_text(encoding="utf-8"))
    print(f"Talk to it:  python scripts/chat.py --model {shown(sft)}")


def shown(path):
    """A path as the user would type it."""
    return path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path


def script(name, *flags, capture=False):
    """Run one of the project's scripts and say so; a failure ends this program with its exit code."""
    flags = [str(flag) for flag in flags]
    print(f"\n$ python {name} {' '.join(flags)}", flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], stdout=subprocess.PIPE if capture else None,
                          text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    return done.stdout


def save_untrained(pretrain, folder):
    """The model as it was born, to compare with: same shape and tokenizer, random weights."""
    import torch

    from model.checkpoint import load_config, save_model
    from model.tokenizer import Tokenizer
    from model.transformer import CausalLM
    torch.manual_seed(0)
    save_model(folder, CausalLM(load_config(pretrain)), Tokenizer.load(pretrain))


def write_report(folder, tokenizer, pretrain, sft, conversation):
    """report.json with every figure, report.md with the table and the conversation."""
    summaries = {path.name: json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in (pretrain, sft)}
    skills = {name: json.loads((folder / f"skills_{name}.json").read_text(encoding="utf-8"))
              for name in ("untrained", "pretrain", "full_sft")}
    before = json.loads((pretrain / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    figures = {"machine": f"{platform.machine()}, {platform.system()}", "stages": summaries, "skills": skills}
    (folder / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")

    def bpb(scores, prefix=""):
        low, high = scores[f"{prefix}bits_per_byte_interval"]
        return f"{scores[f'{prefix}bits_per_byte']:.3f} [{low:.3f}, {high:.3f}]"

    def percent(value, interval):
        return f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"

    def mean(stage):
        return percent(skills[stage]["mean"], skills[stage]["mean_interval"])

    stages = {name: (f"{summary['minutes']:.1f}", bpb(summary["held_out"])) for name, summary in summaries.items()}
    rows = [("untrained", "", bpb(before, "val_"), mean("untrained")),
            ("pretrain", *stages["pretrain"], mean("pretrain")),
            ("full_sft (bits per byte of answers)", *stages["full_sft"], mean("full_sft"))]
    lines = ["# From nothing to a model that answers", "",
             "Held-out figures with 95 % intervals: text and exercises that no training record contains.", "",
             "| stage | minutes | bits per byte | skills, exact match |", "|---|--:|---|---|",
             *(f"| {' | '.join(row)} |" for row in rows), "",
             "| skill | untrained | pretrained | fine-tuned |", "|---|--:|--:|--:|"]
    for name, tuned in skills["full_sft"]["skills"].items():
        earlier = [f"{skills[stage]['skills'][name]['accuracy']:.0%}" for stage in ("untrained", "pretrain")]
        lines.append(f"| {name} | {' | '.join(earlier)} | {percent(tuned['accuracy'], tuned['interval'])} |")
    lines += ["", "A conversation with it:", "", "```", conversation.strip(), "```", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
