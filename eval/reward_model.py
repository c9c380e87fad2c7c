"""How good is a reward model? Held-out pairs of answers, of which one is preferred: does it score that one higher?

    accuracy                how often, ties counting half, with Wilson's interval
    longer_wins             what "the longer answer is better" gets on the same pairs: the baseline to beat
    accuracy_matched        on pairs whose lengths differ by at most a tenth of the longer: length cannot help there
    accuracy_balanced       mean of the accuracies where the preferred answer is the longer and where it is the shorter:
                            1/2 for a model that only measures length
    length_correlation      of score and length, over all answers
    ece, brier              is σ(r_c - r_r) the probability that it is right? (eval/calibration.py, each pair both ways)

Several models are an ensemble: their scores, each in units of its own σ, are reduced by the mean, or by the minimum,
which an answer can only raise by convincing all of them (Coste et al. 2023, arXiv:2310.02743).

    python eval/reward_model.py --model out/reward
    python eval/reward_model.py --model out/reward,out/reward_2 --reduce min --data pairs.jsonl --out figures.json
    python eval/reward_model.py --model out/judge                                 a yes/no evaluator, on judgements
    python eval/reward_model.py --model out/judge --data pairs.jsonl --principle "Is the answer polite?"
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not eval/

from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run


@dataclass
class Config:
    model: str = arg("out/reward", "reward model, yes/no evaluator or adapter of one; several folders by commas")
    data: str = arg("builtin", "jsonl of pairs (chosen, rejected) or of judgements (principle, text, answer)")
    reduce: str = arg("mean", "several models: the mean or the minimum of their scores", choices=("mean", "min"))
    principle: str = arg("", "with a yes/no evaluator on pairs: the question that a good answer is a yes to")
    split: str = arg("all", "all of --data, or only the part that training holds out", choices=("all", "val"))
    val_fraction: float = arg(0.1, "with --split val: the --val_fraction of the training")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    max_len: int = arg(0, "tokens of a pair, both sides together; 0 = what the model was trained with")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "auto, float32 or bfloat16")
    out: str = arg("", "write the figures to this JSON file")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import json

import numpy as np
import torch

from dataset import jsonl
from dataset.builtin.generate import resolve
from dataset.lm_dataset import PreferenceDataset
from eval.calibration import brier_score, calibration_error
from eval.eval_loss import map_rows, notes
from eval.intervals import wilson
from eval.judge import padded_batches, report_judgements, score_yesno
from eval.skills import bootstrap_mean_over_groups
from model import device as devices
from model.adapters.folder import load_adapter, read_adapter_config
from model.checkpoint import load_model, load_reward_model, read_config
from model.heads import at_last_token, at_segment_ends, normalize
from model.logprobs import segment_sums

MATCHED = 0.1              # lengths that differ by at most this part of the longer one are matched


# ------------------------------------------------------------------------------------------------ scores


@torch.no_grad()
def score_conversations(model, tokenizer, conversations, tools=None, batch_size=16):
    """Scores (n,) of conversations (lists of messages) by a ScalarModel, in units of its σ around its μ.

    Each is read at the last token that the chat template writes, as in training and as stock transformers reads it.
    tools: None, or a list of n.
    """
    lists = [tokenizer.render(messages, tools=given)[0]
             for messages, given in zip(conversations, tools or [None] * len(conversations), strict=True)]
    scores = np.zeros(len(lists))
    for places, ids, mask in padded_batches(lists, tokenizer.pad_id, batch_size, model.score.weight.device):
        scores[places] = at_last_token(model(ids, mask).logits, mask).double().cpu()
    return normalize(scores, model.config)


def score_rows(model, data, device, max_rows=0, rank=0, world_size=1):
    """Raw scores and lengths of the pairs in the rows of a PreferenceDataset: four arrays (n,), and `there` (rows, P).

    (chosen, rejected, tokens of the chosen, tokens of the rejected answer), in the order of the rows.
    """
    def figures(model, batch):
        segments, sides = batch["segment_ids"], 2 * batch["pairs"].shape[1]
        values = model(batch["input_ids"], None, segments, batch["positions"]).logits
        lengths = segment_sums(batch["loss_mask"].float(), segments, sides)
        return torch.cat([at_segment_ends(values, segments, sides), lengths, batch["pairs"]], 1)       # (B, 5P)

    rows = map_rows(figures, model, data, device, max_rows=max_rows, rank=rank, world_size=world_size)
    scores, lengths, there = np.split(rows, [rows.shape[1] // 5 * 2, rows.shape[1] // 5 * 4], axis=1)
    there = there > 0
    return *(x[:, side::2][there] for x in (scores, lengths) for side in (0, 1)), there


def reduced(scores, how):
    """The scores (models, …) of an ensemble as those of one model."""
    return np.mean(scores, axis=0) if how == "mean" else np.min(scores, axis=0)


# ------------------------------------------------------------------------------------------------ figures


def measure_pairs(model, data, tokenizer, device, max_rows=0, rank=0, world_size=1, margin=0.0, centering=0.0):
    """`report_pairs` of a ScalarModel on held-out rows; "loss" is the training objective."""
    *four, _ = score_rows(model, data, device, max_rows, rank, world_size)
    return report_pairs(*four, margin, centering)


def report_pairs(chosen, rejected, chosen_length, rejected_length, margin=0.0, centering=0.0):
    """What the docstring of this file lists, from scores and lengths (n,), None where no pair is of that kind; and mean
    and standard deviation of all scores."""
    difference, longer = chosen - rejected, chosen_length - rejected_length
    wins = np.where(difference == 0, 0.5, difference > 0)
    longer_wins = np.where(longer == 0, 0.5, longer > 0)
    matched = abs(longer) <= MATCHED * np.maximum(chosen_length, rejected_length)
    scores, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_length, rejected_length])
    sides = [wins[side].tolist() for side in (longer > 0, longer < 0) if side.any()]
    p = 1 / (1 + np.exp(-np.clip(difference, -500, 500)))
    both_ways, outcomes = np.concatenate([p, 1 - p]), np.repeat([1, 0], len(p))
    return {"loss": float(np.logaddexp(0, margin - difference).mean()
                          + centering * ((chosen + rejected) ** 2).mean()),
            "accuracy": float(wins.mean()), "accuracy_interval": wilson(wins.sum(), len(wins)),
            "longer_wins": float(longer_wins.mean()), "longer_wins_interval": wilson(longer_wins.sum(), len(wins)),
            "accuracy_matched": float(wins[matched].mean()) if matched.any() else None,
            "accuracy_matched_interval": wilson(wins[matched].sum(), int(matched.sum())),
            "matched_pairs": int(matched.sum()),
            "accuracy_balanced": float(np.mean([np.mean(side) for side in sides])) if len(sides) == 2 else None,
            "accuracy_balanced_interval": bootstrap_mean_over_groups(sides) if len(sides) == 2 else (0.0, 1.0),
            "length_correlation": correlation(scores, lengths),
            "ece": calibration_error(both_ways, outcomes), "brier": brier_score(both_ways, outcomes),
            "reward_mean": float(scores.mean()), "reward_std": float(scores.std()), "pairs": len(wins)}


def correlation(x, y):
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else 0.0


def table(figures):
    """The figures of pairs or judgements as lines of text."""
    for name, value in figures.items():
        if not name.endswith("_interval") and value is not None:
            low, high = figures.get(f"{name}_interval", (None, None))
            yield f"{name:<20} {value:>9.4g}" + (f"   [{low:.4f}, {high:.4f}]" if low is not None else "")


# ------------------------------------------------------------------------------------------------ command


def is_adapter(folder):
    return pathlib.Path(folder, "adapter_config.json").is_file()


def is_language_model(folder):
    if is_adapter(folder):
        return read_adapter_config(pathlib.Path(folder)).get("task_type") != "SEQ_CLS"
    return all(name.endswith("ForCausalLM") for name in read_config(folder).get("architectures") or [])


def load_scorer(folder, device="cpu", quantize="none", rope_scaling=""):
    """(model, tokenizer) of a reward model (ScalarModel) or an evaluator (CausalLM); of an adapter with its base."""
    load = load_model if is_language_model(folder) else load_reward_model
    if not is_adapter(folder):
        return load(folder, device, quantize=quantize, rope_scaling=rope_scaling)
    base = read_adapter_config(pathlib.Path(folder)).get("base_model_name_or_path") or ""
    if not pathlib.Path(base).is_dir():
        raise UserError(f"{folder}: the base model of this adapter, {base!r}, is not there; write its folder into "
                        "adapter_config.json as base_model_name_or_path")
    model, tokenizer = load(base, device, quantize=quantize, rope_scaling=rope_scaling)
    load_adapter(model, folder)
    return model.eval(), tokenizer


def pairs_by_score(folder, cfg, path, device):
    """{file:line of a pair: (chosen, rejected, length, length)} by the scores of a reward model, in units of its σ."""
    model, tokenizer = load_scorer(folder, device, cfg.quantize, cfg.rope_scaling)
    data = PreferenceDataset(path, tokenizer, cfg.max_len or model.config.max_position_embeddings, cfg.split,
                             val_fraction=cfg.val_fraction)
    for note in notes(data, model.config):
        print(f"note: {folder}: {note}")
    chosen, rejected, *lengths, there = score_rows(model, data, device)
    places = [place for row, real in enumerate(there) for place in data.where(row)[:int(real.sum())]]
    pairs = zip(normalize(chosen, model.config), normalize(rejected, model.config), *lengths, strict=True)
    return dict(zip(places, pairs, strict=True))


def pairs_by_question(folder, cfg, path, device):
    """The same by the log-odds of a yes/no evaluator that is asked cfg.principle about the answers alone."""
    if not cfg.principle:
        raise UserError(f"{folder} is a language model, which judges answers by a question: give --principle, as "
                        "--principle \"Is the answer polite?\"; or give the folder of a reward model")
    model, tokenizer = load_scorer(folder, device, cfg.quantize, cfg.rope_scaling)
    pairs = {}
    for file in map(jsonl.JsonlFile, jsonl.find_files(path)):
        for number in range(len(file)):
            record = file.record(number, "preference")[0]
            pairs[file.where(number)] = [record[side][-1]["content"] for side in ("chosen", "rejected")]
    texts = [text for pair in pairs.values() for text in pair]
    scores = score_yesno(model, tokenizer, cfg.principle, texts)[0].reshape(-1, 2)
    lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)]).reshape(-1, 2)
    return dict(zip(pairs, np.concatenate([scores, lengths], 1), strict=True))


def evaluate_pairs(folders, cfg, path, device):
    """Figures of one or several models on the pairs that all of them could read."""
    found = [(pairs_by_question if is_language_model(folder) else pairs_by_score)(folder, cfg, path, device)
             for folder in folders]
    places = [place for place in found[0] if all(place in pairs for pairs in found)]
    values = np.array([[pairs[place] for place in places] for pairs in found])                  # (models, n, 4)
    chosen, rejected = (reduced(values[:, :, side], cfg.reduce) for side in (0, 1))
    return report_pairs(chosen, rejected, values[0, :, 2], values[0, :, 3])


def evaluate_judgements(folders, cfg, path, device):
    """Figures of one or several yes/no evaluators on (principle, text, answer) records, and of each principle's."""
    items = [record for file in jsonl.find_files(path) for record in read_judgements(file)]
    asked, texts, answers = zip(*((item["principle"], item["text"], item["answer"] == "yes") for item in items),
                                strict=True)
    scores = []
    for folder in folders:
        model, tokenizer = load_scorer(folder, device, cfg.quantize, cfg.rope_scaling)
        scores.append(score_yesno(model, tokenizer, list(asked), texts))
    log_odds, mass = (reduced(np.array(part), cfg.reduce) for part in zip(*scores, strict=True))
    answers, names = np.array(answers, int), np.array([item.get("name", "") for item in items])
    by_name = {name: report_judgements(log_odds[names == name], mass[names == name], answers[names == name])
               for name in sorted(set(names)) if name}
    return {**report_judgements(log_odds, mass, answers), "principles": by_name}


def read_judgements(path):
    """The (principle, text, answer) records of a jsonl file as they are; UserError with file:line for any other."""
    file = jsonl.JsonlFile(path)
    with open(file.plain, "rb") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            try:
                record = jsonl.load_json(line)
                jsonl.parse_judgement(record)
            except jsonl.BadRecord as error:
                raise UserError(f"{file.where(number)}: {error}") from None
            yield record


def main(cfg):
    device = devices.pick_device(cfg.device)
    folders = [folder.strip() for folder in cfg.model.split(",")]
    judges = all(map(is_language_model, folders)) and not cfg.principle
    path = resolve(cfg.data, "judgements_test" if judges else "preferences_test")
    evaluate = evaluate_judgements if judges else evaluate_pairs
    with devices.autocast(device, devices.pick_dtype(cfg.dtype, device)):
        figures = evaluate(folders, cfg, path, device)
    print(f"{cfg.model} on {cfg.data}" + (f", {cfg.reduce} of {len(folders)}" if len(folders) > 1 else ""))
    print("\n".join(table({name: value for name, value in figures.items() if name != "principles"})))
    for name, part in figures.get("principles", {}).items():
        low, high = part["accuracy_interval"]
        known = [side for side in ("yes", "no") if part[f"accuracy_{side}"] is not None]
        sides = ", ".join(f"{side} {part[f'accuracy_{side}']:.1%}" for side in known)
        print(f"  {name:<18} {part['accuracy']:>9.1%}   [{low:.4f}, {high:.4f}]   {sides}")
    if cfg.out:
        place = pathlib.Path(cfg.out)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"model": cfg.model, "data": cfg.data, "split": cfg.split, "reduce": cfg.reduce,
                                     "principle": cfg.principle, **figures}, indent=1), encoding="utf-8")
    return figures


if __name__ == "__main__":
    run(main, CONFIG)
