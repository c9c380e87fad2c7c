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
import re
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
    plot: bool = arg(False, "draw the held-out curves of the group to trainer/results/GROUP.png and stop")


@dataclass(frozen=True)
class Run:
    """One row of a table. `train` is a command without --seed and --out; "" judges `--model` of `base` as it is."""
    name: str
    train: str
    judges: tuple = ("skills",)
    seeds: tuple = (42,)
    base: str = "out/full_sft"        # what an adapter lies on
    first: str = ""                   # a command before that one, whose --out is what DATA stands for in `train`
    curve: tuple = ()                 # which held-out figures are kept of every evaluation, after its minute


# What a judge writes to --out is kept, as far as it is a number or an interval.
JUDGES = {
    "skills": "eval/skills.py",
    "persona": "eval/skills.py --data builtin:persona_test",
    "manners": "eval/preferences.py",
    "reward": "eval/reward_model.py",
    "practice": "eval/skills.py --data builtin:practice_test",
    "text": "eval/eval_loss.py --data builtin:pretrain --split val",
    "thinking": "eval/skills.py --data builtin:reason_test --thinking on",
    "at once": "eval/skills.py --data builtin:reason_test --thinking off",
    "errands": "eval/agent.py",
}

QUIET = " --eval_every 0 --sample_every 0"       # only the final evaluation counts here
THREE = (42, 43, 44)
TEACHER = RUNS.relative_to(ROOT) / "distillation"
DISTIL = f"trainer/train_distillation.py --teacher {TEACHER}/teacher-seed42 --size nano --optimizer muon" \
         f" --schedule wsd --lr 3e-3 --compile off{QUIET} --data builtin:pretrain"
LITTLE = "_little --val_fraction 0.84"            # 200 documents to learn from, again and again
CHAT = f"trainer/train_distillation.py --teacher {TEACHER}/teacher_chat-seed42 --model out/pretrain --optimizer muon" \
       f" --schedule wsd --lr 1e-3 --compile off{QUIET} --max_steps 300"

NEW = f" --data builtin:persona:0.5,builtin:sft:0.5 --max_steps 300 --compile off{QUIET}"     # and what it knew
LONGER = f" --data builtin:persona:0.4,builtin:sft:0.6 --max_steps 700 --compile off{QUIET}"
FULL = "trainer/train_full_sft.py --model out/full_sft"
ATTENTION = "trainer/train_lora.py --lora_targets q_proj,k_proj,v_proj,o_proj"
PERSONA = ("persona", "skills")
DPO = "trainer/train_dpo.py --compile off" + QUIET
MANNERS = ("manners", "skills")
REWARD = "trainer/train_reward.py --optimizer muon --compile off" + QUIET
REASON = "trainer/train_reason.py --max_steps 1000 --compile off" + QUIET
PRACTICE = ("practice", "skills", "text")
STEPS = " --max_steps 60 --compile off --sample_every 0 --eval_every 10 --eval_rows 150"
GRPO, PPO, SPO = (f"trainer/train_{name}.py{STEPS}" for name in ("grpo", "ppo", "spo"))
PAIRS = f"{REWARD} --lr 1e-3 --data builtin:preferences_more"
TASTE, AGENT = (RUNS.relative_to(ROOT) / group for group in ("taste", "agent"))
ASKED = "trainer/train_grpo.py --data builtin:manners --val_data builtin:manners_val --replay_data builtin:sft:0.75," \
        "builtin:pretrain:0.25 --max_steps 80 --compile off --sample_every 40 --eval_every 10 --eval_rows 150"
SCORED = f"{ASKED} --reward {TASTE}/reward_model_of_200_pairs-seed42 --canaries 0"
TOOLS = f"trainer/train_agent.py --model {AGENT}/traces-seed42 --max_steps 80 --compile off --sample_every 0" \
        " --eval_every 10 --eval_rows 150"
ERRANDS = ("errands", "skills")

GROUPS = {
    "lora": [
        Run("before", "", PERSONA),
        Run("full fine-tuning, 700 steps", f"{FULL} --lr 3e-4{LONGER}", PERSONA, THREE),
        Run("LoRA of attention, 700 steps", f"{ATTENTION} --lr 1e-2{LONGER}", PERSONA, THREE),
        Run("full fine-tuning", f"{FULL}{NEW}", PERSONA),
        Run("full, a third of the rate", f"{FULL} --lr 3e-4{NEW}", PERSONA),
        Run("LoRA of all", f"trainer/train_lora.py{NEW}", PERSONA),
        Run("LoRA of all, rank 4", f"trainer/train_lora.py --lora_rank 4{NEW}", PERSONA),
        Run("LoRA of attention", f"{ATTENTION}{NEW}", PERSONA),
        Run("LoRA of MLPs", f"trainer/train_lora.py --lora_targets up_proj,down_proj{NEW}", PERSONA),
        *(Run(label, f"trainer/train_lora.py --method {method}{NEW}", PERSONA) for method, label in
          {"rslora": "rsLoRA", "dora": "DoRA", "lora+": "LoRA+", "pissa": "PiSSA", "adalora": "AdaLoRA",
           "ia3 --lr 5e-3": "(IA)³", "bottleneck --lora_rank 16": "bottleneck, 16",
           "prefix --lora_rank 16": "prefix, 16", "prompt --lora_rank 32": "prompt, 32"}.items()),
    ],
    "dpo": [
        Run("before", "", MANNERS),
        Run("DPO", DPO, MANNERS, THREE),
        Run("control: labels by lot", f"{DPO} --shuffle_labels", MANNERS),
        Run("DPO without --nll", f"{DPO} --nll 0", MANNERS),
        Run("control: labels by lot, without --nll", f"{DPO} --nll 0 --shuffle_labels", MANNERS),
        Run("DPO per token", f"{DPO} --loss dpo_norm", MANNERS),
        Run("IPO", f"{DPO} --loss ipo --beta 1", MANNERS),
        Run("SimPO", f"{DPO} --loss simpo", MANNERS),
        Run("KTO", f"{DPO} --loss kto --max_len 384", MANNERS),
        Run("DPO by LoRA", f"{DPO} --lr 1e-3 --lora_rank 8", MANNERS),
        Run("ORPO, from the base model", f"{DPO} --loss orpo --model out/pretrain --optimizer muon --lr 1e-3", MANNERS),
    ],
    "reward": [
        Run("reward model", PAIRS, ("reward",), THREE),
        Run("control: labels by lot", f"{PAIRS} --shuffle_labels", ("reward",), THREE),
        Run("yes/no evaluator", f"{REWARD} --head yesno --lr 2e-3 --schedule wsd", ("reward",)),
        Run("the three reward models, mean", "", ("reward",),
            base=",".join(f"out/experiments/reward/reward_model-seed{seed}" for seed in THREE)),
    ],
    "reason": [
        Run("before", "", ("thinking", "at once", "skills")),
        Run("thinking", REASON, ("thinking", "at once", "skills"), THREE),
        Run("control: answers at once", f"{REASON} --data builtin:traces_direct:0.5,builtin:sft:0.5",
            ("at once", "skills")),
    ],
    "rl": [
        Run("before", "", PRACTICE),
        Run("GRPO", GRPO, PRACTICE, THREE, curve=("accuracy", "pass_8")),
        Run("PPO", PPO, PRACTICE, THREE, curve=("accuracy",)),
        Run("SPO", SPO, PRACTICE, THREE, curve=("accuracy",)),
        Run("control: GRPO, random reward", f"{GRPO} --reward random", PRACTICE, THREE, curve=("accuracy",)),
        Run("control: GRPO, constant reward", f"{GRPO} --reward constant", PRACTICE, curve=("accuracy",)),
        Run("control: PPO, random reward", f"{PPO} --reward random", PRACTICE, curve=("accuracy",)),
        Run("control: GRPO, random reward, no KL", f"{GRPO} --reward random --beta 0", PRACTICE, THREE,
            curve=("accuracy",)),
        Run("control: constant reward, replay by ce", f"{GRPO} --reward constant --replay_loss ce", PRACTICE,
            curve=("accuracy",)),
        Run("control: SPO, random reward", f"{SPO} --reward random", PRACTICE, curve=("accuracy",)),
        *(Run(f"GRPO, --loss {loss}", f"{GRPO} --loss {loss}", PRACTICE, curve=("accuracy",))
          for loss in ("grpo", "dr_grpo", "gspo", "cispo", "rloo")),
        Run("GRPO by LoRA", f"{GRPO} --lora_rank 8 --lr 5e-4", PRACTICE, curve=("accuracy",)),
        Run("GRPO without replay", f"{GRPO} --replay 0", PRACTICE, curve=("accuracy",)),
        Run("GRPO without KL to the start", f"{GRPO} --beta 0", PRACTICE, curve=("accuracy",)),
        Run("rejection sampling, then SFT", f"{FULL} --data DATA:0.5,builtin:sft:0.5 --max_steps 300 --lr 3e-4"
            f" --compile off{QUIET}", PRACTICE,
            first="scripts/generate_data.py --data builtin:practice --limit 4000 --samples 4 --temperature 1"),
    ],
    "taste": [
        Run("before", "", MANNERS),
        Run("reward model of 200 pairs", f"{REWARD} --lr 1e-3 --epochs 8 --data builtin:preferences_few", ("reward",)),
        Run("GRPO, that reward model", SCORED, MANNERS, curve=("accuracy", "reward")),
        Run("that reward model, no leash, 4 x the rate", f"{SCORED} --beta 0 --replay 0 --lr 2e-4", MANNERS,
            curve=("accuracy", "reward")),
        Run("GRPO, that reward model, stopped early", f"{SCORED} --early_stop 4", MANNERS,
            curve=("accuracy", "reward")),
        Run("evaluator", f"{REWARD} --head yesno --lr 2e-3 --schedule wsd", ("reward",)),
        Run("GRPO, constitution", f"{ASKED} --reward constitution:builtin --evaluator {TASTE}/evaluator-seed42",
            MANNERS, curve=("accuracy", "reward", "canary_wins")),
        Run("GRPO, constitution and repetition", f"{ASKED} --reward constitution:builtin:1,repetition:2 --evaluator"
            f" {TASTE}/evaluator-seed42", MANNERS, curve=("accuracy", "reward", "canary_wins")),
        Run("lopsided constitution, no leash, no guard", f"{ASKED} --reward constitution:dataset/builtin/"
            f"constitution_lopsided.txt --evaluator {TASTE}/evaluator-seed42 --calibrate none --canaries 0 --beta 0"
            " --replay 0 --lr 2e-4", MANNERS, curve=("accuracy", "reward", "canary_wins")),
    ],
    "agent": [
        Run("traces", f"{FULL} --data builtin:agent:0.5,builtin:sft:0.5 --max_steps 115 --compile off{QUIET}", ERRANDS),
        Run("GRPO over turns", TOOLS, ERRANDS, THREE, curve=("accuracy",)),
        Run("control: random reward", f"{TOOLS} --reward random", ERRANDS, curve=("accuracy",)),
    ],
    "distillation": [
        Run("teacher", f"trainer/train_pretrain.py --size 6x256 --tokenizer out/pretrain --max_steps 1825{QUIET}", ()),
        Run("hard labels", f"{DISTIL} --max_steps 300 --alpha 1", (), THREE),
        Run("taught", f"{DISTIL} --max_steps 300 --alpha 0", (), THREE),
        Run("hard labels, 200 documents", f"{DISTIL}{LITTLE} --max_steps 150 --alpha 1", (), THREE),
        Run("taught, 200 documents", f"{DISTIL}{LITTLE} --max_steps 150 --alpha 0", (), THREE),
        Run("teacher chat", f"trainer/train_full_sft.py --model {TEACHER}/teacher-seed42 --max_steps 800{QUIET}"),
        Run("chat, hard labels", f"{CHAT} --alpha 1"),
        Run("chat, forward KL", f"{CHAT} --alpha 0"),
        Run("chat, forward KL, on policy", f"{CHAT} --alpha 0 --on_policy 0.5"),
    ],
}

# group -> {title of a column: (path to the figure in a run's record, format)}
COLUMNS = {
    "lora": {"trained parameters": ("trained_parameters", ",.0f"), "minutes": ("minutes", ".1f"),
             "GB": ("memory_gb", ".2f"), "the captain's questions": ("persona.mean", ".1%"),
             "skills from before": ("skills.mean", ".1%")},
    "dpo": {"minutes": ("minutes", ".1f"), "pairs told apart": ("held_out.accuracy", ".1%"),
            "own answers preferred": ("manners.win_rate", ".1%"), "tokens": ("manners.tokens", ".1f"),
            "skills from before": ("skills.mean", ".1%")},
    "reward": {"minutes": ("minutes", ".1f"), "right of the held-out pairs": ("reward.accuracy", ".1%"),
               "of equally long ones": ("reward.accuracy_matched", ".1%"),
               "the longer one is better": ("reward.longer_wins", ".1%"),
               "correlation with length": ("reward.length_correlation", ".2f"), "ECE": ("reward.ece", ".3f")},
    "reason": {"minutes": ("minutes", ".1f"), "hard sums, thinking": ("thinking.mean", ".1%"),
               "tokens": ("thinking.mean_tokens", ".1f"), "hard sums, at once": ("at once.mean", ".1%"),
               "their tokens": ("at once.mean_tokens", ".1f"), "skills from before": ("skills.mean", ".1%")},
    "rl": {"minutes": ("minutes", ".1f"), "practised skills": ("practice.mean", ".1%"),
           "one of 8 samples": ("held_out.pass_8", ".1%"), "skills from before": ("skills.mean", ".1%"),
           "bits per byte of text": ("text.bits_per_byte", ".3f")},
    "taste": {"minutes": ("minutes", ".1f"), "own answers preferred": ("manners.win_rate", ".1%"),
              "asked politely": ("manners.polite", ".1%"), "plainly": ("manners.plain", ".1%"),
              "tokens": ("manners.tokens", ".1f"), "skills from before": ("skills.mean", ".1%"),
              "the reward, held out": ("held_out.reward", ".2f")},
    "agent": {"minutes": ("minutes", ".1f"), "errands done": ("errands.mean", ".1%"),
              "skills from before": ("skills.mean", ".1%")},
    "distillation": {"tokens": ("tokens", ",.0f"), "minutes": ("minutes", ".1f"),
                     "bits per byte, held out": ("held_out.bits_per_byte", ".3f"), "skills": ("skills.mean", ".1%")},
}


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
    folder = RUNS / group / f"{slug(one.name)}-seed{seed}"
    record = {"run": one.name, "seed": seed, "command": one.train}
    place = ("--model", one.base)
    if one.train:
        if not (folder / "summary.json").exists():
            if one.first:
                python(one.first, "--seed", seed, "--out", folder.with_suffix(".jsonl"), threads=threads)
            command = one.train.replace("DATA", str(folder.with_suffix(".jsonl").relative_to(ROOT)))
            python(command, "--seed", seed, "--out", folder, threads=threads)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        record |= {name: summary[name] for name in ("minutes", "steps", "tokens", "memory_gb", "parameters",
                                                    "trained_parameters", "machine", "commit")}
        record["held_out"] = numbers(summary["held_out"])
        if one.curve:
            record["curve"] = [[point["minutes"], *(round(point[name], 4) for name in one.curve)]
                               for point in summary["curve"]]
        adapted = (folder / "adapter_config.json").exists()
        place = ("--model", one.base, "--adapter", folder) if adapted else ("--model", folder)
    for judge in one.judges:
        scores = folder / f"{slug(judge)}.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not scores.exists():
            python(JUDGES[judge], *place, "--out", scores, threads=threads)
        record[judge] = numbers(json.loads(scores.read_text(encoding="utf-8")))
    return record


def slug(name):
    """A run's name as part of a path."""
    return re.sub(r"[^\w+]+", "_", name)


def numbers(figures):
    """Those values of a dict that are numbers or pairs of numbers; of a score by skill or request, each one's too."""
    kept = {name: round_off(value) for name, value in figures.items() if round_off(value) is not None}
    for name, skill in figures.get("skills", {}).items():
        kept[name] = round_off(skill["accuracy"])
    for name, request in figures.get("requests", {}).items():
        kept[name] = round_off(request["win_rate"])
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
    todo = [(one, seed) for one in GROUPS[group] for seed in one.seeds if only in f"{one.name}-seed{seed}"]
    order = {(one.name, seed): place for place, (one, seed) in
             enumerate((one, seed) for one in GROUPS[group] for seed in one.seeds)}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(do, group, *which, threads) for which in todo]):
            record = done.result()
            key = record["run"], record["seed"]
            records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
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


# ---------------------------------------------------------------------------------------------------- curves


PLOTTED = {"rl": ("GRPO", "PPO", "SPO", "control: GRPO, random reward"),
           "taste": ("that reward model, no leash, 4 x the rate",)}


def plot(group, records):
    """Write trainer/results/GROUP.png: what was measured on held-out prompts against minutes, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for number, name in enumerate(PLOTTED[group]):
        kept = next(one.curve for one in GROUPS[group] if one.name == name)
        for nth, record in enumerate(record for record in records if record["run"] == name):
            minutes, *figures = zip(*record["curve"], strict=True)
            axis.plot(minutes, figures[0], color=f"C{number}", linewidth=1.3, marker=".",
                      label=name if nth == 0 else None)
            if "reward" in kept:
                other = axis.twinx()
                other.plot(minutes, figures[kept.index("reward")], color="C3", linewidth=1.3, marker=".")
                other.set_ylabel("reward on held-out prompts, as the policy is trained (red)")
    axis.set(xlabel="minutes, evaluations included", ylabel="accuracy on held-out prompts", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / f"{group}.png", dpi=110)
    return RESULTS / f"{group}.png"


def main(cfg):
    if cfg.group not in GROUPS:
        raise UserError(f"--group {cfg.group}: the groups are {', '.join(GROUPS)}")
    if cfg.plot:
        if cfg.group not in PLOTTED:
            raise UserError(f"--plot: of group {cfg.group} no curves are kept; {', '.join(PLOTTED)} has some")
        print(plot(cfg.group, json.loads((RESULTS / f"{cfg.group}.json").read_text(encoding="utf-8"))))
        return
    if not cfg.table:
        run_group(cfg.group, cfg.only, cfg.jobs)
    for line in table(cfg.group, json.loads((RESULTS / f"{cfg.group}.json").read_text(encoding="utf-8"))):
        print(line)


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
