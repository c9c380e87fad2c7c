"""Is this answer right? One pure function per way of judging: (answer text, expected) -> bool.

Evaluation and rule rewards use the same functions, so that what is trained is what is measured. They accept the bare
answer and a short sentence that ends with it; they never execute what a model wrote.
"""

import json
import re

from model.errors import UserError


def final_answer(text):
    """What an answer finally says: inside <answer>…</answer> if there is one, otherwise all but the thoughts."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (answers[-1] if answers else re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)).strip()


def number(text, expected):
    """The last whole number in the text is the expected one: '92', 'The answer is 92.', '$1,092'"""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)                      # commas between thousands
    numbers = re.findall(r"(?<![\d.])-?\d+(?!\.?\d)", text)
    return bool(numbers) and int(numbers[-1]) == int(expected)


def numbers(text, expected):
    """The same numbers in the same order, whatever separates them: '2 4 9', '2, 4, 9.'"""
    return re.findall(r"\d+", text) == expected.split()


def letters(text, expected):
    """The same letters in the same order and case; spaces, commas, hyphens, quotes and full stops do not count."""
    def bare(s):
        return re.sub(r"""[\s,\-"'.]""", "", s)
    return bare(text) == bare(expected)


def phrase(text, expected):
    """The text is the expected words or a sentence that ends with them; case and final punctuation do not count."""
    def words(s):
        return re.findall(r"[\w'-]+", s.lower())
    said, wanted = words(text), words(expected)
    return bool(wanted) and said[-len(wanted):] == wanted


def yes_no(text, expected):
    """Of the words yes and no, the text holds the expected one only: 'No.', 'The fox is red, so no.'"""
    return {word for word in re.findall(r"\w+", text.lower()) if word in ("yes", "no")} == {expected}


def exact(text, expected):
    """The very same text, but for spaces around and between words."""
    return text.split() == expected.split()


def tool_call(text, expected):
    """Exactly one <tool_call>{json}</tool_call> with the expected name and arguments, spaces in strings aside."""
    def plain(value):
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return value.replace(" ", "") if isinstance(value, str) else value

    calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, flags=re.DOTALL)
    if len(calls) != 1:
        return False
    try:
        call = json.loads(calls[0])
    except (ValueError, RecursionError):
        return False
    return plain(call) == plain(json.loads(expected))


def manners(text, expected):
    """The preferred kind of answer to a request (`preferences.preferred`); expected: {"request", "answer"} as JSON."""
    from dataset.builtin.preferences import preferred
    return preferred(text=text, **json.loads(expected))


CHECKERS = {f.__name__: f for f in (number, numbers, letters, phrase, yes_no, exact, tool_call, manners)}


def as_expected(name, answer):
    """The answer of a record as the text that the checker called `name` compares with. UserError where none can be."""
    if name not in CHECKERS:
        raise UserError(f"unknown checker {name!r}; the checkers are {', '.join(CHECKERS)}")
    if answer is None:
        raise UserError(f'the checker {name!r} needs an "answer" to compare with')
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    try:
        if name == "number":
            int(text)
        if name == "tool_call":
            json.loads(text)
    except (ValueError, RecursionError):
        needs = {"number": "a whole number", "tool_call": "a call as JSON"}[name]
        raise UserError(f"the checker {name!r} compares with {needs}, and the answer is {text[:80]!r}") from None
    return text


def check(name, text, expected):
    """Judge an answer by the checker called `name`.

    >>> check("number", "<think>8 and 5</think> That makes 13.", "13")
    True
    """
    if name not in CHECKERS:
        raise UserError(f"unknown checker {name!r}; the checkers are {', '.join(CHECKERS)}")
    return CHECKERS[name](final_answer(text), expected)
