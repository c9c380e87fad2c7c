"""What an answer is worth: the reward of reinforcement learning, in one signature.

    judge = build("checker:1,overlong:0.5", tokenizer, device, max_new_tokens=64)
    rewards, components = judge(rollout)             (N,) float32, and {name: (N,)} before weights, for the log

--reward is a sum of parts with weights, by commas, each NAME or NAME:WEIGHT:

    checker          1 if the prompt's own checker accepts the answer, else 0 (dataset/builtin/checkers.py)
    number           1 if the last number of the answer is the expected one; of a worked answer, what follows its ####
    format           multiplies checker and number: of an ill-formed answer (no closed thought, then an answer) they
                     keep the share 1 - weight. Alone it earns nothing, so the tags are no end in themselves
    overlong         0, falling to -1 over the last fifth of the tokens that an answer may have (DAPO, eq. 13)
    unfinished       -1 if the answer was cut and did not end by itself
    length           minus the share of the allowed tokens that was used
    repetition       minus the share of the answer's runs of four tokens that it had before
    tool_call        the share of the answer's tool calls that are well-formed and name a tool that there is
    FOLDER           the score of a reward model, ours or any …ForSequenceClassification of the Llama and Qwen families
                     with one label, as (r - μ) / σ where its config.json has them
    FILE.py:NAME     a function of yours: NAME(texts, items) -> a list of numbers
    constitution:FILE   the evaluator's view of a constitution (eval/constitution.py; FILE may be builtin)
    random           a fair coin that does not look at the answer, and
    constant         1: controls, with which nothing may be learnt

Every part is a function of a row alone, so it does not matter how the rows are shared between ranks. The penalties are
negative numbers; give them positive weights.
"""

import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch

from dataset.builtin.checkers import check, final_answer
from dataset.jsonl import weight_of
from dataset.tokens import completed
from eval.constitution import check_evaluator, load_evaluator, read_constitution, score
from eval.reward_model import is_language_model, load_scorer, score_conversations
from model.errors import UserError
from model.tokenizer import lift_structure
from trainer.rollout import from_rows

OVERLONG_SHARE = 0.2       # of the allowed tokens: where `overlong` begins to count (DAPO: 4096 of 20480)
NGRAM = 4                  # tokens of a run that `repetition` looks for


# --- rules: one answer -> a number


@dataclass
class Answer:
    """What a rule looks at, a row of a rollout."""
    text: str                   # what was sampled, its thought included
    ids: list                   # the same as tokens, the end token included
    finished: bool              # ended by itself
    limit: int                  # how many tokens it might have had; 0 = unknown
    item: dict                  # its prompt: messages, tools, answer, checker …


def checker(answer):
    """1 if the prompt's checker accepts the answer, else 0."""
    return float(check(answer.item["checker"], answer.text, answer.item["answer"]))


def number(answer):
    """1 if the last number of the answer equals the last one of the expected answer, "1,092" or "1092.0", else 0."""
    expected = numbers_of(str(answer.item["answer"]).rpartition("####")[2])
    said = numbers_of(final_answer(answer.text))
    return float(bool(said) and bool(expected) and math.isclose(said[-1], expected[-1], rel_tol=1e-6))


def numbers_of(text):
    """All numbers of a text; commas between thousands are no part of them, and 3-2 are 3 and 2."""
    text = re.sub(r"(\d)-", r"\1 ", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    return [float(found) for found in re.findall(r"(?<![\d.])-?(?:\d+(?:\.\d+)?|\.\d+)", text)]


def well_formed(answer):
    """1 if the answer is a closed thought and then something said, inside of <answer> or not; each tag once."""
    message, problem = lift_structure({"role": "assistant", "content": answer.text})
    said = message.get("answer") or message["content"] or message.get("tool_calls")
    return float(problem is None and bool(message.get("reasoning_content", "").strip()) and bool(said))


def overlong(answer):
    """Soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13), C = a fifth of the limit L:

    0 if |y| <= L - C;  (L - C - |y|) / C up to L;  -1 beyond.
    """
    buffer = OVERLONG_SHARE * answer.limit
    return max(min((answer.limit - buffer - len(answer.ids)) / buffer, 0.0), -1.0)


def unfinished(answer):
    """-1 if the answer was cut before it ended, else 0."""
    return 0.0 if answer.finished else -1.0


def length(answer):
    """-|y| / L, from 0 to -1."""
    return -min(len(answer.ids) / answer.limit, 1.0)


def repetition(answer):
    """-(1 - distinct / all) over the runs of NGRAM tokens of the answer: 0 for none twice, towards -1 for a loop."""
    runs = [tuple(answer.ids[start:start + NGRAM]) for start in range(len(answer.ids) - NGRAM + 1)]
    return len(set(runs)) / len(runs) - 1 if runs else 0.0


def tool_call(answer):
    """Share of the <tool_call>s in the answer that are {"name", "arguments"} of a tool of the prompt; 0 without any.

    Where the prompt lists no tools any name will do.
    """
    calls = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", answer.text, flags=re.DOTALL)
    names = {tool.get("function", tool).get("name") for tool in answer.item.get("tools") or []}
    return sum(is_call(call, names) for call in calls) / max(len(calls), 1)


def is_call(text, names):
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
            and (not names or call["name"] in names))


RULES = {"checker": checker, "number": number, "format": well_formed, "overlong": overlong, "unfinished": unfinished,
         "length": length, "repetition": repetition, "tool_call": tool_call, "constant": lambda answer: 1.0}
MEASURED = ("overlong", "length")                  # need the limit
RIGHTNESS = ("checker", "number")                  # say whether an answer is right, 1 or 0: what `format` multiplies


def answers_of(rollout, max_new_tokens=0):
    """The rows of a rollout as a list of N Answer."""
    ids = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
    limits = [min(item.get("max_new_tokens") or max_new_tokens, max_new_tokens) for item in rollout.items]
    return list(map(Answer, rollout.texts, ids, rollout.finished.tolist(), limits, rollout.items))


# --- other parts: a rollout and its answers -> N numbers, or (N numbers, {name: N more for the log})


def by_rule(rule, rollout, answers):
    return [rule(answer) for answer in answers]


def by_lot(seed, rollout, answers):
    """0 or 1, by (seed, the weights' version, the prompt's tokens, which of its samples): never by what was sampled."""
    draws, seen = [], {}
    for ids, mask, group in zip(rollout.input_ids, rollout.completion_mask, rollout.groups.tolist(), strict=True):
        prompt = ids[:int(mask.int().argmax())].cpu().numpy().tobytes()
        sample = seen[group] = seen.get(group, -1) + 1
        name = f"{seed} {rollout.weights_version} {sample} ".encode() + prompt
        draws.append(float(hashlib.sha256(name).digest()[0] & 1))
    return draws


def by_reward_model(model, tokenizer, rollout, answers):
    """Score of the prompt with its answer."""
    conversations = [[*answer.item["messages"], lift_structure({"role": "assistant", "content": answer.text})[0]]
                     for answer in answers]
    return score_conversations(model, tokenizer, conversations, [answer.item.get("tools") for answer in answers])


def by_function(function, name, rollout, answers):
    """What the user's function says. UserError unless that is N finite numbers."""
    values = function([answer.text for answer in answers], [answer.item for answer in answers])
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError):
        raise UserError(f"--reward {name}: returned {str(values)[:80]!r}; it must return a list of numbers, one for "
                        "each text") from None
    if len(values) != len(answers):
        raise UserError(f"--reward {name}: returned {len(values)} numbers for {len(answers)} texts; it must return one "
                        "for each")
    if not all(map(math.isfinite, values)):
        bad = next(place for place, value in enumerate(values) if not math.isfinite(value))
        raise UserError(f"--reward {name}: returned {values[bad]} for the text {answers[bad].text[:80]!r}; it must "
                        "return finite numbers")
    return values


def by_constitution(ask, principles, calibrate, rollout, answers):
    """Score under a constitution, and what the evaluator put on yes and no, and how much it leans towards yes."""
    prompts = [answer.item["messages"][-1]["content"] for answer in answers]
    values, extra = score(ask, principles, [answer.text for answer in answers], prompts, calibrate)
    return values, {f"constitution_{name}": value for name, value in extra.items()}


# --- the mix


@dataclass
class Judge:
    """judge(rollout) -> (rewards (N,) float32 on the rollout's device, {name of a component: (N,)})."""
    parts: dict                 # name: (weight, function of (rollout, answers))
    tokenizer: object
    max_new_tokens: int

    @property
    def can_be_fooled(self):
        """Whether anything but rules and chance judges: a reward model, a constitution, a function of the user's."""
        return not self.parts.keys() <= RULES.keys() | {"random"}

    def __call__(self, rollout):
        answers = answers_of(rollout, self.max_new_tokens)
        device, components = rollout.input_ids.device, {}
        total = torch.zeros(len(answers), dtype=torch.float64)
        right = torch.zeros_like(total)                                         # (N,) what `format` multiplies
        gate = torch.ones_like(total)
        extras = {}
        for name, (weight, function) in self.parts.items():
            values, extra = with_extras(function(rollout, answers))
            components[name] = torch.from_numpy(values)
            extras |= extra
            if name == "format":
                gate = 1 - weight * (1 - components[name])
            elif name in RIGHTNESS:
                right += weight * components[name]
            else:
                total += weight * components[name]
        components |= {name: torch.from_numpy(np.asarray(values, float)) for name, values in extras.items()}
        rewards = (total + gate * right).float().to(device)
        return rewards, {name: values.float().to(device) for name, values in components.items()}


def with_extras(values):
    """(N numbers as an array, {name: N more}) of what a part returned."""
    values, extra = values if isinstance(values, tuple) else (values, {})
    return np.asarray(values, float), extra


def build(text, tokenizer, device="cpu", max_new_tokens=0, seed=0, evaluator="", calibrate="empty", policy=None):
    """The Judge of a --reward text (see above). UserError for a part that is none, or cannot be had.

    max_new_tokens: the most that is sampled for a prompt. evaluator: folder of the yes/no evaluator of a constitution,
    calibrate as in `eval.constitution.score`; policy: the model that is trained, whose weights the evaluator shares if
    it can (call this before the policy is wrapped). seed: of "random".
    """
    parts = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, weight = weight_of(part)
        weight = 1.0 if weight is None else weight
        if re.search(r":-[\d.]+$", part):
            raise UserError(f"--reward {part}: weights are positive (penalties are negative numbers already)")
        if not weight:
            raise UserError(f"--reward {part}: its weight is 0; leave the part out")
        key, function = part_of(name, tokenizer, device, seed, evaluator, calibrate, policy)
        if key in parts:
            raise UserError(f"--reward {text}: {key} is there twice; name each part once (folders and functions by "
                            "their last names)")
        if key in MEASURED and not max_new_tokens:
            raise ValueError(f"{key} needs max_new_tokens")
        parts[key] = weight, function
    if not parts:
        raise UserError("--reward names nothing; give checker, a reward model's folder, FILE.py:FUNCTION …")
    if "format" in parts and not any(name in parts for name in RIGHTNESS):
        raise UserError(f"--reward {text}: format multiplies checker or number and is nothing by itself; add one")
    if "format" in parts and parts["format"][0] > 1:
        raise UserError(f"--reward {text}: the weight of format is what an ill-formed answer loses, 1 at most")
    return Judge(parts, tokenizer, max_new_tokens)


def part_of(name, tokenizer, device, seed, evaluator, calibrate, policy):
    """(name for the log, function of (rollout, answers)) of one part of --reward."""
    if name in RULES:
        return name, functools.partial(by_rule, RULES[name])
    if name == "random":
        return name, functools.partial(by_lot, seed)
    if name.startswith("constitution:"):
        if not evaluator:
            raise UserError(f"--reward {name}: name the folder of a yes/no evaluator, --evaluator FOLDER "
                            "(train_reward.py --head yesno makes one)")
        principles = read_constitution(name.partition(":")[2])
        ask = load_evaluator(evaluator, device, policy, tokenizer)
        check_evaluator(ask, principles, evaluator)
        return "constitution", functools.partial(by_constitution, ask, principles, calibrate)
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return function, functools.partial(by_function, load_function(file, function), name)
    if pathlib.Path(name).is_dir():
        if is_language_model(name):
            raise UserError(f"--reward {name}: a language model, which gives no score; train a reward model of it with "
                            "train_reward.py, or ask it: --reward constitution:FILE --evaluator FOLDER")
        model, own_tokenizer = load_scorer(name, device)
        model.requires_grad_(False)
        return pathlib.Path(name).resolve().name, functools.partial(by_reward_model, model, own_tokenizer)
    raise UserError(f"--reward {name}: neither a rule ({', '.join(RULES)}, random), nor constitution:FILE, nor "
                    "FILE.py:FUNCTION, nor the folder of a reward model")


def load_function(file, name):
    """The function called `name` of a Python file."""
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f"--reward {file}:{name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                        # where the module's own dataclasses look for it
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {file}:{name}: the file must hold a function, def {name}(texts, items)")
    return getattr(module, name)


def check_prompts(judge, data):
    """UserError for prompts of a PromptDataset (or a Mixture of such) that the judge cannot judge."""
    for part, count, key in (("checker", "unchecked", "checker"), ("number", "unanswered", "answer")):
        if part in judge.parts and data.report[count]:
            row = next(row for row in range(len(data)) if data[row][key] is None)
            raise UserError(f'{data.where(row)[0]}: no "{key}" ({data.report[count]} such prompts), and --reward '
                            f"{part} needs one; add it, or use a reward that needs none, as a reward model's folder")


# --- canaries: texts that no good reward can like


CANARIES = ("yes", "empty", "copy", "repeat")


def canary_texts(name, items):
    """The texts of a canary, one for each item."""
    return {"yes": ["yes"] * len(items), "empty": [""] * len(items),
            "copy": [item["messages"][-1]["content"] for item in items],
            "repeat": [" ".join(["the"] * 16)] * len(items)}[name]


def written(items, texts, tokenizer):
    """A Rollout of answers that nobody sampled: texts (N), one to each of N items, in groups of one."""
    rows = []
    for item, text in zip(items, texts, strict=True):
        message, _ = lift_structure({"role": "assistant", "content": text})
        ids, mask, _ = completed(item["messages"], [message], item.get("tools"), tokenizer)
        size = len(mask) - mask[::-1].index(1)                  # through the token that ends the answer
        rows.append((ids[:size], mask[:size], [0.0] * size))
    return from_rows(rows, list(items), range(len(rows)), [True] * len(rows), list(texts), tokenizer.pad_id, 0)


def canaries(judge, rollout):
    """{"canary_yes", "canary_empty", "canary_copy", "canary_repeat": (B,)}: rewards of answers without merit to the B
    prompts of a rollout.

    A median above that of what the policy really said says that the reward can be had without doing what is meant.
    """
    first = {group: row for row, group in reversed(list(enumerate(rollout.groups.tolist())))}
    items = [rollout.items[first[group]] for group in sorted(first)]
    return {f"canary_{name}": judge(written(items, canary_texts(name, items), judge.tokenizer))[0]
            for name in CANARIES}
