"""The reference of preference optimisation: what it gives every answer of the data is computed once, and kept on disk.

The reference is the policy before its first step, so no second model is ever in memory. (An adapter changes nothing
before its first step either: the base model is its reference.) The figures are a column of the rows: "ref" (2P,) per
row, the summed log-probability of each side. They are in out/cache/ under a hash of the weights, the rows (hence the
data, tokenizer, template and max_len), the number format and this code.
"""

import hashlib
import os

import numpy as np
import torch
from torch.utils.data import Subset

from dataset import jsonl
from dataset.jsonl import DiskArray, Progress
from dataset.tokens import code_fingerprint, hashed
from eval.eval_loss import map_rows
from model.logprobs import segment_sums, token_logprobs
from trainer import parallel

BLOCK = 4096             # rows whose figures are in memory at a time


def answer_logprobs(model, batch):
    """The log-probability of each answer in a batch of rows of pairs.

    Returns (sums over its tokens, its number of tokens), each (B, 2P) with chosen and rejected in turn and 0 where
    there is no pair, and the rows' auxiliary loss (B,).
    """
    mask, segments, sides = batch["loss_mask"], batch["segment_ids"], 2 * batch["pairs"].shape[1]
    logprobs, aux = token_logprobs(model, batch["input_ids"], None, segments, batch["positions"])
    return segment_sums(logprobs * mask, segments, sides), segment_sums(mask.to(logprobs), segments, sides), aux


def fingerprint(model):
    """Hash of the weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def reserve(*datasets):
    """Give rows a "ref" of zeros, for a rehearsal or a dry run."""
    for source in sources(datasets):
        source.columns["ref"] = np.broadcast_to(np.float32(0), (len(source), 2 * source.most_pairs))


def fill(run, model, weights, *datasets):
    """Give rows the "ref" of `model`, from the cache or computed now by all ranks. weights: its `fingerprint`."""
    for source in sources(datasets):
        width = np.dtype((np.float32, (2 * source.most_pairs,)))
        key = hashed(code_fingerprint(__file__), weights, source.pieces.path.parent.name, str(run.dtype),
                     run.device.type)
        path = jsonl.CACHE / f"reference-{key}.bin"
        if all(run.gather(path.exists())):
            run.print(f"  refer   log-probabilities of {len(source):,} rows, from the cache")
        else:
            run.print(f"  refer   computing the log-probabilities of {len(source):,} rows, once")
            compute(run, model, source, path)
        source.columns["ref"] = DiskArray(path, width)


def compute(run, model, data, path):
    """Write the log-probabilities of all answers to `path`, on every host."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    writes = os.environ.get("LOCAL_RANK", "0") == "0"
    progress = Progress("reference", len(data))
    with run.autocast(), parallel.whole(model), torch.compiler.set_stance("force_eager"), torch.no_grad():
        for start in range(0, len(data), BLOCK):
            rows = Subset(data, range(start, min(start + BLOCK, len(data))))
            sums = map_rows(lambda model, batch: answer_logprobs(model, batch)[0], model, rows, run.device,
                            run.cfg.micro_batch_size, rank=run.rank, world_size=run.world_size)
            if writes:
                with open(temporary, "ab") as file:
                    sums.astype(np.float32).tofile(file)
            progress.add(len(rows))
    if writes:
        os.replace(temporary, path)
    run.barrier()


def sources(datasets):
    """The datasets themselves, or the parts of those that are mixtures."""
    return [source for data in datasets for source in getattr(data, "sources", [data])]
