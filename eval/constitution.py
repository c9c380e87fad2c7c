"""A constitution: principles in plain text, and how well texts keep them in the eyes of a yes/no evaluator.

    s(y) = sum_p w_p · sign_p · [ l_p(y) - l_p(y0) ] / sum_p w_p          l_p(y) = log p(yes | y, p) - log p(no | y, p)

The file has one principle on a line: its weight, the answer that a good text gets, the question.

    # weight  answer  question
    1         yes     Is the answer polite?
    1         no      Is the answer rude?

Lines that begin with # and empty lines are skipped. sign_p is +1 for yes and -1 for no. A question may hold {prompt},
in whose place the last thing that the user said is put: `1 yes Is this an answer to "{prompt}"?`. "builtin" is the
constitution of the built-in world (dataset/builtin/constitution.txt).

Why it is built like this: an evaluator asked only questions to which a good text is a yes rewards whatever makes it say
yes, and a policy that writes "yes" soon finds that out. So
  - ask every question both ways round, with the same weight: a lean towards yes then cancels (`lean` says what is left)
  - y0 is a text without merit, the empty one or the words of y in another order: what the evaluator says about that is
    taken off, so that a bare "yes", which has no other order, earns nothing ("shuffled")
  - an evaluator that puts less than MIN_MASS on yes and no together was led astray: that judgement counts -LIMIT
  - the evaluator's weights are frozen, and it reads the answer without thoughts and without empty lines, which its
    template uses to part the text from the question
(Bai et al. 2022, arXiv:2212.08073, section 4; the failure is told in the README of MiniHF.)
"""

import contextlib
import pathlib
import random
import re
from dataclasses import dataclass

import numpy as np

from dataset.builtin.checkers import final_answer
from dataset.jsonl import warn
from eval.judge import score_yesno
from eval.reward_model import is_adapter, is_language_model, load_scorer
from model.adapters.adapted import active_adapter, switch
from model.adapters.folder import load_adapter
from model.checkpoint import open_weights
from model.config import SAID_OF_ITSELF
from model.errors import UserError
from model.generate import inference

BUILTIN = pathlib.Path(__file__).resolve().parents[1] / "dataset" / "builtin" / "constitution.txt"
LIMIT = 8.0                # log-odds beyond ±LIMIT say no more than that: 1 in 3000
MIN_MASS = 0.5             # of p(yes) + p(no), below which an answer of the evaluator is none


@dataclass(frozen=True)
class Principle:
    weight: float
    answer: str                 # what the question gets for a good text: "yes" or "no"
    question: str


def read_constitution(path):
    """The principles of a file (or of "builtin"), a list of Principle. UserError with file:line for a bad line."""
    path = BUILTIN if str(path) == "builtin" else pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"constitution {path}: cannot be read ({error}); give a text file or builtin") from None
    principles = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s+(yes|no)\s+(\S.*?)\s*", line)
        if not found or not float(found[1]):
            raise UserError(f'{path}:{number}: expected a weight above 0, yes or no, and the question, as '
                            '"1 no Is the answer rude?"')
        principles.append(Principle(float(found[1]), found[2], found[3]))
    if not principles:
        raise UserError(f"{path}: holds no principle; give lines as \"1 no Is the answer rude?\"")
    if lean := polarity(principles):
        warn(f"{path}: good texts are to be a {'yes' if lean > 0 else 'no'} more often than the other ({lean:+.0%} by "
             "weight), so an evaluator that leans that way rewards any text; ask each question both ways round")
    return principles


def polarity(principles):
    """Weight of the questions to be answered with yes less that of the others, as a share of all: 0 is balanced."""
    total = sum(principle.weight for principle in principles)
    return sum(principle.weight * sign(principle) for principle in principles) / total


def sign(principle):
    return 1 if principle.answer == "yes" else -1


# ------------------------------------------------------------------------------------------------ scores


def score(ask, principles, texts, prompts=None, calibrate="empty"):
    """How well texts keep a constitution, by log-odds: (scores (n,), {"mass": (n,), "lean": (n,)}), float64 arrays.

    ask          (questions, texts), two lists of m -> (log-odds of yes (m,), mass (m,)); see `load_evaluator`
    texts        n answers, as they were sampled; prompts: n, what each answers, for questions with {prompt} in them
    calibrate    y0: "empty", "shuffled", or "none" for none
    mass         what the evaluator put on yes and no, mean over the principles
    lean         mean log-odds of yes over all questions, good or bad: what grows when "yes" wins by being said
    """
    if calibrate not in ("none", "empty", "shuffled"):
        raise UserError(f"constitution: calibration by {calibrate!r}; choose none, empty or shuffled")
    texts = [readable(text) for text in texts]
    questions = [[principle.question.replace("{prompt}", prompt) for prompt in prompts or [""] * len(texts)]
                 for principle in principles]                                                   # (P, n)
    log_odds, mass = ask_all(ask, questions, texts)                                             # (P, n) each
    gain = np.clip(log_odds, -LIMIT, LIMIT)
    if calibrate != "none":
        plain = [""] * len(texts) if calibrate == "empty" else [shuffled(text) for text in texts]
        gain = gain - np.clip(ask_all(ask, questions, plain)[0], -LIMIT, LIMIT)
    weights, signs = (np.array(column)[:, None] for column in
                      zip(*((principle.weight, sign(principle)) for principle in principles), strict=True))
    gain = np.where(mass < MIN_MASS, -LIMIT, signs * gain)
    return (weights * gain).sum(0) / weights.sum(), {"mass": mass.mean(0), "lean": log_odds.mean(0)}


def ask_all(ask, questions, texts):
    """`ask` for each of P lists of n questions about the n texts, the same pair only once: arrays (P, n), (P, n)."""
    pairs = [(question, text) for row in questions for question, text in zip(row, texts, strict=True)]
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    found = ask(*map(list, zip(*places, strict=True)))
    order = np.array([places[pair] for pair in pairs]).reshape(len(questions), len(texts))
    return tuple(np.asarray(values, float)[order] for values in found)


def check_evaluator(ask, principles, folder):
    """UserError for an evaluator that does not answer the questions of a constitution even about a plain sentence."""
    questions = [principle.question for principle in principles]
    _, mass = ask(questions, ["I am happy to help you."] * len(questions))
    if np.mean(mass) < MIN_MASS:
        raise UserError(f"{folder}: puts {np.mean(mass):.1%} on yes and no together, so it does not answer the "
                        "questions of the constitution; train it with train_reward.py --head yesno, or give another")


def readable(text):
    """What the evaluator reads of an answer: no thoughts, and no empty lines, with which it could end the text and ask
    a question of its own."""
    return re.sub(r"\n\s*\n", "\n", final_answer(text))


def shuffled(text):
    """The words of a text in another order, always the same."""
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


# ------------------------------------------------------------------------------------------------ evaluator


def load_evaluator(folder, device, policy=None, tokenizer=None):
    """The frozen evaluator in a folder as a function: ask(questions, texts) -> (log-odds of yes (m,), mass (m,)).

    policy: the model that is being trained, with its tokenizer. If it is trained through an adapter, and the folder is
    an adapter for the same weights, the evaluator becomes a second adapter on them and needs no model of its own. Call
    this before the optimizer is made and the policy is wrapped.
    """
    if not is_language_model(folder):
        raise UserError(f"{folder}: a reward model, which answers no questions; a constitution needs a yes/no "
                        "evaluator (train_reward.py --head yesno)")
    if policy is None or not policy.adapters or not fits(folder, policy):
        model, own_tokenizer = load_scorer(folder, device)
        model.requires_grad_(False)

        def ask(questions, texts):
            with inference(model):
                return score_yesno(model, own_tokenizer, questions, texts)
        return ask

    name = "evaluator"
    said = {key: getattr(policy.config, key) for key in SAID_OF_ITSELF}       # what the policy's own folder will say
    trained, in_use = [p for p in policy.parameters() if p.requires_grad], active_adapter(policy)
    load_adapter(policy, folder, name)
    template = policy.config.judge_template
    policy.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    switch(policy, in_use)
    for key, value in said.items():
        setattr(policy.config, key, value)

    def ask_second(questions, texts):
        with as_evaluator(policy, name, template), inference(policy):
            return score_yesno(policy, tokenizer, questions, texts)
    return ask_second


def fits(folder, policy):
    """Whether a folder holds an adapter that was trained on the very weights under the policy's adapter."""
    if not is_adapter(folder):
        return False
    with open_weights(pathlib.Path(folder) / "adapter_model.safetensors") as file:
        base = (file.metadata() or {}).get("base_fingerprint", "")
    return bool(base) and base == policy.fingerprint


@contextlib.contextmanager
def as_evaluator(policy, name, template):
    """Inside, the policy's base carries the evaluator's adapter and asks with its template."""
    in_use, own = active_adapter(policy), policy.config.judge_template
    switch(policy, name)
    policy.config.judge_template = template
    try:
        yield
    finally:
        switch(policy, in_use)
        policy.config.judge_template = own
