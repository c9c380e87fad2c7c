"""
Train a tokenizer: byte pair encoding  (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1), over bytes as in GPT-2

Start from the 256 bytes. Count how often each pair of neighbouring tokens occurs, make the most frequent pair a token
of its own, and repeat until the vocabulary is full: frequent words end up as one token, rare ones fall apart into
shorter pieces, and nothing is ever unknown. Merges stay inside the "words" that a fixed pattern cuts first (Qwen2's: a
word takes the space before it along, digits stand alone, so that arithmetic is done on digits).

    ids 0 …   special tokens   <|pad|> <|endoftext|> <|im_start|> <|im_end|> <tool_call> … <answer> </answer>
    then      spare ones       <|spare_0|> … for what comes later, without changing any other id
    then      256 bytes, then merges in the order in which they were found; last, single letters that lacked a merge

`--kind sentencepiece` trains the same algorithm with the SentencePiece library (Kudo and Richardson 2018,
arXiv:1808.06226): characters instead of bytes, bytes only for characters that the vocabulary lacks.

reads   any jsonl that the other stages read (all text in it), .txt, each also .gz; several with a weight each, which
        says how often their text counts: --data novels.txt:0.5,poems.jsonl:2
writes  out/tokenizer   tokenizer.json (or tokenizer.model), tokenizer_config.json, chat_template.jinja
run     python trainer/train_tokenizer.py --data builtin --vocab_size 1024
        python trainer/train_tokenizer.py --data builtin --tokenizer base --report          measures an existing one
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])  # the project root, not trainer/

import io
import json
import re
import shutil
import string
import unicodedata
from dataclasses import dataclass

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dataset.builtin.generate import ensure
from dataset.jsonl import texts
from model.errors import UserError, run
from model.tokenizer import CHATML, SPECIAL_TOKENS, Tokenizer
from trainer.config import arg, parse_args

# Qwen2's published pre-tokenizer pattern: English contractions; a word with one character before it; one digit;
# punctuation; line breaks; spaces. GGUF names it "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROOT = pathlib.Path(__file__).resolve().parents[1]
SENTENCE_LIMIT = 8192  # bytes of one "sentence" for SentencePiece, which skips longer ones


@dataclass
class Config:
    data: str = arg("builtin", "what to learn or measure: builtin, builtin:KIND, or FILE[:WEIGHT],… (jsonl, txt, gz)")
    out: str = arg("", "folder to write (default: out/tokenizer)")
    kind: str = arg("bpe", "bpe (tokenizer.json) or sentencepiece (tokenizer.model)", choices=("bpe", "sentencepiece"))
    vocab_size: int = arg(6400, "number of ids, special tokens and bytes included")
    num_spare: int = arg(20, "spare special tokens")
    max_piece: int = arg(16, "longest token, in characters of the alphabet (bytes for bpe)")
    character_coverage: float = arg(0.9995, "sentencepiece: share of characters with an id; the rest is bytes")
    report: bool = arg(False, "print what the tokenizer does to each file of --data")
    tokenizer: str = arg("", "with --report: measure this one (nano, base or a folder) and train nothing")
    overwrite: bool = arg(False, "replace the folder --out")


# --- training


def special_tokens(num_spare, kind="bpe"):
    """Names of the special tokens in the order of their ids. SentencePiece's format requires one for the unknown."""
    unknown = ["<unk>"] if kind == "sentencepiece" else []
    return [*SPECIAL_TOKENS, *(f"<|spare_{i}|>" for i in range(num_spare)), *unknown]


def train_bpe(texts, vocab_size, num_spare=20, max_piece=16):
    """Byte-level BPE of an iterable of strings → the content of tokenizer.json (str)."""
    special = special_tokens(num_spare)
    check_size(vocab_size, special)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_piece,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = SPECIAL_TOKENS.get(token["content"], True)
    keep_letters(spec["model"], vocab_size)
    return json.dumps(spec, ensure_ascii=False, indent=0) + "\n"


def keep_letters(model, vocab_size):
    """Make every letter with a space before it one token, in place: a word spelled "r u b y" is one token a letter.

    The letters that lack it take the place of the last tokens found, and the lowest rank: nothing else is cut anew.
    """
    vocab, merges = model["vocab"], model["merges"]
    free = vocab_size - len(vocab)  # little data: fewer merges than asked for
    by_id = sorted(vocab, key=vocab.get)
    for room in range(len(merges) + 1):
        dropped = set(by_id[len(by_id) - room :])
        kept = [pair for pair in merges if dropped.isdisjoint({*pair, "".join(pair)})]
        found = {"".join(pair) for pair in kept}
        missing = [["Ġ", letter] for letter in string.ascii_letters if "Ġ" + letter not in found]  # Ġ is a space
        if len(missing) <= free + room:
            break
    for token in dropped:
        del vocab[token]
    added = missing[: free + room]
    for pair in added:
        vocab["".join(pair)] = len(vocab)
    model["merges"] = kept + added


def train_sentencepiece(texts, vocab_size, num_spare=20, max_piece=16, character_coverage=0.9995):
    """SentencePiece BPE with byte fallback of an iterable of strings → the content of tokenizer.model (bytes).

    Text is kept as it is: no normalization, no space put before it, spaces and line breaks not collapsed.
    """
    special = special_tokens(num_spare, "sentencepiece")
    pad, end, *control, unknown = special
    check_size(vocab_size, special)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            max_sentencepiece_length=max_piece,
            character_coverage=character_coverage,
            max_sentence_length=SENTENCE_LIMIT,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            pad_piece=pad,
            eos_id=1,
            eos_piece=end,
            bos_id=-1,
            unk_id=special.index(unknown),  # never used: bytes stand in for what is unknown
            unk_piece=unknown,
            control_symbols=control,
            hard_vocab_limit=False,  # little data: fewer pieces than asked for
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "character_coverage" in str(error):
            message = f"--vocab_size {vocab_size} is too small for the different characters of this data"
            raise UserError(f"{message}: raise it, or lower --character_coverage (now {character_coverage})") from error
        raise UserError(f"SentencePiece cannot train on this data: {error}") from error
    return model.getvalue()


def lines(texts):
    """Texts cut at line breaks and at SENTENCE_LIMIT: SentencePiece learns from lines and skips long ones."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), SENTENCE_LIMIT // 4):  # a character has at most 4 bytes
                yield line[start : start + SENTENCE_LIMIT // 4]


def check_size(vocab_size, special):
    """The bytes and the special tokens have to fit."""
    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens need at least {least}"
        )


def tokenizer_config(kind, num_spare):
    """The content of tokenizer_config.json (the classes are stock transformers')."""
    if kind == "bpe":
        of_kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        tokens = [(text, SPECIAL_TOKENS.get(text, True)) for text in special_tokens(num_spare, kind)]
        added = {str(i): {"content": text, "special": special, **flags} for i, (text, special) in enumerate(tokens)}
        of_kind = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
            "unk_token": "<unk>",
            "added_tokens_decoder": added,
        }
    return of_kind | {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,  # transformers' "no limit"
    }


def write(folder, kind, trained, num_spare=20):
    """The tokenizer's folder from what `train_…` returned → Tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bpe":
        (folder / "tokenizer.json").write_text(trained, encoding="utf-8", newline="\n")
        (folder / "tokenizer.model").unlink(missing_ok=True)
    else:
        (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "tokenizer.model").write_bytes(trained)
    config = json.dumps(tokenizer_config(kind, num_spare), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")
    shutil.copyfile(CHATML, folder / "chat_template.jinja")
    return Tokenizer.load(folder)


# --- data


def split_weights(data):
    """ "a.txt:0.5,b.jsonl" → [("a.txt", 0.5), ("b.jsonl", 1.0)]. builtin is all text of the built-in world."""
    parts = []
    for part in filter(None, data.split(",")):
        name, weight = re.fullmatch(r"(.+?)(?::(\d+\.?\d*|\.\d+))?", part).groups()
        kind = name.removeprefix("builtin").removeprefix(":")
        kinds = ["pretrain", "sft"] if name == "builtin" else [kind]
        paths = [ensure(kind) for kind in kinds] if name.split(":")[0] == "builtin" else [name]
        parts += [(path, 1.0 if weight is None else float(weight)) for path in paths]
    if not parts:
        raise UserError("--data is empty: give builtin or files")
    return parts


def weighted_texts(parts):
    """Every text of each file as often as its weight says: 2 is twice, 0.5 is every second one."""
    for path, weight in parts:
        due = 0.0
        for text in texts(path):
            due += weight
            while due >= 1:
                yield text
                due -= 1


# --- report

REPORT_BYTES = 10_000_000  # of each file
SAMPLES = (
    *("strawberry reversed", "internationalization", "r u b y", "  two  spaces"),
    *("12 + 345 = 357", "3.14159", "人工智能 你好", "naïve 😀"),
)


def report(tokenizer, paths):
    """Compression of each file, whether decoding gives the text back, and how some words are cut → lines of text."""
    files = [("file", "bytes", "tokens", "bytes/token", "chars/token", "round trip")]
    for path in paths:
        num_bytes = num_chars = num_tokens = wrong = 0
        for text in texts(path):
            ids = tokenizer.encode(text)
            num_bytes += len(text.encode())
            num_chars += len(text)
            num_tokens += len(ids)
            wrong += tokenizer.decode(ids) != text
            if num_bytes >= REPORT_BYTES:
                break
        ratios = (f"{count / max(num_tokens, 1):.2f}" for count in (num_bytes, num_chars))
        verdict = "exact" if not wrong else f"{wrong} texts differ"
        files.append((pathlib.Path(path).name, f"{num_bytes:,}", f"{num_tokens:,}", *ratios, verdict))
    cuts = [("text", "tokens", "cut into")]
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        cuts.append((text, str(len(ids)), " | ".join(tokenizer.show(i) for i in ids)))
    longest = sorted(range(tokenizer.vocab_size), key=lambda i: (-tokenizer.token_bytes[i], i))[:12]
    yield f"{tokenizer.vocab_size} ids, {len(tokenizer.special)} of them special"
    yield "longest: " + " ".join(tokenizer.show(i) for i in longest)
    yield from ["", *table(files), "", *table(cuts)]


def table(rows):
    """Rows of strings as aligned lines, the first row underlined. A Chinese character is two columns wide."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple("-" * w for w in widths), *rows[1:]]
    right = [all(cell[:1].isdigit() for cell in column[2:]) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for cell, columns, is_number in zip(row, widths, right, strict=True):
            space = " " * (columns - width(cell))
            cells.append(space + cell if is_number else cell + space)
        yield "  ".join(cells).rstrip()


def width(text):
    """Columns that a terminal gives to `text`."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def main(cfg):
    if cfg.tokenizer and not cfg.report:
        raise UserError("--tokenizer names a vocabulary to measure: add --report, or leave it out to train one")
    if cfg.tokenizer:
        tokenizer, parts = Tokenizer.load(cfg.tokenizer), split_weights(cfg.data)
    else:
        out = pathlib.Path(cfg.out or ROOT / "out" / "tokenizer")
        if (out / "tokenizer_config.json").exists() and not cfg.overwrite:
            raise UserError(f"{out} already holds a tokenizer; give another --out, or --overwrite")
        check_size(cfg.vocab_size, special_tokens(cfg.num_spare, cfg.kind))
        parts = split_weights(cfg.data)
        sizes = (cfg.vocab_size, cfg.num_spare, cfg.max_piece)
        if cfg.kind == "bpe":
            trained = train_bpe(weighted_texts(parts), *sizes)
        else:
            trained = train_sentencepiece(weighted_texts(parts), *sizes, cfg.character_coverage)
        tokenizer = write(out, cfg.kind, trained, cfg.num_spare)
        print(f"wrote {out}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}")
        if tokenizer.vocab_size < cfg.vocab_size:
            print(f"(fewer than the {cfg.vocab_size} asked for: the data holds no more pairs that repeat)")
    if cfg.report:
        print("\n".join(report(tokenizer, [path for path, _ in parts])))
    return tokenizer


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
