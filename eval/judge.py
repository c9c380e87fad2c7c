"""The yes/no evaluator: a language model that is asked whether a text fulfils a principle.

    score = log p(yes | question) - log p(no | question)         mass = p(yes | question) + p(no | question)

The score is the log-odds of the two answers, normalised over the two; the mass says how much of the model's belief they
are, and a mass far below 1 means that it does not answer the question at all. The question is laid out by the template
in config.json ("judge_template"), which `trainer/train_reward.py --head yesno` writes there; a model that was not
trained for it is asked with the same one (`dataset.jsonl.JUDGE_TEMPLATE`).
"""

import numpy as np
import torch
import torch.nn.functional as F

from dataset.jsonl import JUDGE_TEMPLATE, judge_prompt
from eval.calibration import brier_score, calibration_error
from eval.eval_loss import map_rows
from eval.intervals import wilson
from model.errors import UserError
from model.logprobs import segment_sums


def answer_ids(tokenizer):
    """The ids with which the answers yes and no begin, right after the prompt."""
    prompt = judge_prompt("?", "?")
    start = len(tokenizer.render(prompt, add_generation_prompt=True)[0])
    yes, no = (tokenizer.render([*prompt, {"role": "assistant", "content": answer}])[0][start]
               for answer in ("yes", "no"))
    if yes == no:
        raise UserError(f"yes and no begin with the same token, {tokenizer.show(yes)}: this vocabulary cannot judge")
    return yes, no


@torch.no_grad()
def score_yesno(model, tokenizer, principle, texts, batch_size=32):
    """Ask a language model about texts: (log-odds of yes (n,), mass (n,)), float64 arrays.

    principle  a question that yes or no answers, for all texts, or a list of n
    texts      list of n str; what they spell is always plain text
    """
    principles = [principle] * len(texts) if isinstance(principle, str) else principle
    template, answers = model.config.judge_template or JUDGE_TEMPLATE, answer_ids(tokenizer)
    prompts = [tokenizer.render(judge_prompt(asked, text, template), add_generation_prompt=True)[0]
               for asked, text in zip(principles, texts, strict=True)]
    logprobs = np.zeros((len(prompts), 2))

    def at_the_end(hidden, lm_head):                                    # hidden (b, T, D)
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return lm_head(last).float().log_softmax(-1)[:, answers]        # (b, 2)

    for places, ids, mask in padded_batches(prompts, tokenizer.pad_id, batch_size, model.lm_head.weight.device):
        logprobs[places] = model(ids, mask, head=at_the_end).logits.cpu()
    return logprobs[:, 0] - logprobs[:, 1], np.exp(logprobs).sum(1)


def padded_batches(lists, pad_id, batch_size, device):
    """Lists of ids, the longest first, in right-padded batches: yields (places in `lists`, ids (b, T), mask (b, T))."""
    order = sorted(range(len(lists)), key=lambda place: -len(lists[place]))
    for start in range(0, len(order), batch_size):
        places = order[start:start + batch_size]
        width = len(lists[places[0]])
        ids = [lists[place] + [pad_id] * (width - len(lists[place])) for place in places]
        mask = [[1] * len(lists[place]) + [0] * (width - len(lists[place])) for place in places]
        yield places, torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# --------------------------------------------------------------------------------------- held-out judgements


def measure_judgements(model, data, tokenizer, device, max_rows=0, rank=0, world_size=1):
    """Figures of an evaluator on packed judgements (an SFTDataset), as `report_judgements`; "loss" per target token."""
    answers = torch.tensor(answer_ids(tokenizer), device=device)

    def figures(model, batch):
        ids, mask, segments = batch["input_ids"], batch["loss_mask"] > 0, batch["segment_ids"]
        most = ids.shape[1] // 4                                        # texts in a row, at most
        first = mask & ~F.pad(mask[:, :-1], (1, 0)) & torch.isin(ids, answers)             # (B, T) the answer's token

        def at_targets(hidden, lm_head):
            logprobs = lm_head(hidden[:, :-1][mask[:, 1:]]).float().log_softmax(-1)        # (n, V)
            wanted = torch.stack([ids[mask], *(answer.expand(len(logprobs)) for answer in answers)], 1)
            values = hidden.new_zeros(*ids.shape, 3, dtype=torch.float32)
            values[mask] = logprobs.gather(1, wanted)                                      # (B, T, 3)
            return values

        own, yes, no = model(ids, None, segments, batch["positions"], head=at_targets).logits.unbind(-1)
        per_text = [(yes - no) * first, (yes.exp() + no.exp()) * first, (ids == answers[0]) * first, first]
        return torch.cat([-own.sum(1, keepdim=True), mask.sum(1, keepdim=True),
                          *(segment_sums(x.float(), segments, most) for x in per_text)], 1)

    rows = map_rows(figures, model, data, device, max_rows=max_rows, rank=rank, world_size=world_size)
    log_odds, mass, is_yes, there = (part.ravel() for part in np.split(rows[:, 2:], 4, axis=1))
    real = there > 0
    return {"loss": rows[:, 0].sum() / max(rows[:, 1].sum(), 1),
            **report_judgements(log_odds[real], mass[real], is_yes[real])}


def report_judgements(log_odds, mass, is_yes):
    """Figures of judgements (n,): how often the likelier of the two answers is the right one, and whether its
    probability means what it says. is_yes (n,): 1 where yes is right."""
    right = (log_odds > 0) == (is_yes > 0)
    probability = 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))
    sides = {f"accuracy_{name}": float(right[is_yes == side].mean()) if (is_yes == side).any() else None
             for name, side in (("yes", 1), ("no", 0))}
    return {"accuracy": float(right.mean()), "accuracy_interval": wilson(int(right.sum()), len(right)), **sides,
            "yes_no_mass": float(mass.mean()), "ece": calibration_error(probability, is_yes),
            "brier": brier_score(probability, is_yes), "judgements": len(right)}
