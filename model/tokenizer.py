"""Text ⇄ token ids, and conversations → (ids, mask).

A tokenizer is a table of byte strings, one for each id, and a rule that cuts a text into them. Two libraries supply the
rule: `tokenizers` (tokenizer.json; byte-level BPE, Sennrich et al. 2016, arXiv:1508.07909, over the 256 bytes) and
`sentencepiece` (tokenizer.model; Kudo and Richardson 2018, arXiv:1808.06226). `Tokenizer` hides which one it is.

*Control tokens come only from structure.* `encode` is for ordinary text and never yields a special token, whatever
the text spells: a user who types `<|im_end|>` has typed ten characters. Only `render`, which lays out a conversation
with the chat template, writes special tokens, and it writes them where the template does, never where a message does.

`render` also returns the loss mask, made in the same pass and not searched for afterwards: 1 on the tokens that the
assistant has to produce (its words and the end of its turn), 0 on headers and on everything that others say.
"""

import codecs
import hashlib
import itertools
import json
import re
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import sentencepiece
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import UserError

SHIPPED = Path(__file__).resolve().parent / "vocab"
CHATML = SHIPPED / "chatml.jinja"

# Ids 0, 1, 2, … of a vocabulary made here. Those marked True delimit text (decode drops them); the others carry
# meaning inside an assistant's turn and stay visible, as in Qwen3.
SPECIAL_TOKENS = {
    "<|pad|>": True,
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
    "<answer>": False,
    "</answer>": False,
}

# A vocabulary made elsewhere names one end token in tokenizer_config.json; which of the two ends it means differs
# between a base and an instruct model of one family. These names say which end is which wherever they exist.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


class Tokenizer:
    """A vocabulary with its cutting rule, its special tokens and its chat template.

    vocab_size        number of ids (the highest one + 1)
    bos_id, eos_id    open and close a document; a vocabulary without a begin token opens with its end token
    end_of_turn_id    closes a turn of a conversation
    stop_ids          where generation ends: the two ends, and what tokenizer_config.json calls eos_token
    pad_id            fills the unused part of a row. Without a pad token it is the unknown token, else the document's
                      end. What is padding is said by masks everywhere, never by comparing ids with this one.
    special           {text: id} of all special tokens
    chat_template     Jinja source, or None
    """

    def __init__(self, rule, special, hidden, config, chat_template):
        """`rule`: _BPE or _SentencePiece. `special`: {text: id}. `hidden`: ids that `decode` drops by default."""
        self.rule, self.special, self.config, self.chat_template = rule, special, config, chat_template
        self.vocab_size = max(len(rule.pieces), max(special.values(), default=-1) + 1)
        self._hidden = frozenset(hidden)
        self._pieces = rule.pieces + [b""] * (self.vocab_size - len(rule.pieces))  # (V,) bytes of each id
        for text, index in special.items():
            self._pieces[index] = text.encode()

        named = {key: _token_text(config.get(f"{key}_token")) for key in ("bos", "eos", "pad", "unk")}
        self._names = {f"{key}_token": text for key, text in named.items() if text is not None}  # for templates
        ids = {key: special[text] for key, text in named.items() if text in special}
        if "eos" not in ids:
            raise UserError(f"{rule.source.parent / 'tokenizer_config.json'} must name an eos_token of this vocabulary")
        self.eos_id = next((special[text] for text in DOCUMENT_ENDS if text in special), ids["eos"])
        self.end_of_turn_id = next((special[text] for text in TURN_ENDS if text in special), ids["eos"])
        self.bos_id = ids.get("bos", self.eos_id)
        self.pad_id = ids.get("pad", ids.get("unk", self.eos_id))
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, self.end_of_turn_id, ids["eos"])))

    # --- load and save

    @classmethod
    def load(cls, name_or_folder):
        """A shipped vocabulary ("nano", "base") or a Hugging Face folder of the Llama, Mistral or Qwen families.

        Reads tokenizer.json, else tokenizer.model; begin, end, pad and template from tokenizer_config.json and
        chat_template.jinja. Raises UserError when the folder or a file in it is missing or unreadable.
        """
        folder = Path(name_or_folder)
        if (SHIPPED / name_or_folder).is_dir() and len(folder.parts) == 1:
            folder = SHIPPED / name_or_folder
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
            raise UserError(f"no tokenizer {str(name_or_folder)!r}: neither a folder nor one of {shipped}")
        path = folder / "tokenizer_config.json"
        config = _read_json(path, path.read_bytes()) if path.exists() else {}
        listed = config.get("added_tokens_decoder", {}).items()
        added = {token["content"]: (int(index), token.get("special", False)) for index, token in listed}
        if (folder / "tokenizer.json").exists():
            rule = _BPE(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").exists():
            rule = _SentencePiece(folder / "tokenizer.model", added)
        else:
            raise UserError(f"{folder} holds neither tokenizer.json nor tokenizer.model")
        added = rule.added | added
        special = {text: index for text, (index, _) in added.items()}
        hidden = [index for index, is_hidden in added.values() if is_hidden]
        return cls(rule, special, hidden, config, _read_template(folder, config))

    def save(self, folder):
        """Write the files that `load` and a stock AutoTokenizer read. Everything else in `folder` is left alone."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.rule.source.name).write_bytes(self.rule.data)  # as loaded: the source may have changed since
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else transformers 4 makes a third one
        with open(folder / "tokenizer_config.json", "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            with open(folder / "chat_template.jinja", "w", encoding="utf-8", newline="\n") as file:
                file.write(self.chat_template)

    @cached_property
    def fingerprint(self):
        """sha256 (hex) of what decides ids: the cutting rule with its vocabulary, and the special tokens."""
        return hashlib.sha256(self.rule.definition + json.dumps(self.special, sort_keys=True).encode()).hexdigest()

    # --- ordinary text

    def encode(self, text):
        """Ids of ordinary text. No special token comes out, whatever the text spells; none is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """`encode` of each text, in parallel where the library can."""
        for text in texts:
            _check_unicode(text)
        return self.rule.encode(texts)

    def decode(self, ids, skip_special=True):
        """Text of ids. Bytes that are not UTF-8 become U+FFFD. skip_special drops the delimiters (not <think> …)."""
        decoder = StreamDecoder(self, skip_special)
        return "".join([decoder.push(index) for index in ids]) + decoder.flush()

    def stream_decoder(self, skip_special=True):
        """A `StreamDecoder`: ids one by one in, whole characters out."""
        return StreamDecoder(self, skip_special)

    @cached_property
    def token_bytes(self):
        """(V,) int64: how many bytes of raw UTF-8 text each id stands for, 0 for special tokens.

        For byte-level BPE the sum over encode(s) is exactly len(s.encode()). (A SentencePiece vocabulary that puts a
        space before every text, as Llama 2's does, counts that space too.)
        """
        lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def special_id(self, text):
        """The id of a special token such as "<think>". Raises UserError where the vocabulary has no such token."""
        if text not in self.special:
            raise UserError(f"the vocabulary of {self.rule.source.parent} has no special token {text}")
        return self.special[text]

    def show(self, index):
        """One token in printable form, as tables of tokens want it: `·the`, `\\n`, `\\xe4`."""
        text = self._pieces[int(index)].decode("utf-8", errors="backslashreplace")
        return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)

    # --- conversations

    def with_chat_template(self, name_or_file):
        """The same vocabulary with another template: "chatml" (the one of this project) or a Jinja file."""
        path = CHATML if name_or_file == "chatml" else Path(name_or_file)
        if not path.is_file():
            raise UserError(f"no chat template {str(name_or_file)!r}: give chatml or a Jinja file")
        if name_or_file == "chatml":
            for text in ("<|im_start|>", "<|im_end|>"):
                self.special_id(text)
        return Tokenizer(self.rule, self.special, self._hidden, self.config, path.read_text(encoding="utf-8"))

    def render(self, messages, tools=None, add_generation_prompt=False, enable_thinking=None):
        """Conversation → (ids, mask), two lists of equal length.

        mask[i] = 1 where ids[i] is the assistant's to produce: the content of its turns and their end.
        add_generation_prompt ends with the header of an assistant turn. enable_thinking is the template's switch; in
        ours True also opens a `<think>`, False writes an empty thought after which only an answer can come, and None
        leaves it to the model. Thoughts of turns before the user's last are dropped, as in Qwen3's template.
        The ids of messages[:-1] with a generation prompt are a prefix of the ids of messages, whose last turn then
        holds a thought (True), an empty one (False: "reasoning_content": "") or either or none of them (None).

        Each stretch between special tokens is encoded by itself, and so are an assistant's header and its content:
        the content of a turn is cut the same way in training as when it follows a prompt, even if it starts with a
        newline that would merge with the header's.
        """
        if self.chat_template is None:
            raise UserError(f"{self.rule.source.parent} has no chat template; give --chat_template chatml")
        if tools and not re.search(r"\btools\b", self.chat_template):
            raise UserError("the chat template has no place for tools; use --chat_template chatml")
        messages = [_for_template(message) for message in messages]
        # Three letters (cuneiform, if free) that occur nowhere in the conversation. BREAK is put inside everything in
        # it that spells a special token, so that what still spells one after rendering was written by the template.
        used = set(json.dumps([messages, tools], ensure_ascii=False)) | set(self.chat_template)
        BREAK, BEGIN, END = itertools.islice((c for c in map(chr, range(0x12000, 0x110000)) if c not in used), 3)
        messages = [_map_text(message, lambda text: self._break(text, BREAK)) for message in messages]
        messages = [_write_out(message, self.chat_template) for message in messages]
        tools = _map_text(tools, lambda text: self._break(text, BREAK)) or None

        def lay_out(messages, **options):
            return self._template.render(
                messages=messages, tools=tools, generation_begin=BEGIN, generation_end=END, **self._names, **options
            )

        try:
            switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}    # a template may ask
            text = lay_out(messages, add_generation_prompt=add_generation_prompt, **switch)     # whether it is set
            if "generation" not in self._template_tags:
                text = self._mark_by_prefixes(text, messages, lay_out, BEGIN, END)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses this conversation: {error}") from error

        _check_unicode(text)
        ids, mask, inside, after_special = [], [], 0, True
        for part in re.split(f"({BEGIN}|{END}|{self._special_pattern})", text):
            if part in (BEGIN, END):
                inside = int(part == BEGIN)
                continue
            if part in self.special:
                new, after_special = [self.special[part]], True
            elif part:
                new, after_special = self.rule.encode_piece(part.replace(BREAK, ""), after_special, not ids), False
            else:
                continue
            ids += new
            mask += [inside] * len(new)
        return ids, mask

    def _break(self, text, mark):
        """`text` with `mark` inside every substring that spells a special token."""
        return re.sub(self._special_pattern, lambda found: found[0][:1] + mark + found[0][1:], text)

    def _mark_by_prefixes(self, text, messages, lay_out, begin, end):
        """`text` with the assistant's spans marked, for a template without `{% generation %}`.

        The span of turn i starts where a prompt for it would end and closes with the last stop token that the turn
        writes. Both come from rendering the first i (and i + 1) messages, which must give the same text again.
        """
        refuse = UserError(
            "the chat template lays out a turn differently once others follow it, so the assistant's part cannot be "
            "found by comparing prefixes; use --chat_template chatml"
        )
        stops = [token for token, index in self.special.items() if index in self.stop_ids]
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            thinking = bool(message.get("reasoning_content"))
            prompt = lay_out(messages[:i], add_generation_prompt=True, enable_thinking=thinking)
            turn = lay_out(messages[: i + 1], add_generation_prompt=False, enable_thinking=thinking)
            close = max((turn.rfind(stop) + len(stop) for stop in stops if stop in turn[len(prompt) :]), default=0)
            if not (turn.startswith(prompt) and close and text.startswith(turn[:close])):
                raise refuse
            spans.append((len(prompt), close))
        for start, close in reversed(spans):
            text = text[:start] + begin + text[start:close] + end + text[close:]
        return text

    @cached_property
    def _special_pattern(self):
        """Regular expression for any special token, the longest first.

        The names of SPECIAL_TOKENS are boundaries in every vocabulary: where <think> is no token of its own, it is
        still cut by itself, at the end of a prompt as well as in training.
        """
        return "|".join(re.escape(text) for text in sorted({*self.special, *SPECIAL_TOKENS}, key=len, reverse=True))

    @cached_property
    def _template(self):
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return env.from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template, line {error.lineno}: {error.message}") from error

    @cached_property
    def _template_tags(self):
        return set(re.findall(r"\{%[-+]?\s*(\w+)", self.chat_template))


class StreamDecoder:
    """Ids one at a time → text, never half a character.

    The bytes of a character may be spread over several tokens; they are held back until the character is whole.
    The pieces from `push` and the last one from `flush` joined together are exactly `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer, skip_special=True):
        self._pieces = tokenizer._pieces
        self._dropped = tokenizer._hidden if skip_special else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.rule.prefix_space  # the space that SentencePiece put before the text

    def push(self, index):
        """The text that token `index` completes, "" while a character is incomplete."""
        index = int(index)
        if index in self._dropped or index >= len(self._pieces):  # a model's table may be longer than the vocabulary
            return ""
        return self._emit(self._bytes.decode(self._pieces[index]))

    def flush(self):
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._emit(self._bytes.decode(b"", final=True))

    def _emit(self, text):
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


# --- the two cutting rules


class _BPE:
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, path):
        self.source, self.data = path, path.read_bytes()
        spec = _read_json(path, self.data)
        model = spec.get("model", {})
        if not {"vocab", "merges"} <= model.keys():
            raise UserError(f"{path}: its model ({model.get('type', 'none')}) is not BPE, the only kind read here")
        self.added = {t["content"]: (t["id"], t["special"]) for t in spec.get("added_tokens", [])}

        # Ordinary text is cut by a copy without added tokens. (`encode_special_tokens` would not do: it protects only
        # those marked special, and Qwen's <think> and <tool_call> are not.) They leave the vocabulary as well, since
        # `ignore_merges` takes a word that is in it whole. Only <unk> stays, because the model points at it.
        leave = self.added.keys() - {model.get("unk_token")}
        vocab = {text: index for text, index in model["vocab"].items() if text not in leave}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        merges = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
        plain = spec | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain["model"] = model | {"vocab": vocab, "merges": merges}
        self.definition = json.dumps(plain, sort_keys=True).encode()
        self._first = self._library(plain, path)

        before = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
        everything = before + json.dumps(spec.get("decoder"), ensure_ascii=False)
        if '"ByteLevel"' in everything:
            as_bytes = _from_byte_level
        elif "▁" in everything:
            as_bytes = _from_sentencepiece
        else:
            raise UserError(f"{path}: this BPE is neither byte-level (as Qwen's) nor SentencePiece's (as Llama 2's)")
        # A space before the text: at every stretch of it (Llama 2; scheme "always") or only at its start ("first").
        spaces = r'"Prepend"|"add_prefix_space": true|"prepend_scheme": "(first|always)"'
        self.prefix_space = bool(re.search(spaces, before)) and '"prepend_scheme": "never"' not in before
        self._prefix_everywhere = '"prepend_scheme": "first"' not in before
        self._later = self._library(_without_prefix(plain), path) if self.prefix_space else self._first
        self.pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, index in vocab.items():
            self.pieces[index] = as_bytes(text)

    @staticmethod
    def _library(spec, path):
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error

    def encode(self, texts):
        return [encoding.ids for encoding in self._first.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_piece(self, text, after_special, at_start):
        """Ids of a stretch of a rendered conversation. A prefix space, where the vocabulary has one, goes before the
        first stretch of the text, or before every stretch that follows a special token; never after a header."""
        first = at_start or (after_special and self._prefix_everywhere)
        return (self._first if first else self._later).encode(text, add_special_tokens=False).ids


class _SentencePiece:
    """tokenizer.model through the `sentencepiece` library."""

    def __init__(self, path, added):
        """`added`: {text: (id, hidden)} from tokenizer_config.json."""
        self.source = path
        self.definition = self.data = path.read_bytes()
        self._first = self._library(self.definition, path)
        # The same model without the space before the text. A protobuf message may be continued by appending to it:
        # these four bytes set field 3 of field 3 (normalizer_spec.add_dummy_prefix) to false.
        self._later = self._library(self.definition + b"\x1a\x02\x18\x00", path)
        self.prefix_space = self._first.encode("a") != self._later.encode("a")
        names = [self._first.id_to_piece(i) for i in range(self._first.get_piece_size())]
        control = [i for i in range(len(names)) if self._first.is_control(i) or self._first.is_unknown(i)]
        self.added = {names[i]: (i, True) for i in control}
        self.pieces = [_from_sentencepiece(name) for name in names]
        self._special = {index: text for text, (index, _) in (self.added | added).items()}

    @staticmethod
    def _library(definition, path):
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=definition)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from error

    def encode(self, texts):
        return [self._cut(text, self._first) for text in texts]

    def encode_piece(self, text, after_special, at_start):
        """Ids of a stretch of a rendered conversation; one that follows a special token gets the prefix space."""
        return self._cut(text, self._first if after_special else self._later)

    def _cut(self, text, model):
        """Ids of `text`. Control symbols are never found in text; special ones "defined by the user" are, and then the
        text is cut apart inside each of them first."""
        ids = model.encode(text)
        found = self._special.keys() & set(ids)
        if not found:
            return ids
        spelled = self._special[min(found)]
        cut = text.index(spelled) + 1
        return self._cut(text[:cut], model) + self._cut(text[cut:], self._later)


def _byte_alphabet():
    """{printable character: byte}: byte-level BPE (GPT-2) stores bytes as these 256 characters."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _from_byte_level(piece):
    return bytes(_BYTES[c] for c in piece)


def _from_sentencepiece(piece):
    """`▁` is a space and `<0x0A>` is one byte."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _without_prefix(spec):
    """A tokenizer.json that puts no space before the text."""
    if isinstance(spec, list):
        return [_without_prefix(item) for item in spec if item.get("type") != "Prepend"]
    if not isinstance(spec, dict):
        return spec
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    layers = {"normalizer", "pre_tokenizer", "normalizers", "pretokenizers"}
    spec = {key: _without_prefix(value) if key in layers else value for key, value in spec.items()}
    if spec.get("normalizer") and spec["normalizer"].get("type") == "Prepend":
        spec["normalizer"] = None
    return spec | {key: value for key, value in off.items() if key in spec}


# --- messages


def _for_template(message):
    """A checked copy of a message in the form that templates read (tool calls also in OpenAI's nested form)."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(f"message with role {role!r}: roles are system, user, assistant, tool")
    if content is None and role == "assistant":
        content = ""  # OpenAI's form of a turn that only calls tools
    if not isinstance(content, str):
        raise UserError(f"the content of a {role} message must be a string, not {type(content).__name__}")
    calls = []
    for i, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI sends them as JSON text
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                raise UserError(f"tool call: arguments are not JSON ({error}): {arguments!r}") from error
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise UserError(f"a tool call needs a name (text) and arguments (an object): {json.dumps(call)}")
        function = {"name": function["name"], "arguments": arguments}
        calls.append({"id": call.get("id", f"call{i:05d}"), "type": "function", "function": function, **function})
    message = message | {"content": content}
    return message | {"tool_calls": calls} if calls else message


def _write_out(message, template):
    """Parts of an assistant's message that the template does not read, back in its content as tags.

    The inverse of `lift_structure`. The tags are structure: where the vocabulary has them, they are single tokens.
    """
    parts = {key: message[key] for key in ("reasoning_content", "answer", "tool_calls") if message.get(key)}
    parts = {key: value for key, value in parts.items() if not re.search(rf"\.{key}\b|['\"]{key}['\"]", template)}
    if message["role"] != "assistant" or not parts:
        return message
    lines = [message["content"]] if message["content"] else []
    lines += [f"<answer>{parts['answer']}</answer>"] if "answer" in parts else []
    for call in parts.get("tool_calls", []):
        call = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        lines.append(f"<tool_call>{call}</tool_call>")
    thought = f"<think>\n{parts['reasoning_content']}\n</think>\n\n" if "reasoning_content" in parts else ""
    return message | {"content": thought + "\n".join(lines)}


def _check_unicode(text):
    """Half of a surrogate pair (JSON can spell one: "\\ud83d") is no character and has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        raise UserError(f"half a surrogate pair, which is not valid Unicode, at {around!r}; repair the text") from error


def _map_text(value, change):
    """`value` (nested dicts and lists) with `change` applied to every string in it but the role of a message."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): item if key == "role" else _map_text(item, change) for key, item in value.items()}
    return value


_TAG = re.compile(r"(</?(?:think|answer|tool_call)>)")


def lift_structure(message):
    """Tags inside an assistant's content → fields: (message, problem).

    `<think>…</think>`, then text, then `<answer>…</answer>`, then any `<tool_call>{json}</tool_call>`, each optional
    but in this order, become reasoning_content, content, answer and tool_calls. White space between the parts is
    dropped; the template writes its own. Messages of others and content without tags come back as they are.
    A malformed one comes back unchanged with the problem in words; its tags are then ordinary text.

    >>> lift_structure({"role": "assistant", "content": "<think>a</think> <answer>b</answer>"})[0]
    {'role': 'assistant', 'content': '', 'reasoning_content': 'a', 'answer': 'b'}
    """
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str) or not _TAG.search(content):
        return message, None
    parts, inside = [], None  # [(think | text | answer | tool_call, string)]
    for i, piece in enumerate(_TAG.split(content)):  # text, tag, text, tag, …, text
        if i % 2 == 0:
            parts += [(inside or "text", piece)] if inside or piece.strip() else []
        elif piece == f"</{inside}>":
            inside = None
        elif inside is None and not piece.startswith("</"):
            inside = piece[1:-1]
        else:
            return message, f"{piece} is out of place"
    if inside:
        return message, f"<{inside}> is never closed"
    if not re.fullmatch("(think )?(text )?(answer )?(tool_call )*", "".join(f"{name} " for name, _ in parts)):
        return message, f"{', '.join(name for name, _ in parts)}: the order is think, text, answer, tool_call"

    calls = [text for name, text in parts if name == "tool_call"]
    text = dict(parts)
    lifted = {"reasoning_content": text.get("think"), "answer": text.get("answer"), "tool_calls": calls or None}
    lifted = {key: value for key, value in lifted.items() if value is not None}
    twice = [key for key in lifted if message.get(key)]
    if twice:
        return message, f"{', '.join(twice)} given both as a field and as a tag in the content"
    for key in ("reasoning_content", "answer"):
        if key in lifted:
            lifted[key] = lifted[key].strip("\n")
    for i, call in enumerate(calls):
        try:
            call = json.loads(call)
        except json.JSONDecodeError as error:
            return message, f"<tool_call> does not hold JSON: {error}"
        match call:
            case {"name": str(name), "arguments": dict(arguments)}:
                calls[i] = {"name": name, "arguments": arguments}
            case _:
                return message, '<tool_call> does not hold {"name": text, "arguments": {…}}'
    return message | {"content": text.get("text", "").strip()} | lifted, None


# --- templates


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: the part of a template that the assistant has to produce."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def write(name):
            return nodes.Output([nodes.Name(name, "load")], lineno=line)

        return [write("generation_begin"), nodes.Scope(body, lineno=line), write("generation_end")]


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The `tojson` filter of chat templates: plain JSON (jinja2's own escapes < and > for HTML)."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


# --- files


def _read_json(path, data):
    """The object that the bytes `data` of the file at `path` spell."""
    try:
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_template(folder, config):
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def _token_text(entry):
    """tokenizer_config.json writes a token as text or as an object with its text in `content`."""
    return entry["content"] if isinstance(entry, dict) else entry
