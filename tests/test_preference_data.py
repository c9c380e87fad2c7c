"""Rows of pairs: two whole answers to one prompt side by side, the mask on the answers, nothing lost without a word."""

import json
import random

import numpy as np
import pytest

from dataset import jsonl
from dataset.builtin import generate, preferences
from dataset.lm_dataset import PreferenceDataset, UnpairedDataset, collate, load_rows
from model.errors import UserError
from model.tokenizer import CHATML, Tokenizer

WORDS = "the cat sat on a mat and looked at two small birds 汉字 12".split()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def turns(*said, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def sentence(rng, most=8):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def some_pairs(count=30, seed=0):
    rng = random.Random(seed)
    return [pair(sentence(rng), sentence(rng) + " good", sentence(rng) + " bad") for _ in range(count)]


def texts(row):
    """[(ids, ids that are targets)] of the texts of a row, in order; checks that positions restart with each."""
    found = []
    for number in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == number
        assert row["positions"][here].tolist() == list(range(here.sum()))
        found.append((row["input_ids"][here].tolist(), row["input_ids"][here & (row["loss_mask"] == 1)].tolist()))
    return found


def all_texts(data):
    return [pair for row in data for pair in zip(*[iter(texts(row))] * 2, strict=True)]


# --- pairs


def test_every_pair_is_there_once_with_its_mask_on_the_answers(tmp_path, tokenizer):
    records = some_pairs()
    data = PreferenceDataset(str(write(tmp_path / "p.jsonl", records)), tokenizer, 96)
    wanted = []
    for record in records:
        prompt = tokenizer.render(turns(record["prompt"]), add_generation_prompt=True)[0]
        sides = [(tokenizer.render(turns(record["prompt"], record[side]))[0],
                  [*tokenizer.encode(record[side]), tokenizer.end_of_turn_id]) for side in ("chosen", "rejected")]
        assert all(ids[:len(prompt)] == prompt for ids, _ in sides)
        wanted.append(tuple(sides))
    assert sorted(all_texts(data)) == sorted(wanted)
    for number, row in enumerate(data):
        count = int(row["segment_ids"].max()) // 2
        assert row["pairs"].tolist() == [1] * count + [0] * (96 // 4 - count)
        assert len(data.where(number)) == count
        assert not row["positions"][row["segment_ids"] == 0].any()
    assert data.count(collate(list(data))) == len(records) == data.report["pairs"]
    assert data.report["loss_tokens"] == sum(len(targets) for sides in wanted for _, targets in sides)


def test_messages_strings_and_repeated_prompts_are_one_record(tmp_path, tokenizer):
    """The same pair in the spellings of the field."""
    prompt, good, bad = turns("hello", "yes?", "tell me"), turns("", "it is")[1:], turns("", "no")[1:]
    spellings = [{"chosen": prompt + good, "rejected": prompt + bad},
                 {"prompt": prompt, "chosen": good, "rejected": bad},
                 {"prompt": prompt, "chosen": "it is", "rejected": "no"},
                 {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad}]
    data = PreferenceDataset(str(write(tmp_path / "p.jsonl", spellings)), tokenizer, 96)
    first, *others = all_texts(data)
    assert others == [first] * 3
    assert [tokenizer.decode(targets) for _, targets in first] == ["it is", "no"]


def test_the_loss_begins_where_the_sides_part(tmp_path, tokenizer):
    """Shared turns of the assistant are prompt; from where they differ on, the assistant's turns are answer."""
    chosen, rejected = turns("a", "same", "b", "one", "c", "two"), turns("a", "same", "b", "three", "d", "four")
    data = PreferenceDataset(str(write(tmp_path / "p.jsonl", [{"chosen": chosen, "rejected": rejected}])), tokenizer,
                             256)
    (pair,) = all_texts(data)
    assert [tokenizer.decode(targets) for _, targets in pair] == ["onetwo", "threefour"]


def test_a_long_prompt_loses_the_same_old_turns_on_both_sides(tmp_path, tokenizer):
    prompt = turns("first " * 9, "old " * 9, "second", "kept", "third", system="be kind")
    record = {"chosen": prompt + turns("", "good")[1:], "rejected": prompt + turns("", "bad")[1:]}
    path = str(write(tmp_path / "p.jsonl", [record]))
    whole = PreferenceDataset(path, tokenizer, 400)
    data = PreferenceDataset(path, tokenizer, 128)
    ((good, targets), (bad, _)), = all_texts(data)
    short = turns("second", "kept", "third", system="be kind")
    assert good == tokenizer.render(short + turns("", "good")[1:])[0]
    assert bad == tokenizer.render(short + turns("", "bad")[1:])[0]
    assert tokenizer.decode(targets) == "good"
    assert data.report["shortened"] == 1
    assert data.report["tokens_lost"] == whole.report["tokens"] - data.report["tokens"]


def test_what_cannot_be_used_is_counted_and_told_once(tmp_path, tokenizer, capsys):
    records = [*some_pairs(5), pair("x", "", "bad"), pair("long " * 60, "a", "b")]
    data = PreferenceDataset(str(write(tmp_path / "p.jsonl", records)), tokenizer, 96)
    assert (data.report["pairs"], data.report["dropped"]) == (5, 2)
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1 and "1 pairs dropped that are longer than 96" in warned
    assert "1 in which an answer is empty" in warned
    with pytest.raises(UserError, match="none of the 2 records.*--max_len"):
        PreferenceDataset(str(write(tmp_path / "q.jsonl", records[5:])), tokenizer, 96)


@pytest.mark.parametrize(("record", "message"), [
    (pair("x", "same", "same"), "are the same"),
    ({"chosen": turns("x", "a"), "rejected": turns("y", "b")}, "same prompt"),
    ({"chosen": turns("x", "a", "y", "b"), "rejected": turns("x", "a", "z", "b")}, "same prompt"),
    ({"chosen": turns("x", "a"), "rejected": turns("x")}, "must end with an assistant turn"),
    ({"chosen": "a", "rejected": "b"}, "must start with a user turn"),
    ({"prompt": "x", "chosen": "a"}, 'no "rejected"'),
])
def test_a_bad_pair_is_one_clear_line_or_skipped(record, message, tmp_path, tokenizer, capsys):
    path = str(write(tmp_path / "p.jsonl", [*some_pairs(3), record]))
    with pytest.raises(UserError, match=rf"p\.jsonl:4: .*{message}") as error:
        PreferenceDataset(path, tokenizer, 96)
    assert "\n" not in str(error.value)
    data = PreferenceDataset(path, tokenizer, 96, on_bad_record="skip")
    assert (data.report["pairs"], data.report["skipped"]) == (3, 1)
    assert "bad records skipped: 1" in capsys.readouterr().err


def test_splits_share_nothing_and_rows_are_a_function_of_the_data(tmp_path, tokenizer):
    path = str(write(tmp_path / "p.jsonl", some_pairs(40)))
    parts = [all_texts(PreferenceDataset(path, tokenizer, 96, split)) for split in ("train", "val")]
    assert len(parts[0]) == 36 and len(parts[1]) == 4
    assert not {str(pair) for pair in parts[0]} & {str(pair) for pair in parts[1]}
    jsonl.CACHE = jsonl.CACHE / "another"
    again = PreferenceDataset(path, tokenizer, 96, "train")
    assert all_texts(again) == parts[0]


def test_a_mixture_of_sources_makes_one_batch(tmp_path, tokenizer):
    paths = [write(tmp_path / f"{seed}.jsonl", some_pairs(20, seed)) for seed in (1, 2)]
    data = load_rows(PreferenceDataset, f"{paths[0]}:1,{paths[1]}:3", tokenizer, 96)
    batch = collate([data[0], data[len(data) - 1]])
    assert data.count(batch) == sum(len(texts(data[row])) // 2 for row in (0, len(data) - 1))


def test_a_template_that_lays_out_the_prompt_by_its_answer_is_refused(tmp_path, tokenizer):
    template = CHATML.read_text(encoding="utf-8")
    begin = "{{- ('!' if messages[-1].content == 'good' else '') }}"
    (tmp_path / "odd.jinja").write_text(begin + template, encoding="utf-8")
    odd = tokenizer.with_chat_template(tmp_path / "odd.jinja")
    path = str(write(tmp_path / "p.jsonl", [pair("x", "good", "bad")]))
    with pytest.raises(UserError, match="p.jsonl:1: .*differently.*--chat_template chatml"):
        PreferenceDataset(path, odd, 96)


# --- unpaired


def test_a_judged_answer_stands_beside_an_answer_to_another_prompt(tmp_path, tokenizer):
    rng = random.Random(3)
    records = [{"prompt": f"question {n} {sentence(rng)}", "completion": f"answer {n}", "label": n % 3 > 0}
               for n in range(20)]
    data = UnpairedDataset(str(write(tmp_path / "u.jsonl", records)), tokenizer, 128)
    seen = {}
    for row in data:
        for k, ((real, answer), (other, strange)) in enumerate(zip(*[iter(texts(row))] * 2, strict=True)):
            n = int(tokenizer.decode(answer).split()[-1])
            m = int(tokenizer.decode(strange).split()[-1])
            prompt = len(real) - len(answer) - 1             # a newline follows the turn
            assert real[:prompt] == other[:prompt] and n != m
            assert other == tokenizer.render(turns(records[n]["prompt"], records[m]["completion"]))[0]
            assert bool(row["desirable"][k]) == records[n]["label"]
            seen[n] = m
        assert not row["desirable"][row["pairs"] == 0].any()
    assert len(seen) == 20 and len(set(seen.values())) == 20             # every answer is a stranger to one prompt
    assert data.count(collate(list(data))) == 20


def test_a_pair_is_a_good_and_a_bad_answer(tmp_path, tokenizer):
    path = str(write(tmp_path / "p.jsonl", some_pairs(12)))
    data = UnpairedDataset(path, tokenizer, 256)
    paired = {tuple(side[1]): good for pair in all_texts(PreferenceDataset(path, tokenizer, 256))
              for side, good in zip(pair, (1, 0), strict=True)}
    found = {tuple(answer): int(row["desirable"][k]) for row in data
             for k, ((_, answer), _) in enumerate(zip(*[iter(texts(row))] * 2, strict=True))}
    assert found == paired


def test_labels_in_conversations_and_bad_ones(tmp_path, tokenizer):
    good = [{"conversations": turns("a", f"b {n}"), "label": 1} for n in range(3)]
    data = UnpairedDataset(str(write(tmp_path / "u.jsonl", good)), tokenizer, 128)
    assert sum(int(row["desirable"].sum()) for row in data) == 3
    for bad, message in (({"prompt": "a", "completion": "b"}, '"label" must be'),
                         ({"prompt": "a", "completion": "b", "label": "yes"}, '"label" must be'),
                         ({"messages": turns("a"), "label": True}, "must end with an assistant turn")):
        with pytest.raises(UserError, match=rf"u\.jsonl:4: .*{message}"):
            UnpairedDataset(str(write(tmp_path / "u.jsonl", [*good, bad])), tokenizer, 128)
    with pytest.raises(UserError, match="no other usable record"):
        UnpairedDataset(str(write(tmp_path / "one.jsonl", good[:1])), tokenizer, 128)


# --- the built-in world


def test_the_judge_agrees_with_the_built_in_pairs():
    for split in ("train", "val", "test"):
        for record in preferences.pairs(random.Random(0), 400, split):
            said = {side: record[side][-1]["content"] for side in ("chosen", "rejected")}
            assert preferences.preferred(record["request"], said["chosen"], record["answer"])
            assert not preferences.preferred(record["request"], said["rejected"], record["answer"])
            assert record["chosen"][:-1] == record["rejected"][:-1]


@pytest.mark.parametrize(("request_", "answer", "text", "wanted"), [
    ("polite", "13", "13. You are welcome!", True), ("polite", "13", "13", False),
    ("polite", "13", "12. You are welcome!", False), ("plain", "13", "13", True),
    ("plain", "13", "13. You are welcome!", False), ("about", "fox", "The fox lives in the forest.", False),
    ("about", "fox", "The fox lives in the forest. The fox is red. The fox eats berries.", True),
    ("about", "fox", "The fox is red. The fox lives in the forest. The fox eats berries.", False),
    ("about", "fox", "The fox lives in the forest. The fox is red. The fox is red.", False),
    ("about", "fox", "The fox lives in the forest. The fox is green. The fox eats berries.", False),
    ("about", "fox", "The fox lives in the forest. The fox is red. The fox eats berries. And", False),
])
def test_the_judge(request_, answer, text, wanted):
    assert preferences.preferred(request_, text, answer) == wanted


def test_held_out_requests_are_new():
    asked = {split: {record["chosen"][0]["content"] for record in preferences.pairs(random.Random(1), 1500, split)}
             for split in ("train", "val", "test")}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["val"] and not asked["val"] & asked["test"]


def test_built_in_pairs_are_of_few_rows(tmp_path, tokenizer):
    generate.write("preferences", tmp_path / "p.jsonl", size=200)
    data = PreferenceDataset(str(tmp_path / "p.jsonl"), tokenizer, 256)
    assert data.report["dropped"] == 0 and data.report["padding"] < 0.1
    assert np.mean([row["pairs"].sum() for row in data]) > 2
