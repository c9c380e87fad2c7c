"""Before reinforcement learning starts: can the policy learn anything from these prompts?

A group of k answers that are all wrong, or all right, has no gradient. Answered right with probability p, a prompt
gives a group with both kinds in 1 - p^k - (1 - p)^k of the cases: with k = 8, p = 0.01 that is 8 %, with p = 0.2 it is
83 %. So a few prompts of the training data are answered n times by the start policy, and told are

    pass@1, pass@k     how often one answer, or one of k at least, is right (without bias: eval/passes.py)
    all wrong, right   prompts whose n answers were all the same: of little or no use
    useful             groups of k, of all, that have a gradient (without bias too)

for every skill. Below a floor of pass@1 the run stops here, with what to do about it.
"""

import numpy as np

from eval.intervals import wilson
from eval.passes import informative_at_k, pass_at_k
from model.errors import UserError
from trainer.rewards import RIGHTNESS
from trainer.rollout import sample


def gate(run, model, tokenizer, data, judge, num_prompts, num_samples, k, min_pass, **sampling):
    """Measure, print and judge; the report (see `report_of`), or {} where no part of the reward is right or wrong.

    data: a PromptDataset (or a Mixture) of which num_prompts are drawn; num_samples: answers to each, at least k.
    sampling: max_new_tokens, temperature and batch_size of `trainer.rollout.sample`; sample: another one in its place.
    Every rank answers its share, with the model itself and not what DDP made of it, where its weights are whole
    (`Run.sampling`). UserError when pass@1 is below min_pass.
    """
    if not any(name in judge.parts for name in RIGHTNESS):
        run.print("  gate    none: no part of --reward says right or wrong")
        return {}
    rows = np.random.default_rng((run.cfg.seed, 0)).permutation(len(data))[:num_prompts].tolist()
    mine = rows[run.rank::run.world_size]
    found = count_right(model, tokenizer, [data[row] for row in mine], judge, num_samples, mine, seed=run.cfg.seed,
                        **sampling)
    counts = [entry for part in run.gather(found) for entry in part]
    report = report_of(counts, num_samples, k)
    for line in table(report):
        run.print(line)
    run.on_main(lambda: check(report, min_pass))
    return report


def count_right(model, tokenizer, items, judge, num_samples, numbers, seed, max_new_tokens, temperature, batch_size=0,
                sample=sample):
    """[(skill, how many of num_samples answers are right)] for each item; numbers name the items in random draws."""
    if not items:
        return []
    rollout = sample(model, tokenizer, items, num_samples, max_new_tokens, temperature, seed, numbers, batch_size)
    _, components = judge(rollout)
    right = next(components[name] for name in RIGHTNESS if name in components)                  # (N,) 0 or 1
    counts = right.view(len(items), num_samples).sum(1).round().int().tolist()
    return [(item["skill"], count) for item, count in zip(items, counts, strict=True)]


def report_of(counts, n, k):
    """Figures of [(skill, right answers of n)]: {"k", "samples", "prompts", "pass_1", "pass_1_interval", "pass_k",
    "all_wrong", "all_right", "useful", "skills": {skill: the same figures}}, all shares from 0 to 1."""
    def figures(cs):
        return {"prompts": len(cs), "pass_1": sum(cs) / (n * len(cs)),
                "pass_k": sum(pass_at_k(n, c, k) for c in cs) / len(cs),
                "all_wrong": cs.count(0) / len(cs), "all_right": cs.count(n) / len(cs),
                "useful": sum(informative_at_k(n, c, k) for c in cs) / len(cs)}

    by_skill = {}
    for skill, count in counts:
        by_skill.setdefault(skill, []).append(count)
    total = [count for _, count in counts]
    return {"k": k, "samples": n, **figures(total), "pass_1_interval": wilson(sum(total) / n, len(total)),
            "skills": {skill: figures(by_skill[skill]) for skill in sorted(by_skill)}}


def table(report):
    """The report as lines of text."""
    names = ("pass_1", "pass_k", "all_wrong", "all_right", "useful")
    titles = ("pass@1", f"pass@{report['k']}", "all wrong", "all right", "useful")
    yield (f"  gate    {report['prompts']} prompts answered {report['samples']} times by the start policy; useful: "
           f"groups of {report['k']} with right and wrong answers")
    yield f"          {'skill':<20} {'prompts':>7} " + " ".join(f"{title:>9}" for title in titles)
    several = len(report["skills"]) > 1
    for skill, figures in [*(report["skills"].items() if several else ()), ("all", report)]:
        yield f"          {skill:<20} {figures['prompts']:>7} " + " ".join(f"{figures[name]:>9.1%}" for name in names)


def check(report, min_pass):
    """UserError where the start policy is right too seldom to learn from its own answers."""
    if report["pass_1"] >= min_pass:
        return
    able = [skill for skill, figures in report["skills"].items() if figures["pass_1"] >= min_pass]
    raise UserError(
        f"pass@1 is {report['pass_1']:.1%}, below --min_pass {min_pass:g}: only {report['useful']:.0%} of the groups "
        "would teach anything. Give easier prompts" + (f" (of {', '.join(able)})" if able else "")
        + ", fine-tune longer first"
        + (f" (also on the policy's own right answers, as pass@{report['k']} is {report['pass_k']:.1%}: "
           "scripts/generate_data.py --samples)" if report["pass_k"] > 2 * report["pass_1"] else "")
        + ", take larger groups (--num_generations), or --min_pass 0 to go on regardless")
