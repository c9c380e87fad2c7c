"""Reasoning: exercises that are hard to answer at once and easy step by step, each with its steps written down.

The steps are what one does on paper: columns from the right, the carry said aloud. One digit at a time is all that a
step asks for, so a small model can take every one of them, and hardly ever guesses the whole:

    What is 47832+25914?
    <think>
    2+4+0=6 c0            the digits of a column and the carry from the one before; the digit to write, the carry
    3+1+0=4 c0
    8+9+0=7 c1
    7+5+1=3 c1
    4+2+1=7 c0
    </think>

    73746

In a difference b1 is a borrow. These skills (TRACED) are none of SKILLS: no other kind of file holds them.
`world.split_of` divides them as it does those, by key. (The steps themselves are sums, differences and products of
digits, and training holds all of them.)
"""

from dataset.builtin.skills import COUNTABLE, DIFFERENCE_QUESTIONS, SUM_QUESTIONS, Task, addition, draw, skill
from dataset.builtin.world import PEOPLE

TRACED = {}
DIRECT = 0.1                                          # share of the answers without a thought among the traces


# --- steps

def sum_steps(a, b):
    """Column addition, from the right."""
    lines, carry = [], 0
    for x, y in columns(a, b):
        lines.append(f"{x}+{y}+{carry}={(x + y + carry) % 10} c{(x + y + carry) // 10}")
        carry = (x + y + carry) // 10
    return lines


def difference_steps(a, b):
    """Column subtraction (a >= b), from the right; b1 is a borrow from the next column."""
    lines, borrow = [], 0
    for x, y in columns(a, b):
        lines.append(f"{x}-{y}-{borrow}={(x - y - borrow) % 10} b{int(x < y + borrow)}")
        borrow = int(x < y + borrow)
    return lines


def product_steps(a, b):
    """Column multiplication by the digit b, from the right: the product, then the carry added to it."""
    lines, carry = [], 0
    for x, _ in columns(a, 0):
        lines += [f"{x}*{b}={x * b}", f"{x * b}+{carry}={(x * b + carry) % 10} c{(x * b + carry) // 10}"]
        carry = (x * b + carry) // 10
    return lines


def columns(a, b):
    """The digits of two numbers in pairs, from the right, the shorter number filled up with zeros."""
    width = max(len(str(a)), len(str(b)))
    return list(zip(map(int, f"{a:0{width}}"[::-1]), map(int, f"{b:0{width}}"[::-1]), strict=True))


def thought(lines, answer):
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n\n{answer}"


# --- skills

@skill("number", SUM_QUESTIONS, levels=2, max_new_tokens=96, skills=TRACED)
def add_columns(rng, level):
    """Numbers of five and of six digits."""
    a, b = (rng.randint(10 ** (level + 3), 10 ** (level + 4) - 1) for _ in range(2))
    return Task(addition(a, b), {"a": a, "b": b}, str(a + b), thought(sum_steps(a, b), a + b))


@skill("number", DIFFERENCE_QUESTIONS, levels=2, max_new_tokens=96, skills=TRACED)
def subtract_columns(rng, level):
    """Numbers of five and of six digits, the smaller from the larger."""
    b, a = sorted(rng.randint(10 ** (level + 3), 10 ** (level + 4) - 1) for _ in range(2))
    return Task(f"sub:{a},{b}", {"a": a, "b": b}, str(a - b), thought(difference_steps(a, b), a - b))


@skill("number", ("{a}*{b}", "What is {a}*{b}?", "What is {a} * {b}?"), levels=2, max_new_tokens=64, skills=TRACED)
def multiply_columns(rng, level):
    """A number of two or three digits and a digit."""
    a, b = rng.randint(10 ** level, 10 ** (level + 1) - 1), rng.randint(2, 9)
    return Task(f"mul:{a},{b}", {"a": a, "b": b}, str(a * b), thought(product_steps(a, b), a * b))


STORIES = {"++": "{who} has {a} {things}. {other} gives {who} {b} more, and then {c} more. "
                 "How many {things} does {who} have now?",
           "+-": "{who} has {a} {things}. {other} gives {who} {b} more. {who} loses {c}. "
                 "How many {things} does {who} have left?",
           "-+": "There are {a} {things} in a box. {who} takes out {b}. {other} puts in {c}. "
                 "How many {things} are in the box?",
           "--": "There are {a} {things} in a box. {who} takes out {b} and {other} takes out {c}. "
                 "How many {things} are left?"}


@skill("number", levels=1, max_new_tokens=96, skills=TRACED)
def two_steps(rng, level):
    """A story in which a number of three digits changes twice, by numbers of two digits."""
    signs = rng.choice(list(STORIES))
    a, b, c = rng.randint(200, 899), rng.randint(10, 99), rng.randint(10, 99)
    lines, value = [], a
    for sign, other in zip(signs, (b, c), strict=True):
        lines.append(f"{value}{sign}{other}")
        lines += sum_steps(value, other) if sign == "+" else difference_steps(value, other)
        value += other if sign == "+" else -other
    lines.append(str(value))
    who, friend = rng.sample(PEOPLE, 2)
    story = STORIES[signs].format(who=who, other=friend, a=a, b=b, c=c, things=rng.choice(COUNTABLE))
    return Task(f"two:{signs}{a},{b},{c}", {}, str(value), thought(lines, value), wordings=(story,))


# --- records

def traces(rng, size, direct=DIRECT):
    """Conversations: exercises answered after a thought, some of them at once, with an empty one in its place."""
    for _ in range(size):
        item = draw(rng, rng.choice(list(TRACED)), skills=TRACED)
        user, assistant = item.conversation()
        if rng.random() < direct:
            assistant["content"] = f"<think>\n\n</think>\n\n{item.answer}"
        yield {"conversations": [user, assistant]}


def traces_direct(rng, size):
    """The same exercises, all answered at once: what thinking is compared with."""
    yield from traces(rng, size, direct=1)
