"""Tools that a model may call: a calculator, a converter of units, and a book about the built-in world.

A tool is a pure function from the arguments of a call to a short text. What a model writes is never executed: the
calculator reads its expression by hand, one character after another, and numbers, lengths and depths are bounded. A
call that cannot be answered gets a text too, which begins with "error": the model reads it and may try again.

    >>> call("convert", {"amount": "3 m", "to": "cm"})
    '300 cm'

`TOOLS` names them, `SCHEMAS` describes them as chat templates and OpenAI's interface expect it.
"""

import random
import re
from fractions import Fraction

from dataset.builtin.world import FACT_OF, PEOPLE

LONGEST_ARGUMENT = 100                                # characters of an expression, an amount or a name
LARGEST = 10 ** 15                                    # of the numbers read and of all results on the way


class ToolError(Exception):
    """A call without an answer; its text says why. `call` turns it into a result."""


def call(name, arguments):
    """What the tool `name` answers to {argument: value}, a short text; "error: …" where it has no answer.

    Never raises, whatever the arguments are: they come from a model.
    """
    if not isinstance(name, str) or name not in TOOLS:
        return f"error: the tools are {', '.join(TOOLS)}"
    wanted = PARAMETERS[name]
    if not isinstance(arguments, dict) or arguments.keys() != wanted.keys():
        return f"error: {name} needs {', '.join(wanted)}"
    for argument, value in arguments.items():
        if not isinstance(value, str) or len(value) > LONGEST_ARGUMENT:
            return f"error: {argument} must be a text, and not longer than {LONGEST_ARGUMENT}"
    try:
        return TOOLS[name](**arguments)
    except ToolError as error:
        return f"error: {error}"


def failed(result):
    """Whether a result of `call` says that there is none."""
    return result.startswith("error: ")


# --- the calculator

NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")


def calculator(expression):
    """The value of an expression of numbers, + - * / and parentheses.

    >>> calculator("(345+27)*3")
    '1116'
    """
    text = expression.replace(" ", "")
    value, end = read_sum(text, 0)
    if end < len(text):
        raise ToolError(f"cannot read {text[end]!r} in the expression")
    return written(value)


def read_sum(text, start):
    """sum = product (("+" | "-") product)*.   Returns (value, where it ends), as the others do."""
    value, end = read_product(text, start)
    while text[end:end + 1] in ("+", "-"):
        other, after = read_product(text, end + 1)
        value, end = bounded(value + other if text[end] == "+" else value - other), after
    return value, end


def read_product(text, start):
    """product = factor (("*" | "/") factor)*"""
    value, end = read_factor(text, start)
    while text[end:end + 1] in ("*", "/"):
        other, after = read_factor(text, end + 1)
        if text[end] == "/" and other == 0:
            raise ToolError("division by zero")
        value, end = bounded(value * other if text[end] == "*" else value / other), after
    return value, end


def read_factor(text, start):
    """factor = "-" factor | "(" sum ")" | number"""
    if text[start:start + 1] == "-":
        value, end = read_factor(text, start + 1)
        return -value, end
    if text[start:start + 1] == "(":
        value, end = read_sum(text, start + 1)
        if text[end:end + 1] != ")":
            raise ToolError("a ) is missing")
        return value, end + 1
    found = NUMBER.match(text, start)
    if not found:
        raise ToolError("the expression is not complete" if start == len(text) else
                        f"cannot read {text[start]!r} in the expression")
    return Fraction(found[0]), found.end()


def bounded(value):
    """`value`, if neither it nor what it is a fraction of is too large to go on with."""
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ToolError("the number is too large")
    return value


def written(value):
    """A Fraction as text, to six decimals: '5', '0.333333', '-1.5'."""
    millionths = round(value * 10 ** 6)
    whole, rest = divmod(abs(millionths), 10 ** 6)
    sign = "-" if millionths < 0 else ""
    return f"{sign}{whole}.{rest:06}".rstrip("0").rstrip(".")


# --- the converter

UNITS = {                                             # unit: (what it measures, how many of the smallest unit)
    "mm": ("length", 1), "cm": ("length", 10), "m": ("length", 1000), "km": ("length", 1_000_000),
    "g": ("weight", 1), "kg": ("weight", 1000), "t": ("weight", 1_000_000),
    "s": ("time", 1), "min": ("time", 60), "h": ("time", 3600), "day": ("time", 86_400),
    "ml": ("volume", 1), "l": ("volume", 1000),
}


def convert(amount, to):
    """An amount, "3 m", in another unit of the same kind.

    >>> convert("90 min", "h")
    '1.5 h'
    """
    found = re.fullmatch(rf"(-?{NUMBER.pattern}) ?([a-z]+)", amount.strip())
    unit, to = found[3] if found else "", to.strip()
    if unit not in UNITS or to not in UNITS:
        raise ToolError("no such amount or unit")
    if UNITS[unit][0] != UNITS[to][0]:
        raise ToolError(f"{unit} and {to} do not measure the same")
    return f"{written(Fraction(found[1]) * UNITS[unit][1] / UNITS[to][1])} {to}"


# --- the book

COUNTED = ("apples", "nuts", "books", "shells", "cups", "eggs")
WEIGHED = ("bread", "honey", "cheese", "rice", "corn", "wood")


def stores():
    """{(person, thing): what the person has of it}, always the same: no text tells it, only the book."""
    rng = random.Random("the book")
    counts = {(person, thing): str(rng.randint(10, 99)) for person in PEOPLE for thing in COUNTED}
    return counts | {(person, thing): f"{rng.randint(2, 99)} kg" for person in PEOPLE for thing in WEIGHED}


BOOK = {(subject.lower(), relation): fact.value for (subject, relation), fact in FACT_OF.items()}
BOOK |= {(person.lower(), thing): value for (person, thing), value in stores().items()}
SUBJECTS = {subject for subject, _ in BOOK}


def lookup(name, about):
    """One fact about a person, an animal or a town of the world: their home, their friend, how many shells they have.

    >>> lookup("fox", "diet")
    'berries'
    """
    name, about = name.strip().lower(), about.strip().lower()
    if name not in SUBJECTS:
        raise ToolError("the book has no such name")
    if (name, about) not in BOOK:
        raise ToolError("the book does not say that")
    return BOOK[name, about]


# --- what they are called

TOOLS = {tool.__name__: tool for tool in (calculator, convert, lookup)}
DESCRIPTIONS = {
    "calculator": "Work out numbers with + - * / and parentheses.",
    "convert": f"Convert an amount to another unit. Units: {', '.join(UNITS)}.",
    "lookup": "Look up one thing about a person, an animal or a town.",
}
PARAMETERS = {
    "calculator": {"expression": "for example 345+27"},
    "convert": {"amount": "a number and its unit, for example 3 m", "to": "the unit wanted, for example cm"},
    "lookup": {"name": "who or what, for example Mia", "about": "what about it, for example home, friend or shells"},
}
SCHEMAS = [{"type": "function", "function": {
    "name": name, "description": DESCRIPTIONS[name],
    "parameters": {"type": "object", "required": list(parameters),
                   "properties": {parameter: {"type": "string", "description": text}
                                  for parameter, text in parameters.items()}}}}
           for name, parameters in PARAMETERS.items()]
