"""Where and how precisely things are computed: device, number format, process group, seeds, measured speed."""

import atexit
import contextlib
import os
import platform
import random
import re
import signal
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model.errors import UserError

# Large tensors in huge pages (torch reads this when it makes the first tensor; Linux only): a step on a CPU makes and
# drops hundreds of them, and with pages of 4 KB a tenth of its time goes into the system handing them out.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


RANK_TIMEOUT = timedelta(minutes=10)     # a rank that lets the others wait for so long is taken for lost
ANSWER_SECONDS = 5                       # for the others to say that they are still there
SETUP_TIMEOUT = timedelta(days=1)        # but reading data for the first time takes as long as it takes


def pick_device(name="auto"):
    """`auto` is CUDA, else Apple's MPS, else the CPU. Under torchrun every process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU is visible to torch; use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU is visible to torch; use --device cpu or auto")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")       # TF32 for what stays float32
    return device


def has_fast_bfloat16(device):
    """Whether bfloat16 matrix products are faster than float32 ones: Ampere and later, AVX512-BF16, AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(name, device):
    """The format of matrix products. `auto`: bfloat16 where the hardware is fast at it, float16 on the GPUs before
    those that have tensor cores all the same (Volta, Turing), float32 elsewhere."""
    if name == "auto" and not has_fast_bfloat16(device):
        old_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if old_tensor_cores else torch.float32
    if name == "auto":
        return torch.bfloat16
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` while weights stay float32; nothing to do for float32."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype) if half else contextlib.nullcontext()


def start_process_group(device):
    """Join the ranks that torchrun started: (rank, world_size). A plain `python` run is (0, 1)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=RANK_TIMEOUT)
        dist.distributed_c10d._get_default_store().set(f"host of {rank}", socket.gethostname())
        atexit.register(stop_process_group)
    return rank, world_size


def stop_process_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def explain_lost_ranks(error):
    """One line about `error`, if it says that the ranks of this run cannot reach each other any more; else ""."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)          # torchrun ends what is left of a run: not before it has told
    reason = str(error).splitlines()[0]
    if not dist.is_initialized():
        return f"the {world_size} ranks of this run did not find each other ({reason}); start the same on every host"
    silent = silent_ranks()
    who = f"no answer from {', '.join(silent)}" if silent else f"the ranks do not keep pace with each other ({reason})"
    return (f"{who}: a process or a host was lost, or stopped for a reason that it told itself. The same command, on "
            "every host, continues from the last save")


def silent_ranks():
    """Which ranks do not report within ANSWER_SECONDS of an operation that failed on all that are left."""
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ANSWER_SECONDS).close()
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        store.set(f"{dist.get_rank()} is there", "")
        silent, end = range(dist.get_world_size()), time.monotonic() + ANSWER_SECONDS
        while silent and time.monotonic() < end:
            time.sleep(0.1)
            silent = [rank for rank in silent if not store.check([f"{rank} is there"])]
        return [f"rank {rank} ({store.get(f'host of {rank}').decode()})" for rank in silent]
    except (OSError, dist.DistError):                      # the store is gone, with the host that kept it
        return ["the host of rank 0"]


def seed_all(seed):
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronize(device):
    """Wait for the device, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product here and now: the 100 % of "model FLOPs utilisation" (MFU)."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_in_use(device):
    """Peak bytes so far: of the GPU's allocator, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def describe_machine(device):
    """{"cpu", "cores", "instructions" (the vector units that torch uses), "gpu"}: to read a measured speed by."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else ""}


def cpu_name():
    """The processor as its maker calls it; its architecture where the system does not tell."""
    try:
        if platform.system() == "Linux":
            told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
            names = re.findall(r"^model name\s*: (.+)$", told, re.MULTILINE)
        else:                                                                     # on a Mac; Windows has no sysctl
            names = [subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()]
    except (OSError, subprocess.SubprocessError):
        names = []
    return names[0] if names else platform.processor() or platform.machine()
