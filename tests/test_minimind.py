"""The run on real data, from end to end with small files of the same shape, and the commands that it gives."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import UserError
from scripts import minimind

ROOT = Path(__file__).resolve().parents[1]
WORDS = "今天 天气 很 好 我们 去 公园 看 花 吃 苹果 喝 水 学习 数学 语言 你 我 他 是 不 the fox likes to sing".split()


def sentence(rng, most):
    return "".join(rng.choices(WORDS, k=rng.randint(2, most))) + "。"


@pytest.fixture
def texts(tmp_path):
    """Documents as in pretrain_hq: several questions and answers in a row."""
    rng, path = random.Random(0), tmp_path / "texts.jsonl"
    rows = [{"text": "\n".join(sentence(rng, 12) for _ in range(4))} for _ in range(80)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path):
    """Conversations as in sft_mini_512, among them one that cannot be read."""
    rng, path = random.Random(1), tmp_path / "chats.jsonl"
    rows = [{"conversations": [{"role": role, "content": sentence(rng, 6)} for _ in range(rng.randint(1, 2))
                               for role in ("user", "assistant")]} for _ in range(80)]
    rows[40] = {"conversations": []}
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    """Preferences as in dpo.jsonl."""
    rng, path = random.Random(2), tmp_path / "pairs.jsonl"
    rows = []
    for _ in range(80):
        question = {"role": "user", "content": sentence(rng, 6)}
        rows.append({side: [question, {"role": "assistant", "content": side + sentence(rng, 6)}]
                     for side in ("chosen", "rejected")})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_stopped_in_the_middle_it_continues_and_reports_in_the_end(texts, chats, pairs, tmp_path):
    """Pretraining succeeds, fine-tuning fails for its data; with the data repaired the same command does the rest."""
    broken = chats.with_name("broken.jsonl")
    broken.write_text('{"conversations": []}\n' * 20, encoding="utf-8")
    chats.rename(chats.with_name("good.jsonl"))
    broken.rename(chats)
    flags = ["--pretrain", texts.name, "--sft", chats.name, "--dpo", pairs.name, "--size", "2x64",
             "--tokenizer", "nano", "--max_len", "64", "--batch_size", "4", "--max_steps", "4", "--max_new_tokens", "4",
             "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_VENV": "1",
                   "PYTHON": sys.executable, "PRICE_PER_HOUR": "0.36"}
    start = ["bash", str(ROOT / "scripts" / "minimind.sh")]
    if not shutil.which("bash"):
        start = [sys.executable, str(ROOT / "scripts" / "minimind.py"), "--price_per_hour", "0.36"]

    def run():
        return subprocess.run([*start, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              encoding="utf-8")

    failed = run()
    assert failed.returncode == 2 and "error: " in failed.stderr, failed.stderr
    assert not (tmp_path / "run/report.md").exists()
    chats.with_name("good.jsonl").replace(chats)
    metrics = (tmp_path / "run/pretrain/metrics.jsonl").read_bytes()

    done = run()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/pretrain/metrics.jsonl").read_bytes() == metrics and "is finished (4 steps)" in done.stdout
    figures = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert list(figures["stages"]) == ["pretrain", "full_sft", "dpo"]
    for name, stage in figures["stages"].items():
        assert stage["steps"] == 4 and stage["config"]["price_per_hour"] == 0.36
        assert stage["held_out"]["loss"] < stage["curve"][0]["loss"]
        figure = stage["held_out"]["accuracy" if name == "dpo" else "bits_per_byte"]
        assert f"| {name} | " in report and f"| {figure:.3f} [" in report
    assert figures["answers"].count("> ") == len(minimind.QUESTIONS) and all(q in report for q in minimind.QUESTIONS)
    again = run()
    assert again.returncode == 0 and "This run is done" in again.stdout and "train_" not in again.stdout


@pytest.fixture
def commands(monkeypatch):
    """The scripts that would be run, with their flags as {name: value}; the stages leave a made-up summary."""
    given = []

    def pretend(name, *flags, capture=False):
        given.append((name, dict(zip(flags[::2], map(str, flags[1::2]), strict=True))))
        if "train_" in name:
            folder = Path(given[-1][1]["--out"])
            folder.mkdir(parents=True)
            scores = {"bits_per_byte": 1.25, "bits_per_byte_interval": [1.2, 1.3]}
            if "dpo" in name:
                scores = {"accuracy": 0.75, "accuracy_interval": [0.7, 0.8]}
            summary = {"parameters": 26_000_000, "tokens": 1_234_567, "minutes": 90.0, "held_out": scores,
                       "curve": [{"bits_per_byte": 3.5, "accuracy": 0.5}]}
            (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return "> Who are you?\na model\n" if capture else None

    monkeypatch.setattr(minimind, "script", pretend)
    return given


def test_the_classic_run_fetches_its_files_and_trains_with_their_recommended_length(commands, tmp_path, capsys):
    out = tmp_path / "run"
    minimind.main(minimind.Config(out=str(out), price_per_hour=0.5, source="modelscope"))
    names = [name for name, _ in commands]
    assert names == ["dataset/download.py"] * 3 + ["trainer/train_pretrain.py", "trainer/train_full_sft.py",
                                                   "trainer/train_dpo.py", "scripts/chat.py"]
    first, second, third, pretrain, sft, dpo, chat = (flags for _, flags in commands)
    assert first == {"--file": "pretrain_hq", "--source": "modelscope"} and second["--file"] == "sft_mini_512"
    assert pretrain["--data"] == str(ROOT / "dataset/data/pretrain_hq.jsonl") and pretrain["--size"] == "small"
    assert sft["--data"] == str(ROOT / "dataset/data/sft_mini_512.jsonl") and sft["--model"] == str(out / "pretrain")
    for flags in (pretrain, sft):
        assert flags["--max_len"] == "340" and flags["--max_steps"] == "0" and flags["--price_per_hour"] == "0.5"
    assert third["--file"] == "dpo" and dpo["--model"] == str(out / "full_sft") and dpo["--batch_size"] == "8"
    assert chat["--model"] == str(out / "dpo") and Path(chat["--prompts"]).read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "| full_sft | 26.0M | 1,234,567 | 90.0 | 0.75 | 3.500 | 1.250 [1.200, 1.300] bits per byte |" in said
    assert "| dpo | 26.0M | 1,234,567 | 90.0 | 0.75 | 0.500 | 0.750 [0.700, 0.800] accuracy |" in said
    assert "a model" in said


def test_what_the_trainers_are_given_are_flags_of_theirs(commands, tmp_path):
    from model.cli import parse_args
    from trainer import train_dpo, train_full_sft, train_pretrain
    minimind.main(minimind.Config(out=str(tmp_path / "run"), price_per_hour=0.5))
    trained = [flags for name, flags in commands if "train_" in name]
    for flags, module in zip(trained, (train_pretrain, train_full_sft, train_dpo), strict=True):
        parse_args(module.Config, [word for flag in flags.items() for word in flag])


@pytest.mark.parametrize("flag", ["pretrain", "sft", "dpo", "prompts"])
def test_a_file_that_is_not_there_is_told_before_anything_is_done(commands, tmp_path, flag):
    with pytest.raises(UserError, match="no.jsonl: neither a file nor a name that python dataset/download.py"):
        minimind.main(minimind.Config(out=str(tmp_path / "run"), **{flag: "no.jsonl"}))
    assert not commands
