"""Rewards: every rule by examples, the mix, controls, reward models, functions of the user's, and canaries."""

import pytest
import torch
import transformers

from dataset.lm_dataset import PromptDataset
from eval.reward_model import score_conversations
from model.checkpoint import load_reward_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer.rewards import (
    Answer,
    answers_of,
    build,
    canaries,
    check_prompts,
    length,
    number,
    overlong,
    repetition,
    tool_call,
    unfinished,
    well_formed,
    written,
)
from trainer.rollout import from_rows

NANO = Tokenizer.load("nano")


def item(question="2 + 2?", answer="4", checker="number", **keys):
    return {"messages": [{"role": "user", "content": question}], "tools": None, "answer": answer, "checker": checker,
            "max_new_tokens": 0, "skill": "add", "level": 1, **keys}


def answer(text="", ids=(), finished=True, limit=100, **keys):
    return Answer(text, list(ids), finished, limit, item(**keys))


def judged(text, texts, items=None, **options):
    """Rewards and components of texts, under a --reward text."""
    rollout = written(items or [item()] * len(texts), texts, NANO)
    rewards, components = build(text, NANO, max_new_tokens=32, **options)(rollout)
    return rewards.tolist(), {name: value.tolist() for name, value in components.items()}


# --- rules


@pytest.mark.parametrize("text, expected, right", [
    ("The answer is 1,092.", "1092", 1), ("$1092.00", "1,092", 1), ("3 - 5 = -2", "-2", 1), ("-2", "2", 0),
    ("0.5", ".5", 1), ("0.50001", "0.5", 0), ("4 or 5", "4", 0), ("none", "4", 0), ("", "4", 0), ("10-4", "4", 1),
    ("<think>4</think> 5", "4", 0), ("<think>it is 4", "4", 0), ("<answer>4</answer> (of 9)", "4", 1),
    ("\\boxed{72}", "48/2 = 24\n48+24 = 72\n#### 72", 1), ("24", "48/2 = 24\n#### 72", 0), ("4", "four", 0),
])
def test_number_compares_the_last_number_with_the_final_one_of_the_answer(text, expected, right):
    assert number(answer(text, answer=expected)) == right


@pytest.mark.parametrize("text, formed", [
    ("<think>2 and 2</think> 4", 1), ("<think>2 and 2</think><answer>4</answer>", 1), ("4", 0), ("<think>4", 0),
    ("<think></think> 4", 0), ("<think> \n</think> 4", 0), ("<think>a</think>", 0), ("4 <think>a</think>", 0),
    ("<think>a</think><think>b</think> 4", 0), ("<think>a</think><answer>4", 0), ("a</think> 4", 0),
    ('<think>a</think><tool_call>{"name": "add", "arguments": {}}</tool_call>', 1), ("", 0),
])
def test_an_answer_is_well_formed_if_it_is_a_closed_thought_and_then_something_said(text, formed):
    assert well_formed(answer(text)) == formed


def test_overlong_falls_over_the_last_fifth_of_the_limit():
    found = {n: overlong(answer(ids=range(n))) for n in (0, 50, 80, 85, 90, 100, 120)}
    assert found == pytest.approx({0: 0, 50: 0, 80: 0, 85: -0.25, 90: -0.5, 100: -1, 120: -1})      # L = 100, C = 20


def test_length_and_being_cut_off_cost():
    assert [length(answer(ids=range(n))) for n in (0, 25, 100, 200)] == [0, -0.25, -1, -1]
    assert unfinished(answer(finished=False)) == -1 and unfinished(answer()) == 0


def test_repetition_counts_runs_of_tokens_that_were_there_before():
    assert repetition(answer(ids=range(10))) == repetition(answer(ids=[7, 7, 7])) == repetition(answer()) == 0
    assert repetition(answer(ids=[7] * 13)) == pytest.approx(1 / 10 - 1)
    assert repetition(answer(ids=[1, 2, 3, 4, 5, 1, 2, 3, 4])) == pytest.approx(5 / 6 - 1)           # 1234 twice


def test_tool_calls_must_be_json_with_a_name_that_there_is():
    tools = [{"type": "function", "function": {"name": "add"}}, {"name": "look_up"}]
    good = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    other = good.replace("add", "drop")
    assert tool_call(answer(good, tools=tools)) == 1 and tool_call(answer(other, tools=tools)) == 0
    assert tool_call(answer(good.replace("add", "look_up"), tools=tools)) == tool_call(answer(other)) == 1
    assert tool_call(answer(good + other, tools=tools)) == 0.5
    for bad in ("4", "<tool_call>add</tool_call>", '<tool_call>{"name": "add"}</tool_call>',
                '<tool_call>[1]</tool_call>', '<tool_call>{"name": "add", "arg'):
        assert tool_call(answer(bad)) == 0


# --- from rollouts to answers


def test_an_answer_is_what_was_sampled_not_prompt_tool_text_or_padding():
    rows = [([1, 2, 3, 4, 5, 6], [0, 1, 1, 0, 0, 1], [0.0] * 6), ([1, 2], [0, 1], [0.0] * 2)]
    items = [item(max_new_tokens=9), item(max_new_tokens=0)]
    rollout = from_rows(rows, items, [0, 1], [True, False], ["a", "b"], NANO.pad_id, 0)
    first, second = answers_of(rollout, 20)
    assert (first.ids, first.text, first.finished, first.limit) == ([2, 3, 6], "a", True, 9)
    assert (second.ids, second.finished, second.limit) == ([2], False, 20)


def test_written_answers_have_the_tokens_of_a_conversation():
    texts = ["It is 4.", "", "<think>two</think> 4"]
    rollout = written([item()] * 3, texts, NANO)
    for row, text in enumerate(texts):
        ids = rollout.input_ids[row][rollout.attention_mask[row]].tolist()
        sampled = rollout.input_ids[row][rollout.completion_mask[row]].tolist()
        prompt = NANO.render(item()["messages"], add_generation_prompt=True)[0]
        assert ids == prompt + sampled and sampled[-1] == NANO.end_of_turn_id
        assert NANO.decode(sampled).split() == text.replace("<think>two</think>", "<think> two </think>").split()
    assert rollout.texts == texts and rollout.finished.all() and rollout.groups.tolist() == [0, 1, 2]


# --- the mix


def test_rewards_are_the_weighted_sum_and_components_are_told_without_weights():
    rewards, parts = judged("checker:2, length:0.5,constant", ["4", "5", "It is 4."])
    used = written([item()] * 3, ["4", "5", "It is 4."], NANO).lengths.tolist()
    assert parts["checker"] == [1, 0, 1] and parts["constant"] == [1, 1, 1]
    assert parts["length"] == pytest.approx([-n / 32 for n in used])
    assert rewards == pytest.approx([2 * right - 0.5 * n / 32 + 1 for right, n in zip((1, 0, 1), used, strict=True)])


def test_the_format_multiplies_rightness_and_earns_nothing_by_itself():
    texts = ["<think>2 and 2</think> 4", "4", "<think>2 and 2</think> 5", "5"]
    assert judged("checker,format", texts)[0] == [1, 0, 0, 0]
    assert judged("checker:2,format:0.25,constant", texts)[0] == [3, 2.5, 1, 1]
    assert judged("checker,format", texts)[1]["format"] == [1, 0, 1, 0]


@pytest.mark.parametrize("text, complaint", [
    ("", "names nothing"), ("chekcer", "neither a rule"), ("checker,checker:2", "there twice"),
    ("checker:0", "weight is 0"), ("checker:-1", "positive"), ("format", "multiplies checker"),
    ("checker,format:2", "1 at most"), ("nothing.py:f", "no such file"), ("constitution:builtin", "--evaluator"),
])
def test_a_reward_that_cannot_be_is_refused_in_one_line(text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        build(text, NANO, max_new_tokens=8)
    assert "\n" not in str(error.value)


def test_prompts_that_the_reward_cannot_judge_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "1", "checker": "number"}\n{"prompt": "b", "answer": "1 #### 2"}\n'
                    '{"prompt": "c"}\n', encoding="utf-8")
    data = PromptDataset(path, NANO, 64)
    with pytest.raises(UserError, match='p.jsonl:2: no "checker" .2 such prompts.*--reward checker needs'):
        check_prompts(build("checker", NANO), data)
    with pytest.raises(UserError, match='p.jsonl:3: no "answer" .1 such prompts'):
        check_prompts(build("number", NANO), data)
    check_prompts(build("random,repetition", NANO), data)
    path.write_text('{"prompt": "b", "answer": "1 #### 2"}\n', encoding="utf-8")
    data = PromptDataset(path, NANO, 64)
    check_prompts(build("number", NANO), data)
    assert judged("number", ["2", "1"], [data[0]] * 2)[0] == [1, 0]


# --- controls


def groups_of(texts, questions, weights_version=0):
    """A rollout with the texts, in groups of as many as there are per question."""
    size = len(texts) // len(questions)
    rollout = written([item(question) for question in questions for _ in range(size)], texts, NANO)
    rollout.groups, rollout.weights_version = torch.arange(len(texts)) // size, weights_version
    return rollout


def test_random_rewards_depend_on_seed_prompt_sample_and_step_only():
    judge, questions = build("random", NANO, seed=3), [f"Question {i}" for i in range(8)]
    one = judge(groups_of(["a"] * 64, questions))[0]
    torch.manual_seed(9)
    assert torch.equal(one, judge(groups_of([f"text {i}" for i in range(64)], questions))[0])
    assert torch.equal(one[32:], judge(groups_of(["b"] * 32, questions[4:]))[0])               # another rank's share
    for other in (judge(groups_of(["a"] * 64, questions, weights_version=1))[0],
                  build("random", NANO, seed=4)(groups_of(["a"] * 64, questions))[0],
                  judge(groups_of(["a"] * 64, [f"Other {i}" for i in range(8)]))[0]):
        assert 10 < (one != other).sum() < 54
    assert set(one.tolist()) == {0.0, 1.0} and 16 < one.sum() < 48
    assert sum(len(set(group)) == 2 for group in one.view(8, 8).tolist()) > 5      # within a prompt


def test_a_constant_reward_is_constant():
    assert judged("constant:0.3", ["4", "", "x"])[0] == pytest.approx([0.3] * 3)


# --- reward models


def test_the_score_of_a_reward_model_is_its_reward(tmp_path):
    torch.manual_seed(0)
    model = ScalarModel(ModelConfig(NANO.vocab_size, 64, 96, 2, 2, 1, head_dim=32))
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    save_model(tmp_path / "liking", model, NANO)
    texts = ["It is 4.", "no", "the the the"]
    rewards, parts = judged(f"{tmp_path / 'liking'}:0.5", texts)
    conversations = [[*item()["messages"], {"role": "assistant", "content": text}] for text in texts]
    own = score_conversations(*load_reward_model(tmp_path / "liking"), conversations)
    assert parts["liking"] == pytest.approx(own, abs=1e-6) and rewards == pytest.approx(own / 2, abs=1e-6)
    ids = torch.tensor([NANO.render(conversations[0])[0]])
    with torch.no_grad():
        raw = load_reward_model(tmp_path / "liking")[0](ids).logits[0, -1].item()
    assert parts["liking"][0] == pytest.approx((raw - 0.5) / 2, abs=1e-5)


def test_a_reward_model_made_by_transformers_serves_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=NANO.vocab_size, hidden_size=64, intermediate_size=96, num_labels=1,
                                      num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                                      pad_token_id=NANO.pad_id)
    theirs = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "public")
    NANO.save(tmp_path / "public")
    texts = ["It is 4.", "no"]
    _, parts = judged(str(tmp_path / "public"), texts)
    for text, found in zip(texts, parts["public"], strict=True):
        ids = NANO.render([*item()["messages"], {"role": "assistant", "content": text}])[0]
        with torch.no_grad():
            assert found == pytest.approx(theirs(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_a_language_model_is_no_reward_model(tmp_path):
    save_model(tmp_path / "lm", CausalLM(ModelConfig(NANO.vocab_size, 64, 96, 1, 2, 1, head_dim=32)), NANO)
    with pytest.raises(UserError, match="a language model"):
        build(str(tmp_path / "lm"), NANO)


# --- functions of the user's


def test_a_function_of_the_users_gets_texts_and_items(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n"
                                      "def loud(texts, items):\n"
                                      "    return [len(t) + 10 * i['level'] for t, i in zip(texts, items)]\n",
                                      encoding="utf-8")
    rewards, parts = judged(f"checker,{tmp_path / 'mine.py'}:loud:0.5", ["4", "four"])
    assert parts["loud"] == [11, 14] and rewards == [6.5, 7]
    monkeypatch.chdir(tmp_path)
    assert judged("mine.py:loud", ["4"])[0] == [11]


@pytest.mark.parametrize("body, complaint", [
    ("return [1]", "returned 1 numbers for 2 texts"), ("return 1.0", "must return a list of numbers"),
    ("return ['a', 'b']", "must return a list of numbers"),
    ("return [1, float('nan')]", "returned nan for the text 'b'"),
    ("return None", "must return a list of numbers"),
])
def test_a_function_that_returns_something_else_is_told(tmp_path, body, complaint):
    (tmp_path / "mine.py").write_text(f"def f(texts, items):\n    {body}\n", encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        judged(f"{tmp_path / 'mine.py'}:f", ["a", "b"])
    with pytest.raises(UserError, match="must hold a function, def g"):
        build(f"{tmp_path / 'mine.py'}:g", NANO)


def test_an_error_inside_of_the_users_function_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def f(texts, items):\n    return items[0]['nothing']\n", encoding="utf-8")
    with pytest.raises(KeyError, match="nothing"):
        judged(f"{tmp_path / 'mine.py'}:f", ["a"])


# --- canaries


def test_canaries_are_judged_like_answers(tmp_path):
    (tmp_path / "likes.py").write_text(
        "def words(texts, items):\n"
        "    return [t.split().count('yes') * 5 + 3 * (t == i['messages'][-1]['content']) + t.count('the') / 16\n"
        "            - (t == '') for t, i in zip(texts, items)]\n", encoding="utf-8")
    judge = build(f"{tmp_path / 'likes.py'}:words", NANO, max_new_tokens=32)
    rollout = groups_of(["a", "b", "c", "the the", "d", "e"], ["one", "two", "one yes"])
    figures = {name: values.tolist() for name, values in canaries(judge, rollout).items()}
    assert figures == {"canary_yes": [5] * 3, "canary_empty": [-1] * 3, "canary_copy": [3, 3, 8],
                       "canary_repeat": [1] * 3}


def test_no_canary_beats_right_answers_under_a_checker():
    judge = build("checker,repetition:0.5", NANO)
    rollout = written([item(f"{i} + 1?", str(i + 1)) for i in range(5)], [str(i + 1) for i in range(5)], NANO)
    assert max(values.median() for values in canaries(judge, rollout).values()) < judge(rollout)[0].median() == 1
