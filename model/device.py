"""Where and how precisely things are computed: device, number format, process group, seeds, measured speed."""

import contextlib
import os
import random
import time

import numpy as np
import torch
import torch.distributed as dist

from model.errors import UserError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """The format of matrix products. `auto`: bfloat16 where the hardware is fast at it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` while weights stay float32; nothing to do for float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def start_process_group(device):
    """Join the ranks that torchrun started: (rank, world_size). A plain `python` run is (0, 1)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world_size


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
