"""Weighted data: the shares hold from the first block on, every source is seen evenly, and the stream is exact."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dataset import jsonl, lm_dataset
from dataset.builtin import generate
from dataset.jsonl import shares_of, weight_of
from dataset.lm_dataset import Mixture, PretrainDataset, SFTDataset, load_rows
from model.checkpoint import load_model
from model.errors import UserError
from model.tokenizer import Tokenizer
from tests.conftest import killed_after
from trainer import train_pretrain
from trainer.batches import row_stream, rows_of_step, share_of_rank


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


class Source:
    """So many rows, each of which says which it is."""

    def __init__(self, name, n):
        self.name, self.n = name, n
        self.report = {"records": n, "tokens": 8 * n, "dropped": 0, "padding": 0.1}

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        return {"input_ids": np.full(4, row), "name": self.name, "loss_mask": np.ones(4, np.uint8),
                "segment_ids": np.ones(4, np.int64), "positions": np.arange(4)}

    def where(self, row):
        return [f"{self.name}:{row}"]


def mixture(interleaved=False, **sources):
    """mixture(a=(rows, weight), …)"""
    total = sum(weight for _, weight in sources.values())
    return Mixture({name: Source(name, n) for name, (n, _) in sources.items()},
                   {name: weight / total for name, (_, weight) in sources.items()}, interleaved)


def drawn(data, places, seed=0):
    """[(name of the source, its row)] at places of the stream."""
    stream = row_stream(data, seed)
    return [(data[stream(place)]["name"], int(data[stream(place)]["input_ids"][0])) for place in places]


# --- spelling


@pytest.mark.parametrize("part, found", [
    ("a.jsonl:0.3", ("a.jsonl", 0.3)), ("a.jsonl", ("a.jsonl", None)), ("data/x:2", ("data/x", 2.0)),
    ("a:.5", ("a", 0.5)), (r"C:\x.jsonl:0.3", (r"C:\x.jsonl", 0.3)), (r"C:\x.jsonl", (r"C:\x.jsonl", None)),
    ("builtin:sft:1", ("builtin:sft", 1.0)), ("builtin:sft", ("builtin:sft", None)), ("a:-1", ("a:-1", None)),
    ("a:nan", ("a:nan", None)), (":3", (":3", None))])
def test_weights_are_told_from_paths(part, found):
    assert weight_of(part) == found


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:3").mkdir()
    assert weight_of("a:3") == ("a:3", None) and shares_of("a:3") == {}


def test_shares_sum_to_one():
    assert shares_of("a.jsonl:3, b.jsonl:1") == {"a.jsonl": 0.75, "b.jsonl": 0.25} and shares_of("a:7") == {"a": 1.0}
    assert shares_of("a.jsonl,b.jsonl") == shares_of(["a", "b"]) == shares_of("") == {}
    for paths, message in (("a:1,b", "b has no weight"), ("a:1,b:0", "weight of b is 0"), ("a:1,a:2", "twice")):
        with pytest.raises(UserError, match=message):
            shares_of(paths)


def test_the_builtin_world_takes_weights(monkeypatch):
    monkeypatch.setattr(generate, "ensure", lambda kind: f"/{kind}.jsonl")
    assert generate.resolve("builtin:0.5,a.jsonl:1", "sft") == "/sft.jsonl:0.5,a.jsonl:1"
    assert generate.resolve("builtin:pretrain:0.5,builtin", "sft") == "/pretrain.jsonl:0.5,/sft.jsonl"
    with pytest.raises(UserError, match="the built-in world has"):
        generate.resolve("builtin:stories:0.5", "sft")


def test_weights_where_nothing_is_mixed_are_refused(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="weights belong to the --data of training"):
        PretrainDataset(f"{path}:0.5", tokenizer, max_len=16)


# --- the stream


@pytest.mark.parametrize("weights", [(0.9, 0.1), (1, 1, 1), (5, 3, 0.004), (1,), (0.123, 0.456, 0.789, 1e-3)])
def test_shares_hold_to_within_a_row_after_every_block(weights):
    data = mixture(**{f"s{k}": (7 + 40 * k, weight) for k, weight in enumerate(weights)})
    block = max(1000, round(2 / min(data.shares)))
    names = [name for name, _ in drawn(data, range(3 * block))]
    for blocks in (1, 2, 3):
        for k, share in enumerate(data.shares):
            assert abs(names[:blocks * block].count(f"s{k}") - share * blocks * block) < 1 + 1e-9
    if len(weights) > 1:
        assert names[:block] != names[block:2 * block] != sorted(names[block:2 * block])


def test_a_source_shows_every_row_before_it_shows_one_again():
    data = mixture(a=(300, 0.9), b=(40, 0.1))
    seen = drawn(data, range(1000))
    own = {name: [row for source, row in seen if source == name] for name in "ab"}
    assert len(own["a"]) == 900 and len(own["b"]) == 100
    for name, n in (("a", 300), ("b", 40)):
        rounds = [own[name][start:start + n] for start in range(0, len(own[name]) - n + 1, n)]
        assert all(sorted(rows) == list(range(n)) for rows in rounds) and rounds[0] != rounds[1] != list(range(n))
    assert drawn(data, range(1000), seed=1) != seen


def test_a_place_is_the_same_however_one_comes_to_it():
    data = mixture(a=(30, 0.7), b=(4, 0.2), c=(1, 0.1))
    forward = drawn(data, range(4000))
    assert drawn(data, range(3999, -1, -37)) == forward[::-37]


def test_ranks_share_the_steps_of_a_mixture():
    data, cfg = mixture(a=(30, 0.7), b=(4, 0.3)), SimpleNamespace(seed=3, batch_size=7)
    for step in (1, 5, 143, 144):
        rows = rows_of_step(row_stream(data, 3), cfg.batch_size, step, 10_000)
        for world_size in (1, 2, 3):
            found = [int(row) for rank in range(world_size)
                     for batch in share_of_rank(Rows(data), rows, rank, world_size, 2)
                     for row, mask in zip(batch["rows"], batch["loss_mask"], strict=True) if mask.any()]
            assert sorted(found) == sorted(rows) and len(rows) == 7


class Rows:
    """The rows of a mixture without the name, which is no array."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, row):
        return {key: value for key, value in self.data[row].items() if key != "name"}


def test_what_a_mixture_reports_and_where_its_rows_are():
    data = mixture(a=(300, 0.9), b=(100, 0.1))
    assert len(data) == 400 and data.report["records"] == 400 and data.report["padding"] == pytest.approx(0.1)
    assert data.report["repeats"] == pytest.approx({"a": 1.2, "b": 0.4})
    assert [data.where(row) for row in (0, 299, 300, 399, -1)] == [["a:0"], ["a:299"], ["b:0"], ["b:99"], ["b:99"]]
    with pytest.raises(IndexError):
        data[400]


def test_the_first_rows_of_the_held_out_part_come_from_every_source():
    data = mixture(interleaved=True, a=(300, 0.9), b=(100, 0.1))
    rows = [(data[row]["name"], int(data[row]["input_ids"][0])) for row in range(400)]
    assert sorted(rows) == [("a", row) for row in range(300)] + [("b", row) for row in range(100)]
    assert [name for name, _ in rows[:40]].count("b") == 10


# --- in training


def write(path, word, count):
    records = [{"text": f"{word} {number} " * (1 + number % 7)} for number in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_every_source_keeps_its_own_part_for_validation(tmp_path, tokenizer):
    first, second = write(tmp_path / "a.jsonl", "cat", 60), tmp_path / "folder"
    second.mkdir()
    for name in "bc":
        write(second / f"{name}.jsonl", "dog", 30)
    paths = f"{first}:0.2,{second}:0.8"
    train, val = (load_rows(PretrainDataset, paths, tokenizer, 32, split, val_fraction=0.2)
                  for split in ("train", "val"))
    places = [{place for row in range(len(data)) for place in data.where(row)} for data in (train, val)]
    assert not places[0] & places[1] and len(places[0]) == 96
    assert [sum(str(path) in place for place in places[1]) for path in (first, second)] == [12, 12]
    assert train.report["repeats"].keys() == {str(first), str(second)} and train.report["records"] == 96
    alone = load_rows(PretrainDataset, str(first), tokenizer, 32, "val", val_fraction=0.2)
    assert isinstance(alone, PretrainDataset)
    assert {place for row in range(len(alone)) for place in alone.where(row)} < places[1]


def test_conversations_mix_too(chats, tmp_path, tokenizer):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(chats.read_bytes())
    data = load_rows(SFTDataset, f"{chats}:1,{copy}:3", tokenizer, 128, "all")
    assert data.report["conversations"] == 120 and data.report["tokens_lost"] == data.report["shortened"] == 0
    assert data.report["repeats"] == {str(chats): 0.5, str(copy): 1.5}


def test_a_run_on_a_mixture_continues_exactly(tmp_path):
    data = f"{write(tmp_path / 'a.jsonl', 'cat', 50)}:0.9,{write(tmp_path / 'b.jsonl', 'dog', 20)}:0.1"

    def train(out):
        return train_pretrain.main(train_pretrain.Config(
            data=data, out=str(tmp_path / out), size="1x32", tokenizer="nano", max_len=48, batch_size=4, max_steps=6,
            eval_every=0, sample_every=0, save_every=2, device="cpu", log_every=1))

    train("whole")
    with killed_after(3):
        train("cut")
    train("cut")
    whole, cut = (load_model(tmp_path / out)[0].state_dict() for out in ("whole", "cut"))
    assert all((whole[key] == cut[key]).all() for key in whole)


def test_the_plan_of_rows_is_made_once(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", "cat", 60)
    first = PretrainDataset(path, tokenizer, 32)
    with monkeypatch.context() as patch:
        patch.setattr(lm_dataset, "plan_rows", None)
        again = PretrainDataset(path, tokenizer, 32)
        assert again.report == first.report and all((a["input_ids"] == b["input_ids"]).all()
                                                    for a, b in zip(first, again, strict=True))
    for options in ({"max_len": 33}, {"split": "train"}, {"split": "train", "val_fraction": 0.3},
                    {"split": "train", "seed": 1}):
        PretrainDataset(path, tokenizer, **{"max_len": 32, **options})
    assert len([folder for folder in jsonl.CACHE.glob("rows-*") if folder.is_dir()]) == 5
