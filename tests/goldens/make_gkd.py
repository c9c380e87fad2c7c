"""Write tests/goldens/gkd.safetensors: TRL's generalized Jensen-Shannon divergence of random logits, and its gradient.

TRL 0.25 needs transformers 4, the suite runs transformers 5. So this needs an environment of its own:

    python3 -m venv /tmp/venv457 && /tmp/venv457/bin/pip install torch safetensors 'transformers==4.57.*' 'trl==0.25.*'
    /tmp/venv457/bin/python tests/goldens/make_gkd.py

The file holds student and teacher logits (B, T, V), mask (B, T) and, for every β and temperature τ, the mean over the
masked positions "loss β τ" and its derivative by the student's logits "grad β τ" (B, T, V).
"""

import pathlib
import sys

import torch
import trl
from safetensors.torch import save_file

BETAS = (0, 0.1, 0.5, 0.9, 1)
TEMPERATURES = (1.0, 2.0)

if __name__ == "__main__":
    if not trl.__version__.startswith("0.25."):
        sys.exit(f"this needs trl 0.25, not {trl.__version__}; see the top of this file")
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 2, 5, 11)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    labels = torch.zeros_like(mask).masked_fill(mask == 0, -100)
    tensors = {"student": student, "teacher": teacher, "mask": mask}
    for beta in BETAS:
        for temperature in TEMPERATURES:
            logits = student.clone().requires_grad_()
            loss = trl.GKDTrainer.generalized_jsd_loss(logits, teacher, labels, beta, temperature)
            loss.backward()
            tensors[f"loss {beta} {temperature}"] = loss.detach()
            tensors[f"grad {beta} {temperature}"] = logits.grad
            print(f"β {beta}, τ {temperature}: {loss.item():.6f}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              pathlib.Path(__file__).with_name("gkd.safetensors"))
