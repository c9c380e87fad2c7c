"""Answers that must follow a grammar: JSON, JSON of a given schema, a tool call. Which tokens may come next?

In lecture order:
  1. Rule            a context-free grammar. Its alphabet are the 256 bytes of text and the special tokens
  2. JSON            its grammar (RFC 8259), over the bytes of UTF-8 (RFC 3629); `from_schema` narrows it
  3. Machine         reads symbol after symbol; its state is the set of all stacks of what may follow, met once, known
  4. Vocabulary      a tree of the tokens' bytes; walked together with the machine it says which tokens fit
  5. Constraint      one answer: the mask of the tokens that may come next, which leave enough room to end properly

A model that may choose only among the tokens that fit writes valid JSON, whatever it has learned. And it ends: each
state knows the shortest text that completes it, and a token is allowed only if what follows still fits into the
tokens that are left.
"""

import functools
import json
import threading

import numpy as np
import torch

from model.errors import UserError

TOKEN = 256               # symbol of the special token i: TOKEN + i; symbols below are bytes
MAX_DEPTH = 12            # of objects and arrays in each other, in JSON without a schema
MAX_SCHEMA = 20_000       # characters
MAX_TEXT = 10_000         # bytes of the shortest text that a schema allows
MAX_STACKS = 2000         # ways to read a text so far
MAX_STATES = 50_000       # that a machine remembers
MAX_CACHED = 64_000_000   # bytes of masks that a machine remembers


# --- 1. grammars


class Rule:
    """One of several sequences. Their items: bytes (these, in order), a frozenset (one of these symbols), a Rule.

    A rule may hold itself, but only behind something: `more.alternatives = [(), (DIGIT, more)]`.
    """

    def __init__(self, *alternatives):
        self.alternatives = list(alternatives)

    @functools.cached_property
    def shortest(self):
        """The shortest text, a tuple of symbols, that the rule stands for; of several the first in order."""
        self.shortest = None                               # met again inside itself: not by this way
        texts = (shortest(sequence) for sequence in self.alternatives)
        return min((text for text in texts if text is not None), key=lambda text: (len(text), text), default=None)


def shortest(sequence):
    """The shortest text of a sequence of items, or None where one of them is a rule that is being worked out."""
    text = ()
    for item in sequence:
        part = item.shortest if isinstance(item, Rule) else tuple(item) if isinstance(item, bytes) else (min(item),)
        if part is None:
            return None
        text += part
        if len(text) > MAX_TEXT:                           # $refs of $refs double it again and again
            raise UserError(f"the schema: even the shortest text that it allows has more than {MAX_TEXT} characters")
    return text


def repeated(item, most=0):
    """`item` any number of times, or up to `most` times."""
    rule = Rule(())
    if most == 0:
        rule.alternatives.append((item, rule))
    for _ in range(most):
        rule = Rule((), (item, rule))
    return rule


def separated(begin, items, end):
    """begin end, or begin item, item, … end; items: sequences that an item may be."""
    item, more = Rule(*items), Rule((end,))
    more.alternatives.append((COMMA, item, more))
    return Rule((begin, end), (begin, item, more))


def token(*ids):
    """One of these special tokens."""
    return frozenset(TOKEN + index for index in ids)


# --- 2. JSON


def symbols(text):
    return frozenset(text.encode())


def span(first, last):
    return frozenset(range(first, last + 1))


DIGIT, HEX, TAIL = symbols("0123456789"), symbols("0123456789abcdefABCDEF"), span(0x80, 0xBF)
CHARACTER = Rule(
    (span(0x20, 0x7F) - symbols('"\\'),),
    (span(0xC2, 0xDF), TAIL),
    (b"\xE0", span(0xA0, 0xBF), TAIL),
    (span(0xE1, 0xEF) - {0xED}, TAIL, TAIL),
    (b"\xED", span(0x80, 0x9F), TAIL),                     # surrogates are no characters …
    (b"\xF0", span(0x90, 0xBF), TAIL, TAIL),
    (span(0xF1, 0xF3), TAIL, TAIL, TAIL),
    (b"\xF4", span(0x80, 0x8F), TAIL, TAIL),
    (b"\\", symbols('"\\/bfnrt')),
    (b"\\u", HEX - symbols("dD"), HEX, HEX, HEX),
    (b"\\u", symbols("dD"), symbols("01234567"), HEX, HEX))                # … in this spelling either
STRING = Rule((b'"', repeated(CHARACTER), b'"'))
# No longer than what every reader keeps: more digits than a float has, or 1e999, are not read back as written.
INTEGER = Rule((Rule((), (b"-",)), Rule((b"0",), (DIGIT - symbols("0"), repeated(DIGIT, 14)))))
FRACTION = Rule((), (b".", DIGIT, repeated(DIGIT, 14)))
EXPONENT = Rule((), (symbols("eE"), Rule((), (symbols("+-"),)), DIGIT, repeated(DIGIT, 1)))
NUMBER = Rule((INTEGER, FRACTION, EXPONENT))
BOOLEAN, NULL = Rule((b"true",), (b"false",)), Rule((b"null",))
COMMA, COLON = Rule((b",",), (b", ",)), Rule((b":",), (b": ",))            # one space: a run of them could be endless


@functools.cache
def any_object(depth=MAX_DEPTH):
    return separated(b"{", [(STRING, COLON, any_value(depth - 1))], b"}")


@functools.cache
def any_value(depth=MAX_DEPTH):
    nested = [(any_object(depth),), (separated(b"[", [(any_value(depth - 1),)], b"]"),)] if depth else []
    return Rule((STRING,), (NUMBER,), (BOOLEAN,), (NULL,), *nested)


for rule in (any_value(), any_object()):
    rule.shortest                                          # worked out here, once for all threads  # noqa: B018

SCALARS = {"string": STRING, "integer": INTEGER, "number": NUMBER, "boolean": BOOLEAN, "null": NULL}
REMARKS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
KEYWORDS = {"object": {"properties", "required", "additionalProperties"}, "array": {"items"}}


def from_schema(schema):
    """The Rule of the JSON texts that a JSON Schema allows, the properties of an object in the schema's order.

    Understood: type (a name or several) object with properties and required, array with items, string, integer,
    number, boolean, null; enum, const, anyOf, and $ref to $defs that do not hold themselves. UserError for all else,
    as what is left out of a grammar would not hold.
    """
    try:
        size = len(json.dumps(schema, allow_nan=False))
        if size > MAX_SCHEMA:
            raise UserError(f"the schema has {size} characters; at most {MAX_SCHEMA} are read")
        rule = _rule(schema, {"#": schema}, "schema")
        rule.shortest                                      # worked out here, where its recursion may go too deep  # noqa: B018
    except ValueError as error:
        raise UserError(f"the schema is no JSON: {error}") from error
    except RecursionError as error:
        raise UserError("the schema is nested too deeply, or has too many properties") from error
    return rule


def _rule(schema, refs, where):
    """The Rule of `schema`, which is found at `where`. refs: {"#": the whole schema, and each $ref that was met: its
    Rule, or None while that is being made}."""
    if schema is True or schema == {}:
        return any_value()
    if not isinstance(schema, dict):
        raise UserError(f"{where}: expected a JSON Schema object, not {json.dumps(schema)[:80]}")
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"]
        _known(schema, {"$ref"}, where)
        if name not in refs or name == "#":
            part = refs["#"]
            for key in name.removeprefix("#/").split("/") if name.startswith("#/") else [""]:
                part = part.get(key) if isinstance(part, dict) else None
            if part is None:
                raise UserError(f"{where}: $ref {name[:80]!r} is not found; expected #/$defs/NAME")
            refs[name] = None
            refs[name] = _rule(part, refs, name[:80])
        if refs[name] is None:
            raise UserError(f"{where}: $ref {name[:80]!r} is recursive, which is not supported")
        return refs[name]
    for key in ("enum", "const"):
        if key in schema:
            _known(schema, {key, "type"}, where)
            values = schema[key] if key == "enum" else [schema[key]]
            if not isinstance(values, list) or not values:
                raise UserError(f"{where}: enum must be a list of values")
            return Rule(*((json.dumps(value, ensure_ascii=False).encode(),) for value in values))
    if "anyOf" in schema:
        _known(schema, {"anyOf"}, where)
        if not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
            raise UserError(f"{where}: anyOf must be a list of schemas")
        return Rule(*((_rule(part, refs, f"{where}.anyOf"),) for part in schema["anyOf"]))
    names = schema.get("type", "object" if "properties" in schema else None)
    names = names if isinstance(names, list) and names else [names]
    if not all(isinstance(name, str) and name in {*SCALARS, *KEYWORDS} for name in names):
        raise UserError(f"{where}: type {json.dumps(schema.get('type'))[:80]} is not supported; use one of "
                        f"{', '.join([*SCALARS, *KEYWORDS])}, or enum, const, anyOf, $ref")
    _known(schema, {"type"}.union(*(KEYWORDS.get(name, ()) for name in names)), where)
    build = {"object": _object, "array": _array}
    return Rule(*((build[name](schema, refs, where) if name in build else SCALARS[name],) for name in names))


def _known(schema, keywords, where):
    for key in schema:
        if key not in keywords and key not in REMARKS:
            raise UserError(f"{where}: {str(key)[:80]!r} is not supported here; leave it out (what it asks for would "
                            "not be kept)")


def _array(schema, refs, where):
    return separated(b"[", [(_rule(schema.get("items", {}), refs, f"{where}.items"),)], b"]")


def _object(schema, refs, where):
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise UserError(f"{where}: properties must be an object and required a list of names")
    unknown = [name for name in required if not isinstance(name, str) or name not in properties]
    if unknown:
        raise UserError(f"{where}: required names {json.dumps(unknown[0])[:80]}, which is not among the properties")
    if not isinstance(schema.get("additionalProperties", False), bool):
        raise UserError(f"{where}: additionalProperties may be true or false only")
    if "properties" not in schema and schema.get("additionalProperties", True):
        return any_object()
    first = later = Rule((b"}",))                          # what may follow when nothing, or something, stands before
    for name, part in reversed(properties.items()):
        value = _rule(part, refs, f"{where}.{name}")
        member = (json.dumps(name, ensure_ascii=False).encode(), COLON, value, later)
        skip = [] if name in required else [(first,), (later,)]
        first, later = Rule(member, *skip[:1]), Rule((COMMA, *member), *skip[1:])
    return Rule((b"{", first))


# --- 3. reading symbol after symbol


class State:
    """All stacks of what may follow the text so far. A stack is (what comes next, the stack below), or () at the end;
    what comes next is bytes or a set of symbols, never a Rule."""

    def __init__(self, stacks):
        self.stacks, self.next = stacks, {}                # next: {symbol: State, or None where it does not fit}

    @functools.cached_property
    def moves(self):
        """{symbol: the stacks behind it, still to be opened}"""
        moves = {}
        for top, below in filter(None, self.stacks):
            behind = (top[1:], below) if isinstance(top, bytes) and len(top) > 1 else below
            for symbol in top[:1] if isinstance(top, bytes) else top:
                moves.setdefault(symbol, set()).add(behind)
        return moves

    @functools.cached_property
    def closing(self):
        """The shortest text that completes the one so far, a tuple of symbols."""
        return min((self.complete(stack) for stack in self.stacks), key=lambda text: (len(text), text))

    @staticmethod
    def complete(stack):
        text = ()
        while stack:
            text, stack = text + shortest(stack[:1]), stack[1]
        return text


class Machine:
    """Recognizes the texts of a rule, with the tokens of a vocabulary. What it has worked out once it remembers."""

    def __init__(self, vocabulary, rule):
        self.vocabulary, self.states, self.costs, self.ends = vocabulary, {}, {}, {}
        self.start = self.state({(rule, ())})

    def state(self, stacks):
        """The State of these stacks, the rules on top of them opened."""
        opened, met, work = set(), set(), list(stacks)
        while work:
            stack = work.pop()
            if stack in met:
                continue
            met.add(stack)
            if len(met) > MAX_STACKS:
                raise UserError("the schema leaves too many ways to read the answer so far: make its alternatives "
                                "differ in their first letters, or fewer")
            if stack and isinstance(stack[0], Rule):
                for sequence in stack[0].alternatives:
                    below = stack[1]
                    for item in reversed(sequence):
                        below = (item, below)
                    work.append(below)
            else:
                opened.add(stack)
        if len(self.states) > MAX_STATES:
            self.states.clear()
        return self.states.setdefault(frozenset(opened), State(frozenset(opened)))

    def after(self, state, symbol):
        """The state behind one more symbol, None where it does not fit."""
        if symbol not in state.next:
            state.next[symbol] = self.state(state.moves[symbol]) if symbol in state.moves else None
        return state.next[symbol]

    def after_token(self, state, index):
        for symbol in self.vocabulary.symbols(index):
            state = state and self.after(state, symbol)
        return state

    def closing_cost(self, state):
        """How many tokens can complete the text. Not always the fewest, but with each of them one fewer is left."""
        if state.closing not in self.ends:
            self.ends[state.closing] = self.vocabulary.count(state.closing)
        return self.ends[state.closing]

    def token_costs(self, state):
        """(V,) int32: tokens that each token and the shortest end behind it take; the maximum where it does not fit."""
        if state not in self.costs:
            costs = np.full(self.vocabulary.size, np.iinfo(np.int32).max, dtype=np.int32)
            work = [(self.vocabulary.tree, state)]
            while work:
                node, before = work.pop()
                for symbol, child in node.items():
                    if symbol is None:                     # tokens end here; `child` are their ids
                        costs[child] = 1 + self.closing_cost(before)
                    elif behind := self.after(before, symbol):
                        work.append((child, behind))
            if len(self.costs) * costs.nbytes > MAX_CACHED:
                self.costs.clear()
            self.costs[state] = costs
        return self.costs[state]


# --- 4. the tokens


class Vocabulary:
    """The texts of a tokenizer's tokens, for models that have `size` logits (as many as the tokenizer, or more)."""

    def __init__(self, tokenizer, size=0):
        self.tokenizer, self.size = tokenizer, max(size, tokenizer.vocab_size)
        self.special = frozenset(tokenizer.special.values())
        self.machines, self.lock = {}, threading.Lock()    # name of a grammar: its machine

    @functools.cached_property
    def tree(self):
        """Nested {symbol: subtree}; the key None holds the ids of the tokens whose text ends there."""
        tree = {}
        for index in range(self.tokenizer.vocab_size):
            node = tree
            for symbol in self.symbols(index):
                node = node.setdefault(symbol, {})
            if node is not tree:                           # an id without a text never fits
                node.setdefault(None, []).append(index)
        return tree

    def symbols(self, index):
        if index in self.special:
            return (TOKEN + index,)
        pieces = self.tokenizer.rule.pieces
        return pieces[index] if index < len(pieces) else ()

    def count(self, text):
        """How many tokens spell `text`, symbols, if each takes as much of the rest as one can."""
        count = place = 0
        while place < len(text):
            node, end = self.tree, 0
            for ahead in range(place, len(text)):
                node = node.get(text[ahead])
                if node is None:
                    break
                end = ahead + 1 if None in node else end
            if not end:
                raise UserError(f"the vocabulary cannot spell symbol {text[place]}: answers that follow a grammar need "
                                "a token for every byte")
            count, place = count + 1, end
        return count

    def machine(self, name, build):
        """The machine of the grammar that build() returns, remembered under `name`, any hashable value."""
        with self.lock:
            if name not in self.machines:
                self.machines[name] = Machine(self, build())
                if len(self.machines) > 32:                # the oldest makes room
                    del self.machines[next(iter(self.machines))]
            return self.machines[name]


# --- 5. one answer


class Constraint:
    """Keeps one answer inside a machine's grammar, whose texts end with a stop token, within `max_tokens` tokens.

    UserError where not even the shortest such text fits. Give every answer a Constraint of its own.
    """

    def __init__(self, machine, max_tokens):
        self.machine, self.max_tokens = machine, max_tokens
        self.state, self.read = machine.start, 0           # read: how many tokens led to the state
        shortest_answer = machine.closing_cost(self.state)
        if shortest_answer > max_tokens:
            raise UserError(f"the answer has room for {max_tokens} tokens; the shortest that keeps to the asked format "
                            f"takes {shortest_answer}: raise max_tokens or shorten the prompt")

    def allowed(self, generated_ids):
        """(V,) bool: the tokens that may follow `generated_ids`, the answer so far. All False behind its end."""
        for index in generated_ids[self.read:]:
            self.state = self.state and self.machine.after_token(self.state, index)
        self.read = len(generated_ids)
        if self.state is None:                             # a token that was not allowed
            raise ValueError("the tokens so far do not follow the grammar")
        left = self.max_tokens - self.read
        return torch.from_numpy(self.machine.token_costs(self.state) <= left)


# ------------------------------------------------------------------------------- grammars of whole answers


def answer_rule(rule, tokenizer, thinking=False):
    """`rule`, then the end of the turn; thinking: the text starts inside a thought, which comes before."""
    thought = ()
    if thinking:
        thought = repeated(span(0, 255)), token(tokenizer.special_id("</think>")), Rule((), (b"\n\n",))
    return Rule((*thought, rule, token(*tokenizer.stop_ids)))


def call_rule(name, arguments, tokenizer):
    """A tool call, between its special tokens, as the chat templates of ChatML write it."""
    begin = b'{"name": ' + json.dumps(name, ensure_ascii=False).encode() + b', "arguments": '
    return Rule((token(tokenizer.special_id("<tool_call>")), Rule((), (b"\n",)), begin, arguments, b"}",
                 Rule((), (b"\n",)), token(tokenizer.special_id("</tool_call>"))))


def free_then(calls, tokenizer):
    """Any text and special tokens, but a tool call only as one of the rules `calls`."""
    kept = {*tokenizer.stop_ids, tokenizer.special_id("<tool_call>"), tokenizer.special_id("</tool_call>")}
    free = span(0, 255) | token(*(index for index in tokenizer.special.values() if index not in kept))
    return repeated(Rule((free,), *((call,) for call in calls)))
