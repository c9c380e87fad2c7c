"""Several ranks train one model: copied to all of them (DDP) or cut up among them (FSDP2). One rank needs neither.

    ddp     every rank holds everything; gradients are averaged while the backward pass runs  (arXiv:2006.15704)
    fsdp    every rank holds 1/ranks of each weight, gradient and moment. The weights of a block are gathered when its
            turn comes, freed after it, and gathered again in the backward pass, whose gradients go to the ranks that
            hold them: ZeRO's third stage (arXiv:1910.02054), as torch's fully_shard does it  (arXiv:2304.11277)

Both train the same model from the same numbers: in float32 and float64 the averaged gradients are equal but for the
order of sums. With 16-bit products a block is gathered in 16 bits, which is half the traffic, and its products are
those of DDP under autocast; only its norm gains and its router are rounded too. (Gathered in float32, the rounded copy
that autocast makes would stay from the forward to the backward pass: a whole model on every rank.) Moments, the masters
of the weights and the sum of the gradients are float32 in either case.

A sharded tensor is a DTensor: it knows its whole shape, and elementwise arithmetic works on the shards alone. Saving
(`gather`) and resuming (`share`) go through whole tensors, so that a training state has one format: a run that was
saved under fsdp continues under ddp or on one rank, and the other way round.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.transformer import Block


def is_sharded(cfg, world_size):
    """Whether the weights are cut up. With one rank there is nobody to share with, and fsdp means nothing."""
    return cfg.parallel == "fsdp" and world_size > 1


def wrap(model, cfg, device, dtype, world_size, control):
    """The module that the loss goes through; gradients of its backward pass are averages over the ranks.

    For fsdp `model` may lie in main memory: block after block moves to the device, and only a shard of it stays there.
    It is the model itself that comes back, its parameters replaced by DTensors. control: a gloo group of all ranks.
    """
    sharded = is_sharded(cfg, world_size)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    model.model.activation_checkpointing = cfg.activation_checkpointing
    if world_size == 1:
        return model
    if not sharded:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
        wrapped.broadcast_buffers = False                    # they stay equal by themselves, see model/moe.py
        return wrapped
    for tensor in (*model.parameters(), *model.buffers()):   # as DDP does it: all start from what rank 0 has
        dist.broadcast(tensor.detach(), 0, group=control)
    half = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)     # embedding, last norm, head: needed first and last
    return model


def compile_in_place(model, sharded):
    """Compile forward and backward pass at their next call; names of parameters and what wraps the model stay."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks if sharded else [model]:            # gathering and freeing stay outside what is compiled
        module.compile()


def accumulating(wrapped, last):
    """Call before a forward pass: is it the `last` micro-batch of the step? DDP averages gradients only then.

    Sharded gradients are averaged after every micro-batch: to wait, a rank would have to hold whole ones.
    """
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = last


@contextmanager
def whole(model):
    """Inside, every rank has all the weights of a sharded model, and a forward pass is its own business.

    For evaluation and sampling, where ranks do different things. All ranks must enter; backward is not possible.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def full(tensor):
    """The whole of a tensor that may be sharded, on all ranks; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(state):
    """A state dict (dicts and lists of anything) whose sharded tensors are whole on rank 0, in main memory.

    All ranks must ask. What is not sharded stays as it is, and other ranks get None for what is.
    """
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()                              # one tensor at a time: other ranks drop it right away
    return tensor.cpu() if dist.get_rank() == 0 else None


@torch.no_grad()
def share(tensor, target):
    """Copy a whole tensor that only rank 0 need have (None elsewhere) into `target`: all of it, or a rank's shard."""
    if isinstance(target, DTensor):
        if tensor is None:
            tensor = torch.empty(target.shape, dtype=target.dtype)
        target.copy_(distribute_tensor(tensor.to(target.to_local()), target.device_mesh, target.placements))
        return
    if tensor is not None:
        target.copy_(tensor)
    if dist.is_initialized():
        dist.broadcast(target, 0)
