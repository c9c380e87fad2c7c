"""What is watched while a policy practises: figures of each rollout, and what it can do on held-out prompts.

A reward that rises is no success: a policy finds ways to be rewarded. So beside it stand what was meant (held-out
prompts, judged by their checkers, with an interval) and the signs of the usual failures: completions that are all alike
or never end, groups that teach nothing, entropy that is gone, a policy far from where it began, and canaries: texts
without merit that the reward likes as well as what the policy says.
"""

import numpy as np
import torch

from dataset.builtin.checkers import check
from eval.intervals import wilson
from eval.passes import pass_at_k
from eval.skills import answer_items, bootstrap_mean_over_groups
from model.generate import inference
from trainer.credit import degenerate, moments
from trainer.rewards import CANARIES, canaries
from trainer.rollout import micro_batches, sample

EVAL_SEED = 2**40              # of the samples of an evaluation: the same at each, whatever --seed


def rollout_figures(run, rollout, rewards, components):
    """Figures of a step's rollout over all ranks, for `run.note`: means of the rewards and their components, of length
    and truncation, the share of different texts among the completions of a prompt, of prompts whose completions all
    got the same reward, and the correlation of reward and length.

    rewards (N,); components: {name: (N,)} of the judge.
    """
    lengths, rewards = rollout.lengths.double(), rewards.cpu().double()
    columns = {"reward": rewards, **{f"reward_{name}": value for name, value in components.items()}, "length": lengths,
               "truncated": ~rollout.finished}
    groups = len(rollout.groups.unique())
    several = len(rewards) > groups
    counts = [len(set(zip(rollout.groups.tolist(), rollout.texts, strict=True))), groups,
              int(degenerate(rewards, rollout.groups).sum()) if several else 0, float((rewards * lengths).sum())]
    total = sum(run.gather(torch.cat([*(moments(value.double()) for value in columns.values()),
                                      torch.tensor(counts, dtype=torch.float64)])))
    n, sums, squares = total[:-4].view(-1, 3).T                                        # (columns,) each
    unique, groups, flat, products = total[-4:].tolist()
    means, spread = sums / n, (squares / n - (sums / n).square()).clamp(min=0).sqrt()
    figures = dict(zip(columns, means.tolist(), strict=True))
    both = float(spread[0] * spread[list(columns).index("length")])
    covariance = products / float(n[0]) - figures["reward"] * figures["length"]
    return {**figures, "reward_std": float(spread[0]), "unique": unique / float(n[0]),
            "length_correlation": covariance / both if both > 1e-9 else 0.0,
            **({"degenerate": flat / groups} if several else {})}


def measure(model, val, tokenizer, device, run, judge, reference=None, max_rows=0, rank=0, world_size=1, sample=sample,
            answer=answer_items):
    """Held-out figures of a policy, on the first max_rows (0 = all) prompts; `sample` and, greedily, `answer` ask it.

    accuracy       of its likeliest answers, by the checkers of the prompts: the mean over skills, each skill's as
                   accuracy_NAME; intervals by bootstrap and Wilson. Where a prompt has no checker, "reward" takes its
                   place (`headline`)
    reward         mean of samples by the judge that training uses; pass_1 and pass_K: how often a sample is right, and
                   how often one of K = --pass_k is
    length, truncated, entropy      of the samples: tokens, share that did not end, nats per token over the vocabulary
    kl             KL(policy‖reference) per token, exact over the vocabulary, if there is a reference
    canary_…       medians of rewards.canaries; canary_wins: 1 where one of them beats the median sample
    loss           what --early_stop watches: 1 - accuracy, or -reward
    """
    cfg = run.cfg
    rows = np.random.default_rng(0).permutation(len(val))[:max_rows or len(val)].tolist()     # of every skill some
    items = [{**val[row], "row": row} for row in rows[rank::world_size]]
    asked = [{**item, "max_new_tokens": min(item["max_new_tokens"] or cfg.max_new_tokens, cfg.max_new_tokens)}
             for item in items]
    samples, checked = max(cfg.pass_k, 1), headline(val) == "accuracy"
    if not items:                                                                # there are more ranks than prompts
        return summed_up(run.gather({}), samples, reference is not None)
    rollout = sample(model, tokenizer, items, samples, cfg.max_new_tokens, cfg.temperature, EVAL_SEED,
                     rows[rank::world_size])
    rewards, _ = judge(rollout)
    entropies, distances = [], []
    for batch in micro_batches(rollout.select(range(0, len(rollout), samples)), cfg.micro_batch_size):     # the first
        entropy, kl = token_figures(model, reference, batch, device, cfg.temperature)
        entropies.append(entropy)
        distances.append(kl)
    mine = {"answers": [(item["skill"], check(item["checker"], text, item["answer"])) for item, (text, _) in
                        zip(items, answer(model, tokenizer, asked), strict=True)] if checked else [],
            "right": [check(item["checker"], text, item["answer"]) for item, text in
                      zip(rollout.items, rollout.texts, strict=True)] if checked else [],
            "rewards": rewards.tolist(), "lengths": rollout.lengths.tolist(), "finished": rollout.finished.tolist(),
            "entropy": torch.cat(entropies).tolist(), "kl": torch.cat(distances).tolist(),
            **{name: values.tolist() for name, values in canaries(judge, rollout).items()}}
    return summed_up(run.gather(mine), samples, reference is not None)


def summed_up(parts, samples, with_kl):
    """The figures of `measure` from those of all ranks."""
    def joined(name):
        return [value for part in parts for value in part.get(name, [])]

    figures = {"reward": float(np.mean(joined("rewards"))), "length": float(np.mean(joined("lengths"))),
               "truncated": 1 - float(np.mean(joined("finished"))), "entropy": float(np.mean(joined("entropy")))}
    by_prompt = np.array(joined("rewards")).reshape(-1, samples).mean(1)         # samples of a prompt are alike
    spread = 1.96 * by_prompt.std() / len(by_prompt) ** 0.5
    figures["reward_interval"] = (figures["reward"] - spread, figures["reward"] + spread)
    if with_kl:
        figures["kl"] = float(np.mean(joined("kl")))
    right = np.array(joined("right")).reshape(-1, samples)
    if right.size:
        skills = {}
        for skill, ok in sorted(joined("answers")):                              # however ranks shared them
            skills.setdefault(skill, []).append(ok)
        figures |= {"accuracy": float(np.mean([np.mean(oks) for oks in skills.values()])),
                    "accuracy_interval": bootstrap_mean_over_groups(list(skills.values())),
                    "pass_1": float(right.mean()),
                    f"pass_{samples}": float(np.mean([pass_at_k(samples, int(c), samples) for c in right.sum(1)]))}
        for name, oks in skills.items():
            figures[f"accuracy_{name}"] = float(np.mean(oks))
            figures[f"accuracy_{name}_interval"] = wilson(sum(oks), len(oks))
    medians = {f"canary_{name}": float(np.median(joined(f"canary_{name}"))) for name in CANARIES}
    return {"loss": 1 - figures["accuracy"] if right.size else -figures["reward"], **figures, **medians,
            "canary_wins": float(max(medians.values()) > np.median(joined("rewards")))}


def headline(val):
    """The figure that stands for held-out prompts: "accuracy" if all of them have a checker, else "reward"."""
    return "reward" if val.report["unchecked"] else "accuracy"


def token_figures(model, reference, batch, device, temperature):
    """Entropy, and KL(policy‖reference), of the distribution of every sampled token of a batch: (n,) each, in nats."""
    ids, real, sampled = (batch[name].to(device) for name in ("input_ids", "attention_mask", "completion_mask"))

    def distribution(hidden, lm_head):
        return (lm_head(hidden[:, :-1][sampled[:, 1:]]).float() / temperature).log_softmax(-1)           # (n, V)

    with inference(model):
        policy = model(ids, real, head=distribution).logits
        entropy = -(policy.exp() * policy).sum(-1)
        if reference is None:
            return entropy.cpu(), torch.zeros_like(entropy).cpu()
        with reference() as frozen:
            other = frozen(ids, real, head=distribution).logits
        return entropy.cpu(), (policy.exp() * (policy - other)).sum(-1).cpu()


def show(model, tokenizer, val, judge, cfg, seed=0, sample=sample):
    """A held-out prompt and three samples with their rewards, for `run.sample`."""
    rollout = sample(model, tokenizer, [val[0]], 3, cfg.max_new_tokens, cfg.temperature, seed, [0])
    rewards, _ = judge(rollout)
    lines = [f"{reward:+.2f} {text}" for reward, text in zip(rewards.tolist(), rollout.texts, strict=True)]
    return "\n".join([val[0]["messages"][-1]["content"], *lines])
