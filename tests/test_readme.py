"""The documentation is true: its commands parse, its links lead somewhere, its line counts are right."""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

from model.cli import parse_args
from scripts import experiments

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "out"} & set(path.relative_to(ROOT).parts))
COMMAND = re.compile(r"(?:^|`|\$ )((?:python|torchrun|bash) [^`\n]*)", re.MULTILINE)


def commands():
    for page in PAGES:
        for line in re.sub(r" \\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines():       # joined at " \\"
            for text in COMMAND.findall(line.strip()):
                yield pytest.param(re.split(r"\s{2,}", text)[0], id=f"{page.relative_to(ROOT).as_posix()}: {text[:60]}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_name_scripts_that_exist_and_flags_that_parse(command):
    words = shlex.split(command.split("#")[0])
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if script is None:                                          # python -m venv, torchrun "in place of python"
        assert words[0] == "torchrun" or words[1] == "-m", command
        return
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script.endswith(".sh"):
        return
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    flags = words[words.index(script) + 1:]
    if flags and not flags[0].startswith("-"):                  # benchmark.py train
        assert f'"{flags.pop(0)}"' in inspect.getsource(module), command
    if hasattr(module, "Config"):
        parse_args(module.Config, flags)                        # exits with 2 on an unknown flag or a wrong value
    else:
        source = inspect.getsource(module)
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--")), command


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_reading_order_names_files_with_their_length():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| \[([\w/.]+)\]\([^)]*\) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) >= 10
    for name, lines in rows:
        count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(count - int(lines)) <= 10, f"{name} has {count} lines, README says {lines}"


def test_the_figures_are_those_of_a_committed_run():
    from scripts.quickstart import practice_table, skill_table, stage_table
    figures = json.loads((ROOT / "scripts" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    tables = *stage_table(figures), *skill_table(figures), *practice_table(figures)
    for line in (*tables, *figures["conversation"].splitlines()):
        assert line in lines or f"    {line}".rstrip() in lines, line


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "results").glob("benchmark_*.json")), ids=lambda p: p.stem)
def test_the_tables_of_speed_are_those_of_a_committed_run(path):
    from scripts.benchmark import table
    lines = [line for page in ("README.md", "scripts/README.md")
             for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    for line in table(json.loads(path.read_text(encoding="utf-8"))):
        assert line in lines, line


@pytest.mark.parametrize("group", list(experiments.GROUPS))
def test_the_tables_of_experiments_are_those_of_committed_runs(group):
    lines = [line for page in ("README.md", "RL.md")
             for line in (ROOT / "trainer" / page).read_text(encoding="utf-8").splitlines()]
    records = json.loads((ROOT / "trainer" / "results" / f"{group}.json").read_text(encoding="utf-8"))
    assert {record["run"] for record in records} <= {one.name for one in experiments.GROUPS[group]}
    for line in experiments.table(group, records):
        assert line in lines, line


def test_the_table_of_optimizers_is_that_of_the_committed_runs():
    names = {"muon": "Muon", "adamw": "AdamW"}
    lines = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8").splitlines()
    for run in json.loads((ROOT / "trainer" / "results" / "optimizers.json").read_text(encoding="utf-8"))["runs"]:
        low, high = run["bits_per_byte_interval"]
        label = names[run["optimizer"]] + (f", seed {run['seed']}" if run["seed"] != 42 else "")
        assert (f"| {label} | {run['steps']} | {run['lr']:g} | {run['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}] |"
                in lines)


def test_the_plain_commands_are_those_of_the_quickstart():
    from scripts.quickstart import Config
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"--vocab_size {Config.vocab_size} " in text
    assert f"--max_steps {Config.pretrain_steps}" in text and f"--max_steps {Config.sft_steps}" in text
    assert f"train_grpo.py --max_steps {Config.rl_steps}\n" in text
