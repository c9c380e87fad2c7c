"""Two ranks compute what one computes: gradients, weights, and both ranks the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from trainer import train_pretrain

WORKER = Path(__file__).with_name("ranks_worker.py")
FLAGS = dict(max_len=48, batch_size=7, micro_batch_size=2, log_every=1, eval_every=2, sample_every=0, save_every=2,
             device="cpu", warmup_steps=2, max_steps=4, optimizer="adamw")


def launch(script, folder, flags, ranks, die_at=None):
    """Run the worker with so many ranks and return what each rank kept; with die_at, nothing: all die at that step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *torchrun, str(WORKER), script, str(folder), json.dumps(flags),
                           *([str(die_at)] if die_at else [])],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    if die_at:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("script, dtype, size", [("train_pretrain", "float64", "moe"),
                                                 ("train_full_sft", "float64", "1x32"),
                                                 ("train_pretrain", "float32", "1x32")])
def test_two_ranks_equal_one(script, dtype, size, documents, chats, tmp_path):
    """7 rows leave the second rank one short, micro-batches of 2 leave a last one of 1 row, and masks are ragged."""
    flags = {**FLAGS, "dtype": dtype}
    if script == "train_pretrain":
        if size == "moe":
            size = str(tmp_path / "moe.json")
            Path(size).write_text(json.dumps(ModelConfig(
                Tokenizer.load("nano").vocab_size, 32, 64, 2, 2, 1, head_dim=32, num_experts=4, num_experts_per_tok=2,
                num_shared_experts=1, moe_intermediate_size=32, router="sigmoid", aux_loss_coef=0.01).to_hf()),
                encoding="utf-8")
        flags.update(data=str(documents), size=size, tokenizer="nano")
    else:
        train_pretrain.main(train_pretrain.Config(**{**FLAGS, "max_steps": 1, "data": str(documents), "size": "1x32",
                                                     "tokenizer": "nano", "out": str(tmp_path / "base")}))
        flags.update(data=str(chats), model=str(tmp_path / "base"))
    one, = launch(script, tmp_path, {**flags, "out": str(tmp_path / "one")}, 1)
    two = launch(script, tmp_path, {**flags, "out": str(tmp_path / "two")}, 2)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    first = one["gradients"][0]
    assert torch.dist(two[0]["gradients"][0], first) <= 1e-6 * first.norm()
    if dtype == "float64":
        assert torch.allclose(two[0]["weights"], one["weights"], rtol=0, atol=1e-10)
    lines = [map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines()) for run in ("one", "two")]
    losses = [[entry.get("loss", entry.get("val_loss")) for entry in run] for run in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    load_model(tmp_path / "two")


def test_a_run_of_two_ranks_continues_on_one(documents, tmp_path):
    """The order of examples does not depend on the ranks, so the rest of the run is the same in float64."""
    flags = {**FLAGS, "dtype": "float64", "data": str(documents), "size": "1x32", "tokenizer": "nano"}
    whole, = launch("train_pretrain", tmp_path, {**flags, "out": str(tmp_path / "whole")}, 1)
    launch("train_pretrain", tmp_path, {**flags, "out": str(tmp_path / "cut")}, 2, die_at=4)
    rest, = launch("train_pretrain", tmp_path, {**flags, "out": str(tmp_path / "cut")}, 1)
    assert len(rest["gradients"]) == 2
    assert torch.allclose(rest["weights"], whole["weights"], rtol=0, atol=1e-10)
