"""scripts/web_demo.py without a browser: answers as they are written, what the sidebar asks, and the three pages.

tests/test_browser.py looks at the same pages in a browser.
"""

import ast
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("streamlit", reason="the chat page needs streamlit")
from streamlit.testing.v1 import AppTest

from dataset import jsonl
from dataset.builtin import tools
from model.adapters.adapted import AdapterConfig, attach
from model.adapters.folder import save_adapter
from model.checkpoint import save_model
from model.config import ModelConfig
from model.engine import Answer as Result
from model.engine import Piece, QueueFull
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts.web import answers, chat, sources, training
from scripts.web.answers import Answer, Settings, as_message, in_openai_form, prompt_ids, request_body
from scripts.web.labels import LABELS
from scripts.web.text import escaped, pieces, plain
from scripts.web_demo import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.load("nano")
END = TOKENIZER.end_of_turn_id
HOSTILE = ("<script>document.title='taken'</script> <img src=http://evil.example/a.png onerror=alert(1)> <b>bold</b>\n"
           "![x](http://evil.example/b.png) [click](http://evil.example) :red[red] :material/home: $x^2$ # no title\n"
           "```html\n<iframe src='http://evil.example'></iframe>\nand no closing fence \x1b[31m \u202eabc")


# --- what the tests talk to


def write_models(folder):
    """Checkpoints one, two and mixture below `folder`, and an adapter of one that changes its answers."""
    for seed, name in enumerate(("one", "two", "mixture")):
        torch.manual_seed(seed)
        sparse = {"num_experts": 3, "moe_intermediate_size": 16} if name == "mixture" else {}
        config = ModelConfig(TOKENIZER.vocab_size, 32, 64, 2, 2, 1, max_position_embeddings=256, initializer_range=0.3,
                             **sparse)
        save_model(folder / name, CausalLM(config), TOKENIZER)
    model = CausalLM(ModelConfig(TOKENIZER.vocab_size, 32, 64, 2, 2, 1, max_position_embeddings=256))
    attach(model, AdapterConfig("lora", rank=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(folder / "lora", model, TOKENIZER, base=str(folder / "one"))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("runs"))


def load(runs, name="one", adapter=""):
    return sources.load(str(runs / name), adapter and str(runs / adapter), Config(device="cpu", dtype="float32"))


class Handler(BaseHTTPRequestHandler):
    """A server that says what its `answers` hold: (pieces of text or whole deltas, seconds between them)."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "first"}, {"id": "second"}]})

    def reply(self, code, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if isinstance(answer, tuple) and isinstance(answer[0], int):
            return self.reply(*answer)
        said, seconds = answer if isinstance(answer, tuple) else (answer, 0)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(OSError):                                 # whoever asked has left
            for delta in said:
                if isinstance(delta, bytes):
                    self.wfile.write(delta)
                    continue
                delta = {"content": delta} if isinstance(delta, str) else delta
                self.say({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                time.sleep(seconds)
                self.server.sent += 1
            self.say({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.say({"choices": [], "usage": {"completion_tokens": 42}})
            self.wfile.write(b"data: [DONE]\n\n")

    def say(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()


@contextlib.contextmanager
def stub_server(*said):
    """A server on this machine that gives these answers in turn, the last one for ever: .url, .asked, .sent."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.answers, server.asked, server.sent = list(said), [], 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(text):
    return [{"role": "user", "content": text}]


def finished(answer):
    answer.thread.join(60)
    assert not answer.running
    return answer


def remote(server, settings=None, messages=None, key=""):
    write = answers.write_remote(server.url, key, "first", messages or ask("hi"), settings or Settings())
    return finished(Answer(write, 5))


# --- text that somebody else wrote


@pytest.mark.parametrize("text, expected", [
    ("plain", [("text", "plain")]), ("", []), ("\n\n", []), ("a\n\nb", [("text", "a\n\nb")]),
    ("a\n```py\nx = 1\n```\nb", [("text", "a"), ("code", "x = 1", "py"), ("text", "b")]),
    ("```\nopen", [("code", "open", None)]), ("```", [("code", "", None)]),
    ("```<script>\nx\n```", [("code", "x", None)]), ("~~~~\n```\n~~~\n~~~~", [("code", "```\n~~~", None)]),
    ("`` ` ``", [("text", "`` ` ``")]), ("    ```\nno fence", [("text", "    ```\nno fence")]),
    ("````md\n```\nx\n```\n````\nafter", [("code", "```\nx\n```", "md"), ("text", "after")])])
def test_pieces(text, expected):
    assert pieces(text) == expected


def test_every_character_of_a_hostile_text_is_kept_or_escaped():
    assert "".join(body for _, body, *_ in pieces(plain(HOSTILE))).count("evil.example") == 4
    assert plain("\x1b[31m\u202e\x00\ud83d ok\n\t你好") == "\\x1b[31m\\u202e\\x00\\ud83d ok\n\t你好"
    assert escaped("a_b :red[x] <b> $y$") == r"a\_b \:red\[x\] \<b\> \$y\$"


@pytest.mark.parametrize("text, expected", [
    ("hello", {"content": "hello"}),
    ("<think>\nhm\n</think>\n\n4", {"content": "4", "reasoning_content": "hm"}),
    ("<think>\nhm", {"content": "", "reasoning_content": "hm"}),
    ("<think>hm</think>a<think>b", {"content": "a<think>b", "reasoning_content": "hm"}),
    ("4 <think>", {"content": "4 <think>"}),
    ('<tool_call>{"name": "x", "arguments": {}}</tool_call>',
     {"content": "", "tool_calls": [{"name": "x", "arguments": {}}]}),
    ('<tool_call>{"name"', {"content": '<tool_call>{"name"'})])
def test_as_message(text, expected):
    assert {"role": "assistant"} | expected == {
        key: value for key, value in as_message(text).items() if value or key == "content"}


# --- answers in this process


@pytest.mark.parametrize("adapter", ["", "lora"])
def test_an_answer_is_that_of_generate(runs, adapter):
    loaded, settings = load(runs, adapter=adapter), Settings(temperature=0.8, top_p=0.9, min_p=0.01, top_k=50,
                                                             repetition_penalty=1.1, presence_penalty=0.3,
                                                             frequency_penalty=0.2, max_new_tokens=20)
    answer = finished(Answer(answers.write_local(loaded, ask("Who are you?"), settings), 7))
    ids = TOKENIZER.render(ask("Who are you?"), add_generation_prompt=True)[0]
    params = SamplingParams(20, 0.8, 50, 0.9, 0.01, 1.1, 7, presence_penalty=0.3, frequency_penalty=0.2)

    def expected(model):
        return generate(model, [ids], params, TOKENIZER)[0][0]

    (completion, other) = (loaded.engine.call(expected, name) for name in (loaded.adapter, ""))
    assert answer.messages == [as_message(completion.text)] and completion.text
    assert (completion.text == other.text) == (not adapter)
    assert (answer.tokens, answer.reason, answer.problem) == (len(completion.ids), completion.finish_reason, "")


def test_stop_ends_an_answer_at_once_and_frees_its_row(runs):
    loaded = load(runs)
    answer = Answer(answers.write_local(loaded, ask("hi"), Settings(max_new_tokens=240, run_tools=False)), 3)
    while not answer.turn and answer.running:
        time.sleep(0.001)
    answer.stop()
    assert answer.reason == "cancelled" and not answer.running
    said = [dict(message) for message in answer.messages]
    answer.thread.join(60)
    assert answer.messages == said and answer.tokens < 240
    deadline = time.monotonic() + 60
    while loaded.engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loaded.engine.stats()["running"] == 0
    answer.stop()                                                          # a second time does nothing
    assert answer.messages == said


def test_stop_takes_an_answer_out_of_the_queue():
    class Waiting:                             # engine and ticket in one; nothing comes until it is cancelled
        def __init__(self):
            self.gone = threading.Event()

        def submit(self, request):
            return self

        def __iter__(self):
            self.gone.wait(60)
            return iter(())

        def cancel(self):
            self.gone.set()

        def result(self):
            return Result("", [], [], [], "cancelled", 0, 0, 0)

    engine = Waiting()
    model = type("Model", (), {"config": type("Config", (), {"max_position_embeddings": 256})})
    answer = Answer(answers.write_local(sources.Loaded(model, TOKENIZER, engine, ""), ask("hi"), Settings()), 1)
    while answer.release is None:
        time.sleep(0.001)
    answer.stop()
    assert engine.gone.is_set() and finished(answer).reason == "cancelled" and answer.messages == []


class Scripted:
    """An engine that says what it is told, turn by turn, a token in a piece."""

    def __init__(self, *turns):
        self.turns, self.asked = list(turns), []

    def submit(self, request):
        self.asked.append(request)
        ids = self.turns.pop(0)
        if isinstance(ids, Exception):
            raise ids

        class Ticket:
            def __iter__(self):
                return (Piece(TOKENIZER.decode([index], skip_special=False) if index != END else "", [index], [], [])
                        for index in ids)

            def cancel(self):
                pass

            def result(self):
                return Result(TOKENIZER.decode(ids), ids, [], [], "stop" if ids[-1] == END else "length", 0, 0, 0)

        return Ticket()


def scripted(*turns, settings=None, **loaded):
    engine = Scripted(*turns)
    model = type("Model", (), {"config": type("Config", (), {"max_position_embeddings": 256} | loaded)})
    write = answers.write_local(sources.Loaded(model, TOKENIZER, engine, ""), ask("1+2?"), settings or Settings())
    return finished(Answer(write, 9)), engine


def calling(text):
    return [TOKENIZER.special["<tool_call>"], *TOKENIZER.encode(text), TOKENIZER.special["</tool_call>"], END]


CALL = {"name": "calculator", "arguments": {"expression": "1+2"}}


def test_tools_are_run_and_the_answer_goes_on():
    last = [*TOKENIZER.encode("3"), END]
    answer, engine = scripted(calling(json.dumps(CALL)), calling("{broken"), last)
    assert [message["role"] for message in answer.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert answer.messages[0]["tool_calls"] == [CALL] and answer.messages[1]["content"] == "3"
    assert answer.messages[3]["content"] == answers.MALFORMED and answer.messages[4]["content"] == "3"
    assert answer.reason == "stop"
    # what was sampled is not encoded again: the next prompt begins with it
    first, second, _ = engine.asked
    assert second.prompt_ids[:len(first.prompt_ids)] == first.prompt_ids
    assert second.prompt_ids[len(first.prompt_ids):][:len(calling(json.dumps(CALL)))] == calling(json.dumps(CALL))
    assert [request.params.seed for request in engine.asked] == [9, 10, 11]


def test_where_tools_are_not_run():
    call = calling(json.dumps(CALL))
    for answer, engine in (scripted(call, settings=Settings(run_tools=False)), scripted(call[:-1])):
        assert len(engine.asked) == 1 and [message["role"] for message in answer.messages] == ["assistant"]
    answer, engine = scripted(*[call] * 9)
    assert answer.reason == "tool_calls" and len(engine.asked) == answers.MAX_TURNS
    answer, engine = scripted(call, max_position_embeddings=46)
    assert answer.reason == "length" and len(engine.asked) == 1


def test_what_goes_wrong_ends_the_answer_with_words():
    for error in (UserError("no room"), QueueFull("too many")):
        answer, _ = scripted(error)
        assert (answer.reason, answer.problem, answer.messages) == ("error", str(error), [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_does_not_leave_the_page_waiting():
    answer, _ = scripted(ZeroDivisionError("oops"))
    assert (answer.reason, answer.problem) == ("error", "ZeroDivisionError: oops")


def test_what_the_model_sees_of_a_conversation():
    messages = [message for number in range(4) for message in (
        {"role": "user", "content": f"ask{number}"}, {"role": "assistant", "content": "say"})][:-1]

    def seen(limit=256, **settings):
        return TOKENIZER.decode(prompt_ids(TOKENIZER, messages, Settings(**settings), limit))

    assert seen().count("user\n") == 4
    assert seen(history=1, system="Short.").startswith("system\nShort.\nuser\nask2\nassistant\nsay\nuser\nask3\n")
    assert seen(history=0) == "user\nask3\nassistant\n"
    assert seen(limit=60, max_new_tokens=20).startswith("user\nask1\n")    # room for three, and a quarter of it free
    assert seen(limit=20) == "user\nask3\nassistant\n"
    assert "calculator" in seen(describe_tools=True) and "calculator" not in seen()
    ids = prompt_ids(TOKENIZER, messages, Settings(thinking="on"), 256)
    assert ids[-1] == TOKENIZER.special["<think>"]


# --- answers of a server


def test_a_server_answers(capsys):
    with stub_server(["Hel", {"reasoning_content": "hm"}, "lo"]) as server:
        settings = Settings(system="Short.", top_k=5, thinking="off", history=0)
        answer = remote(server, settings, ask("old") + [{"role": "assistant", "content": "x"}] + ask("new"), "secret")
    assert answer.messages == [{"role": "assistant", "content": "Hello", "reasoning_content": "hm"}]
    assert (answer.reason, answer.tokens, answer.problem) == ("stop", 42, "")
    (path, key, body), = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "system", "content": "Short."}, {"role": "user", "content": "new"}]
    assert body["stream"] and body["top_k"] == 5 and body["seed"] == 5 and body["model"] == "first"
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "min_p" not in body and "tools" not in body


def test_a_server_s_calls_are_run_here():
    function = {"name": "calculator", "arguments": ""}
    parts = [{"tool_calls": [{"index": 0, "id": "a", "function": function}]},
             {"tool_calls": [{"index": 0, "function": {"arguments": '{"expression": '}}]},
             {"tool_calls": [{"index": 0, "function": {"arguments": '"1+2"}'}}]}]
    with stub_server(parts, ["3"]) as server:
        answer = remote(server, Settings(describe_tools=True))
    assert [message["role"] for message in answer.messages] == ["assistant", "tool", "assistant"]
    assert answer.messages[0]["tool_calls"] == [CALL] and answer.messages[1]["content"] == "3"
    (_, _, first), (_, _, second) = server.asked
    assert first["tools"] == tools.SCHEMAS
    told, result = second["messages"][-2:]
    assert json.loads(told["tool_calls"][0]["function"]["arguments"]) == CALL["arguments"]
    assert result == {"role": "tool", "content": "3", "tool_call_id": told["tool_calls"][0]["id"]}


def test_a_call_that_a_server_hands_on_as_text_is_run_too():
    with stub_server([f"<tool_call>{json.dumps(CALL)}</tool_call>"], ["3"]) as server:
        answer = remote(server)
    assert answer.messages[0]["tool_calls"] == [CALL] and answer.messages[1] == {"role": "tool", "content": "3"}
    assert server.asked[1][2]["messages"][-2]["tool_calls"][0]["function"]["name"] == "calculator"


def test_stop_closes_the_connection():
    with stub_server((["x"] * 1000, 0.01)) as server:
        answer = Answer(answers.write_remote(server.url, "", "first", ask("hi"), Settings()), 1)
        while answer.tokens < 3 and answer.running:
            time.sleep(0.001)
        answer.stop()
        finished(answer)
        time.sleep(0.1)                                                    # the server notices at its next words
        sent = server.sent
        time.sleep(0.1)
        assert server.sent == sent < 900
    assert answer.reason == "cancelled" and set(answer.messages[0]["content"]) == {"x"}


@pytest.mark.parametrize("said, words", [
    ((404, {"error": {"message": "no model first"}}), "answers 404: no model first"),
    ((500, b"\xff<html>"), "answers 500: \ufffd<html>"),
    ([b"data: {broken\n\n"], "not JSON"), ([b"data: [1]\n\n"], "reports an error"),
    ([b'data: {"error": {"message": "out of memory"}}\n\n'], "the server reports an error: out of memory")])
def test_a_server_s_errors_are_words(said, words):
    with stub_server(said) as server:
        answer = remote(server)
    assert answer.reason == "error" and words in answer.problem


def test_addresses_that_are_none(tmp_path):
    (tmp_path / "models").write_text('{"data": []}')
    for url, words in [(tmp_path.as_uri(), "must begin with http"), ("nonsense", "must begin with http"),
                       ("http://127.0.0.1:1/v1", "is the server running"), ("http://[", "is the server running")]:
        with pytest.raises(UserError, match=words):
            answers.remote_models(url, "")
    with stub_server([]) as server:
        assert answers.remote_models(server.url + "/", "") == ["first", "second"]


def test_bodies_say_only_what_was_set():
    body = request_body("m", ask("x"), Settings(min_p=0.1, presence_penalty=-1), 3)
    assert body["min_p"] == 0.1 and body["presence_penalty"] == -1
    assert not {"top_k", "repetition_penalty", "frequency_penalty", "tools", "chat_template_kwargs"} & body.keys()
    assert body["max_tokens"] == 256 and "max_tokens" not in request_body("m", ask("x"), Settings(max_new_tokens=0), 3)
    messages = [{"role": "assistant", "content": "a", "answer": "b", "reasoning_content": "c"}]
    assert in_openai_form(messages) == [{"role": "assistant", "content": "a\nb"}]


# --- models on the disk


def test_what_is_found(runs, tmp_path):
    found, adapters = sources.find((str(runs),))
    assert [pathlib.Path(path).name for path in found] == ["mixture", "one", "two"]
    assert [pathlib.Path(path).name for path in adapters] == ["lora"]
    for name, text in (("reward", '{"architectures": ["Qwen3ForSequenceClassification"]}'), ("broken", "{")):
        folder = tmp_path / name / "inner"
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "tokenizer.json"):
            (folder / file).touch()
        (folder / "config.json").write_text(text)
    assert sources.find((str(tmp_path),)) == ([], [])
    assert sources.find((str(tmp_path / "none"),)) == ([], [])


def test_a_model_is_loaded_once_and_anew_when_it_has_changed(runs):
    first = load(runs, "two")
    assert load(runs, "two") is first
    os.utime(runs / "two" / "model.safetensors", (1, 1))
    assert load(runs, "two") is not first
    with pytest.raises(UserError, match="there is no folder"):
        load(runs, "nowhere")


# --- the pages


@pytest.fixture
def app(runs, monkeypatch):
    def start(*arguments):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["web_demo.py", "--model", str(runs / "one"), "--runs", str(runs),
                                          "--device", "cpu", "--dtype", "float32", *arguments])
        test = AppTest.from_file(str(ROOT / "scripts" / "web_demo.py"), default_timeout=120)
        test.session_state["max_new_tokens"], test.session_state["seed"] = 12, 4
        return run(test)
    return start


def run(test):
    test.run()
    assert not test.exception, test.exception[0].value
    return test


def captions(test):
    return [caption.value for caption in test.caption]


def said(test):
    return [exchange.answers[0].messages for exchange in test.session_state["exchanges"]]


def click(test, key):
    test.button(key=key).click()
    return run(test)


def test_a_conversation(app, runs):
    test = app()
    assert test.title[0].value == "Chat" and test.button(key="example_0").label == "Who are you?"
    test.chat_input[0].set_value("Who are you?")
    run(test)
    (first,), = said(test)
    loaded = load(runs)
    ids = TOKENIZER.render(ask("Who are you?"), add_generation_prompt=True)[0]
    params = Settings(max_new_tokens=12).params(4)
    completion, = loaded.engine.call(lambda model: generate(model, [ids], params, TOKENIZER))[0]
    assert first == as_message(completion.text)
    assert re.search(r"^12 tokens · \d+ tokens/s · cut at the limit · seed 4$", captions(test)[-1])
    click(test, "again")
    (second,), = said(test)
    assert second != first and captions(test)[-1].endswith("seed 5")
    test.chat_input[0].set_value("and now?")
    run(test)
    assert len(said(test)) == 2 and said(test)[0] == [second] and len(test.chat_message) == 4
    click(test, "edit")
    test.text_area(key="edited_text").set_value("Who are you?")
    test.button(key="FormSubmitter:editor-Cancel").click()
    run(test)
    assert test.session_state["exchanges"][-1].text == "and now?"
    click(test, "edit")
    test.text_area(key="edited_text").set_value("Who am I?")
    test.button(key="FormSubmitter:editor-Send").click()
    run(test)
    assert [exchange.text for exchange in test.session_state["exchanges"]] == ["Who are you?", "Who am I?"]
    test.button[[button.label for button in test.button].index("New conversation")].click()
    run(test)
    assert not test.chat_message


def test_an_answer_that_ends_while_the_page_is_drawn_is_shown(app, monkeypatch):
    draw = chat.draw_exchange

    def slowly(exchange):
        places = draw(exchange)
        for answer in exchange.answers:
            answer.thread.join(60)
        return places

    monkeypatch.setattr(chat, "draw_exchange", slowly)
    test = app()
    test.chat_input[0].set_value("hi")
    run(test)
    assert captions(test)[-1].endswith("cut at the limit · seed 4")
    assert test.button(key="again") and not test.chat_input[0].disabled


def test_two_models_side_by_side(app, runs):
    test = app()
    test.toggle(key="compare").set_value(True)
    run(test)
    test.selectbox(key="model_2").set_value(str(runs / "two"))
    test.chat_input[0].set_value("hi")
    run(test)
    exchange, = test.session_state["exchanges"]
    assert exchange.names == [str(runs / "one"), str(runs / "two")]
    assert len(exchange.answers) == 2 and {answer.seed for answer in exchange.answers} == {4}
    assert exchange.answers[0].messages != exchange.answers[1].messages
    lines = chat.export([exchange], Settings(system="Short.", top_k=3)).splitlines()
    for line, answer, name in zip(map(json.loads, lines), exchange.answers, ("one", "two"), strict=True):
        assert line["messages"] == [{"role": "system", "content": "Short."}, *ask("hi"), *answer.messages]
        assert line["model"] == str(runs / name) and line["settings"]["top_k"] == 3
    test.selectbox(key="model_2").set_value(str(runs / "one"))
    click(test, "again")
    exchange, = test.session_state["exchanges"]
    assert exchange.answers[0].messages == exchange.answers[1].messages   # same model, same seed
    click(test, "better_1")
    kept, = jsonl.records(runs / "comparisons.jsonl", kind="preference")
    assert kept["chosen"] == ask("hi") + exchange.answers[1].messages


def test_knobs_reach_the_model(app):
    test = app()
    for name, value in (("temperature", 0.0), ("top_k", 7), ("frequency_penalty", 0.5)):
        test.slider(key=name).set_value(value)
    test.text_area(key="system").set_value(" Be brief. ")
    test.chat_input[0].set_value("hi")
    run(test)
    first = said(test)
    click(test, "again")                                                   # greedily: the seed does not matter
    assert said(test) == first
    test.number_input(key="seed").set_value(2 ** 31 - 1)
    test.slider(key="temperature").set_value(2.0)
    click(test, "again")
    assert said(test) != first


def test_ratings_become_records(runs):
    def page(runs):
        import pathlib

        import streamlit as st

        from scripts.web import chat
        st.session_state["thumb"] = st.session_state.get("value", None)
        chat.rate(pathlib.Path(runs) / "ratings.jsonl", [{"role": "user", "content": "a"},
                                                         {"role": "assistant", "content": "b"}], "thumb")

    for value in (1, 0, None):
        test = AppTest.from_function(page, kwargs={"runs": str(runs)})
        test.session_state["value"] = value
        run(test)
    kept = list(jsonl.records(runs / "ratings.jsonl", kind="unpaired"))
    assert [record["label"] for record in kept] == [True, False]


def test_the_model_that_comes_along_is_chosen_where_none_was_trained(app, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "SHIPPED", runs / "two")
    assert app("--model", str(tmp_path / "none")).selectbox(key="model").value == str(runs / "two")
    assert app().selectbox(key="model").value == str(runs / "one")


@pytest.fixture
def nothing_shipped(monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(sources, "ROOT", tmp_path)


def test_without_a_model_the_page_says_what_to_do(app, nothing_shipped, tmp_path):
    test = app("--model", str(tmp_path / "none"), "--runs", str(tmp_path))
    assert any("No checkpoint chosen" in text.value for text in test.text) and test.chat_input[0].disabled
    test.selectbox(key="model").set_value(chat.OTHER)
    run(test)
    test.text_input(key="model_typed").set_value(str(tmp_path / "nowhere"))
    run(test)
    test.chat_input[0].set_value("hi")
    run(test)
    assert any("there is no folder" in text.value for text in test.text)


def test_chinese(app):
    test = app()
    test.sidebar.segmented_control(key="language").set_value("中文")
    run(test)
    assert test.title[0].value == "对话" and test.button(key="example_0").label == "Who are you?"


def test_a_server_that_is_away_and_one_that_is_there(app):
    test = app("--url", "http://127.0.0.1:1/v1")
    assert any("is the server running" in text.value for text in test.text) and test.chat_input[0].disabled
    with stub_server([HOSTILE]) as server:
        test.text_input(key="url").set_value(server.url)
        run(test)
        test.chat_input[0].set_value("hi")
        run(test)
    assert "max_tokens" not in server.asked[-1][2]     # the server knows better than we how long an answer can be
    shown = "\n".join(text.value for text in test.text) + "\n".join(code.value for code in test.code)
    for line in plain(HOSTILE).replace("```html\n", "").split("\n"):
        assert line in shown
    assert not any("evil" in markdown.value for markdown in test.markdown)


def inspect_page(model, runs):
    from scripts.web import inside
    from scripts.web_demo import Config
    inside.page(Config(model=model, runs=runs, device="cpu"))


@pytest.mark.parametrize("name, words", [("one", "This model is dense"), ("mixture", None)])
def test_the_inspect_page(runs, name, words):
    where = {"model": str(runs / name), "runs": str(runs)}
    test = run(AppTest.from_function(inspect_page, kwargs=where, default_timeout=60))
    assert [header.value for header in test.subheader] == ["What comes next", "How sure, how surprised", "Logit lens",
                                                           "Attention", "Experts"]
    assert len(test.get("arrow_vega_lite_chart") or test.get("vega_lite_chart")) == (4 if words else 5)
    assert words is None or any(words in caption for caption in captions(test))
    test.text_area(key="inspected").set_value("a <script> " * 60)
    run(test)
    assert any("The first 64 of" in caption for caption in captions(test))
    test.text_area(key="inspected").set_value("")
    run(test)
    test.toggle(key="inspect_chat").set_value(True)
    run(test)


def test_the_inspect_page_without_a_model(nothing_shipped, tmp_path):
    test = run(AppTest.from_function(inspect_page, kwargs={"model": "nowhere", "runs": str(tmp_path)}))
    assert any("No checkpoint chosen" in text.value for text in test.text)


# --- training


def write_run(folder, rows, done=False):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    if done:
        (folder / "summary.json").write_text("{}")


def test_curves():
    rows = [{"step": step, "tokens": 10 * step, "loss": float(step % 2), "note": "x"} for step in range(1, 6)]
    assert training.curve(rows, "loss", "tokens", 0.0) == [(10.0 * s, s % 2, s % 2) for s in range(1, 6)]
    smooth = [y for _, _, y in training.curve(rows, "loss", "step", 0.5)]
    assert smooth == pytest.approx([1, 1 / 3, 5 / 7, 1 / 3, 21 / 31])
    assert training.curve(rows, "note", "step", 0) == training.curve([], "loss", "step", 0) == []
    odd = [{"step": 1, "loss": float("nan")}, {"step": True, "loss": 1}, {"loss": 2}, {"step": 2, "loss": True}]
    assert training.curve(odd, "loss", "step", 0) == []
    long = training.curve([{"step": step, "loss": 0.0} for step in range(10_001)], "loss", "step", 0)
    assert len(long) <= training.MOST_POINTS + 1 and long[-1][0] == 10_000 and long[0][0] == 0


def test_names_of_runs_without_what_they_share():
    for names, short in [("a b", "a b"), ("x/a x/b", "a b"), ("x/a", "a"), ("x/y/a x/z/a", "y/a z/a"),
                         ("x/a y/a", "x/a y/a"), ("x/ab x/abc", "ab abc"), ("a a/b", "a a/b")]:
        assert " ".join(training.shortened(names.split())) == short


def test_the_training_page(tmp_path):
    def page(runs):
        from scripts.web import training
        from scripts.web_demo import Config
        training.page(Config(runs=runs))

    test = AppTest.from_function(page, kwargs={"runs": str(tmp_path)}, default_timeout=60)
    run(test)
    assert "No run has written" in test.info[0].value
    write_run(tmp_path / "b" / "deep", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "val_loss": 2.5}], done=True)
    write_run(tmp_path / "a", [{"step": 5, "loss": 1.0, "odd": "text"}])
    write_run(tmp_path / "c" / "resume", [{"step": 5}])
    run(test)
    assert sorted(test.multiselect(key="runs").options) == ["a", "b/deep"]
    assert test.selectbox(key="metric").options == ["loss", "val_loss"]
    table = test.dataframe[0].value.set_index("run")
    assert list(table.loc["b/deep", ["steps", "last", "lowest", "state"]]) == [2, 2.0, 2.0, "finished"]
    assert list(table.loc["a", ["steps", "last", "state"]]) == [5, 1.0, "not finished"]
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:              # the run goes on
        file.write('ss": 1}\n{"step": 6, "loss": 0.5}\n')
    run(test)
    assert list(test.dataframe[0].value.set_index("run").loc["a", ["steps", "last"]]) == [6, 0.5]
    test.toggle(key="log_scale").set_value(True)
    test.slider(key="smoothing").set_value(0.5)
    run(test)
    test.multiselect(key="runs").set_value([])
    run(test)
    assert "Choose at least one run" in test.info[0].value


# --- words and the command line


def test_every_label_is_used_and_every_word_has_a_label():
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / "web").glob("*.py")
            if path.name != "labels.py"]
    code.append((ROOT / "scripts" / "web_demo.py").read_text(encoding="utf-8"))
    strings = {node.value for text in code for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)} | set(chat.SLIDERS)
    called = set(re.findall(r'say\("(\w+)"', "\n".join(code)))
    assert called <= LABELS.keys()
    made = {"model_2", "adapter_2"} | {f"{name}_help" for name in chat.SLIDERS}
    made |= {f"reason_{name}" for name in (*chat.REASONS, "running", "other")}
    assert made <= LABELS.keys()
    labels = (ROOT / "scripts" / "web" / "labels.py").read_text(encoding="utf-8")
    for name, words in LABELS.items():
        assert name in called | made or name in strings, name
        assert len(words) == 2 and all(words) and labels.count(f'    "{name}": (') == 1
        assert sorted(re.findall(r"{\w+", words[0])) == sorted(re.findall(r"{\w+", words[1])), name


def test_started_in_another_way_it_says_how():
    command = [sys.executable, str(ROOT / "scripts" / "web_demo.py")]
    for arguments, code, words in (([], 1, "error: start it with: streamlit run"), (["--help"], 0, "--adapter"),
                                   (["--modell", "x"], 2, "--model")):
        done = subprocess.run(command + arguments, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == code and words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
