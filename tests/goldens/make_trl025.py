"""Write tests/goldens/trl025.json: preference losses as TRL 0.25 computes them, for the suite to compare with.

TRL 0.25 is the last one whose losses are methods that can be called by themselves, and it needs transformers 4:

    python3 -m venv /tmp/venv457 && /tmp/venv457/bin/pip install torch numpy 'transformers==4.57.*' 'trl==0.25.*'
    /tmp/venv457/bin/python tests/goldens/make_trl025.py

Log-probabilities are random and rounded to three digits, so that the file is all there is to know. TRL's IPO expects
means per token, its KTO the summed log-ratios of good, bad and mismatched answers.
"""

import json
import pathlib
from types import SimpleNamespace

import torch
from trl import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer

OUT = pathlib.Path(__file__).with_name("trl025.json")
N = 6


def numbers(low, high, generator):
    return (torch.rand(N, generator=generator, dtype=torch.float64) * (high - low) + low).mul(1000).round() / 1000


def main():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = (numbers(-40, -1, generator) for _ in range(4))
    chosen_mean, rejected_mean, ref_chosen_mean, ref_rejected_mean = (numbers(-3, -0.05, generator) for _ in range(4))
    cases = {}

    def add(name, inputs, losses, **settings):
        cases[name] = {**settings, "inputs": {key: value.tolist() for key, value in inputs.items()},
                       "losses": losses.tolist()}

    def dpo(kind, smoothing, *logps):
        stub = SimpleNamespace(beta=0.3, label_smoothing=smoothing, loss_type=[kind], reference_free=False,
                               f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False,
                               accelerator=SimpleNamespace(device="cpu"))
        losses, _, _ = DPOTrainer.dpo_loss(stub, *logps, loss_type=kind)
        return losses

    sums = dict(chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    means = dict(chosen=chosen_mean, rejected=rejected_mean, ref_chosen=ref_chosen_mean,
                 ref_rejected=ref_rejected_mean)
    add("dpo", sums, dpo("sigmoid", 0.0, *sums.values()), beta=0.3)
    add("cdpo", sums, dpo("sigmoid", 0.2, *sums.values()), beta=0.3, label_smoothing=0.2)
    add("ipo", means, dpo("ipo", 0.0, *means.values()), beta=0.3)

    stub = SimpleNamespace(beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=0.0, alpha=0.0,
                           accelerator=SimpleNamespace(device="cpu"))
    own = dict(chosen=chosen_mean, rejected=rejected_mean)
    add("simpo", own, CPOTrainer.cpo_loss(stub, *own.values())[0], beta=2.0, gamma=0.7)

    stub = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(stub, *own.values())[0]              # beta · log σ(…): without the NLL
    add("orpo", own, -chosen_mean - ratio, beta=0.25)

    kl, kl_ref = numbers(-20, -10, generator), numbers(-25, -15, generator)
    stub = SimpleNamespace(beta=0.15, loss_type="kto", desirable_weight=1.2, undesirable_weight=0.8, calculate_KL=True,
                           accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x))
    losses, _, _, baseline = KTOTrainer.kto_loss(stub, chosen, rejected, kl, ref_chosen, ref_rejected, kl_ref)
    add("kto", {**sums, "kl": kl, "ref_kl": kl_ref}, losses, beta=0.15, weight_desirable=1.2, weight_undesirable=0.8,
        baseline=float(baseline))
    OUT.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
