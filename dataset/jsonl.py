"""Records from disk: find, index, read, validate, normalise.

    records("data/chat.jsonl")              every record, one after the other, in one of four plain shapes
    JsonlFile("data/chat.jsonl").record(7)  record 7, read when asked for

reads   .jsonl, .jsonl.gz (one JSON object per line), .txt, .txt.gz (one long document), folders of them,
        lists and comma-separated lists. Every file is UTF-8.
yields  document    {"text": str}
        chat        {"messages": [...], "tools": [...] or None}
        preference  {"chosen": [...], "rejected": [...], "tools": [...] or None}
        prompt      {"messages": [...], "tools": ..., "answer": ..., "checker": ..., and the record's other keys}
writes  out/cache/  the offset of every line, and the unpacked form of .gz files. Delete it whenever you like.

A message is {"role": system | user | assistant | tool, "content": str}; an assistant's may have "reasoning_content",
"answer" and "tool_calls" [{"name", "arguments": dict}]. Data comes in many spellings (README.md lists them) and is
brought to this one here, so nothing downstream ever asks who wrote the file.

Nothing holds a file in memory: the index is one int64 per line, itself memory-mapped. A bad line names its file, line
and field; `on_bad_record="skip"` counts such lines instead and says so once.
"""

import functools
import gzip
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
import zlib

import numpy as np

from model.errors import UserError
from model.tokenizer import lift_structure

CACHE = pathlib.Path(__file__).resolve().parents[1] / "out" / "cache"
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
CHUNK = 1 << 24    # bytes read at a time while a file is indexed
PIECE = 1 << 20    # bytes of a .txt file that become one string
BOM = b"\xef\xbb\xbf"

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}
SHAPES = ('"text"; "conversations" or "messages"; "prompt" and "completion"; "instruction" and "output"; '
          '"chosen" and "rejected"; or a conversation with "answer" and "checker"')
CONVERSATION_KEYS = {"conversations", "messages", "prompt", "completion", "instruction", "input", "output", "system",
                     "tools"}


# --- files


def find_files(paths):
    """The data files that `paths` names, as a list of Path: a file, a folder (all data files in it, sorted), a list of
    those, or several in one string with commas between. UserError: nothing there, or of a kind we do not read."""
    if not paths:
        raise UserError("--data names no file; give a .jsonl or .txt file or a folder of them")
    if isinstance(paths, list | tuple):
        return [file for path in paths for file in find_files(path)]
    path = pathlib.Path(paths)
    if not path.exists() and "," in str(paths):
        return find_files([part.strip() for part in str(paths).split(",") if part.strip()])
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path given with --data")
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not found:
            raise UserError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return found
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: cannot tell what this file holds; its name must end in {', '.join(SUFFIXES)}")
    return [path]


def is_text(path):
    """True for one long document, False for a file of JSON lines."""
    return path.name.endswith((".txt", ".txt.gz"))


def cache_path(path, name):
    """Where something derived from the file at `path` is kept: another name as soon as the file changes."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{key}-{name}"


def publish(temporary, target):
    """Give a finished file or folder its name in one step. Where another process was faster, its equal copy stays."""
    try:
        os.replace(temporary, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def beside(target):
    """A name next to `target` that no other process uses, for work in progress."""
    return target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")


def unpacked(path):
    """The path itself, or for .gz its unpacked copy in the cache: random access needs one."""
    if path.suffix != ".gz":
        return path
    target = cache_path(path, path.stem)
    if not target.exists():
        temporary = beside(target)
        try:
            with gzip.open(path, "rb") as source, open(temporary, "wb") as out:
                progress = Progress(f"unpacking {path.name}")
                while chunk := source.read(CHUNK):
                    out.write(chunk)
                    progress.add(len(chunk))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            temporary.unlink()
            raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again or unpack it yourself") from None
        publish(temporary, target)
    return target


class Progress:
    """`label 42 %` on stderr (MB where no total is known), every two seconds: nothing for work that is done sooner."""

    def __init__(self, label, total=0):
        self.label, self.total = label, total
        self.done, self.said = 0, time.monotonic()

    def add(self, amount):
        self.done += amount
        if time.monotonic() - self.said > 2:
            share = f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done / 1e6:.0f} MB"
            print(f"{self.label} {share}", file=sys.stderr, flush=True)
            self.said = time.monotonic()


@functools.cache    # once per process, however many datasets read the same file
def warn(message):
    """One line on stderr about data that was left out or read differently than its author may think."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# --- lines


def line_starts(path):
    """Byte offset of every line that is not empty, (n,) int64, memory-mapped. Found once, then kept in the cache."""
    target = cache_path(path, "lines.int64")
    if not target.exists():
        temporary = beside(target)
        progress = Progress(f"indexing {path.name}", path.stat().st_size)
        position, new_line = 0, True
        with open(path, "rb") as source, open(temporary, "wb") as out:
            while chunk := source.read(CHUNK):
                octets = np.frombuffer(chunk, np.uint8)
                starts = np.flatnonzero(octets[:-1] == 10) + 1
                if new_line:
                    first = len(BOM) if position == 0 and chunk.startswith(BOM) else 0
                    starts = np.concatenate([np.array([first] if first < len(chunk) else [], np.int64), starts])
                starts = starts[(octets[starts] != 10) & (octets[starts] != 13)]
                (starts + position).astype(np.int64).tofile(out)
                new_line = chunk[-1] == 10
                position += len(chunk)
                progress.add(len(chunk))
        publish(temporary, target)
    if target.stat().st_size == 0:
        return np.zeros(0, np.int64)
    return np.memmap(target, np.int64, mode="r")


def line_number(path, offset):
    """Which line, counted from 1, holds the byte at `offset`. Reads up to there: for error messages only."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK, offset))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


class JsonlFile:
    """The records of one .jsonl or .jsonl.gz file by number. Holds offsets only; a line is read when asked for."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.plain = unpacked(self.path)
        self.starts = line_starts(self.plain)
        if not len(self.starts):
            raise UserError(f"{self.path}: the file is empty; it must hold one JSON object per line")

    def __len__(self):
        return len(self.starts)

    def __reduce__(self):    # a pickled memmap would carry the whole index along
        return JsonlFile, (self.path,)

    def where(self, number):
        """`file:line` of a record."""
        return f"{self.path}:{line_number(self.plain, int(self.starts[number]))}"

    def record(self, number, kind=None):
        """(Record `number` in its plain shape, problems of its markup), see `parse_record`. UserError: a bad line."""
        with open(self.plain, "rb") as file:
            file.seek(int(self.starts[number]))
            try:
                return parse_record(load_json(file.readline()), kind)
            except BadRecord as error:
                raise UserError(f"{self.where(number)}: {error}") from None

    def each(self, kind=None):
        """Yield (number, record, problems) of every line in order; the record of a bad line is the BadRecord."""
        with open(self.plain, "rb") as file:
            for number, start in enumerate(self.starts):
                file.seek(int(start))
                try:
                    yield number, *parse_record(load_json(file.readline()), kind)
                except BadRecord as error:
                    yield number, error, []


def load_json(line):
    """The JSON object of one line of bytes."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not valid JSON ({error}); one line must be one whole JSON object") from None
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__} where an object {{...}} is needed")
    if b"\\ud" in line or b"\\uD" in line:    # half of a surrogate pair: legal JSON, but not a character
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord("a \\ud800-\\udfff escape without its other half is not a character; remove it") from None
    return record


def records(paths, kind=None, on_bad_record="stop"):
    """Yield every record of `paths` in its plain shape (see above).

    kind: "document", "chat", "preference", "prompt", or None to tell by the record's keys. A .txt file comes as
    documents of about 1 MiB. on_bad_record: "stop" raises UserError with file:line; "skip" leaves the line out and
    says on stderr how many there were.
    """
    for path in find_files(paths):
        if is_text(path):
            if kind not in (None, "document"):
                raise UserError(f"{path}: a .txt file holds no {kind} records; give a .jsonl file")
            yield from ({"text": text} for text in text_pieces(path))
            continue
        tally, file = Tally(on_bad_record), JsonlFile(path)
        for number, record, problems in file.each(kind):
            if tally.accept(record, problems, functools.partial(file.where, number)):
                yield record
        report_problems(path, tally.counts)


class Tally:
    """What was wrong in one file: stops at a bad record, or counts it and remembers the first."""

    def __init__(self, on_bad_record):
        if on_bad_record not in ("stop", "skip"):
            raise UserError(f'--on_bad_record {on_bad_record}: must be "stop" or "skip"')
        self.on_bad_record = on_bad_record
        self.counts = {"skipped": 0, "first_skipped": "", "malformed": 0, "first_malformed": ""}

    def accept(self, record, problems, where):
        """True if the record can be used. `record` may be the BadRecord that reading it raised; where() its place,
        called only for what is reported: finding a line's number takes long."""
        if isinstance(record, BadRecord):
            if self.on_bad_record == "stop":
                raise UserError(f"{where()}: {record}")
            self._count("skipped", where, record)
        elif problems:
            self._count("malformed", where, problems[0])
        return not isinstance(record, BadRecord)

    def _count(self, name, where, problem):
        self.counts[name] += 1
        if self.counts[name] == 1:
            self.counts[f"first_{name}"] = f"{where()}: {problem}"


def report_problems(path, counts):
    """Say what a Tally of the file at `path` counted."""
    if counts["skipped"]:
        warn(f"{path}: bad records skipped: {counts['skipped']}, the first: {counts['first_skipped']}")
    if counts["malformed"]:
        warn(f"{path}: records with malformed markup, kept as plain text: {counts['malformed']}, "
             f"the first: {counts['first_malformed']}")


def texts(paths, on_bad_record="stop"):
    """Yield every piece of text in records of any shape: what a tokenizer is trained on."""
    for record in records(paths, on_bad_record=on_bad_record):
        if "text" in record:
            yield record["text"]
        for key in ("messages", "chosen", "rejected"):
            for message in record.get(key, []):
                yield from (message[part] for part in ("reasoning_content", "content", "answer") if message.get(part))
                yield from (json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", []))


# --- long text


def text_pieces(path, start=0, end=None):
    """Yield the bytes [start, end) of a .txt file as strings of about 1 MiB, cut after a line end.

    A line of more than 1 MiB is cut between two characters. UserError: bytes that are not UTF-8, or no text at all.
    """
    path = pathlib.Path(path)
    plain = unpacked(path)
    end = plain.stat().st_size if end is None else end
    with open(plain, "rb") as file:
        if start == 0 and file.read(len(BOM)) == BOM:
            start = len(BOM)
        if start >= end:
            raise UserError(f"{path}: the file is empty; it must hold text")
        while start < end:
            file.seek(start)
            piece = file.read(min(PIECE, end - start))
            if start + len(piece) < end and not piece.endswith(b"\n"):
                piece += file.readline(min(PIECE, end - start - len(piece)))
                if start + len(piece) < end and not piece.endswith(b"\n"):
                    piece = piece[:max(k for k in range(-4, 0) if k == -4 or piece[k] & 0xC0 != 0x80)]
            try:
                yield piece.decode("utf-8")
            except UnicodeDecodeError as error:
                at = start + error.start
                raise UserError(f"{path}:{line_number(plain, at)}: the byte at offset {at} is not UTF-8; "
                                "save the file as UTF-8") from None
            start += len(piece)


def text_cut(path, fraction):
    """Byte offset after the first int(fraction * n) of the n characters of a .txt file."""
    plain = unpacked(pathlib.Path(path))

    def characters():    # yields, per chunk, where in it a character starts
        with open(plain, "rb") as file:
            while chunk := file.read(CHUNK):
                yield np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)

    wanted = int(fraction * sum(len(starts) for starts in characters()))
    for chunk_number, starts in enumerate(characters()):
        if wanted < len(starts):
            return chunk_number * CHUNK + int(starts[wanted])
        wanted -= len(starts)
    return plain.stat().st_size


# --- shapes


class BadRecord(Exception):
    """What is wrong with one record; the reader of the file adds where."""


def parse_record(record, kind=None):
    """One JSON object in any of the accepted spellings → (plain record, problems of its markup: a list of str).

    `kind` as in `records`. Raises BadRecord, which names the field.
    """
    kind = kind or guess_kind(record)
    problems = []
    if kind == "document":
        return {"text": string(record, "text")}, problems
    tools = parse_tools(record)
    if kind == "preference":
        prompt = parse_prompt(record["prompt"], "prompt", problems) if "prompt" in record else []
        sides = {}
        for side in ("chosen", "rejected"):
            reply = parse_reply(record, side, problems)
            sides[side] = reply if reply[0]["role"] != "assistant" else prompt + reply    # some repeat the prompt in it
            check_order(sides[side], side)
            if sides[side][-1]["role"] != "assistant":
                raise BadRecord(f'"{side}" must end with an assistant turn')
        return {**sides, "tools": tools}, problems
    messages, field = parse_conversation(record, problems)
    check_order(messages, field)
    if kind == "chat":
        if all(message["role"] != "assistant" for message in messages):
            raise BadRecord(f'"{field}" holds no assistant turn to learn from')
        return {"messages": messages, "tools": tools}, problems
    if kind != "prompt":
        raise ValueError(f"unknown kind of record: {kind}")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    rest = {key: value for key, value in record.items() if key not in CONVERSATION_KEYS}
    return {"answer": None, "checker": None, **rest, "messages": messages, "tools": tools}, problems


def guess_kind(record):
    """Which of the four shapes a record has, by its keys."""
    if "text" in record:
        return "document"
    if "chosen" in record or "rejected" in record:
        return "preference"
    if "checker" in record:
        return "prompt"
    return "chat"


def string(record, field):
    """record[field], which must be there and a string."""
    if field not in record:
        raise BadRecord(f'no "{field}" here (the keys are {", ".join(map(repr, record)) or "none"})')
    if not isinstance(record[field], str):
        raise BadRecord(f'"{field}" is a {type(record[field]).__name__} and must be a string')
    return record[field]


def from_json(value, field):
    """A value that some data sets store as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f'"{field}" is a string that holds no valid JSON ({error})') from None


def parse_tools(record):
    """The record's tools as a list of dicts, or None. MiniMind keeps them on the system message."""
    tools = record.get("tools")
    turns = record.get("conversations", record.get("messages"))
    if not tools and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        tools = turns[0].get("tools")
    tools = from_json(tools, "tools") if tools else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord('"tools" must be a list of objects')
    return tools or None


def parse_conversation(record, problems):
    """The messages of a chat or prompt record, and the name of the field they came from."""
    for field in ("conversations", "messages"):
        if field in record:
            messages = parse_messages(record[field], field, problems)
            break
    else:
        if "prompt" in record:
            field, messages = "prompt", parse_prompt(record["prompt"], "prompt", problems)
            if "completion" in record:
                messages = messages + parse_reply(record, "completion", problems)
        elif "instruction" in record:
            question = string(record, "instruction")
            if record.get("input"):
                question += "\n" + string(record, "input")
            field, messages = "instruction", [{"role": "user", "content": question}]
            if "output" in record:
                messages = messages + parse_reply(record, "output", problems)
        elif "text" in record:
            raise BadRecord('a document ("text") where a conversation is needed; only pretraining reads documents')
        else:
            raise BadRecord(f"no field that we know (the keys are {', '.join(map(repr, record)) or 'none'}); "
                            f"a record holds {SHAPES}")
    if record.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": string(record, "system")}, *messages]
    return messages, field


def parse_prompt(value, field, problems):
    """A prompt: a string (one user turn) or a list of messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return parse_messages(value, field, problems)


def parse_reply(record, field, problems):
    """A reply: a string or one message (the assistant's), or a list of messages."""
    if field not in record:
        raise BadRecord(f'no "{field}" here (the keys are {", ".join(map(repr, record))})')
    value = record[field]
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    return parse_messages([value] if isinstance(value, dict) else value, field, problems)


def parse_messages(turns, field, problems):
    """A list of turns in any spelling → messages."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f'"{field}" must be a list of messages with at least one in it')
    return [parse_message(turn, f"{field}[{number}]", problems) for number, turn in enumerate(turns)]


def parse_message(turn, place, problems):
    """One turn → message. ShareGPT says from and value; OpenAI leaves content null beside tool_calls."""
    if not isinstance(turn, dict):
        raise BadRecord(f'"{place}" is a {type(turn).__name__} and must be an object with "role" and "content"')
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    spelled = turn.get(role_key)
    if not isinstance(spelled, str) or spelled not in ROLES:
        raise BadRecord(f'"{place}.{role_key}" is {spelled!r}; it must be system, user, assistant or tool')
    role, content = ROLES[spelled], turn.get(content_key)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f'"{place}.{content_key}" is {"missing" if content is None else type(content).__name__} '
                        "and must be a string")
    if spelled == "function_call":
        turn, content = {"tool_calls": content}, ""
    message = {"role": role, "content": content}
    if role != "assistant":
        return message
    for part in ("reasoning_content", "answer"):
        if turn.get(part):
            message[part] = string(turn, part)
    if turn.get("tool_calls"):
        message["tool_calls"] = parse_tool_calls(turn["tool_calls"], f"{place}.tool_calls")
    message, problem = lift_structure(message)
    if problem:
        problems.append(f"{place}: {problem}")
    return message


def parse_tool_calls(value, field):
    """Tool calls in OpenAI's spelling or plain → [{"name": str, "arguments": dict}]."""
    value = from_json(value, field)
    calls = [value] if isinstance(value, dict) else value
    wanted = BadRecord(f'"{field}" must be a list of {{"name": string, "arguments": object}}')
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise wanted
    plain = []
    for call in calls:
        call = call.get("function", call)
        if not isinstance(call, dict):
            raise wanted
        arguments = from_json(call.get("arguments") or {}, f"{field}.arguments")
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise wanted
        plain.append({"name": call["name"], "arguments": arguments})
    return plain


def check_order(messages, field):
    """A system turn comes first or not at all, and the first turn after it is the user's."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadRecord(f'"{field}[{roles.index("system", 1)}]" is a system turn; only the first turn can be one')
    if roles[0] == "system":
        roles = roles[1:]
    if not roles or roles[0] != "user":
        raise BadRecord(f'"{field}" must start with a user turn (after the system turn, if there is one), not with '
                        + (f"role {roles[0]}" if roles else "nothing"))
