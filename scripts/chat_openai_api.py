"""Talk to a model behind any OpenAI-compatible server, in the terminal.

reads   nothing; asks the server at --url, ours (scripts/serve_openai_api.py) if not told otherwise
writes  nothing
run     python scripts/chat_openai_api.py                             the first model of the server on this machine
        python scripts/chat_openai_api.py --model lora --thinking on
        python scripts/chat_openai_api.py --prompt "Who are you?" --temperature 0         one answer, then leave
        OPENAI_API_KEY=… python scripts/chat_openai_api.py --url https://example.org/v1 --model NAME

Inside: /help lists the commands, Ctrl-C stops an answer, /exit or end of input leaves. What the model writes is shown,
never obeyed: control characters are printed as escapes, and tool calls are shown, not run.
"""

import os
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run
from scripts.chat import dim, printable, show, talk

SETTABLE = {"system": str, "history": int, "thinking": str, "temperature": float, "top_p": float, "max_tokens": int}
HELP = f"""\
/NAME VALUE   change a setting: {", ".join(SETTABLE)}
/models       what the server has;   /model NAME   talk to another one
/reset        forget the conversation
/exit         leave (so does end of input); Ctrl-C stops an answer"""
HINTS = {"base_url": "--url URL", "model_name": "--model NAME", "max_new_tokens": "--max_tokens N",
         "history_messages_num": "--history N", "openai_api_key": "--api_key KEY"}


@dataclass
class Config:
    url: str = arg("http://127.0.0.1:8998/v1", "address of the server, with its /v1")
    model: str = arg("", "name of the model; empty: the first one that the server lists")
    api_key: str = arg("", "key for the server; better in the environment, as OPENAI_API_KEY: others see flags")
    system: str = arg("", "system message, said before everything else")
    history: int = arg(-1, "how many earlier exchanges the model sees; -1: all")
    thinking: str = arg("auto", "think first: on, off, or auto (nothing is said of it)", choices=("auto", "on", "off"))
    temperature: float = arg(0.85, "randomness; 0 always takes the likeliest token")
    top_p: float = arg(0.85, "sample from the likeliest tokens that together have this probability; 1 = all")
    max_tokens: int = arg(0, "longest answer, in tokens; 0: what the server gives")
    seed: int = arg(-1, "same seed, same answers; -1 = different every time")
    timeout: float = arg(120.0, "seconds to wait for the server to say something")
    prompt: str = arg("", "answer this and leave")


class Chat:
    """A server, the settings, and the exchanges so far."""

    def __init__(self, cfg):
        self.cfg, self.exchanges, self.answers = cfg, [], 0
        if not cfg.model:
            self.cfg = dataclasses.replace(cfg, model=self.models()[0])

    def open(self, path, body=None):
        """The response of the server, or UserError with what it says is wrong."""
        key = self.cfg.api_key or os.environ.get("OPENAI_API_KEY") or os.environ.get("ACORN_API_KEY", "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        url = self.cfg.url.rstrip("/") + path
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--url {self.cfg.url}: must begin with http:// or https://")
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=self.cfg.timeout)
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: {error.code} {printable(told(error.read(10_000)) or error.reason)}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{url}: no answer ({getattr(error, 'reason', error)}); is the server running "
                            "(python scripts/serve_openai_api.py), and --url its address?") from error

    def models(self):
        with self.open("/models") as response:
            try:
                names = [model["id"] for model in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.cfg.url}/models: not what such a server says; see --url") from error
        if not names:
            raise UserError(f"{self.cfg.url} lists no models; give --model NAME")
        return names

    def body(self, messages):
        cfg = self.cfg
        kept = self.exchanges[len(self.exchanges) - cfg.history:] if 0 <= cfg.history < len(self.exchanges) else (
            self.exchanges)
        system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        body = {"model": cfg.model, "messages": [*system, *(m for exchange in kept for m in exchange), *messages],
                "stream": True, "temperature": cfg.temperature, "top_p": cfg.top_p}
        if cfg.max_tokens:
            body["max_tokens"] = cfg.max_tokens
        if cfg.seed >= 0:
            body["seed"] = cfg.seed + self.answers
        if cfg.thinking != "auto":
            body["chat_template_kwargs"] = {"enable_thinking": cfg.thinking == "on"}
        return body

    def answer(self, messages):
        """Print the answer to messages (a list that ends with the user's) as it comes, and remember the exchange."""
        begin, text, thinking, reason = time.perf_counter(), "", False, "stopped"
        try:
            with self.open("/chat/completions", self.body(messages)) as response:
                for choice in choices(response):
                    delta = choice.get("delta") or {}
                    thought, piece = delta.get("reasoning_content") or "", delta.get("content") or ""
                    if bool(thought) != thinking and (thought or piece):
                        thinking = bool(thought)
                        show(dim("<think>") + "\n" if thinking else "\n" + dim("</think>") + "\n")
                    show(dim(printable(thought)) if thought else "")
                    show(printable(piece))
                    for call in delta.get("tool_calls") or []:
                        function = call.get("function") or {}
                        name = function.get("name")
                        show(printable((f"\n[tool call] {name} " if name else "") + (function.get("arguments") or "")))
                    text += piece
                    reason = choice.get("finish_reason") or reason
        except KeyboardInterrupt:
            pass
        except (OSError, http.client.HTTPException) as error:
            show("\n")
            raise UserError(f"the server broke off: {error}") from error
        show("\n" + dim(f"[{time.perf_counter() - begin:.1f} s, {printable(str(reason))}]") + "\n")
        self.answers += 1
        self.exchanges.append((messages[-1], {"role": "assistant", "content": text}))

    def command(self, line):
        """Obey a line that starts with '/'; False to leave. Raises UserError for what it cannot obey."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        if name in ("exit", "quit"):
            return False
        if name == "help":
            show(HELP + "\n")
        elif name == "reset":
            self.exchanges = []
        elif name == "models":
            show("".join(printable(model) + "\n" for model in self.models()))
        elif name == "model" and value:
            self.cfg = dataclasses.replace(self.cfg, model=value)
        elif name in SETTABLE:
            try:
                cfg = dataclasses.replace(self.cfg, **{name: SETTABLE[name](value)})
            except ValueError as error:
                raise UserError(f"/{name} {value}: expected a number") from error
            check(cfg)
            self.cfg = cfg
        else:
            raise UserError(f"unknown command /{name}; /help lists them")
        return True


def check(cfg):
    if cfg.thinking not in ("auto", "on", "off"):
        raise UserError(f"--thinking {cfg.thinking}: must be one of auto, on, off")
    if cfg.max_tokens < 0 or cfg.temperature < 0 or not 0 <= cfg.top_p <= 1:
        raise UserError("max_tokens and temperature must be 0 or more, top_p between 0 and 1")


def told(data):
    """The message of an error that a server sent as JSON, "" where there is none."""
    try:
        return str(json.loads(data, strict=False)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def choices(response):
    """The choices of the server-sent events of a response; UserError for an error among them."""
    for line in response:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            chunk = json.loads(line[5:], strict=False)
        except ValueError as error:
            raise UserError(f"the server sent what is no JSON: {line[:80]!r}") from error
        if not isinstance(chunk, dict):
            raise UserError(f"the server sent what is no chunk of an answer: {line[:80]!r}")
        if "error" in chunk:
            show("\n")
            raise UserError(f"the server says: {printable(told(line[5:]) or str(chunk['error']))}")
        yield from chunk.get("choices") or []


def main(cfg):
    check(cfg)
    chat = Chat(cfg)
    if cfg.prompt:
        return chat.answer([{"role": "user", "content": cfg.prompt}])
    talk(chat)


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")                      # for terminals that lack a character
    run(main, parse_args(Config, description=__doc__, hints=HINTS))
