"""Which of two answers is better? Pairs for reward models and preference optimisation, and the judge of answers.

What is preferred is good manners: right, complete, and as polite as the request was. By kind of request:

    polite      an exercise asked with "please": the right answer, then "You are welcome!"
    plain       an exercise asked without: the right answer and nothing else
    about       "Tell me about Mia.": three different facts, all true, where to find her first
    greeting    "Hello": greets back and offers help
    skill       exercises of every difficulty: the right answer (only in training data, lest they be forgotten)

A fine-tuned model has all of this in it, but does it only sometimes (half of its greetings offer help) or hardly ever
(it never learnt that "please" is answered): its preferences are to be trained, not its knowledge. The rejected answers
are wrong, incomplete, rude, or polite where nobody asked for it. `preferred` judges any answer by the same rule, so
that a policy's own samples can be scored. Held-out requests share no exercise, subject or greeting with training.
"""

import json
import re
import string

from dataset.builtin.skills import SKILLS, draw
from dataset.builtin.stories import SMALL_TALK
from dataset.builtin.world import ANIMALS, FACT_OF, FACTS, PEOPLE, VALUES, split_of

EXERCISES = ("fact", "fact", "fact", "first_last", "compare", "copy", "reverse")      # at level 1: only manners are new
PLEASE = ("Could you please help me? {}", "Please help me. {}", "I have a question, please. {}")
COURTESY = " You are welcome!"
OFFER = "Hello! How can I help you?"
HELLOS, OTHER_HELLOS = next((asked, answered) for asked, answered in SMALL_TALK if OFFER in answered)
GREETINGS = (*HELLOS, *(f"{hello.rstrip('!')}! I am {person}." for hello in HELLOS for person in PEOPLE))
RUDE = ("Leave me alone.", "Find it out yourself.", "I do not care.", "What a silly question.")
PLACES = ("home", "place", "nature")                 # relations that say where to find somebody or something


def courteous(answer):
    """An answer with good manners: "red" becomes "red. You are welcome!"."""
    return answer + ("" if answer.endswith(".") else ".") + COURTESY


def preferred(request, text, answer):
    """Whether `text` is the preferred kind of answer to a request; `answer` is the record's.

    >>> preferred("polite", "13. You are welcome!", "13")
    True
    """
    text = text.strip()
    if request == "polite":
        return text == courteous(answer)
    if request == "about":
        statements = {fact.statement: fact.relation.name for fact in FACTS if fact.subject == answer}
        said = re.findall(r"[^.]+\.", text)
        told = [statements.get(sentence.strip()) for sentence in said]
        return "".join(said) == text and len(told) == len(set(told)) == 3 and None not in told and told[0] in PLACES
    return text == answer


# --- pairs, by kind of request: (question, chosen, rejected, the answer that `preferred` wants)


def exercise(rng, split):
    """An easy exercise; of the facts one that fine-tuning asked for: to be polite about it is what is held out."""
    name = rng.choice(EXERCISES)
    while True:
        item = draw(rng, name, "train" if name == "fact" else split, level=1)
        if name != "fact" or split_of(f"preference:{item.key}") == split:
            return item


def polite(rng, split):
    item = exercise(rng, split)
    impatient = courteous(item.reply).removesuffix(COURTESY) + " " + rng.choice(RUDE)
    rejected, = rng.choices((item.reply, courteous(wrong(rng, item)), impatient, rng.choice(RUDE)), (5, 3, 1, 1))
    return rng.choice(PLEASE).format(item.question), courteous(item.reply), rejected, item.reply


def plain(rng, split):
    item = exercise(rng, split)
    rejected, = rng.choices((courteous(item.reply), wrong(rng, item), rng.choice(RUDE)), (5, 4, 1))
    return item.question, item.reply, rejected, item.reply


def skill(rng, split):
    item = draw(rng, rng.choice([name for name in SKILLS if name not in ("calculator", "fact")]), split)
    return item.question, item.reply, wrong(rng, item), item.reply


def about(rng, split):
    subject = drawn(rng, sorted({fact.subject for fact in FACTS}), split)
    known = [fact for fact in FACTS if fact.subject == subject]
    place = next(fact for fact in known if fact.relation.name in PLACES)
    first, second = rng.sample([fact for fact in known if fact is not place], 2)
    chosen = [place.statement, first.statement, second.statement]
    lie = rng.randrange(3)
    lies = [false_statement(rng, fact) if i == lie else fact.statement for i, fact in enumerate((place, first, second))]
    later = [chosen[1], *rng.sample([chosen[0], chosen[2]], 2)]
    rejected, = rng.choices((later, lies, chosen[:rng.randint(1, 2)], [rng.choice(RUDE)]), (5, 3, 1, 1))
    return f"Tell me about {'the ' * (subject in ANIMALS)}{subject}.", " ".join(chosen), " ".join(rejected), subject


def greeting(rng, split):
    asked = drawn(rng, GREETINGS, split)
    rejected, = rng.choices((rng.choice([said for said in OTHER_HELLOS if said != OFFER]), rng.choice(RUDE)), (7, 3))
    return asked, OFFER, rejected, OFFER


def drawn(rng, things, split):
    """A random one of those that belong to the split."""
    return rng.choice([thing for thing in things if split_of(f"preference:{thing}") == split])


def wrong(rng, item):
    """An answer of the right form that is not right."""
    if item.skill == "fact":
        return false_statement(rng, FACT_OF[tuple(item.key.split(":")[1:])])
    if item.answer in ("yes", "no"):
        return item.reply.removesuffix(f"{item.answer}.") + ("no." if item.answer == "yes" else "yes.")
    if item.checker == "phrase":
        return next(other.reply for other in iter(lambda: draw(rng, item.skill, "train", item.level), None)
                    if other.reply != item.reply)
    place = rng.choice([place for place, c in enumerate(item.reply) if c.isalnum()])
    alphabet = next(some for some in (string.digits, string.ascii_lowercase, string.ascii_uppercase)
                    if item.reply[place] in some)
    return item.reply[:place] + rng.choice(alphabet.replace(item.reply[place], "")) + item.reply[place + 1:]


def false_statement(rng, fact):
    others = [value for value in VALUES[fact.relation.name] if value not in (fact.value, fact.subject)]
    return fact.relation.told[0].format(s=fact.subject, v=rng.choice(others))


MANNERS = {polite: 6, plain: 4, about: 2, greeting: 3}            # and how often each comes
TRAINING = {polite: 6, plain: 3, about: 4, greeting: 2, skill: 8}


def pairs(rng, size, split="train"):
    """Records {"chosen", "rejected"} with what `preferred` needs to judge other answers: "request" and "answer"."""
    kinds = TRAINING if split == "train" else MANNERS
    for kind in rng.choices(list(kinds), kinds.values(), k=size):
        question, chosen, rejected, answer = kind(rng, split)
        user = {"role": "user", "content": question}
        yield {"chosen": [user, {"role": "assistant", "content": chosen}],
               "rejected": [user, {"role": "assistant", "content": rejected}],
               "request": kind.__name__, "answer": answer}


def requests(rng, size, split):
    """Prompts of the same kinds, without answers: what a policy is asked that learns manners from a reward."""
    for kind in rng.choices(list(MANNERS), MANNERS.values(), k=size):
        question, _, _, answer = kind(rng, split)
        yield {"skill": kind.__name__, "conversations": [{"role": "user", "content": question}], "checker": "manners",
               "answer": json.dumps({"request": kind.__name__, "answer": answer}), "max_new_tokens": 48}
