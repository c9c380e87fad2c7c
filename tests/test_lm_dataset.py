"""Rows: every token a target once, no padding, segments apart, whole conversations, and a cache that notices."""

import concurrent.futures
import itertools
import json
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import torch

from dataset import jsonl, lm_dataset, tokens
from dataset.lm_dataset import PretrainDataset, SFTDataset, collate, held_out, plan_rows
from dataset.tokens import render_to_fit
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from trainer.batches import row_stream

WORDS = "the cat sat on a mat and looked at two small birds in the old tree 汉字 🙂 12 + 7 = 19".split()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def sentence(rng, most=60):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def documents(path, count=40, seed=0):
    rng = random.Random(seed)
    return write(path, [{"text": sentence(rng)} for _ in range(count)])


def chat(*turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return {"conversations": messages + [{"role": ("user", "assistant")[number % 2], "content": turn}
                                         for number, turn in enumerate(turns)]}


def chats(path, count=30, seed=0):
    rng = random.Random(seed)
    return write(path, [chat(*(sentence(rng, 12) for _ in range(2 * rng.randint(1, 3)))) for _ in range(count)])


def segments(row):
    """[(ids, mask, positions)] of a row's texts."""
    for number in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == number
        yield row["input_ids"][here].tolist(), row["loss_mask"][here].tolist(), row["positions"][here].tolist()


# --- the plan


def lengths_of(seed):
    rng = random.Random(seed)
    kind = rng.choice(["mixed", "equal", "short", "long"])
    count, max_len = rng.randint(1, 60), rng.randint(4, 40)
    equal = rng.randint(3, 2 * max_len)
    draw = {"mixed": lambda: rng.choice([0, rng.randint(3, 3 * max_len)]), "equal": lambda: equal,
            "short": lambda: rng.randint(3, 6), "long": lambda: rng.randint(max_len, 10 * max_len)}[kind]
    return [draw() for _ in range(count)], max_len


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_cut_rows_predict_every_token_once_and_are_full(first):
    for seed in range(first, first + 100):
        lengths, max_len = lengths_of(seed)
        rows = list(plan_rows(lengths, max_len, cut=True))
        pieces = [piece for row in rows for piece in row]
        predicted = sorted((text, token) for text, start, end in pieces for token in range(start + 1, end))
        assert predicted == [(text, token) for text, length in enumerate(lengths) for token in range(1, length)]
        assert all(end - start >= 2 for _, start, end in pieces) or max_len < 4
        used = [sum(end - start for _, start, end in row) for row in rows]
        assert all(0 < total <= max_len for total in used)
        for number, total in list(enumerate(used))[:-1]:
            only_pairs = all(end - start == 2 for row in rows[number + 1:] for _, start, end in row)
            assert total == max_len or (total == max_len - 1 and only_pairs)


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_whole_rows_hold_each_text_once_and_uncut(first):
    for seed in range(first, first + 100):
        lengths, max_len = lengths_of(seed)
        lengths = [min(length, max_len) for length in lengths]
        rows = list(plan_rows(lengths, max_len, cut=False))
        assert sorted(piece for row in rows for piece in row) == [
            (text, 0, length) for text, length in enumerate(lengths) if length]
        used = [sum(length for _, _, length in row) for row in rows]
        assert all(0 < total <= max_len for total in used)
        assert all(used[row] + used[row + 1] > max_len for row in range(len(used) - 1))


def test_a_long_text_fills_rows_in_order():
    assert list(plan_rows([25], 8, cut=True)) == [[(0, 0, 8)], [(0, 7, 15)], [(0, 14, 22)], [(0, 21, 25)]]


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 1, 5000), 3, 512).astype(int)
    rows = list(plan_rows(lengths, 512, cut=False))
    assert lengths.sum() / (512 * len(rows)) > 0.99


# --- documents


def test_documents_are_whole_tokens_between_end_marks(tmp_path, tokenizer):
    path = documents(tmp_path / "a.jsonl")
    data = PretrainDataset(path, tokenizer, max_len=32)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    targets = sorted(token for ids in expected for token in ids[1:])
    assert sorted(int(t) for row in data for t in row["input_ids"][row["loss_mask"] == 1]) == targets
    joined = " " + " ".join(map(str, itertools.chain(*expected))) + " "
    for number, row in enumerate(data):
        assert {key: (len(array), array.dtype.name) for key, array in row.items()} == {
            "input_ids": (32, "int64"), "loss_mask": (32, "uint8"),
            "segment_ids": (32, "int64"), "positions": (32, "int64")}
        assert number == len(data) - 1 or (row["segment_ids"] > 0).all()
        assert (row["input_ids"][row["segment_ids"] == 0] == tokenizer.pad_id).all()
        for ids, mask, positions in segments(row):
            assert f" {' '.join(map(str, ids))} " in joined
            assert mask == [0] + [1] * (len(ids) - 1) and positions == list(range(len(ids)))
    assert data.report | {"padding": 0, "cut": 0} == {
        "files": 1, "records": 40, "documents": 40, "dropped": 0, "cut": 0, "rows": len(data), "padding": 0,
        "shortened": 0, "tokens_lost": 0, "tokens": sum(map(len, expected)),
        "loss_tokens": len(targets), "skipped": 0, "malformed": 0,
        "bytes": sum(len(text.encode()) for text in texts)}
    assert sum(int(tokenizer.token_bytes[t]) for t in targets) == data.report["bytes"]


def test_text_that_spells_end_marks_does_not_double_them(tmp_path, tokenizer):
    data = PretrainDataset(write(tmp_path / "a.jsonl", [{"text": "<|endoftext|>a<|im_end|>"}]), tokenizer, max_len=64)
    ids = data[0]["input_ids"][data[0]["segment_ids"] == 1].tolist()
    assert ids.count(tokenizer.eos_id) == 2 and tokenizer.end_of_turn_id not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>a<|im_end|>"


def test_an_empty_text_is_dropped(tmp_path, tokenizer):
    data = PretrainDataset(write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "ab"}]), tokenizer, max_len=16)
    assert (data.report["dropped"], data.report["documents"], len(data)) == (1, 1, 1)
    with pytest.raises(UserError, match="no text in any of the 1 records"):
        PretrainDataset(write(tmp_path / "b.jsonl", [{"text": ""}]), tokenizer, max_len=16)


def test_a_txt_file_is_one_document_and_its_end_is_held_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(jsonl, "PIECE", 100)
    text = "".join(sentence(random.Random(n)) + "\n" for n in range(50))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    cut = int(len(text) * 0.9)
    for split, expected in (("all", text), ("train", text[:cut]), ("val", text[cut:])):
        data = PretrainDataset(path, tokenizer, max_len=16, split=split)
        ids = [int(t) for row in data for t in row["input_ids"][row["loss_mask"] == 1]]
        assert tokenizer.decode(ids) == expected and ids[-1] == tokenizer.eos_id
        assert data.report["bytes"] == len(expected.encode()) and data.report["documents"] == 1
    (tmp_path / "b.txt").write_bytes(b"a")
    with pytest.raises(UserError, match="too short to hold out"):
        PretrainDataset(tmp_path / "b.txt", tokenizer, max_len=16, split="val")


def test_files_of_both_kinds_together(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    documents(tmp_path / "data" / "a.jsonl", 10)
    documents(tmp_path / "data" / "b.jsonl", 7, seed=1)
    (tmp_path / "data" / "c.txt").write_text("one line\n" * 30, encoding="utf-8")
    whole = PretrainDataset(tmp_path / "data", tokenizer, max_len=16)
    parts = [PretrainDataset(tmp_path / "data", tokenizer, max_len=16, split=split) for split in ("train", "val")]
    assert whole.report["records"] == 18
    assert sum(part.report["bytes"] for part in parts) == whole.report["bytes"]
    assert [part.report["records"] for part in parts] == [17, 2]    # one of 17 records is held out, and an end of c.txt


# --- splits


def test_splits_are_disjoint_and_depend_on_seed_and_count_only(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": f"<{number}>"} for number in range(100)])

    def lines(split, path=path, **options):
        data = PretrainDataset(path, tokenizer, max_len=16, split=split, **options)
        found = {int(place.rpartition(":")[2]) for row in range(len(data)) for place in data.where(row)}
        assert data.report["records"] == len(found)
        return found

    train, val, whole = (lines(split, val_fraction=0.2) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(whole)) == (80, 20, 100)
    assert not train & val and train | val == whole == set(range(1, 101))
    assert lines("val", seed=1) == lines("val", seed=1) != lines("val", seed=2)
    assert len(lines("val", val_records=3)) == 3
    assert lines("val", documents(tmp_path / "b.jsonl", 100)) == lines("val")


def test_held_out_sizes():
    assert len(held_out(5, 0.1, 1000, 0)) == 1 and len(held_out(100_000, 0.1, 1000, 0)) == 1000
    with pytest.raises(UserError, match="one record cannot be divided"):
        held_out(1, 0.1, 1000, 0)


# --- conversations


def test_conversations_are_packed_whole_with_the_mask_of_render(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl")
    data = SFTDataset(path, tokenizer, max_len=256)
    conversations = [json.loads(line)["conversations"] for line in path.read_text(encoding="utf-8").splitlines()]
    expected = [tokenizer.render(messages) for messages in conversations]
    assert all(len(ids) <= 256 for ids, _ in expected)
    found = [segment for row in data for segment in segments(row)]
    assert sorted(found) == sorted((ids, mask, list(range(len(ids)))) for ids, mask in expected)
    assert max(row["segment_ids"].max() for row in data) > 1
    targets = [token for ids, mask in expected for token, m in zip(ids, mask, strict=True) if m]
    assert data.report["conversations"] == 30 and data.report["dropped"] == data.report["shortened"] == 0
    assert data.report["loss_tokens"] == len(targets)
    said = [message["content"] for messages in conversations for message in messages if message["role"] == "assistant"]
    assert data.report["bytes"] == sum(len(text.encode()) for text in said)


def test_a_long_conversation_loses_its_oldest_turns_whole(tokenizer):
    turns = ["first question", "first answer", "second question", "second answer", "third question", "third answer"]
    record = {"messages": chat(*turns, system="Be kind.")["conversations"], "tools": None}
    whole, _ = tokenizer.render(record["messages"])
    system, last = record["messages"][:1], record["messages"][-2:]
    shortest = tokenizer.render(system + last)
    for max_len in range(8, len(whole) + 1):
        ids, mask, lost = render_to_fit(record, tokenizer, max_len)
        fitting = (rendered for dropped in range(3)
                   if len((rendered := tokenizer.render(system + record["messages"][1 + 2 * dropped:]))[0]) <= max_len)
        assert (ids, mask) == next(fitting, ([], [])) and lost == len(whole) - len(ids)
        assert bool(ids) == (max_len >= len(shortest[0]))


def test_what_answers_a_user_goes_with_it(tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    messages = [{"role": "user", "content": "1"}, call, {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "3"}, *chat("4", "5")["conversations"]]
    whole = len(tokenizer.render(messages)[0])
    ids, _, lost = render_to_fit({"messages": messages, "tools": None}, tokenizer, whole - 1)
    assert lost == whole - len(ids) and ids == tokenizer.render(messages[4:])[0]


def test_two_turns_of_a_user_go_together(tokenizer):
    messages = [*chat("1", "2")["conversations"], {"role": "user", "content": "3"}, *chat("4", "5")["conversations"]]
    whole = len(tokenizer.render(messages)[0])
    ids, _, lost = render_to_fit({"messages": messages, "tools": None}, tokenizer, whole - 1)
    assert lost == whole - len(ids) and ids == tokenizer.render(messages[2:])[0]


def test_a_conversation_left_without_an_answer_is_dropped(tokenizer):
    messages = chat("1", "2", "3")["conversations"]
    whole = len(tokenizer.render(messages)[0])
    assert render_to_fit({"messages": messages, "tools": None}, tokenizer, whole)[0]
    assert render_to_fit({"messages": messages, "tools": None}, tokenizer, whole - 1) == ([], [], whole)


def test_what_cannot_fit_is_dropped_and_counted(tmp_path, tokenizer, capsys):
    records = [chat("a", "b"), chat("a", "b " * 200), chat("a " * 200, "b", "c", "d"), chat("a", "b", "c " * 200)]
    path = write(tmp_path / "a.jsonl", records)
    data = SFTDataset(path, tokenizer, max_len=40)
    report = data.report
    assert (report["conversations"], report["dropped"], report["shortened"]) == (2, 2, 1)
    assert report["tokens"] + report["tokens_lost"] == sum(
        len(tokenizer.render(record["conversations"])[0]) for record in records)
    assert "2 conversations dropped" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the 4 conversations .* raise --max_len"):
        SFTDataset(path, tokenizer, max_len=4)


def test_a_text_file_has_no_conversations(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="a .txt file holds no conversations"):
        SFTDataset(tmp_path / "a.txt", tokenizer, max_len=40)


def test_a_template_that_refuses_names_the_line(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("a", "refuse")])
    template = tmp_path / "refusing.jinja"
    template.write_text("{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
                        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", encoding="utf-8")
    refusing = tokenizer.with_chat_template(template)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the chat template refuses"):
        SFTDataset(path, refusing, max_len=64)
    assert SFTDataset(path, refusing, max_len=64, on_bad_record="skip").report["skipped"] == 1


# --- bad records and arguments


def test_bad_records_stop_or_are_skipped(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"txt": "two"}, {"text": "three"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl:2: no \"text\" here"):
            PretrainDataset(path, tokenizer, max_len=16)
    assert not [file for file in jsonl.CACHE.iterdir() if file.is_dir()]
    for _ in range(2):
        data = PretrainDataset(path, tokenizer, max_len=16, on_bad_record="skip")
        assert (data.report["skipped"], data.report["documents"]) == (1, 2)
    assert capsys.readouterr().err.count("bad records skipped: 1") == 1
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        PretrainDataset(path, tokenizer, max_len=16)


@pytest.mark.parametrize("bad", [{"split": "test"}, {"val_fraction": 1.5}, {"max_len": 1}, {"on_bad_record": "ask"}])
def test_arguments(bad, tmp_path, tokenizer):
    with pytest.raises(UserError):
        PretrainDataset(documents(tmp_path / "a.jsonl"), tokenizer, **({"max_len": 16} | bad))


# --- the cache


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts):
        self.count += len(texts)
        return self.tokenizer.encode_batch(texts)

    def render(self, messages, **options):
        self.count += 1
        return self.tokenizer.render(messages, **options)


def test_tokens_are_computed_once_until_something_changes(tmp_path, tokenizer, monkeypatch):
    path = documents(tmp_path / "a.jsonl", 10)
    counting = Counting(tokenizer)
    first = PretrainDataset(path, counting, max_len=32)
    again = PretrainDataset(path, counting, max_len=64, split="train")
    assert counting.count == 10 and len(again) < len(first)
    same = PretrainDataset(path, counting, max_len=32)
    assert all((a[key] == b[key]).all() for a, b in zip(first, same, strict=True) for key in a)
    documents(path, 11, seed=1)
    assert PretrainDataset(path, counting, max_len=32).report["records"] == 11 and counting.count == 21
    os.utime(path, (1, 1))
    PretrainDataset(path, counting, max_len=32)
    assert counting.count == 32
    monkeypatch.setattr(tokens, "code_fingerprint", lambda *files: "edited")
    PretrainDataset(path, counting, max_len=32)
    assert counting.count == 43


def test_the_cache_of_conversations_knows_template_and_length(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", 10)
    counting = Counting(tokenizer)
    SFTDataset(path, counting, max_len=256)
    SFTDataset(path, counting, max_len=256, split="val")
    assert counting.count == 10
    SFTDataset(path, counting, max_len=255)
    assert counting.count == 20
    (tmp_path / "other.jinja").write_text(tokenizer.chat_template + " ", encoding="utf-8")
    counting.tokenizer = tokenizer.with_chat_template(tmp_path / "other.jinja")
    SFTDataset(path, counting, max_len=256)
    assert counting.count == 30


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_large_ids_survive_the_cache(vocab_size, tmp_path, tokenizer):
    large = Counting(tokenizer)
    large.vocab_size = vocab_size
    large.encode_batch = lambda texts: [[vocab_size - 1] for _ in texts]
    data = PretrainDataset(documents(tmp_path / "a.jsonl", 1), large, max_len=3)
    assert data[0]["input_ids"].tolist() == [tokenizer.bos_id, vocab_size - 1, tokenizer.eos_id]


def test_a_dataset_travels_to_another_process_without_its_tokens(tmp_path, tokenizer):
    data = PretrainDataset(write(tmp_path / "a.jsonl", [{"text": "word " * 50_000}]), tokenizer, max_len=4096)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert (pickle.loads(pickled)[3]["input_ids"] == data[3]["input_ids"]).all()


def test_of_two_builders_at_once_one_builds(tmp_path, tokenizer):
    path = documents(tmp_path / "a.jsonl", 3000)
    countings = [Counting(tokenizer), Counting(tokenizer)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda counting: PretrainDataset(path, counting, max_len=32), countings)
    assert sorted(counting.count for counting in countings) == [0, 3000] and first.report == second.report
    assert not list(jsonl.CACHE.glob("*.tmp"))


# --- memory


@pytest.mark.parametrize("cut", [True, False])
def test_texts_are_packed_in_groups_and_none_is_lost(cut, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lm_dataset, "GROUP", 7)
    paths = [documents(tmp_path / f"{number}.jsonl", 10 + number, seed=number) for number in range(3)]
    if cut:
        data = PretrainDataset(paths, tokenizer, max_len=24, split="train", val_fraction=0.3)
        assert data.report["loss_tokens"] == sum(int(row["loss_mask"].sum()) for row in data)
        assert data.report["records"] == 33 - 9
    else:
        paths = [chats(path, 10) for path in paths]
        data = SFTDataset(paths, tokenizer, max_len=256)
        assert sum(int(row["segment_ids"].max()) for row in data) == data.report["conversations"] == 30
    assert data.report["padding"] == pytest.approx(np.mean([(row["segment_ids"] == 0).mean() for row in data]))


def peak_memory(path, tokenizer):
    """Bytes at the peak of opening a file for the first time and reading a few rows of it, numpy's arrays included."""
    tracemalloc.start()
    data = PretrainDataset(path, tokenizer, max_len=64, split="train")
    stream = row_stream(data, 0)
    assert all(data[stream(place)]["loss_mask"].any() for place in range(5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer, monkeypatch):
    """tests/bigdata.py is this on gigabytes, with the memory of the whole process."""
    for module, name, value in ((tokens, "BATCH_CHARACTERS", 1 << 14), (lm_dataset, "GROUP", 1 << 10),
                                (lm_dataset, "SLOTS", 1 << 12), (jsonl, "CHUNK", 1 << 16)):
        monkeypatch.setattr(module, name, value)
    sizes = (2_000, 16_000)
    small, large = (peak_memory(write(tmp_path / f"{count}.jsonl", [{"text": f"text {n}"} for n in range(count)]),
                                tokenizer) for count in sizes)
    rows = sizes[1] // 10                                  # the order of an epoch is 8 bytes for each of the rows
    assert large - small < 8 * rows + 20_000, (small, large)


# --- in the model


def test_a_packed_row_gives_the_logits_of_its_texts_alone(tmp_path, tokenizer):
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for data in (PretrainDataset(documents(tmp_path / "a.jsonl", 12), tokenizer, max_len=96),
                 SFTDataset(chats(tmp_path / "b.jsonl", 8), tokenizer, max_len=256)):
        batch = collate([data[-3], data[-2], data[-1]])
        assert {key: value.dtype for key, value in batch.items()} == {
            "input_ids": torch.int64, "loss_mask": torch.uint8, "segment_ids": torch.int64, "positions": torch.int64}
        with torch.no_grad():
            packed = model(batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]).logits
            for row, logits in enumerate(packed):
                for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                    here = batch["segment_ids"][row] == segment
                    alone = model(batch["input_ids"][row][here][None]).logits[0]
                    torch.testing.assert_close(logits[here], alone, atol=1e-5, rtol=0)
        assert int(batch["segment_ids"].max()) > 1
