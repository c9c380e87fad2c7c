"""The web application of scripts/serve_openai_api.py: OpenAI's paths, answered by engines (model/engine.py).

In lecture order:
  1. Served      a name that clients may ask for: a model, or one of its adapters
  2. plan        from a body to what the engine is asked: prompt, sampling, grammar
  3. answers     whole, or as a stream of server-sent events; both end when the client hangs up
  4. embeddings  texts as vectors
  5. Gate        what every request passes first: size, key, room, and the count of those on their way
  6. build_app   the paths

The event loop only moves text: prompts are laid out in threads, and models compute on their engines' threads.
"""

import asyncio
import base64
import hmac
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from model.constrain import Constraint, Rule, Vocabulary, answer_rule, any_object, call_rule, free_then, from_schema
from model.engine import Engine, QueueFull
from model.engine import Request as EngineRequest
from model.errors import UserError
from model.generate import NOT_FINITE, SamplingParams
from scripts import openai_format as openai
from scripts.openai_format import ChatChoice, ChatRequest, CompletionRequest, EmbeddingRequest, Reader, TextChoice

MAX_INPUTS = 2048         # texts of one request for embeddings
EMBED_TOKENS = 1024       # that are read at once for embeddings, between two steps of the running answers
BODY_SECONDS = 60         # for a body to arrive
RETRY = {"Retry-After": "1"}


# --- 1. what is served


@dataclass
class Served:
    """One model name. Those of a checkpoint and of its adapters share an engine, a tokenizer and a vocabulary."""
    name: str
    engine: Engine
    vocabulary: Vocabulary
    adapter: str = ""                                      # the engine's name for it, "" = the model itself
    parent: str | None = None                              # of an adapter: the name of its model
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self):
        return self.engine.tokenizer

    @property
    def context(self):
        return self.engine.model.config.max_position_embeddings

    def listed(self):
        """The model as /v1/models tells of it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "local",
                "parent": self.parent, "max_model_len": self.context}


class ApiError(Exception):
    """What the client is answered: an HTTP status and OpenAI's error object."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.body, self.headers = status, openai.error_body(status, message, param, code), headers


def api_error(error):
    """The ApiError for what an engine raised; other exceptions are defects, and come back as they are."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers=RETRY)
    if isinstance(error, UserError):
        return ApiError(500 if str(error) == NOT_FINITE else 400, str(error))
    return error


# --- 2. from a body to what the engine is asked


@dataclass
class Plan:
    """One prompt, continued by several choices."""
    requests: list                                         # for the engine, one per choice
    choices: list                                          # a ChatChoice or TextChoice for each


def room(served, body, prompt, limit, default=0):
    """Tokens that the answer may have: what was asked for, else `default`, else what limit and context leave."""
    asked, name = body.max_tokens, "max_tokens"
    if getattr(body, "max_completion_tokens", None) is not None:
        asked, name = body.max_completion_tokens, "max_completion_tokens"
    left = served.context - len(prompt)
    if asked is not None and asked > limit:
        raise ApiError(400, f"{name} is {asked}; this server writes at most {limit} tokens for a request", name)
    if left < (asked or 1):
        raise ApiError(400, f"this model's maximum context length is {served.context} tokens; the prompt has "
                       f"{len(prompt)}, and {asked or 1} for the answer were asked for: shorten the prompt or ask for "
                       "less", "messages" if isinstance(body, ChatRequest) else "prompt", "context_length_exceeded")
    return asked or min(default or limit, limit, left)


def sampling(body, budget):
    """The body's settings as SamplingParams."""
    bias = {}
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(400, f"logit_bias: {name[:40]!r} is no token id", "logit_bias")
        bias[int(name)] = value

    def given(value, default):
        return default if value is None else value

    return SamplingParams(
        max_new_tokens=budget, temperature=given(body.temperature, 1.0), top_k=max(given(body.top_k, 0), 0),
        top_p=max(given(body.top_p, 1.0), 1e-9),           # 0 is OpenAI's for the likeliest token only
        min_p=given(body.min_p, 0.0), repetition_penalty=given(body.repetition_penalty, 1.0),
        presence_penalty=given(body.presence_penalty, 0.0), frequency_penalty=given(body.frequency_penalty, 0.0),
        logit_bias=bias, seed=None if body.seed is None else body.seed % 2**64, stop_strings=body.stop_strings)


def opens_thought(tokenizer, ids):
    """Whether a prompt ends inside a thought, which the chat template has opened."""
    begin, end = tokenizer.special.get("<think>"), tokenizer.special.get("</think>")
    return next((index == begin for index in reversed(ids) if index in (begin, end)), False)


def arguments_rule(function):
    """The grammar of a tool's arguments: its schema if that is understood, else any object unless `strict`."""
    if not function.parameters:
        return any_object()
    try:
        if function.parameters.get("type", "object") != "object":
            raise UserError(f"parameters of {function.name}: expected a schema of type object")
        return from_schema({"type": "object", **function.parameters})
    except UserError:
        if function.strict:
            raise
        return any_object()


def grammar(tokenizer, body, thinking):
    """The Rule that a constrained chat answer follows: a call of one of the tools, JSON, or either of them."""
    answers = [call_rule(tool.function.name, arguments_rule(tool.function), tokenizer) for tool in body.usable_tools]
    if body.form == "json_object":
        answers.append(any_object())
    elif body.form == "json_schema":
        answers.append(from_schema(body.response_format.json_schema.schema_))
    elif not body.must_call:                               # text, in which calls keep to the schemas of strict tools
        return answer_rule(free_then(answers, tokenizer), tokenizer)
    return answer_rule(Rule(*((answer,) for answer in answers)), tokenizer, thinking)


def plan_chat(served, body, cfg, user):
    """The Plan of a chat request, in a list. Long prompts and new schemas take time: called in a thread."""
    tokenizer = served.tokenizer
    tools = [tool.plain() for tool in body.usable_tools]
    if tools:
        tokenizer.special_id("<tool_call>")                # a model without it cannot call any
    prompt, _ = tokenizer.render([message.plain() for message in body.messages], tools or None,
                                 add_generation_prompt=True, enable_thinking=body.thinking)
    budget, thinking, machine = room(served, body, prompt, cfg.max_tokens), opens_thought(tokenizer, prompt), None
    params = sampling(body, budget)
    if body.constrained:
        form = body.response_format and body.response_format.model_dump()
        name = json.dumps([form, [tool.model_dump() for tool in body.usable_tools], body.must_call, thinking])
        machine = served.vocabulary.machine(name, lambda: grammar(tokenizer, body, thinking))
    plan = Plan([], [])
    for sample in range(body.n or 1):
        plan.requests.append(EngineRequest(
            prompt, params, (body.top_logprobs or 0) if body.logprobs else -1, served.adapter,
            Constraint(machine, budget) if machine else None, user, sample))
        reader = Reader(tokenizer, tokenizer.stop_ids, params.stop_strings, thinking, bool(tools))
        plan.choices.append(ChatChoice(sample, reader, bool(body.logprobs)))
    return [plan]


def plan_completion(served, body, cfg, user):
    """A Plan for each prompt of a text completion. A text begins as a document does, ids are taken as they are."""
    tokenizer, plans, count = served.tokenizer, [], body.n or 1
    for place, prompt in enumerate(openai.several(body.prompt)):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        budget = room(served, body, ids, cfg.max_tokens, default=16)
        params, plan = sampling(body, budget), Plan([], [])
        echo = (prompt if isinstance(prompt, str) else tokenizer.decode(prompt)) if body.echo else ""
        for sample in range(count):
            plan.requests.append(EngineRequest(ids, params, -1 if body.logprobs is None else body.logprobs,
                                               served.adapter, None, user, sample))
            plan.choices.append(TextChoice(place * count + sample, tokenizer, tokenizer.stop_ids,
                                           body.logprobs is not None, echo))
        plans.append(plan)
    return plans


# --- 3. answers


def submit(engine, plans):
    """The tickets of all requests of the plans, or none of them."""
    tickets = []
    try:
        for plan in plans:
            tickets += map(engine.submit, plan.requests)
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


async def watch(request, tickets):
    """Cancel the tickets when the client hangs up. (The server says the same behind the end of an answer.)"""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for ticket in tickets:
        ticket.cancel()


async def merged(tickets):
    """(place, piece) of several tickets as pieces come, and (place, None) behind the last one of each."""
    arrived = asyncio.Queue()

    async def listen(place, ticket):
        try:
            async for piece in ticket:
                arrived.put_nowait((place, piece))
            arrived.put_nowait((place, None))
        except Exception as error:                         # raised again below, where somebody waits for it
            arrived.put_nowait((place, error))

    tasks = [asyncio.create_task(listen(place, ticket)) for place, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            place, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece is None
            yield place, piece
    finally:
        for task in tasks:
            task.cancel()


def total_usage(plans, tickets):
    """Usage of a request: each prompt counted once, all of its choices."""
    answers, first, prompts, cached = [ticket.answer for ticket in tickets], 0, 0, 0
    for plan in plans:
        prompts, cached = prompts + answers[first].prompt_tokens, cached + answers[first].cached_tokens
        first += len(plan.requests)
    thoughts = sum(choice.reader.thought_tokens for plan in plans for choice in plan.choices
                   if isinstance(choice, ChatChoice))
    return openai.usage(prompts, sum(answer.completion_tokens for answer in answers), cached, thoughts)


async def whole(base, plans, tickets):
    """The body of an answer that is not streamed."""
    async for _ in merged(tickets):
        pass
    choices = [choice for plan in plans for choice in plan.choices]
    choices = [choice.whole(ticket.answer) for choice, ticket in zip(choices, tickets, strict=True)]
    return base | {"choices": choices, "usage": total_usage(plans, tickets)}


async def events(base, plans, tickets, with_usage, first_token):
    """The server-sent events of an answer; first_token() is called when there is one."""
    choices = [choice for plan in plans for choice in plan.choices]
    base = base | ({"usage": None} if with_usage else {})
    try:
        for part in (part for choice in choices for part in choice.begin()):
            yield openai.event(base | {"choices": [part]})
        async for place, piece in merged(tickets):
            if first_token:
                first_token = first_token()
            choice = choices[place]
            for part in choice.end(tickets[place].answer) if piece is None else choice.push(piece):
                yield openai.event(base | {"choices": [part]})
        if with_usage:
            yield openai.event(base | {"choices": [], "usage": total_usage(plans, tickets)})
    except Exception as error:                             # the status 200 is sent already
        told = api_error(error)
        if isinstance(told, ApiError):
            yield openai.event(told.body)
        else:
            print(f"error: {error!r} while streaming", file=sys.stderr, flush=True)
            yield openai.event(openai.error_body(500, INTERNAL))
    finally:
        for ticket in tickets:
            ticket.cancel()
    yield "data: [DONE]\n\n"


INTERNAL = "the server made a mistake; its log says more"


# --- 4. embeddings


def prepare_inputs(served, body):
    """The ids of each input, checked. Called in a thread."""
    inputs, tokenizer = openai.several(body.input), served.tokenizer
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(inputs)} texts; at most {MAX_INPUTS} are read at once", "input")
    rows = []
    for place, text in enumerate(inputs):
        if not text:
            raise ApiError(400, f"input {place} is empty", "input")
        ids = [tokenizer.bos_id, *tokenizer.encode(text)] if isinstance(text, str) else text
        if len(ids) > served.context:
            raise ApiError(400, f"this model's maximum context length is {served.context} tokens; input {place} has "
                           f"{len(ids)}: shorten it", "input", "context_length_exceeded")
        if max(ids) >= served.engine.model.config.vocab_size:
            raise ApiError(400, f"input {place} holds an id that is not in the vocabulary", "input")
        rows.append(ids)
    return rows


def pooled(model, rows):
    """Rows of ids as vectors (n, D) of length 1: the mean of the final hidden states of all tokens, scaled."""
    device = model.lm_head.weight.device
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, :len(tokens)], mask[row, :len(tokens)] = torch.tensor(tokens), True
    ids, mask = ids.to(device), mask.to(device)
    hidden = model(ids, attention_mask=mask, head=lambda hidden, lm_head: hidden).logits.float()   # (n, T, D)
    mean = hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


async def embed(served, rows, request, executor):
    """Vectors of all rows, a group at a time; None where the client hung up meanwhile."""
    order, vectors = sorted(range(len(rows)), key=lambda place: len(rows[place])), [None] * len(rows)
    loop = asyncio.get_running_loop()
    while order and not await request.is_disconnected():
        group = [order.pop()]                              # the longest first
        while order and (len(group) + 1) * len(rows[group[0]]) <= EMBED_TOKENS:
            group.append(order.pop())
        some = [rows[place] for place in group]
        result = await loop.run_in_executor(executor, served.engine.call, lambda model, some=some: pooled(model, some),
                                            served.adapter)
        for place, vector in zip(group, result, strict=True):
            vectors[place] = vector
    return None if order else vectors


# --- 5. what every request passes first


class Gate:
    """ASGI middleware: who may enter, with what, and how many at once. It reads a body before anyone works on it.

    `draining` True refuses all that comes new; `inflight` counts the requests whose answers are not finished.
    """

    def __init__(self, app, cfg, counts):
        self.app, self.cfg, self.counts = app, cfg, counts
        self.inflight, self.draining = 0, False
        self.key = cfg.api_key.encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500                                       # where nothing was sent, an exception passed

        async def sent(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.inflight += 1
        try:
            headers = dict(scope["headers"])
            try:
                self.admit(scope, headers)
                if scope["method"] == "POST":
                    receive = replay(await self.read(headers, receive), receive)
            except ApiError as error:
                return await answer_error(error)(scope, receive, sent)
            await self.app(scope, receive, sent)
        finally:
            self.inflight -= 1
            path = getattr(scope.get("route"), "path", "other")
            self.counts["requests_total", f'path="{path}",status="{status}"'] += 1

    def admit(self, scope, headers):
        """ApiError for a request that may not enter, by its head alone."""
        if scope["path"] == "/health":
            return
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={**RETRY, "Connection": "close"})
        if self.key and not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + self.key):
            raise ApiError(401, "wrong or missing API key: send it as Authorization: Bearer KEY",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] != "POST":
            return
        # A browser asks the server before it sends this type for a page of another site, and is refused (no CORS).
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "send the body as JSON, with the header Content-Type: application/json")
        if self.inflight > self.cfg.concurrency + self.cfg.queue:
            raise ApiError(429, "too many requests are on their way: try again later", code="queue_full",
                           headers=RETRY)

    async def read(self, headers, receive):
        """The body, or ApiError. Of one that is too large a part is read and dropped: who still sends it would not
        hear the answer otherwise."""
        limit = self.cfg.max_body_bytes
        told = headers.get(b"content-length", b"0")
        parts, size = [], 0
        too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large",
                             headers={"Connection": "close"})
        if told.isdigit() and int(told[:20]) > 10 * limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while size <= 10 * limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the body was not sent to its end")
                    size += len(message.get("body", b""))
                    if size > limit:
                        parts.clear()
                    else:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds",
                           headers={"Connection": "close"}) from None
        if size > limit:
            raise too_large
        return b"".join(parts)


def replay(body, receive):
    """`receive` for an application to which the body is still new."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body():
        return messages.pop() if messages else await receive()

    return first_the_body


def answer_error(error):
    return JSONResponse(error.body, error.status, error.headers)


# --- 6. the paths


def explain(errors):
    """(message, param) for pydantic's complaints about a body: those about the place that was read farthest into."""
    if errors[0]["type"] in ("json_invalid", "value_error") and len(errors[0]["loc"]) < 2 or errors[0]["loc"] == ():
        return errors[0]["msg"].removeprefix("Value error, "), None

    def place(error):                                      # without the names of the types that were tried
        return ".".join(str(part) for part in error["loc"][1:] if isinstance(part, int) or (
            part.isidentifier() and part.islower() and part not in ("str", "int", "float", "list", "dict")))

    param = max(map(place, errors), key=lambda param: param.count("."))
    told = [error["msg"].removeprefix("Value error, ") for error in errors if place(error) == param]
    return f"{param or 'the body'}: {'; or: '.join(dict.fromkeys(told))}"[:500], param or None


def build_app(models, cfg):
    """(the application, its Gate). models: {name: Served}; cfg: the Config of scripts/serve_openai_api.py."""
    app = FastAPI(title="Acorn", docs_url=None, redoc_url=None)            # those pages load scripts from elsewhere
    counts, watchers, begun = Counter(), set(), time.time()
    embedding = ThreadPoolExecutor(1)                      # its thread waits for engines; others would wait behind it

    def find(name):
        if name not in models:
            raise ApiError(404, f"the model {name[:100]!r} does not exist; there are {', '.join(models)}", "model",
                           "model_not_found")
        return models[name]

    async def answer(body, request, plan, kind, prefix):
        """The response to a request for a chat or text completion."""
        start, served = time.perf_counter(), find(body.model)
        count = (body.n or 1) * (len(openai.several(body.prompt)) if isinstance(body, CompletionRequest) else 1)
        if count > cfg.concurrency:
            raise ApiError(400, f"n asks for {count} answers in all; this server writes {cfg.concurrency} at once", "n")
        user = body.user or (request.client.host if request.client else "")
        try:
            plans = await asyncio.to_thread(plan, served, body, cfg, user)
            tickets = submit(served.engine, plans)
        except (UserError, QueueFull) as error:
            raise api_error(error) from error
        watcher = asyncio.create_task(watch(request, tickets))
        watchers.add(watcher)                              # the event loop keeps no reference of its own
        watcher.add_done_callback(watchers.discard)
        base = openai.envelope(kind + ".chunk" if body.stream and prefix == "chatcmpl" else kind, prefix, served.name,
                               f"fp_{served.engine.model.fingerprint[:12]}")

        def first_token():
            counts["first_token_seconds_sum", ""] += time.perf_counter() - start
            counts["first_token_seconds_count", ""] += 1

        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(events(base, plans, tickets, with_usage, first_token),
                                     media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        try:
            return JSONResponse(await whole(base, plans, tickets))
        except (UserError, QueueFull) as error:
            raise api_error(error) from error
        finally:
            watcher.cancel()
            for ticket in tickets:                         # where one has failed, the others are not wanted any more
                ticket.cancel()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        return await answer(body, request, plan_chat, "chat.completion", "chatcmpl")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await answer(body, request, plan_completion, "text_completion", "cmpl")

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request):
        """The mean of the final hidden states of all tokens, scaled to length 1. (The models were not trained to make
        vectors that compare well.)"""
        served = find(body.model)
        try:
            rows = await asyncio.to_thread(prepare_inputs, served, body)
            vectors = await embed(served, rows, request, embedding)
        except (UserError, QueueFull) as error:
            raise api_error(error) from error
        if vectors is None:
            raise ApiError(400, "the client hung up")
        data = [vector.tolist() if body.encoding_format != "base64" else
                base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(data)]
        tokens = sum(map(len, rows))
        return JSONResponse({"object": "list", "model": served.name, "data": data,
                             "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [served.listed() for served in models.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        return find(name).listed()

    @app.get("/health")
    async def health():
        return JSONResponse({"status": "draining" if gate.draining else "ok"}, 503 if gate.draining else 200)

    @app.get("/metrics")
    async def metrics():
        """Counters and gauges in the text format of Prometheus."""
        figures = {("uptime_seconds", ""): time.time() - begun, ("inflight_requests", ""): gate.inflight, **counts}
        for served in models.values():
            if served.parent is None:
                figures |= {(f"engine_{name}", f'model="{served.name}"'): value
                            for name, value in served.engine.stats().items()}
        lines = [f"acorn_{name}{{{labels}}} {value}" if labels else f"acorn_{name} {value}"
                 for (name, labels), value in sorted(figures.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    async def refused(request, error):
        return answer_error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        message, param = explain(error.errors())
        return JSONResponse(openai.error_body(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def no_such_path(request, error):
        told = {404: f"there is no {request.url.path[:100]} here", 405: f"{request.method} is not for this path"}
        message = told.get(error.status_code, str(error.detail))
        return JSONResponse(openai.error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request, error):                      # the traceback goes to the server's log
        return JSONResponse(openai.error_body(500, INTERNAL), 500)

    gate = Gate(app, cfg, counts)
    if not cfg.cors:
        return gate, gate
    from starlette.middleware.cors import CORSMiddleware
    return CORSMiddleware(gate, allow_origins=cfg.cors.split(","), allow_methods=["GET", "POST"],
                          allow_headers=["Authorization", "Content-Type"]), gate
