"""dataset/show.py: what it prints is what the datasets hold."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dataset import lm_dataset, show
from dataset.lm_dataset import (
    PreferenceDataset,
    PretrainDataset,
    ReasonDataset,
    SFTDataset,
    UnpairedDataset,
    load_rows,
)
from model.errors import UserError
from model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.load("nano")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def chat(*contents):
    return {"messages": [turn(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]}


def in_brackets(text):
    """The tokens in [brackets] of a text without brackets of its own, with the line breaks that they stand for."""
    return "".join(re.findall(r"\[([^\[\]]*)\]", text)).replace("\\n", "\n")


def lines_of(data, row=0, how=show.plain):
    return list(show.row_lines(data, row, TOKENIZER, how))


# --- the mask


def test_brackets_are_the_loss_mask(chats, documents):
    """Of every row of chats and documents: what stands in brackets is the decoded targets, in order, and all."""
    for data in (SFTDataset(chats, TOKENIZER, 64), PretrainDataset(documents, TOKENIZER, 64)):
        for number in range(len(data)):
            row = data[number]
            head, *shown = lines_of(data, number)
            targets = row["input_ids"][row["loss_mask"] == 1]
            assert in_brackets("".join(shown[1::2])) == TOKENIZER.decode(targets.tolist(), skip_special=False)
            used = int((row["segment_ids"] > 0).sum())
            assert f"{used} of 64 slots used, {len(targets)} tokens with loss in [brackets]" in head
            assert len(shown) == 2 * row["segment_ids"].max()
            for place, segment in zip(shown[::2], range(1, 99), strict=False):
                own = row["segment_ids"] == segment
                assert f": {own.sum()} tokens, {row['loss_mask'][own].sum()} with loss" in place


def test_a_conversation_reads_as_it_is_trained(tmp_path):
    data = SFTDataset(write(tmp_path / "a.jsonl", chat("Say ab.", "ab")), TOKENIZER, 64)
    head, place, shown = lines_of(data)
    assert head.startswith("row 0: 1 text, ")
    assert place == f"— {tmp_path / 'a.jsonl'}:1: {(data[0]['segment_ids'] > 0).sum()} tokens, " + (
        f"{data[0]['loss_mask'].sum()} with loss")
    assert shown.startswith("<|im_start|>user\\n\n") and "[<|im_end|>]" in shown and "[<|im_start|>]" not in shown
    assert in_brackets(shown) == "ab<|im_end|>" and show.CUT not in shown


def test_characters_of_several_tokens_come_whole(tmp_path):
    """é and 你 are several byte tokens of the small vocabulary; the target é is not joined to what stands before it."""
    data = SFTDataset(write(tmp_path / "a.jsonl", chat("你好", "é你\x1b31m")), TOKENIZER, 128)
    *_, shown = lines_of(data)
    assert "你好" in shown and "[é][你]" in shown
    assert "\x1b" not in shown and "\\x1b" in shown                      # a file cannot colour the terminal
    coloured = lines_of(data, 0, show.coloured)[-1]
    assert coloured.count("\x1b[30;48") == shown.count("[")
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == re.sub(r"[\[\]]", "", shown)


def test_half_a_character_is_not_joined_to_a_token_of_another_kind():
    whole = TOKENIZER.encode("你")
    assert len(whole) == 3
    ids, loss = np.array([*whole[:2], *whole]), np.array([0, 0, 1, 1, 1])
    got = list(show.tokens_of(ids, loss, TOKENIZER))
    assert [(text, flag, first) for text, flag, _, first, _ in got] == [("�", 0, 0), ("你", 1, 2)]
    assert [ids for *_, ids in got] == [whole[:2], whole]


# --- what is not there


def test_what_was_cut_off_is_marked_and_said(tmp_path):
    long = chat(*["one two three", "four five"] * 6, "last question", "last answer")
    hopeless = chat("x " * 80, "y " * 80)
    data = SFTDataset(write(tmp_path / "a.jsonl", chat("a", "b"), long, hopeless), TOKENIZER, 64)
    shown = "\n".join(line for row in range(len(data)) for line in lines_of(data, row))
    lost = data.report["tokens_lost"] - len(TOKENIZER.render(hopeless["messages"])[0])
    assert "a.jsonl:2: " in shown and f"; ✂ {lost} tokens of its oldest exchanges left out" in shown
    assert shown.count("✂<|im_start|>") == 1 and "✂<|im_start|>user\\n\na<|" not in shown
    line, = show.left_out(data)
    assert "1 of 3 records are in no row" in line and line.endswith("a.jsonl:3")


def test_pieces_of_a_document_say_where_they_begin_and_go_on(tmp_path):
    text = " ".join(f"word{n}" for n in range(60))
    data = PretrainDataset(write(tmp_path / "a.jsonl", {"text": text}), TOKENIZER, 32)
    whole = len(TOKENIZER.encode(text)) + 2
    seen = []
    for row in range(len(data)):
        _, place, shown = lines_of(data, row)
        assert (show.CUT + "" if row else "<|endoftext|>") == shown[:1 if row else 13]
        assert shown.endswith(show.CUT) == (row < len(data) - 1)
        seen.append(place)
    assert f"goes on in another row, {whole - 32} tokens more" in seen[0] and "begins" not in seen[0]
    assert "begins 31 tokens into the record; its first token is the last one of the piece before" in seen[1]
    assert "goes on" not in seen[-1]


# --- pairs


PAIR = {"prompt": "Which?", "chosen": "this one", "rejected": "that"}


def test_sides_of_pairs_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIR, {**PAIR, "prompt": "And now?"})
    data = PreferenceDataset(path, TOKENIZER, 128)
    _, *shown = lines_of(data)
    titles = [re.search(r"pair (\d), (\w+):", line).groups() for line in shown[::2]]
    assert titles == [("1", "chosen"), ("1", "rejected"), ("2", "chosen"), ("2", "rejected")]
    assert [in_brackets(line) for line in shown[1::2]] == ["this one<|im_end|>", "that<|im_end|>"] * 2
    _, *shown = lines_of(UnpairedDataset(path, TOKENIZER, 256))
    for judged in ("judged good", "judged bad"):
        assert [judged in line for line in shown[::4]].count(True) == 2
    assert all("with the answer of another record" in line for line in shown[2::4])


def test_weights_of_a_loss_are_shown(tmp_path):
    """Thoughts that count half and tags that count three times; the rest counts once."""
    record = {"messages": [turn("user", "3+4?"), turn("assistant", "<think>\nab\n</think>\n\n7")]}
    path = write(tmp_path / "a.jsonl", record)
    _, place, shown = lines_of(ReasonDataset(path, TOKENIZER, 64, tag_weight=3, thought_weight=0.5))
    assert "[<think>]×3[\\n]×0.5" in shown and "[</think>]×3" in shown and "[7][<|im_end|>]" in shown
    _, usual, shown = lines_of(ReasonDataset(path, TOKENIZER, 64))
    assert "×" not in shown and usual == place


# --- the program


def run(*arguments, module=False):
    start = ["-m", "dataset.show"] if module else ["dataset/show.py"]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)


def test_the_program_shows_a_file(chats, tmp_path):
    done = run("--stage", "sft", chats, "--max_len", 64, "--rows", 2, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens with loss in [brackets]") == 2 and "rows in all: 60 records" in done.stdout
    assert "\x1b" not in done.stdout                                     # not a terminal
    assert run(chats, "--max_len", 64, "--rows", 2, module=True).stdout in done.stdout

    spans = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            if "title" in attributes:
                spans.append((attributes["class"].split()[0], attributes["title"]))

    Reader().feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    data = SFTDataset(chats, TOKENIZER, 64)
    ids = [int(i) for _, title in spans for i in re.search(r"id ([\d, ]+)", title).group(1).split(", ")]
    loss = [kind == "loss" for kind, _ in spans]
    rows = [data[row] for row in (0, 1)]
    assert ids == [i for row in rows for i in row["input_ids"][row["segment_ids"] > 0].tolist()]
    assert loss == [bool(m) for row in rows for m in row["loss_mask"][row["segment_ids"] > 0]]


def test_a_page_spells_markup_out(tmp_path):
    data = SFTDataset(write(tmp_path / "a.jsonl", chat("<b>hi</b>", "<script>x</script>")), TOKENIZER, 128)
    show.write_page(tmp_path / "page.html", "<i>", [lines_of(data, 0, show.page_of)])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>hi" not in page and "&lt;" in page and "<h1>&lt;i&gt;</h1>" in page


@pytest.mark.parametrize("flags, message", [
    (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(rows=0), "--rows 0"),
    (dict(first=1000), "--first 1000: there are"),
    (dict(stage="dpo"), "chosen"),
])
def test_wrong_use_is_told_in_one_line(chats, flags, message):
    with pytest.raises(UserError, match=message) as told:
        show.main(show.Config(**{"data": str(chats), "max_len": 64, **flags}))
    assert "\n" not in str(told.value)


def test_mixtures_show_the_source_of_each_row(chats, tmp_path):
    other = write(tmp_path / "b.jsonl", *[chat("abc", "def")] * 20)
    data = load_rows(SFTDataset, f"{chats}:0.5,{other}:0.5", TOKENIZER, 64)
    places = [line for row in range(len(data)) for line in lines_of(data, row)[1::2]]
    assert any("chats.jsonl:" in line for line in places) and any("b.jsonl:" in line for line in places)


def test_the_example_of_the_chapter_is_true(tmp_path, monkeypatch):
    write(tmp_path / "chats.jsonl", chat("How many legs has a cat?", "Four."))
    monkeypatch.chdir(tmp_path)
    shown = "\n".join(lines_of(SFTDataset("chats.jsonl", TOKENIZER, 64)))
    chapter = (ROOT / "dataset" / "README.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in shown.splitlines() if line) in chapter


def test_every_stage_has_its_data():
    """The class and the built-in data of each --stage exist."""
    from dataset.builtin.generate import KINDS
    for stage, (kind, builtin) in show.STAGES.items():
        assert hasattr(lm_dataset, kind) and builtin in KINDS, stage
