"""The shapes of test_moe.py, and what one of its two ranks runs: apart from the tests, so that a rank starts fast."""

import dataclasses

import torch
from torch import nn

from model.config import ModelConfig
from model.moe import routers, update_router_bias
from model.transformer import CausalLM

SOFTMAX = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=64, num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=24, router="softmax", aux_loss_coef=0.01)
SIGMOID = dataclasses.replace(SOFTMAX, router="sigmoid", num_shared_experts=1, routed_scaling_factor=2.5,
                              first_k_dense=1)


def run(rank, folder):
    """Two ranks with different tokens; on rank 0 all of them go to expert 0, so the other experts have none."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = CausalLM(dataclasses.replace(SIGMOID, num_experts_per_tok=1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    router = routers(model)[0]
    for step in range(2):
        for _ in range(2):                                        # two micro-batches: their loads add up
            ids = torch.full((2, 6), 1) if rank == 0 else torch.arange(12).view(2, 6) + step
            wrapped(ids).logits.square().mean().backward()
        counted = router.load.clone()
        assert counted.sum() == 24
        torch.distributed.all_reduce(counted)
        before = router.e_score_correction_bias.clone()
        update_router_bias(wrapped, u=0.5)
        expected = before + 0.5 * torch.sign(counted.float().mean() - counted)
        assert torch.equal(router.e_score_correction_bias, expected)
    assert all(p.grad is not None for p in model.parameters())
    torch.save([router.e_score_correction_bias, [p.grad for p in model.parameters()]], f"{folder}/rank{rank}.pt")
    del wrapped        # holds the group: freed last, it would wait for gloo's thread, which may wait for Python's lock
    torch.distributed.destroy_process_group()
