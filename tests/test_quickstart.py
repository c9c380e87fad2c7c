"""The quickstart from end to end, with the fewest steps: all is left where it should be, and again it says so."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint import load_model
from model.generate import SamplingParams, generate
from scripts import quickstart
from scripts.quickstart import ROOT


def test_quickstart_runs_all_stages_and_the_second_time_says_it_is_done(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cfg = quickstart.Config(out=str(tmp_path), vocab_size=320, size="1x32", pretrain_steps=2, sft_steps=2, rl_steps=2,
                            min_pass=0.0, eval_items=1, ship=str(tmp_path / "shipped"))
    quickstart.main(cfg)
    report = (tmp_path / "quickstart" / "report.md").read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "quickstart" / "report.json").read_text(encoding="utf-8"))
    skills = figures["skills"]["full_sft"]["skills"]
    assert len(skills) >= 12 and all(f"| {name} |" in report for name in skills)
    assert {"add_two_digits", "subtract_two_digits", "word_problem"} <= skills.keys()
    assert all(word in report for word in ("untrained", "pretrained", "fine-tuned", "practised", "A conversation"))
    assert figures["practice"].keys() == {"full_sft", "grpo"} and "reverse_long" in report
    for name in ("pretrain", "full_sft", "grpo"):
        assert figures["stages"][name]["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full_sft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full_sft")
    chat = [{"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]

    trained, shipped = (load_model(tmp_path / name)[0].state_dict() for name in ("grpo", "shipped"))
    assert all(torch.equal(shipped[name], value.bfloat16().float()) for name, value in trained.items())

    capfd.readouterr()
    quickstart.main(cfg)
    assert "The quickstart is done" in capfd.readouterr().out


def test_the_checkpoint_that_comes_along_answers_and_its_card_is_that_of_the_committed_run():
    figures = json.loads((ROOT / "scripts" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert sum(path.stat().st_size for path in (ROOT / "model" / "nano").iterdir()) < 4e6
    card = (ROOT / "model" / "nano" / "README.md").read_text(encoding="utf-8").splitlines()
    for table in (quickstart.stage_table, quickstart.skill_table, quickstart.practice_table):
        assert all(line in card for line in table(figures))
    model, tokenizer = load_model(ROOT / "model" / "nano")
    asked = ("Repeat: m i l o", "Reverse: t a n e k", "Upper case: b r a v o", "What is 7+5?")
    prompts = [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in asked]
    answers = generate(model, prompts, SamplingParams(max_new_tokens=24, temperature=0.0), tokenizer)
    assert [answer.text for answer, in answers] == ["m i l o", "k e n a t", "B R A V O", "12"]


def test_a_failing_stage_ends_it_with_its_exit_code(tmp_path, capfd):
    cfg = quickstart.Config(out=str(tmp_path), vocab_size=1)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(cfg)
    assert stop.value.code == 2 and "error: " in capfd.readouterr().err
