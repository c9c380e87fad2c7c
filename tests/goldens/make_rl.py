"""Write tests/goldens/rl.json: what TRL 0.25 and torchtune 0.6.1 make of rewards, for the suite to compare with.

    python3 -m venv /tmp/venv457 && /tmp/venv457/bin/pip install torch numpy 'transformers==4.57.*' 'trl==0.25.*'
    /tmp/venv457/bin/pip install torchtune==0.6.1 torchao==0.9.0
    /tmp/venv457/bin/python tests/goldens/make_rl.py

GRPO and its variants are TRL's GRPOTrainer._compute_loss on a stub whose model "returns" random log-probabilities; what
is kept is its loss, the gradient of that by each log-probability, and the share of clipped tokens. PPO's losses, its
rewards per token and GAE are torchtune's, whose advantages are whitened but not centred: it adds their mean again.
All inputs are rounded to three digits, so that the file is all there is to know.
"""

import collections
import json
import pathlib
from types import SimpleNamespace

import torch
from torchtune import rlhf
from torchtune.rlhf.loss import PPOLoss
from trl import GRPOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.ppo_trainer import masked_whiten

OUT = pathlib.Path(__file__).with_name("rl.json")
N, T, LONGEST, ITEMS = 6, 7, 9, 40            # ITEMS: sampled tokens in the whole step, of which these rows are a part
LENGTHS = [7, 4, 1, 6, 3, 0]                  # the last one was masked: cut off


def numbers(*shape, low, high, generator):
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low).mul(1000).round() / 1000


def grpo(inputs, loss_type, level, low, high, beta):
    """TRL's loss of rows of log-probabilities, its derivative, and the clipped shares."""
    logprobs = inputs["logprobs"].clone().requires_grad_()
    metrics = {"train": collections.defaultdict(list)}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs)),
        model=SimpleNamespace(training=True), loss_type=loss_type, importance_sampling_level=level, epsilon_low=low,
        epsilon_high=high, beta=beta, top_entropy_quantile=1.0, use_vllm=False, max_completion_length=LONGEST,
        _metrics=metrics, current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x))
    empty = torch.zeros(N, 1, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(stub, None, {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": empty.expand(N, T),
        "completion_mask": inputs["mask"], "advantages": inputs["advantages"], "num_items_in_batch": ITEMS,
        "old_per_token_logps": inputs["old_logprobs"], "ref_per_token_logps": inputs["ref_logprobs"]})
    loss.backward()
    shares = {name: metrics["train"][f"clip_ratio/{name}_mean"][0] for name in ("low", "high")}
    return {"loss_type": loss_type, "level": level, "clip_low": low, "clip_high": high, "beta": beta, **shares,
            "loss": loss.item(), "gradient": logprobs.grad.tolist()}


def ppo(inputs, clip, value_clip):
    """torchtune's two losses and their derivatives."""
    logprobs, values = (inputs[name].clone().requires_grad_() for name in ("logprobs", "new_values"))
    mask = inputs["mask"].bool()
    loss, policy, value, _, clipped = PPOLoss(clip, value_clip, value_coeff=1.0)(
        inputs["old_logprobs"], logprobs, inputs["token_advantages"], inputs["values"], values, inputs["returns"],
        mask, mask)
    loss.backward()
    return {"clip": clip, "value_clip": value_clip, "policy_loss": policy.item(), "value_loss": value.item(),
            "clipped": clipped.item(), "gradient": logprobs.grad.tolist(), "value_gradient": values.grad.tolist()}


def main():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, low, high):
        return numbers(*shape, low=low, high=high, generator=generator)

    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    old = draw(N, T, low=-3, high=-0.05)
    inputs = {"mask": mask, "old_logprobs": old * mask, "logprobs": (old + draw(N, T, low=-0.5, high=0.5)) * mask,
              "ref_logprobs": (old + draw(N, T, low=-0.7, high=0.7)) * mask, "advantages": draw(N, low=-2, high=2),
              "token_advantages": draw(N, T, low=-2, high=2) * mask, "scores": draw(N, low=-1, high=1),
              **{name: draw(N, T, low=-1, high=1) * mask for name in ("values", "new_values", "returns")}}

    rows = slice(0, N - 1)                                   # torchtune puts a score somewhere even into an empty row
    rewards, _, _ = rlhf.get_rewards_ppo(inputs["scores"][rows], inputs["old_logprobs"][rows],
                                         inputs["ref_logprobs"][rows], 0.05, torch.tensor(LENGTHS[rows]) - 1)
    advantages, returns = rlhf.estimate_advantages(inputs["values"][rows], rewards, 0.98, 0.9, mask[rows].bool())
    white = masked_whiten(inputs["token_advantages"], mask.bool()) * mask
    lengths = list(range(4, 13))
    overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    cases = {
        "inputs": {name: value.tolist() for name, value in inputs.items()},
        "longest": LONGEST, "items": ITEMS,
        "grpo": {"grpo": grpo(inputs, "grpo", "token", 0.2, 0.2, 0.04),
                 "bnpo": grpo(inputs, "bnpo", "token", 0.2, 0.2, 0.0),
                 "dr_grpo": grpo(inputs, "dr_grpo", "token", 0.2, 0.2, 0.0),
                 "dapo": grpo(inputs, "dapo", "token", 0.1, 0.45, 0.0),
                 "gspo": grpo(inputs, "grpo", "sequence", 0.01, 0.03, 0.0)},
        "ppo": ppo(inputs, 0.2, 0.3),
        "gae": {"kl_coef": 0.05, "gamma": 0.98, "lam": 0.9, "rewards": rewards.tolist(), "returns": returns.tolist(),
                "advantages_plus_mean": advantages.tolist()},
        "whitened": white.tolist(),
        "overlong": {"longest": 10, "cache": 4, "lengths": lengths, "penalty": overlong([[0] * n for n in lengths])},
    }
    OUT.write_text(json.dumps(cases, indent=None).replace('}, "', '},\n "') + "\n", encoding="utf-8")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
