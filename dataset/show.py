"""See the mask: the rows that a stage trains on, each token coloured by loss or no loss.

    python dataset/show.py --stage sft chats.jsonl           as train_full_sft.py sees it (no file: the built-in world)
    python dataset/show.py --stage dpo --model out/full_sft --max_len 512 pairs.jsonl
    python dataset/show.py --stage pretrain --html rows.html book.txt

Of every text: where it comes from (file:line), how many of its tokens carry loss, and what of it is not in the row.
On a terminal tokens with loss are on green, tokens without are grey, special ones bold; elsewhere, and with --plain,
tokens with loss stand in [brackets]. ✂ is where something was cut off.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not dataset/

import html
import os
from bisect import bisect_right
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run

STAGES = {      # --stage: (class of dataset.lm_dataset, kind of built-in data)
    "pretrain": ("PretrainDataset", "pretrain"),
    "sft": ("SFTDataset", "sft"),
    "lora": ("SFTDataset", "persona"),
    "reason": ("ReasonDataset", "traces"),
    "distillation": ("SFTDataset", "sft"),
    "reward": ("PreferenceDataset", "preferences"),
    "dpo": ("PreferenceDataset", "preferences"),
    "kto": ("UnpairedDataset", "preferences"),
}
CUT = "✂"
DROPPED_SHOWN = 5        # of the records that are in no row, so many are named


@dataclass
class Config:
    data: str = arg("builtin", "jsonl, jsonl.gz, txt, a folder or builtin", positional=True)
    stage: str = arg("sft", "whose rows", choices=tuple(STAGES))
    model: str = arg("", "checkpoint folder whose tokenizer and chat template are used (empty: --tokenizer)")
    tokenizer: str = arg("nano", "nano, base or a folder")
    chat_template: str = arg("", "chatml or a Jinja file in place of the tokenizer's own template")
    max_len: int = arg(256, "tokens in a row")
    rows: int = arg(3, "how many rows to show")
    first: int = arg(0, "number of the first of them")
    split: str = arg("all", "of all records, or of those that training sees or holds out",
                     choices=("all", "train", "val"))
    on_bad_record: str = arg("stop", "a record that cannot be read: stop, or skip and count", choices=("stop", "skip"))
    plain: bool = arg(False, "brackets in place of colours, on a terminal too")
    html: str = arg("", "write a page for the browser to this file, too: pointing at a token tells its id and position")


if __name__ == "__main__":
    CONFIG = parse_args(Config, description=__doc__, hints={"data": "the file stands alone, without a flag"})

import numpy as np

from dataset import lm_dataset
from dataset.builtin.generate import KINDS, resolve
from dataset.jsonl import JsonlFile
from dataset.lm_dataset import Mixture, load_rows
from model.tokenizer import Tokenizer


@dataclass
class Text:
    """One text of a row, as it is shown."""

    title: str            # where it comes from, and which side of a pair it is
    notes: list           # what of it is not here
    ids: np.ndarray       # (n,)
    loss: np.ndarray      # (n,) 0 = no loss; else the weight of the token's loss, 1 in most stages
    cut_before: bool      # what stood before it in the record is not in this text
    cut_after: bool


# --- what is in a row


def texts_of(data, row):
    """The texts of a row of a dataset of dataset/lm_dataset.py, in order: a list of Text."""
    arrays = data[row]
    source, own = data.source_of(row) if isinstance(data, Mixture) else (data, row)
    pieces = source.pieces_of(own)
    ends = np.cumsum([size for _, size, _ in pieces])
    texts = []
    for number in range(1, int(arrays["segment_ids"].max()) + 1):
        slots = np.flatnonzero(arrays["segment_ids"] == number)
        start, size, store = pieces[bisect_right(ends, slots[0])]
        store = source.stores[store]
        title = f"{store.where(start, size, source.token_bytes)}{side(arrays, number)}"
        whole = store.texts[bisect_right(store.texts, start, key=lambda text: text["start"]) - 1]
        begin, stop, lost = (int(number) for number in (whole["start"], whole["start"] + whole["size"], whole["lost"]))
        notes = []
        if start > begin:
            notes.append(f"begins {start - begin:,} tokens into the record; its first token is the last one of the "
                         "piece before, now context only")
        if start + size < stop:
            notes.append(f"goes on in another row, {stop - start - size:,} tokens more")
        if lost:
            notes.append(f"{lost:,} tokens of its oldest exchanges left out: the record is longer than --max_len "
                         f"{source.max_len}")
        loss = (arrays["loss_mask"] * arrays.get("weights", 1))[slots]
        texts.append(Text(title, notes, arrays["input_ids"][slots], loss, start > begin or lost > 0,
                          start + size < stop))
    return texts


def side(arrays, number):
    """Which side of a pair segment `number` of a row is, as words to append; "" where there are no pairs."""
    if "pairs" not in arrays:
        return ""
    pair, second = divmod(number - 1, 2)
    if "desirable" not in arrays:
        return f", pair {pair + 1}, {'rejected' if second else 'chosen'}"
    judged = "good" if arrays["desirable"][pair] else "bad"
    return f", answer {pair + 1}, {'with the answer of another record' if second else f'judged {judged}'}"


def tokens_of(ids, loss, tokenizer):
    """Yield (text, loss, special, first, ids) of the tokens of a text: the weight of their loss, whether they are
    special, the place of the first. Tokens that make up a character only together come together."""
    decoder, special = tokenizer.stream_decoder(skip_special=False), set(tokenizer.special.values())
    group, first = [], 0
    for place, (index, flag) in enumerate(zip(ids.tolist(), loss.tolist(), strict=True)):
        if group and (flag != loss[first] or index in special):
            yield decoder.flush(), loss[first], False, first, group
            group = []
        if not group:
            first = place
        group.append(index)
        text = decoder.push(index)
        if text:
            yield text, flag, index in special, first, group
            group = []
    if group:
        yield decoder.flush(), loss[first], False, first, group


def printable(text):
    """Text without anything that would move the cursor, "\\n" for a line break; and the break itself, to follow it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text), "\n" * ("\n" in text)


# --- three ways to show it


def plain(text, tokenizer):
    """Tokens with loss in [brackets], followed by its weight where that is not 1."""
    shown = []
    for piece, loss, *_ in tokens_of(text.ids, text.loss, tokenizer):
        visible, line_break = printable(piece)
        shown.append((f"[{visible}]{weight(loss)}" if loss else visible) + line_break)
    return "".join(shown)


def weight(loss):
    """"×3" of a token whose loss counts three times, "" of most."""
    return "" if loss == 1 else f"×{loss:g}"


def coloured(text, tokenizer):
    """Tokens with loss on green, those without in grey; neighbours in two shades, special ones bold."""
    shown = []
    for number, (piece, loss, special, *_) in enumerate(tokens_of(text.ids, text.loss, tokenizer)):
        shade = (30, f"48;5;{(114, 78)[number % 2]}") if loss else (f"38;5;{(245, 250)[number % 2]}",)
        visible, line_break = printable(piece)
        visible += weight(loss) if loss else ""
        shown.append(f"\x1b[{';'.join(map(str, (*shade, *[1] * special)))}m{visible}\x1b[0m{line_break}")
    return "".join(shown)


def page_of(text, tokenizer):
    """The same for a browser: a <span> for each token, whose title tells its id and position."""
    shown = []
    for number, (piece, loss, special, first, ids) in enumerate(tokens_of(text.ids, text.loss, tokenizer)):
        names = " ".join(["loss" if loss else "context", "odd" if number % 2 else "even", *["special"] * special])
        about = (f"id {', '.join(map(str, ids))} · position {first} · "
                 + (f"loss{weight(loss)}" if loss else "no loss"))
        visible, line_break = printable(piece)
        shown.append(f'<span class="{names}" title="{about}">{html.escape(visible)}</span>{line_break}')
    return "".join(shown)


def row_lines(data, row, tokenizer, show=plain):
    """The lines that show a row: its counts, then each of its texts under its place and what is missing of it."""
    arrays, texts = data[row], texts_of(data, row)
    used, targets = int((arrays["segment_ids"] > 0).sum()), int(arrays["loss_mask"].sum())
    yield (f"row {row:,}: {len(texts)} text{'s' * (len(texts) != 1)}, {used} of {len(arrays['input_ids'])} slots used, "
           f"{targets} tokens with loss{' in [brackets]' * (show is plain)} ({targets / max(used, 1):.0%})")
    for text in texts:
        yield (f"— {text.title}: {len(text.ids)} tokens, {int((text.loss > 0).sum())} with loss"
               + "".join(f"; {CUT} {note}" for note in text.notes))
        yield CUT * text.cut_before + show(text, tokenizer) + CUT * text.cut_after


# --- the program


def left_out(data):
    """[a line about the records that are in no row], [] if there are none."""
    if not data.report["dropped"]:
        return []
    places = []
    for source in data.sources if isinstance(data, Mixture) else [data]:
        for store in source.stores:
            empty = np.flatnonzero(store.texts[:]["size"] == 0)[:DROPPED_SHOWN]
            places += [JsonlFile(store.path).where(int(number)) for number in empty]
    more = " …" * (data.report["dropped"] > DROPPED_SHOWN)
    return [f"{CUT} {data.report['dropped']:,} of {data.report['records']:,} records are in no row: unreadable, "
            f"nothing to learn from, or too long for --max_len: {', '.join(places[:DROPPED_SHOWN])}{more}"]


def write_page(file, title, rows):
    """An HTML page of rows, lists of lines as `row_lines` yields them with show=page_of: heads and bodies in turn."""
    parts = [PAGE_HEAD.format(title=html.escape(title))]
    for head, *texts in rows:
        parts.append(f"<h2>{html.escape(head)}</h2>")
        for place, tokens in zip(texts[::2], texts[1::2], strict=True):
            parts.append(f"<p>{html.escape(place)}</p><pre>{tokens}</pre>")
    pathlib.Path(file).write_text("\n".join(parts), encoding="utf-8")


PAGE_HEAD = """<!DOCTYPE html>
<meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2.5rem; }} p {{ margin: 1rem 0 0.2rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: 0.6rem; border: 1px solid #8886; border-radius: 4px;
       margin: 0; font: 15px/1.6 ui-monospace, monospace; }}
.loss {{ background: #8fd694; color: #0b2e10; }} .loss.odd {{ background: #6cc274; }}
.context {{ opacity: 0.6; }} .context.odd {{ opacity: 0.8; }} .special {{ font-weight: bold; }}
</style>
<h1>{title}</h1>
<p><span class="loss">with loss</span>: the model is trained to emit it. <span class="context">without</span>: it only
reads it. <b>Bold</b>: special tokens. ✂: cut off. Point at a token for its id and position.</p>"""


def main(cfg):
    """Print the rows that the flags ask for."""
    kind, builtin = STAGES[cfg.stage]
    if not hasattr(lm_dataset, kind) or (cfg.data.startswith("builtin") and builtin not in KINDS):
        raise UserError(f"--stage {cfg.stage}: there is no data set for it yet")
    if cfg.rows < 1 or cfg.first < 0:
        raise UserError(f"--rows {cfg.rows} --first {cfg.first}: must be at least 1, and 0 or more")
    tokenizer = Tokenizer.load(cfg.model or cfg.tokenizer)
    if cfg.chat_template:
        tokenizer = tokenizer.with_chat_template(cfg.chat_template)
    data = load_rows(getattr(lm_dataset, kind), resolve(cfg.data, builtin), tokenizer, cfg.max_len, cfg.split,
                     on_bad_record=cfg.on_bad_record)
    if cfg.first >= len(data):
        raise UserError(f"--first {cfg.first}: there are {len(data):,} rows, numbered from 0")
    rows = range(cfg.first, min(cfg.first + cfg.rows, len(data)))
    in_colour = sys.stdout.isatty() and not cfg.plain and not os.environ.get("NO_COLOR")
    for row in rows:
        print("", *row_lines(data, row, tokenizer, coloured if in_colour else plain), sep="\n")
    report = data.report
    print("", f"{len(data):,} rows in all: {report['records']:,} records, {report['tokens']:,} tokens, "
          f"{report['loss_tokens']:,} with loss, {report['padding']:.1%} padding", *left_out(data), sep="\n")
    if cfg.html:
        write_page(cfg.html, f"{cfg.stage}: {cfg.data}", [row_lines(data, row, tokenizer, page_of) for row in rows])
        print(f"wrote {cfg.html}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")                    # for terminals that lack a character
    run(main, CONFIG)
