"""Tokens on disk: several processes write what one writes, a killed one leaves nothing, every token has an address."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import jsonl, tokens
from dataset.jsonl import DiskArray, once
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.tokens import token_store
from model.errors import UserError
from model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the cat sat on a mat and looked at two small birds in the old tree 汉字 🙂 12 + 7 = 19".split()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def some_records(kind, count=60, seed=0):
    rng = random.Random(seed)

    def said():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))

    if kind == "document":
        return [{"text": said() if rng.random() < 0.9 else ""} for _ in range(count)]
    return [{"messages": [{"role": role, "content": said()} for _ in range(rng.randint(1, 3))
                          for role in ("user", "assistant")]} for _ in range(count)]


def content(store):
    return {name: (store.folder / f"{name}.bin").read_bytes() for name in ("tokens", "mask", "texts")}


# --- several processes


@pytest.mark.parametrize("kind, settings", [("document", {}), ("chat", {"max_len": 60})])
def test_three_processes_write_what_one_writes(kind, settings, tmp_path, tokenizer, monkeypatch):
    records = some_records(kind)
    records[20:20] = ["", '{"bad": 1}', "\r"]
    records[50:50] = ["{", ""]
    path = write(tmp_path / "a.jsonl", records)
    one = token_store(path, kind, tokenizer, "skip", **settings)
    monkeypatch.setattr(jsonl, "CACHE", tmp_path / "other")
    monkeypatch.setattr(tokens, "PART", 1)
    monkeypatch.setattr(tokens, "cores", lambda: 3)
    three = token_store(path, kind, tokenizer, "skip", **settings)
    assert content(one) == content(three) and one.meta == three.meta
    assert one.meta["skipped"] == 2 and f"{path}:22:" in one.meta["first_skipped"]
    assert len(one.texts) == 62 and (one.texts[:]["size"] == 0).sum() >= 2
    assert {file.name for file in three.folder.iterdir()} == {"meta.json", "texts.bin", "tokens.bin", "mask.bin"}


def test_of_two_bad_records_in_two_processes_the_first_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "PART", 1)
    monkeypatch.setattr(tokens, "cores", lambda: 3)
    records = some_records("document", 3000)
    records[990:990] = ["{"]                        # at the end of the first part, and close to the start of the second
    records[1010:1010] = ["{"]
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=r"a\.jsonl:991: not valid JSON"):
        token_store(path, "document", tokenizer)
    assert not [file for file in jsonl.CACHE.iterdir() if file.is_dir()]


def test_a_process_that_dies_is_not_taken_for_one_that_is_done(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "PART", 1)
    monkeypatch.setattr(tokens, "cores", lambda: 2)
    monkeypatch.setattr(tokens, "follow", lambda child, add: (child.kill(), FOLLOW(child, add)))
    with pytest.raises(RuntimeError, match="ended with exit code"):
        token_store(write(tmp_path / "a.jsonl", some_records("document")), "document", tokenizer)


FOLLOW = tokens.follow


# --- once


def test_what_is_being_made_is_waited_for_and_what_a_kill_left_is_made_again(tmp_path):
    target = tmp_path / "thing"
    code = ("import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); from dataset.jsonl import once\n"
            "def make(path):\n"
            "    path.mkdir(); (path / 'half').touch(); print('making', flush=True); time.sleep(600)\n"
            "once(pathlib.Path(sys.argv[2]), make)")
    child = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(target)], stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == b"making" and not target.exists()
    child.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    child.wait()
    child.stdout.close()
    start = time.monotonic()
    assert once(target, lambda path: path.write_text("whole")).read_text() == "whole"
    assert time.monotonic() - start < 5             # the dead process's lock is free at once
    assert once(target, None) == target             # there already: nothing is made
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_or_full_disk_leaves_nothing_behind(tmp_path):
    def fill_the_disk(path):
        path.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        once(tmp_path / "thing", fill_the_disk)
    assert [file.suffix for file in tmp_path.iterdir()] in ([".lock"], [])


# --- addresses


def test_a_disk_array_reads_as_the_array_does(tmp_path):
    array = np.arange(1000, dtype=np.uint16)
    array.tofile(tmp_path / "a.bin")
    found = DiskArray(tmp_path / "a.bin", np.uint16)
    assert len(found) == 1000 and found[7] == 7 and found[-1] == 999
    for piece in (slice(3, 9), slice(None), slice(990, 2000), slice(5, 5), slice(9, 3), slice(-4, None)):
        assert found[piece].tolist() == array[piece].tolist()
    with pytest.raises(IndexError):
        found[1000]


def test_where_names_the_records_of_a_row(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", [{"text": "alpha " * 4}, "", {"text": ""}, {"text": "beta " * 60}])
    second = write(tmp_path / "b.jsonl", [{"text": "gamma " * 9}])
    data = PretrainDataset([first, second], tokenizer, max_len=32)
    texts = {f"{first}:1": "alpha " * 4, f"{first}:4": "beta " * 60, f"{second}:1": "gamma " * 9}
    spelled = {place: str([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])[1:-1]
               for place, text in texts.items()}
    for number, row in enumerate(data):
        pieces = [row["input_ids"][row["segment_ids"] == k + 1].tolist() for k in range(row["segment_ids"].max())]
        found = [place for ids in pieces for place, ids_of in spelled.items() if str(ids)[1:-1] in ids_of]
        assert data.where(number) == list(dict.fromkeys(found))
    chats = write(tmp_path / "c.jsonl", some_records("chat", 9))
    chat = SFTDataset(chats, tokenizer, max_len=256)
    places = sorted(place for row in range(len(chat)) for place in chat.where(row))
    assert places == [f"{chats}:{line}" for line in range(1, 10)]


def test_where_names_the_bytes_of_a_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    text = "".join(f"line {number} of 汉字\n" for number in range(100))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for split in ("all", "train", "val"):
        data = PretrainDataset(path, tokenizer, max_len=16, split=split)
        for number, row in enumerate(data):
            place, = data.where(number)
            first, last = map(int, place.removeprefix(f"{path}: bytes ").split("-"))
            ids = row["input_ids"][row["segment_ids"] > 0]
            assert text.encode()[first:last] == b"".join(tokenizer._pieces[i] for i in ids if i != tokenizer.eos_id)
