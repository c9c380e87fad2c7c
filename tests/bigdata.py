"""Does memory stay the same when the data does not fit into it? By hand: the data is as large as you say.

    python tests/bigdata.py --gigabytes 3                       documents, pretraining
    python tests/bigdata.py --gigabytes 1 --kind sft            short conversations, fine-tuning

Writes a file of so many GB, trains a tiny model on it for a few steps, each time in a process of its own, and compares
with a file of a few MB: peak of the memory in use (VmHWM), peak of what of it is not a copy of a file (RssAnon), and
the time to the first step, at the first start (which reads, tokenises and packs the data) and at the second. Fails when
the large file costs 1 GB more than the small one, or its second start more than half a minute. Needs Linux.
"""

import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

SMALL = 0.005                      # GB
MOST_GB, MOST_SECONDS = 1.0, 30.0
STEPS = 20


def write_data(path, kind, gigabytes):
    """Write a jsonl file of about so many GB; returns its number of records. The texts repeat, which nobody notices."""
    from dataset.builtin.generate import KINDS
    rng = random.Random(0)
    pool = [json.dumps(record, ensure_ascii=False)[1:] for record in KINDS[kind][0](rng, 4000)]
    if kind == "pretrain":
        texts = [json.loads("{" + line)["text"] for line in pool]
        pool = [json.dumps({"text": "\n\n".join(rng.choices(texts, k=max(1, int(rng.lognormvariate(1.5, 1)))))},
                           ensure_ascii=False)[1:] for _ in range(4000)]
    count = written = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while written < gigabytes * 1e9:
            written += file.write(f'{{"id": {count}, {rng.choice(pool)}\n')
            count += 1
    return count


def train(kind, data, folder, out):
    """The child process: a few steps, with a cache of its own; says when the first step begins."""
    start = time.perf_counter()
    import torch

    from dataset import jsonl
    from trainer import batches, train_full_sft, train_pretrain
    torch.set_num_threads(1)
    jsonl.CACHE = folder / "cache"
    share_of_rank = batches.share_of_rank

    def announce(*args):
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
        batches.share_of_rank = share_of_rank
        return share_of_rank(*args)

    batches.share_of_rank = announce
    common = dict(data=str(data), out=str(folder / out), max_steps=STEPS, max_len=512, batch_size=8, device="cpu",
                  dtype="float32", sample_every=0, eval_every=0, val_fraction=1e-5, overwrite=True)
    if kind == "pretrain":
        train_pretrain.main(train_pretrain.Config(**common, size="1x32", tokenizer="nano"))
    else:
        train_full_sft.main(train_full_sft.Config(**common, model=str(folder / "parent")))


def measure(kind, data, folder, out):
    """Train in a child process → {"seconds" to the first step, peaks of "VmHWM", "RssAnon", "RssFile" in GB}."""
    command = [sys.executable, __file__, "--kind", kind, "--train", str(data), "--folder", str(folder), "--out", out]
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0.0)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def watch():
        while child.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024 / 1e9)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = child.communicate()[0]
    watcher.join()
    if child.returncode:
        sys.exit(f"the training process failed:\n{output}")
    seconds = next(json.loads(line)["seconds"] for line in output.splitlines() if line.startswith('{"seconds"'))
    return {"seconds": seconds, **peaks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the large file")
    parser.add_argument("--kind", choices=("pretrain", "sft"), default="pretrain", help="documents or conversations")
    parser.add_argument("--folder", type=pathlib.Path, help="where to work (kept); default: a temporary folder")
    parser.add_argument("--train", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(args.kind, args.train, args.folder, args.out)
    folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="bigdata-"))
    try:
        return compare(args.kind, args.gigabytes, folder)
    finally:
        if not args.folder:
            shutil.rmtree(folder)


def compare(kind, gigabytes, folder):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sft":
        write_data(folder / "parent.jsonl", "pretrain", SMALL)
        measure("pretrain", folder / "parent.jsonl", folder, "parent")
    print(f"{'file':>9} {'records':>10} {'start':>7} {'seconds to step 1':>18} {'peak GB':>8} {'anonymous':>10} "
          f"{'file pages':>11}")
    results = {}
    for size in (SMALL, gigabytes):
        data = folder / f"{kind}-{size}.jsonl"
        count = write_data(data, kind, size)
        for start in ("first", "second"):
            results[size, start] = found = measure(kind, data, folder, f"{size}-{start}")
            print(f"{size:>6g} GB {count:>10,} {start:>7} {found['seconds']:>18.1f} {found['VmHWM']:>8.3f} "
                  f"{found['RssAnon']:>10.3f} {found['RssFile']:>11.3f}", flush=True)
    growth = max(results[gigabytes, start]["VmHWM"] - results[SMALL, start]["VmHWM"] for start in ("first", "second"))
    wait = results[gigabytes, "second"]["seconds"] - results[SMALL, "second"]["seconds"]
    print(f"the large file takes {growth:.3f} GB more (limit {MOST_GB:g}); "
          f"its second start {wait:.1f} s more (limit {MOST_SECONDS:g})")
    return int(growth >= MOST_GB or wait >= MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
