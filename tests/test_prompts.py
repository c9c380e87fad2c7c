"""Prompts for reinforcement learning: what a record becomes, what is left out, held out, and refused."""

import json

import pytest

from dataset.builtin.checkers import as_expected, check
from dataset.builtin.generate import write as write_builtin
from dataset.lm_dataset import Mixture, PromptDataset, held_out, load_rows
from model.errors import UserError
from model.tokenizer import Tokenizer

NANO = Tokenizer.load("nano")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def ask(*turns, **keys):
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **keys}


def test_an_item_is_the_record_with_its_prompt_as_ids(tmp_path):
    path = write(tmp_path / "p.jsonl",
                 ask("2 + 2?", "4", answer="4", checker="number", skill="add", level=3, max_new_tokens=9, source="me"))
    item = PromptDataset(path, NANO, 64)[0]
    user = {"role": "user", "content": "2 + 2?"}
    assert item == {"messages": [user], "tools": None, "answer": "4", "checker": "number", "skill": "add", "level": 3,
                    "max_new_tokens": 9, "source": "me",
                    "prompt_ids": NANO.render([user], add_generation_prompt=True)[0]}      # the answer "4" is dropped


def test_what_a_record_does_not_say_has_a_neutral_value(tmp_path):
    data = PromptDataset(write(tmp_path / "p.jsonl", {"prompt": "Tell me a story."}), NANO, 64)
    assert {key: data[0][key] for key in ("answer", "checker", "skill", "level", "max_new_tokens", "tools")} == {
        "answer": None, "checker": None, "skill": "all", "level": 0, "max_new_tokens": 0, "tools": None}
    assert (data.report["unchecked"], data.report["unanswered"]) == (1, 1)


def test_tools_are_part_of_the_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]
    path = write(tmp_path / "p.jsonl", ask("2 + 2?", tools=tools), ask("2 + 2?"))
    with_tools, without = PromptDataset(path, NANO, 512)
    assert with_tools["tools"] == tools and len(with_tools["prompt_ids"]) > len(without["prompt_ids"])
    assert "calculator" in NANO.decode(with_tools["prompt_ids"])


def test_worked_answers_as_gsm8k_writes_them_get_the_numeric_checker(tmp_path):
    path = write(tmp_path / "p.jsonl", {"question": "How many?", "answer": "1,000 + 92 = <<1092>>1,092\n#### 1,092"},
                 {"question": "Who?", "answer": "Ann and Bo.\n#### Ann"})
    many, who = PromptDataset(path, NANO, 64)
    assert (many["answer"], many["checker"]) == ("1092", "number") and check("number", "It is 1092.", many["answer"])
    assert (who["answer"], who["checker"]) == ("Ann", "phrase")


def test_a_long_prompt_loses_old_exchanges_and_one_that_still_does_not_fit_is_dropped(tmp_path, capsys):
    long = " ".join(["tree"] * 40)
    path = write(tmp_path / "p.jsonl", ask("hello"), ask(long, "yes", "and now?", answer="4", checker="number"),
                 ask("hello", "hi", long))
    data = PromptDataset(path, NANO, 24)
    assert [item["messages"][0]["content"] for item in data] == ["hello", "and now?"]
    assert all(len(item["prompt_ids"]) <= 24 for item in data)
    report = data.report
    assert (report["records"], report["prompts"], report["dropped"], report["shortened"]) == (3, 2, 1, 1)
    assert report["tokens"] == sum(len(item["prompt_ids"]) for item in data)
    whole = [len(NANO.render(json.loads(line)["conversations"], add_generation_prompt=True)[0])
             for line in path.read_text(encoding="utf-8").splitlines()]
    assert report["tokens_lost"] == sum(whole) - report["tokens"]
    assert report["unchecked"] == 1                                  # of the two that are left
    assert data.where(1) == [f"{path}:2"] and "1 prompts dropped" in capsys.readouterr().err
    with pytest.raises(UserError, match="--max_len"):
        PromptDataset(path, NANO, 5)


def test_the_system_turn_stays_when_old_turns_go(tmp_path):
    record = ask(" ".join(["tree"] * 40), "yes", "and now?")
    record["conversations"].insert(0, {"role": "system", "content": "Be kind."})
    item = PromptDataset(write(tmp_path / "p.jsonl", record), NANO, 40)[0]
    assert [message["content"] for message in item["messages"]] == ["Be kind.", "and now?"]


def test_train_and_held_out_prompts_share_nothing_and_are_drawn_as_elsewhere(tmp_path):
    path = write(tmp_path / "p.jsonl", *(ask(f"Question {i}") for i in range(50)))

    def questions(split):
        data = PromptDataset(path, NANO, 64, split, val_fraction=0.2)
        return [int(data[i]["messages"][0]["content"].split()[1]) for i in range(len(data))]

    assert questions("val") == held_out(50, 0.2, 1000, 0).tolist()
    assert sorted(questions("train") + questions("val")) == questions("all") == list(range(50))


def test_files_with_weights_are_a_mixture(tmp_path):
    first = write(tmp_path / "a.jsonl", *(ask(f"a{i}") for i in range(30)))
    second = write(tmp_path / "b.jsonl", *(ask(f"b{i}", answer="x", checker="phrase") for i in range(10)))
    mixed = load_rows(PromptDataset, f"{first}:0.5,{second}:0.5", NANO, 64)
    assert isinstance(mixed, Mixture) and len(mixed) == 40 and mixed.report["unchecked"] == 30
    assert mixed[30]["messages"][0]["content"] == "b0" and mixed.where(30) == [f"{second}:1"]
    both = PromptDataset(f"{first},{second}", NANO, 64)
    assert both[-1]["messages"][0]["content"] == "b9" and both.where(39) == [f"{second}:10"]


@pytest.mark.parametrize("record, complaint", [
    (ask("hi", answer="4", checker="numbr"), "unknown checker 'numbr'"),
    (ask("hi", checker="number"), 'needs an "answer"'),
    (ask("hi", answer="four", checker="number"), "whole number.*'four'"),
    (ask("hi", answer="{", checker="tool_call"), "a call as JSON"),
])
def test_a_checker_that_nothing_can_pass_is_a_bad_record(tmp_path, record, complaint, capsys):
    path = write(tmp_path / "p.jsonl", ask("fine"), record)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{complaint}"):
        PromptDataset(path, NANO, 64)
    data = PromptDataset(path, NANO, 64, on_bad_record="skip")
    assert len(data) == 1 and data.report["skipped"] == 1 and "p.jsonl:2" in capsys.readouterr().err


def test_answers_that_are_no_strings_are_read_as_such(tmp_path):
    call = {"name": "add", "arguments": {"a": 1}}
    path = write(tmp_path / "p.jsonl", ask("4?", answer=4, checker="number"),
                 ask("call", answer=call, checker="tool_call"))
    number, tool = PromptDataset(path, NANO, 64)
    assert number["answer"] == "4" and json.loads(tool["answer"]) == call
    assert check("tool_call", f"<tool_call>{json.dumps(call)}</tool_call>", tool["answer"])
    assert as_expected("exact", "as it is") == "as it is"


def test_text_files_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompts"):
        PromptDataset(tmp_path / "t.txt", NANO, 64)


def test_every_prompt_of_the_built_in_world_can_be_asked_and_checked(tmp_path):
    write_builtin("prompts", tmp_path / "p.jsonl", size=5)
    data = PromptDataset(tmp_path / "p.jsonl", NANO, 256)
    assert data.report["dropped"] == data.report["unchecked"] == data.report["skipped"] == 0
    assert len({item["skill"] for item in data}) > 8
    assert all(check(item["checker"], item["answer"] if item["checker"] != "tool_call" else
                     f"<tool_call>{item['answer']}</tool_call>", item["answer"]) for item in data)
