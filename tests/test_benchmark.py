"""The benchmark: contenders do the work they say, ratios are taken within rounds, and a run leaves its JSON."""

import json

import pytest

from model.checkpoint import save_model
from model.tokenizer import Tokenizer
from scripts import benchmark


@pytest.mark.parametrize("work", benchmark.WORKS)
def test_every_contender_does_its_work(work, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)                  # where quantize keeps its random checkpoint
    cfg = benchmark.Config(size="1x64", tokenizer="nano", batch_size=2, max_len=64)
    if work == "quantize":
        save_model(tmp_path / "chat", benchmark.ours(cfg), Tokenizer.load("nano"))
        cfg.model, cfg.data = str(tmp_path / "chat"), str(chats)
    for name, make in benchmark.CONTENDERS[work].items():
        if "compiled" not in name and name != "TRL":
            step, tokens, model, *figures = make(cfg)
            step()
            assert 0 < tokens <= 2 * 64
            if work in ("train", "sft"):
                assert all(p.grad is None for p in model.parameters())        # a whole step: gradients are used up
            if work == "quantize":
                bits = {"fp32": 32, "bf16": 16, "int8": 8 + 32 / 80, "int4": 4.25, "nf4": 4.13}[name]
                assert figures[0]["bits"] == pytest.approx(bits, abs=0.1) and 700 < figures[0]["perplexity"] < 1500


def test_packed_and_padded_rows_hold_the_same_conversations():
    cfg = benchmark.Config(tokenizer="nano", batch_size=4, max_len=256)
    packed, padded = benchmark.packed(cfg, "cpu"), benchmark.padded(cfg, "cpu")
    assert (packed["segment_ids"] > 0).float().mean() > 0.9
    lengths = padded["attention_mask"].sum(1)
    assert sorted(lengths.tolist()) == lengths.tolist() and 4 < lengths.float().mean() < 150
    assert padded["attention_mask"][:, 0].all()


def test_a_run_leaves_ratios_and_a_table(tmp_path, capsys):
    out = tmp_path / "train.json"
    cfg = benchmark.Config(size="1x64", tokenizer="nano", batch_size=2, max_len=64, rounds=2, steps=1, out=str(out),
                           only="transformers, fp32; ours, fp32")
    benchmark.main("train", cfg)
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert list(figures["contenders"]) == ["transformers, fp32", "ours, fp32"]
    rival, ours = figures["contenders"].values()
    rates = [a / b for a, b in zip(rival["seconds"], ours["seconds"], strict=True)]
    assert ours["ratio"] == pytest.approx([sum(rates) / 2, min(rates), max(rates)]) and rival["ratio"] == [1, 1, 1]
    assert rival["parameters"] == ours["parameters"]
    printed = capsys.readouterr().out
    assert all(line in printed for line in benchmark.table(figures))
