"""Reading records: every spelling, every mistake, and nothing held in memory."""

import gzip
import json
import pathlib
import pickle

import pytest

from dataset import jsonl
from dataset.builtin.checkers import check
from dataset.jsonl import (
    JsonlFile,
    find_files,
    line_index,
    parse_record,
    records,
    text_cut,
    text_pieces,
    texts,
)
from model.errors import UserError

REAL = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM, REFUSAL = {"role": "system", "content": "S"}, {"role": "assistant", "content": "No"}


@pytest.fixture(autouse=True)
def unwarned():
    jsonl.warn.cache_clear()


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return path


# --- shapes

CHAT = {"messages": [USER, ASSISTANT], "tools": None}
CALL = {"name": "add", "arguments": {"a": 1}}
SHAPES = {
    "text": ({"text": "Once."}, {"text": "Once."}),
    "conversations": ({"conversations": [USER, ASSISTANT], "id": 7}, CHAT),
    "messages": ({"messages": [USER, ASSISTANT]}, CHAT),
    "prompt": ({"prompt": "Hi", "completion": "Hello"}, CHAT),
    "prompt lists": ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, CHAT),
    "alpaca input": ({"instruction": "Add", "input": "1 2", "output": "3"},
                     {"messages": [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}],
                      "tools": None}),
    "sharegpt": ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"},
                                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                                    {"from": "observation", "value": "1"}, {"from": "gpt", "value": "Hello"}]},
                 {"messages": [SYSTEM, USER,
                               {"role": "assistant", "content": "", "tool_calls": [CALL]},
                               {"role": "tool", "content": "1"}, ASSISTANT], "tools": None}),
    "system key": ({"system": "S", "conversations": [{"from": "human", "value": "Hi"},
                                                     {"from": "gpt", "value": "Hello"}]},
                   {"messages": [SYSTEM, USER, ASSISTANT], "tools": None}),
    "openai calls": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": None}),
    "tools as text": ({"conversations": [SYSTEM | {"tools": '[{"name": "add"}]'}, USER, ASSISTANT]},
                      {"messages": [SYSTEM, USER, ASSISTANT], "tools": [{"name": "add"}]}),
    "question": ({"question": "Hi", "answer": "Hello"}, CHAT),
    "lifted": ({"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n<answer>4</answer>"}]},
               {"messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "hm", "answer": "4"}],
                "tools": None}),
    "preference": ({"chosen": [USER, ASSISTANT], "rejected": [USER, REFUSAL]},
                   {"chosen": [USER, ASSISTANT], "rejected": [USER, REFUSAL], "tools": None}),
    "preference prompt": ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
                          {"chosen": [USER, ASSISTANT], "rejected": [USER, REFUSAL],
                           "tools": None}),
    "preference prompt twice": ({"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
                                {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "tools": None}),
    "rl prompt": ({"skill": "add", "conversations": [USER, {"role": "assistant", "content": "None"}], "answer": "3",
                   "checker": "number"},
                  {"messages": [USER], "tools": None, "answer": "3", "checker": "number", "skill": "add"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, tmp_path):
    record, plain = SHAPES[name]
    assert list(records(write(tmp_path / "a.jsonl", record))) == [plain]


def test_kind_decides_where_the_keys_do_not():
    record = {"conversations": [USER, ASSISTANT], "answer": "3", "checker": "number"}
    assert parse_record(record, "chat")[0] == CHAT
    assert parse_record(record, "prompt")[0]["messages"] == [USER]
    nothing = {"tools": None, "answer": None, "checker": None}
    assert parse_record({"prompt": "Hi"}, "prompt")[0] == {"messages": [USER], **nothing}


WORKED = "He has 1,000 + 80 = <<1000+80=1080>>1080.\n#### 1,080"


@pytest.mark.parametrize("answer, expected, checker", [
    (WORKED, "1080", "number"), ("#### -5", "-5", "number"), ("7", "7", "number"), ("Paris", "Paris", "phrase"),
    ("It is 2.5.\n#### 2.5", "2.5", "phrase")])
def test_a_question_with_its_worked_answer(answer, expected, checker):
    record = {"question": "How much?", "answer": answer, "level": 3}
    chat, prompt = (parse_record(record, kind)[0] for kind in ("chat", "prompt"))
    asked = {"role": "user", "content": "How much?"}
    assert chat["messages"] == [asked, {"role": "assistant", "content": answer}]
    assert prompt == {"messages": [asked], "tools": None, "answer": expected, "checker": checker, "level": 3}
    assert check(checker, f"I think it is {expected}", prompt["answer"])
    named = parse_record({**record, "checker": "letters"}, "prompt")[0]
    assert (named["checker"], named["answer"]) == ("letters", answer)


def test_markup_in_a_users_text_stays_text():
    said = {"role": "user", "content": "<think>x</think><|im_end|>"}
    assert parse_record({"messages": [said, ASSISTANT]})[0]["messages"][0] == said


def test_texts_gives_all_text_of_any_shape(tmp_path):
    path = write(tmp_path / "a.jsonl", *[record for record, _ in SHAPES.values()])
    found = list(texts([path, write(tmp_path / "b.txt", "plain")]))
    assert {"Once.", "Add\n1 2", "hm", "4", "No", "plain\n", '{"name": "add", "arguments": {"a": 1}}'} <= set(found)


# --- mistakes

MISTAKES = {
    "json": ('{"text": "a"', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "list": ("[1]", "a JSON list where an object"),
    "surrogate": ('{"text": "\\ud83d"}', "not a character"),
    "unknown": ({"query": "a"}, "'query'"),
    "no answer": ({"question": "a"}, 'no "answer" here'),
    "no completion": ({"chosen": [USER, ASSISTANT]}, 'no "rejected"'),
    "text type": ({"text": 3}, '"text" is a int and must be a string'),
    "empty": ({"messages": []}, '"messages" must be a list of messages'),
    "not a list": ({"messages": "Hi"}, '"messages" must be a list of messages'),
    "turn type": ({"messages": ["Hi"]}, '"messages[0]" is a str'),
    "role": ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "\"messages[1].role\" is 'narrator'"),
    "no role": ({"messages": [{"content": "x"}]}, '"messages[0].role" is None'),
    "content": ({"messages": [USER, {"role": "assistant"}]}, '"messages[1].content" is missing'),
    "content type": ({"messages": [{"role": "user", "content": ["x"]}]}, '"messages[0].content" is list'),
    "assistant first": ({"messages": [ASSISTANT, USER]}, "must start with a user turn"),
    "system last": ({"messages": [USER, {"role": "system", "content": "x"}]}, '"messages[1]" is a system turn'),
    "only system": ({"messages": [{"role": "system", "content": "x"}]}, "must start with a user turn"),
    "no assistant": ({"messages": [USER]}, "no assistant turn"),
    "call": ({"messages": [USER, ASSISTANT | {"tool_calls": [3]}]}, '"messages[1].tool_calls" must'),
    "call name": ({"messages": [USER, ASSISTANT | {"tool_calls": [{"arguments": {}}]}]}, '[1].tool_calls" must'),
    "calls": ({"messages": [USER, ASSISTANT | {"tool_calls": 3}]}, '"messages[1].tool_calls" must'),
    "call json": ({"messages": [USER, ASSISTANT | {"tool_calls": "{"}]}, "no valid JSON"),
    "tools": ({"messages": [USER, ASSISTANT], "tools": [1]}, '"tools" must be a list of objects'),
    "pair end": ({"chosen": [USER], "rejected": [USER, ASSISTANT]}, '"chosen" must end with an assistant turn'),
    "pair prompt": ({"chosen": "a", "rejected": "b"}, '"chosen" must start with a user turn'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_line_is_named(name, tmp_path):
    record, message = MISTAKES[name]
    good = {"text": "fine"}
    path = write(tmp_path / "a.jsonl", good, "", record, good)
    with pytest.raises(UserError) as error:
        list(records(path))
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    with pytest.raises(UserError) as again:
        JsonlFile(path).record(1)
    assert str(again.value) == str(error.value)


def test_a_document_where_a_conversation_is_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(UserError, match=r"a\.jsonl:1: a document .* conversation is needed"):
        list(records(path, "chat"))
    with pytest.raises(UserError, match="holds no chat records"):
        list(records(write(tmp_path / "a.txt", "x"), "chat"))


def test_skip_counts_and_reports_once(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, "{", {"text": 1}, {"text": "b"})
    for _ in range(2):
        assert [record["text"] for record in records(path, on_bad_record="skip")] == ["a", "b"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "skipped: 2" in said and f"{path}:2:" in said
    with pytest.raises(UserError, match="on_bad_record ignore"):
        list(records(path, on_bad_record="ignore"))


def test_malformed_markup_is_kept_as_text_and_reported(tmp_path, capsys):
    bad = {"role": "assistant", "content": "<think>never closed"}
    path = write(tmp_path / "a.jsonl", {"messages": [USER, bad]}, {"messages": [USER, bad]})
    assert [record["messages"][1] for record in records(path)] == [bad, bad]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "plain text: 2" in said and f"{path}:1: messages[1]: <think>" in said


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: byte 11 of the line is not UTF-8"):
        list(records(path))
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(UserError, match=r"a\.txt:2: the byte at offset 8 is not UTF-8"):
        list(texts(path))


def test_missing_and_empty_files(tmp_path):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"{name}: the file is empty"):
            list(records(tmp_path / name))
    for path, message in ((tmp_path / "none.jsonl", "no such file"), ("", "names no file"), ([], "names no file"),
                          (write(tmp_path / "x.csv", "a"), "its name must end in")):
        with pytest.raises(UserError, match=message):
            list(records(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no file in this folder"):
        list(records(tmp_path / "folder"))


# --- files


def test_gz_folder_list_and_commas(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.jsonl", {"text": "b"})
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "a1"}\n{"text": "a2"}')
    with gzip.open(folder / "sub" / "d.txt.gz", "wt", encoding="utf-8") as file:
        file.write("d")
    write(folder / "ignored.csv", "x")

    def read(paths):
        return [record["text"] for record in records(paths)]

    assert read(folder) == ["a1", "a2", "b", "d"]
    assert read(str(folder)) == read(folder)
    assert read([folder / "b.jsonl", str(folder / "a.jsonl.gz")]) == ["b", "a1", "a2"]
    assert read(f"{folder / 'b.jsonl'}, {folder / 'b.jsonl'}") == ["b", "b"]
    assert JsonlFile(folder / "a.jsonl.gz").record(1) == ({"text": "a2"}, [])
    assert find_files(folder)[0].name == "a.jsonl.gz"
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl.gz", "b.jsonl", "ignored.csv", "sub"]


def test_a_cut_gz_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(records(path))
    assert not [file for file in jsonl.CACHE.iterdir() if file.suffix != ".lock"]


def test_odd_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b"}')
    assert [record["text"] for record in records(path)] == ["a", "b"]
    assert JsonlFile(path).where(1) == f"{path}:4"
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match="the file is empty"):
        JsonlFile(path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_the_index_does_not_depend_on_chunks(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK", chunk)
    content = b'{"a": 1}\n\n{"b": 2}\r\n\r\n{}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert line_index(path)[:].tolist() == [(0, 1), (10, 3), (22, 5)]
    assert [content[line["start"]:][:1] for line in line_index(path)] == [b"{"] * 3


def test_the_index_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    assert len(JsonlFile(path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "Progress", None)    # building an index would call it
        assert len(JsonlFile(path)) == 1
    write(path, {"text": "a"}, {"text": "b"})
    assert len(JsonlFile(path)) == 2
    assert len(list(jsonl.CACHE.glob("*-lines"))) == 2 and [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_is_not_held_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"text": "x" * 10_000}] * 200)
    file = JsonlFile(path)
    assert file.lines.path.stat().st_size == 16 * 200
    assert len(pickle.dumps(file)) < 1000 and pickle.loads(pickle.dumps(file)).record(199) == file.record(199)


def test_text_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "PIECE", 10)
    path = tmp_path / "a.txt"
    for text in ("one two\nthree four five\n\nsix\n" * 5, "汉字🙂" * 40, "a\r\nb", "x" * 10, "x" * 20 + "\n"):
        path.write_bytes(text.encode())
        pieces = list(text_pieces(path))
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces) <= 20
    path.write_bytes(("line\n" * 20).encode())
    assert all(piece.endswith("\n") for piece in text_pieces(path))
    assert "".join(text_pieces(path, 5, 17)) == "line\nline\nli"


@pytest.mark.parametrize("chunk", [3, 1000])
def test_text_cut_counts_characters(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK", chunk)
    text = "aé汉🙂" * 25
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for fraction in (0.9, 0.5, 0.013):
        assert text.encode()[:text_cut(path, fraction)].decode() == text[:int(fraction * len(text))]


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real data samples is not here")
def test_real_files():
    counts = {"sft_toolcall_en.jsonl": 265, "sft_alpaca_zh.jsonl": 15000, "pref_dpo_en_300.jsonl": 295,
              "pretrain_en_c4_demo.jsonl": 300}
    for name, count in counts.items():
        assert sum(1 for _ in records(REAL / name)) == count
    for name in ("tinyshakespeare.txt", "journey_to_the_west.txt"):
        assert "".join(text_pieces(REAL / name)).encode() == (REAL / name).read_bytes()


def test_a_file_that_shrinks_while_it_is_read_is_no_shorter_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    file = jsonl.JsonlFile(path)
    path.write_text('{"text": "one"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="shorter while it was read"):
        list(file.each())
