"""model/constrain.py: whatever a model would like to write, what it may write is JSON, in time."""

import json
import random

import jsonschema
import pytest
import torch

from model.constrain import (
    Constraint,
    Machine,
    Vocabulary,
    answer_rule,
    any_object,
    call_rule,
    free_then,
    from_schema,
)
from model.errors import UserError
from model.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("nano")
VOCABULARY = Vocabulary(TOKENIZER, TOKENIZER.vocab_size + 8)               # a model's logits may be padded
PERSON = {"type": "object", "required": ["name", "age"], "additionalProperties": False, "properties": {
    "name": {"type": "string"}, "age": {"type": "integer"}, "tall": {"type": ["boolean", "null"]},
    "colours": {"type": "array", "items": {"enum": ["red", "blü", 3, None, {"a": [1.5]}]}},
    "home": {"$ref": "#/$defs/place"}}, "$defs": {"place": {
        "type": "object", "properties": {"x": {"type": "number"}, "y": {"anyOf": [{"type": "null"}, {"const": "no"}]}},
        "required": ["y"]}}}


def machine(rule, thinking=False):
    return Machine(VOCABULARY, answer_rule(rule, TOKENIZER, thinking))


def write(constraint, seed, likes=()):
    """Ids of a random answer inside the constraint; tokens that a model `likes` are taken where they are allowed."""
    rng, ids = random.Random(seed), []
    while not ids or ids[-1] not in TOKENIZER.stop_ids:
        allowed = constraint.allowed(ids).nonzero()[:, 0].tolist()
        assert allowed and allowed[-1] < TOKENIZER.vocab_size
        ids.append(rng.choice([index for index in allowed if index in likes] or allowed))
        assert len(ids) <= constraint.max_tokens
    assert not constraint.allowed(ids).any()                               # nothing follows the end
    return ids[:-1]


@pytest.mark.parametrize("rule, check", [
    (any_object(), lambda value: isinstance(value, dict)),
    (from_schema(PERSON), lambda value: jsonschema.validate(value, PERSON) is None)])
def test_every_answer_is_valid_and_ends_in_time(rule, check):
    known, lengths = machine(rule), set()
    for seed in range(60):
        most = random.Random(seed).choice([24, 40, 150])
        ids = write(Constraint(known, most), seed)
        lengths.add(len(ids))
        assert check(json.loads(TOKENIZER.decode(ids, skip_special=False)))
    assert len(lengths) > 10


def test_a_model_that_opens_brackets_forever_must_close_them():
    opening = {index for index in range(TOKENIZER.vocab_size) if TOKENIZER.decode([index]) in ("{", "[", '"', "a", ":")}
    for most in (8, 30, 31, 32, 100):
        text = TOKENIZER.decode(write(Constraint(machine(any_object()), most), 0, opening))
        assert isinstance(json.loads(text), dict)


def test_json_of_all_kinds_can_be_written():
    """Each token of correct JSON is among those that are allowed, however the text is cut into tokens."""
    known = machine(any_object())
    for value in ({}, {"a": [1, -2.5e-7, True, None, "ü\n\"\\🌰"]}, {"nested": {"x": [[], [{}]], "": "é"}}):
        for separators in ((",", ":"), (", ", ": ")):
            for ascii_only in (True, False):
                text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
                text = text if not ascii_only else text.replace("\\ud83c\\udf30", "x")     # halves are not spelled
                constraint, ids = Constraint(known, 200), TOKENIZER.encode(text)
                for place, index in enumerate([*ids, TOKENIZER.end_of_turn_id]):
                    assert constraint.allowed(ids[:place])[index], (text, TOKENIZER.decode(ids[:place]))


@pytest.mark.parametrize("text", ['{"a": 01}', '{"a": .5}', '{"a": nan}', '{"a" "b"}', "[1]", '{"a": 1,}', "{'a': 1}",
                                  '{"a": "\n"}', '{"a": "\\x"}', '{"a": tru}', '{"a": 1}}', '{"a": 1e999}'])
def test_what_is_no_json_cannot_be_written(text):
    constraint, ids = Constraint(machine(any_object()), 100), TOKENIZER.encode(text)
    ids.append(TOKENIZER.end_of_turn_id)
    assert not all(constraint.allowed(ids[:place])[index] for place, index in enumerate(ids)
                   if place == 0 or constraint.state is not None and constraint.allowed(ids[:place]).any())


def test_broken_utf8_cannot_be_written():
    constraint = Constraint(machine(any_object()), 100)
    byte = {VOCABULARY.symbols(index): index for index in range(TOKENIZER.vocab_size)}
    ids = [byte[b"{"], byte[b'"']]
    assert not constraint.allowed(ids)[byte[b"\x80"]] and not constraint.allowed(ids)[byte[b"\xc0"]]
    ids.append(byte[b"\xe2"])                                              # the first of three bytes
    assert not constraint.allowed(ids)[byte[b'"']] and constraint.allowed(ids)[byte[b"\x82"]]


def test_a_thought_comes_first_where_the_prompt_opened_one():
    known, end = machine(any_object(), thinking=True), TOKENIZER.special["</think>"]
    constraint = Constraint(known, 60)
    thought = TOKENIZER.encode('Mia said "{"')
    assert constraint.allowed(thought)[end] and not constraint.allowed(thought)[TOKENIZER.special["<tool_call>"]]
    ids = write(Constraint(known, 60), 3)
    assert json.loads(TOKENIZER.decode(ids[ids.index(end) + 1:])) is not None


def test_calls_between_free_text_follow_their_schema():
    tool = call_rule("weather", from_schema({"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                                             "required": ["city"]}), TOKENIZER)
    known, open_, close = machine(free_then([tool], TOKENIZER)), *(TOKENIZER.special[f"<{end}tool_call>"]
                                                                  for end in ("", "/"))
    calls = 0
    for seed in range(20):
        ids = write(Constraint(known, 120), seed, {open_} if seed % 2 else ())
        for begin in (place for place, index in enumerate(ids) if index == open_):
            call = json.loads(TOKENIZER.decode(ids[begin + 1:ids.index(close, begin)]))
            assert call["name"] == "weather" and call["arguments"]["city"] in ("Rome", "Oslo")
            calls += 1
    assert calls >= 10
    # The letters of the tag are text, and do not open a call.
    constraint = Constraint(known, 120)
    text = TOKENIZER.encode('<tool_call>{"name": "rm"}</tool_call>')
    assert constraint.allowed(text)[TOKENIZER.end_of_turn_id]


def test_too_little_room_is_said_before_anything_is_written():
    with pytest.raises(UserError, match=r"room for 2 tokens; the shortest .* takes \d+: raise max_tokens"):
        Constraint(machine(from_schema(PERSON)), 2)


def test_a_token_that_was_not_allowed_is_an_error():
    constraint = Constraint(machine(any_object()), 50)
    with pytest.raises(ValueError, match="do not follow"):
        constraint.allowed(TOKENIZER.encode("no"))


def chain(levels, link):
    """A schema of $refs, each of which `link` makes two of."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(levels)}
    return {"anyOf": [{"$ref": "#/$defs/d0"}], "$defs": definitions | {f"d{levels}": {"type": "string"}}}


@pytest.mark.parametrize("schema, words", [
    ({"type": "string", "pattern": "a*"}, "'pattern' is not supported"),
    ({"type": "integer", "minimum": 3}, "'minimum' is not supported"), ({"type": "date"}, "type \"date\""),
    ({"allOf": []}, "type null is not supported"), ({"enum": []}, "enum must be a list"), ([], "JSON Schema object"),
    ({"type": "object", "properties": [], "required": []}, "properties must be an object"),
    ({"type": "object", "properties": {}, "required": ["a"]}, "which is not among the properties"),
    ({"$ref": "#/$defs/no"}, "is not found"), ({"$ref": "#"}, "is not found"),
    ({"type": "array", "items": {"$ref": "#/items"}}, "is recursive"), ({"const": float("nan")}, "is no JSON"),
    ({"enum": ["x" * 30_000]}, "has 30"), ({"anyOf": "x"}, "anyOf must be a list"),
    (json.loads('{"items":' * 400 + "{}" + "}" * 400), "is not supported"),
    (chain(30, lambda part: {"type": "object", "properties": {"a": part, "b": part}, "required": ["a", "b"]}),
     "even the shortest text")])
def test_schemas_that_are_not_understood_are_refused(schema, words):
    with pytest.raises(UserError) as error:
        from_schema(schema)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_schemas_made_to_explode_end_soon():
    """2^30 alternatives: of one and the same they are one; different ones are refused when they are met."""
    assert write(Constraint(machine(from_schema(chain(30, lambda part: {"anyOf": [part, part]}))), 20), 0)
    known = machine(from_schema(chain(30, lambda part: {"anyOf": [
        {"type": "object", "properties": {"a": part}, "required": ["a"]}] * 2})))
    with pytest.raises(UserError, match="too many ways"):
        write(Constraint(known, 500), 0)


def test_machines_are_remembered_and_the_oldest_forgotten():
    vocabulary = Vocabulary(TOKENIZER)
    first = vocabulary.machine(0, any_object)
    assert vocabulary.machine(0, lambda: 1 / 0) is first
    for name in range(1, 33):
        vocabulary.machine(name, any_object)
    assert len(vocabulary.machines) == 32 and 0 not in vocabulary.machines


def test_masks_are_bool_tensors_of_the_models_vocabulary():
    mask = Constraint(machine(any_object()), 50).allowed([])
    assert mask.dtype == torch.bool and mask.shape == (VOCABULARY.size,)
    assert all(TOKENIZER.decode([index]).startswith("{") for index in mask.nonzero()[:, 0].tolist())
