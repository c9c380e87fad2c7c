"""
From nothing to a chat model on the built-in world: tokenizer, pretraining, fine-tuning, reinforcement learning (GRPO),
evaluation, a conversation.

It runs the same commands that you would type, prints each, and sums up what they measured. The numbers of steps are
fixed, so that everybody gets the same model; the minutes are only a cap. Stopped and started again it continues.

writes  out/tokenizer  out/pretrain  out/full_sft  out/grpo  out/quickstart/report.md  out/quickstart/report.json
run     bash scripts/quickstart.sh              makes a virtual environment first
        python scripts/quickstart.py            where the requirements are installed
        python scripts/quickstart.py --ship model/nano      made the checkpoint that comes with the project
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

import json
import os
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
    pretrain_steps: int = arg(1150, "optimizer steps of pretraining")
    sft_steps: int = arg(800, "optimizer steps of fine-tuning")
    rl_steps: int = arg(60, "steps of reinforcement learning")
    min_pass: float = arg(0.05, "share of right answers under which that does not start")
    max_minutes: float = arg(6.0, "cap for each of the three training stages")
    eval_items: int = arg(0, "held-out items of every skill; 0 = all")
    ship: str = arg("", "save the last checkpoint in bfloat16 to this folder too, with the report as its card")


def main(cfg):
    out = (ROOT / cfg.out).resolve()
    report_folder = out / "quickstart"
    report_folder.mkdir(parents=True, exist_ok=True)
    if (report_folder / "report.md").exists():
        print((report_folder / "report.md").read_text(encoding="utf-8"))
        print(f"The quickstart is done. Talk to the model:  python scripts/chat.py --model {shown(out / 'grpo')}\n"
              f"To run it again from nothing, remove {shown(out)}.")
        if cfg.ship:
            ship(out / "grpo", report_folder, cfg.ship)
        return
    tokenizer, pretrain, sft, grpo, untrained = (
        out / name for name in ("tokenizer", "pretrain", "full_sft", "grpo", "untrained"))
    cap = ["--max_minutes", str(cfg.max_minutes)]

    if not (tokenizer / "tokenizer.json").exists():
        script("trainer/train_tokenizer.py", "--vocab_size", cfg.vocab_size, "--out", tokenizer)
    script("trainer/train_pretrain.py", "--size", cfg.size, "--tokenizer", tokenizer, "--max_steps", cfg.pretrain_steps,
           "--out", pretrain, *cap)
    script("trainer/train_full_sft.py", "--model", pretrain, "--max_steps", cfg.sft_steps, "--out", sft, *cap)
    script("trainer/train_grpo.py", "--model", sft, "--max_steps", cfg.rl_steps, "--min_pass", cfg.min_pass, "--out",
           grpo, *cap)
    save_untrained(pretrain, untrained)
    for folder in (untrained, pretrain, sft, grpo):
        score("skills", folder, "builtin", cfg.eval_items, report_folder)
    for folder in (sft, grpo):
        score("practice", folder, "builtin:practice_test", cfg.eval_items, report_folder)
    conversation = script("scripts/chat.py", "--model", grpo, "--prompts", "auto", "--temperature", 0, capture=True)
    write_report(report_folder, pretrain, sft, grpo, conversation)
    print((report_folder / "report.md").read_text(encoding="utf-8"))
    print(f"Talk to it:  python scripts/chat.py --model {shown(grpo)}")
    if cfg.ship:
        ship(grpo, report_folder, cfg.ship)


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


def score(name, model, data, items, folder):
    """Exact match of a checkpoint on exercises, to NAME_MODEL.json."""
    path = folder / f"{name}_{model.name}.json"
    if not path.exists():
        script("eval/skills.py", "--model", model, "--data", data, "--limit", items, "--out", path)


def save_untrained(pretrain, folder):
    """The model as it was born, to compare with: same shape and tokenizer, random weights."""
    import torch

    from model.checkpoint import load_config, save_model
    from model.tokenizer import Tokenizer
    from model.transformer import CausalLM
    torch.manual_seed(0)
    save_model(folder, CausalLM(load_config(pretrain)), Tokenizer.load(pretrain))


def ship(checkpoint, report_folder, folder):
    """Save a checkpoint in bfloat16, half the bytes, with the report as its model card."""
    import torch

    from model.checkpoint import load_model, save_model
    model, tokenizer = load_model(checkpoint)
    report = (report_folder / "report.md").read_text(encoding="utf-8")
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
---

# A model of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters

Trained from nothing in minutes on the built-in world of this project, text that a program writes: a toy that copies,
sorts, adds small numbers and knows some people and animals, in English. What it was trained by, and how it did, in
float32; here it is in bfloat16. `python scripts/quickstart.py --ship {pathlib.Path(folder).as_posix()}` makes it again.

{report.replace("# ", "## ", 1)}"""
    save_model(folder, model, tokenizer, torch.bfloat16, card)
    print(f"saved to {folder}")


def write_report(folder, pretrain, sft, grpo, conversation):
    """report.json with every figure, and report.md made from it."""
    figures = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
               "start": json.loads((pretrain / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]),
               "stages": {path.name: json.loads((path / "summary.json").read_text(encoding="utf-8"))
                          for path in (pretrain, sft, grpo)},
               "skills": {}, "practice": {}, "conversation": conversation.strip()}
    for path in sorted(folder.glob("skills_*.json")) + sorted(folder.glob("practice_*.json")):
        kind, _, name = path.stem.partition("_")
        scores = json.loads(path.read_text(encoding="utf-8"))
        figures[kind][name] = {key: scores[key] for key in ("mean", "mean_interval", "skills")}
    (folder / "report.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    text = ["# From nothing to a model that answers", "", *stage_table(figures), "", *skill_table(figures), "",
            "What GRPO practised, without being told an answer: longer words than fine-tuning had", "",
            *practice_table(figures), "",
            "A conversation with it:", "", "```", figures["conversation"], "```", ""]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def percent(value, interval):
    return f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def stage_table(figures):
    """Lines of a table: what each stage took and what it reached on held-out text and exercises, 95 % intervals."""
    yield "| stage | minutes | bits per byte, held out | skills, exact match | longer words |"
    yield "|---|--:|---|---|---|"
    start = {key.removeprefix("val_"): value for key, value in figures["start"].items()}
    for name, label in (("untrained", "untrained"), ("pretrain", "pretrained"), ("full_sft", "fine-tuned"),
                        ("grpo", "practised (GRPO)")):
        stage = figures["stages"].get(name)
        held_out = stage["held_out"] if stage else start
        bits = ""
        if "bits_per_byte" in held_out:
            low, high = held_out["bits_per_byte_interval"]
            of_answers = " of answers" if name == "full_sft" else ""
            bits = f"{held_out['bits_per_byte']:.3f} [{low:.3f}, {high:.3f}]{of_answers}"
        scores = [figures[kind].get(name) for kind in ("skills", "practice")]
        cells = [label, f"{stage['minutes']:.1f}" if stage else "", bits,
                 *(percent(score["mean"], score["mean_interval"]) if score else "" for score in scores)]
        yield f"| {' | '.join(cells)} |"


def skill_table(figures):
    """Lines of a table: exact match of every skill on exercises that no training record contains."""
    yield "| skill | untrained | pretrained | fine-tuned | practised |"
    yield "|---|--:|--:|--:|--:|"
    skills = figures["skills"]
    for name, tuned in skills["full_sft"]["skills"].items():
        others = [f"{skills[stage]['skills'][name]['accuracy']:.0%}" for stage in ("untrained", "pretrain", "grpo")]
        yield f"| {name} | {' | '.join(others[:2])} | {percent(tuned['accuracy'], tuned['interval'])} | {others[2]} |"


def practice_table(figures):
    """Lines of a table: exact match on the exercises of reinforcement learning, before and after."""
    yield "| skill | fine-tuned | practised |"
    yield "|---|--:|--:|"
    before, after = (figures["practice"][name]["skills"] for name in ("full_sft", "grpo"))
    for name in before:
        cells = [percent(skills[name]["accuracy"], skills[name]["interval"]) for skills in (before, after)]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
