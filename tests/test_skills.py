"""eval/skills.py: an oracle gets 100 %, a wrong one 0, and the intervals are what the formulas say."""

import json
import subprocess
import sys

import pytest
import torch

from dataset.builtin import generate
from eval import skills
from eval.intervals import wilson
from model.checkpoint import save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import Completion
from model.tokenizer import Tokenizer
from model.transformer import CausalLM


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "test.jsonl"
    generate.write("skills_test", path, size=6)
    return skills.read_items(path)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return CausalLM(ModelConfig(tokenizer.vocab_size, 32, 64, 1, 1, 1, max_position_embeddings=256))


def play(monkeypatch, tokenizer, items, answer_of):
    """Put `answer_of(item)` in place of what a model would generate for each item's prompt."""
    by_prompt = {tuple(tokenizer.render(item["messages"], add_generation_prompt=True)[0]): item for item in items}

    def generate(model, prompts, params, tokenizer, batch_size=0):
        assert params.temperature == 0
        return [[Completion([], [], "stop", answer_of(by_prompt[tuple(prompt)]))] for prompt in prompts]

    monkeypatch.setattr(skills, "generate", generate)


def oracle(item):
    return f"<tool_call>{item['answer']}</tool_call>" if item["checker"] == "tool_call" else item["answer"]


def test_an_oracle_is_right_everywhere(monkeypatch, tokenizer, items):
    play(monkeypatch, tokenizer, items, oracle)
    scores = skills.evaluate_skills(None, tokenizer, items)
    assert scores["mean"] == 1 and scores["mean_interval"] == (1, 1)
    assert len(scores["skills"]) == 21 and all(skill["accuracy"] == 1 for skill in scores["skills"].values())
    assert all(answer["right"] for answer in scores["answers"])


def test_a_wrong_one_is_wrong_everywhere(monkeypatch, tokenizer, items):
    play(monkeypatch, tokenizer, items, lambda item: "-1 ?")
    scores = skills.evaluate_skills(None, tokenizer, items)
    assert scores["mean"] == 0 and all(skill["accuracy"] == 0 for skill in scores["skills"].values())


def test_every_skill_counts_the_same_and_levels_are_apart(monkeypatch, tokenizer):
    def item(skill, level, question):
        return {"skill": skill, "level": level, "messages": [{"role": "user", "content": question}], "answer": "1",
                "checker": "number", "max_new_tokens": 4}

    items = [item("a", 1, f"a{i}") for i in range(8)] + [item("b", 1, "b1"), item("b", 2, "b2")]
    right = ("a0", "a1", "b2")
    play(monkeypatch, tokenizer, items, lambda item: "1" if item["messages"][0]["content"] in right else "2")
    scores = skills.evaluate_skills(None, tokenizer, items)
    assert scores["skills"]["a"]["n"] == 8 and scores["skills"]["a"]["accuracy"] == 0.25
    assert scores["skills"]["b"]["levels"] == {1: 0.0, 2: 1.0}
    assert scores["mean"] == pytest.approx((0.25 + 0.5) / 2)
    lines = list(skills.table(scores))
    assert len(lines) == 4 and "25.0%" in lines[1] and "0%  100%" in lines[2] and "37.5%" in lines[3]


def test_wilson_interval_equals_the_hand_value():
    """8 of 10: centre (0.8 + 0.19208) / 1.38416 = 0.71674, half 1.96 / 1.38416 · sqrt(0.016 + 0.009604) = 0.22658."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


def test_bootstrap_interval_equals_the_normal_one_for_many_items():
    """Two skills of 400 items at 0.5 and 0.9: the mean's standard error is sqrt(0.25/400 + 0.09/400) / 2 = 0.014577."""
    groups = [[True] * 200 + [False] * 200, [True] * 360 + [False] * 40]
    low, high = skills.bootstrap_mean_over_groups(groups, resamples=20_000)
    assert (low, high) == pytest.approx((0.7 - 1.96 * 0.014577, 0.7 + 1.96 * 0.014577), abs=0.002)
    assert skills.bootstrap_mean_over_groups(groups) == skills.bootstrap_mean_over_groups(groups)


def test_an_untrained_model_is_evaluated_and_batches_do_not_matter(model, tokenizer, items):
    few = items[::6]
    alone = skills.evaluate_skills(model, tokenizer, few, batch_size=1)
    together = skills.evaluate_skills(model, tokenizer, few)
    assert [a["answer"] for a in alone["answers"]] == [a["answer"] for a in together["answers"]]
    assert together["mean"] < 0.3


def test_command_line_prints_a_table_and_writes_json(model, tokenizer, tmp_path, capsys):
    save_model(tmp_path / "model", model, tokenizer)
    generate.write("skills_val", tmp_path / "items.jsonl", size=3)
    skills.main(skills.Config(model=str(tmp_path / "model"), data=str(tmp_path / "items.jsonl"), limit=1, device="cpu",
                              out=str(tmp_path / "new" / "scores.json")))
    printed = capsys.readouterr().out
    assert "reverse" in printed and "mean over skills" in printed
    written = json.loads((tmp_path / "new" / "scores.json").read_text(encoding="utf-8"))
    assert all(skill["n"] == 1 for skill in written["skills"].values()) and written["mean_interval"]


def test_bad_items_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"conversations": [], "answer": "1", "checker": "number"}\n{"answer": "2"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.jsonl:2: .*conversations"):
        skills.read_items(path)


def test_help_answers_from_any_directory(tmp_path):
    told = subprocess.run([sys.executable, skills.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0 and "--limit" in told.stdout
