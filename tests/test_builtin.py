"""The built-in world: the same bytes from the same seed, right answers, no held-out exercise in any training text."""

import json
import os
import random
import re
import subprocess
import sys

import pytest

from dataset import jsonl
from dataset.builtin import generate, stories
from dataset.builtin.checkers import check
from dataset.builtin.practice import PRACTISED
from dataset.builtin.skills import SKILLS, draw, draw_all
from dataset.builtin.world import FACTS, PEOPLE, VALUES, WORDS, split_of, value_of
from model.errors import UserError
from model.tokenizer import Tokenizer

SIZES = {"pretrain": 3000, "pretrain_little": 20, "sft": 3000, "prompts": 60, "skills_val": 20, "skills_test": 40,
         "traces": 300, "traces_direct": 200, "reason_val": 20, "reason_test": 40,
         "practice": 60, "practice_val": 20, "practice_test": 20,
         "agent": 300, "agent_prompts": 20, "agent_val": 10, "agent_test": 20, "needle": 60, "needle_test": 20,
         "persona": 200, "persona_val": 20, "persona_test": 40,
         "judgements": 100, "judgements_test": 100, "preferences": 60, "preferences_more": 60,
         "preferences_val": 40, "preferences_test": 40, "preferences_few": 20, "manners": 60, "manners_val": 40,
         "manners_test": 40}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small file of every kind."""
    folder = tmp_path_factory.mktemp("builtin")
    for kind, size in SIZES.items():
        generate.write(kind, folder / f"{kind}.jsonl", seed=1, size=size)
    return {kind: folder / f"{kind}.jsonl" for kind in generate.KINDS}


@pytest.fixture(scope="module")
def training_lines(files):
    """Every line of text that training may see, as a set."""
    pieces = list(jsonl.texts([files["pretrain"], files["sft"], files["prompts"]]))
    return {line for piece in pieces for line in piece.splitlines()}


# --- files

def test_every_kind_is_tested_and_read_by_the_datasets(files):
    assert set(SIZES) == set(generate.KINDS)
    shapes = {"pretrain": "text", "pretrain_little": "text", "sft": "messages", "persona": "messages",
              "traces": "messages", "traces_direct": "messages", "agent": "messages", "judgements": "messages",
              "judgements_test": "messages", "preferences": "chosen", "preferences_more": "chosen",
              "preferences_few": "chosen", "needle": "messages",
              "preferences_val": "chosen", "preferences_test": "chosen"}
    for kind, path in files.items():
        records = list(jsonl.records(path))
        assert len(records) >= SIZES[kind]
        assert all(shapes.get(kind, "answer") in record for record in records), kind


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for kind in generate.KINDS:
        first, again, other = (tmp_path / f"{kind}{i}.jsonl" for i in range(3))
        generate.write(kind, first, seed=5, size=20)
        generate.write(kind, again, seed=5, size=20)
        generate.write(kind, other, seed=6, size=20)
        assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_the_bytes_do_not_depend_on_the_hash_seed(tmp_path):
    for seed in ("1", "2"):
        subprocess.run([sys.executable, generate.__file__, "--kind", "sft", "--size", "40", "--out", tmp_path / seed],
                       check=True, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_command_line_says_what_it_wrote(tmp_path, capsys):
    generate.main(["--kind", "skills_val", "--out", str(tmp_path / "new" / "v.jsonl"), "--seed", "3", "--size", "2"])
    count = len((tmp_path / "new" / "v.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"wrote {count} records of kind skills_val (seed 3)" in capsys.readouterr().out


def test_ensure_writes_once_and_again_when_the_generator_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(generate.KINDS, "tiny", (lambda rng, size: ({"text": str(i)} for i in range(size)), 3))
    path = generate.ensure("tiny", tmp_path)
    path.write_text("kept", encoding="utf-8")
    assert generate.ensure("tiny", tmp_path) == path and path.read_text(encoding="utf-8") == "kept"
    monkeypatch.setattr(generate, "version", lambda: "changed")
    other = generate.ensure("tiny", tmp_path)
    assert other != path and len(other.read_text(encoding="utf-8").splitlines()) == 3


def test_resolve_replaces_builtin_and_leaves_files_alone(monkeypatch):
    monkeypatch.setattr(generate, "ensure", lambda kind: f"/{kind}.jsonl")
    assert generate.resolve("builtin", "sft") == "/sft.jsonl"
    assert generate.resolve("a.jsonl,builtin:pretrain, builtin", "sft") == "a.jsonl,/pretrain.jsonl,/sft.jsonl"
    with pytest.raises(UserError, match="skills_test"):
        generate.write("skill_test", "x.jsonl")


# --- the split

def test_split_has_the_shares_it_says():
    splits = [split_of(f"anything {i}") for i in range(20_000)]
    assert 0.14 < splits.count("test") / 20_000 < 0.16 and 0.04 < splits.count("val") / 20_000 < 0.06
    assert split_of("add:5,8") == "test"                        # a written-down example: the rule must never drift


@pytest.mark.parametrize("name", SKILLS)
def test_no_held_out_exercise_is_in_a_training_text(name, training_lines):
    """Neither as it stands in the test file nor in any other of its wordings."""
    rng = random.Random(name)
    held_out = draw_all(rng, name, "test", 300) + draw_all(rng, name, "val", 100)
    assert len({item.key for item in held_out}) >= 8
    for item in held_out:
        assert item.question in item.wordings and not training_lines.intersection(item.wordings), item


def test_no_training_text_holds_a_held_out_sum_or_difference(training_lines):
    """Found by reading numbers in the text itself, in either order and however it is written."""
    found = 0
    for line in training_lines:
        for a, sign, b in re.findall(r"(?<![\d+-] )(?<![\d+-])(\d+) ?([+-]) ?(\d+)(?! ?[+-])(?!\d)", line):
            if int(a) < 100 and int(b) < 100:
                key = f"add:{min(int(a), int(b))},{max(int(a), int(b))}" if sign == "+" else f"sub:{a},{b}"
                assert split_of(key) == "train", line
                found += 1
        numbers = re.findall(r"\d+", line)
        if line.startswith(tuple(PEOPLE) + ("There are",)) and line.endswith("?") and len(numbers) == 2:
            a, b = map(int, numbers)
            gain = "more" in line or "together" in line
            assert split_of(f"add:{min(a, b)},{max(a, b)}" if gain else f"sub:{a},{b}") == "train", line
            found += 1
    assert found > 1000


def test_no_training_text_holds_a_held_out_word(training_lines):
    """The operand of every letter exercise, found by its wording."""
    patterns = [re.compile(re.escape(question).replace(r"\{shown\}", "(?P<w>.+)").replace(r"\{word\}", "(?P<w>.+)")
                           .replace(r"\{letter\}", ".").replace(r"\{which\}", r"\w+") + "$")
                for name in ("copy", "spell", "reverse", "upper_case", "count_letter", "first_last")
                for question in SKILLS[name].questions]
    words = {match["w"].replace(" ", "") for line in training_lines for p in patterns if (match := p.match(line))}
    assert len(words) > 1000
    assert all(split_of(f"word:{word}") == "train" for word in words)


def test_held_out_facts_are_told_in_pretraining_but_never_asked(files, training_lines):
    hidden = [fact for fact in FACTS if split_of(fact.key) != "train"]
    assert 30 < len(hidden) < 70
    read = "\n".join(jsonl.texts(files["pretrain"]))
    chats = [chat["messages"] for chat in jsonl.records(files["sft"])]
    exchanges = [pair for chat in chats for pair in zip(chat, chat[1:], strict=False) if pair[1]["role"] == "assistant"]
    for fact in hidden:
        assert any(fact.told(i) in read for i in range(len(fact.relation.told)))
        assert not any(question.format(s=fact.subject) in training_lines for question in fact.relation.asked)
        asked = [before["content"] for before, after in exchanges if after["content"].startswith(fact.statement[:-1])]
        assert all(question.startswith("Tell me about ") or "story" in question for question in asked)
        assert not any(fact.relation.yes_no.format(s=fact.subject, v=value) in training_lines
                       for value in VALUES[fact.relation.name])


# --- answers, recomputed from the question alone

def numbers_in(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def operand(text):
    """The word of a letter exercise, its spaces removed."""
    for pattern in (r": (.+)$", r"repeat (.+)$", r"spell (.+)\?$", r"Say (.+) backwards", r"Write (.+) in capital",
                    r"Put (.+) in alphabetical", r" in (.+)\?$", r"letter of (.+)\?$"):
        if match := re.search(pattern, text):
            return match[1].replace(" ", "")


def listed(text):
    return re.sub(r"\?$", "", text.split(": ")[1]).split(", ")


def reading(text):
    owner_of = dict(re.findall(r"of (\w+) is (\w+)\.", text))
    if match := re.search(r"Is the \w+ of (\w+) (\w+)\?", text):
        return "yes" if owner_of[match[1]] == match[2] else "no"
    if "Which colour" in text:
        return owner_of[re.search(r"of (\w+)\?", text)[1]]
    wanted = re.search(r"Who has the (\w+)", text)[1]
    return {colour: owner for owner, colour in owner_of.items()}[wanted]


def odd(text):
    groups = [{"fox", "owl", "bear", "frog", "deer", "hen", "horse", "mouse", "sheep", "cow", "swan", "wolf", "dog",
               "cat", "rabbit", "duck"},
              {"apple", "soup", "bread", "honey", "plum", "cheese", "rice", "cake", "pear", "egg", "corn", "nut"},
              {"red", "blue", "green", "yellow", "white", "black", "brown", "purple", "grey", "pink"},
              {"ball", "book", "lamp", "kite", "drum", "boat", "hat", "coat", "cup", "bell", "key", "basket"},
              {"baker", "farmer", "teacher", "sailor", "doctor", "painter", "gardener", "singer", "miller", "driver"}]
    words = listed(text)
    sizes = {word: next(len(group & set(words)) for group in groups if word in group) for word in words}
    assert sorted(sizes.values()) == [1, 3, 3, 3]
    return min(sizes, key=sizes.get)


def calculation(text):
    a, b = numbers_in(text)
    sign = next(s for s, word in (("+", "plus"), ("-", "minus"), ("*", "times")) if s in text or word in text)
    return json.dumps({"name": "calculator", "arguments": {"expression": f"{a}{sign}{b}"}})


def arithmetic(text):
    numbers = numbers_in(text)
    gain = "+" in text or "more" in text or "together" in text
    return str(sum(numbers) if gain else numbers[0] - numbers[1])


def asked_fact(text):
    """(fact, suggested value or None) that a question is about."""
    for fact in FACTS:
        if text in [question.format(s=fact.subject) for question in fact.relation.asked]:
            return fact, None
        before, after = fact.relation.yes_no.format(s=fact.subject, v="|").split("|")
        if text.startswith(before) and text.endswith(after):
            return fact, text[len(before):len(text) - len(after)]


RECOMPUTED = {
    "copy": operand, "spell": operand,
    "reverse": lambda q: operand(q)[::-1], "upper_case": lambda q: operand(q).upper(),
    "count_letter": lambda q: str(operand(q).count(re.search(r"(?:Count|times is) (\w) ", q)[1])),
    "sort_letters": lambda q: "".join(sorted(operand(q))),
    "first_last": lambda q: operand(q)[0 if "first" in q else -1],
    "longest_word": lambda q: max(listed(q), key=len), "odd_one_out": odd,
    "add_one_digit": arithmetic, "add_two_digits": arithmetic, "subtract_one_digit": arithmetic,
    "subtract_two_digits": arithmetic, "word_problem": arithmetic,
    "compare": lambda q: str((max if "larger" in q else min)(numbers_in(q))),
    "sort_numbers": lambda q: " ".join(map(str, sorted(numbers_in(q)))),
    "next_number": lambda q: str(2 * numbers_in(q)[-1] - numbers_in(q)[-2]),
    "calculator": calculation, "read": reading,
    "fact": lambda q: asked_fact(q)[0].value,
    "yes_no": lambda q: "yes" if asked_fact(q)[0].value == asked_fact(q)[1] else "no",
}


@pytest.mark.parametrize("name", SKILLS)
def test_answers_are_right(name):
    """Recomputed by other code from the question. What training says passes the checker, a wrong answer does not."""
    rng = random.Random(0)
    for level in range(1, SKILLS[name].levels + 1):
        items = [draw(rng, name, split, level) for split in ("train", "test") for _ in range(60)]
        for item, other in zip(items, items[1:] + items[:1], strict=True):
            assert check(item.checker, RECOMPUTED[name](item.question), item.answer) or name == "calculator", item
            said = item.answer if name != "calculator" else f"<tool_call>{RECOMPUTED[name](item.question)}</tool_call>"
            assert check(item.checker, said, item.answer), item
            if name != "calculator":
                assert check(item.checker, item.reply, item.answer), item
            if other.answer != item.answer and item.checker != "yes_no":
                assert not check(item.checker, other.reply, item.answer), (item, other)


def test_levels_get_harder_and_are_all_in_the_test_file(files):
    levels = {}
    for line in files["skills_test"].read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        levels.setdefault(record["skill"], set()).add(record["level"])
        assert record["conversations"][0]["role"] == "user" and len(record["conversations"]) == 1
    assert levels == {name: set(range(1, skill.levels + 1)) for name, skill in SKILLS.items()}
    longest = [max(len(draw(random.Random(i), "sort_letters", "train", level).answer) for i in range(20))
               for level in (1, 2, 3)]
    assert longest == sorted(set(longest))


def test_yes_and_no_are_balanced():
    rng = random.Random(0)
    answers = [draw(rng, "yes_no").answer for _ in range(1000)]
    assert 400 < answers.count("yes") < 600


def test_answers_fit_the_tokens_they_are_given():
    """With the tokenizer that the built-in world is meant for, the end of the turn included."""
    tokenizer = Tokenizer.load("nano")
    rng = random.Random(0)
    for name, skill in SKILLS.items():
        for _ in range(60):
            exchange = draw(rng, name).conversation()
            prompt, _ = tokenizer.render(exchange[:1], add_generation_prompt=True)
            whole, _ = tokenizer.render(exchange[:2])
            assert len(whole) - 1 - len(prompt) <= skill.max_new_tokens, exchange     # -1: the newline after the turn


# --- the world and its texts

def test_world_is_consistent():
    assert len({fact.key for fact in FACTS}) == len(FACTS) >= 240
    assert len(set(PEOPLE)) == 30 and len(set(WORDS)) == len(WORDS)
    for person in PEOPLE:
        assert value_of(value_of(person, "friend"), "friend") == person != value_of(person, "friend")
    for fact in FACTS:                                          # the answer that training gives ends with the value
        assert check("phrase", fact.statement, fact.value)


def test_stories_agree_with_the_world_and_vary():
    rng = random.Random(0)
    texts = [stories.story(rng) for _ in range(400)]
    assert len(set(texts)) == len(texts)
    assert len({text.split(".")[0] for text in texts}) > 200
    for text in texts:
        assert "{" not in text and "  " not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        if match := re.match(r"(\w+) lives in (\w+) and works as a (\w+)\.", text):
            assert (value_of(match[1], "home"), value_of(match[1], "job")) == match.groups()[1:]


def test_acorn_says_who_it_is(files):
    chats = [record["messages"] for record in jsonl.records(files["sft"])]
    said = [answer["content"] for chat in chats for question, answer in zip(chat, chat[1:], strict=False)
            if question["content"] == "Who are you?"]
    assert said and set(said) == {stories.NAME_ANSWER} and "Acorn" in stories.NAME_ANSWER
    assert all(chat[0]["role"] == "user" and chat[-1]["role"] == "assistant" for chat in chats)


# --- checkers

@pytest.mark.parametrize("name, expected, right, wrong", [
    ("number", "92", ["92", " 92.", "The answer is 92.", "34 + 58 = 92", "<answer>92</answer>", "<think>9</think>092"],
     ["", "9", "2", "92 or 93", "-92", "9.2", "92.5", "ninety-two", "<think>92", "<think>92</think>"]),
    ("number", "1080", ["$1,080", "1080", "It is 1,080."], ["1,08", "1,0800", "80", "1 080"]),
    ("numbers", "2 4 9", ["2 4 9", "2, 4, 9.", "Sorted: 2 4 9"], ["2 4", "9 4 2", "249", "2 4 9 9", ""]),
    ("letters", "o l i m", ["o l i m", "olim", "o-l-i-m.", ' "o l i m"'],
     ["o l m i", "O L I M", "o l i m o", "", "olim is it"]),
    ("phrase", "Stonebay", ["Stonebay", "stonebay.", "Mia lives in Stonebay."],
     ["Stone", "Stonebay is far", "", "NotStonebay"]),
    ("phrase", "water plants", ["water plants", "The swan eats water plants."], ["plants", "water", "plants water"]),
    ("yes_no", "yes", ["yes", "Yes.", "Mia lives in Elmton, so yes."], ["no", "", "yes no", "yesno", "No. Yes."]),
    ("yes_no", "no", ["No. The fox is red.", "no", "The fox is red, so no."], ["not", "Yes.", "No, yes."]),
    ("tool_call", '{"name": "calculator", "arguments": {"expression": "3*4"}}',
     ['<tool_call>{"name": "calculator", "arguments": {"expression": "3*4"}}</tool_call>',
      'I compute.<tool_call>\n{"arguments": {"expression": "3 * 4"}, "name": "calculator"}\n</tool_call>'],
     ["12", "", '{"name": "calculator", "arguments": {"expression": "3*4"}}',
      '<tool_call>{"name": "calculator", "arguments": {"expression": "4*3"}}</tool_call>',
      '<tool_call>{"name": "calculate", "arguments": {"expression": "3*4"}}</tool_call>',
      "<tool_call>{]</tool_call>", "<tool_call>[1]</tool_call>", "<tool_call>" + "[" * 100_000 + "</tool_call>",
      '<tool_call>{"name": "calculator", "arguments": {"expression": "3*4"}}</tool_call>' * 2]),
])
def test_checkers(name, expected, right, wrong):
    for text in right:
        assert check(name, text, expected), text
    for text in wrong:
        assert not check(name, text, expected), text


def test_unknown_checker_is_named():
    with pytest.raises(UserError, match="phrase"):
        check("eval", "1", "1")


# --- practice

def test_what_is_practised_was_never_taught_and_is_held_out_by_word(files, training_lines):
    assert not PRACTISED.keys() & SKILLS.keys()
    keys = {split: {item.key for name in PRACTISED for item in draw_all(random.Random(1), name, split, 60, PRACTISED)}
            for split in ("train", "val", "test")}
    assert not keys["train"] & keys["val"] and not keys["train"] & keys["test"] and not keys["val"] & keys["test"]
    for name in ("practice", "practice_val", "practice_test"):
        assert not training_lines & {record["messages"][0]["content"] for record in jsonl.records(files[name])}


def test_the_first_prompts_to_practise_hold_every_skill(files):
    first = [record["skill"] for record in jsonl.records(files["practice"])][:40]
    assert set(first) == PRACTISED.keys()


@pytest.mark.parametrize("name", PRACTISED)
def test_practised_exercises_are_right(name):
    rng = random.Random(3)
    for level in range(1, PRACTISED[name].levels + 1):
        for _ in range(20):
            item = draw(rng, name, "train", level, PRACTISED)
            word = item.key.removeprefix("word:")
            assert 6 <= len(word) <= 9 and check(item.checker, item.reply, item.answer)
            letter = re.search(r"(?:Count|How many times is) (\w) ", item.question)
            right = {"reverse_long": word[::-1], "upper_case_long": word.upper(), "copy_long": word, "spell_long": word,
                     "count_letter_long": str(word.count(letter[1])) if letter else ""}[name]
            assert check(item.checker, right, item.answer)
