"""Constitutions: the file, balanced and calibrated scores, evaluators on their own or on the policy's weights, and
critique and revision of answers."""

import json
import math

import numpy as np
import pytest
import torch

from dataset.builtin.judgements import PRINCIPLES
from dataset.lm_dataset import SFTDataset
from eval.constitution import (
    BUILTIN,
    LIMIT,
    Principle,
    check_evaluator,
    load_evaluator,
    polarity,
    read_constitution,
    readable,
    score,
    shuffled,
    sign,
)
from eval.judge import score_yesno
from model.adapters.adapted import AdapterConfig, active_adapter, attach
from model.adapters.folder import save_adapter
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts import generate_data
from tests.test_generate_data import generate, read, teach, write  # noqa: F401  (teach is a fixture)
from trainer import rewards

NANO = Tokenizer.load("nano")
POLITE, RUDE = Principle(1.0, "yes", "Is it polite?"), Principle(1.0, "no", "Is it rude?")


def planted(questions, texts):
    """An evaluator that knows its business: two nats for every "please" and minus two for every "fool"."""
    good = np.array([2.0 * text.count("please") - 2.0 * text.count("fool") for text in texts])
    return np.where(["rude" in question for question in questions], -good, good), np.ones(len(texts))


def naive(questions, texts):
    """An evaluator that says what the text says: yes to everything that says yes."""
    return np.array([3.0 * text.split().count("yes") for text in texts]), np.ones(len(texts))


# --- the file


def test_a_file_of_principles(tmp_path):
    (tmp_path / "c.txt").write_text("# weight answer question\n\n 2   yes  Is it polite?  \n.5 no Is it rude?\n",
                                    encoding="utf-8")
    assert read_constitution(tmp_path / "c.txt") == [Principle(2.0, "yes", "Is it polite?"),
                                                     Principle(0.5, "no", "Is it rude?")]


@pytest.mark.parametrize("line", ["yes Is it polite?", "1 maybe Is it?", "1 yes", "0 yes Is it?", "-1 yes Is it?"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "c.txt").write_text(f"# mine\n1 no Is it rude?\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match="c.txt:3: expected a weight above 0, yes or no"):
        read_constitution(tmp_path / "c.txt")


def test_no_file_and_no_principles_are_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_constitution(tmp_path / "none.txt")
    (tmp_path / "c.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no principle"):
        read_constitution(tmp_path / "c.txt")


def test_leaning_to_one_side_is_warned_of(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("3 yes Is it polite?\n1 no Is it rude?\n", encoding="utf-8")
    assert polarity(read_constitution(tmp_path / "c.txt")) == 0.5
    assert "+50%" in capsys.readouterr().err
    read_constitution("builtin")
    assert capsys.readouterr().err == ""


def test_the_built_in_constitution_is_balanced_and_known_to_the_built_in_evaluator():
    principles = read_constitution("builtin")
    assert polarity(principles) == 0 and BUILTIN.is_file()
    known = {question: answer for sides in PRINCIPLES.values()
             for answer, questions in zip(("yes", "no"), sides, strict=True) for question in questions}
    assert all(known[principle.question] == principle.answer for principle in principles)
    assert len({principle.question for principle in principles}) == len(principles)


# --- scores


def test_the_score_is_the_weighted_mean_over_principles_and_polarities():
    principles = [Principle(3.0, "yes", "Is it polite?"), Principle(1.0, "no", "Is it long?")]

    def ask(questions, texts):
        return np.array([2.0 if "polite" in q else 0.5 for q in questions]), np.array([0.9 if "polite" in q else 0.7
                                                                                      for q in questions])

    found, extra = score(ask, principles, ["a", "b"], calibrate="none")
    assert found == pytest.approx([(3 * 2.0 - 1 * 0.5) / 4] * 2)
    assert extra["mass"] == pytest.approx([0.8] * 2) and extra["lean"] == pytest.approx([1.25] * 2)
    assert [sign(principle) for principle in principles] == [1, -1]


def test_a_good_text_wins_whatever_the_calibration():
    for calibrate in ("none", "empty"):
        found = score(planted, [POLITE, RUDE], ["here you are, please", "here", "here, fool"], calibrate=calibrate)[0]
        assert found == pytest.approx([2, 0, -2])


def test_balanced_polarity_cancels_an_evaluator_that_says_what_it_reads():
    texts = ["yes yes", "a real answer", ""]
    assert score(naive, [POLITE, RUDE], texts, calibrate="none")[0] == pytest.approx([0, 0, 0])
    unbalanced, extra = score(naive, [POLITE, POLITE], texts, calibrate="none")
    assert unbalanced[0] == 6 > unbalanced[1] and extra["lean"][0] == 6         # the collapse, and where it is seen


def test_calibration_takes_off_what_a_text_without_merit_gets():
    def biased(questions, texts):
        found, mass = planted(questions, texts)
        return found + 3, mass                                        # yes to everything, but more or less so

    assert score(biased, [POLITE], ["please", ""], calibrate="none")[0] == pytest.approx([5, 3])
    assert score(biased, [POLITE], ["please", ""], calibrate="empty")[0] == pytest.approx([2, 0])
    canaries = ["yes", "", "the the the"]
    assert score(naive, [POLITE], canaries, calibrate="shuffled")[0].tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="choose none, empty or shuffled"):
        score(naive, [POLITE], canaries, calibrate="zero")


def test_a_judgement_of_little_mass_counts_as_bad():
    def astray(questions, texts):
        return np.full(len(texts), 5.0), np.array([0.1 if "tricky" in text else 0.9 for text in texts])

    found, extra = score(astray, [POLITE], ["tricky", "plain"], calibrate="none")
    assert found.tolist() == [-LIMIT, 5.0] and extra["mass"] == pytest.approx([0.1, 0.9])
    with pytest.raises(UserError, match="10.0% on yes and no"):
        check_evaluator(lambda questions, texts: (np.zeros(len(texts)), np.full(len(texts), 0.1)), [POLITE], "out/j")
    check_evaluator(astray, [POLITE, RUDE], "out/j")


def test_no_single_judgement_counts_without_limit():
    assert score(lambda q, t: (np.full(len(t), 500.0), np.ones(len(t))), [POLITE], ["a"], calibrate="none")[0] == LIMIT


def test_the_same_question_about_the_same_text_is_asked_once():
    asked = []

    def ask(questions, texts):
        asked.append(list(zip(questions, texts, strict=True)))
        return planted(questions, texts)

    score(ask, [POLITE, RUDE], ["please", "please", "fool"])
    assert [len(batch) for batch in asked] == [4, 2]                       # 2 questions x 2 texts; and the empty one


def test_a_question_may_hold_the_prompt():
    asked = []

    def ask(questions, texts):
        asked.extend(questions)
        return planted(questions, texts)

    score(ask, [Principle(1.0, "yes", 'Does it answer "{prompt}"?')], ["a", "b"], ["one", "two"], calibrate="none")
    assert asked == ['Does it answer "one"?', 'Does it answer "two"?']


def test_the_evaluator_reads_the_answer_and_nothing_that_looks_like_its_own_question():
    assert readable("<think>be rude</think> Hello.") == "Hello."
    assert readable("Hi.\n\nQuestion: Is 2 = 2? Answer yes or no.\n \n\nyes") == \
        "Hi.\nQuestion: Is 2 = 2? Answer yes or no.\nyes"
    words = shuffled("one two three four five")
    assert sorted(words.split()) == sorted(["one", "two", "three", "four", "five"]) and words == shuffled(
        "one two three four five")


# --- evaluators


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: a base, an evaluator of its own, and one as an adapter of the base; all random, with clear opinions."""
    folder = tmp_path_factory.mktemp("evaluators")
    torch.manual_seed(0)
    config = ModelConfig(NANO.vocab_size, 64, 96, 2, 2, 1, head_dim=32)
    save_model(folder / "base", CausalLM(config), NANO)
    model, _ = load_model(folder / "base")
    attach(model, AdapterConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.config.judge_template = "{text} -- {principle}"
    save_adapter(folder / "judge", model, NANO, str(folder / "base"))
    save_model(folder / "scorer", ScalarModel(config), NANO)
    return folder


TEXTS = ["It is 4.", "no", "please"]


def expected(place):
    """What the evaluator adapter says when it is loaded by itself."""
    from eval.reward_model import load_scorer
    model, tokenizer = load_scorer(str(place / "judge"))
    return score_yesno(model, tokenizer, [POLITE.question] * 3, TEXTS)


def test_an_evaluator_of_its_own_is_frozen_and_asks_with_its_template(place):
    ask = load_evaluator(str(place / "judge"), "cpu")
    for found, wanted in zip(ask([POLITE.question] * 3, TEXTS), expected(place), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_an_evaluator_shares_the_weights_of_a_policy_with_an_adapter(place):
    policy, tokenizer = load_model(place / "base")
    attach(policy, AdapterConfig(rank=2, dropout=0.5))
    policy.train()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    ids = torch.tensor([[5, 6, 7]])
    count = sum(p.numel() for p in policy.parameters())
    ask = load_evaluator(str(place / "judge"), "cpu", policy, tokenizer)
    grown = sum(p.numel() for p in policy.parameters()) - count
    assert 0 < grown < count / 2                                           # an adapter, not a second model
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    assert active_adapter(policy) == "default" and policy.config.judge_template == ""
    policy.eval()
    before = policy(ids).logits
    policy.train()
    for found, wanted in zip(ask([POLITE.question] * 3, TEXTS), expected(place), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert policy.training and active_adapter(policy) == "default" and policy.config.judge_template == ""
    policy.eval()
    assert torch.equal(policy(ids).logits, before)
    for name, parameter in policy.named_parameters():                      # the policy moves, its judge does not
        if name in trained:
            parameter.data += 0.1
    for found, wanted in zip(ask([POLITE.question] * 3, TEXTS), expected(place), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


def test_a_policy_that_is_trained_whole_gets_an_evaluator_beside_it(place):
    policy, tokenizer = load_model(place / "base")
    ask = load_evaluator(str(place / "judge"), "cpu", policy, tokenizer)
    assert policy.adapters == {}
    for parameter in policy.parameters():
        parameter.data += 0.1
    assert ask([POLITE.question] * 3, TEXTS)[0] == pytest.approx(expected(place)[0], abs=1e-5)


def test_a_reward_model_answers_no_questions(place):
    with pytest.raises(UserError, match="answers no questions"):
        load_evaluator(str(place / "scorer"), "cpu")


def test_a_constitution_is_a_part_of_the_reward(place, tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text('1 yes Is it polite?\n1 no Is it rude to say to "{prompt}"?\n', encoding="utf-8")
    monkeypatch.setattr(rewards, "load_evaluator", lambda *_: planted)
    judge = rewards.build(f"constitution:{tmp_path / 'c.txt'}:0.5", NANO, evaluator=str(place / "judge"))
    item = {"messages": [{"role": "user", "content": "4?"}], "tools": None, "max_new_tokens": 0}
    found, parts = judge(rewards.written([item] * 3, ["please", "fool", "<think>fool</think>x"], NANO))
    assert found.tolist() == [1, -1, 0] and parts["constitution"].tolist() == [2, -2, 0]
    assert parts["constitution_mass"].tolist() == [1, 1, 1] and parts["constitution_lean"].tolist() == [0, 0, 0]
    monkeypatch.setattr(rewards, "load_evaluator", load_evaluator)
    with pytest.raises(UserError, match="does not answer the questions"):                 # a random model's mass
        rewards.build(f"constitution:{tmp_path / 'c.txt'}", NANO, evaluator=str(place / "base"))


# --- critique and revision


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(generate_data, "LONGEST_WAIT", 0.01)


def last(body):
    return body["messages"][-1]["content"]


def reviser(body, number):
    """A model that revises when it is asked to."""
    turns = body["messages"]
    return {1: "Go away, fool.", 3: "I was rude.", 5: f"Gladly: {turns[0]['content']}"}[len(turns)]


def constitution(tmp_path):
    (tmp_path / "c.txt").write_text("1 yes Is it polite?\n1 no Is it rude?\n", encoding="utf-8")
    return str(tmp_path / "c.txt")


def test_answers_are_criticised_and_revised(teach, tmp_path):  # noqa: F811
    teacher = teach(reviser)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Question {i}"} for i in range(12)])
    options = dict(url=teacher.url, model="m", constitution=constitution(tmp_path))
    assert generate(prompts, tmp_path / "out.jsonl", **options) == {"kept": 12}
    records = read(tmp_path / "out.jsonl")
    for record in records:
        question = record["conversations"][0]["content"]
        assert record["conversations"][1:] == [{"role": "assistant", "content": f"Gladly: {question}"}]
        assert record["constitution"]["draft"] == "Go away, fool."
        assert record["constitution"]["critique"] == "I was rude."
    assert {record["constitution"]["question"] for record in records} == {"Is it polite?", "Is it rude?"}
    critiques = [last(body) for body in teacher.asked if len(body["messages"]) == 3]
    assert len(critiques) == 12 and len(teacher.asked) == 36
    assert all(("Is it polite?" in text and "with yes" in text) != ("Is it rude?" in text and "with no" in text)
               for text in critiques)
    assert [message["content"] for message in teacher.asked[-1]["messages"]][1:4:2] == ["Go away, fool.", "I was rude."]
    data = SFTDataset(tmp_path / "out.jsonl", NANO, 128)
    assert data.report["conversations"] == 12 and "fool" not in NANO.decode(data[0]["input_ids"])
    generate(prompts, tmp_path / "out.jsonl", **options)
    assert len(teacher.asked) == 36                                         # all is there
    with pytest.raises(UserError, match="--constitution"):
        generate(prompts, tmp_path / "out.jsonl", **{**options, "constitution": "builtin"})


@pytest.mark.parametrize("turns, said, reason", [
    (1, ("length", "I was going to"), "draft too long"), (1, " ", "empty draft"), (3, "", "empty critique"),
    (3, ("content_filter", "x"), "critique filtered by the server"), (5, ("length", "x"), "too long"), (5, "", "empty"),
    (1, {"content": "", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
     "draft calls a tool"),
])
def test_a_round_that_fails_rejects_the_answer(teach, tmp_path, turns, said, reason):  # noqa: F811
    teacher = teach(lambda body, n: said if len(body["messages"]) == turns else reviser(body, n))
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Question"}])
    options = dict(url=teacher.url, model="m", constitution=constitution(tmp_path))
    assert generate(prompts, tmp_path / "out.jsonl", **options) == {reason: 1}
    assert len(teacher.asked) == (turns + 1) // 2
    assert read(tmp_path / "out.rejected.jsonl")[0]["reason"] == reason


def test_a_checkpoint_revises_its_own_answers(place, tmp_path, monkeypatch):
    model, _ = load_model(place / "base")
    model.config.max_position_embeddings = 512
    save_model(tmp_path / "model", model, NANO)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Question {i}"} for i in range(5)])
    options = dict(model=str(tmp_path / "model"), constitution=constitution(tmp_path), max_new_tokens=12, device="cpu")
    from model import generate as generation
    monkeypatch.setattr(generate_data, "judge", lambda cfg, task, reply, others: (reply.message, reply.problem))
    real, draws = generation.generate, []

    def all_end(*args, numbers, **options):                                # a random model hardly ever ends a turn
        draws.extend(numbers)
        completions = real(*args, numbers=numbers, **options)
        for completion, in completions:
            completion.finish_reason = "stop"
        return completions

    monkeypatch.setattr(generation, "generate", all_end)
    counts = generate(prompts, tmp_path / "a.jsonl", batch_size=2, **options)
    assert counts.get("kept", 0) >= 4                                      # empty and ill-formed ones aside
    assert len(set(draws)) == len(draws) >= 12                             # no round draws as another did
    generate(prompts, tmp_path / "b.jsonl", batch_size=5, **options)
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl")
    record = read(tmp_path / "a.jsonl")[0]
    texts = [*(record["constitution"][name] for name in ("draft", "critique")), record["conversations"][-1]["content"]]
    assert len(set(texts)) == 3 and all(texts)
    assert record["conversations"][:-1] == [{"role": "user", "content": "Question 0"}]
    assert json.dumps(record) and math.isfinite(record["constitution"]["weight"])
