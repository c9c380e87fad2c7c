"""What OpenAI's HTTP interface looks like: the bodies it takes, and the answers, chunks and errors that it gives.

In lecture order:
  1. requests    pydantic models; wrong types and fields that would be misunderstood are refused, harmless ones ignored
  2. Reader      the tokens of an answer, sorted into thought, text and tool calls as they come
  3. choices     an answer as it comes: the pieces of the engine in, parts of chunks out, and the whole
  4. the rest    envelopes, usage, log-probabilities, errors

Structure comes from token ids: only the token <tool_call> opens a call and only the token <think> a thought. A model
that spells these letters has written text.
"""

import json
import time
import uuid
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from model.generate import StopScanner

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
LEAST = -9999.0                                            # stands for log-probabilities below it: JSON has no -inf


# --- 1. requests


class Body(BaseModel):
    """Types are taken at their word ("1" is no number); unknown fields are ignored."""
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)
    unsupported: ClassVar[dict] = {}                       # fields that change an answer: values that change nothing

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body):
        for name, harmless in cls.unsupported.items():
            if isinstance(body, dict) and name in body and body[name] not in harmless:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return body


def _without_surrogates(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair, which is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# fail_fast: of a list with a million mistakes only the first is told.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Text | Ids | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | Annotated[
    list[Ids], Field(min_length=1, fail_fast=True)]


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What chat and text completions have in common."""
    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-2**63, lt=2**64)
    n: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only together with stream")
        return self

    @property
    def stop_strings(self):
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _call_arguments(text):
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"arguments must be JSON text: {str(error)[:100]}") from error
    if not isinstance(arguments, dict):
        raise ValueError("arguments must be the JSON text of an object")
    return text


class FunctionCall(Body):
    name: Text
    arguments: Annotated[Text, AfterValidator(_call_arguments)]


class ToolCall(Body):
    id: Text = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    unsupported: ClassVar[dict] = {"function_call": [None], "audio": [None]}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _content(self):
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message with role {self.role} needs content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("tool_calls and reasoning_content are the assistant's")
        return self

    def plain(self):
        """The message as the tokenizer's chat template reads it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function

    def plain(self):
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Schema(Body):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema, an object with the schema in its field schema")
        return self


class TemplateOptions(Body):
    model_config = ConfigDict(strict=True, extra="forbid")
    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    unsupported: ClassVar[dict] = {
        "functions": [None, []], "function_call": [None, "none"], "modalities": [None, ["text"]], "audio": [None],
        "web_search_options": [None], "best_of": [None, 1], "echo": [None, False], "prompt_logprobs": [None]}
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @model_validator(mode="after")
    def _combinations(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name[:80]!r}, which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if self.must_call and self.form != "text":
            raise ValueError("an answer is either a tool call (tool_choice) or JSON (response_format), not both")
        return self

    @property
    def must_call(self):
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def form(self):
        return self.response_format.type if self.response_format else "text"

    @property
    def constrained(self):
        """Whether the answer has to follow a grammar."""
        return self.form != "text" or self.must_call or any(tool.function.strict for tool in self.usable_tools)

    @property
    def usable_tools(self):
        """The tools the model is told of; none with tool_choice none, one where one is named."""
        if self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool for tool in self.tools or [] if named in (None, tool.function.name)]

    @property
    def thinking(self):
        """enable_thinking of the chat template: True, False, or None for as the model likes."""
        for asked in (self.enable_thinking, self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking):
            if asked is not None:
                return asked
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"


class CompletionRequest(Sampling):
    unsupported: ClassVar[dict] = {"suffix": [None, ""], "best_of": [None, 1], "response_format": [None],
                                   "prompt_logprobs": [None]}
    prompt: Texts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _echo(self):
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported: the prompt gets no logprobs")
        return self


class EmbeddingRequest(Body):
    unsupported: ClassVar[dict] = {"dimensions": [None]}
    model: Text
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None


def several(prompt):
    """A prompt, text or ids, or a list of such, as the list."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


# --- 2. reading an answer


class Reader:
    """Token ids of one answer in, deltas out: {"reasoning_content" | "content": text} and {"tool_call": {…}}.

    White space between the parts is dropped, as the chat template writes its own. What stands between <tool_call> and
    </tool_call> without being a call, {"name": text, "arguments": object}, is given as text with its tags.
    """

    def __init__(self, tokenizer, stop_ids, stop_strings=(), thinking=False, tools=False):
        """thinking: the prompt ends inside a thought. tools: look for calls; without, a call is text."""
        special = tokenizer.special
        self.tokenizer, self.stop_ids, self.stop_strings = tokenizer, stop_ids, stop_strings
        self.think, self.end_think = special.get("<think>"), special.get("</think>")
        self.open, self.close = (special.get("<tool_call>"), special.get("</tool_call>")) if tools else (None, None)
        self.called = self.thought_tokens = 0              # how many calls there were, how many tokens of thought
        self.call_ids = None                               # of the call that is being written
        self.structured = thinking                         # something other than text came before
        self.enter("reasoning_content" if thinking else "content")

    def enter(self, part):
        self.part, self.scanner = part, StopScanner(self.tokenizer, self.stop_strings)
        self.begun, self.space = False, ""                 # space: at the end so far, dropped if the part ends there

    def push(self, ids):
        """The deltas that became certain with these ids."""
        return [delta for index in ids if index not in self.stop_ids for delta in self.one(index)]

    def one(self, index):
        self.thought_tokens += self.part == "reasoning_content"
        if self.call_ids is not None:
            if index == self.close:
                return self.end_call()
            self.call_ids.append(index)
            return []
        if index == self.open and self.part == "content":
            self.call_ids = []
            return self.leave()
        if index == self.think and self.part == "content" or index == self.end_think and self.part != "content":
            deltas = self.leave()
            self.structured = True
            self.enter("reasoning_content" if index == self.think else "content")
            return deltas
        return self.text(self.scanner.push(index))

    def text(self, piece):
        """The delta of a piece of text; white space waits for what follows it."""
        piece = self.space + piece
        if not self.begun and self.structured:
            piece = piece.lstrip()
        said = piece.rstrip()
        self.space = piece[len(said):]
        if not said:
            return []
        self.begun = True
        return [{self.part: said}]

    def leave(self):
        """The last delta of a part that something else follows."""
        return self.text(self.scanner.flush())

    def end_call(self):
        ids, self.call_ids = self.call_ids, None
        call = read_call(self.tokenizer.decode(ids, skip_special=False))
        if call is None:
            return self.text(self.tokenizer.decode([self.open, *ids, self.close], skip_special=False))
        self.structured = True
        self.enter("content")
        self.called += 1
        return [{"tool_call": {"index": self.called - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                               "function": call}}]

    def finish(self):
        """The deltas at the end of the answer: white space at the end is text, an unfinished call is, too."""
        if self.call_ids is not None:
            text = self.tokenizer.decode([self.open, *self.call_ids], skip_special=False)
            self.call_ids = None
            piece = StopScanner(self.tokenizer, self.stop_strings).scan(text)      # it may be what ended the answer
            return [{"content": self.space + piece}]
        deltas = self.text(self.scanner.flush())
        if self.space and not (self.structured and not self.begun) and self.part == "content":
            deltas.append({"content": self.space})
        return deltas


def read_call(text):
    """{"name", "arguments": JSON text} of a call that a model wrote, None where it is something else."""
    try:
        call = json.loads(text)
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)
                and isinstance(call.get("arguments"), dict)):
            return None
        call = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)}
        json.dumps(call, ensure_ascii=False).encode()      # half a surrogate pair has no UTF-8 form
    except (ValueError, RecursionError):
        return None
    return call


# --- 3. choices


class ChatChoice:
    """One of the `choices` of a chat answer. `begin`, `push` and `end` give parts of chunks, `whole` all of it."""

    def __init__(self, index, reader, logprobs):
        """logprobs: whether they were asked for."""
        self.index, self.reader, self.logprobs = index, reader, logprobs

    def part(self, delta, logprobs=None, finish_reason=None):
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def begin(self):
        return [self.part({"role": "assistant", "content": ""})]

    def push(self, piece):
        deltas = joined(self.reader.push(piece.token_ids))
        deltas = [part for delta in deltas for part in chat_deltas(delta)]
        told = self.told(piece)
        if told is None:
            return [self.part(delta) for delta in deltas]
        first, *later = deltas or [{"content": ""}]        # the log-probabilities come with the first delta
        return [self.part(first, told), *map(self.part, later)]

    def end(self, answer):
        deltas = [part for delta in joined(self.reader.finish()) for part in chat_deltas(delta)]
        return [*map(self.part, deltas), self.part({}, finish_reason=self.finish_reason(answer))]

    def whole(self, answer):
        deltas = self.reader.push(answer.token_ids) + self.reader.finish()
        told = self.told(answer) or ({"content": [], "refusal": None} if self.logprobs else None)
        return {"index": self.index, "message": collect(deltas), "logprobs": told,
                "finish_reason": self.finish_reason(answer)}

    def told(self, piece):
        """The log-probabilities of a Piece or Answer, None without any."""
        if not self.logprobs:
            return None
        stop_ids = self.reader.stop_ids
        tokens = [token for token in zip(piece.token_ids, piece.logprobs, piece.top, strict=True)
                  if token[0] not in stop_ids]
        return chat_logprobs(self.reader.tokenizer, tokens) if tokens else None

    def finish_reason(self, answer):
        return "tool_calls" if self.reader.called and answer.finish_reason == "stop" else answer.finish_reason


class TextChoice:
    """One of the `choices` of a text completion; echo: the prompt, if it is to stand before the answer."""

    def __init__(self, index, tokenizer, stop_ids, logprobs, echo=""):
        self.index, self.tokenizer, self.stop_ids, self.logprobs, self.echo = index, tokenizer, stop_ids, logprobs, echo
        self.offset = len(echo)                            # characters before the tokens to come

    def part(self, text, logprobs=None, finish_reason=None):
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def begin(self):
        return [self.part(self.echo)] if self.echo else []

    def push(self, piece):
        return [self.part(piece.text, self.told(piece))] if piece.text or piece.logprobs else []

    def end(self, answer):
        return [self.part("", finish_reason=answer.finish_reason)]

    def whole(self, answer):
        return self.part(self.echo + answer.text, self.told(answer), answer.finish_reason)

    def told(self, piece):
        if not self.logprobs:
            return None
        tokens = [token for token in zip(piece.token_ids, piece.logprobs, piece.top, strict=True)
                  if token[0] not in self.stop_ids]
        told = completion_logprobs(self.tokenizer, tokens, self.offset)
        self.offset += sum(map(len, told["tokens"]))
        return told


def joined(deltas):
    """The deltas with neighbouring texts of one kind as one."""
    result = []
    for delta in deltas:
        (kind, value), = delta.items()
        if result and kind != "tool_call" and kind in result[-1]:
            result[-1] = {kind: result[-1][kind] + value}
        else:
            result.append(delta)
    return result


def collect(deltas):
    """The deltas of a whole answer as OpenAI's assistant message."""
    parts = {"content": "", "reasoning_content": ""}
    calls = []
    for delta in deltas:
        for key, value in delta.items():
            if key == "tool_call":
                calls.append({key: value[key] for key in ("id", "type", "function")})
            else:
                parts[key] += value
    message = {"role": "assistant", "content": parts["content"] if parts["content"] or not calls else None}
    if parts["reasoning_content"]:
        message["reasoning_content"] = parts["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return message


def chat_deltas(delta):
    """The `delta`s of a chat stream for a delta of `Reader`: a call's name first, then its arguments."""
    if "tool_call" not in delta:
        return [delta]
    call = delta["tool_call"]
    begin = call | {"function": {"name": call["function"]["name"], "arguments": ""}}
    return [{"tool_calls": [begin]},
            {"tool_calls": [{"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}]}]


# --- 4. the rest


def envelope(kind, prefix, model, fingerprint):
    """What all chunks and the whole of an answer begin with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint}


def usage(prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens=0):
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}


def token_bytes(tokenizer, index):
    for text, special in tokenizer.special.items():
        if special == index:
            return text.encode()
    pieces = tokenizer.rule.pieces
    return pieces[index] if index < len(pieces) else b""


def token_entry(tokenizer, index, logprob):
    raw = token_bytes(tokenizer, index)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


def chat_logprobs(tokenizer, tokens):
    """OpenAI's `logprobs` of a chat answer. tokens: (id, logprob, [(id, logprob), …] of the likeliest) of each."""
    return {"content": [token_entry(tokenizer, index, logprob) | {
        "top_logprobs": [token_entry(tokenizer, *pair) for pair in top]} for index, logprob, top in tokens],
        "refusal": None}


def completion_logprobs(tokenizer, tokens, offset):
    """OpenAI's `logprobs` of a text completion; offset: characters before the first of these tokens."""
    def text(index):
        return token_bytes(tokenizer, index).decode(errors="replace")

    texts = [text(index) for index, _, _ in tokens]
    tops = [{text(index): max(logprob, LEAST) for index, logprob in reversed(top)} for _, _, top in tokens]
    return {"tokens": texts, "token_logprobs": [max(logprob, LEAST) for _, logprob, _ in tokens],
            "top_logprobs": tops, "text_offset": [*accumulate(map(len, texts[:-1]), initial=offset)][:len(texts)]}


KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(status, message, param=None, code=None):
    """OpenAI's error object."""
    message = message.encode(errors="replace").decode()    # it may quote half a surrogate pair
    return {"error": {"message": message, "type": KINDS.get(status, "invalid_request_error"), "param": param,
                      "code": code}}


def event(data):
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
