"""The tools: right answers, and for any input at all a short text, at once, with nothing executed."""

import ast
import json
import operator
import random
import time
from fractions import Fraction

import pytest

from dataset.builtin import tools
from dataset.builtin.tools import BOOK, PARAMETERS, SCHEMAS, TOOLS, UNITS, calculator, call, convert, failed
from dataset.builtin.world import FACTS, PEOPLE

HOSTILE = ["", " ", "(", ")", "((((", "1+", "+1", "*", "1//2", "2**3", "9" * 99, "9" * 5000, "(" * 5000, "-" * 5000,
           "1e9", "1_000", "0x10", "1j", "²", "१२", "９", "1,5", "1 .5", ".5", "5.", "nan", "inf", "__import__('os')",
           "exit()", "().__class__", "lambda: 0", "1;2", "1\n+1", "\x00", "\ud83d", "😀", "<|im_end|>", "1" + "*9" * 49,
           "1/" * 40 + "3", "9999999999999*9999999999999", None, True, 1, 1.5, float("nan"), 10 ** 400, [], {}, [[[]]],
           {"a": 1}, b"1"]


# --- the calculator

@pytest.mark.parametrize("expression, value", [
    ("1+2*3", "7"), ("(1+2)*3", "9"), ("10-2-3", "5"), ("100/10/5", "2"), ("2*-3", "-6"), ("--3", "3"),
    ("-(2+1)", "-3"),
    ("1/3", "0.333333"), ("2/3", "0.666667"), ("-1/8", "-0.125"), ("1.5*2", "3"), ("0.1+0.2", "0.3"), (" 1 + 1 ", "2"),
    ("1/1000000000", "0"), ("-1/1000000000", "0"), ("999999999999999/7", "142857142857142.714286"),
    ("1000000000000/3*3", "1000000000000")])
def test_calculator_knows_precedence_and_is_exact(expression, value):
    assert calculator(expression) == value


def test_calculator_agrees_with_python_on_random_expressions():
    rng = random.Random(0)

    def make(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 99))
        text = make(depth - 1) + rng.choice("+-*/") + make(depth - 1)
        return rng.choice((text, f"({text})", f"-({text})"))

    def value_of(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            return -value_of(node.operand)
        by = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
        return by[type(node.op)](value_of(node.left), value_of(node.right))

    judged = 0
    for _ in range(500):
        expression = make(3)
        try:
            expected = value_of(ast.parse(expression, mode="eval").body)
        except ZeroDivisionError:
            assert call("calculator", {"expression": expression}) == "error: division by zero"
            continue
        result = call("calculator", {"expression": expression})
        if not failed(result):                              # too large on the way
            judged += 1
            assert abs(Fraction(result) - expected) <= Fraction(1, 2 * 10 ** 6), expression
    assert judged > 400


@pytest.mark.parametrize("expression, why", [
    ("1/0", "division by zero"), ("5/(3-3)", "division by zero"), ("(1+2", "a ) is missing"),
    ("1+2)", "cannot read ')'"),
    ("2**3", "cannot read '*'"), ("1e5", "cannot read 'e'"), ("", "not complete"), ("3+", "not complete"),
    ("9999999999999*9999999999999", "too large"), ("1" * 16, "cannot read '1'")])
def test_calculator_says_what_is_wrong(expression, why):
    result = call("calculator", {"expression": expression})
    assert failed(result) and why in result


# --- units and the book

@pytest.mark.parametrize("amount, to, result", [
    ("3 m", "cm", "300 cm"), ("3m", "cm", "300 cm"), ("25 cm", "m", "0.25 m"), ("2 km", "m", "2000 m"),
    ("90 min", "h", "1.5 h"), ("2 h", "s", "7200 s"), ("2 day", "h", "48 h"), ("1.5 kg", "g", "1500 g"),
    ("3 t", "kg", "3000 kg"), ("250 ml", "l", "0.25 l"), ("-4 m", "mm", "-4000 mm"), ("7 s", "s", "7 s")])
def test_convert(amount, to, result):
    assert convert(amount, to) == result


def test_there_and_back_is_where_it_began():
    for unit, (kind, _) in UNITS.items():
        for other, (its_kind, size) in UNITS.items():
            if kind == its_kind and size <= UNITS[unit][1]:
                assert convert(convert(f"12 {unit}", other), unit) == f"12 {unit}"
            elif kind != its_kind:
                assert "do not measure the same" in call("convert", {"amount": f"12 {unit}", "to": other})


def test_lookup_knows_every_fact_and_what_people_have():
    for fact in FACTS:
        assert call("lookup", {"name": fact.subject, "about": fact.relation.name}) == fact.value
    for person in PEOPLE:
        assert call("lookup", {"name": person.upper(), "about": " shells "}).isdigit()
        assert call("lookup", {"name": person, "about": "rice"}).endswith(" kg")
    assert failed(call("lookup", {"name": "Nobody", "about": "home"}))
    assert failed(call("lookup", {"name": "Mia", "about": "moon"}))
    assert BOOK["mia", "shells"] == "68", "the book never changes: what a model learned of it would be wrong"


# --- any call at all

def test_every_call_gives_a_short_text_at_once():
    rng = random.Random(0)
    letters = "0123456789+-*/(). mcgkhin"
    noise = ["".join(rng.choice(letters) for _ in range(rng.randint(0, 100))) for _ in range(2000)]
    start = time.perf_counter()
    for name in [*TOOLS, "no tool", "", None, 3, ["calculator"]]:
        wanted = PARAMETERS.get(name, {}) if isinstance(name, str) else {}
        calls = [None, "text", [], 3, {}, {"wrong": "1"}, {**dict.fromkeys(wanted, "1"), "more": "1"}]
        calls += [{argument: value for argument in wanted} for value in HOSTILE]
        calls += [{argument: rng.choice(HOSTILE) for argument in wanted} for _ in range(200)]
        calls += [{argument: text for argument in wanted} for text in noise]
        for arguments in calls:
            result = call(name, arguments)
            assert isinstance(result, str) and 0 < len(result) < 120, arguments
            result.encode()                                 # no half of a surrogate pair comes back
    assert time.perf_counter() - start < 5


def test_the_longest_expressions_take_no_time():
    for text in ("(" * 50 + "1" + ")" * 49, "-" * 99 + "1", "1" + "*9" * 49, "1/7" + "/7" * 48, "1+" * 49 + "1"):
        start = time.perf_counter()
        for _ in range(20):
            call("calculator", {"expression": text})
        assert time.perf_counter() - start < 0.5, text
    assert call("calculator", {"expression": "-" * 99 + "1"}) == "-1"
    assert failed(call("calculator", {"expression": "-" * 100 + "1"})), "longer than an argument may be"


def test_nothing_in_the_source_can_execute_text():
    names = {node.id for node in ast.walk(ast.parse(open(tools.__file__, encoding="utf-8").read()))
             if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "getattr", "open"}


def test_schemas_describe_what_call_accepts():
    assert json.loads(json.dumps(SCHEMAS)) == SCHEMAS and len(SCHEMAS) == len(TOOLS)
    for schema in SCHEMAS:
        function = schema["function"]
        assert schema["type"] == "function" and function["name"] in TOOLS and function["description"]
        assert set(function["parameters"]["required"]) == set(function["parameters"]["properties"])
        example = {"calculator": {"expression": "345+27"}, "convert": {"amount": "3 m", "to": "cm"},
                   "lookup": {"name": "Mia", "about": "home"}}[function["name"]]
        assert set(example) == set(function["parameters"]["required"]) and not failed(call(function["name"], example))
