"""Several ranks compute what one computes, copied (DDP) or sharded (FSDP2), and a run may change their number."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset import jsonl
from model.checkpoint import load_model
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from tests.conftest import write_chats, write_documents
from tests.ranks_worker import run_job

WORKER = Path(__file__).with_name("ranks_worker.py")
FLAGS = dict(max_len=48, batch_size=7, micro_batch_size=2, log_every=3, eval_every=2, eval_rows=5, sample_every=3,
             save_every=2, device="cpu", warmup_steps=2, max_steps=4, optimizer="adamw", dtype="float64")
# 7 rows leave the second rank one short, micro-batches of 2 leave a last one of 1 row, and masks are ragged: documents
# and conversations of many lengths. In float64 equal means equal; in float32, equal gradients.
MODELS = {
    "mixture": ("train_pretrain", dict(size="moe.json")),
    "muon": ("train_pretrain", dict(size="moe.json", optimizer="muon")),
    "chat": ("train_full_sft", dict()),
    "single": ("train_pretrain", dict(dtype="float32")),
}
MICRO = {f"chat, {micro} at once, {how}": dict(micro_batch_size=micro, batch_size=8, parallel=how)
         for micro, how in [(1, "ddp"), (4, "ddp"), (1, "fsdp")]}


def together(folder, jobs, ranks=2):
    """Do jobs of ranks_worker.py on so many ranks; returns {name: [what each rank kept]}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen([sys.executable, str(WORKER), str(folder), json.dumps(jobs)], env=env,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        told = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()                                               # the other one, when one hangs
    assert not any(process.returncode for process in processes), "\n".join(told)
    return {job["name"]: [torch.load(folder / f"{job['name']}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            for job in jobs}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a mixture of experts, and a model for fine-tuning."""
    folder = tmp_path_factory.mktemp("ranks")
    write_documents(folder / "documents.jsonl")
    write_chats(folder / "chats.jsonl")
    config = ModelConfig(Tokenizer.load("nano").vocab_size, 32, 64, 2, 2, 1, head_dim=32, num_experts=4,
                         num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=32, router="sigmoid",
                         aux_loss_coef=0.01)
    (folder / "moe.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kept(place):
    """{name: what each rank kept}: everything runs once, on two ranks started once, and here."""
    def job(name, script="train_pretrain", changes=(), run=None, die_at=None):
        flags = {**FLAGS, "out": str(place / (run or name)), **dict(changes)}
        if script == "train_pretrain":
            flags.update(data=str(place / "documents.jsonl"), tokenizer="nano", size=flags.get("size", "1x32"))
            flags["size"] = flags["size"].replace("moe.json", str(place / "moe.json"))
        else:
            flags.update(data=str(place / "chats.jsonl"), model=str(place / "base"))
        return {"name": name, "script": script, "flags": flags, "die_at": die_at}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", place / "cache")
        here = [job("base", changes=dict(max_steps=1)),
                *(job(f"{name}, alone", *about) for name, about in MODELS.items()),
                job("chat, 8 at once, alone", "train_full_sft", dict(micro_batch_size=8, batch_size=8)),
                job("whole", changes=dict(max_steps=6)),
                job("1 of 1-2-1", changes=dict(max_steps=6), run="1-2-1", die_at=3)]
        kept = {about["name"]: [run_job(place, **about)] for about in here}
        kept |= together(place, [
            *(job(f"{name}, {how}", script, {**changes, "parallel": how})
              for name, (script, changes) in MODELS.items() for how in ("ddp", "fsdp")),
            *(job(name, "train_full_sft", changes) for name, changes in MICRO.items()),
            *(job(f"bfloat16, {how}", changes=dict(dtype="bfloat16", parallel=how, optimizer="muon"))
              for how in ("ddp", "fsdp")),
            job("2 of 1-2-1", changes=dict(max_steps=6, parallel="fsdp"), run="1-2-1", die_at=3),
            job("1 of 2-2-1", changes=dict(max_steps=6, parallel="ddp"), run="2-2-1", die_at=3),
            job("2 of 2-2-1", changes=dict(max_steps=6, parallel="fsdp"), run="2-2-1", die_at=3)])
        for name in ("3 of 1-2-1", "3 of 2-2-1"):
            alone = dict(max_steps=6, parallel="fsdp")                   # means nothing on one rank
            kept[name] = [run_job(place, **job(name, changes=alone, run=name.split()[-1]))]
    return kept


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry.get("loss", entry.get("val_loss")) for entry in map(json.loads, lines)]


def far(tensor, from_tensor):
    """Distance in units of the norm."""
    return torch.dist(tensor, from_tensor) / from_tensor.norm()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one(name, how, kept, place):
    one, = kept[f"{name}, alone"]
    two = kept[f"{name}, {how}"]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert far(two[0]["gradients"][0], one["gradients"][0]) <= 1e-6
    if one["weights"].dtype == torch.float64:
        assert torch.allclose(two[0]["weights"], one["weights"], rtol=0, atol=1e-9)
    assert losses(place / f"{name}, {how}") == pytest.approx(losses(place / f"{name}, alone"), rel=1e-5)
    load_model(place / f"{name}, {how}")


@pytest.mark.parametrize("name", MICRO)
def test_ranks_and_micro_batches_together_change_nothing(name, kept):
    one, = kept["chat, 8 at once, alone"]
    two = kept[name]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert all(far(a, b) <= 1e-8 for a, b in zip(two[0]["gradients"], one["gradients"], strict=True))
    assert torch.allclose(two[0]["weights"], one["weights"], rtol=0, atol=1e-9)


def test_a_rank_holds_a_share_of_every_weight(kept):
    whole = kept["mixture, alone"][0]["elements"]
    assert [rank["elements"] for rank in kept["mixture, ddp"]] == [whole, whole]
    shares = [rank["elements"] for rank in kept["mixture, fsdp"]]
    assert sum(shares) == whole and max(shares) < 0.51 * whole


def test_sixteen_bit_products_differ_by_rounding_only(kept, place):
    """Gains and routers are rounded too where weights are gathered in 16 bits; the weights themselves stay as fine."""
    copied, sharded = kept["bfloat16, ddp"][0], kept["bfloat16, fsdp"][0]
    assert sharded["weights"].dtype == torch.float32
    assert far(sharded["gradients"][0], copied["gradients"][0]) < 0.01
    assert losses(place / "bfloat16, fsdp") == pytest.approx(losses(place / "bfloat16, ddp"), abs=0.01)


@pytest.mark.parametrize("run", ["1-2-1", "2-2-1"])
def test_a_run_continues_on_another_number_of_ranks(run, kept, place):
    """Killed in step 3 and in step 5: the next part goes on from step 2 and 4 with the rows that come next."""
    whole, = kept["whole"]
    first, second, third = (kept[f"{part} of {run}"] for part in (1, 2, 3))
    assert torch.allclose(third[0]["weights"], whole["weights"], rtol=0, atol=1e-9)
    assert losses(place / run) == pytest.approx(losses(place / "whole"), rel=1e-6)
    trained = [[rank["rows"][step] for rank in part] for part, steps in ((first, 2), (second, 2), (third, 2))
               for step in range(steps)]
    assert [in_turn(ranks) for ranks in trained] == [rows for rows in whole["rows"]]
    assert len(whole["rows"]) == 6 and all(len(rows) == 7 for rows in whole["rows"])


def in_turn(shares):
    """The rows of a step in their order, of which rank r took every so-manieth from the r-th on."""
    return [share[place] for place in range(math.ceil(7 / len(shares))) for share in shares if place < len(share)]
