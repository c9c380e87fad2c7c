"""The skills: exercises without end whose answers are known, each in several difficulties.

A skill is one function `make(rng, level) -> Task` that draws an exercise; levels count from 1, the easiest. `draw`
turns a task into an `Item`: a question in words, the expected answer and the name of its checker. The task's key, not
its wording, decides the split (`world.split_of`): 8 + 5 and 5 + 8 share a key, and so do both spellings of a word, so
a held-out exercise is in no training record in any wording. `draw(rng, skill, "train", level)` is also how prompts for
reinforcement learning are made: at the level that a policy solves sometimes, but not always.

To add a skill, write a function below and register it; every kind of file, the tests and eval/skills.py then know it.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

from dataset.builtin.world import CATEGORIES, COLOURS, FACTS, PEOPLE, THINGS, VALUES, WORDS, split_of


@dataclass(frozen=True)
class Task:
    """One exercise before it is put into words."""
    key: str                                          # equal keys are the same exercise, whatever the wording
    values: dict                                      # what the skill's questions are filled with
    answer: str
    reply: str = ""                                   # what the assistant says in training, if not just the answer
    wordings: tuple = ()                              # questions of this task's own, instead of the skill's


@dataclass(frozen=True)
class Skill:
    name: str
    make: Callable
    levels: int
    questions: tuple                                  # wordings, filled with a task's values
    checker: str
    weight: float                                     # share of the training exercises, relative to the others
    max_new_tokens: int                               # enough for the longest right answer


@dataclass(frozen=True)
class Item:
    skill: str
    level: int
    key: str
    wordings: tuple                                   # all its questions; exercises with equal ones are equal
    question: str                                     # one of them
    answer: str
    checker: str
    reply: str

    def conversation(self):
        """The whole exchange, as a list of messages: what a fine-tuning record contains."""
        user = {"role": "user", "content": self.question}
        if self.checker != "tool_call":
            return [user, {"role": "assistant", "content": self.reply}]
        return [user, {"role": "assistant", "content": "", "tool_calls": [json.loads(self.answer)]},
                {"role": "tool", "content": self.reply}, {"role": "assistant", "content": self.reply}]


SKILLS = {}


def skill(checker, questions=(), levels=1, weight=1.0, max_new_tokens=16, skills=SKILLS):
    """Register the decorated function as a skill under its own name."""
    def register(make):
        skills[make.__name__] = Skill(make.__name__, make, levels, questions, checker, weight, max_new_tokens)
        return make
    return register


def draw(rng, skill_name, split="train", level=0, skills=SKILLS):
    """A random `Item` of the skill whose key belongs to `split`, at `level` (0: a random one)."""
    chosen = skills[skill_name]
    level = level or rng.randint(1, chosen.levels)
    for _ in range(10_000):                           # a split holds at least a twentieth of the keys
        task = chosen.make(rng, level)
        if split_of(task.key) == split:
            wordings = task.wordings or tuple(question.format(**task.values) for question in chosen.questions)
            return Item(skill_name, level, task.key, wordings, rng.choice(wordings), task.answer, chosen.checker,
                        task.reply or task.answer)
    raise RuntimeError(f"no {split} exercise of {skill_name} at level {level}: it has too few different keys")


def draw_all(rng, skill_name, split, size, skills=SKILLS):
    """Up to `size` items of a skill, its levels in turn, no exercise twice; fewer where there are no more."""
    levels = skills[skill_name].levels
    by_level = [{} for _ in range(levels)]
    for level, items in enumerate(by_level, start=1):
        for _ in range(20 * size):
            if len(items) < size // levels + (level <= size % levels):
                item = draw(rng, skill_name, split, level, skills)
                items.setdefault(item.wordings, item)
    if skills[skill_name].checker == "yes_no":        # as many yes as no, or always saying one of them would pay
        for place, items in enumerate(by_level):
            sides = [[item for item in items.values() if item.answer == answer] for answer in ("yes", "no")]
            pairs = min(map(len, sides))
            by_level[place] = {item.wordings: item for pair in zip(*(side[:pairs] for side in sides), strict=True)
                               for item in pair}
    in_turn = itertools.zip_longest(*(items.values() for items in by_level))
    return [item for items in in_turn for item in items if item is not None]


# --- words and letters: level 1 shows a word letter by letter ("m i l o"), which a tokenizer that keeps a space and a
# letter as one token makes easy; level 2 shows the word whole, and the model has to know how its tokens are spelled

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
UNFORTUNATE = ("fag", "cum", "rap", "sex", "kil", "tit", "pis", "fuc", "fuk", "naz", "dik", "dic", "coc", "kok", "hom",
               "nig", "neg", "kak", "cac", "pus", "nud", "gas", "hit", "jap", "bum", "dum", "wan")


def made_up_word(rng, length):
    """A pronounceable word of nothing, like 'milo' or 'arek'."""
    while True:
        vowel_first = rng.random() < 0.25
        word = "".join(rng.choice(VOWELS if (i % 2 == 0) == vowel_first else CONSONANTS) for i in range(length))
        if not any(part in word for part in UNFORTUNATE):
            return word


def spaced(word):
    return " ".join(word)


def word_to_show(rng, level):
    """(the word, how it is shown): spelled out at level 1, whole at level 2.

    Everyday words come spelled out only: whole they are one token, and a held-out one would have been spelled nowhere.
    """
    if level == 1 and rng.random() < 0.2:
        word = rng.choice(WORDS)
    else:
        word = made_up_word(rng, rng.randint(3, 7 if level == 1 else 5))
    return word, spaced(word) if level == 1 else word


@skill("letters", ("Repeat: {shown}", "Please repeat {shown}"), levels=2, weight=0.8)
def copy(rng, level):
    word, shown = word_to_show(rng, level)
    return Task(f"word:{word}", {"shown": shown}, shown)


@skill("letters", ("Spell: {word}", "How do you spell {word}?"), weight=1.2)
def spell(rng, level):
    word = made_up_word(rng, rng.randint(3, 6))
    return Task(f"word:{word}", {"word": word}, spaced(word))


@skill("letters", ("Reverse: {shown}", "Say {shown} backwards."), levels=2, weight=1.5)
def reverse(rng, level):
    word, shown = word_to_show(rng, level)
    return Task(f"word:{word}", {"shown": shown}, spaced(word[::-1]))


@skill("letters", ("Upper case: {shown}", "Write {shown} in capital letters."), levels=2, weight=1.2)
def upper_case(rng, level):
    word, shown = word_to_show(rng, level)
    return Task(f"word:{word}", {"shown": shown}, spaced(word.upper()))


@skill("number", ("Count {letter} in: {shown}", "How many times is {letter} in {shown}?"), levels=2, weight=1.2)
def count_letter(rng, level):
    word, _ = word_to_show(rng, level)
    letter = rng.choice(word)
    if level == 1 or rng.random() < 0.5:              # made-up words rarely repeat a letter: plant some more of it
        places = rng.sample(range(len(word)), rng.randint(0, len(word) // 2))
        word = "".join(letter if i in places else c for i, c in enumerate(word))
    shown = spaced(word) if level == 1 else word
    return Task(f"word:{word}", {"letter": letter, "shown": shown}, str(word.count(letter)))


@skill("letters", ("Sort the letters: {shown}", "Put {shown} in alphabetical order."), levels=3, weight=1.3)
def sort_letters(rng, level):
    length = (3, 5, 7)[level - 1]
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
    key = "letters:" + "".join(sorted(word))          # any order of the same letters is the same exercise
    return Task(key, {"shown": spaced(word)}, spaced(sorted(word)))


@skill("letters", ("The {which} letter of: {shown}", "What is the {which} letter of {shown}?"), levels=2, weight=0.6)
def first_last(rng, level):
    word, shown = word_to_show(rng, level)
    which = rng.choice(("first", "last"))
    return Task(f"word:{word}", {"which": which, "shown": shown}, word[0] if which == "first" else word[-1])


@skill("phrase", ("Which word is longest: {words}?", "Find the longest word: {words}"), levels=2, weight=0.7)
def longest_word(rng, level):
    """Two or three everyday words; the longest beats the others by at least two letters."""
    while True:
        words = rng.sample(WORDS, level + 1)
        lengths = sorted(map(len, words))
        if lengths[-1] >= lengths[-2] + 2:
            return Task("longest:" + ",".join(sorted(words)), {"words": ", ".join(words)}, max(words, key=len))


@skill("phrase", ("Which one does not belong: {words}?", "Odd one out: {words}"), weight=1.2)
def odd_one_out(rng, level):
    common, other = rng.sample(list(CATEGORIES), 2)
    stranger = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[common], 3), stranger]
    rng.shuffle(words)
    return Task("odd:" + ",".join(sorted(words)), {"words": ", ".join(words)}, stranger)


# --- numbers

def two_numbers(rng, digits):
    top = 10 ** digits - 1
    return rng.randint(0 if digits == 1 else 10, top), rng.randint(0 if digits == 1 else 10, top)


def addition(a, b):
    """One key for a + b and b + a, in whatever words they come."""
    return f"add:{min(a, b)},{max(a, b)}"


SUM_QUESTIONS = ("{a}+{b}", "What is {a}+{b}?", "What is {a} + {b}?")
DIFFERENCE_QUESTIONS = ("{a}-{b}", "What is {a}-{b}?", "What is {a} - {b}?")


@skill("number", SUM_QUESTIONS, levels=2, weight=1.5, max_new_tokens=8)
def add_one_digit(rng, level):
    """Level 1: two digits. Level 2: three digits, in any order one exercise."""
    a, b = two_numbers(rng, 1)
    if level == 1:
        return Task(addition(a, b), {"a": a, "b": b}, str(a + b))
    c = rng.randint(0, 9)
    key = "add:" + ",".join(map(str, sorted((a, b, c))))
    return Task(key, {}, str(a + b + c), wordings=(f"{a}+{b}+{c}", f"What is {a}+{b}+{c}?"))


@skill("number", SUM_QUESTIONS, levels=3, weight=2.5, max_new_tokens=8)
def add_two_digits(rng, level):
    """Level 1: one number has a single digit. Level 2: no carry. Level 3: with a carry."""
    a, b = two_numbers(rng, 2)
    if level == 1:
        b = rng.randint(1, 9)
        a, b = rng.choice(((a, b), (b, a)))
    else:
        while (a % 10 + b % 10 >= 10) != (level == 3):
            a, b = two_numbers(rng, 2)
    return Task(addition(a, b), {"a": a, "b": b}, str(a + b))


@skill("number", DIFFERENCE_QUESTIONS, levels=2, weight=1.0, max_new_tokens=8)
def subtract_one_digit(rng, level):
    """Level 1: a digit from a digit. Level 2: a digit from a number between 10 and 18, leaving a digit."""
    b, a = sorted(two_numbers(rng, 1))
    if level == 2:
        b = rng.randint(1, 9)
        a = rng.randint(10, b + 9)
    return Task(f"sub:{a},{b}", {"a": a, "b": b}, str(a - b))


@skill("number", DIFFERENCE_QUESTIONS, levels=3, weight=2.0, max_new_tokens=8)
def subtract_two_digits(rng, level):
    """Level 1: a single digit is taken away. Level 2: no borrow. Level 3: with a borrow."""
    while True:
        b, a = sorted(two_numbers(rng, 2))
        if level == 1:
            b = rng.randint(1, 9)
        if level == 1 or (a % 10 < b % 10) == (level == 3):
            return Task(f"sub:{a},{b}", {"a": a, "b": b}, str(a - b))


@skill("number", ("Which is {more}, {a} or {b}?", "The {more} number: {a} or {b}"), levels=3, weight=0.6,
       max_new_tokens=8)
def compare(rng, level):
    """Numbers of one, two and three digits."""
    while True:
        a, b = (rng.randint(0 if level == 1 else 10 ** (level - 1), 10 ** level - 1) for _ in range(2))
        if a != b:
            more = rng.choice(("larger", "smaller"))
            return Task(f"compare:{min(a, b)},{max(a, b)}", {"more": more, "a": a, "b": b},
                        str(max(a, b) if more == "larger" else min(a, b)))


@skill("numbers", ("Sort the numbers: {shown}", "Put in order: {shown}"), levels=3, weight=1.2, max_new_tokens=24)
def sort_numbers(rng, level):
    """Four digits, three or four numbers below 100."""
    values = [rng.randint(0, 9) for _ in range(4)] if level == 1 else [rng.randint(10, 99) for _ in range(level + 1)]
    ordered = " ".join(map(str, sorted(values)))
    return Task(f"numbers:{ordered}", {"shown": " ".join(map(str, values))}, ordered)


@skill("number", ("What comes next: {shown}", "Continue: {shown}"), levels=2, weight=1.3, max_new_tokens=8)
def next_number(rng, level):
    """Four numbers at equal steps, up (level 1) or also down (level 2); `stories.counting` has the steps of one."""
    step, start = rng.randint(2, 6), rng.randint(0, 40)
    values = [start + i * step for i in range(5)]
    if level == 2 and rng.random() < 0.5:
        values.reverse()
    return Task("next:" + ",".join(map(str, values)), {"shown": " ".join(map(str, values[:4]))}, str(values[4]))


GAINS = ("{who} has {a} {things}. {other} gives {who} {b} more. How many {things} does {who} have now?",
         "There are {a} {things} in a box. {who} puts in {b} more. How many {things} are in the box?",
         "{who} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?")
LOSSES = ("{who} has {a} {things}. {who} gives {b} to {other}. How many {things} does {who} have left?",
          "There are {a} {things} in a box. {who} takes out {b}. How many {things} are left?",
          "{who} finds {a} {things} and loses {b}. How many {things} are left?")
COUNTABLE = ("apples", "plums", "nuts", "books", "balls", "shells", "keys", "cups", "stones", "eggs")


@skill("number", levels=3, weight=2.0, max_new_tokens=8)
def word_problem(rng, level):
    """Level 1: gains of single digits. Level 2: losses of single digits. Level 3: one number has two digits."""
    gain = level == 1 or (level == 3 and rng.random() < 0.5)
    a = rng.randint(2, 9) if level < 3 else rng.randint(10, 40)
    b = rng.randint(2, 9) if gain else rng.randint(1, a if level == 2 else 9)
    who, other = rng.sample(PEOPLE, 2)
    story = rng.choice(GAINS if gain else LOSSES).format(who=who, other=other, a=a, b=b, things=rng.choice(COUNTABLE))
    return Task(addition(a, b) if gain else f"sub:{a},{b}", {}, str(a + b if gain else a - b),
                wordings=(story,))


OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}


@skill("tool_call", ("Use the calculator: {shown}", "Calculate {shown} with the calculator."), levels=2, weight=0.7,
       max_new_tokens=48)
def calculator(rng, level):
    """A sum too large for the head, in signs (level 1) or words (level 2): the answer is the right call of the tool."""
    a, b = rng.randint(100, 999), rng.randint(10, 999)
    sign = rng.choice(tuple(OPERATIONS))
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    shown = f"{a} {sign} {b}" if level == 1 else f"{a} {OPERATIONS[sign]} {b}"
    call = {"name": "calculator", "arguments": {"expression": f"{a}{sign}{b}"}}
    operands = (a, b) if sign == "-" else sorted((a, b))
    return Task(f"calculate:{sign}{operands}", {"shown": shown}, json.dumps(call), reply=str(result))


# --- the world: the facts stand in the pretraining text, the held-out ones are asked about in no training record

@skill("phrase", weight=1.5, max_new_tokens=32)
def fact(rng, level):
    known = rng.choice(FACTS)
    return Task(known.key, {}, known.value, reply=known.statement,
                wordings=tuple(question.format(s=known.subject) for question in known.relation.asked))


@skill("yes_no", weight=2.0, max_new_tokens=32)
def yes_no(rng, level):
    """The reply recalls the fact first: what stands before the answer is a thought that the answer can build on."""
    known = rng.choice(FACTS)
    question, answer, reply = is_it_so(rng, known)
    return Task(known.key, {}, answer, reply, wordings=(question,))


def is_it_so(rng, known):
    """(question, answer, reply): whether a fact has the right value (half of the time) or a wrong one."""
    wrong = [value for value in VALUES[known.relation.name] if value not in (known.value, known.subject)]
    answer = rng.choice(("yes", "no"))
    question = known.relation.yes_no.format(s=known.subject, v=known.value if answer == "yes" else rng.choice(wrong))
    return question, answer, f"{known.statement[:-1]}, so {answer}."


def quiz(rng):
    """A document for pretraining: yes or no about all that may be asked of one subject."""
    subject = rng.choice(FACTS).subject
    pairs = [is_it_so(rng, known) for known in FACTS if known.subject == subject and split_of(known.key) == "train"]
    rng.shuffle(pairs)
    return "\n\n".join(f"{question}\n{reply}" for question, _, reply in pairs) or quiz(rng)


# --- reading: the answer stands in the question

THING_TOLD = "The {thing} of {who} is {colour}."
THING_ASKED = ("Which colour is the {thing} of {who}?", "Who has the {colour} {thing}?",
               "Is the {thing} of {who} {other}?")


def asked_about(rng, owners, thing, who, level):
    """(question, answer, reply) about one of the owners {person: colour}: 1 the colour, 2 the owner, 3 yes or no."""
    colour = owners[who]
    other = colour if rng.random() < 0.5 else rng.choice([c for c in owners.values() if c != colour])
    question = THING_ASKED[level - 1].format(thing=thing, who=who, colour=colour, other=other)
    answer = (colour, who, "yes" if other == colour else "no")[level - 1]
    told = THING_TOLD.format(thing=thing, who=who, colour=colour)
    return question, answer, (told, f"{who}.", f"{told[:-1]}, so {answer}.")[level - 1]


def owners_of(rng, count):
    return dict(zip(rng.sample(PEOPLE, count), rng.sample(COLOURS, count), strict=True))


def told_of(owners, thing):
    return " ".join(THING_TOLD.format(thing=thing, who=who, colour=colour) for who, colour in owners.items())


@skill("phrase", levels=3, weight=2.0, max_new_tokens=32)
def read(rng, level):
    """Two people and their things. Level 1 asks for a colour, level 2 for the owner, level 3 whether it is so."""
    owners, thing = owners_of(rng, 2), rng.choice(THINGS)
    question, answer, reply = asked_about(rng, owners, thing, rng.choice(list(owners)), level)
    key = f"read:{thing}:" + ",".join(sorted(f"{who}-{colour}" for who, colour in owners.items()))
    return Task(key, {}, answer, reply, wordings=(f"{told_of(owners, thing)} {question}",))


def reading(rng):
    """A document for pretraining: three people, their things, and questions about them, each at most once."""
    owners, thing = owners_of(rng, 3), rng.choice(THINGS)
    pairs = [asked_about(rng, owners, thing, who, level) for who in owners for level in (1, 2, 3)]
    asked = "".join(f"\n\n{question}\n{reply}" for question, _, reply in rng.sample(pairs, 6))
    return told_of(owners, thing) + asked
