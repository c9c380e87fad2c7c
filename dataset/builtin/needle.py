"""A needle in a haystack: one sentence that matters somewhere in a text of stories, and a question about it at the end.

The sentence says somebody's secret number, which nothing else does, so a right answer was read from there
(Mohtashami and Jaggi 2023, arXiv:2305.16300, call it passkey retrieval). How long the text is and how deep in it the
needle lies are free: eval/long_context.py asks at every length and depth, the kinds `needle` and `needle_test` of
generate.py hold texts that fit into 256 tokens, to learn the task from and to test it by.
"""

import re

from dataset.builtin import stories
from dataset.builtin.skills import Task, draw, skill
from dataset.builtin.world import PEOPLE, Fact, Relation

SECRET = Relation("secret number", ("The secret number of {s} is {v}.",), ("What is the secret number of {s}?",), "")
LONGEST = 110                                         # words of haystack; with question and answer below 256 tokens
NEEDLES = {}


def secret(rng):
    """A needle that is in no story: a Fact whose value is a number of two digits."""
    return Fact(rng.choice(PEOPLE), SECRET, str(rng.randint(10, 99)))


def key_of(needle):
    return f"needle:{needle.subject}:{needle.value}"


def count_words(text):
    return len(text.split())


def haystack(rng, needle, size, depth, measure=count_words):
    """A text of stories with the needle's statement in it, at most `size` long by `measure` (text -> int).

    depth is the share of the stories that comes before the needle: 0 puts it first, 1 last, right before a question.
    Stories are cut between sentences, at the end and where the needle stands.
    """
    room = size - measure(needle.statement)
    sentences, ends = [], [0]                         # ends[i]: length of the first i sentences
    while ends[-1] <= room:
        for sentence in re.split(r"(?<=[.!?]) ", stories.story(rng)):
            sentences.append(sentence)
            ends.append(ends[-1] + measure(sentence))
    count = max(i for i, end in enumerate(ends) if end <= max(room, 0))
    place = min(range(count + 1), key=lambda i: abs(ends[i] - depth * ends[count]))
    return " ".join([*sentences[:place], needle.statement, *sentences[place:count]])


def question(rng, needle, size, depth, measure=count_words):
    """The haystack, and on a line of its own what is asked about it."""
    asked, = needle.relation.asked
    return f"{haystack(rng, needle, size, depth, measure)}\n{asked.format(s=needle.subject)}"


@skill("number", levels=5, max_new_tokens=24, skills=NEEDLES)
def needle(rng, level):
    """Level 1: in the last fifth of the text, near the question. Level 5: in the first fifth."""
    hidden, size = secret(rng), rng.randint(20, LONGEST)
    depth = 1 - rng.uniform(level - 1, level) / 5
    return Task(key_of(hidden), {}, hidden.value, hidden.statement, wordings=(question(rng, hidden, size, depth),))


def conversations(rng, size):
    """Training records: questions about needles, with their answers."""
    for _ in range(size):
        yield {"conversations": draw(rng, "needle", skills=NEEDLES).conversation()}
