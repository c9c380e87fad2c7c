"""
MiniMind's classic run on real data, for one consumer GPU: text, conversations and preferences are fetched, a 26M model
learns the language from the first, to answer from the second and which answers people prefer from the third, and a
report says what came of it.

It runs the commands that you would type, and prints each. Before a stage begins, its script says how many minutes it
will take (and what it will cost, with --price_per_hour). Stopped or killed, the same command continues.

reads   pretrain_hq, sft_mini_512 and dpo, fetched by dataset/download.py (2.9 GB), or files of your own
writes  out/minimind/pretrain  …/full_sft  …/dpo  …/report.md  …/report.json
run     bash scripts/minimind.sh                                     makes a virtual environment first
        python scripts/minimind.py --price_per_hour 0.2              where the requirements are installed
        python scripts/minimind.py --pretrain my.jsonl --sft chats.jsonl --dpo none --size 4x256 --out out/mine
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/

import json
import os
from dataclasses import dataclass

from dataset.catalogue import FILES
from dataset.download import file_name
from model.cli import arg, parse_args
from model.errors import UserError, run
from scripts.quickstart import script, shown

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "dataset" / "data"
QUESTIONS = ("你好，你是谁？", "中国的首都是哪里？", "天空为什么是蓝色的？", "推荐几种适合夏天吃的水果。",
             "1 + 1 等于几？", "写一句关于秋天的话。", "Who are you?", "What is the capital of France?")


@dataclass
class Config:
    out: str = arg("out/minimind", "folder for the checkpoints and the report")
    pretrain: str = arg("pretrain_hq", "text: a name that dataset/download.py --list shows, or a file")
    sft: str = arg("sft_mini_512", "conversations: a name or a file")
    dpo: str = arg("dpo", "preferences: a name or a file; none = leave this stage out")
    source: str = arg("auto", "where the files are fetched from: hf, modelscope or auto",
                      choices=("auto", "hf", "modelscope"))
    size: str = arg("small", "size of the model: small is 26M parameters")
    tokenizer: str = arg("auto", "nano, base or a folder; auto: base for all sizes but nano")
    max_len: int = arg(0, "tokens in a row; 0 = what is recommended for the files")
    batch_size: int = arg(128, "rows per optimizer step, of preferences a sixteenth of it")
    max_steps: int = arg(0, "optimizer steps of each stage; 0 = once over the data")
    eval_every: int = arg(250, "steps between held-out evaluations; it saves as often")
    price_per_hour: float = arg(0.0, "price of the machine per hour")
    prompts: str = arg("", "questions for the report: a text file, one a line; empty: eight simple ones")
    max_new_tokens: int = arg(120, "longest answer in the report")


def main(cfg):
    out = ROOT / cfg.out if cfg.out == Config.out else pathlib.Path(cfg.out).resolve()
    report = out / "report.md"
    if report.exists():
        print(report.read_text(encoding="utf-8"))
        print(f"This run is done. Talk to the model:  python scripts/chat.py --model {shown(out / 'full_sft')}\n"
              f"To run it again from nothing, remove {shown(out)}.")
        return
    preferences = "" if cfg.dpo == "none" else cfg.dpo
    for name in (cfg.pretrain, cfg.sft, preferences, cfg.prompts):
        if name and name not in FILES and not pathlib.Path(name).exists():
            raise UserError(f"{name}: neither a file nor a name that python dataset/download.py --list shows")
    text, chats = fetch(cfg.pretrain, cfg), fetch(cfg.sft, cfg)
    pairs = fetch(preferences, cfg) if preferences else None
    # A checkpoint has as many positions as the rows that it was born with: enough for every stage. Rows are packed, so
    # that longer ones cost nothing.
    max_len = cfg.max_len or max(recommended(cfg.pretrain, 320), recommended(cfg.sft, 340))

    stages = [train("pretrain", text, max_len, cfg.batch_size, out, cfg, "--size", cfg.size, "--tokenizer",
                    cfg.tokenizer)]
    stages += [train("full_sft", chats, max_len, cfg.batch_size, out, cfg, "--model", stages[-1])]
    if pairs:                           # a row holds both answers, each with its prompt; larger models learn slower
        few = max(cfg.batch_size // 16, 1)
        stages += [train("dpo", pairs, 4 * max_len, few, out, cfg, "--model", stages[-1], "--lr", 5e-5, "--epochs", 1)]

    prompts = out / "prompts.txt"
    if not cfg.prompts:
        prompts.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    answers = script("scripts/chat.py", "--model", stages[-1], "--prompts", cfg.prompts or prompts, "--temperature", 0,
                     "--repetition_penalty", 1.1, "--max_new_tokens", cfg.max_new_tokens, capture=True)
    write_report(report, stages, answers, cfg)
    print(report.read_text(encoding="utf-8"))
    print(f"Talk to it:  python scripts/chat.py --model {shown(stages[-1])}")


def fetch(name, cfg):
    """The path of a data file: one of the user's, or one of the catalogue, which is fetched unless it is there."""
    if name not in FILES:
        return pathlib.Path(name).resolve()
    script("dataset/download.py", "--file", name, "--source", cfg.source)
    return DATA / file_name(name, FILES[name])


def recommended(name, otherwise):
    return (name in FILES and FILES[name].max_len) or otherwise


def train(stage, data, max_len, batch_size, out, cfg, *flags):
    """Run or continue a stage with its usual learning rate. Returns the folder of its checkpoint."""
    price = ["--price_per_hour", cfg.price_per_hour] if cfg.price_per_hour else []
    script(f"trainer/train_{stage}.py", *flags, "--data", data, "--max_len", max_len, "--batch_size", batch_size,
           "--max_steps", cfg.max_steps, "--eval_every", cfg.eval_every, "--save_every", cfg.eval_every, *price,
           "--on_bad_record", "skip", "--out", out / stage)
    return out / stage


def write_report(path, stages, answers, cfg):
    """report.json with the summaries of all stages and the answers, and report.md made from it."""
    figures = {"stages": {folder.name: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                          for folder in stages},
               "price_per_hour": cfg.price_per_hour, "answers": answers.strip()}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    text = ["# MiniMind's run", "", *stage_table(figures), "",
            "On text that no stage has seen, with 95 % intervals: bits per byte (of answers, for full_sft), and of DPO",
            "in how many pairs the preferred answer has become likelier than the other one, the one before.", "",
            "Answers, at temperature 0:", "", "```", figures["answers"], "```", ""]
    path.write_text("\n".join(text), encoding="utf-8")


def stage_table(figures):
    """Lines of a table: what each stage took, and its held-out figure before and after."""
    price = figures["price_per_hour"]
    yield f"| stage | parameters | tokens | minutes | {'cost | ' if price else ''}held out, before | after |"
    yield f"|---|--:|--:|--:|{'--:|' if price else ''}--:|---|"
    for name, stage in figures["stages"].items():
        scores = stage["held_out"]
        figure = "accuracy" if name == "dpo" else "bits_per_byte"
        low, high = scores[f"{figure}_interval"]
        cells = [name, f"{stage['parameters'] / 1e6:.1f}M", f"{stage['tokens']:,}", f"{stage['minutes']:.1f}",
                 *([f"{price * stage['minutes'] / 60:.2f}"] if price else []),
                 f"{stage['curve'][0][figure]:.3f}",
                 f"{scores[figure]:.3f} [{low:.3f}, {high:.3f}] {figure.replace('_', ' ')}"]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    os.environ["PYTHONUTF8"] = "1"                                         # what the scripts say is read as UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")                      # for terminals that lack a character
    run(main, parse_args(Config, description=__doc__))
