"""scripts/serve_openai_api.py, asked by OpenAI's own client; scripts/chat_openai_api.py, asking it."""

import base64
import contextlib
import http.client
import io
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from openai import OpenAI

from model.adapters.adapted import switch
from model.adapters.folder import AdapterConfig, attach, save_adapter
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts import chat_openai_api, openai_app, serve_openai_api
from scripts.openai_format import Reader, collect
from scripts.serve_openai_api import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.load("nano")
SPECIAL = TOKENIZER.special
HELLO = [{"role": "user", "content": "Who are you?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models, "first" and "second", and an adapter for the second."""
    root = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = ModelConfig(TOKENIZER.vocab_size, 32, 64, 1, 2, 1, max_position_embeddings=1024,
                             initializer_range=0.3)
        save_model(root / name, CausalLM(config), TOKENIZER)
    model, _ = load_model(root / "second")
    attach(model, AdapterConfig("lora", rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(root / "lora", model, base=str(root / "second"))
    return root


@contextlib.contextmanager
def running(cfg):
    """A server in this process: (its address, {name: Served}, its Gate)."""
    sock, served = serve_openai_api.listen(cfg), serve_openai_api.load(cfg)
    app, gate = openai_app.build_app(served, cfg)
    server = serve_openai_api.make_server(app, gate, cfg)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", served, gate
    finally:
        for entry in served.values():
            entry.engine.close(drain=False)
        server.handle_exit(signal.SIGTERM, None)
        thread.join()


@pytest.fixture(scope="module")
def server(folders):
    with running(Config(model=f"{folders / 'first'},{folders / 'second'}", adapter=str(folders / "lora"), port=0,
                        device="cpu", dtype="float32", concurrency=8)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server[0] + "/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    def chat(messages=HELLO, **options):
        return client.chat.completions.create(**{"model": "first", "messages": messages, "max_tokens": 12} | options)
    return chat


def expected(served, params, prompt=None, **options):
    """What generate() answers."""
    if prompt is None:
        prompt, _ = TOKENIZER.render(HELLO, add_generation_prompt=True)
    return generate(served.engine.model, [prompt], params, TOKENIZER, **options)[0]


def post(address, body, path="/v1/chat/completions", headers=(), method="POST"):
    """(status, parsed JSON or text, headers) of a request with any bytes as its body."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
    response = connection.getresponse()
    data, told = response.read(), dict(response.getheaders())
    connection.close()
    return response.status, json.loads(data) if "json" in told.get("content-type", "") else data.decode(), told


# --- chat


def test_a_chat_answer(chat, server):
    answer = chat(temperature=0)
    completion, = expected(server[1]["first"], SamplingParams(12, 0.0))
    assert answer.choices[0].message.content.strip() == completion.text.strip()
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", "first", "assistant")
    assert answer.choices[0].finish_reason == completion.finish_reason == "length"
    usage = answer.usage
    assert (usage.completion_tokens, usage.total_tokens - usage.prompt_tokens) == (12, 12)
    assert usage.prompt_tokens == len(TOKENIZER.render(HELLO, add_generation_prompt=True)[0])
    assert answer.id.startswith("chatcmpl-") and answer.id != chat(temperature=0).id


def test_a_streamed_answer_is_the_same(chat):
    options = dict(temperature=0.9, seed=7, n=2, max_tokens=20)
    whole = chat(**options)
    *chunks, last = chat(**options, stream=True, stream_options={"include_usage": True})
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert parts[0].delta.role == "assistant" and all(part.delta.role is None for part in parts[1:])
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.usage is None and chunk.choices for chunk in chat(stream=True))


def test_the_stream_ends_with_done(server):
    body = {"model": "first", "messages": HELLO, "max_tokens": 3, "stream": True}
    status, text, headers = post(server[0], json.dumps(body))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.endswith("data: [DONE]\n\n") and text.count("[DONE]") == 1


@pytest.mark.parametrize("params, options", [
    (SamplingParams(12, 0.0, presence_penalty=1.5, frequency_penalty=0.5),
     {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5}),
    (SamplingParams(12, 1.3, 5, 0.8, 0.01, 1.2, 3),
     {"temperature": 1.3, "top_p": 0.8, "seed": 3,
      "extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}}),
    (SamplingParams(12, 1.0, seed=2**64 - 5, logit_bias={300: 8.0, 301: 7.5}),
     {"seed": -5, "logit_bias": {"300": 8, "301": 7.5}, "max_tokens": None, "max_completion_tokens": 12})])
def test_every_knob_reaches_the_sampler(chat, server, params, options):
    answers = chat(n=2, **options).choices
    wanted = expected(server[1]["first"], params, num_samples=2)
    assert [choice.message.content.strip() for choice in answers] == [c.text.strip() for c in wanted]


def test_stop_strings_end_the_answer_before_them(chat):
    free = chat(temperature=0, max_tokens=40).choices[0].message.content
    stop = free[8:12]
    for given in (stop, ["never ever", stop]):
        choice = chat(temperature=0, max_tokens=40, stop=given).choices[0]
        assert choice.message.content == free[:free.index(stop)] and choice.finish_reason == "stop"
        parts = [chunk.choices[0] for chunk in chat(temperature=0, max_tokens=40, stop=given, stream=True)]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == "stop"


def test_the_end_of_the_turn_is_a_stop(chat):
    choice = chat(logit_bias={str(TOKENIZER.end_of_turn_id): 100}).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "")


def test_logprobs_of_a_chat(chat, server):
    answer = chat(temperature=0, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    completion, = expected(server[1]["first"], SamplingParams(12, 0.0))
    assert [token.logprob for token in told] == pytest.approx(completion.logprobs, abs=1e-4)
    assert b"".join(bytes(token.bytes) for token in told).decode(errors="replace") == completion.text
    for token in told:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
    streamed = [token for chunk in chat(temperature=0, logprobs=True, top_logprobs=3, stream=True)
                for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content]
    assert streamed == told
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat().choices[0].logprobs is None


def test_cached_tokens_are_told(chat):
    long = [{"role": "system", "content": "You know what Mia likes to eat. " * 5}, *HELLO]
    chat(long)
    usage = chat(long).usage
    assert 16 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_names_of_models_and_adapters(client, server, chat):
    assert [model.id for model in client.models.list()] == ["first", "second", "lora"]
    assert client.models.retrieve("lora").parent == "second"
    address, served, _ = server
    texts = {name: chat(model=name, temperature=0).choices[0].message.content for name in served}
    assert len(set(texts.values())) == 3
    model, tokenizer = served["second"].engine.model, served["second"].tokenizer
    assert served["lora"].engine is served["second"].engine
    with pytest.MonkeyPatch.context():
        served["second"].engine.call(lambda model: switch(model, "lora"))
        wanted = generate(model, [tokenizer.render(HELLO, add_generation_prompt=True)[0]], SamplingParams(12, 0.0),
                          tokenizer)[0][0].text
    assert texts["lora"] == wanted.strip()


def test_content_parts_roles_and_harmless_fields(chat):
    parts = [{"role": "developer", "content": "Be kind."},
             {"role": "user", "content": [{"type": "text", "text": "Who are"}, {"type": "text", "text": " you?"}],
              "name": "Ana"}]
    plain = [{"role": "system", "content": "Be kind."}, *HELLO]
    answer = chat(parts, temperature=0, user="u", store=False, metadata={"a": "b"}, service_tier="auto",
                  parallel_tool_calls=True, extra_body={"no_such_field": 1})
    assert answer.choices[0].message.content == chat(plain, temperature=0).choices[0].message.content


# --- structure


def test_thoughts_are_apart(chat):
    end = {str(SPECIAL["</think>"]): 6}
    for switch_on in ({"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}},
                      {"reasoning_effort": "high"}):
        options = dict(temperature=1, seed=5, max_tokens=60, logit_bias=end, extra_body=switch_on)
        answer = chat(**options)
        message = answer.choices[0].message
        assert message.reasoning_content and message.content and "think>" not in message.reasoning_content
        assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < 60
        parts = [chunk.choices[0].delta for chunk in chat(**options, stream=True)]
        for key in ("reasoning_content", "content"):
            assert "".join(getattr(part, key, None) or "" for part in parts) == getattr(message, key)
    message = chat(extra_body={"enable_thinking": False}).choices[0].message
    assert not hasattr(message, "reasoning_content")


def test_json_mode_writes_json(chat):
    for seed in range(6):
        choice = chat(max_tokens=(20, 60)[seed % 2], temperature=2, seed=seed,
                      response_format={"type": "json_object"}).choices[0]
        assert isinstance(json.loads(choice.message.content), dict) and choice.finish_reason == "stop"


def test_json_of_a_schema(chat):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed, thinking in ((0, False), (1, True), (2, True)):
        options = dict(max_tokens=60, temperature=1.5, seed=seed, response_format=form,
                       extra_body={"enable_thinking": thinking})
        content = chat(**options).choices[0].message.content
        value = json.loads(content)
        assert list(value) == ["name", "age"] and type(value["name"]) is str and type(value["age"]) is int
        assert "".join(c.choices[0].delta.content or "" for c in chat(**options, stream=True)) == content


def test_a_tool_must_be_called(chat):
    for choice, names in (("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "weather"}},
                                                               {"weather"})):
        for seed in range(4):
            options = dict(tools=[WEATHER, CLOCK], tool_choice=choice, temperature=1.5, seed=seed, max_tokens=80)
            answer = chat(**options).choices[0]
            call, = answer.message.tool_calls
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            assert call.function.name in names and call.id.startswith("call_") and call.type == "function"
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "clock" or arguments["city"] in ("Rome", "Oslo")
            deltas = [delta for chunk in chat(**options, stream=True) for c in chunk.choices
                      for delta in c.delta.tool_calls or []]
            assert deltas[0].function.name == call.function.name and deltas[0].id
            assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    # and the conversation goes on with what the tool said
    told = [*HELLO, answer.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert chat(told, tools=[WEATHER, CLOCK]).usage.prompt_tokens > 100


def test_a_tool_may_be_called(chat):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    wants = {str(SPECIAL["<tool_call>"]): 9, str(TOKENIZER.end_of_turn_id): 6}
    answers = [chat(tools=[strict], logit_bias=wants, seed=seed, max_tokens=100).choices[0] for seed in range(4)]
    called = [answer for answer in answers if answer.message.tool_calls]
    assert called
    for answer in called:
        for call in answer.message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    answer = chat(tools=[strict], tool_choice="none", logit_bias=wants, max_tokens=30)
    assert answer.choices[0].message.tool_calls is None


def call_ids(text):
    return [SPECIAL["<tool_call>"], *TOKENIZER.encode(text), SPECIAL["</tool_call>"]]


def read(ids, **options):
    reader = Reader(TOKENIZER, TOKENIZER.stop_ids, **{"tools": True} | options)
    return collect([delta for index in ids for delta in reader.push([index])] + reader.finish())


@pytest.mark.parametrize("text", [
    "rm -rf", '{"name": 3, "arguments": {}}', '{"name": "a", "arguments": []}', '{"name": "a"}', '["a"]', "",
    '{"name": "a", "arguments": {"x": NaN}}', '{"name": "\\ud83d", "arguments": {}}', "[" * 2000])
def test_what_is_no_call_is_text(text):
    message = read([*TOKENIZER.encode("so: "), *call_ids(text), TOKENIZER.end_of_turn_id])
    assert "tool_calls" not in message and message["content"] == f"so: <tool_call>{text}</tool_call>"


def test_only_tokens_are_structure():
    spelled = '<think>no</think><tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert read(TOKENIZER.encode(spelled)) == {"role": "assistant", "content": spelled}
    call = '{"name": "a", "arguments": {"html": "</tool_call><script>"}}'
    message = read([*TOKENIZER.encode("well\n"), *call_ids(call), *TOKENIZER.encode("\n"), *call_ids(call)])
    assert message["content"] == "well" and [c["function"]["name"] for c in message["tool_calls"]] == ["a", "a"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"html": "</tool_call><script>"}
    assert message["tool_calls"][0]["id"] != message["tool_calls"][1]["id"]
    assert "tool_calls" not in read(call_ids(call), tools=False)           # no tools were offered
    unfinished = read(call_ids(call)[:-1])
    assert unfinished == {"role": "assistant", "content": "<tool_call>" + call}
    thought = read([*TOKENIZER.encode("hm\n"), *call_ids(call), SPECIAL["</think>"], *TOKENIZER.encode("\n\nyes ")],
                   thinking=True)
    assert "tool_calls" not in thought and thought["content"] == "yes "
    assert thought["reasoning_content"] == f"hm\n<tool_call>{call}</tool_call>"


# --- text completions and embeddings


def test_text_completions(client, server):
    answer = client.completions.create(model="first", prompt=["One day", "Mia"], n=2, seed=1,
                                       logprobs=2, max_tokens=6, user="u")
    prompts = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in ("One day", "Mia")]
    wanted = [c for prompt in prompts for c in expected(server[1]["first"], SamplingParams(6, seed=1), prompt,
                                                        num_samples=2)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == [completion.text for completion in wanted]
    assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.usage.completion_tokens == 24
    told = answer.choices[3].logprobs
    assert told.token_logprobs == pytest.approx(wanted[3].logprobs, abs=1e-4)
    assert told.text_offset[0] == 0 and told.text_offset[-1] == sum(map(len, told.tokens[:-1]))
    assert all(len(top) == 2 for top in told.top_logprobs)
    ids = client.completions.create(model="first", prompt=prompts, n=2, seed=1, max_tokens=6)
    assert [choice.text for choice in ids.choices] == [completion.text for completion in wanted]
    assert client.completions.create(model="first", prompt="One day").usage.completion_tokens == 16


def test_streamed_text_completions_and_echo(client):
    options = dict(model="first", prompt="One day", echo=True, temperature=0, max_tokens=9)
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    assert whole.choices[0].text.startswith("One day") and len(whole.choices[0].text) > 7
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[0].object == "text_completion"


def test_embeddings(client, server):
    texts = ["Mia", "The fox lives in the forest.", "你好 🌰", "Mia"]
    answer = client.embeddings.create(model="first", input=texts)          # as base64: the client's default
    plain = client.embeddings.create(model="first", input=texts, encoding_format="float")
    model = server[1]["first"].engine.model
    for entry, same, text in zip(answer.data, plain.data, texts, strict=True):
        assert entry.embedding == pytest.approx(same.embedding, abs=1e-6)
        ids = torch.tensor([[TOKENIZER.bos_id, *TOKENIZER.encode(text)]])
        with torch.no_grad():
            hidden = model(ids, head=lambda hidden, lm_head: hidden).logits[0].mean(0)
        assert entry.embedding == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)
    assert math.hypot(*answer.data[1].embedding) == pytest.approx(1, abs=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(1 + len(TOKENIZER.encode(text)) for text in texts)
    other = client.embeddings.create(model="lora", input=TOKENIZER.encode("Mia"))
    assert other.data[0].embedding != answer.data[0].embedding
    raw = post(server[0], json.dumps({"model": "first", "input": "Mia", "encoding_format": "base64"}), "/v1/embeddings")
    assert len(base64.b64decode(raw[1]["data"][0]["embedding"])) == 4 * 32


# --- what is refused


@pytest.mark.parametrize("change, words", [
    ({"model": "nobody"}, "'nobody' does not exist; there are first, second, lora"), ({"model": None}, "model: "),
    ({"messages": []}, "messages: "), ({"messages": "hi"}, "messages: "), ({"messages": None}, "messages: "),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user"}]}, "messages.0: a message with role user needs content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: "),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "'text'"),
    ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "surrogate"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}, "JSON text"),
    ({"max_tokens": 10_000}, "at most 4096"), ({"max_tokens": 4000}, "maximum context length is 1024"),
    ({"max_tokens": 0}, "max_tokens: "), ({"max_tokens": "5"}, "max_tokens: "), ({"max_tokens": 1.5}, "max_tokens: "),
    ({"messages": [{"role": "user", "content": "long " * 200_000}]}, "maximum context length is 1024"),
    ({"temperature": -1}, "temperature: "), ({"temperature": True}, "temperature: "), ({"temperature": 3}, "less than"),
    ({"top_p": 1.5}, "top_p: "), ({"n": 0}, "n: "), ({"n": 9}, "n asks for 9 answers"), ({"n": True}, "n: "),
    ({"seed": 2**70}, "seed: "), ({"stop": ""}, "stop: "), ({"stop": [1]}, "stop.0: "),
    ({"stop": ["a"] * 40}, "stop: "),
    ({"logit_bias": {"x": 1}}, "no token id"), ({"logit_bias": {"99999": 1}}, "outside 0"),
    ({"logit_bias": {"1": 101}}, "logit_bias"), ({"stream_options": {"include_usage": True}}, "only together"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"), ({"logprobs": True, "top_logprobs": 99}, "top_logprobs: "),
    ({"response_format": {"type": "yaml"}}, "response_format.type: "), ({"response_format": {"type": "json_schema"}},
                                                                        "needs json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "a"}}}},
     "schema: "),
    ({"response_format": {"type": "json_object"}, "max_tokens": 1}, "raise max_tokens"),
    ({"tool_choice": "required"}, "needs tools"), ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among the tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: "),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"allOf": []}}}]},
     "'allOf' is not supported"),
    ({"functions": [{"name": "f"}]}, "functions is not supported"), ({"audio": {}}, "audio is not supported"),
    ({"modalities": ["audio"]}, "modalities is not supported"),
    ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other: ")])
def test_chat_requests_that_are_refused(server, change, words):
    body = {"model": "first", "messages": HELLO, "max_tokens": 4} | change
    status, answer, _ = post(server[0], json.dumps(body))
    assert (status, list(answer)) == (404 if change == {"model": "nobody"} else 400, ["error"])
    assert words in answer["error"]["message"] and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and len(answer["error"]["message"]) < 600
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000,
                                  b'{"model": ' + b"9" * 5000 + b"}", b'{"a":' * 50_000])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_bodies_that_are_no_request(server, body, path):
    status, answer, _ = post(server[0], body, "/v1/" + path)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path, body, words", [
    ("completions", {"prompt": ""}, None), ("completions", {"prompt": []}, "prompt: "),
    ("completions", {"prompt": [[]]}, "prompt.0: "), ("completions", {"prompt": [-1]}, "prompt.0: "),
    ("completions", {"prompt": [10**9]}, "outside 0"), ("completions", {"prompt": {"a": 1}}, "prompt: "),
    ("completions", {"prompt": "a", "best_of": 3}, "best_of is not"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix is not"),
    ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo together with logprobs"),
    ("completions", {"prompt": ["a"] * 9}, "9 answers in all"), ("completions", {}, "prompt: Field required"),
    ("embeddings", {"input": ""}, "input 0 is empty"), ("embeddings", {"input": ["a", ""]}, "input 1 is empty"),
    ("embeddings", {"input": "long " * 2000}, "maximum context length"),
    ("embeddings", {"input": [10**30]}, "vocabulary"), ("embeddings", {"input": ["a"] * 3000}, "at most 2048"),
    ("embeddings", {"input": "a", "dimensions": 8}, "dimensions is not"),
    ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format: ")])
def test_other_requests_that_are_refused(server, path, body, words):
    status, answer, _ = post(server[0], json.dumps({"model": "first", **body}), "/v1/" + path)
    assert status == (200 if words is None else 400) and (words is None or words in answer["error"]["message"])


def test_paths_methods_and_types(server):
    address = server[0]
    assert post(address, None, "/v1/nothing", method="GET")[0] == 404
    assert post(address, None, "/v1/models/no/body", method="GET")[1]["error"]["code"] == "model_not_found"
    assert post(address, None, method="GET")[:2] == (405, {"error": {
        "message": "GET is not for this path", "type": "invalid_request_error", "param": None, "code": None}})
    status, answer, _ = post(address, "model=first", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert status == 415 and "application/json" in answer["error"]["message"]
    assert post(address, None, "/docs", method="GET")[0] == 404            # that page loads scripts from elsewhere
    assert "/v1/chat/completions" in post(address, None, "/openapi.json", method="GET")[1]["paths"]


def test_the_client_raises_its_own_errors(client, chat):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat(model="gpt-4")
    with pytest.raises(openai.BadRequestError) as error:
        chat(max_tokens=4000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"


def test_a_defect_tells_nothing_of_itself(server, chat, monkeypatch, capsys):
    def fails(request):
        raise RuntimeError("secret /path")

    monkeypatch.setattr(server[1]["first"].engine, "submit", fails)
    status, answer, _ = post(server[0], json.dumps({"model": "first", "messages": HELLO}))
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in json.dumps(answer)
    monkeypatch.undo()

    class Broken:                                                          # what fails behind the first byte
        def allowed(self, ids):
            raise RuntimeError("secret /path")

    monkeypatch.setattr(openai_app, "Constraint", lambda machine, budget: Broken())
    with pytest.raises(openai.APIError, match="made a mistake") as error:
        list(chat(response_format={"type": "json_object"}, stream=True))
    assert "secret" not in str(error.value)
    monkeypatch.undo()
    assert chat(temperature=0).choices                                     # others are not harmed


# --- many at once, and the end


def test_eight_at_once_are_as_one_after_the_other(client, chat):
    questions = [[{"role": "user", "content": "Who " + "is it? " * i}] for i in range(8)]
    alone = [chat(question, temperature=0, max_tokens=30).choices[0].message.content for question in questions]

    def ask(question):
        return "".join(chunk.choices[0].delta.content or "" for chunk in
                       chat(question, temperature=0, max_tokens=30, stream=True))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, questions)) == alone


def wait_for(condition):
    """True as soon as condition() is; the test's own time limit ends a wait that is in vain."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(server, stream):
    engine = server[1]["first"].engine
    before = engine.stats()
    body = json.dumps({"model": "first", "messages": HELLO, "max_tokens": 900, "stream": stream, "n": 2,
                       "logit_bias": {str(index): -100 for index in TOKENIZER.stop_ids}}).encode()
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert wait_for(lambda: engine.stats()["running"] == 2)
    assert wait_for(lambda: engine.stats()["running"] == 0)
    after = engine.stats()
    assert after["cancelled"] - before["cancelled"] == 2
    assert after["generated_tokens"] - before["generated_tokens"] < 1800   # it did not write to the end


def test_limits_keys_and_cors(folders):
    cfg = Config(model=str(folders / "first"), port=0, device="cpu", dtype="float32", concurrency=1, queue=1,
                 max_tokens=900, max_body_bytes=1000, api_key="secret", cors="https://example.org")
    with running(cfg) as (address, served, gate):
        key = {"Authorization": "Bearer secret"}
        body = {"model": "first", "messages": HELLO, "max_tokens": 2}
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
            status, answer, _ = post(address, json.dumps(body), headers=wrong)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert post(address, None, "/metrics", method="GET")[0] == 401
        assert post(address, json.dumps(body), headers=key)[0] == 200
        assert post(address, None, "/health", method="GET")[:2] == (200, {"status": "ok"})
        for size in (1001, 9000, 11_000):                                  # read and dropped, or refused unread
            status, answer, _ = post(address, b" " * size, headers=key)
            assert (status, answer["error"]["code"]) == (413, "body_too_large")
        chunked = post(address, iter([b" " * 600] * 3), headers=key)
        assert chunked[0] == 413

        origin = post(address, json.dumps(body), headers={**key, "Origin": "https://example.org"})[2]
        assert origin["access-control-allow-origin"] == "https://example.org"
        stranger = post(address, json.dumps(body), headers={**key, "Origin": "https://example.com"})[2]
        assert "access-control-allow-origin" not in stranger
        ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        assert post(address, None, headers=ask, method="OPTIONS")[0] == 200

        with OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0) as client:
            long = body | {"max_tokens": 900, "stream": True,
                           "logit_bias": {str(index): -100 for index in TOKENIZER.stop_ids}}
            streams = [client.chat.completions.create(**long) for _ in range(2)]       # one runs, one waits
            with pytest.raises(openai.RateLimitError) as error:
                client.chat.completions.create(**body)
            assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
            for stream in streams:
                stream.close()
            assert wait_for(lambda: gate.inflight == 0)
            assert client.chat.completions.create(**body).choices


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr(openai_app, "BODY_SECONDS", 0.1)
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 10\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_metrics(server, chat):
    chat()
    text = post(server[0], None, "/metrics", method="GET")[1]
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines())
    assert all(re.fullmatch(r'acorn_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})?', name) for name in figures)
    assert int(figures['acorn_requests_total{path="/v1/chat/completions",status="200"}']) > 0
    assert int(figures['acorn_engine_generated_tokens{model="first"}']) > 0
    assert figures["acorn_inflight_requests"] == "1"                       # this one


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM to another process")
def test_sigterm_lets_answers_finish(folders):
    command = [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py"), "--model", str(folders / "first"),
               "--port", "0", "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        address = re.fullmatch(r"first at (http://127\.0\.0\.1:\d+)/v1 \(Ctrl-C ends it\)\n",
                               process.stdout.readline())[1]
        with OpenAI(base_url=address + "/v1", api_key="-", max_retries=0) as client:
            options = dict(model="first", messages=HELLO, max_tokens=900,
                           logit_bias={str(index): -100 for index in TOKENIZER.stop_ids})
            stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert wait_for(lambda: post(address, None, "/health", method="GET")[0] == 503)
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                client.chat.completions.create(**options)
            assert error.value.status_code == 503
            *_, last = stream
            assert last.usage.completion_tokens == 900
        assert process.wait(60) == 0
        assert process.communicate() == ("", "")
    finally:
        process.kill()
        process.communicate()


# --- starting it


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere"], "--model nowhere: there is no such folder"), (["--max_seq_len", "1"], "--max_tokens N"),
    (["--port", "99999"], "--port 99999"), (["--concurrency", "0"], "--concurrency 0: must be 1 or more"),
    (["--host", "999.1.1.1"], "cannot listen there")])
def test_mistakes_on_the_command_line_are_one_line(arguments, words, capsys, monkeypatch):
    from model.cli import parse_args
    from model.errors import run
    monkeypatch.setattr(sys, "argv", ["serve_openai_api.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        run(serve_openai_api.main, parse_args(Config, hints=serve_openai_api.HINTS))
    told = capsys.readouterr().err
    assert leaving.value.code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1


def test_names_and_folders(folders, server):
    assert serve_openai_api.names_of(["a/x", "b/y/", "c/x"]) == ["a/x", "y", "c/x"]
    with pytest.raises(UserError, match="different folders"):
        serve_openai_api.load(Config(model=f"{folders / 'first'},{folders / 'first'}", device="cpu"))
    with pytest.raises(UserError, match="trained on another base model"):
        serve_openai_api.load(Config(model=str(folders / "first"), adapter=str(folders / "lora"), device="cpu"))
    with pytest.raises(UserError, match="is another server"):
        serve_openai_api.listen(Config(port=int(server[0].rpartition(":")[2])))


# --- the client


def converse(monkeypatch, capsys, lines, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat_openai_api.main(chat_openai_api.Config(**{"max_tokens": 12, "temperature": 0.0} | options))
    return capsys.readouterr().out


def test_the_client_talks(server, chat, monkeypatch, capsys):
    url = server[0] + "/v1"
    wanted = chat(temperature=0, extra_body={"top_p": 0.85}).choices[0].message.content
    shown = converse(monkeypatch, capsys, ["Who are you?", "/models", "/model nobody", "Who are you?"], url=url)
    assert shown.startswith(chat_openai_api.printable(wanted) + "\n[") and "s, length]" in shown
    assert "first\nsecond\nlora\n" in shown and "404 the model 'nobody' does not exist" in shown
    lines = ["/thinking on", "/max_tokens 30", "Who?", "/temperature hot", "/nothing"]
    shown = converse(monkeypatch, capsys, lines, url=url)
    assert "<think>" in shown and "expected a number" in shown and "unknown command /nothing" in shown


def test_the_client_remembers(server, monkeypatch, capsys):
    client, sent = chat_openai_api.Chat(chat_openai_api.Config(url=server[0] + "/v1", max_tokens=3, history=1)), []
    monkeypatch.setattr(client, "open", lambda path, body: sent.append(body["messages"]) or io.BytesIO(
        b'data: {"choices": [{"delta": {"content": "so\x1b[2J"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'))
    for text in ("a", "b", "c"):
        client.answer([{"role": "user", "content": text}])
    assert [[message["content"] for message in messages] for messages in sent] == [
        ["a"], ["a", "so\x1b[2J", "b"], ["b", "so\x1b[2J", "c"]]
    assert "\x1b" not in capsys.readouterr().out                           # shown, never obeyed
    client.command("/reset")
    assert client.exchanges == []


@pytest.mark.parametrize("answer, words", [
    (b'data: {"error": {"message": "out of \x1b luck"}}\n', "the server says: out of \\x1b luck"),
    (b"data: {oops\n", "what is no JSON")])
def test_what_a_server_does_wrong_is_said(answer, words, monkeypatch):
    client = chat_openai_api.Chat(chat_openai_api.Config(url="http://127.0.0.1:1/v1", model="m"))
    with pytest.raises(UserError, match="no answer"):
        client.models()
    monkeypatch.setattr(client, "open", lambda path, body: io.BytesIO(answer))
    with pytest.raises(UserError) as error:
        client.answer(HELLO)
    assert words in str(error.value)
