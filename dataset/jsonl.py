"""Records from disk: find, index, read, validate, normalise.

    records("data/chat.jsonl")              every record, one after the other, in one of four plain shapes
    JsonlFile("data/chat.jsonl").record(7)  record 7, read when asked for

reads   .jsonl, .jsonl.gz (one JSON object per line), .txt, .txt.gz (one long document), folders of them,
        lists and comma-separated lists. Every file is UTF-8.
yields  document    {"text": str}
        chat        {"messages": [...], "tools": [...] or None}
        preference  {"chosen": [...], "rejected": [...], "tools": [...] or None}
        prompt      {"messages": [...], "tools": ..., "answer": ..., "checker": ..., and the record's other keys}
        unpaired    {"messages": [...], "tools": ..., "label": bool}, or a preference, which is two of these
writes  out/cache/  where every line starts, and the unpacked form of .gz files. Delete it whenever no run reads it.

A message is {"role": system | user | assistant | tool, "content": str}; an assistant's may have "reasoning_content",
"answer" and "tool_calls" [{"name", "arguments": dict}]. Data comes in many spellings (README.md lists them) and is
brought to this one here, so nothing downstream ever asks who wrote the file.

Nothing holds a file in memory, nor its index, which is a file itself (`DiskArray`). A bad line names its file, line and
field; `on_bad_record="skip"` counts such lines instead and says so once.
"""

import errno
import functools
import gzip
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import zlib

import numpy as np
from filelock import FileLock, Timeout

from model.errors import UserError
from model.tokenizer import lift_structure

CACHE = pathlib.Path(__file__).resolve().parents[1] / "out" / "cache"
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
CHUNK = 1 << 24    # bytes read at a time while a file is indexed
PIECE = 1 << 16    # bytes of a .txt file that become one string
LINE = np.dtype([("start", np.int64), ("number", np.int64)])    # byte offset of a line that holds a record; from 1
BOM = b"\xef\xbb\xbf"

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}
# How a judgement, a record with "principle", "text" and "answer" (yes or no), becomes a conversation.
JUDGE_TEMPLATE = "Text:\n{text}\n\nQuestion: {principle} Answer yes or no."
SHAPES = ('"text"; "conversations" or "messages"; "prompt" and "completion"; "instruction" and "output"; '
          '"question" and "answer"; "principle", "text" and "answer" (yes or no); "chosen" and "rejected"; or a '
          'conversation with "answer" and "checker"')
CONVERSATION_KEYS = {"conversations", "messages", "prompt", "completion", "instruction", "input", "output", "question",
                     "system", "tools"}


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
        return find_files(parts_of(paths))
    if not path.exists():
        if weight_of(paths)[1] is not None:
            raise UserError(f"{path}: weights belong to the --data of training; leave them out here")
        raise UserError(f"{path}: there is no such file or folder; check the path given with --data")
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not found:
            raise UserError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return found
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: cannot tell what this file holds; its name must end in {', '.join(SUFFIXES)}")
    return [path]


def parts_of(paths):
    """The parts of "a.jsonl, b.jsonl" as a list; what exists under the whole name is one part."""
    if isinstance(paths, list | tuple):
        return list(paths)
    if pathlib.Path(paths).exists():
        return [str(paths)]
    return [part.strip() for part in str(paths).split(",") if part.strip()]


def weight_of(part):
    """("a.jsonl", 0.3) of "a.jsonl:0.3"; the weight is None where there is none, as in "a.jsonl" or "C:\\a.jsonl"."""
    path, _, weight = str(part).rpartition(":")
    if not path or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or pathlib.Path(part).exists():
        return str(part), None
    return path, float(weight)


def shares_of(paths):
    """{path: share} of "a.jsonl:9,b.jsonl:1", the shares made to sum to 1; {} where nothing has a weight.

    UserError: some parts have a weight and some do not, a weight is 0, a part is there twice.
    """
    parts = [weight_of(part) for part in parts_of(paths)]
    if all(weight is None for _, weight in parts):
        return {}
    for path, weight in parts:
        if weight is None:
            raise UserError(f"--data {paths}: {path} has no weight; give every part one (PATH:WEIGHT) or none")
        if not weight:
            raise UserError(f"--data {paths}: the weight of {path} is 0; leave that part out")
    if len(dict(parts)) < len(parts):
        raise UserError(f"--data {paths}: a part is there twice; name each once and give it the sum of its weights")
    total = sum(weight for _, weight in parts)
    return {path: weight / total for path, weight in parts}


def is_text(path):
    """True for one long document, False for a file of JSON lines."""
    return path.name.endswith((".txt", ".txt.gz"))


def cache_path(path, name):
    """Where something derived from the file at `path` is kept: another name as soon as the file changes."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{key}-{name}"


def once(target, make):
    """The file or folder `target` of the cache: made by make(temporary path) unless it is there, and named when whole.

    Processes that want it at once wait for the first. Should that one be killed, the system frees its lock and the
    next starts over.
    """
    if target.exists():
        return target
    temporary = target.with_name(target.name + ".tmp")
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=5)
    except Timeout:
        print(f"waiting for another process that prepares {target.name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if not target.exists():                              # made while we waited
            remove(temporary)                                # the half of a process that was killed
            make(temporary)
            os.replace(temporary, target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"{target.parent}: the disk is full; make room for the tokens of the data") from None
    finally:
        remove(temporary)
        lock.release()
    return target


def remove(path):
    """Delete a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class DiskArray:
    """A one-dimensional numpy array in a file: a slice, or a number, is read when asked for.

    Not a memory map, because the pages of a map that were ever touched count as memory of the process: after an epoch
    that is the whole file. Reads from several threads and forked processes do not disturb each other.
    """

    def __init__(self, path, dtype):
        self.path, self.dtype = pathlib.Path(path), np.dtype(dtype)
        self.size = self.path.stat().st_size // self.dtype.itemsize

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not isinstance(index, slice):
            index = range(self.size)[index]                  # IndexError beyond the end; -1 is the last
            return self[index:index + 1][0]
        start, stop, _ = index.indices(self.size)
        width = self.dtype.itemsize
        return np.frombuffer(read_at(self.path, start * width, max(stop - start, 0) * width), self.dtype)


@functools.lru_cache(maxsize=256)    # a folder of thousands of files must not use up the open files of the process
def opened(path):
    return open(path, "rb", buffering=0)


POSITION = threading.Lock()


def read_at(path, start, size):
    """The bytes [start, start + size) of a file that stays as it is."""
    file = opened(path)
    if hasattr(os, "pread"):                                 # Windows has no read that leaves the position alone
        return os.pread(file.fileno(), size, start)
    with POSITION:
        file.seek(start)
        return file.read(size)


def unpacked(path):
    """The path itself, or for .gz its unpacked copy in the cache: random access needs one."""
    if path.suffix != ".gz":
        return path
    return once(cache_path(path, path.stem), functools.partial(unpack, path))


def unpack(path, target):
    progress = Progress(f"unpacking {path.name}")
    try:
        with gzip.open(path, "rb") as source, open(target, "wb") as out:
            while chunk := source.read(CHUNK):
                out.write(chunk)
                progress.add(len(chunk))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again or unpack it yourself") from None


class Progress:
    """`label 42 %` on stderr (MB where no total is known), every two seconds if it changed: nothing for short work."""

    def __init__(self, label, total=0):
        self.label, self.total = label, total
        self.done, self.said, self.share = 0, time.monotonic(), ""

    def add(self, amount):
        self.done += amount
        if time.monotonic() - self.said > 2:
            share = f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done / 1e6:.0f} MB"
            if share != self.share:
                print(f"{self.label} {share}", file=sys.stderr, flush=True)
            self.said, self.share = time.monotonic(), share


@functools.cache    # once per process, however many datasets read the same file
def warn(message):
    """One line on stderr about data that was left out or read differently than its author may think."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# --- lines


def line_index(path):
    """Every line that is not empty, (n,) LINE, a DiskArray. Found once, then kept in the cache."""
    return DiskArray(once(cache_path(path, "lines"), functools.partial(write_line_index, path)), LINE)


def write_line_index(path, target):
    progress = Progress(f"indexing {path.name}", path.stat().st_size)
    number, new_line = 1, True                               # the line of the next byte; whether it starts one
    with open(path, "rb") as source, open(target, "wb") as out:
        position = len(BOM) if source.read(len(BOM)) == BOM else 0
        source.seek(position)
        while chunk := source.read(CHUNK):
            octets = np.frombuffer(chunk, np.uint8)
            starts = np.flatnonzero(octets[:-1] == 10) + 1
            lines = np.empty(len(starts) + new_line, LINE)
            lines["start"][new_line:] = starts
            lines["number"] = number + np.arange(len(lines)) + (not new_line)
            lines["start"][:new_line] = 0
            first = octets[lines["start"]]
            lines = lines[(first != 10) & (first != 13)]
            lines["start"] += position
            lines.tofile(out)
            number += len(starts) + (chunk[-1] == 10)
            position, new_line = position + len(chunk), chunk[-1] == 10
            progress.add(len(chunk))


def line_number(path, offset):
    """Which line, counted from 1, holds the byte at `offset`. Reads up to there: for error messages only."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK, offset))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


class JsonlFile:
    """The records of one .jsonl or .jsonl.gz file by number; a line is read when asked for."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.plain = unpacked(self.path)
        self.lines = line_index(self.plain)
        if not len(self.lines):
            raise UserError(f"{self.path}: the file is empty; it must hold one JSON object per line")

    def __len__(self):
        return len(self.lines)

    def where(self, number):
        """`file:line` of a record."""
        return f"{self.path}:{self.lines[number]['number']}"

    def record(self, number, kind=None):
        """(Record `number` in its plain shape, problems of its markup), see `parse_record`. UserError: a bad line."""
        with open(self.plain, "rb") as file:
            file.seek(int(self.lines[number]["start"]))
            try:
                return parse_record(load_json(file.readline()), kind)
            except BadRecord as error:
                raise UserError(f"{self.where(number)}: {error}") from None

    def each(self, kind=None, first=0, last=None):
        """Yield (number, record, problems) of records first … last - 1; the record of a bad line is the BadRecord."""
        numbers = range(len(self))[first:last]
        with open(self.plain, "rb") as file:
            file.seek(int(self.lines[first]["start"]))
            lines = (line for line in file if line[0] not in b"\r\n")
            for number in numbers:
                line = next(lines, None)
                if line is None:
                    raise UserError(f"{self.path}: became shorter while it was read; start again when it is whole")
                try:
                    yield number, *parse_record(load_json(line), kind)
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

    kind: "document", "chat", "preference", "prompt", "unpaired", or None to tell by the record's keys. A .txt file
    comes as documents of about 64 KiB. on_bad_record: "stop" raises UserError with file:line; "skip" leaves the line
    out and says on stderr how many there were.
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
        """True if the record can be used. `record` may be the BadRecord that reading it raised; where() its place."""
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
    """Yield the bytes [start, end) of a .txt file as strings of about 64 KiB, cut after a line end.

    A line of more than 64 KiB is cut between two characters. UserError: bytes that are not UTF-8, or no text at all.
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
    """Byte offset after the first int(fraction * n) of the n characters of a .txt file; kept in the cache."""
    plain = unpacked(pathlib.Path(path))
    target = once(cache_path(plain, f"cut-{fraction}"), functools.partial(write_text_cut, plain, fraction))
    return int(target.read_text(encoding="ascii"))


def write_text_cut(path, fraction, target):
    def characters():    # yields, per chunk, at which of its bytes a character starts
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield (np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80

    wanted = int(fraction * sum(int(np.count_nonzero(starts)) for starts in characters()))
    cut = 0
    for starts in characters():
        count = int(np.count_nonzero(starts))
        if wanted < count:
            cut += int(np.flatnonzero(starts)[wanted])
            break
        wanted, cut = wanted - count, cut + len(starts)
    target.write_text(str(cut), encoding="ascii")


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
    if kind == "preference" or (kind == "unpaired" and "label" not in record and "chosen" in record):
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
    if kind == "unpaired":
        if messages[-1]["role"] != "assistant":
            raise BadRecord(f'"{field}" must end with an assistant turn, which the label is about')
        if record.get("label") not in (True, False):                      # 1 and 0 are these too
            raise BadRecord('"label" must be there and be true (a good answer) or false (a bad one)')
        return {"messages": messages, "tools": tools, "label": bool(record["label"])}, problems
    if kind != "prompt":
        raise ValueError(f"unknown kind of record: {kind}")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    rest = {key: value for key, value in record.items() if key not in CONVERSATION_KEYS}
    if field == "question" and "checker" not in record:
        rest |= final_result(record["answer"])
    return {"answer": None, "checker": None, **rest, "messages": messages, "tools": tools}, problems


def final_result(answer):
    """What a worked answer comes to, and how to check it. GSM8K writes the result after ####: "16 - 9 = 7\n#### 7"."""
    result = answer.rpartition("####")[2].strip()
    number = result.replace(",", "")
    if re.fullmatch(r"-?\d+", number):
        return {"answer": number, "checker": "number"}
    return {"answer": result, "checker": "phrase"}


def guess_kind(record):
    """Which of the four shapes a record has, by its keys."""
    if "principle" in record:
        return "chat"
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
        elif "question" in record:
            field, messages = "question", [{"role": "user", "content": string(record, "question")}]
            messages = messages + parse_reply(record, "answer", problems)
        elif "principle" in record:
            field, messages = "principle", parse_judgement(record)
        elif "text" in record:
            raise BadRecord('a document ("text") where a conversation is needed; only pretraining reads documents')
        else:
            raise BadRecord(f"no field that we know (the keys are {', '.join(map(repr, record)) or 'none'}); "
                            f"a record holds {SHAPES}")
    if record.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": string(record, "system")}, *messages]
    return messages, field


def parse_judgement(record):
    """A yes/no question about a text as a conversation."""
    if record.get("answer") not in ("yes", "no"):
        raise BadRecord(f'"answer" is {record.get("answer")!r}; that of a judgement must be "yes" or "no"')
    question = judge_prompt(string(record, "principle"), string(record, "text"))
    return [*question, {"role": "assistant", "content": record["answer"]}]


def judge_prompt(principle, text, template=JUDGE_TEMPLATE):
    """The messages that ask whether a text fulfils a principle; a template has {text} and {principle} in it."""
    values = {"principle": principle, "text": text}
    return [{"role": "user", "content": re.sub(r"\{(principle|text)\}", lambda name: values[name[1]], template)}]


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
