"""Do the tests of reinforcement learning's formulas notice mistakes? By hand: it takes minutes.

    python tests/mutants_rl.py [--only clip] [--out tests/results/mutants_rl.json]

A mutant is one line of one file changed, in a copy, into what is often got wrong; tests/test_rl_losses.py or
tests/test_credit.py has to fail on it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from model.cli import arg, parse_args
from model.errors import run as run_script

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ["tests/test_rl_losses.py", "tests/test_credit.py"]
LOSSES, CREDIT, SPO, KERNELS = "trainer/losses.py", "trainer/credit.py", "trainer/spo_tracker.py", "model/kernels.py"

MUTANTS = [            # (what is got wrong, file, the line, what it becomes)
    ("PPO: the ratio of a token is that of its sequence", LOSSES,
     "ratio, advantages = (logprobs - old_logprobs).exp(), per_token(advantages)",
     "ratio, advantages = (logprobs - old_logprobs).sum(1, keepdim=True).exp() + 0 * logprobs, per_token(advantages)"),
    ("PPO: clip whatever the sign of the advantage", LOSSES,
     "losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)",
     "losses = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages"),
    ("PPO: the larger of the two instead of the smaller", LOSSES,
     "losses = -torch.minimum(ratio * advantages,", "losses = -torch.maximum(ratio * advantages,"),
    ("PPO: sign of the advantage", LOSSES, "losses = -torch.minimum(", "losses = torch.minimum("),
    ("DAPO: no clip-higher", LOSSES, "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_low, 1 + clip_low)"),
    ("clip shares: sign of the advantage", LOSSES, "(ratio > 1 + clip_high) & (advantages > 0)",
     "(ratio > 1 + clip_high) & (advantages < 0)"),
    ("advantages with gradient", LOSSES, "    advantages = advantages.detach()\n", "    advantages = advantages + 0\n"),
    ("GSPO: sum of log-ratios instead of their mean", LOSSES,
     "log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)",
     "log_ratio = log_ratio.sum(1, keepdim=True)"),
    ("GSPO: tokens off the mask count", LOSSES, "log_ratio = (logprobs - old_logprobs) * mask",
     "log_ratio = (logprobs - old_logprobs)"),
    ("CISPO: gradient through the weight", LOSSES, "ratio = (logprobs - old_logprobs).detach().exp()",
     "ratio = (logprobs - old_logprobs).exp()"),
    ("CISPO: no cap", LOSSES, "return -ratio.clamp(max=cap) *", "return -ratio *"),
    ("sequence mean: by the width of the batch", LOSSES, "return mask / mask.sum(1, keepdim=True).clamp(min=1)",
     "return mask / mask.shape[1]"),
    ("sequence mean: NaN for an empty row", LOSSES, "return mask / mask.sum(1, keepdim=True).clamp(min=1)",
     "return mask / mask.sum(1, keepdim=True)"),
    ("constant: by the longest of the batch", LOSSES, "return mask / length", "return mask / mask.sum(1).max()"),
    ("number of items: padding counts", LOSSES, 'return int(mask.sum()) if how == "token"',
     'return mask.numel() if how == "token"'),
    ("KL: sign of k1", LOSSES, "return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
    ("KL: k2 without its half", LOSSES, "return (logprobs - ref_logprobs).square() / 2",
     "return (logprobs - ref_logprobs).square()"),
    ("KL: k3 the wrong way round", LOSSES, "log_ratio = ref_logprobs - logprobs",
     "log_ratio = logprobs - ref_logprobs"),
    ("KL loss without the ratio", LOSSES, "return (logprobs - old_logprobs).exp() * k3(", "return k3("),
    ("KL loss: the ratio without gradient", LOSSES, "return (logprobs - old_logprobs).exp() * k3(",
     "return (logprobs - old_logprobs).detach().exp() * k3("),
    ("value loss: the smaller of the two", LOSSES, "return torch.maximum((values - returns)",
     "return torch.minimum((values - returns)"),
    ("value loss: clipped around the returns", LOSSES, "clipped = old_values + (values - old_values)",
     "clipped = returns + (values - returns)"),
    ("log-probabilities at temperature 1", "model/logprobs.py",
     "logprobs = linear_logprobs(rows, lm_head.weight, targets, temperature)",
     "logprobs = linear_logprobs(rows, lm_head.weight, targets)"),
    ("entropy at temperature 1", "model/logprobs.py",
     "both = linear_logprobs_and_entropy(rows, lm_head.weight, targets, temperature)",
     "both = linear_logprobs_and_entropy(rows, lm_head.weight, targets)"),
    ("entropy: derivative without H", KERNELS, "d = (logp + H[:, None])", "d = (logp + 0 * H[:, None])"),
    ("GRPO: repeat for repeat_interleave", CREDIT, "return rewards.view(len(sizes), -1)",
     "return rewards.view(-1, len(sizes)).T"),
    ("GRPO: std over the batch", CREDIT, "((grouped - grouped[:, :1]).std(1, keepdim=True) + 1e-4)",
     "((grouped - grouped[:, :1]).std() + 1e-4)"),
    ("GRPO: std without Bessel's correction", CREDIT, ".std(1, keepdim=True) + 1e-4)",
     ".std(1, keepdim=True, correction=0) + 1e-4)"),
    ("GRPO: mean over the batch", CREDIT, "return grouped - grouped.mean(1, keepdim=True)",
     "return grouped - grouped.mean()"),
    ("GRPO: equal rewards leave a rounding", CREDIT, "    grouped = grouped - grouped[:, :1]\n    return",
     "    return"),
    ("GRPO: a second z-score", CREDIT, "    return advantages.flatten()\n",
     "    return whiten(advantages.flatten())\n"),
    ("GRPO: groups of any size", CREDIT, "(sizes == sizes[0]).all() and sizes[0] >= 2", "True"),
    ("RLOO: the sample itself in its baseline", CREDIT, "(grouped.shape[1] / (grouped.shape[1] - 1))", "1"),
    ("degenerate: any two alike", CREDIT, "return (grouped == grouped[:, :1]).all(1)",
     "return (grouped[:, 1:] == grouped[:, :1]).any(1)"),
    ("overlong: no limit below", CREDIT, "/ cache).clamp(0, 1)", "/ cache).clamp(min=0)"),
    ("PPO: the value after the token", CREDIT, "return F.pad(scores[:, :-1], (1, 0))", "return scores"),
    ("PPO: sign of the KL in the reward", CREDIT, "else earned - kl_coef *", "else earned + kl_coef *"),
    ("PPO: KL on the prompt", CREDIT, "(old_logprobs - ref_logprobs) * mask", "(old_logprobs - ref_logprobs)"),
    ("PPO: the reward one token before the end", CREDIT, "mask.flip(1).cumsum(1).flip(1) == 1",
     "mask.flip(1).cumsum(1).flip(1) == 2"),
    ("PPO: the penalty for ending", CREDIT, "(~finished.bool())", "(finished.bool())"),
    ("GAE: no skipping of tool turns", CREDIT, "next_value = torch.where(mask[:, t], values[:, t], next_value)",
     "next_value = values[:, t]"),
    ("GAE: advantages leak through what was not sampled", CREDIT,
     "advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)",
     "advantage = delta + gamma * lam * advantage"),
    ("GAE: without λ", CREDIT, "delta + gamma * lam * advantage", "delta + gamma * advantage"),
    ("GAE: returns are the advantages", CREDIT, "(advantages + values) * mask", "advantages * mask"),
    ("whitening: padding counts", CREDIT, "(moments(x, mask) if", "(moments(x) if"),
    ("whitening: the mean stays", CREDIT, "whitened = (x - mean) /", "whitened = x /"),
    ("whitening: no division", CREDIT, "whitened = (x - mean) / (std**2 + 1e-8) ** 0.5", "whitened = x - mean"),
    ("whitening: not 0 on padding", CREDIT, "torch.where(mask.bool(), whitened, 0)", "whitened"),
    ("KL coefficient: no limit of a change", CREDIT, "min(max(kl / target - 1, -0.2), 0.2)", "(kl / target - 1)"),
    ("SPO: one tracker for all prompts", SPO, "self.alpha[prompt] = keep * self.alpha[prompt] + r",
     "self.alpha[:] = keep * self.alpha[prompt] + r"),
    ("SPO: one forgetting factor per batch", SPO, "divergences.cpu().double() / self.half_life)",
     "divergences.cpu().double().mean().expand(len(prompts)) / self.half_life)"),
    ("SPO: forgetting factors of other prompts", SPO, "rho.tolist(), strict", "rho.flip(0).tolist(), strict"),
    ("SPO: completions of other prompts", SPO, "self.last[int(prompts[row])] for row in rows)",
     "self.last[int(prompts[row])] for row in rows[::-1])"),
    ("SPO: nothing is forgotten", SPO, "self.alpha[prompt] = keep * self.alpha[prompt] + r",
     "self.alpha[prompt] = self.alpha[prompt] + r"),
    ("SPO: failures are not forgotten", SPO, "self.beta[prompt] = keep * self.beta[prompt] + 1 - r",
     "self.beta[prompt] = self.beta[prompt] + 1 - r"),
    ("SPO: no lower limit of ρ", SPO, ".clamp(self.rho_min, self.rho_max)", ".clamp(max=self.rho_max)"),
    ("SPO: no upper limit of ρ", SPO, ".clamp(self.rho_min, self.rho_max)", ".clamp(self.rho_min)"),
    ("SPO: a start without the half sample", SPO, "effective * (solved + 0.5) / (n + 1)", "effective * solved / n"),
    ("SPO: draws by v", SPO, "return (v * (1 - v)).sqrt() + epsilon", "return v + epsilon"),
    ("SPO: draws without exploration", SPO, "return (v * (1 - v)).sqrt() + epsilon", "return (v * (1 - v)).sqrt()"),
    ("SPO: draws with replacement", SPO, "replacement=False", "replacement=True"),
    ("SPO: D over padding", SPO, "((logprobs - then).abs() * mask).sum(1)", "(logprobs - then).abs().sum(1)"),
    ("SPO: D with signs", SPO, "((logprobs - then).abs() * mask).sum(1)", "((logprobs - then) * mask).sum(1)"),
    ("SPO: any reward", SPO, "    if len(outside):\n", "    if False:\n"),
    ("SPO: the first completion stays", SPO, "            self.last[prompt] = (input_ids",
     "            self.last[prompt] = self.last.get(prompt) or (input_ids"),
]


@dataclass
class Config:
    only: str = arg("", "try those alone whose name contains this")
    out: str = arg("", "write the results to this JSON file")


def noticed(tree, file, line, mutant):
    """The first test that fails where `line` of a file in `tree` is `mutant`; "" if none does."""
    path = tree / file
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{file} has this {text.count(line)} times: {line}"
    path.write_text(text.replace(line, mutant), encoding="utf-8")
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS], cwd=tree,
                              capture_output=True, text=True, encoding="utf-8",
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return ""
    failed = [word for word in done.stdout.split() if word.startswith(tuple(TESTS)) and "::" in word]
    assert done.returncode == 1 and failed, f"{line}: not a failing test, but\n{done.stdout}{done.stderr}"
    return failed[0]


def main(cfg):
    mutants = [mutant for mutant in MUTANTS if cfg.only in mutant[0]]
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        results = []
        for name, file, line, mutant in mutants:
            results.append({"mutant": name, "file": file, "noticed_by": noticed(tree, file, line, mutant)})
            print(f"{name:60} {results[-1]['noticed_by'] or 'NOT NOTICED'}", flush=True)
    missed = [result["mutant"] for result in results if not result["noticed_by"]]
    if cfg.out:
        pathlib.Path(cfg.out).parent.mkdir(exist_ok=True)
        lines = ",\n ".join(json.dumps(result, ensure_ascii=False) for result in results)
        pathlib.Path(cfg.out).write_text(f"[\n {lines}\n]\n", encoding="utf-8")
    print(f"\n{len(results) - len(missed)} of {len(results)} noticed" + "".join(f"\n  not: {name}" for name in missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    run_script(main, parse_args(Config, description=__doc__))
