"""Answers of a model as training data: distillation from a teacher whose probabilities nobody can see  (Kim and Rush
2016, arXiv:1606.07947), and where the prompts come with a checker, rejection sampling: only right answers are kept.

reads   --data    prompts: {"prompt"} or {"conversations"} records (a final answer is dropped), "answer" and "checker"
writes  --out     {"conversations", "id"} records, which train_full_sft.py reads
        beside    OUT.rejected.jsonl: every other answer with the reason; OUT.settings.json: what asked for them
run     python scripts/generate_data.py --model out/full_sft --samples 4 --out answers.jsonl
        python scripts/generate_data.py --url http://127.0.0.1:8000/v1 --data my.jsonl --out answers.jsonl

The answers come from a checkpoint folder, or with --url from any server that speaks OpenAI's protocol (its key in the
environment variable that --api_key_env names). An answer is written as soon as it is there, as one line in one of the
two files; started again, the same command asks only for those that are in neither.

With --constitution the model improves its answers by itself before they are kept (Bai et al. 2022, arXiv:2212.08073,
section 3): it drafts an answer, says what is wrong with it under one principle of the file, and revises it; the record
has the revision, and beside it, under "constitution", the question, the draft and the critique.
      python scripts/generate_data.py --model my_model --constitution builtin --out revised.jsonl
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

from dataclasses import asdict, dataclass, replace

from model.cli import arg, parse_args
from model.errors import UserError, run


@dataclass
class Config:
    data: str = arg("builtin", "prompts: jsonl, a folder, several by commas, or builtin (skills with their checkers)")
    out: str = arg("out/generated.jsonl", "jsonl file of the answers that are kept")
    overwrite: bool = arg(False, "forget the answers that --out holds")
    model: str = arg("out/full_sft", "checkpoint folder; with --url the model's name there (not given: its first)")
    adapter: str = arg("", "adapter folder to use on the checkpoint, as train_lora.py leaves one")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    url: str = arg("", "base address of a server with OpenAI's protocol, as http://127.0.0.1:8000/v1")
    api_key_env: str = arg("OPENAI_API_KEY", "environment variable that holds the server's key")
    limit: int = arg(0, "ask only the first so many prompts; 0 = all")
    samples: int = arg(1, "answers to every prompt")
    system: str = arg("", "system message for prompts that have none; it becomes part of the conversations")
    constitution: str = arg("", "principles (eval/constitution.py says how to write them), or builtin: every answer is "
                            "criticised under one of them, drawn by weight, and revised")
    thinking: bool = arg(False, "let the model think first, where its chat template can")
    temperature: float = arg(0.8, "randomness; 0 always takes the likeliest token")
    top_p: float = arg(1.0, "sample from the likeliest tokens that together have this probability; 1 = all")
    max_new_tokens: int = arg(256, "longest answer; one that does not end by itself is rejected")
    seed: int = arg(0, "seed of the answers (a server may ignore it)")
    reject: str = arg("", "regular expression: answers in which it is found are rejected, as (?i)as an ai")
    near: float = arg(0.8, "two answers to a prompt that share this part of their word triples are one; 1 = equal ones")
    concurrency: int = arg(8, "requests to the server at the same time")
    retries: int = arg(8, "further attempts when the server is busy, fails or cannot be reached; the waits double")
    timeout: float = arg(300.0, "seconds after which a request has failed")
    batch_size: int = arg(64, "answers of a checkpoint that are written together")
    on_bad_record: str = arg("stop", "a prompt that cannot be read: stop, or skip and count", choices=("stop", "skip"))
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "auto, float32 or bfloat16")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__)       # before the heavy imports: --help answers at once

import concurrent.futures
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request

from filelock import FileLock, Timeout

from dataset import jsonl
from dataset.builtin.checkers import check
from dataset.builtin.generate import resolve

ROOT = pathlib.Path(__file__).resolve().parents[1]
FREE = {"overwrite", "limit", "samples", "concurrency", "retries", "timeout", "batch_size", "device", "dtype", "reject",
        "near", "on_bad_record"}    # settings that another start may change: they do not change who is asked what
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}            # worth another attempt
REFUSED = {400, 413, 422}                                       # this prompt is not answered; the next one may be
MOST_BYTES = 1 << 24                                            # of a reply
LONGEST_WAIT = 60.0                                             # seconds between two attempts
SAY_EVERY = 10.0                                                # seconds between two lines of progress
CRITIQUE = ("Look at your answer once more. {question} For a good answer, that is answered with {answer}. Say in a few "
            "sentences what about your answer can be made better in this respect.")
REVISION = ("Now answer the request before that again, with what you found made better. Write nothing but the new "
            "answer.")
ROUNDS = ("draft", "critique", "revision")


@dataclass
class Task:
    """One answer to be had. `id` names the prompt and the sample; whoever starts again recognises it by that."""
    id: str
    record: dict                # a prompt as dataset/jsonl.py reads it: messages, tools, answer, checker
    number: int                 # stands for (prompt, sample) in random draws
    principle: object = None    # with a constitution: the one under which the answer is criticised and revised


@dataclass
class Reply:
    """What came back: an assistant's message and why it ended ("stop", "length", …), or a `problem` in words."""
    message: dict
    finish_reason: str = "stop"
    problem: str = ""
    earlier: tuple = ()         # with a constitution: the draft and the critique, two messages


# --- what to ask


def tasks(cfg, done):
    """Every answer that is not in `done` (ids, to which these are added), prompt after prompt."""
    path = resolve(cfg.data, "prompts")
    principles = []
    if cfg.constitution:
        from eval.constitution import read_constitution          # here: it takes seconds, and a server is asked without
        principles = read_constitution(cfg.constitution)
    weights = [principle.weight for principle in principles]
    for record in itertools.islice(jsonl.records(path, "prompt", cfg.on_bad_record), cfg.limit or None):
        messages = record["messages"]
        if cfg.system and messages[0]["role"] != "system":
            record["messages"] = messages = [{"role": "system", "content": cfg.system}, *messages]
        prompt = hashlib.sha256(json.dumps([messages, record["tools"]], sort_keys=True).encode()).hexdigest()[:16]
        for sample in range(cfg.samples):
            name = f"{prompt}-{sample}"
            if name not in done:                                # a prompt that the data repeats is asked once
                done.add(name)
                principle = random.Random(name).choices(principles, weights)[0] if principles else None
                yield Task(name, record, int(prompt, 16) * 2**16 + sample, principle)


def conversation(task, said):
    """The messages that ask for what comes after `said`: nothing, the draft, or the draft and the critique."""
    messages = task.record["messages"]
    if not said:
        return messages
    question = task.principle.question.replace("{prompt}", messages[-1]["content"])
    critique = CRITIQUE.replace("{answer}", task.principle.answer).replace("{question}", question)
    for message, request in zip(said, (critique, REVISION)[:len(said)], strict=True):
        messages = [*messages, message, {"role": "user", "content": request}]
    return messages


def take(task, said, reply):
    """The Reply that ends a task, or None: it is a draft or a critique, which is now in `said`, and more is to come."""
    if not task.principle or len(said) == 2 or reply.problem:
        reply.earlier = tuple(said)
        return reply
    name = ROUNDS[len(said)]
    try:
        message = jsonl.parse_message(reply.message, name, [])
    except jsonl.BadRecord as error:
        return Reply({}, problem=f"malformed {name} ({error})")
    for problem, found in ((f"{name} too long", reply.finish_reason == "length"),
                           (f"{name} filtered by the server", reply.finish_reason == "content_filter"),
                           (f"{name} calls a tool", message.get("tool_calls")),
                           (f"empty {name}", not spelled(message).strip())):
        if found:
            return Reply({}, reply.finish_reason, problem)
    said.append(message)
    return None


# --- who answers: each is an iterator of (task, reply) in any order


def answers_of_model(cfg, wanted):
    """Answers of the checkpoint in cfg.model, --batch_size at a time; the same whatever was asked before."""
    from model import device as devices
    from model.checkpoint import load_model
    from model.generate import SamplingParams, generate
    folder = ROOT / cfg.model if cfg.model == Config.model and not pathlib.Path(cfg.model).exists() else cfg.model
    device = devices.pick_device(cfg.device)
    model, tokenizer = load_model(folder, device, devices.pick_dtype(cfg.dtype, device), cfg.rope_scaling, cfg.quantize,
                                  cfg.adapter)
    params = SamplingParams(cfg.max_new_tokens, cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)
    opened = "<think>" if cfg.thinking else ""                  # the template writes it; the model goes on behind it
    while some := [(task, []) for task in itertools.islice(wanted, cfg.batch_size)]:
        while some:                                             # once, with a constitution three times
            prompts = []
            for task, said in some:
                ids, _ = tokenizer.render(conversation(task, said), task.record["tools"], add_generation_prompt=True,
                                          enable_thinking=cfg.thinking or None)  # False would write an empty thought
                prompts.append(ids)
            fits = [len(ids) < model.config.max_position_embeddings for ids in prompts]
            yield from ((task, Reply({}, problem="prompt too long"))
                        for (task, _), ok in zip(some, fits, strict=True) if not ok)
            some, prompts = list(itertools.compress(some, fits)), list(itertools.compress(prompts, fits))
            numbers = [task.number + (len(said) << 80) for task, said in some]          # other draws in every round
            completions = generate(model, prompts, params, tokenizer, numbers=numbers)
            asked, some = some, []
            for (task, said), (completion,) in zip(asked, completions, strict=True):
                message = {"role": "assistant", "content": opened + completion.text}
                reply = take(task, said, Reply(message, completion.finish_reason))
                if reply:
                    yield task, reply
                else:
                    some.append((task, said))


def answers_of_server(cfg, wanted):
    """Answers of the server at cfg.url, --concurrency requests at a time, in the order in which they come."""
    server = Server(cfg)
    pool = concurrent.futures.ThreadPoolExecutor(cfg.concurrency)
    asked = {}
    try:
        while True:
            for task in itertools.islice(wanted, 2 * cfg.concurrency - len(asked)):
                asked[pool.submit(server.ask, task)] = task
            if not asked:
                return
            ready, _ = concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                reply = future.result()
                yield asked.pop(future), reply
    except (UserError, KeyboardInterrupt):                      # what is on its way is paid for: take it, then leave
        server.stop.set()
        for future in concurrent.futures.as_completed([future for future in asked if not future.cancel()]):
            if not future.exception():
                yield asked[future], future.result()
        raise
    finally:
        server.stop.set()                                       # nobody waits for another attempt any more
        pool.shutdown(cancel_futures=True)


class Server:
    """A server with OpenAI's protocol, and how patient to be with it."""

    def __init__(self, cfg):
        self.cfg, self.stop = cfg, threading.Event()
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get(cfg.api_key_env, "").strip():
            self.headers["Authorization"] = f"Bearer {key}"
        self.model = cfg.model if cfg.model != Config.model else self.send("/models")["data"][0]["id"]

    def ask(self, task):
        """The Reply to a task: one request, with a constitution three."""
        said = []
        while not (reply := take(task, said, self.ask_once(task, said))):
            pass
        return reply

    def ask_once(self, task, said):
        """The Reply to one request."""
        cfg, record = self.cfg, task.record
        body = {"model": self.model, "messages": [to_openai(message) for message in conversation(task, said)],
                "temperature": cfg.temperature, "top_p": cfg.top_p, "max_tokens": cfg.max_new_tokens,
                "seed": (cfg.seed + task.number + len(said)) % 2**31}
        if record["tools"]:
            body["tools"] = record["tools"]
        if cfg.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": True}        # as vLLM and SGLang read it
        try:
            choice = self.send("/chat/completions", body)["choices"][0]
        except Refused as error:
            return Reply({}, problem=f"refused by the server ({error})")
        message = choice.get("message") or {}
        thought = message.get("reasoning_content") or message.get("reasoning")
        kept = {"role": "assistant", "content": message.get("content") or ""}
        kept |= {"reasoning_content": thought} if thought else {}
        kept |= {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
        return Reply(kept, choice.get("finish_reason") or "stop")

    def send(self, path, body=None):
        """The JSON object that the server answers with. UserError when it never does; Refused for this one request."""
        url = self.cfg.url.rstrip("/") + path
        data = None if body is None else json.dumps(body).encode()
        for attempt in itertools.count():
            wait = min(2.0 ** attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
            try:
                request = urllib.request.Request(url, data, self.headers)
                with urllib.request.urlopen(request, timeout=self.cfg.timeout) as response:
                    answer = json.loads(response.read(MOST_BYTES))
                if answer.get("choices" if body else "data"):
                    return answer
                problem = "an answer without choices"
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {first_line(error.read(4096))}"
                if error.code in REFUSED and body:
                    raise Refused(problem) from None
                if error.code not in BUSY:
                    raise UserError(f"--url {url}: {problem}; check the address, --model and ${self.cfg.api_key_env}"
                                    ) from None
                wait = asked_wait(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt >= self.cfg.retries or self.stop.wait(wait):
                raise UserError(f"--url {url}: no answer after {attempt + 1} attempts ({problem}); what came before is "
                                "kept, and the same command continues")


class Refused(Exception):
    """The server will not answer this request, however often it is sent."""


def asked_wait(header, wait):
    """Seconds to wait: what the server asks for in Retry-After if that is a number, but no less than `wait`."""
    try:
        return min(max(float(header), wait), 10 * LONGEST_WAIT)
    except (TypeError, ValueError):                             # no such header, or a date
        return wait


def first_line(data):
    return " ".join(data.decode("utf-8", errors="replace").split())[:200]


def to_openai(message):
    """A message in OpenAI's spelling: calls nested, their arguments as text; a final <answer> back in the content."""
    sent = {key: value for key, value in message.items() if key in ("role", "content")}
    if message.get("answer"):
        sent["content"] = f"{message['content']}\n<answer>{message['answer']}</answer>".lstrip()
    if message.get("tool_calls"):
        sent["tool_calls"] = [{"id": f"call{number:05d}", "type": "function",
                               "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])}}
                              for number, call in enumerate(message["tool_calls"])]
    return sent


# --- what is kept


class Answers:
    """The two files, and what is in them: `done` ids; `texts` of the kept answers by prompt; `counts` by outcome."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.kept = pathlib.Path(cfg.out)
        self.rejected = beside(self.kept, "rejected.jsonl")
        self.done, self.texts, self.counts = set(), {}, {}
        for path in (self.kept, self.rejected):
            for line in whole_lines(path):
                entry = json.loads(line)
                self.done.add(entry["id"])
                self.tally(entry.get("reason", ""))
                if path == self.kept:
                    self.remember(entry["id"], spelled(entry["conversations"][-1]))

    def tally(self, reason):
        name = reason.partition(" (")[0] or "kept"
        self.counts[name] = self.counts.get(name, 0) + 1

    def remember(self, name, text):
        if self.cfg.samples > 1:                                # else there is nothing to compare with
            self.texts.setdefault(name.rpartition("-")[0], []).append(text)

    def add(self, task, reply):
        """Judge an answer and write it down."""
        message, reason = judge(self.cfg, task, reply, self.texts.get(task.id.rpartition("-")[0], []))
        conversation = [*task.record["messages"], *([message] if message else [])]
        entry = {"id": task.id, "conversations": conversation}
        if task.record["tools"]:
            entry["tools"] = task.record["tools"]
        if reply.earlier:
            draft, critique = map(spelled, reply.earlier)
            entry["constitution"] = {**asdict(task.principle), "draft": draft, "critique": critique}
        if reason:
            entry = {"id": task.id, "reason": reason, "finish_reason": reply.finish_reason, **entry}
        else:
            self.remember(task.id, spelled(message))
        self.tally(reason)
        with open(self.rejected if reason else self.kept, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")        # closed at once: a kill loses nothing

    def told(self):
        """The counts in words."""
        rest = {name: count for name, count in sorted(self.counts.items()) if name != "kept"}
        why = ", ".join(f"{count} {name}" for name, count in rest.items())
        return f"{self.counts.get('kept', 0)} kept, {sum(rest.values())} rejected" + (f" ({why})" if why else "")


def judge(cfg, task, reply, others):
    """(the assistant's message as it is stored, "" or the reason to reject it). others: kept answers to this prompt."""
    if reply.problem:
        return None, reply.problem
    try:
        message = jsonl.parse_message(reply.message, "answer", problems := [])
    except jsonl.BadRecord as error:
        return reply.message, f"malformed ({error})"
    text = spelled(message)
    if reply.finish_reason == "length":
        return message, "too long"
    if reply.finish_reason == "content_filter":
        return message, "filtered by the server"
    if not text.strip():
        return message, "empty"
    if problems:
        return message, f"malformed ({problems[0]})"
    if cfg.reject and re.search(cfg.reject, text):
        return message, "matches --reject"
    if task.record.get("checker") and not check(task.record["checker"], text, str(task.record["answer"])):
        return message, "wrong"
    if any(alike(text, other) >= cfg.near for other in others):
        return message, "duplicate"
    return message, ""


def spelled(message):
    """What a message finally says, as the checkers read it: no thoughts; an <answer> and tool calls as tags."""
    text = message["content"]
    text += f"<answer>{message['answer']}</answer>" if message.get("answer") else ""
    for call in message.get("tool_calls", []):
        text += f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"
    return text


def alike(text, other):
    """Jaccard similarity of the sets of word triples of two texts, 0 to 1; case and spacing do not count."""
    def triples(text):
        words = text.lower().split()
        return {tuple(words[i:i + 3]) for i in range(max(len(words) - 2, 1))}
    first, second = triples(text), triples(other)
    return len(first & second) / len(first | second)


# --- files


def beside(path, suffix):
    """answers.jsonl -> answers.SUFFIX"""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{suffix}")


def whole_lines(path):
    """The lines of a file that may not exist; the beginning of one that a kill left at its end is cut off."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.seek(-len(line), os.SEEK_END)
                file.truncate()
                return
            yield line


def claim(cfg):
    """Make the folder and write the settings down. UserError when --out holds answers to other settings."""
    out, record = pathlib.Path(cfg.out), beside(pathlib.Path(cfg.out), "settings.json")
    settings = {name: value for name, value in asdict(cfg).items() if name not in FREE}
    if cfg.overwrite:
        for path in (out, beside(out, "rejected.jsonl"), record):
            path.unlink(missing_ok=True)
    if record.exists():
        then = json.loads(record.read_text(encoding="utf-8"))
        then = {name: then.get(name, getattr(Config, name)) for name in settings}      # a flag that came later
        changed = [f"--{name} {then[name]} → {value}" for name, value in settings.items() if then[name] != value]
        if changed:
            raise UserError(f"{out} holds answers to other settings ({', '.join(changed)}); use the same settings to "
                            "continue, another --out, or --overwrite to start over")
    elif out.exists():
        raise UserError(f"{out} exists and was not written by this script; choose another --out")
    else:
        record.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def checked(cfg):
    """The settings, --out as a path; UserError for what cannot be."""
    for name, ok, allowed in [("samples", 1 <= cfg.samples < 2**16, "from 1 to 65535"),
                              ("concurrency", cfg.concurrency >= 1, "at least 1"),
                              ("batch_size", cfg.batch_size >= 1, "at least 1"),
                              ("retries", cfg.retries >= 0, "0 or more"), ("limit", cfg.limit >= 0, "0 or more"),
                              ("max_new_tokens", cfg.max_new_tokens >= 1, "at least 1"),
                              ("temperature", cfg.temperature >= 0, "0 (likeliest token) or more"),
                              ("near", 0 < cfg.near <= 1, "above 0 and at most 1"),
                              ("out", cfg.out.endswith(".jsonl"), "a name that ends in .jsonl"),
                              ("url", not cfg.url or re.match("https?://", cfg.url), "http://… or https://…")]:
        if not ok:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be {allowed}")
    try:
        re.compile(cfg.reject)
    except re.error as error:
        raise UserError(f"--reject {cfg.reject}: not a regular expression ({error})") from None
    return replace(cfg, out=str(ROOT / cfg.out)) if cfg.out == Config.out else cfg


def main(cfg):
    cfg = checked(cfg)
    out = pathlib.Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside(out, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{out} is being written by another process; wait for it or choose another --out") from None
    with lock:
        claim(cfg)
        answers = Answers(cfg)
        if answers.done:
            print(f"continuing {out}: {answers.told()}", flush=True)
        before, start = len(answers.done), time.monotonic()
        said, got = start, 0
        try:
            for task, reply in (answers_of_server if cfg.url else answers_of_model)(cfg, tasks(cfg, answers.done)):
                answers.add(task, reply)
                got += 1
                if time.monotonic() - said >= SAY_EVERY:
                    said = time.monotonic()
                    print(f"{before + got} answers: {answers.told()}; {got / (said - start):.1f} a second", flush=True)
        except KeyboardInterrupt:
            print(f"stopped after {got} answers; the same command continues", flush=True)
            raise SystemExit(130) from None
        print(f"done: {out}: {answers.told()}; {got} asked for now, in {time.monotonic() - start:.0f} s", flush=True)
    return answers.counts


if __name__ == "__main__":
    run(main, CONFIG)
