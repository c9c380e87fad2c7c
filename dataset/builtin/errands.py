"""Errands: problems that take two calls of tools (dataset/builtin/tools.py), the second made from what the first gives.

    How many cm are 3 m and 25 cm?
    <tool_call>{"name": "convert", "arguments": {"amount": "3 m", "to": "cm"}}</tool_call>
        300 cm
    <tool_call>{"name": "calculator", "arguments": {"expression": "300+25"}}</tool_call>
        325
    325

No text of the world tells how many shells somebody has: who does not look it up can only guess. The records leave the
tools' schemas out, which in the small vocabulary would fill a whole row: the traces show how to call them.

These skills (ERRANDS) are none of SKILLS: no other kind of file holds them. `world.split_of` divides them as it does
those, by key. No errand looks up a held-out fact of the world or calculates a held-out exercise of another skill.
"""

import json

from dataset.builtin.skills import Task, addition, draw, skill
from dataset.builtin.tools import BOOK, COUNTED, WEIGHED, call
from dataset.builtin.world import FACT_OF, PEOPLE, split_of, value_of

ERRANDS = {}


def errand(key, wordings, *calls, answer=""):
    """The Task of making these calls, each (name, arguments); its answer is what the last one gives, if not said.

    The reply is the list of the calls, as JSON.
    """
    calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return Task(f"errand:{key}", {}, answer or call(**calls[-1]), json.dumps(calls), tuple(wordings))


def is_free(sign, a, b):
    """Whether a+b or a-b belongs to the training part of every skill that calculates."""
    exercise = addition(a, b) if sign == "+" else f"sub:{a},{b}"
    operands = sorted((a, b)) if sign == "+" else (a, b)
    return split_of(exercise) == split_of(f"calculate:{sign}{operands}") == "train"


CHANGES = {"+": ("{who} finds {b} more {things}. How many {things} does {who} have now?",
                 "{who} gets {b} {things}. How many {things} does {who} have now?"),
           "-": ("{who} gives away {b} {things}. How many {things} does {who} have left?",
                 "{who} loses {b} {things}. How many {things} does {who} have left?")}


@skill("number", levels=2, max_new_tokens=48, skills=ERRANDS)
def change(rng, level):
    """Look up how many somebody has, then add (level 1) or subtract (level 2)."""
    sign = "+-"[level - 1]
    while True:
        who, things, b = rng.choice(PEOPLE), rng.choice(COUNTED), rng.randint(2, 99)
        a = int(BOOK[who.lower(), things])
        if (sign == "+" or b <= a) and is_free(sign, a, b):
            break
    return errand(f"change:{who},{things}{sign}{b}",
                  (wording.format(who=who, things=things, b=b) for wording in CHANGES[sign]),
                  ("lookup", {"name": who, "about": things}), ("calculator", {"expression": f"{a}{sign}{b}"}))


@skill("number", max_new_tokens=48, skills=ERRANDS)
def in_grams(rng, level):
    """Look up how many kilograms somebody has, then convert."""
    who, things = rng.choice(PEOPLE), rng.choice(WEIGHED)
    weight = BOOK[who.lower(), things]
    return errand(f"grams:{who},{things}",
                  (f"How many g of {things} does {who} have?", f"{who} has some {things}. How many g is it?"),
                  ("lookup", {"name": who, "about": things}),
                  ("convert", {"amount": weight, "to": "g"}), answer=f"{weight.split()[0]}000")


PAIRS_OF_UNITS = (("m", "cm"), ("km", "m"), ("kg", "g"), ("l", "ml"), ("h", "min"), ("min", "s"))


@skill("number", levels=2, max_new_tokens=48, skills=ERRANDS)
def add_units(rng, level):
    """Convert an amount, of one digit (level 1) or two (level 2), then add to it."""
    large, small = rng.choice(PAIRS_OF_UNITS)
    while True:
        a, b = rng.randint(10 ** (level - 1) + 1, 10 ** level - 1), rng.randint(2, 99)
        converted = call("convert", {"amount": f"{a} {large}", "to": small}).split()[0]
        if is_free("+", int(converted), b):
            break
    return errand(f"units:{a} {large},{b} {small}",
                  (f"How many {small} are {a} {large} and {b} {small}?",
                   f"What is {a} {large} plus {b} {small} in {small}?"),
                  ("convert", {"amount": f"{a} {large}", "to": small}),
                  ("calculator", {"expression": f"{converted}+{b}"}))


FRIENDS = [person for person in PEOPLE if split_of(FACT_OF[person, "friend"].key) == "train"]


@skill("phrase", max_new_tokens=48, skills=ERRANDS)
def of_friend(rng, level):
    """Look up who somebody's friend is, then how much of a thing the friend has."""
    who, about = rng.choice(FRIENDS), rng.choice(COUNTED + WEIGHED)
    much = "many" if about in COUNTED else "much"
    return errand(f"friend:{who},{about}",
                  (f"How {much} {about} does the best friend of {who} have?",
                   f"How {much} {about} does the friend of {who} have?"),
                  ("lookup", {"name": who, "about": "friend"}),
                  ("lookup", {"name": value_of(who, "friend"), "about": about}))


# --- records

def conversation(item):
    """The whole exchange of an errand: the question, every call with its result, and the last result as the answer."""
    messages = [{"role": "user", "content": item.question}]
    for made in json.loads(item.reply):
        result = call(**made)
        messages += [{"role": "assistant", "content": "", "tool_calls": [made]}, {"role": "tool", "content": result}]
    return [*messages, {"role": "assistant", "content": result}]


def errands(rng, size):
    """Conversations: one errand each, the four kinds equally often."""
    for _ in range(size):
        yield {"conversations": conversation(draw(rng, rng.choice(list(ERRANDS)), skills=ERRANDS))}
