"""Bits per byte: exact on any text, the same for any cut into rows and batches, and honest about its interval."""

import json
import math

import numpy as np
import pytest
import torch

from dataset.lm_dataset import PretrainDataset, SFTDataset
from eval import eval_loss
from eval.eval_loss import evaluate_loss
from eval.intervals import bootstrap_ratio
from model.checkpoint import save_model
from model.config import new_config
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return CausalLM(new_config("1x32", tokenizer, 4096)).eval()


def test_it_is_the_summed_loss_over_the_bytes_of_the_text(model, tokenizer, tmp_path):
    """One document in one row, computed here from the definition."""
    text = "Ünïcode, 中文 and\nplain text. " * 8
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}), encoding="utf-8")
    scores = evaluate_loss(model, PretrainDataset(path, tokenizer, 2048), tokenizer, CPU)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
    nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    assert scores["targets"] == ids.shape[1] - 1 and scores["bytes"] == len(text.encode())
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / scores["targets"]), rel=1e-4)


def test_packing_and_batches_do_not_change_the_score(model, tokenizer, documents):
    alone = evaluate_loss(model, PretrainDataset(documents, tokenizer, 1024), tokenizer, CPU, batch_size=1)
    packed = evaluate_loss(model, PretrainDataset(documents, tokenizer, 4096), tokenizer, CPU, batch_size=7)
    assert packed["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=0.02)     # only cut documents differ
    assert packed["bytes"] == alone["bytes"] == sum(
        len(json.loads(line)["text"]) for line in documents.read_text().splitlines())


def test_ranks_share_the_rows(model, tokenizer, documents, monkeypatch):
    data = PretrainDataset(documents, tokenizer, 64)
    whole = evaluate_loss(model, data, tokenizer, CPU)
    shares = []
    monkeypatch.setattr(eval_loss.dist, "all_gather_object", lambda out, sums: shares.append(sums))
    for rank in range(3):
        with pytest.raises(TypeError):                       # the fake gather returns nothing to sum up
            evaluate_loss(model, data, tokenizer, CPU, rank=rank, world_size=3)
    rows = np.array([row for share in shares for row in share])
    assert len(rows) == len(data)
    assert rows[:, 0].sum() / math.log(2) / rows[:, 2].sum() == pytest.approx(whole["bits_per_byte"], rel=1e-6)


def test_the_mode_of_the_model_is_left_as_it_was(model, tokenizer, documents):
    model.train()
    evaluate_loss(model, PretrainDataset(documents, tokenizer, 64), tokenizer, CPU, max_rows=2)
    assert model.training
    model.eval()


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        bytes_, noise = rng.integers(20, 60, size=60), rng.normal(0, 20, size=60)
        low, high = bootstrap_ratio(2.0 * bytes_ + noise, bytes_, resamples=300, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("kind", ["text", "documents", "chats"])
def test_command_line(kind, model, tokenizer, documents, chats, tmp_path, capsys):
    save_model(tmp_path / "model", model, tokenizer)
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was a text. " * 30, encoding="utf-8")
    path = {"text": text, "documents": documents, "chats": chats}[kind]
    cfg = eval_loss.Config(model=str(tmp_path / "model"), data=str(path), device="cpu", max_len=128,
                           out=str(tmp_path / "scores.json"))
    eval_loss.main(cfg)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"{scores['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert scores["bits_per_byte_interval"][0] <= scores["bits_per_byte"] <= scores["bits_per_byte_interval"][1]
    expected = SFTDataset if kind == "chats" else PretrainDataset
    assert scores["bytes"] == expected(path, tokenizer, 128).report["bytes"]
