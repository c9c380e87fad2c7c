"""Tokens in rows: from records to what a model is trained on.

    data = PretrainDataset("data/wiki.jsonl", tokenizer, max_len=512, split="train")
    data[0]         {"input_ids", "loss_mask", "segment_ids", "positions"}, each (T,) with T = max_len
    collate([data[0], data[1]])                                       the same as torch tensors (B, T)

Which stage reads which class: pretraining PretrainDataset; full_sft and lora SFTDataset; reason ReasonDataset; reward
and dpo PreferenceDataset (with --loss kto UnpairedDataset); the stages of reinforcement learning PromptDataset.

A row holds several texts one after the other, so that no compute is spent on padding:

    input_ids     <e>  The  cat  sat  <e>  <e>  A  dog  <e>  <pad>     <e> = <|endoftext|>, opens and closes a document
    loss_mask      0    1    1    1    1    0   1   1    1     0       1 = the model must emit this token
    segment_ids    1    1    1    1    1    2   2   2    2     0       which text of the row; 0 = padding
    positions      0    1    2    3    4    0   1   2    3     0       restart with each text

The mask is *target-aligned*: loss_mask[t] speaks of input_ids[t], which is predicted from the tokens before it in its
segment. The first token of a segment has nothing before it and is never a target.

Rows of preferences hold pairs of texts, segments 1 and 2, 3 and 4, …, each the whole prompt with one answer:

    segment_ids    1    1    1    1    2    2    2   2    2    0       1 the chosen, 2 the rejected answer to a prompt
    loss_mask      0    0    1    1    0    0    1   1    1    0       1 = of the answer; the prompt is no target
    pairs          1    0    0    …                                    (P,) 1 = there is a k-th pair; P = max_len // 4

The tokens come from tokens.py, and the plan of the rows is kept beside them in out/cache/. Nothing that grows with the
data is ever in memory as a whole: not the text, not the tokens, not the plan.
"""

import functools
import itertools
import json
import random
from bisect import bisect_right, insort

import numpy as np
import torch

from dataset import jsonl, tokens
from dataset.builtin.checkers import as_expected
from dataset.jsonl import DiskArray, Progress, find_files, is_text, once, shares_of, text_cut, warn
from dataset.tokens import hashed, token_store
from model.errors import UserError

GROUP = 1 << 18               # so many texts are packed among themselves: what a plan needs in memory is bounded
SLOTS = 1 << 20               # so many tokens of rows are planned before they are written down

# A piece of a text in a row: tokens [start, start + size) of a store.
PIECE = np.dtype([("start", np.int64), ("size", np.int32), ("store", np.int32)])


# --- packing: which piece of which text goes into which row


def plan_rows(lengths, max_len, cut):
    """Lay texts of the given token counts into rows of `max_len` tokens.

    Yields rows, each a list of pieces (text, start, end): tokens start … end - 1 of that text. A function of its
    arguments alone. Texts of length 0 are left out.

    Best fit: a row takes the longest text that still fits, again and again (as nanochat's loader does, without
    throwing the cropped ends away). When nothing fits,
      cut=False  the rest of the row stays empty; no text may be longer than a row
      cut=True   the longest text is cut to fill the row. Its two pieces share one token, target of the first and
                 context of the second, so every token but a text's first is a target exactly once. Every row but
                 the last is full (but for one slot when only two-token pieces are left). A text longer than a row
                 first fills whole rows, one after the other.
    """
    waiting = {}                                          # length → pieces of that length, used from the end
    for number in np.argsort(-np.asarray(lengths), kind="stable")[::-1].tolist():
        length, begin = int(lengths[number]), 0
        while length - begin > max_len:
            yield [(number, begin, begin + max_len)]
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

    row, space = [], max_len
    while sizes:
        index = bisect_right(sizes, space) - 1            # the longest that fits
        if cut and index >= 0 and sizes[index] == space - 1:
            index -= 1                                    # would leave one slot, in which nothing can be predicted
        if index >= 0:
            piece = take(index)
            row.append(piece)
            space -= piece[2] - piece[1]
        elif cut and (sizes[-1] > space or (space > 3 and len(waiting[sizes[-1]]) > 1)):
            # Cut the longest to fill the space. Where all that wait are one token short of it, halve one: the halves
            # share a token, so together they fill it.
            number, begin, stop = take(len(sizes) - 1)
            size = space if stop - begin > space else space // 2
            row.append((number, begin, begin + size))
            put_back((number, begin + size - 1, stop))
            space -= size
        else:
            if cut:                                       # the last piece, or two-token pieces only
                row.append(take(0))
            space = 0
        if space < 2:
            yield row
            row, space = [], max_len
    if row:
        yield row


# --- datasets


def held_out(num_records, val_fraction, val_records, seed):
    """Which records are for validation: a sorted int64 array that depends on (seed, num_records) and the two sizes."""
    if num_records < 2:
        raise UserError("one record cannot be divided into train and validation data; give more records")
    size = max(1, min(int(val_fraction * num_records), val_records))
    return np.asarray(sorted(random.Random(seed).sample(range(num_records), size)), np.int64)


class PackedRows:
    """Map-style rows over the texts of a split. Subclasses say which files, and whether texts may be cut.

    The plan of the rows is on disk: row r holds pieces[bounds[r]:bounds[r + 1]], and a piece (PIECE) is `size` tokens
    from `start` on of a store. At most GROUP texts are packed together, so the last row of every such group may have
    padding.
    """

    def __init__(self, stores, split, val_fraction, val_records, seed, tokenizer, max_len, cut):
        """stores: TokenStores, those of .txt files (whose split is made already) last."""
        self.stores, self.max_len, self.pad_id = stores, max_len, tokenizer.pad_id
        self.token_bytes = tokenizer.token_bytes
        self.columns = {}                                   # name: one more array of every row, added by who needs it
        num_records = sum(len(store.texts) for store in stores if not is_text(store.path))
        val = np.zeros(0, np.int64)
        if split != "all" and num_records:
            val = held_out(num_records, val_fraction, val_records, seed)
        key = hashed(tokens.code_fingerprint(__file__), [store.folder.name for store in stores], split, val.tolist(),
                     max_len, cut)
        make = functools.partial(write_rows, stores, split, val, max_len, cut)
        folder = once(jsonl.CACHE / f"rows-{key}", make)
        self.pieces = DiskArray(folder / "pieces.bin", PIECE)
        self.bounds = DiskArray(folder / "bounds.bin", np.int64)
        counts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        slots = max(len(self) * max_len, 1)
        self.report = {
            "files": len(stores),
            "records": counts["records"],
            self.noun: counts["records"] - counts["dropped"],
            "dropped": counts["dropped"],
            "shortened": counts["shortened"],
            "cut": counts["cut"],
            "rows": len(self),
            "tokens": counts["tokens"],
            "tokens_lost": counts["tokens_lost"],
            "loss_tokens": counts["loss_tokens"],
            "padding": 1 - counts["slots_used"] / slots,
            "bytes": counts["bytes"],
            "skipped": sum(store.meta["skipped"] for store in stores),
            "malformed": sum(store.meta["malformed"] for store in stores),
        }

    def __len__(self):
        return len(self.bounds) - 1

    def pieces_of(self, row):
        row = range(len(self))[row]                         # IndexError beyond the end; -1 is the last
        low, high = self.bounds[row:row + 2].tolist()
        return self.pieces[low:high].tolist()

    def __getitem__(self, row):
        ids = np.full(self.max_len, self.pad_id, np.int64)
        mask = np.zeros(self.max_len, np.uint8)
        segments, positions = np.zeros((2, self.max_len), np.int64)
        at = 0
        for segment, (start, size, number) in enumerate(self.pieces_of(row), start=1):
            store, here = self.stores[number], slice(at, at + size)
            ids[here] = store.tokens[start:start + size]
            mask[here] = 1 if store.mask is None else store.mask[start:start + size]
            mask[at] = 0
            segments[here] = segment
            positions[here] = np.arange(size)
            at += size
        return {"input_ids": ids, "loss_mask": mask, "segment_ids": segments, "positions": positions,
                **{name: column[row] for name, column in self.columns.items()}}

    @staticmethod
    def count(batch):
        """Number of things in a batch over which a loss is averaged: tokens that the model must emit."""
        return int(batch["loss_mask"].sum())

    def where(self, row):
        """The records that a row holds, in its order: a list of "file:line", of .txt files "file: bytes first-last"."""
        places = [self.stores[number].where(start, size, self.token_bytes)
                  for start, size, number in self.pieces_of(row)]
        return list(dict.fromkeys(places))


def write_rows(stores, split, val, max_len, cut, folder):
    """Plan the rows of a split and write the plan into `folder`, with the counts that a report is made of."""
    folder.mkdir()
    counts = dict.fromkeys(("records", "dropped", "shortened", "cut", "tokens", "tokens_lost", "loss_tokens",
                            "slots_used", "bytes"), 0)
    progress = Progress("packing rows", sum(len(store.texts) for store in stores))
    with open(folder / "pieces.bin", "wb") as pieces_file, open(folder / "bounds.bin", "wb") as bounds_file:
        bound = np.zeros(1, np.int64)
        bound.tofile(bounds_file)
        for texts, numbers in texts_of_split(stores, split, val):
            rows = plan_rows(texts["size"], max_len, cut)
            while some := list(itertools.islice(rows, max(1, SLOTS // max_len))):
                text, start, end = np.array([piece for row in some for piece in row], np.int64).T
                pieces = np.empty(len(text), PIECE)
                pieces["start"], pieces["size"] = texts["start"][text] + start, end - start
                pieces["store"] = numbers[text]
                pieces.tofile(pieces_file)
                bounds = bound[-1] + np.cumsum([len(row) for row in some])
                bounds.tofile(bounds_file)
                bound = bounds
                counts["slots_used"] += int((end - start).sum())
                counts["cut"] += int(((start > 0) & (end == texts["size"][text])).sum())     # last pieces of several
            counts["records"] += len(texts)
            counts["dropped"] += int((texts["size"] == 0).sum())
            counts["shortened"] += int(((texts["size"] > 0) & (texts["lost"] > 0)).sum())
            for name, column in (("tokens", "size"), ("tokens_lost", "lost"), ("loss_tokens", "num_targets"),
                                 ("bytes", "num_bytes")):
                counts[name] += int(texts[column].sum())
            progress.add(len(texts))
    (folder / "report.json").write_text(json.dumps(counts), encoding="utf-8")


def texts_of_split(stores, split, val):
    """Yield the texts of a split in groups of GROUP at most: (texts (n,) TEXT, the number (n,) of each one's store).

    val: numbers, over all stores, of the records held out.
    """
    group, size, first = [], 0, 0                            # first: number of the store's first record
    for number, store in enumerate(stores):
        for begin in range(0, len(store.texts), GROUP):
            texts = store.texts[begin:begin + GROUP]
            if not is_text(store.path):
                low, high = np.searchsorted(val, [first + begin, first + begin + len(texts)])
                held = val[low:high] - first - begin
                texts = texts[held] if split == "val" else np.delete(texts, held)
            if size + len(texts) > GROUP:
                yield joined(group)
                group, size = [], 0
            group.append((texts, np.full(len(texts), number)))
            size += len(texts)
        first += len(store.texts)
    if size:
        yield joined(group)


def joined(group):
    return tuple(np.concatenate(column) for column in zip(*group, strict=True))


class Mixture:
    """Rows of several sources, of which training sees a given share each: {path: dataset}, {path: share}.

    Source k starts at row firsts[k]; which row comes when in training, trainer/batches.py says. An epoch has as many
    rows as all sources together, so a source whose share is larger than its part of the rows repeats in it.
    interleaved=True numbers the rows such that the first n hold the same part of every source: an evaluation of some.
    """

    def __init__(self, sources, shares, interleaved=False):
        self.sources, self.shares = list(sources.values()), [shares[path] for path in sources]
        sizes = [len(source) for source in self.sources]
        self.firsts = [0, *itertools.accumulate(sizes)]
        parts = [(np.arange(size) + 0.5) / size for size in sizes] if interleaved else []
        self.order = np.argsort(np.concatenate(parts), kind="stable") if interleaved else None
        reports = [source.report for source in self.sources]
        shared = [name for name in reports[0] if all(name in report for report in reports)]      # conversations, text …
        self.report = {name: sum(report[name] for report in reports) for name in shared}
        used = sum((1 - report["padding"]) * size for report, size in zip(reports, sizes, strict=True))
        self.report["padding"] = 1 - used / len(self)
        self.report["repeats"] = {path: shares[path] * len(self) / len(source) for path, source in sources.items()}

    def __len__(self):
        return self.firsts[-1]

    def count(self, batch):
        """As PackedRows.count."""
        return self.sources[0].count(batch)

    def source_of(self, row):
        """(source, its own number of the row)"""
        row = range(len(self))[row] if self.order is None else int(self.order[row])
        number = bisect_right(self.firsts, row) - 1
        return self.sources[number], row - self.firsts[number]

    def __getitem__(self, row):
        source, own = self.source_of(row)
        return source[own]

    def where(self, row):
        """As PackedRows.where."""
        source, own = self.source_of(row)
        return source.where(own)


def load_rows(kind, paths, tokenizer, max_len, split="all", **options):
    """The dataset of class `kind` at `paths`; a Mixture of such where they have weights: "a.jsonl:0.9,b.jsonl:0.1".

    Of every source of a mixture its own part is held out; all of those are evaluated.
    """
    shares = shares_of(paths)
    if not shares:
        return kind(paths, tokenizer, max_len, split, **options)
    return Mixture({path: kind(path, tokenizer, max_len, split, **options) for path in shares}, shares,
                   interleaved=split == "val")


def check_arguments(split, val_fraction, max_len):
    if split not in ("all", "train", "val"):
        raise UserError(f'split {split!r}: must be "all", "train" or "val"')
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: must lie between 0 and 1")
    if max_len < 2:
        raise UserError(f"--max_len {max_len}: a row needs at least 2 tokens to predict one")


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
                texts.append(token_store(path, "text", tokenizer, on_bad_record, start=start, end=end))
            else:
                stores.append(token_store(path, "document", tokenizer, on_bad_record))
        super().__init__(stores + texts, split, val_fraction, val_records, seed, tokenizer, max_len, cut=True)
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
    settings = {}                                           # of `tokens.write_chats`, if not the usual ones

    def __init__(self, paths, tokenizer, max_len, split="all", val_fraction=0.1, val_records=1000, seed=0,
                 on_bad_record="stop"):
        check_arguments(split, val_fraction, max_len)
        stores = []
        for path in find_files(paths):
            if is_text(path):
                raise UserError(f"{path}: a .txt file holds no conversations; give .jsonl, or pretrain on it")
            stores.append(token_store(path, "chat", tokenizer, on_bad_record, max_len=max_len, **self.settings))
        super().__init__(stores, split, val_fraction, val_records, seed, tokenizer, max_len, cut=False)
        too_long = sum(store.meta["too_long"] for store in stores)
        if not len(self):
            raise UserError(f"{paths}: none of the {self.report['records']} conversations of the {split} split fits "
                            f"into {max_len} tokens; raise --max_len")
        if too_long:
            warn(f"{paths}: {too_long} conversations dropped, whose last exchange is longer than {max_len} tokens or "
                 "has no answer; raise --max_len to keep them")


class ReasonDataset(SFTDataset):
    """Conversations with thoughts, as SFTDataset lays them out, and a weight for every token.

    "weights" (T,) float32 has thought_weight between <think> and </think>, tag_weight on the tags (<answer> and
    </answer> too) and answer_weight elsewhere; a batch counts the sum of its targets' weights. A record whose tags are
    out of order or never closed is a bad record: as plain text it would teach to write them letter by letter.
    """

    settings = {"strict_markup": True}

    def __init__(self, paths, tokenizer, max_len, split="all", tag_weight=1.0, thought_weight=1.0, answer_weight=1.0,
                 **options):
        super().__init__(paths, tokenizer, max_len, split, **options)
        self.opening, self.closing = tokenizer.special_id("<think>"), tokenizer.special_id("</think>")
        tags = ("<think>", "</think>", "<answer>", "</answer>")
        self.tags = [tokenizer.special[tag] for tag in tags if tag in tokenizer.special]
        self.tag_weight, self.thought_weight, self.answer_weight = tag_weight, thought_weight, answer_weight

    def __getitem__(self, row):
        row = super().__getitem__(row)
        ids = row["input_ids"]
        open_thoughts = np.cumsum(ids == self.opening) - np.cumsum(ids == self.closing)      # 1 inside of one, else 0
        weights = np.where(open_thoughts > 0, self.thought_weight, self.answer_weight)
        row["weights"] = np.where(np.isin(ids, self.tags), self.tag_weight, weights).astype(np.float32)
        return row

    @staticmethod
    def count(batch):
        """The weights of all targets of a batch together."""
        return float((batch["loss_mask"] * batch["weights"]).sum())


class PreferenceDataset(PackedRows):
    """Pairs: two answers to one prompt, of which the first is preferred. Both sides of a pair lie in one row.

    Segments 2k-1 and 2k of a row are the chosen and the rejected text of its k-th pair, prompt included; the prompt,
    all turns in which the sides agree, is the same tokens in both; the loss is on what the assistant says after it.
    "pairs" (P,) marks the pairs that there are; a batch counts pairs, not tokens.

    A pair that is longer than a row loses the oldest exchanges of its prompt, both sides the same; one that still does
    not fit, or in which a side says nothing, is dropped and counted. UserError (or skipped, with on_bad_record="skip"):
    equal sides, sides that answer different prompts. Arguments as in PretrainDataset.
    """

    noun, kind = "pairs", "preference"

    def __init__(self, paths, tokenizer, max_len, split="all", val_fraction=0.1, val_records=1000, seed=0,
                 on_bad_record="stop"):
        check_arguments(split, val_fraction, max_len)
        self.most_pairs = max(1, max_len // 4)              # a text has a token of its prompt and one target at least
        stores = []
        for path in find_files(paths):
            if is_text(path):
                raise UserError(f"{path}: a .txt file holds no preferences; give .jsonl")
            stores.append(token_store(path, self.kind, tokenizer, on_bad_record, max_len=max_len))
        super().__init__(stores, split, val_fraction, val_records, seed, tokenizer, max_len, cut=False)
        too_long, empty = (sum(store.meta[name] for store in stores) for name in ("too_long", "empty"))
        if not len(self):
            raise UserError(f"{paths}: none of the {self.report['records']} records of the {split} split can be used; "
                            f"in all, {too_long} are longer than {max_len} tokens, both sides together (raise "
                            f"--max_len), and in {empty} an answer is empty")
        if too_long or empty:
            warn(f"{paths}: {too_long} {self.noun} dropped that are longer than {max_len} tokens, both sides together "
                 f"(raise --max_len to keep them), and {empty} in which an answer is empty")

    def __getitem__(self, row):
        return self.read(row)[0]

    def read(self, row):
        """(the row, flags (n,) of the first token of its second, fourth, … text)"""
        row = super().__getitem__(row)
        marks, texts = row["loss_mask"], row["segment_ids"]
        begins = np.flatnonzero((marks >= tokens.SIDE) | (np.diff(texts, prepend=0) > 0))         # of all sides
        row["segment_ids"] = np.where(texts, np.searchsorted(begins, np.arange(self.max_len), side="right"), 0)
        row["positions"] = np.where(texts, np.arange(self.max_len) - begins[row["segment_ids"] - 1], 0)
        row["loss_mask"] = (marks == 1).astype(np.uint8)
        row["pairs"] = (np.arange(self.most_pairs) < len(begins) // 2).astype(np.uint8)
        return row, marks[begins[1::2]]

    @staticmethod
    def count(batch):
        """Number of pairs in a batch."""
        return int(batch["pairs"].sum())


class UnpairedDataset(PreferenceDataset):
    """Answers that were judged each by itself, good or bad, for KTO; a preference is one of each.

    As PreferenceDataset, but segments 2k-1 and 2k are a judged text and its prompt with the answer of another record of
    the file (what the loss compares with), and "desirable" (P,) is 1 where the judged answer is good.
    """

    noun, kind = "answers", "unpaired"

    def __getitem__(self, row):
        row, flags = self.read(row)
        row["desirable"] = np.zeros_like(row["pairs"])
        row["desirable"][:len(flags)] = flags == tokens.GOOD_SIDE
        return row


class PromptDataset:
    """What a policy is asked, in no rows: [i] is the i-th prompt, a dict (a conversation, which ends before an answer):

        messages, tools    as in dataset/jsonl.py; a final assistant turn of the record is dropped
        prompt_ids         the same as ids, up to where the assistant begins
        answer, checker    what a right answer is, a string, and who says so (dataset/builtin/checkers.py), or None
        max_new_tokens     how long an answer may be; 0 = the record does not say
        skill, level       what figures are told apart by; "all" and 0 where the record does not say

    and any other keys of the record. The record is read when asked for; only its number (12 bytes) is in memory.
    A prompt longer than max_len loses its oldest exchanges, and is dropped and counted if it still does not fit. A
    checker that is unknown, or cannot compare with the answer, makes a bad record. Arguments as in PretrainDataset.
    `report["unchecked"]` and `["unanswered"]` count the prompts without checker, without answer.
    """

    def __init__(self, paths, tokenizer, max_len, split="all", val_fraction=0.1, val_records=1000, seed=0,
                 on_bad_record="stop"):
        check_arguments(split, val_fraction, max_len)
        self.tokenizer, self.max_len, self.files = tokenizer, max_len, []
        stores, texts, places = [], [], []                  # places: (file, record) of each text
        for number, path in enumerate(find_files(paths)):
            if is_text(path):
                raise UserError(f"{path}: a .txt file holds no prompts; give .jsonl")
            stores.append(token_store(path, "prompt", tokenizer, on_bad_record, max_len=max_len))
            self.files.append(jsonl.JsonlFile(path))
            texts.append(stores[-1].texts[:])
            places.append(np.stack([np.full(len(texts[-1]), number), np.arange(len(texts[-1]))], 1))
        texts, places = np.concatenate(texts), np.concatenate(places)
        if split != "all":
            val = held_out(len(texts), val_fraction, val_records, seed)
            chosen = val if split == "val" else np.delete(np.arange(len(texts)), val)
            texts, places = texts[chosen], places[chosen]
        usable = texts["size"] > 0
        too_long = int(((texts["size"] == 0) & (texts["lost"] > 0)).sum())
        if not usable.any():
            raise UserError(f"{paths}: none of the {len(texts)} prompts of the {split} split can be used; {too_long} "
                            f"are longer than {max_len} tokens, raise --max_len")
        if too_long:
            warn(f"{paths}: {too_long} prompts dropped, whose last exchange is longer than {max_len} tokens; raise "
                 "--max_len to keep them")
        self.numbers = places[usable].astype(np.int32 if len(texts) < 2**31 else np.int64)          # (n, 2)
        tokens_kept = int(texts["size"].sum())
        self.report = {
            "files": len(stores), "records": len(texts), "prompts": len(self), "dropped": int((~usable).sum()),
            "shortened": int((usable & (texts["lost"] > 0)).sum()), "rows": len(self), "tokens": tokens_kept,
            "tokens_lost": int(texts["lost"].sum()), "padding": 1 - tokens_kept / (len(self) * max_len),
            "unchecked": int((usable & (texts["num_targets"] == 0)).sum()),
            "unanswered": int((usable & (texts["num_bytes"] == 0)).sum()),
            "skipped": sum(store.meta["skipped"] for store in stores),
            "malformed": sum(store.meta["malformed"] for store in stores),
        }

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        file, number = self.numbers[range(len(self))[row]].tolist()          # IndexError beyond the end
        record, _ = self.files[file].record(number, "prompt")
        messages, ids, _ = tokens.prompt_to_fit(record, self.tokenizer, self.max_len)
        if record["checker"] is not None:
            record["answer"] = as_expected(record["checker"], record["answer"])
        return {"max_new_tokens": 0, "skill": "all", "level": 0, **record, "messages": messages, "prompt_ids": ids}

    @staticmethod
    def count(batch):
        """Number of sampled tokens in a batch of completions; none in other batches that are learnt from beside."""
        return int(batch["completion_mask"].sum()) if "completion_mask" in batch else 0

    def where(self, row):
        """["file:line"] of a prompt."""
        file, number = self.numbers[range(len(self))[row]].tolist()
        return [self.files[file].where(number)]


def kind_of(paths):
    """The class that reads `paths`, told by the first record: SFTDataset for conversations, else PretrainDataset."""
    first = find_files(jsonl.weight_of(jsonl.parts_of(paths)[0])[0])[0]
    chats = not is_text(first) and "messages" in jsonl.JsonlFile(first).record(0)[0]
    return SFTDataset if chats else PretrainDataset


def collate(rows):
    """List of B rows → dict of tensors (B, T)."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
