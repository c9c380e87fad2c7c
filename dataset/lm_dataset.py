"""Tokens in rows: from records to what a model is trained on.

    data = PretrainDataset("data/wiki.jsonl", tokenizer, max_len=512, split="train")
    data[0]         {"input_ids", "loss_mask", "segment_ids", "positions"}, each (T,) with T = max_len
    collate([data[0], data[1]])                                       the same as torch tensors (B, T)

Which stage reads which class: pretraining PretrainDataset; full_sft and lora SFTDataset. (Preference pairs for reward
and dpo, and prompts for the reinforcement-learning stages, get a PreferenceDataset and a PromptDataset here.)

A row holds several texts one after the other, so that no compute is spent on padding:

    input_ids     <e>  The  cat  sat  <e>  <e>  A  dog  <e>  <pad>     <e> = <|endoftext|>, opens and closes a document
    loss_mask      0    1    1    1    1    0   1   1    1     0       1 = the model must emit this token
    segment_ids    1    1    1    1    1    2   2   2    2     0       which text of the row; 0 = padding
    positions      0    1    2    3    4    0   1   2    3     0       restart with each text

The mask is *target-aligned*: loss_mask[t] speaks of input_ids[t], which is predicted from the tokens before it in its
segment. The first token of a segment has nothing before it and is never a target.

Tokenising is done once and kept in out/cache/ (uint16 or uint32 tokens, memory-mapped); a changed file, tokenizer or
chat template makes a new entry. Neither the text nor the tokens of a file are ever in memory as a whole.
"""

import functools
import hashlib
import json
import pathlib
import random
import shutil
import time
from array import array
from bisect import bisect_right, insort

import numpy as np
import torch

from dataset import jsonl
from dataset.jsonl import (
    BadRecord,
    JsonlFile,
    Progress,
    Tally,
    beside,
    find_files,
    is_text,
    publish,
    report_problems,
    text_cut,
    text_pieces,
    warn,
)
from model.errors import UserError

BATCH_CHARACTERS = 1 << 20    # about this much text is tokenised at a time


# --- packing: which piece of which text goes into which row


def plan_rows(lengths, max_len, cut):
    """Lay texts of the given token counts into rows of `max_len` tokens.

    Returns (pieces (P, 3) int64, rows (R + 1,) int64): row r holds pieces[rows[r]:rows[r + 1]], and a piece
    (text, start, end) stands for tokens start … end - 1 of that text. A function of its arguments alone. Texts of
    length 0 are left out.

    Best fit: a row takes the longest text that still fits, again and again (as nanochat's loader does, without
    throwing the cropped ends away). When nothing fits,
      cut=False  the rest of the row stays empty; no text may be longer than a row
      cut=True   the longest text is cut to fill the row. Its two pieces share one token, target of the first and
                 context of the second, so every token but a text's first is a target exactly once. Every row but
                 the last is full (but for one slot when only two-token pieces are left). A text longer than a row
                 first fills whole rows, one after the other.
    """
    text, start, end, rows = array("q"), array("q"), array("q"), array("q", [0])

    def place(piece):
        text.append(piece[0])
        start.append(piece[1])
        end.append(piece[2])

    waiting = {}                                          # length → pieces of that length, used from the end
    for number in np.argsort(-np.asarray(lengths), kind="stable")[::-1].tolist():
        length, begin = int(lengths[number]), 0
        while length - begin > max_len:
            place((number, begin, begin + max_len))
            rows.append(len(text))
            begin += max_len - 1
        if length:
            waiting.setdefault(length - begin, []).append((number, begin, length))
    sizes = sorted(waiting)                               # the lengths of which there are pieces

    def put_back(piece):
        size = piece[2] - piece[1]
        if not waiting.setdefault(size, []):
            insort(sizes, size)
        waiting[size].append(piece)

    def take(index):
        size = sizes[index]
        piece = waiting[size].pop()
        if not waiting[size]:
            del sizes[index]
        return piece

    space = max_len
    while sizes:
        index = bisect_right(sizes, space) - 1            # the longest that fits
        if cut and index >= 0 and sizes[index] == space - 1:
            index -= 1                                    # would leave one slot, in which nothing can be predicted
        if index >= 0:
            piece = take(index)
            place(piece)
            space -= piece[2] - piece[1]
        elif cut and (sizes[-1] > space or (space > 3 and len(waiting[sizes[-1]]) > 1)):
            # Cut the longest to fill the space. Where all that wait are one token short of it, halve one: the halves
            # share a token, so together they fill it.
            number, begin, stop = take(len(sizes) - 1)
            size = space if stop - begin > space else space // 2
            place((number, begin, begin + size))
            put_back((number, begin + size - 1, stop))
            space -= size
        else:
            if cut:                                       # the last piece, or two-token pieces only
                place(take(0))
            space = 0
        if space < 2:
            rows.append(len(text))
            space = max_len
    if space < max_len:
        rows.append(len(text))
    return np.stack([np.asarray(column, np.int64) for column in (text, start, end)], axis=1), np.asarray(rows, np.int64)


# --- the cache of tokens


class TokenStore:
    """The tokens of the records of one file, memory-mapped. Text d is tokens[offsets[d]:offsets[d + 1]].

    A record that was skipped or dropped is a text of no tokens, so text numbers are record numbers.
    num_bytes (n,): raw UTF-8 bytes of what the loss of text d is about; num_targets (n,): loss_mask ones in it.
    """

    def __init__(self, folder):
        self.folder = folder
        with open(folder / "meta.json", encoding="utf-8") as file:
            self.meta = json.load(file)
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.num_bytes = np.load(folder / "num_bytes.npy", mmap_mode="r")
        self.num_targets = np.load(folder / "num_targets.npy", mmap_mode="r")
        self.tokens = self._map("tokens.bin", self.meta["dtype"])
        self.mask = self._map("mask.bin", np.uint8) if self.meta["has_mask"] else None

    def _map(self, name, dtype):
        path = self.folder / name
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def __reduce__(self):    # a pickled memmap would carry all tokens along
        return TokenStore, (self.folder,)


class StoreWriter:
    """Writes the files of a TokenStore into a folder, text by text."""

    def __init__(self, folder, vocab_size, has_mask):
        self.folder, self.has_mask = folder, has_mask
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.tokens = open(folder / "tokens.bin", "wb")
        self.mask = open(folder / "mask.bin", "wb") if has_mask else None
        self.offsets, self.num_bytes, self.num_targets = array("q", [0]), array("q"), array("q")
        self.written = 0

    def extend(self, ids):
        """Add ids to the text being written."""
        np.asarray(ids, self.dtype).tofile(self.tokens)
        self.written += len(ids)

    def close_text(self, num_bytes=0, num_targets=0, mask=()):
        """End the text being written (of no tokens: the record was left out)."""
        if self.has_mask:
            np.asarray(mask, np.uint8).tofile(self.mask)
        self.offsets.append(self.written)
        self.num_bytes.append(num_bytes)
        self.num_targets.append(num_targets)

    def finish(self, **meta):
        self.close()
        for name in ("offsets", "num_bytes", "num_targets"):
            np.save(self.folder / f"{name}.npy", np.asarray(getattr(self, name), np.int64))
        with open(self.folder / "meta.json", "w", encoding="utf-8") as file:
            json.dump({"dtype": self.dtype, "has_mask": self.has_mask, **meta}, file)

    def close(self):
        self.tokens.close()
        if self.has_mask:
            self.mask.close()


@functools.cache
def code_fingerprint():
    """Hash of the code that turns a line into tokens: whoever edits it must not be shown tokens of before."""
    model = pathlib.Path(__file__).resolve().parents[1] / "model"
    files = [pathlib.Path(__file__), pathlib.Path(jsonl.__file__), model / "tokenizer.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def token_store(path, kind, tokenizer, on_bad_record, fill, **settings):
    """The TokenStore of a file, from the cache or built now by fill(writer, tally, lock=…) → extra meta.

    `settings`: whatever else decides the tokens. Processes that want the same store at once wait for the first.
    """
    key = json.dumps([kind, tokenizer.fingerprint, tokenizer.chat_template if kind == "chat" else None, on_bad_record,
                      code_fingerprint(), settings])
    folder = jsonl.cache_path(path, f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:20]}")
    lock = folder.with_name(folder.name + ".lock")
    while not folder.exists():
        if not claim(lock):
            time.sleep(0.2)
            continue
        try:
            if not folder.exists():                         # published between our look and our claim
                build(folder, tokenizer.vocab_size, kind == "chat", on_bad_record, functools.partial(fill, lock=lock))
        finally:
            lock.unlink(missing_ok=True)
    store = TokenStore(folder)
    report_problems(path, store.meta)
    return store


def build(folder, vocab_size, has_mask, on_bad_record, fill):
    """Write a store in a folder of its own, then give it its name: nobody ever sees half a store."""
    temporary = beside(folder)
    temporary.mkdir()
    writer, tally = StoreWriter(temporary, vocab_size, has_mask), Tally(on_bad_record)
    try:
        extra = fill(writer, tally)
        writer.finish(**tally.counts, **extra)
        publish(temporary, folder)
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


def claim(lock):
    """True if this process may build what `lock` stands for: nobody else is at it, or who was has died.

    The builder touches its lock as it goes; one untouched for a minute is a dead builder's. Should two build after
    all, nothing breaks: each works in a folder of its own and the first to finish publishes.
    """
    try:
        open(lock, "x").close()
        return True
    except FileExistsError:
        pass
    try:
        if time.time() - lock.stat().st_mtime < 60:
            return False
    except FileNotFoundError:
        return False
    lock.touch()
    return True


# --- tokenising the records of one file


def write_documents(path, tokenizer, writer, tally, lock):
    """Every {"text"} record of a jsonl file as <bos> text <eos>."""
    file = JsonlFile(path)
    progress = Progress(f"tokenising {path.name}", len(file))
    texts, characters = [], 0                               # None: a record without text

    def flush():
        full = [text for text in texts if text]
        encoded = iter(tokenizer.encode_batch(full))
        for text in texts:
            if text:
                ids = next(encoded)
                writer.extend([tokenizer.bos_id, *ids, tokenizer.eos_id])
                writer.close_text(len(text.encode()), len(ids) + 1)
            else:
                writer.close_text()
        progress.add(len(texts))
        lock.touch()
        texts.clear()

    for number, record, problems in file.each("document"):
        usable = tally.accept(record, problems, functools.partial(file.where, number))
        texts.append(record["text"] if usable else None)
        characters += len(texts[-1] or "")
        if characters > BATCH_CHARACTERS or len(texts) > 10_000:
            flush()
            characters = 0
    flush()
    return {}


def write_text(path, start, end, tokenizer, writer, tally, lock):
    """The bytes [start, end) of a .txt file as one document."""
    progress = Progress(f"tokenising {path.name}", end - start)
    writer.extend([tokenizer.bos_id])
    num_bytes = 0
    for piece in text_pieces(path, start, end):
        writer.extend(tokenizer.encode(piece))
        size = len(piece.encode())
        num_bytes += size
        progress.add(size)
        lock.touch()
    writer.extend([tokenizer.eos_id])
    writer.close_text(num_bytes, writer.written - 1)
    return {}


def write_chats(path, max_len, tokenizer, writer, tally, lock):
    """Every conversation of a jsonl file with its mask, shortened to max_len by whole turns."""
    file = JsonlFile(path)
    progress = Progress(f"tokenising {path.name}", len(file))
    shortened, too_long = 0, 0
    for number, record, problems in file.each("chat"):
        ids, mask = [], []
        where = functools.partial(file.where, number)
        if tally.accept(record, problems, where):
            try:
                ids, mask, dropped = render_to_fit(record, tokenizer, max_len)
            except UserError as error:                      # the chat template refuses
                tally.accept(BadRecord(str(error)), [], where)
            else:
                shortened += dropped > 0 and len(ids) > 0
                too_long += not ids
        mask[:1] = [0] * len(mask[:1])
        writer.extend(ids)
        targets = np.asarray(ids, np.int64)[np.asarray(mask, bool)]
        writer.close_text(int(tokenizer.token_bytes[targets].sum()), len(targets), mask)
        progress.add(1)
        if number % 100 == 0:
            lock.touch()
    return {"shortened": shortened, "too_long": too_long}


def render_to_fit(record, tokenizer, max_len):
    """(ids, mask, exchanges dropped) of a chat record in at most max_len tokens; ids is [] if that cannot be.

    What does not fit loses its oldest exchange (a user's turn with all that answers it), then the next, never part
    of one; the system turn stays. It cannot be where even the last exchange is too long or holds no target.
    """
    messages = record["messages"]
    system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    starts = [number for number, message in enumerate(rest)
              if message["role"] == "user" and (number == 0 or rest[number - 1]["role"] != "user")]
    for dropped, start in enumerate(starts):
        ids, mask = tokenizer.render(system + rest[start:], tools=record["tools"])
        if len(ids) <= max_len:
            return (ids, mask, dropped) if any(mask[1:]) else ([], [], dropped)
    return [], [], len(starts)


# --- datasets


def held_out(num_records, val_fraction, val_records, seed):
    """Which records are for validation: a sorted int64 array that depends on (seed, num_records) and the two sizes."""
    if num_records < 2:
        raise UserError("one record cannot be divided into train and validation data; give more records")
    size = max(1, min(int(val_fraction * num_records), val_records))
    return np.asarray(sorted(random.Random(seed).sample(range(num_records), size)), np.int64)


class PackedRows:
    """Map-style rows over the chosen texts of some token stores. Subclasses say which texts, and whether to cut."""

    def __init__(self, stores, chosen, tokenizer, max_len, cut):
        """stores: TokenStores; chosen: for each, the numbers of its texts that belong to this split."""
        self.stores, self.max_len, self.pad_id = stores, max_len, tokenizer.pad_id
        self.store_of = np.repeat(np.arange(len(stores)), [len(numbers) for numbers in chosen])
        self.text_of = np.concatenate(chosen)
        lengths, num_bytes, num_targets = (
            np.concatenate([getter(store)[numbers] for store, numbers in zip(stores, chosen, strict=True)])
            for getter in (lambda store: np.diff(store.offsets), lambda store: store.num_bytes,
                           lambda store: store.num_targets))
        self.pieces, self.rows = plan_rows(lengths, max_len, cut)

        pieces_per_text = np.bincount(self.pieces[:, 0], minlength=len(lengths))
        slots = max(len(self) * max_len, 1)
        self.report = {
            "files": len(stores),
            "records": len(lengths),
            self.noun: int((lengths > 0).sum()),
            "dropped": int((lengths == 0).sum()),
            "cut": int((pieces_per_text > 1).sum()),
            "rows": len(self),
            "tokens": int(lengths.sum()),
            "loss_tokens": int(num_targets.sum()),
            "padding": 1 - float((self.pieces[:, 2] - self.pieces[:, 1]).sum()) / slots,
            "bytes": int(num_bytes.sum()),
            "skipped": sum(store.meta["skipped"] for store in stores),
            "malformed": sum(store.meta["malformed"] for store in stores),
        }

    def __len__(self):
        return len(self.rows) - 1

    def __getitem__(self, row):
        row = range(len(self))[row]                         # IndexError beyond the end; -1 is the last
        ids = np.full(self.max_len, self.pad_id, np.int64)
        mask = np.zeros(self.max_len, np.uint8)
        segments, positions = np.zeros((2, self.max_len), np.int64)
        at = 0
        pieces = self.pieces[self.rows[row]:self.rows[row + 1]].tolist()
        for segment, (text, start, end) in enumerate(pieces, start=1):
            store = self.stores[self.store_of[text]]
            first = int(store.offsets[self.text_of[text]])
            here = slice(at, at + end - start)
            ids[here] = store.tokens[first + start:first + end]
            mask[here] = 1 if store.mask is None else store.mask[first + start:first + end]
            mask[at] = 0
            segments[here] = segment
            positions[here] = np.arange(end - start)
            at += end - start
        return {"input_ids": ids, "loss_mask": mask, "segment_ids": segments, "positions": positions}


def check_arguments(split, val_fraction, max_len):
    if split not in ("all", "train", "val"):
        raise UserError(f'split {split!r}: must be "all", "train" or "val"')
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: must lie between 0 and 1")
    if max_len < 2:
        raise UserError(f"--max_len {max_len}: a row needs at least 2 tokens to predict one")


def choose(stores, split, val_fraction, val_records, seed):
    """For each store of records, the numbers of those in the split."""
    sizes = [len(store.num_bytes) for store in stores]
    everything = np.arange(sum(sizes))
    if split != "all" and sizes:
        val = held_out(len(everything), val_fraction, val_records, seed)
        everything = val if split == "val" else np.setdiff1d(everything, val, assume_unique=True)
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    bounds = np.searchsorted(everything, firsts)
    return [everything[low:high] - first for low, high, first in zip(bounds[:-1], bounds[1:], firsts[:-1], strict=True)]


class PretrainDataset(PackedRows):
    """Documents, {"text"} records or .txt files, in full rows.

    Each is opened and closed by <|endoftext|> and cut where a row ends (see `plan_rows`): every token but a
    document's first is a target once, so that summed loss over `report["bytes"]` is the exact bits per byte.
    split: "all", or "train" and "val", which share nothing. From .jsonl, min(val_fraction · n, val_records) records
    drawn by `seed` are held out; from a .txt file, the last val_fraction of its characters.
    UserError: a bad file or record (with on_bad_record="skip" such records are left out), or nothing to learn from.
    """

    noun = "documents"

    def __init__(self, paths, tokenizer, max_len, split="all", val_fraction=0.1, val_records=1000, seed=0,
                 on_bad_record="stop"):
        check_arguments(split, val_fraction, max_len)
        stores, texts = [], []
        for path in find_files(paths):
            if is_text(path):
                start, end = text_range(path, split, val_fraction)
                fill = functools.partial(write_text, path, start, end, tokenizer)
                texts.append(token_store(path, "text", tokenizer, on_bad_record, fill, start=start, end=end))
            else:
                fill = functools.partial(write_documents, path, tokenizer)
                stores.append(token_store(path, "document", tokenizer, on_bad_record, fill))
        chosen = choose(stores, split, val_fraction, val_records, seed) + [np.arange(1)] * len(texts)
        super().__init__(stores + texts, chosen, tokenizer, max_len, cut=True)
        if not len(self):
            raise UserError(f"{paths}: no text in any of the {self.report['records']} records of the {split} split")


def text_range(path, split, val_fraction):
    """The bytes [start, end) of a .txt file that belong to a split."""
    size = jsonl.unpacked(path).stat().st_size
    if split == "all":
        return 0, size
    cut = text_cut(path, 1 - val_fraction)
    if size and cut in (0, size):
        raise UserError(f"{path}: too short to hold out {val_fraction:.0%} of its characters; give more text")
    return (0, cut) if split == "train" else (cut, size)


class SFTDataset(PackedRows):
    """Conversations, packed whole; the loss is on what the assistant says and on the end of its turns.

    A conversation longer than a row loses its oldest exchanges, whole ones, until it fits (`render_to_fit`); one that
    cannot fit, or has no target left, is dropped and counted. Arguments as in PretrainDataset.
    `report["bytes"]` counts the bytes of the assistant's text.
    """

    noun = "conversations"

    def __init__(self, paths, tokenizer, max_len, split="all", val_fraction=0.1, val_records=1000, seed=0,
                 on_bad_record="stop"):
        check_arguments(split, val_fraction, max_len)
        stores = []
        for path in find_files(paths):
            if is_text(path):
                raise UserError(f"{path}: a .txt file holds no conversations; give .jsonl, or pretrain on it")
            fill = functools.partial(write_chats, path, max_len, tokenizer)
            stores.append(token_store(path, "chat", tokenizer, on_bad_record, fill, max_len=max_len))
        chosen = choose(stores, split, val_fraction, val_records, seed)
        super().__init__(stores, chosen, tokenizer, max_len, cut=False)
        self.report["shortened"] = sum(store.meta["shortened"] for store in stores)
        too_long = sum(store.meta["too_long"] for store in stores)
        if not len(self):
            raise UserError(f"{paths}: none of the {self.report['records']} conversations of the {split} split fits "
                            f"into {max_len} tokens; raise --max_len")
        if too_long:
            warn(f"{paths}: {too_long} conversations dropped, whose last exchange is longer than {max_len} tokens or "
                 "has no answer; raise --max_len to keep them")


def collate(rows):
    """List of B rows → dict of tensors (B, T)."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
