"""What a run survives, tried for real. By hand: the suite has a smaller version of each.

    python tests/kills.py [--kills 20] [--seed 0] [--parts kills,disk,hosts] [--out tests/results/kills.json]

kills   pretraining and fine-tuning, each killed with SIGKILL at a random moment between start and end, so many times,
        and started again: the final weights must be those of the run that nobody disturbed, bit for bit
disk    a disk that fills up while a run saves: one line, and after making room the same command ends with the same bits
        (Linux, as root: it mounts a small one)
hosts   two machines as two network namespaces that meet through torchrun's c10d: they train what one rank trains; the
        cable is pulled: both say so within the time limit; plugged in again, they continue to the same weights
        (Linux, as root, with iproute2)
"""

import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from model.cli import arg, parse_args
from model.errors import run as run_script

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMON = {"device": "cpu", "max_len": 48, "batch_size": 8, "warmup_steps": 2, "log_every": 1, "eval_every": 7,
          "eval_rows": 8, "sample_every": 11, "save_every": 2, "max_steps": 40}
PULLED = 20              # seconds after which a silent host is given up in `hosts`; 600 in real runs


@dataclass
class Config:
    kills: int = arg(20, "kills per stage")
    seed: int = arg(0, "seed of the moments")
    parts: str = arg("kills,disk,hosts", "what to try, by commas")
    out: str = arg("", "write the results to this JSON file; it keeps those of parts that are not tried now")


def command(stage, work, out, **changes):
    """The words of a train command on small data."""
    flags = {**COMMON, "out": out, **changes}
    if stage == "pretrain":
        flags = {"data": work / "documents.jsonl", "size": "2x64", "tokenizer": "nano", **flags}
    else:
        flags = {"data": work / "chats.jsonl", "model": work / "pretrain", **flags}
    return [f"trainer/train_{stage}.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def start(words, **options):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finish(process):
    """(exit code, output)."""
    told = process.communicate(timeout=600)[0]
    return process.returncode, told


def complete(words):
    code, told = finish(start(words))
    assert code == 0, told


def fingerprint(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def last_step(told):
    return max((int(step) for step in re.findall(r"^(\d+)/\d+ ", told, re.MULTILINE)), default=0)


# ------------------------------------------------------------------------------------------------ kills


def interrupted(out):
    """What was being written when the process died."""
    resume = out / "resume"
    pointer = (resume / "latest").read_text().split()[0] if (resume / "latest").exists() else ""
    if any(out.glob(".sav*")):
        return "exporting the checkpoint"
    if any(path.name > pointer for path in resume.glob("step-*")) or (resume / "latest.new").exists():
        return "writing the state"
    if len(list(resume.glob("step-*"))) > 1:
        return "removing the old state"
    return "between two saves" if pointer else "before the first save"


def try_kills(cfg, work):
    results, moments = [], random.Random(cfg.seed)
    for stage in ("pretrain", "full_sft"):
        complete(command(stage, work, work / stage))
        print(f"\n{stage}\n{'killed after step':>17}  {'and':>6}  {'while':<25}  final weights")
        for number in range(cfg.kills):
            out = work / f"{stage}-{number}"
            step, delay = moments.randrange(COMMON["max_steps"]), moments.uniform(0, 0.3)     # a step and its save: 0.3
            process = start(command(stage, work, out))
            for line in process.stdout:
                if line.startswith(f"{step}/" if step else f"{stage}: "):
                    time.sleep(delay)
                    process.kill()
            assert finish(process)[0] == -signal.SIGKILL
            was = interrupted(out)
            complete(command(stage, work, out))
            equal = fingerprint(out) == fingerprint(work / stage)
            print(f"{step:>17}  {delay:>4.2f} s  {was:<25}  {'the same bits' if equal else 'DIFFERENT'}", flush=True)
            results.append({"stage": stage, "step": step, "delay": round(delay, 3), "while": was, "equal": equal})
    return results


# ------------------------------------------------------------------------------------------------ disk


@contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def try_full_disk(cfg, work):
    """The disk fills to different degrees, so that different files are the ones that do not fit: of the state, of the
    checkpoint (where older states stay), and metrics.jsonl (where nothing is saved before the end)."""
    results = []
    complete(command("pretrain", work, work / "undisturbed"))
    print(f"\ndisk filled during training\n{'free':>8}  {'saved':<9}  what the same command did then; what was told")
    tries = [*((kilobytes, {"save_every": 10}) for kilobytes in (0, 300, 700, 1100, 1500)),
             *((kilobytes, {"save_every": 10, "keep_saves": 9}) for kilobytes in (1900, 2300)),
             (0, {"save_every": 1000})]
    for number, (kilobytes, changes) in enumerate(tries):
        with small_disk(work / f"disk{number}", 40) as disk:
            out = disk / "run"
            process, lines = start(command("pretrain", work, out, **changes)), []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("13/"):                  # the first save has ended, the second is seven steps away
                    fill(disk, kilobytes)
            code = process.wait()
            pointer = out / "resume" / "latest"
            saved = pointer.read_text() if pointer.exists() else "nothing"
            (disk / "ballast").unlink()
            complete(command("pretrain", work, out, **changes))
            equal = fingerprint(out) == fingerprint(work / "undisturbed")
        told = [line for line in lines if line.startswith(("error: ", "Traceback"))]
        print(f"{kilobytes:>5} KB  {saved[-9:]:<9}  {'the same bits' if equal else 'DIFFERENT'}   "
              f"{''.join(told).strip()}", flush=True)
        results.append({"free_kb": kilobytes, **changes, "code": code, "equal": equal,
                        "one_line": code == 2 and lines[-1:] == told})
    return results


def fill(disk, kilobytes):
    """Leave so much room on a disk."""
    status = os.statvfs(disk)
    with suppress(OSError), open(disk / "ballast", "wb") as ballast:    # the run may take the last of it first
        ballast.write(bytes(max(status.f_bavail * status.f_frsize - 1000 * kilobytes, 0)))


# ------------------------------------------------------------------------------------------------ hosts

NAMES = ("acorn-a", "acorn-b")


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=not check)


@contextmanager
def two_hosts():
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    for name in NAMES:
        ip("netns", "del", name, check=False)
        ip("netns", "add", name)
    try:
        ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for number, name in enumerate(NAMES, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)


def start_host(number, words, folder, port):
    """torchrun on one of the hosts. Its train script gives up a silent rank after PULLED seconds."""
    script = folder / "impatient.py"
    script.write_text(f"import sys, datetime, runpy\nsys.path[0] = {str(ROOT)!r}\nimport model.device\n"
                      f"model.device.RANK_TIMEOUT = datetime.timedelta(seconds={PULLED})\n"
                      f"runpy.run_path({str(ROOT / words[0])!r}, run_name='__main__')\n")
    launcher = ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--node_rank", str(number), "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                f"10.77.0.1:{port}", "--rdzv_conf", f"is_host={number == 0}",      # both have the same host name here
                "--local_addr", f"10.77.0.{number + 1}", str(script), *words[1:]]
    return subprocess.Popen(launcher, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"})


def try_hosts(cfg, work):
    import torch

    from model.checkpoint import load_model
    same = {"dtype": "float64", "optimizer": "adamw", "max_steps": 400, "sample_every": 0}
    complete(command("pretrain", work, work / "one-rank", **same))
    results = []
    for shared in (True, False):
        outs = [work / f"hosts-{shared}-{0 if shared else number}" for number in range(2)]
        with two_hosts():
            hosts = [start_host(n, command("pretrain", work, outs[n], **same), work, 29500) for n in range(2)]
            for line in hosts[0].stdout:                    # the lower address is rank 0
                if line.startswith("100/"):
                    pulled = time.monotonic()
                    ip("-n", NAMES[0], "link", "set", "cable", "down")
                    break
            lines = [next((line.strip() for line in host.stdout if line.startswith("error: ")), "") for host in hosts]
            seconds = time.monotonic() - pulled
            for host in hosts:
                host.kill()                                 # torchrun itself still waits for the other
            print(f"\nhosts with {'one run folder' if shared else 'a run folder each'}: cable pulled after step 100; "
                  f"both told after {seconds:.0f} s\n  A {lines[0]}\n  B {lines[1]}", flush=True)
            ip("-n", NAMES[0], "link", "set", "cable", "up")
            hosts = [start_host(n, command("pretrain", work, outs[n], **same), work, 29501) for n in range(2)]
            ended = [finish(host) for host in hosts]
            assert not any(code for code, _ in ended), ended
        alone, together = (load_model(folder, dtype=torch.float64)[0].state_dict()
                           for folder in (work / "one-rank", outs[0]))
        far = max(float((alone[name] - together[name]).abs().max()) for name in alone)
        print(f"  then to the end; largest difference of a weight from the run of one rank {far:.1e}")
        results.append({"shared_folder": shared, "told_after": round(seconds), "one_line": all(lines),
                        "difference": far, "equal": far < 1e-6})
    return results


def main(cfg):
    from tests.conftest import write_chats, write_documents
    parts = {"kills": try_kills, "disk": try_full_disk, "hosts": try_hosts}
    results = json.loads(pathlib.Path(cfg.out).read_text()) if cfg.out and pathlib.Path(cfg.out).exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        write_documents(work / "documents.jsonl"), write_chats(work / "chats.jsonl")
        for part in cfg.parts.split(","):
            results[part] = parts[part](cfg, work)
    good = all(result["equal"] and result.get("one_line", True) for part in results.values() for result in part)
    if cfg.out:
        pathlib.Path(cfg.out).parent.mkdir(exist_ok=True)
        lines = [f' "{part}": [\n  ' + ",\n  ".join(map(json.dumps, tried)) + "\n ]" for part, tried in results.items()]
        pathlib.Path(cfg.out).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print("\nall good" if good else "\nNOT GOOD: see above")
    sys.exit(not good)


if __name__ == "__main__":
    run_script(main, parse_args(Config, description=__doc__))
