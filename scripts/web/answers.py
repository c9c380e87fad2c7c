"""An answer while it is being written: by a thread of its own, so that the page may be drawn again at any time.

Two writers, one shape. `write_local` asks an engine in this process and runs the loop of eval/agent.py on token ids;
`write_remote` speaks to a server as OpenAI's clients do. Both leave finished messages in `Answer.messages` and what is
being written in `Answer.turn`, in the project's own form: {"role", "content", "reasoning_content", "tool_calls"}.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from dataset.builtin import tools
from eval.agent import MALFORMED, read_calls, tool_turn
from model.engine import QueueFull, Request
from model.errors import UserError
from model.generate import SamplingParams
from model.tokenizer import lift_structure
from scripts.chat import THINKING

MAX_TURNS = 6                # of the model in one answer, tool calls included
SECONDS_WITHOUT_WORD = 120   # after which a server is taken for dead
LONGEST_LINE = 1 << 20       # bytes of one event of a server


@dataclass(frozen=True)
class Settings:
    """What the sidebar says about how to answer; see model/generate.py `SamplingParams` and scripts/chat.py.

    max_new_tokens 0, for servers only: as many as fit.
    """
    temperature: float = 0.85
    top_p: float = 0.85
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 256
    seed: int = -1
    system: str = ""
    thinking: str = "auto"
    run_tools: bool = True
    describe_tools: bool = False
    history: int = 4

    def params(self, seed):
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p,
                              self.repetition_penalty, seed, presence_penalty=self.presence_penalty,
                              frequency_penalty=self.frequency_penalty)


class Answer:
    """One answer to a conversation. `write(answer)` runs in a thread; the page reads the fields below meanwhile.

    messages  finished ones: turns of the assistant, and the tools' results between them
    turn      the message being written, None between turns
    tokens, seconds, seed          what was written, how long it took so far, and the seed it was drawn with
    reason    "" while it is being written, then stop, length, cancelled, tool_calls or error
    problem   what went wrong, for people
    """

    def __init__(self, write, seed):
        self.messages, self.turn, self.tokens, self.seed = [], None, 0, seed
        self.reason, self.problem, self.release = "", "", None
        self.begun, self.ended = time.perf_counter(), None
        self.lock = threading.Lock()                   # the writer's end and the reader's stop may come together
        self.thread = threading.Thread(target=self.run, args=(write,), daemon=True)
        self.thread.start()

    def run(self, write):
        try:
            reason = write(self)
        except (UserError, QueueFull) as error:
            reason, self.problem = "error", str(error)
        except Exception as error:                     # a bug must end the answer, not leave the page waiting for ever
            reason, self.problem = "error", f"{type(error).__name__}: {error}"
            raise
        finally:
            self.end(reason)

    def end(self, reason):
        """What was written so far becomes a message; nothing is added after it."""
        with self.lock:
            if self.ended is None:
                turn, self.turn = self.turn, None
                if turn and any(value for part, value in turn.items() if part != "role"):
                    self.messages = [*self.messages, turn]
                self.reason = reason
                self.ended = time.perf_counter()

    def stop(self):
        """End it now; an engine frees its place at its next step, a server when it next says something."""
        release, running = self.release, self.running
        self.end("cancelled")
        if running and release is not None:
            release()

    def said(self, *messages):
        """A turn is finished, or tools have answered: `messages` are kept."""
        with self.lock:
            if self.ended is None:
                self.turn, self.messages = None, [*self.messages, *messages]

    @property
    def running(self):
        return self.ended is None

    @property
    def seconds(self):
        return (self.ended or time.perf_counter()) - self.begun


def draw_seed(settings):
    """The seed asked for, or one at random, small enough to be typed."""
    return settings.seed if settings.seed >= 0 else random.randrange(10 ** 6)


def as_message(text):
    """What an assistant wrote, tags included → a message with its parts apart, also where it is not finished.

    A thought that is still open, or was cut, is a thought; any other tag out of place is left as text.
    """
    message, problem = lift_structure({"role": "assistant", "content": text})
    if problem and text.lstrip().startswith("<think>"):
        thought, _, rest = text.lstrip().removeprefix("<think>").partition("</think>")
        message = {"role": "assistant", "content": rest.strip("\n"), "reasoning_content": thought.strip("\n")}
    return message


# --- in this process


def prompt_ids(tokenizer, messages, settings, limit):
    """Ids of system message, as many exchanges of `messages` as fit into `limit` positions, and the last question.

    An exchange is a user's message and what follows it; the oldest go first where room for an answer is short.
    """
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    starts = starts[-1 - settings.history:]
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    room = limit - min(settings.max_new_tokens, limit // 4)
    for start in starts:
        ids, _ = tokenizer.render(system + messages[start:], tools.SCHEMAS if settings.describe_tools else None,
                                  add_generation_prompt=True, enable_thinking=THINKING[settings.thinking])
        if len(ids) <= room:
            break
    return ids


def write_local(loaded, messages, settings):
    """A writer for `Answer`: the model of `loaded` (scripts/web/sources.py) answers the last of messages."""
    engine, tokenizer = loaded.engine, loaded.tokenizer
    knows_tools = {"<tool_call>", "</tool_call>"} <= tokenizer.special.keys()

    def write(answer):
        limit = loaded.model.config.max_position_embeddings
        ids = prompt_ids(tokenizer, messages, settings, limit)
        # A template that is told to think may write <think> itself; the model goes on behind it.
        opening = "<think>" if ids[-1] == tokenizer.special.get("<think>") else ""
        for turn in range(MAX_TURNS):
            ticket = engine.submit(Request(ids, settings.params(answer.seed + turn), adapter=loaded.adapter))
            answer.release = ticket.cancel
            text = opening
            for piece in ticket:
                if not answer.running:
                    ticket.cancel()
                    return "cancelled"
                text, answer.tokens = text + piece.text, answer.tokens + len(piece.token_ids)
                answer.turn = as_message(text)
            result = ticket.result()
            calls = read_calls(tokenizer, result.token_ids) if knows_tools and settings.run_tools else []
            if not calls or result.token_ids[-1] != tokenizer.end_of_turn_id:
                return result.finish_reason
            results = [tools.call(**call) if call else MALFORMED for call in calls]
            answer.said(as_message(text), *({"role": "tool", "content": said} for said in results))
            # What was sampled stays the ids that were sampled; only the tools' words are encoded.
            ids, opening = ids + result.token_ids + tool_turn(tokenizer, results), ""
            if len(ids) >= limit:
                return "length"
        return "tool_calls"

    return write


# --- on a server


def post(url, key, body=None, seconds=SECONDS_WITHOUT_WORD):
    """An open response of a server to GET, or to POST with a JSON body. UserError says what went wrong, with its words.

    url is checked to be http or https: urllib would open files too.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"the address {url!r} must begin with http:// or https://, as http://127.0.0.1:8998/v1")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=seconds)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode("utf-8", "replace")
        raise UserError(f"{url} answers {error.code}: {message_in(said)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} does not answer ({getattr(error, 'reason', error)}): is the server running?") from error


def message_in(said):
    """The message of an OpenAI-shaped error, else the text itself."""
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said


def remote_models(url, key):
    """Names of the models that a server has."""
    with post(f"{url.rstrip('/')}/models", key, seconds=10) as response:
        try:
            return [str(model["id"]) for model in json.loads(response.read())["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url}/models does not answer with a list of models: is it the address of an "
                            "OpenAI-compatible server, with /v1?") from error


def request_body(model, messages, settings, seed):
    """What POST /chat/completions is sent. Knobs that OpenAI's interface lacks are sent only where they are turned."""
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"][-1 - settings.history:]
    body = {"model": model, "messages": system + in_openai_form(messages[starts[0]:]), "stream": True,
            "stream_options": {"include_usage": True}, "temperature": settings.temperature, "top_p": settings.top_p,
            "seed": seed}
    if settings.max_new_tokens:                        # without it a server takes what fits, and with it may refuse
        body["max_tokens"] = settings.max_new_tokens
    for name, off in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1), ("presence_penalty", 0),
                      ("frequency_penalty", 0)):
        if getattr(settings, name) != off:
            body[name] = getattr(settings, name)
    if THINKING[settings.thinking] is not None:
        body["chat_template_kwargs"] = {"enable_thinking": THINKING[settings.thinking]}
    if settings.describe_tools:
        body["tools"] = tools.SCHEMAS
    return body


def in_openai_form(messages):
    """Messages of ours → OpenAI's: calls with ids and arguments as JSON text, results that name the call."""
    told, waiting = [], []
    for number, message in enumerate(messages):
        message = {key: value for key, value in message.items() if key not in ("reasoning_content", "answer")} | {
            "content": "\n".join(filter(None, (message["content"], message.get("answer"))))}
        if message.get("tool_calls"):
            waiting = [f"call_{number}_{place}" for place in range(len(message["tool_calls"]))]
            message["tool_calls"] = [
                {"id": name, "type": "function", "function": {
                    "name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for name, call in zip(waiting, message["tool_calls"], strict=True)]
        elif message["role"] == "tool" and waiting:
            message["tool_call_id"] = waiting.pop(0)
        told.append(message)
    return told


def write_remote(url, key, model, messages, settings):
    """A writer for `Answer`: a server answers the last of messages, and its calls of tools are run here."""
    def write(answer):
        for turn in range(MAX_TURNS):
            body = request_body(model, [*messages, *answer.messages], settings, answer.seed + turn)
            before, reason, heard = answer.tokens, "stop", {"content": "", "reasoning": "", "calls": {}}
            with post(f"{url.rstrip('/')}/chat/completions", key, body) as response:
                for event in events(response):
                    if not answer.running:
                        return "cancelled"             # closing the connection tells the server
                    reason = listen(event, heard) or reason
                    answer.turn = heard_message(heard)
                    usage = event.get("usage") or {}
                    answer.tokens = before + usage["completion_tokens"] if "completion_tokens" in usage else \
                        answer.tokens + (1 if event.get("choices") else 0)
            # A server that was not told of the tools hands a call on as the text that the model wrote.
            written = as_message(heard["content"]).get("tool_calls", [])
            calls = [parsed(call) for call in heard["calls"].values()] or written
            if not calls or not settings.run_tools:
                return reason
            results = [tools.call(**call) if call else MALFORMED for call in calls]
            message = heard_message(heard) | {"tool_calls": [call or {"name": "", "arguments": {}} for call in calls]}
            answer.said(message, *({"role": "tool", "content": said} for said in results))
        return "tool_calls"

    return write


def events(response):
    """The JSON objects of a stream of server-sent events, up to [DONE]. UserError for one that is an error."""
    try:
        while line := response.readline(LONGEST_LINE):
            line = line.strip()
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if not isinstance(event, dict) or "error" in event:
                    raise UserError(f"the server reports an error: {message_in(line[5:].decode('utf-8', 'replace'))}")
                yield event
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"the connection to the server broke: {error}") from error
    except ValueError as error:
        raise UserError(f"the server sent an event that is not JSON ({error})") from error


def listen(event, heard):
    """Add what one event of a stream says to `heard`; returns its finish_reason, None before the end."""
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        heard["content"] += delta.get("content") or ""
        heard["reasoning"] += delta.get("reasoning_content") or delta.get("reasoning") or ""
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            known = heard["calls"].setdefault(call.get("index", 0), {"name": "", "arguments": ""})
            known["name"] += function.get("name") or ""
            known["arguments"] += function.get("arguments") or ""
        return choice.get("finish_reason")
    return None


def heard_message(heard):
    """What was heard so far as a message."""
    message = as_message(heard["content"])
    if heard["reasoning"]:
        message["reasoning_content"] = heard["reasoning"]
    calls = [call for call in map(parsed, heard["calls"].values()) if call]        # arguments come bit by bit
    return message | {"tool_calls": calls} if calls else message


def parsed(call):
    """A call with its arguments read, or None where they are no JSON object."""
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except (ValueError, RecursionError):
        return None
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, dict) else None
