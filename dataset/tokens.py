"""Tokens on disk: the records of a file, tokenised once and kept in out/cache/.

    store = token_store(path, "chat", tokenizer, max_len=512)
    store.texts[7]                  where the tokens of record 7 are, and what is known about them (TEXT)
    store.tokens[start:start + size], store.mask[start:start + size]

A changed file, tokenizer, chat template or line of this code makes a new entry. Of several processes that want the same
store one builds it. A large file is divided between as many processes as there are cores; each is this file, run as a
script, and imports no more than it needs.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not dataset/

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from bisect import bisect_left, bisect_right

import numpy as np

from dataset import jsonl
from dataset.builtin.checkers import as_expected
from dataset.jsonl import (
    BadRecord,
    DiskArray,
    JsonlFile,
    Progress,
    Tally,
    cache_path,
    is_text,
    once,
    report_problems,
    text_pieces,
)
from model.errors import UserError
from model.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 18    # about this much text is tokenised at a time
BATCH_PIECES = 16             # of a .txt file
PART = 1 << 25                # bytes of a file that are worth a process of their own
MOST_PROCESSES = 16
CONVERSATIONS = ("chat", "preference", "unpaired")              # kinds with a loss mask, which a chat template makes

# A text: its first token, its tokens, the raw UTF-8 bytes of what its loss is about, the loss_mask ones in it, and how
# many tokens of the record did not fit. A record that was skipped or dropped is a text of size 0.
TEXT = np.dtype([(name, np.int64) for name in ("start", "size", "num_bytes", "num_targets", "lost")])


class TokenStore:
    """What is on disk: texts (n,) TEXT, one for each record of the file at `path`; tokens; mask, None for documents."""

    def __init__(self, folder, path):
        self.folder, self.path = folder, path
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.texts = DiskArray(folder / "texts.bin", TEXT)
        self.tokens = DiskArray(folder / "tokens.bin", self.meta["dtype"])
        self.mask = DiskArray(folder / "mask.bin", np.uint8) if self.meta["has_mask"] else None

    def where(self, start, size, token_bytes):
        """The record that holds the tokens [start, start + size), as "file:line"; of a .txt file, the bytes."""
        if not is_text(self.path):
            return JsonlFile(self.path).where(bisect_right(self.texts, start, key=lambda text: text["start"]) - 1)

        def bytes_of(begin, stop):
            return sum(int(token_bytes[self.tokens[at:min(at + BATCH_CHARACTERS, stop)]].sum())
                       for at in range(begin, stop, BATCH_CHARACTERS))

        first = self.meta["first_byte"] + bytes_of(0, start)
        return f"{self.path}: bytes {first}-{first + bytes_of(start, start + size)}"


class StoreWriter:
    """Writes the files of a TokenStore into a new folder, text by text. A context: leaving it closes the files."""

    def __init__(self, folder, vocab_size, has_mask):
        self.folder, self.has_mask = folder, has_mask
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.start = self.written = 0                       # where the text being written starts; tokens so far
        folder.mkdir()
        self.files = contextlib.ExitStack()
        self.tokens, self.mask, self.texts = (self.files.enter_context(open(folder / f"{name}.bin", "wb"))
                                              for name in ("tokens", "mask", "texts"))

    def extend(self, ids):
        """Add ids to the text being written."""
        self.tokens.write(np.asarray(ids, self.dtype))
        self.written += len(ids)

    def close_text(self, num_bytes=0, num_targets=0, mask=(), lost=0):
        """End the text being written (of no tokens: the record was left out)."""
        self.mask.write(np.asarray(mask, np.uint8))
        self.texts.write(np.array((self.start, self.written - self.start, num_bytes, num_targets, lost), np.int64))
        self.start = self.written

    def finish(self, **meta):
        meta = {"dtype": self.dtype, "has_mask": self.has_mask, **meta}
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.files.close()


@functools.cache
def code_fingerprint(*files):
    """Hash of code: whoever edits it must not be shown what it made before."""
    return hashlib.sha256(b"".join(pathlib.Path(file).read_bytes() for file in files)).hexdigest()


def hashed(*parts):
    """Twenty hex digits that stand for `parts`."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def token_store(path, kind, tokenizer, on_bad_record="stop", **settings):
    """The TokenStore of a file, from the cache or built now.

    kind: "document", "chat", "preference", "unpaired" and "prompt" records, or "text" for a .txt file. settings: what
    else decides the tokens: max_len for conversations, the bytes start … end for a text.
    """
    code = code_fingerprint(__file__, jsonl.__file__, sys.modules[Tokenizer.__module__].__file__)
    key = hashed(code, tokenizer.fingerprint, tokenizer.chat_template if kind in (*CONVERSATIONS, "prompt") else None,
                 on_bad_record, settings)
    task = {"path": str(path), "kind": kind, "on_bad_record": on_bad_record, "settings": settings}
    store = TokenStore(once(cache_path(path, f"{kind}-{key}"), functools.partial(build, task, tokenizer)), path)
    report_problems(path, store.meta)
    return store


def build(task, tokenizer, folder):
    """Make the folder of a store: here, or for a large file in several processes."""
    path = pathlib.Path(task["path"])
    if task["kind"] == "text":
        progress = Progress(f"tokenising {path.name}", task["settings"]["end"] - task["settings"]["start"])
        return tokenise(task, tokenizer, folder, progress.add)
    file = JsonlFile(path)
    progress = Progress(f"tokenising {path.name}", len(file))
    parts = min(cores(), MOST_PROCESSES, file.plain.stat().st_size // PART, len(file))
    if parts < 2:
        return tokenise({**task, "first": 0, "last": len(file)}, tokenizer, folder, progress.add)
    bounds = np.linspace(0, len(file), parts + 1).astype(int).tolist()
    tasks = [{**task, "first": first, "last": last} for first, last in itertools.pairwise(bounds)]
    return tokenise_in_processes(tasks, tokenizer, folder, progress.add)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tokenise(task, tokenizer, folder, add):
    """Write the store of a task into a new folder. add(n) is called for every n records (of a .txt file: bytes)."""
    write = {"document": write_documents, "chat": write_chats, "text": write_text, "preference": write_preferences,
             "unpaired": write_unpaired, "prompt": write_prompts}[task["kind"]]
    tally = Tally(task["on_bad_record"])
    with StoreWriter(folder, tokenizer.vocab_size, has_mask=task["kind"] in CONVERSATIONS) as writer:
        extra = write(task, tokenizer, writer, tally, add, **task["settings"])
        writer.finish(**tally.counts, **extra)


# --- the records of one file


def records_of(task):
    """(records of the part of the file that a task is about, `place`: record number → file:line)"""
    file = JsonlFile(task["path"])
    return file.each(task["kind"], task["first"], task["last"]), file.where


def write_documents(task, tokenizer, writer, tally, add):
    """Every {"text"} record of a jsonl file as <bos> text <eos>."""
    records, place = records_of(task)
    texts, characters = [], 0                               # None: a record without text

    def flush():
        encoded = iter(tokenizer.encode_batch([text for text in texts if text]))
        for text in texts:
            if text:
                ids = next(encoded)
                writer.extend([tokenizer.bos_id, *ids, tokenizer.eos_id])
                writer.close_text(len(text.encode()), len(ids) + 1)
            else:
                writer.close_text()
        add(len(texts))
        texts.clear()

    for number, record, problems in records:
        usable = tally.accept(record, problems, functools.partial(place, number))
        texts.append(record["text"] if usable else None)
        characters += len(texts[-1] or "")
        if characters > BATCH_CHARACTERS or len(texts) > 10_000:
            flush()
            characters = 0
    flush()
    return {}


def write_text(task, tokenizer, writer, tally, add, start, end):
    """The bytes [start, end) of a .txt file as one document."""
    writer.extend([tokenizer.bos_id])
    pieces, num_bytes = text_pieces(task["path"], start, end), 0
    while batch := list(itertools.islice(pieces, BATCH_PIECES)):
        for ids in tokenizer.encode_batch(batch):           # on all cores, where the library can
            writer.extend(ids)
        size = sum(len(piece.encode()) for piece in batch)
        num_bytes += size
        add(size)
    writer.extend([tokenizer.eos_id])
    writer.close_text(num_bytes, writer.written - 1)
    return {"first_byte": start}


def write_chats(task, tokenizer, writer, tally, add, max_len, strict_markup=False):
    """Every conversation of a jsonl file with its mask, shortened to max_len by whole turns.

    strict_markup: a record whose <think> … is malformed is a bad record; else it is kept, its tags as plain text.
    """
    records, place = records_of(task)
    too_long = 0
    for number, record, problems in records:
        if strict_markup and problems:
            record = BadRecord(problems[0])
        ids, mask, lost = [], [], 0
        where = functools.partial(place, number)
        if tally.accept(record, problems, where):
            try:
                ids, mask, lost = render_to_fit(record, tokenizer, max_len)
            except UserError as error:                      # the chat template refuses
                tally.accept(BadRecord(str(error)), [], where)
            else:
                too_long += not ids
        mask[:1] = [0] * len(mask[:1])
        writer.extend(ids)
        targets = np.asarray(ids, np.int64)[np.asarray(mask, bool)]
        writer.close_text(int(tokenizer.token_bytes[targets].sum()), len(targets), mask, lost)
        if (number + 1) % 100 == 0:
            add(100)
    return {"too_long": too_long}


def render_to_fit(record, tokenizer, max_len):
    """(ids, mask, tokens lost) of a chat record in at most max_len tokens; ids is [] if that cannot be.

    What does not fit loses its oldest exchange (a user's turn with all that answers it), then the next, never part
    of one; the system turn stays. It cannot be where even the last exchange is too long or holds no target.
    """
    messages = record["messages"]
    system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    starts = exchange_starts(rest)

    def render(first):
        return tokenizer.render(system + rest[first:], tools=record["tools"])

    ids, mask = render(0)
    whole = len(ids)
    if whole > max_len:                                     # the fewer exchanges, the fewer tokens
        first = bisect_left(starts, True, lo=1, key=lambda start: len(render(start)[0]) <= max_len)
        ids, mask = render(starts[first]) if first < len(starts) else ([], [])
    if not any(mask[1:]):
        ids, mask = [], []
    return ids, mask, whole - len(ids)


def exchange_starts(messages):
    """The numbers of the user's turns that open an exchange (a second one in a row belongs to the first)."""
    return [number for number, message in enumerate(messages)
            if message["role"] == "user" and (number == 0 or messages[number - 1]["role"] != "user")]


def write_prompts(task, tokenizer, writer, tally, add, max_len):
    """Every prompt of a jsonl file up to where the assistant begins, shortened to max_len by whole turns.

    There is no loss on prompts, so two columns of TEXT hold something else: num_targets is 1 for a prompt with a
    checker, num_bytes 1 for one with an answer. A checker that nothing can pass makes a bad record.
    """
    records, place = records_of(task)
    for number, record, problems in records:
        ids, lost = [], 0
        where = functools.partial(place, number)
        if tally.accept(record, problems, where):
            try:
                if record["checker"] is not None:
                    as_expected(record["checker"], record["answer"])
                _, ids, lost = prompt_to_fit(record, tokenizer, max_len)
            except UserError as error:                      # or the chat template refuses
                tally.accept(BadRecord(str(error)), [], where)
        writer.extend(ids)
        has = {name: int(bool(ids) and record[name] is not None) for name in ("answer", "checker")}
        writer.close_text(has["answer"], has["checker"], lost=lost)
        if (number + 1) % 100 == 0:
            add(100)
    return {}


def prompt_to_fit(record, tokenizer, max_len):
    """(messages, ids, tokens lost) of a prompt in at most max_len tokens, to be continued by the assistant.

    Loses its oldest exchanges as a chat does (`render_to_fit`); ids is [] where even the last one is too long.
    """
    messages = record["messages"]
    system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    starts = exchange_starts(rest)

    def render(first):
        return tokenizer.render(system + rest[first:], record["tools"], add_generation_prompt=True)[0]

    first, ids = 0, render(0)
    whole = len(ids)
    if whole > max_len:
        place = bisect_left(starts, True, lo=1, key=lambda start: len(render(start)) <= max_len)
        first, ids = (starts[place], render(starts[place])) if place < len(starts) else (len(rest), [])
    return system + rest[first:], ids, whole - len(ids)


# --- preferences: a text holds several sides, one behind the other. In its mask 0 and 1 are as in a chat's; the first
# token of a side, which is never a target, has SIDE instead, or GOOD_SIDE where the side ends a desirable item.

SIDE, GOOD_SIDE = 2, 3


def write_preferences(task, tokenizer, writer, tally, add, max_len):
    """Every pair of a jsonl file: the chosen conversation and, right behind it, the rejected one."""
    def sides(number, items, first):
        pair = [completed(cut(prompt, first), completion, tools, tokenizer)
                for prompt, completion, tools, _ in items]
        (chosen, _, opening), (rejected, _, other_opening) = pair
        if opening != other_opening or chosen[:opening] != rejected[:opening]:
            raise BadRecord("the chat template lays out the shared turns differently before the two sides; use "
                            "--chat_template chatml")
        return [(ids, [SIDE, *mask[1:]]) for ids, mask, _ in pair]

    return write_sides(task, tokenizer, writer, tally, add, max_len, sides)


def write_unpaired(task, tokenizer, writer, tally, add, max_len):
    """Every judged conversation of a jsonl file, and behind it the same prompt with the answer of another record.

    A preference is two of them. The other record lies a fixed part of the file away, because neighbours are often
    about the same prompt.
    """
    file = JsonlFile(task["path"])
    far = max(1, int(0.382 * len(file)))

    def strangers(number):
        for other in (number + far + np.arange(len(file) - 1)) % len(file):
            try:
                items = items_of(file.record(int(other), "unpaired")[0]) if other != number else []
            except (BadRecord, UserError):                  # it is told of, or counted, when its turn comes
                continue
            if items and all(map(speaks, items)):
                return [completed(*item[:3], tokenizer) for item in items]
        raise BadRecord("there is no other usable record in the file, and unpaired preferences compare with one")

    def sides(number, items, first):
        both, foreign = [], strangers(number)
        for place, (prompt, completion, tools, desirable) in enumerate(items):
            ids, mask, opening = completed(cut(prompt, first), completion, tools, tokenizer)
            other_ids, other_mask, start = foreign[place % len(foreign)]
            both.append((ids, [SIDE, *mask[1:]]))
            both.append((ids[:opening] + other_ids[start:], [GOOD_SIDE if desirable else SIDE, *mask[1:opening],
                                                             *other_mask[start:]]))
        return both

    return write_sides(task, tokenizer, writer, tally, add, max_len, sides)


def write_sides(task, tokenizer, writer, tally, add, max_len, sides_of):
    """Every record of a jsonl file as the sides [(ids, mask)] that sides_of(number, items, first) makes of it.

    first: the turn that the prompt begins with. The sides together have at most max_len tokens: what does not fit loses
    the oldest exchanges of its prompt, all sides the same ones (see `render_to_fit`).
    """
    records, place = records_of(task)
    left_out = {"too_long": 0, "empty": 0}
    for number, record, problems in records:
        sides, lost = [], 0
        where = functools.partial(place, number)
        if tally.accept(record, problems, where):
            try:
                items = items_of(record)
                if all(map(speaks, items)):
                    sides, lost = fit_sides(functools.partial(sides_of, number, items), items[0][0], max_len)
                    left_out["too_long"] += not sides
                else:
                    left_out["empty"] += 1
            except (BadRecord, UserError) as error:         # UserError: the chat template refuses
                tally.accept(BadRecord(str(error)), [], where)
        ids, mask = ([x for side in sides for x in side[part]] for part in (0, 1))
        writer.extend(ids)
        targets = np.asarray(ids, np.int64)[np.asarray(mask, np.uint8) == 1]
        writer.close_text(int(tokenizer.token_bytes[targets].sum()), len(targets), mask, lost)
        if (number + 1) % 100 == 0:
            add(100)
    return left_out


def items_of(record):
    """What a record judges: [(prompt, completion, tools, desirable)], prompt and completion lists of messages.

    Of a preference, its two sides: the prompt is the turns in which they agree, so that the loss is on the rest only.
    """
    if "messages" in record:
        return [(record["messages"][:-1], record["messages"][-1:], record["tools"], record["label"])]
    chosen, rejected = record["chosen"], record["rejected"]
    if chosen == rejected:
        raise BadRecord('"chosen" and "rejected" are the same; remove the record, it prefers nothing')
    most = min(len(chosen), len(rejected)) - 1              # each side keeps a turn of its own
    shared = next((turn for turn in range(most) if chosen[turn] != rejected[turn]), most)
    if not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        raise BadRecord(f'"chosen" and "rejected" part at turn {shared}, which is not the assistant on '
                        "both sides; they must answer the same prompt")
    return [(side[:shared], side[shared:], record["tools"], side is chosen) for side in (chosen, rejected)]


def speaks(item):
    """Whether the completion of an item says anything."""
    parts = ("content", "reasoning_content", "answer", "tool_calls")
    return any(message.get(part) for message in item[1] if message["role"] == "assistant" for part in parts)


def cut(prompt, first):
    """The prompt from turn `first` on, and its system turn."""
    return [message for turn, message in enumerate(prompt) if turn >= first or message["role"] == "system"]


def completed(prompt, completion, tools, tokenizer):
    """(ids, mask, opening) of a conversation: mask is 1 on the completion's targets, ids[:opening] lie before them."""
    _, earlier = tokenizer.render(prompt, tools=tools)
    ids, mask = tokenizer.render(prompt + completion, tools=tools)
    targets = np.flatnonzero(mask)[sum(earlier):]           # those of the assistant's turns in the prompt come first
    if not len(targets):
        raise BadRecord("the chat template leaves nothing of the answer; use --chat_template chatml")
    mask = np.zeros(len(ids), int)
    mask[targets] = 1
    return ids, mask.tolist(), int(targets[0])


def fit_sides(sides_of, prompt, max_len):
    """(sides, tokens lost): the sides of the fewest dropped exchanges of the prompt that fit; [] if none do."""
    def size(sides):
        return sum(len(ids) for ids, _ in sides)

    sides, starts = sides_of(0), exchange_starts(prompt)
    whole = size(sides)
    if whole > max_len:
        first = bisect_left(starts, True, lo=min(1, len(starts)), key=lambda start: size(sides_of(start)) <= max_len)
        sides = sides_of(starts[first]) if first < len(starts) else []
    return sides, whole - size(sides)


# --- several processes


def tokenise_in_processes(tasks, tokenizer, folder, add):
    """As `tokenise`, a process for each task: parts of one file, in its order."""
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    parts = [folder / str(number) for number in range(len(tasks))]
    children = []
    pool = concurrent.futures.ThreadPoolExecutor(len(tasks))
    try:
        for task, part in zip(tasks, parts, strict=True):
            child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}, text=True)
            children.append(child)
            child.stdin.write(json.dumps({**task, "tokenizer": str(folder / "tokenizer"), "folder": str(part),
                                          "cache": str(jsonl.CACHE)}))
            child.stdin.close()
        for _ in pool.map(functools.partial(follow, add=add), children):
            pass                                            # in order: of two errors, the first in the file is told
    finally:
        for child in children:
            child.kill()
            child.wait()
        pool.shutdown()
        for child in children:
            child.stdout.close()
    join_parts(parts, folder)
    shutil.rmtree(folder / "tokenizer")


def follow(child, add):
    """Read what a child process says until it ends: numbers of records done, or what is wrong with one."""
    for line in child.stdout:
        if line.startswith("{"):
            raise UserError(json.loads(line)["error"])
        add(int(line))
    if child.wait():
        raise RuntimeError(f"a process that tokenises ended with exit code {child.returncode}")


def join_parts(parts, folder):
    """Make one store in `folder` of those in `parts`, which go."""
    metas = [json.loads((part / "meta.json").read_text(encoding="utf-8")) for part in parts]
    merged = {name: sum(meta[name] for meta in metas) if isinstance(value, int) and not isinstance(value, bool)
              else next((meta[name] for meta in metas if meta[name]), value) for name, value in metas[0].items()}
    width, num_tokens = np.dtype(merged["dtype"]).itemsize, 0
    with contextlib.ExitStack() as files:
        tokens, mask, texts = (files.enter_context(open(folder / f"{name}.bin", "wb"))
                               for name in ("tokens", "mask", "texts"))
        for part in parts:
            with open(part / "texts.bin", "rb") as source:
                while len(some := np.fromfile(source, TEXT, 1 << 16)):
                    some["start"] += num_tokens
                    some.tofile(texts)
            for name, target in (("tokens", tokens), ("mask", mask)):
                with open(part / f"{name}.bin", "rb") as source:
                    shutil.copyfileobj(source, target, jsonl.CHUNK)
            num_tokens += (part / "tokens.bin").stat().st_size // width
            shutil.rmtree(part)
    (folder / "meta.json").write_text(json.dumps(merged), encoding="utf-8")


def work():
    """What a child process does: the task that it reads, saying how far it is. It ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's to answer
    task = json.loads(sys.stdin.read())
    jsonl.CACHE = pathlib.Path(task["cache"])
    try:
        tokenise(task, Tokenizer.load(task["tokenizer"]), pathlib.Path(task["folder"]),
                 add=lambda number: print(number, flush=True))
    except BrokenPipeError:                                 # the parent has gone
        os._exit(1)
    except (UserError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    work()
