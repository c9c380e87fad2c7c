"""Answers as data: from a local server with OpenAI's protocol and from a checkpoint; retries, restarts, rejections."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dataset.lm_dataset import SFTDataset
from model.checkpoint import save_model
from model.config import new_config
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts import generate_data

SCRIPT = Path(generate_data.__file__)
NANO = Tokenizer.load("nano")


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Teacher:
    """A server with OpenAI's protocol. answer(body, n) -> text, message, (finish_reason, text), or an HTTP status."""

    def __init__(self, answer):
        self.asked, self.headers, self.answer = [], [], answer
        teacher, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status, value, **headers):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                assert self.path == "/v1/models"
                self.reply(200, {"data": [{"id": "teacher-9b"}, {"id": "other"}]})

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(teacher.asked)
                    teacher.asked.append(body)
                    teacher.headers.append(dict(self.headers))
                answer = teacher.answer(body, number)
                if isinstance(answer, int):
                    return self.reply(answer, {"error": {"message": "not now"}}, Retry_After="0")
                if isinstance(answer, bytes):
                    return self.reply(200, answer)
                reason, message = answer if isinstance(answer, tuple) else ("stop", answer)
                message = message if isinstance(message, dict) else {"content": message}
                choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
                self.reply(200, {"choices": [choice]})

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def teach():
    teachers = []

    def start(answer):
        teachers.append(Teacher(answer))
        return teachers[-1]

    yield start
    for teacher in teachers:
        teacher.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(generate_data, "LONGEST_WAIT", 0.01)


def question(body):
    return body["messages"][-1]["content"]


def generate(prompts, out, **changes):
    return generate_data.main(generate_data.Config(data=str(prompts), out=str(out), **changes))


def numbered(tmp_path, count):
    return write(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}"} for i in range(count)])


def test_answers_become_conversations_that_fine_tuning_reads(teach, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    teacher = teach(lambda body, n: f"Answer to {question(body)}")
    prompts = write(tmp_path / "prompts.jsonl", [
        {"prompt": "One"},
        {"conversations": [{"role": "user", "content": "Two"}, {"role": "assistant", "content": "dropped"}]},
        {"messages": [{"role": "system", "content": "Mine"}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}, {"role": "user", "content": "Three"}]},
        {"prompt": "One"}])
    counts = generate(prompts, tmp_path / "out.jsonl", url=teacher.url, api_key_env="MY_KEY", system="Be short.",
                      temperature=0.3, top_p=0.9, max_new_tokens=99)
    assert counts == {"kept": 3} and len(teacher.asked) == 3                   # the repeated prompt is asked once
    got = {tuple(m["content"] for m in entry["conversations"]) for entry in read(tmp_path / "out.jsonl")}
    assert got == {("Be short.", "One", "Answer to One"), ("Be short.", "Two", "Answer to Two"),
                   ("Mine", "a", "b", "Three", "Answer to Three")}
    for body, headers in zip(teacher.asked, teacher.headers, strict=True):
        assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("teacher-9b", 0.3, 0.9, 99)
        assert headers["Authorization"] == "Bearer s3cret"
    assert all("s3cret" not in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    data = SFTDataset(str(tmp_path / "out.jsonl"), NANO, 128)
    assert data.report["conversations"] == 3 and "Answer to" in NANO.decode(data[0]["input_ids"])


def test_a_busy_server_is_asked_again_and_nothing_is_lost_or_doubled(teach, tmp_path):
    """Every prompt first meets 429, then 500, then half a JSON, then an answer without choices."""
    tries = Counter()

    def answer(body, n):
        tries[question(body)] += 1
        return {1: 429, 2: 500, 3: b'{"choices": [', 4: b"{}"}.get(tries[question(body)], "fine")

    teacher = teach(answer)
    counts = generate(numbered(tmp_path, 12), tmp_path / "out.jsonl", url=teacher.url, concurrency=4)
    assert counts == {"kept": 12} and set(tries.values()) == {5}
    assert len({entry["id"] for entry in read(tmp_path / "out.jsonl")}) == 12


def test_a_server_that_never_answers_ends_in_one_line_and_keeps_what_came(teach, tmp_path):
    teacher = teach(lambda body, n: "fine" if question(body) in ("Question 0", "Question 1") else 503)
    with pytest.raises(UserError, match=r"no answer after 3 attempts \(503 .*not now") as error:
        generate(numbered(tmp_path, 5), tmp_path / "out.jsonl", url=teacher.url, retries=2, concurrency=2)
    assert "\n" not in str(error.value) and len(read(tmp_path / "out.jsonl")) == 2
    with pytest.raises(UserError, match="no answer after 1 attempts"):
        generate(numbered(tmp_path, 5), tmp_path / "new.jsonl", url="http://127.0.0.1:9/v1", retries=0)
    wrong = teach(lambda body, n: 401)
    with pytest.raises(UserError, match=r"401 .*check the address"):
        generate(numbered(tmp_path, 5), tmp_path / "newer.jsonl", url=wrong.url)
    assert len(wrong.asked) <= 8                                               # of each request one, and no other


def test_requests_overlap_but_not_more_than_asked_for(teach, tmp_path):
    inside, most, lock = [0], [0], threading.Lock()

    def answer(body, n):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        with lock:
            inside[0] -= 1
        return "fine"

    generate(numbered(tmp_path, 20), tmp_path / "out.jsonl", url=teach(answer).url, concurrency=3)
    assert most[0] == 3


def test_every_other_answer_is_kept_apart_with_its_reason(teach, tmp_path):
    said = {"good": "It is 12.", "wrong": "It is 13.", "empty": "  \n", "cut": ("length", "It is"),
            "filtered": ("content_filter", "x"), "apology": "As an AI I say 12", "bad": 400,
            "half": "<think>it is 12", "calls": {"content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            "thinks": {"reasoning_content": "6 + 6", "content": "12"}, "spoilt": {"content": 7}}
    prompts = write(tmp_path / "p.jsonl", [{"prompt": key, **({} if key in ("calls", "half") else
                                                             {"answer": "12", "checker": "number"})} for key in said])
    counts = generate(prompts, tmp_path / "out.jsonl", url=teach(lambda body, n: said[question(body)]).url,
                      reject="(?i)as an ai")
    kept = {entry["conversations"][0]["content"]: entry["conversations"][-1] for entry in read(tmp_path / "out.jsonl")}
    reasons = {entry["conversations"][0]["content"]: entry["reason"]
               for entry in read(tmp_path / "out.rejected.jsonl")}
    assert kept.keys() == {"good", "calls", "thinks"}
    assert kept["calls"]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    assert kept["thinks"]["reasoning_content"] == "6 + 6" and kept["thinks"]["content"] == "12"
    assert {key: reason.partition(" (")[0] for key, reason in reasons.items()} == {
        "wrong": "wrong", "empty": "empty", "cut": "too long", "filtered": "filtered by the server",
        "apology": "matches --reject", "bad": "refused by the server", "half": "malformed", "spoilt": "malformed"}
    assert "not now" in reasons["bad"] and sum(counts.values()) == len(said)
    assert SFTDataset(str(tmp_path / "out.jsonl"), NANO, 128).report["dropped"] == 0


def test_answers_to_one_prompt_that_say_the_same_are_one(teach, tmp_path):
    long = "the fox lives in the old red house under the hill by the river"
    answers = ["Yes.", "yes.", "  YES. ", "No.", long, long.replace("old", "young"), "a river under a hill"]
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "first"}, {"prompt": "second"}])
    teacher = teach(lambda body, n: answers[n % len(answers)])
    counts = generate(prompts, tmp_path / "out.jsonl", url=teacher.url, samples=7, concurrency=1, near=0.5)
    assert counts == {"kept": 8, "duplicate": 6}
    assert len({body["seed"] for body in teacher.asked}) == 14
    exact = generate(prompts, tmp_path / "exact.jsonl", url=teacher.url, samples=7, concurrency=1, near=1.0)
    assert exact == {"kept": 10, "duplicate": 4}


def test_likeness():
    assert generate_data.alike("a b c d", "A  b\nc d") == 1
    assert generate_data.alike("a b c d", "a b c e") == pytest.approx(1 / 3)
    assert generate_data.alike("a b", "a c") == 0 and generate_data.alike("", "") == 1


# ------------------------------------------------------------------------------------------------- starting again


def test_killed_and_started_again_every_answer_is_there_once(teach, tmp_path):
    """A real process, killed with -9 between two answers and while it writes one; then left alone."""
    teacher = teach(lambda body, n: time.sleep(0.01) or f"It is {n}.")
    prompts = numbered(tmp_path, 40)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(SCRIPT), "--data", str(prompts), "--out", str(out), "--url", teacher.url,
               "--samples", "3", "--concurrency", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 25):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    before = out.read_bytes()
    with open(out, "ab") as file:
        file.write(b'{"id": "0123456789abcdef-0", "conversations": [{"ro')        # the half of a line
    counts = generate(prompts, out, url=teacher.url, samples=3, concurrency=2)
    entries = read(out)
    assert out.read_bytes().startswith(before) and counts == {"kept": 120}
    assert len(entries) == len({entry["id"] for entry in entries}) == 120
    assert len(teacher.asked) <= 120 + 4          # twice --concurrency may be on their way at the kill: asked again
    asked = len(teacher.asked)
    assert generate(prompts, out, url=teacher.url, samples=3) == counts and len(teacher.asked) == asked
    assert generate(prompts, out, url=teacher.url, samples=4) == {"kept": 160}                     # one more of each


def test_rejected_answers_are_not_asked_for_again(teach, tmp_path):
    teacher = teach(lambda body, n: "")
    prompts = numbered(tmp_path, 5)
    assert generate(prompts, tmp_path / "out.jsonl", url=teacher.url) == {"empty": 5}
    assert generate(prompts, tmp_path / "out.jsonl", url=teacher.url) == {"empty": 5} and len(teacher.asked) == 5


def test_ctrl_c_keeps_the_answers_on_their_way(teach, tmp_path, monkeypatch):
    teacher = teach(lambda body, n: time.sleep(0.05) or "fine")
    wait, calls = generate_data.concurrent.futures.wait, []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    monkeypatch.setattr(generate_data.concurrent.futures, "wait", interrupted)
    with pytest.raises(SystemExit) as stopped:
        generate(numbered(tmp_path, 50), tmp_path / "out.jsonl", url=teacher.url, concurrency=4)
    assert stopped.value.code == 130
    assert len(read(tmp_path / "out.jsonl")) == len(teacher.asked) < 20


def test_other_settings_and_foreign_files_are_left_alone(teach, tmp_path):
    teacher, prompts, out = teach(lambda body, n: "fine"), numbered(tmp_path, 3), tmp_path / "out.jsonl"
    generate(prompts, out, url=teacher.url)
    before = out.read_bytes()
    with pytest.raises(UserError, match="--temperature 0.8 → 0.5"):
        generate(prompts, out, url=teacher.url, temperature=0.5)
    assert out.read_bytes() == before
    assert generate(prompts, out, url=teacher.url, temperature=0.5, overwrite=True) == {"kept": 3}
    with pytest.raises(UserError, match="was not written by this script"):
        generate(prompts, prompts, url=teacher.url)
    with pytest.raises(UserError, match="being written by another process"), \
            generate_data.FileLock(tmp_path / "out.lock"):
        generate(prompts, out, url=teacher.url)


@pytest.mark.parametrize("changes, says", [
    (dict(samples=0), "--samples 0"), (dict(near=0.0), "--near"), (dict(url="ftp://x"), "--url ftp"),
    (dict(reject="("), "--reject"), (dict(out="answers.txt"), "--out"), (dict(temperature=-1.0), "--temperature"),
    (dict(model="nowhere"), "no model folder")])
def test_what_cannot_be_is_one_line(changes, says, tmp_path):
    flags = {"data": str(numbered(tmp_path, 2)), "out": str(tmp_path / "new" / "out.jsonl"), **changes}
    with pytest.raises(UserError, match=says) as error:
        generate_data.main(generate_data.Config(**flags))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- a checkpoint


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "model", CausalLM(new_config("1x32", NANO, 64)), NANO)
    return str(tmp_path / "model")


def test_a_checkpoint_answers_the_same_however_it_is_asked(model, tmp_path):
    """In one go, two at a time, and stopped after seven: the same answers, each of its own draw."""
    prompts = numbered(tmp_path, 6)
    write(tmp_path / "few.jsonl", read(prompts)[2:5])
    options = dict(model=model, samples=2, max_new_tokens=5, temperature=1.0, dtype="float32", device="cpu")

    def answered(name):
        entries = read(tmp_path / f"{name}.jsonl") if (tmp_path / f"{name}.jsonl").exists() else []
        return {entry["id"]: entry["conversations"] for entry in entries + read(tmp_path / f"{name}.rejected.jsonl")}

    generate(prompts, tmp_path / "whole.jsonl", **options)
    generate(prompts, tmp_path / "two.jsonl", batch_size=2, **options)
    generate(tmp_path / "few.jsonl", tmp_path / "part.jsonl", **options)
    whole = answered("whole")
    assert len(whole) == 12 and answered("two") == whole
    assert answered("part").items() <= whole.items() and len(answered("part")) == 6
    assert len({conversation[-1]["content"] for conversation in whole.values()}) == 12


def test_a_prompt_that_leaves_no_room_is_rejected(model, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "x y z " * 50}, {"prompt": "short"}])
    counts = generate(prompts, tmp_path / "out.jsonl", model=model, max_new_tokens=4, device="cpu")
    assert counts["prompt too long"] == 1 and sum(counts.values()) == 2


def test_only_right_answers_to_checked_prompts_are_kept(tmp_path):
    """Rejection sampling with a model that always says one thing."""
    model = CausalLM(replace(new_config("1x32", NANO, 64), tie_word_embeddings=False))
    yes, end = NANO.encode("yes")[0], NANO.end_of_turn_id
    said = NANO.decode([yes])
    with torch.no_grad():                                       # after any token comes "yes", and after that the end
        for p in model.parameters():
            if p.dim() > 1:
                p.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[yes] = torch.eye(32)[1]
        model.lm_head.weight[yes, 0] = model.lm_head.weight[end, 1] = 10
    save_model(tmp_path / "yes", model, NANO)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": said, "checker": "phrase"},
                                           {"prompt": "b", "answer": "no", "checker": "phrase"}])
    counts = generate(prompts, tmp_path / "out.jsonl", model=str(tmp_path / "yes"), temperature=0.0, device="cpu",
                      dtype="float32")
    assert counts == {"kept": 1, "wrong": 1}
    assert read(tmp_path / "out.jsonl")[0]["conversations"][-1]["content"] == said
