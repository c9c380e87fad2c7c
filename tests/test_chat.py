"""scripts/chat.py: prompts from a file, commands from a pipe, history, and what it refuses."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from model.checkpoint import save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import SamplingParams, stream
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from scripts import chat
from scripts.chat import Chat, Config, printable

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("nano")
    config = ModelConfig(tokenizer.vocab_size, 32, 64, 1, 2, 1, max_position_embeddings=128, initializer_range=0.3)
    save_model(path, CausalLM(config), tokenizer)
    return str(path)


def talk(folder, lines, monkeypatch, capsys, **options):
    """What is printed when `lines` come through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat.main(Config(model=folder, **{"max_new_tokens": 8, "seed": 1, **options}))
    return capsys.readouterr().out


def test_prompts_from_a_file_as_a_command(folder, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("Who are you?\n\n你好 🌰\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "chat.py"), "--model", folder, "--prompts", "questions.txt",
               "--max_new_tokens", "5", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "> Who are you?\n" in done.stdout and "> 你好 🌰\n" in done.stdout
    assert re.search(r"^2 answers, \d+ tokens, \d+ tokens/s$", done.stdout.splitlines()[-1])
    assert "\x1b" not in done.stdout                                       # no colours where there is no terminal


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere"], "--model nowhere: there is no such folder"),
    (["--historys", "2"], "--history N"), (["--weight", "full_sft"], "--model FOLDER"),
    (["--temperature", "hot"], "--temperature")])
def test_mistakes_on_the_command_line_are_one_line(arguments, words):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "chat.py"), *arguments], capture_output=True,
                          encoding="utf-8", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_answer_is_that_of_stream(folder, monkeypatch, capsys):
    shown = talk(folder, ["Who are you?"], monkeypatch, capsys, top_p=0.9, temperature=0.8)
    run = Chat(Config(model=folder))
    ids, _ = run.tokenizer.render([{"role": "user", "content": "Who are you?"}], add_generation_prompt=True)
    text = "".join(stream(run.model, run.tokenizer, ids, SamplingParams(8, 0.8, top_p=0.9, seed=1)))
    assert shown.startswith(printable(text) + "\n[8 tokens, ")


def test_commands(folder, monkeypatch, capsys):
    shown = talk(folder, [
        "/retry", "hello", "/retry", "/temperature 0", "/temperature 9x", "/temperature -1", "/thinking maybe",
        "/thinking on", "/history 2", "/system You are a fox. Be brief.", "/settings", "/nonsense", "/help", "",
        "think", "/exit", "never read"], monkeypatch, capsys)
    assert shown.count("tokens/s") == 3                                    # hello, its retry, think
    for line in ("/retry: there is no message to answer again yet", "/temperature 9x: expected a number",
                 "temperature is -1.0; it must be 0", "--thinking maybe: must be one of auto, on, off",
                 "temperature 0.0\n", "thinking on\n", "history 2\n", "system You are a fox. Be brief.\n",
                 "unknown command /nonsense", "/reset        forget"):
        assert line in shown
    assert "\n<think>" in shown


def test_end_of_input_leaves(folder, monkeypatch, capsys):
    assert talk(folder, [], monkeypatch, capsys) == ""


def test_history_system_and_trimming(folder):
    run = Chat(Config(model=folder, history=2, system="Short.", max_new_tokens=4))
    question = [{"role": "user", "content": "q"}]

    def seen():
        return run.tokenizer.decode(run.prompt_ids(question))

    for number in (1, 2, 3):
        run.exchanges.append(({"role": "user", "content": f"ask{number}"},
                              {"role": "assistant", "content": f"say{number}"}))
    assert seen() == "system\nShort.\nuser\nask2\nassistant\nsay2\nuser\nask3\nassistant\nsay3\nuser\nq\nassistant\n"
    run.set("history", "0")
    assert seen() == "system\nShort.\nuser\nq\nassistant\n"
    run.set("history", "3")
    run.set("system", "")
    run.exchanges[1][1]["content"] = "x y " * 40                           # with it, nothing older fits into 128
    assert len(run.tokenizer.encode("x y " * 40)) > 75
    text = seen()
    assert "ask1" not in text and "ask3" in text and text.startswith("user\nask")
    assert len(run.prompt_ids(question)) <= 124                            # and the answer still has room
    run.command("/reset")
    assert seen() == "user\nq\nassistant\n"
    with pytest.raises(UserError, match="nothing can follow"):
        run.answer([{"role": "user", "content": "a b " * 200}])


def test_exchanges_are_remembered_with_their_parts(folder, monkeypatch):
    run = Chat(Config(model=folder, thinking="on", history=1))

    class Said:
        ids, completion = [5, 6], type("Completion", (), {"finish_reason": "stop"})

        def __iter__(self):
            return iter(["two and", " two</think>\n\nfour"])

    monkeypatch.setattr("model.generate.stream", lambda *_: Said())
    run.answer([{"role": "user", "content": "2+2"}])
    assert run.exchanges == [({"role": "user", "content": "2+2"}, {
        "role": "assistant", "content": "four", "reasoning_content": "two and two"})]


def test_interrupt_stops_the_answer_and_not_the_program(folder, monkeypatch, capsys):
    class Interrupted:
        ids = [5]

        def __iter__(self):
            yield "half an"
            raise KeyboardInterrupt

    monkeypatch.setattr("model.generate.stream", lambda *_: Interrupted())
    shown = talk(folder, ["hello", "again"], monkeypatch, capsys)
    assert shown.count("half an\n[1 tokens, ") == 2 and shown.count(", stopped]") == 2


def test_prompts_auto_raw_and_jsonl(folder, tmp_path, capsys):
    chat.main(Config(model=folder, prompts="auto", max_new_tokens=3))
    assert capsys.readouterr().out.splitlines()[-1].startswith("8 answers, ")
    chat.main(Config(model=folder, prompts="auto", raw=True, max_new_tokens=3))
    assert "> Once upon a time\n" in capsys.readouterr().out
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"conversations": [
        {"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "second"}, {"role": "assistant", "content": "dropped"}]}) + "\n", encoding="utf-8")
    chat.main(Config(model=folder, prompts=str(path), max_new_tokens=3))
    shown = capsys.readouterr().out
    assert "> one\n" in shown and "> second\n" in shown and "dropped" not in shown and "2 answers, " in shown
    for bad in ("nowhere.txt", str(tmp_path)):
        with pytest.raises(UserError, match="--prompts"):
            chat.main(Config(model=folder, prompts=bad))


def test_raw_continues_the_text_itself(folder):
    run = Chat(Config(model=folder, raw=True))
    assert run.prompt_ids([{"role": "user", "content": "Once <|im_end|>"}]) == \
        [run.tokenizer.bos_id, *run.tokenizer.encode("Once <|im_end|>")]


def test_control_characters_are_shown_and_not_obeyed():
    text = "a\x1b[2J\r\x07\x9b31m\u202eb\n\tc 你好 👩\u200d👧 \\x1b"
    assert printable(text) == "a\\x1b[2J\\r\\x07\\x9b31m\\u202eb\n\tc 你好 👩\u200d👧 \\x1b"
