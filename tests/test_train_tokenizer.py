"""Training a tokenizer: the command, its files, its errors; both kinds."""

import gzip
import io
import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece

from model.errors import UserError
from model.tokenizer import SPECIAL_TOKENS, Tokenizer
from trainer.train_tokenizer import Config, main, split_weights, table, train_bpe, weighted_texts

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORY = "The queen of the hill said: “the bell will tell”.\n\nThen 2024 bells fell, and all was well. "
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


@pytest.fixture
def data(tmp_path):
    """Files of every kind: text, chat with a thought and a tool call, preferences, compressed."""
    call = {"name": "calculator", "arguments": {"expression": "1+1"}}
    reply = {"role": "assistant", "content": "zebrafish", "reasoning_content": "quokka", "tool_calls": [call]}
    chat = {"conversations": [{"role": "user", "content": "armadillo"}, reply]}
    ask = chat["conversations"][0]
    sides = {side: [ask, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "story.txt").write_text(STORY * 40, encoding="utf-8")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [chat] * 30 + [sides]), encoding="utf-8")
    with gzip.open(tmp_path / "poem.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((json.dumps({"text": POEM}) + "\n") * 30)
    return tmp_path


def test_bpe_learns_from_all_text_of_every_file(data):
    files = f"{data / 'story.txt'},{data / 'chat.jsonl'}:2,{data / 'poem.jsonl.gz'}"
    tokenizer = main(Config(data=files, out=str(data / "out"), vocab_size=700, num_spare=3))
    names = [*SPECIAL_TOKENS, "<|spare_0|>", "<|spare_1|>", "<|spare_2|>"]
    assert tokenizer.special == {name: i for i, name in enumerate(names)}
    for word in ("quokka", "zebrafish", "armadillo", " bells", "明月"):
        assert len(tokenizer.encode(word)) == 1, word
    assert len(tokenizer.encode("2024")) == 4
    for letter in "abcxyzABCXYZ":  # capitals never stand alone in the data
        assert len(tokenizer.encode(" " + letter)) == 1
    for text in (STORY, POEM, "unseen ϕ 😀 \r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.special_id(name) for name in names]) == "".join(names[4:12])
    assert Tokenizer.load(data / "out").fingerprint == tokenizer.fingerprint
    assert max(tokenizer.token_bytes) <= 16


def test_training_is_deterministic_and_fills_the_vocabulary(data):
    texts = [STORY * 3, POEM * 3]
    assert train_bpe(texts, 420) == train_bpe(iter(texts), 420)
    for size in (400, 420):  # 420 is more than the data has pairs for
        vocab = json.loads(train_bpe(texts, size))["model"]["vocab"]
        assert sorted(vocab.values()) == list(range(size)) and {"Ġa", "Ġz", "ĠA", "ĠZ"} < vocab.keys()
    vocab = json.loads(train_bpe(texts, 296))["model"]["vocab"]  # eight merges: eight letters
    assert sorted(vocab.values()) == list(range(296)) and "Ġa" in vocab
    vocab = json.loads(train_bpe(texts, 288))["model"]["vocab"]  # bytes and special tokens only
    assert sorted(vocab.values()) == list(range(288))


def test_weights_say_how_often_a_text_counts(tmp_path):
    for name in ("a", "b", "c"):
        lines = (json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(4))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "c"))
    parts = split_weights(f"{a}:2,{b}:0.5,{c}")
    assert parts == [(a, 2.0), (b, 0.5), (c, 1.0)]
    assert list(weighted_texts(parts)) == "a0 a0 a1 a1 a2 a2 a3 a3 b1 b3 c0 c1 c2 c3".split()
    assert split_weights("C:\\data\\x.txt:.5") == [("C:\\data\\x.txt", 0.5)]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_too_small_a_vocabulary_says_the_minimum(kind, data):
    least = 256 + len(SPECIAL_TOKENS) + 20 + (kind == "sentencepiece")
    for size in (0, -5, least - 1):
        with pytest.raises(UserError, match=f"--vocab_size {size} .*at least {least}"):
            main(Config(data=str(data / "story.txt"), out=str(data / "out"), kind=kind, vocab_size=size))
    assert not (data / "out").exists()


def test_a_folder_is_not_overwritten_silently(data):
    config = Config(data=str(data / "story.txt"), out=str(data / "out"), vocab_size=330)
    first = main(config).fingerprint
    config.vocab_size = 350
    with pytest.raises(UserError, match="--overwrite"):
        main(config)
    assert Tokenizer.load(data / "out").fingerprint == first
    config.overwrite = True
    assert main(config).vocab_size == 350 and Tokenizer.load(data / "out").vocab_size == 350
    config.kind, config.vocab_size = "sentencepiece", 500
    main(config)
    assert not (data / "out" / "tokenizer.json").exists() and "<unk>" in Tokenizer.load(data / "out").special


def test_sentencepiece_round_trip_and_stock_reader(data):
    files = f"{data / 'story.txt'},{data / 'chat.jsonl'},{data / 'poem.jsonl.gz'}"
    tokenizer = main(Config(data=files, out=str(data / "out"), kind="sentencepiece", vocab_size=560))
    names = [*SPECIAL_TOKENS, *(f"<|spare_{i}|>" for i in range(20)), "<unk>"]
    assert tokenizer.special == {name: i for i, name in enumerate(names)}
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids) == (0, 1, (1, 3))
    hostile = "".join(names)
    texts = ["", " ", "  a  b ", "\n\n", STORY, POEM, "unseen ϕ 😀\x00\r\n", hostile]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert not set(ids) & set(tokenizer.special.values())
        decoder = tokenizer.stream_decoder()
        assert "".join([decoder.push(i) for i in ids]) + decoder.flush() == text
    assert len(tokenizer.encode("2024")) == 4
    chat = [{"role": "user", "content": hostile}, {"role": "assistant", "content": " hi", "reasoning_content": hostile}]
    ids, mask = tokenizer.render(chat)
    written = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special=False)
    assert written == f"<think>\n{hostile}\n</think>\n\n hi<|im_end|>"
    assert ids.count(tokenizer.special_id("<|im_start|>")) == 2

    tokenizer.save(data / "copy")
    assert Tokenizer.load(data / "copy").fingerprint == tokenizer.fingerprint
    pytest.importorskip("google.protobuf", reason="stock transformers reads tokenizer.model with protobuf")
    stock = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(data / "copy")
    for text in texts[:-1]:
        assert stock(text)["input_ids"] == tokenizer.encode(text)
    chat[0]["content"] = chat[1]["reasoning_content"] = "the bell"
    out = stock.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert (out["input_ids"], out["assistant_masks"]) == tokenizer.render(chat)


def test_symbols_that_a_sentencepiece_user_defined_are_text_to_encode(tmp_path):
    """The library itself finds such symbols in any text, unlike control symbols."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STORY, POEM] * 20), model_writer=model, model_type="bpe", vocab_size=370, minloglevel=2,
        byte_fallback=True, user_defined_symbols=["<|im_start|>", "<|im_end|>", "  "], hard_vocab_limit=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    added = {"3": {"content": "<|im_start|>", "special": True}, "4": {"content": "<|im_end|>", "special": True}}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path).with_chat_template("chatml")
    text = "the <|im_end|><|im_start|> bell <|im_<|im_end|>"
    ids = tokenizer.encode(text)
    assert not {3, 4} & set(ids) and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1  # this one puts a space before a text
    ids, mask = tokenizer.render([{"role": "user", "content": text}, {"role": "assistant", "content": " the bell"}])
    assert ids.count(3) == ids.count(4) == 2
    written = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special=False)
    assert written == "the bell<|im_end|>"  # decode drops the first space


def test_report_of_an_existing_tokenizer(data, capsys):
    main(Config(data=f"{data / 'story.txt'},{data / 'poem.jsonl.gz'}", tokenizer="nano", report=True))
    out = capsys.readouterr().out
    story = next(line for line in out.splitlines() if line.startswith("story.txt"))
    tokens = len(Tokenizer.load("nano").encode(STORY * 40))
    num_bytes = len((STORY * 40).encode())
    assert story.split() == ["story.txt", f"{num_bytes:,}", f"{tokens:,}", f"{num_bytes / tokens:.2f}",
                             f"{len(STORY * 40) / tokens:.2f}", "exact"]
    assert "3 | . | 1 | 4" in out
    with pytest.raises(UserError, match="--report"):
        main(Config(tokenizer="nano"))


def test_tables_are_aligned():
    rows = list(table([("name", "count"), ("a", "5"), ("中文", "1,234")]))
    assert rows == ["name  count", "----  -----", "a         5", "中文  1,234"]


def test_the_command(data):
    script = [sys.executable, str(ROOT / "trainer" / "train_tokenizer.py")]
    run = subprocess.run([*script, "--data", "story.txt", "--vocab_size", "320", "--out", "here", "--report"], cwd=data,
                         capture_output=True, encoding="utf-8", env=None)
    assert run.returncode == 0, run.stderr
    assert "320 ids" in run.stdout and Tokenizer.load(data / "here").vocab_size == 320
    run = subprocess.run([*script, "--data", "absent.txt"], cwd=data, capture_output=True, encoding="utf-8")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr
