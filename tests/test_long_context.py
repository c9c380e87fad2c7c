"""Reading beyond the trained length: loss by position, needles in haystacks, and YaRN, which must make it better."""

import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.builtin import needle
from dataset.builtin.checkers import check
from dataset.builtin.stories import story
from dataset.builtin.world import split_of
from dataset.lm_dataset import PretrainDataset
from eval import agent, eval_loss, long_context, reward_model
from eval.intervals import wilson
from model.checkpoint import load_causal_lm, load_config, load_model, save_model
from model.config import new_config
from model.errors import UserError
from model.generate import SamplingParams, generate
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, Decoder
from scripts import chat
from trainer import train_pretrain

CPU = torch.device("cpu")
NANO = Tokenizer.load("nano")


def tiny(max_len=64, seed=0):
    torch.manual_seed(seed)
    return CausalLM(new_config("1x32", NANO, max_len)).eval()


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    """A .txt of built-in stories, some 6000 tokens."""
    path, rng = tmp_path_factory.mktemp("text") / "novel.txt", random.Random(0)
    path.write_text("\n".join(story(rng) for _ in range(80)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model, trained on rows of 64 tokens of built-in stories: its folder, the data, the farthest position."""
    place = tmp_path_factory.mktemp("trained")
    path, rng = place / "stories.jsonl", random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(700):
            file.write(json.dumps({"text": " ".join(story(rng) for _ in range(3))}) + "\n")
    farthest = []
    rotation = Decoder.rotation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "rotation", lambda self, positions: farthest.append(int(positions.max())) or rotation(
            self, positions))
        train_pretrain.main(train_pretrain.Config(
            data=str(path), out=str(place / "model"), size="2x64", tokenizer="nano", max_len=64, max_steps=120,
            batch_size=16, micro_batch_size=16, warmup_steps=10, eval_every=0, sample_every=0, save_every=0,
            device="cpu", dtype="float32", compile="off"))
    return SimpleNamespace(model=place / "model", data=path, farthest=max(farthest))


# --- scaling


def test_the_declared_length_is_the_trained_one_and_what_scaling_stretches(trained, tmp_path):
    """No position behind max_len is ever trained; config.json says so; YaRN's L0 is that; a saved model keeps it."""
    assert trained.farthest == 63
    assert load_config(trained.model).max_position_embeddings == 64
    model, tokenizer = load_model(trained.model, rope_scaling="yarn:4")
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    save_model(tmp_path / "stretched", model, tokenizer)
    again = load_causal_lm(tmp_path / "stretched")
    assert again.config == model.config
    ids = torch.randint(5, NANO.vocab_size, (1, 100))
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(UserError, match="already"):
        load_model(tmp_path / "stretched", rope_scaling="yarn:4")


def test_yarn_is_static_what_follows_does_not_change_what_was_read():
    """One table for all lengths: the logits of 20 tokens are the same with 1, 200 or 0 more behind them."""
    config = tiny(64).config.stretched("yarn:4")
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(5, NANO.vocab_size, (1, 220))
    longest = model(ids).logits[:, :20]
    for more in (0, 1):
        torch.testing.assert_close(model(ids[:, :20 + more]).logits[:, :20], longest, atol=1e-4, rtol=1e-4)


def test_yarn_reads_on_where_the_model_without_is_lost(trained):
    """SPEC of the method: at 1 to 4 times the trained length the loss is clearly lower with it, of one model."""
    data = PretrainDataset(trained.data, NANO, 256, "val")

    def load(spec):
        return load_causal_lm(trained.model, rope_scaling="" if spec == "none" else spec)

    text = long_context.read_text(load, ["none", "yarn:4"], data, NANO, 64, CPU, max_rows=40)
    none, yarn = text["readings"]["none"], text["readings"]["yarn:4"]
    assert text["bins"][0] == (0, 16) and text["bins"][-1] == (240, 256) and len(none["bins"]) == 16
    assert yarn["saved"]["interval"][0] > 0.03
    assert yarn["saved"]["value"] == pytest.approx(none["beyond"]["value"] - yarn["beyond"]["value"])
    assert none["saved"]["value"] == 0
    assert none["beyond"]["interval"][0] > yarn["beyond"]["interval"][1]
    assert none["bins"][-1]["value"] > none["within"]["value"]


# --- bits per byte by position


@pytest.mark.parametrize("piece", [0, 16, 24])
def test_bits_by_position_are_those_of_the_definition(novel, piece):
    model, data = tiny(16), PretrainDataset(novel, NANO, 40)
    edges = [0, 4, 16, 40]
    bits, sizes = long_context.bits_by_position(model, data, NANO, edges, CPU, max_rows=5, piece=piece)
    assert bits.shape == sizes.shape == (5, 3)
    for row in range(5):
        ids = torch.from_numpy(data[row]["input_ids"])
        expected = np.zeros((2, 3))
        for position in range(1, 40):
            start = position // piece * piece if piece else 0           # what a token sees begins there
            if position > start:
                logits = model(ids[None, start:position]).logits[0, -1]
                place = sum(position >= edge for edge in edges[1:])
                expected[0, place] -= logits.log_softmax(-1)[ids[position]].item() / math.log(2)
                expected[1, place] += NANO.token_bytes[ids[position]]
        np.testing.assert_allclose([bits[row], sizes[row]], expected, rtol=1e-4)


def test_padding_and_first_tokens_do_not_count(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "One day."}\n{"text": "Two"}\n', encoding="utf-8")
    data, model = PretrainDataset(path, NANO, 64), tiny()
    bits, sizes = long_context.bits_by_position(model, data, NANO, [0, 64], CPU)
    assert len(data) == 1 and sizes.tolist() == [[len("One day.") + len("Two")]]
    ids = torch.from_numpy(data[0]["input_ids"])
    logprobs = model(ids[None]).logits[0].log_softmax(-1)
    opened = [place for place in range(64) if ids[place] == NANO.bos_id][:3:2]      # of <e> One day. <e> <e> Two <e>
    assert opened[0] == 0 and ids[opened[1] - 1] == NANO.eos_id
    targets = [place for place in range(int((ids != NANO.pad_id).sum())) if place not in opened]
    expected = -sum(logprobs[place - 1, ids[place]].item() for place in targets) / math.log(2)
    assert bits[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trained, longest", [(16, 64), (10, 35), (7, 16), (2, 9)])
def test_the_trained_length_is_a_border_between_bins(trained, longest, novel):
    text = long_context.read_text(lambda spec: tiny(trained), ["none"], PretrainDataset(novel, NANO, longest), NANO,
                                  trained, CPU, max_rows=3)
    firsts, ends = zip(*text["bins"], strict=True)
    assert firsts[0] == 0 and ends[-1] == longest and firsts[1:] == ends[:-1] and trained in firsts
    one = text["readings"]["none"]
    assert len(one["bins"]) == len(text["bins"])
    assert one["beyond"]["interval"][0] <= one["beyond"]["value"] <= one["beyond"]["interval"][1]


# --- needles


@pytest.mark.parametrize("size", [0, 15, 40, 300])
@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_a_haystack_has_its_size_and_the_needle_its_depth(size, depth):
    rng = random.Random(size)
    hidden = needle.secret(rng)
    text = needle.haystack(rng, hidden, size, depth)
    assert text.count(hidden.statement) == 1 and len(re.findall(r"\d\d", text)) == 1
    before, after = (len(part.split()) for part in text.split(hidden.statement))
    words = before + after
    assert words + len(hidden.statement.split()) <= max(size, 7)
    if size == 300:
        assert words > 270 and abs(before / words - depth) < 0.03
    assert (before == 0) if depth == 0 else (after == 0 if depth == 1 else True)


def test_training_texts_fit_into_256_tokens_and_hold_no_test_needle():
    kept = list(needle.conversations(random.Random(0), 150))
    assert max(len(NANO.render(record["conversations"])[0]) for record in kept) <= 256
    for record in kept:
        user, assistant = record["conversations"]
        who, number = re.fullmatch(r"The secret number of (\w+) is (\d\d)\.", assistant["content"]).groups()
        assert assistant["content"] in user["content"] and user["content"].endswith(f"secret number of {who}?")
        assert split_of(f"needle:{who}:{number}") == "train"
    places = {}
    for level in (1, 5):
        items = [needle.draw(random.Random(i), "needle", "test", level, needle.NEEDLES) for i in range(20)]
        assert all(split_of(item.key) == "test" and check(item.checker, item.reply, item.answer) for item in items)
        places[level] = np.mean([item.question.index(item.reply) / len(item.question) for item in items])
    assert places[1] > 0.6 and places[5] < 0.3                      # level 1: near the question


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("length, depth", [(64, 0.0), (200, 1.0), (500, 0.5)])
def test_prompts_fill_their_length_and_never_more(length, depth, raw):
    items = long_context.needle_items(NANO, length, depth, 6, 8, raw=raw)
    assert [len(item["prompt_ids"]) for item in items] != [len(items[0]["prompt_ids"])]
    for item in items:
        text = NANO.decode(item["prompt_ids"], skip_special=True)
        who, = re.findall(rf"The secret number of (\w+) is {item['answer']}\.", text)
        assert split_of(f"needle:{who}:{item['answer']}") == "test"
        assert length - 8 - 30 <= len(item["prompt_ids"]) <= length - 8
        assert text.endswith(f"\nThe secret number of {who} is" if raw else f"secret number of {who}?\nassistant\n")
    assert items == long_context.needle_items(NANO, length, depth, 6, 8, raw=raw)
    assert items != long_context.needle_items(NANO, length, depth, 6, 8, raw=raw, seed=1)


def test_answers_are_judged_cell_by_cell(monkeypatch):
    """A reader that remembers only the last 60 words finds what is not deeper."""
    def reads_the_end(model, tokenizer, items, batch_size, thinking):
        for item in items:
            text = item["messages"][-1]["content"]
            found = re.findall(r"is (\d\d)\.", " ".join(text.split()[-60:]))
            yield (f"It is {found[0]}." if found else "I do not know."), 3

    monkeypatch.setattr(long_context, "answer_items", lambda *args: list(reads_the_end(*args)))
    cells = long_context.find_needles(None, NANO, [100, 400], [0.0, 1.0], 4)
    assert [(one["length"], one["depth"], one["right"]) for one in cells] == [
        (100, 0.0, 4), (100, 1.0, 4), (400, 0.0, 0), (400, 1.0, 4)]
    assert cells[2]["interval"] == wilson(0, 4) and cells[2]["accuracy"] == 0
    assert [one["accuracy"] for one in long_context.by_length(cells)] == [1.0, 0.5]
    lines = list(long_context.needle_table(cells))
    assert "depth 0%" in lines[0] and lines[2].split()[0] == "400" and "0% (0%-49%)" in lines[2]


def test_the_grid_shows_every_cell_in_its_place(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn = {}
    monkeypatch.setattr(Axes, "text", lambda axis, x, y, text, **_: drawn.update({(x, y): text}))
    places = [(length, depth) for length in (64, 128) for depth in (0, 0.5, 1)]
    cells = [long_context.cell(*place, right, 10) for right, place in enumerate(places, start=1)]
    long_context.draw({"model": "m", "trained_length": 64, "needles": {"none": cells}}, tmp_path / "a.png")
    assert drawn == {(0, 0): "10%", (0, 1): "20%", (0, 2): "30%", (1, 0): "40%", (1, 1): "50%", (1, 2): "60%"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny") / "model"
    save_model(place, tiny(64), NANO)
    return str(place)


@pytest.mark.parametrize("raw", [False, True])
def test_command_line(folder, novel, raw, tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    figures = long_context.main(long_context.Config(
        model=folder, data=str(novel), rope_scaling="yarn:2, linear:3,none", max_rows=4, needles=2, depths=2,
        lengths="64,100", max_new_tokens=6, raw=raw, device="cpu", dtype="float32", out=str(out)))
    told = capsys.readouterr().out
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(figures))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert figures["trained_length"] == 64 and figures["max_len"] == 192
    assert list(figures["text"]["readings"]) == list(figures["needles"]) == ["none", "yarn:2", "linear:3"]
    assert [(one["length"], one["depth"]) for one in figures["needles"]["none"]] == [
        (64, 0.0), (64, 1.0), (100, 0.0), (100, 1.0)]
    beyond = figures["text"]["readings"]["yarn:2"]["beyond"]
    assert f"{beyond['value']:.3f} [{beyond['interval'][0]:.3f}" in told and "read 64 tokens at a time" in told
    assert "needles found, rope scaling linear:3" in told


def test_only_needles_at_lengths_of_its_own_choice(folder):
    figures = long_context.main(long_context.Config(model=folder, data="none", needles=1, depths=1, device="cpu",
                                                    max_new_tokens=4, rope_scaling="yarn:6"))
    assert [one["length"] for one in figures["needles"]["yarn:6"]] == [64, 128, 192, 256]
    assert "text" not in figures


@pytest.mark.parametrize("settings, said", [
    (dict(rope_scaling="yarn"), "yarn:F"), (dict(max_len=64), "trained on 64"), (dict(lengths="a"), "--lengths a"),
    (dict(depths=0), "--depths 0"), (dict(needles=-1), "--needles -1"), (dict(data="none", needles=0), "nothing"),
    (dict(data="none", needles=1, lengths="30"), "no room for a needle"), (dict(model="no/such"), "no/such")])
def test_what_makes_no_sense_is_refused(settings, said, folder):
    with pytest.raises(UserError, match=re.escape(said)):
        long_context.main(long_context.Config(**{"model": folder, "device": "cpu", **settings}))


def test_a_text_that_ends_too_early_is_refused(folder, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A very short story.", encoding="utf-8")
    with pytest.raises(UserError, match="the text ends before position"):
        long_context.main(long_context.Config(model=folder, data=str(path), device="cpu"))


# --- elsewhere, nothing is cut in silence


def test_a_prompt_without_room_names_the_flag(folder):
    with pytest.raises(UserError, match="64 positions.*--rope_scaling"):
        generate(tiny(64), [[5] * 70], SamplingParams(), NANO)
    with pytest.raises(UserError, match="--rope_scaling"):
        agent.play(None, NANO, [{"prompt_ids": [5] * 70}], 8, 2, 64)
    assert len(generate(load_causal_lm(folder, rope_scaling="yarn:2"), [[5] * 70], SamplingParams(4), NANO)) == 1


def test_chat_says_what_it_left_out_and_why_it_ended(folder, capsys):
    talk = chat.Chat(chat.Config(model=folder, history=9, temperature=1, seed=0, device="cpu"))
    question = [{"role": "user", "content": "hello"}]
    talk.exchanges = [({"role": "user", "content": "one day " * 6}, {"role": "assistant", "content": "ok"})] * 3
    talk.answer(question)
    told = capsys.readouterr().out
    assert "2 of the earlier exchanges left out" in told and "64 positions" in told and "--rope_scaling" in told
    talk.command("/reset")
    talk.set("max_new_tokens", "2")
    talk.answer(question)
    assert "--rope_scaling" not in capsys.readouterr().out
    talk.model.lm_head.weight.data[list(NANO.stop_ids)] = 0            # never likely: it writes to the last position
    talk.set("max_new_tokens", "100")
    talk.set("temperature", "0")
    talk.answer(question)
    assert "no positions left in the model; --rope_scaling yarn:F" in capsys.readouterr().out


def test_eval_loss_says_which_texts_are_cut_or_longer_than_trained(folder, tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]
    path.write_text("".join(json.dumps({"messages": turn * n}) + "\n" for n in (1, 1, 8)), encoding="utf-8")

    def told(**settings):
        eval_loss.main(eval_loss.Config(model=folder, data=str(path), device="cpu", dtype="float32", **settings))
        return capsys.readouterr().out

    assert "1 of 3 records lost their beginning, to fit into 64 tokens" in told()
    assert "reach positions that this model does not know; --rope_scaling" in told(max_len=512)
    assert "note" not in told(max_len=512, rope_scaling="yarn:8")


def test_a_reward_model_is_stretched_too(tmp_path):
    from model.heads import ScalarModel
    torch.manual_seed(0)
    model = ScalarModel(new_config("1x32", NANO, 64)).eval()
    save_model(tmp_path / "reward", model, NANO)
    stretched, _ = reward_model.load_scorer(str(tmp_path / "reward"), rope_scaling="yarn:4")
    assert stretched.config.max_position_embeddings == 256 and stretched.config.rope_scaling["factor"] == 4
    ids = torch.randint(5, NANO.vocab_size, (1, 50))
    assert (stretched(ids).logits - model(ids).logits).abs().max() > 0
