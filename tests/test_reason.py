"""Reasoning: tags are single tokens that only structure writes, thinking can be switched, weights weigh targets."""

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

from dataset import jsonl
from dataset.builtin import generate, traces
from dataset.builtin.checkers import check
from dataset.builtin.skills import SKILLS, draw_all
from dataset.builtin.world import split_of
from dataset.lm_dataset import ReasonDataset, SFTDataset, collate
from eval import skills
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import Completion
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer, lift_structure
from model.transformer import CausalLM
from tests.conftest import WORDS, killed_after
from tests.ranks_worker import run_job
from tests.test_ranks import together
from trainer import train_full_sft, train_reason
from trainer.losses import next_token_loss, weighted_next_token_loss

NANO, BASE = Tokenizer.load("nano"), Tokenizer.load("base")
OPEN, CLOSE = NANO.special_id("<think>"), NANO.special_id("</think>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
USER, OTHER = {"role": "user", "content": "What is 2+3?"}, {"role": "user", "content": "And 3+3?"}


def said(content, **parts):
    return {"role": "assistant", "content": content, **parts}


def shown(messages, **options):
    """The rendered conversation as text, what is a target in [brackets]."""
    ids, mask = NANO.render(messages, **options)
    pieces = "".join(("[" if m else "") + NANO.decode([i], skip_special=False) + ("]" if m else "")
                     for i, m in zip(ids, mask, strict=True))
    return pieces.replace("][", "")


# --- tags and template


@pytest.mark.parametrize("tokenizer", [NANO, BASE], ids=["nano", "base"])
def test_tags_are_single_tokens_that_plain_text_never_makes(tokenizer):
    for tag in TAGS:
        index = tokenizer.special_id(tag)
        assert tokenizer.decode([index]) == tag and tokenizer.token_bytes[index] == 0
        assert index not in tokenizer.encode(f"a {tag} b") and tokenizer.decode(tokenizer.encode(tag)) == tag
        ids, _ = tokenizer.render([{"role": "system", "content": tag}, {"role": "user", "content": f"{tag}x{tag}"},
                                   {"role": "tool", "content": tag}], add_generation_prompt=True)
        assert index not in ids
    ids, mask = tokenizer.render([USER, said("", reasoning_content="hm <think>", answer="5")])
    places = [ids.index(tokenizer.special_id(tag)) for tag in TAGS]
    assert places == sorted(places) and all(mask[place] for place in places)
    assert all(ids.count(tokenizer.special_id(tag)) == 1 for tag in TAGS)      # the one inside the thought is text


def test_thinking_is_switched_by_the_prompt_and_learned_after_it():
    header = "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n"
    assert shown([USER], add_generation_prompt=True) == header
    assert shown([USER], add_generation_prompt=True, enable_thinking=True) == header + "<think>"
    assert shown([USER], add_generation_prompt=True, enable_thinking=False) == header + empty
    assert shown([USER, said("5")]) == header + "[5<|im_end|>]\n"
    assert shown([USER, said("5", reasoning_content="2, 3")]) == (
        header + "[<think>\n2, 3\n</think>\n\n5<|im_end|>]\n")
    assert shown([USER, said("5", reasoning_content="")]) == header + empty + "[5<|im_end|>]\n"   # given, not learned


def test_old_thoughts_are_dropped_and_what_followed_from_them_is_no_target():
    header = "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    rest = "\n<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n[<think>\nb\n</think>\n\n6<|im_end|>]\n"
    last = [OTHER, said("6", reasoning_content="b")]
    for thought in ("a", ""):
        assert shown([USER, said("5", reasoning_content=thought), *last]) == header + "5<|im_end|>" + rest
    assert shown([USER, said("5"), *last]) == header + "[5<|im_end|>]" + rest         # an answer that had no thought
    call = said("", reasoning_content="c", tool_calls=[{"name": "f", "arguments": {}}])
    kept = [USER, call, {"role": "tool", "content": "5"}, said("5", reasoning_content="d")]
    assert shown(kept).count("<think>") == 2                                          # all since the user's last word
    ids, _ = NANO.render(kept)
    prompt, _ = NANO.render(kept[:-1], add_generation_prompt=True, enable_thinking=True)
    assert ids[:len(prompt)] == prompt


def test_transformers_renders_every_switch_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    NANO.save(tmp_path)
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(40):
        messages = []
        for _ in range(rng.randint(1, 3)):
            reply = said(rng.choice(("5", "", "<think>", "a\nb")))
            reply |= rng.choice(({}, {"reasoning_content": ""}, {"reasoning_content": "x\n\ny"}))
            reply |= rng.choice(({}, {"answer": "7"}))
            messages += [USER, reply]
        switch = rng.choice(({}, {"enable_thinking": True}, {"enable_thinking": False}))
        # transformers makes special tokens of tags that a message spells: there only the text is the same
        spelled = any(message["content"] == "<think>" for message in messages)
        for part, prompt in ((messages, False), (messages[:-1], True)):
            ids, mask = NANO.render(part, add_generation_prompt=prompt, **switch)
            text = stock.apply_chat_template(part, add_generation_prompt=prompt, tokenize=False, **switch)
            assert text == NANO.decode(ids, skip_special=False)
            if not spelled:
                out = stock.apply_chat_template(part, add_generation_prompt=prompt, return_dict=True,
                                                return_assistant_tokens_mask=True, **switch)
                assert (out["input_ids"], out["assistant_masks"]) == (ids, mask)


# --- data


def write_traces(path, number=60):
    """Ragged conversations: some with thoughts, some with empty ones, some without, one or two exchanges."""
    rng = random.Random(2)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def answer():
        return rng.choice((f"<think>\n{words(14)}\n</think>\n\n{words(4)}", f"<think></think>{words(4)}", words(6),
                           f"<think>{words(9)}</think><answer>{words(2)}</answer>"))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(number):
            turns = [turn for _ in range(rng.randint(1, 2))
                     for turn in ({"role": "user", "content": words(6)}, {"role": "assistant", "content": answer()})]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


@pytest.fixture
def thoughts(tmp_path):
    return write_traces(tmp_path / "thoughts.jsonl")


def test_weights_by_a_second_reading_of_every_row(thoughts):
    data = ReasonDataset(str(thoughts), NANO, 48, tag_weight=3, thought_weight=0.5, answer_weight=2)
    plain = SFTDataset(str(thoughts), NANO, 48)
    assert len(data) == len(plain) > 5
    for row, other in zip(map(data.__getitem__, range(len(data))), map(plain.__getitem__, range(len(data))),
                          strict=True):
        assert row.keys() - other.keys() == {"weights"} and all((row[name] == other[name]).all() for name in other)
        inside = False
        for index, weight in zip(row["input_ids"], row["weights"], strict=True):
            tag = NANO.decode([index]) in TAGS
            inside = inside and index != CLOSE
            assert weight == (3 if tag else 0.5 if inside else 2)
            inside = inside or index == OPEN
        assert not inside
    batch = collate([data[0], data[1]])
    assert data.count(batch) == (batch["weights"] * batch["loss_mask"]).sum() != batch["loss_mask"].sum()


def test_truncation_drops_whole_exchanges_and_never_opens_a_thought(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    long, short = " ".join(WORDS * 3), "the cat"
    records = [[said(f"<think>{a}</think>{b}") for a, b in pairs] for pairs in (
        [(long, short)], [(short, long)], [(long, long), (short, short)], [(short, short), (long, short)],
        [(short, short)], [(short, short), (short, short)])]
    path.write_text("".join(json.dumps({"messages": [m for reply in replies for m in (USER, reply)]}) + "\n"
                            for replies in records), encoding="utf-8")
    data = ReasonDataset(str(path), NANO, 64)
    assert data.report["dropped"] == 3 and data.report["shortened"] == 1              # records 1, 2, 4; record 3
    assert "3 conversations dropped" in capsys.readouterr().err
    texts = []
    for row in map(data.__getitem__, range(len(data))):
        for segment in range(1, row["segment_ids"].max() + 1):
            texts.append(NANO.decode(row["input_ids"][row["segment_ids"] == segment], skip_special=False))
    assert len(texts) == 3
    for text in texts:
        assert re.findall("</?think>", text) == ["<think>", "</think>"]
        assert text.endswith("</think>\n\nthe cat<|im_end|>\n")


@pytest.mark.parametrize("content, told", [
    ("<think>a", "<think> is never closed"), ("a</think>b", "</think> is out of place"),
    ("<think>a<think>b</think></think>", "<think> is out of place"),
    ("<answer>1</answer><think>a</think>", "the order is think")])
def test_malformed_tags_are_a_bad_record(content, told, thoughts, capsys):
    with open(thoughts, "a", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": [USER, said(content)]}) + "\n")
    with pytest.raises(UserError, match=rf"thoughts.jsonl:61: .*{re.escape(told)}"):
        ReasonDataset(str(thoughts), NANO, 64)
    assert ReasonDataset(str(thoughts), NANO, 64, on_bad_record="skip").report["skipped"] == 1
    assert SFTDataset(str(thoughts), NANO, 64).report["malformed"] == 1              # elsewhere it stays plain text


# --- the loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalLM(ModelConfig(NANO.vocab_size, 32, 64, 2, 2, 1, head_dim=32, max_position_embeddings=128))


def test_loss_by_hand_and_its_gradient_stays_off_prompts_and_padding(model, thoughts):
    data = ReasonDataset(str(thoughts), NANO, 48, tag_weight=4, thought_weight=0.5, answer_weight=1.5)
    batch = collate([data[row] for row in range(4)])
    ids, segments, mask, weights = (batch[name] for name in ("input_ids", "segment_ids", "loss_mask", "weights"))
    logits = model(ids, None, segments, batch["positions"]).logits.detach().requires_grad_()
    logprobs = F.pad(logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], (1, 0))
    loss = weighted_next_token_loss(logprobs, mask, weights) / data.count(batch)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1)
    chosen = mask[:, 1:].bool()
    by_hand = (each * weights[:, 1:])[chosen].sum() / weights[:, 1:][chosen].sum()
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)
    ours, _ = train_reason.compute_loss(model, batch, 0.0)
    assert float(ours) / data.count(batch) == pytest.approx(float(by_hand), rel=1e-5)
    loss.backward()
    touched = logits.grad.abs().sum(-1) > 0                                            # z_(t-1) predicts x_t
    assert torch.equal(touched[:, :-1], chosen) and not touched[:, -1].any()
    wild = torch.where(mask.bool(), weights, 1e6)                                      # the weight multiplies the mask
    assert torch.equal(weighted_next_token_loss(logprobs, mask, wild) / data.count(batch), loss)


def test_equal_weights_are_sft_and_a_common_factor_cancels(model, thoughts):
    logprobs = {}
    for weight in (1.0, 8.0):                                                          # a power of two: exact
        data = ReasonDataset(str(thoughts), NANO, 48, tag_weight=weight, thought_weight=weight, answer_weight=weight)
        batch = collate([data[row] for row in range(4)])
        x = logprobs.setdefault("x", token_logprobs(model, batch["input_ids"], None, batch["segment_ids"],
                                                    batch["positions"])[0].detach())
        loss = weighted_next_token_loss(x, batch["loss_mask"], batch["weights"]) / data.count(batch)
        assert torch.equal(loss, next_token_loss(x, batch["loss_mask"]) / int(batch["loss_mask"].sum()))


# --- the script

TINY = dict(max_len=48, batch_size=7, log_every=1, eval_every=3, eval_rows=2, sample_every=0, save_every=2,
            device="cpu", warmup_steps=2, max_steps=6, lr=1e-3)


@pytest.fixture(scope="module")
def parent(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("parent")
    save_model(folder, model, NANO)
    return folder


def train(parent, thoughts, out, script=train_reason, **changes):
    return script.main(script.Config(**{**TINY, "model": str(parent), "data": str(thoughts), "out": str(out),
                                        **changes}))


def weights_of(folder):
    return load_model(folder)[0].state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_one_are_full_sft_bit_for_bit(parent, thoughts, tmp_path):
    ones = dict(tag_weight=1.0, max_steps=4)
    train(parent, thoughts, tmp_path / "reason", **ones)
    train(parent, thoughts, tmp_path / "sft", script=train_full_sft, max_steps=4)
    train(parent, thoughts, tmp_path / "eight", max_steps=4, tag_weight=8.0, thought_weight=8.0, answer_weight=8.0)
    train(parent, thoughts, tmp_path / "other", **{**ones, "tag_weight": 4.0})
    plain = weights_of(tmp_path / "sft")
    assert same(weights_of(tmp_path / "reason"), plain) and not same(weights_of(tmp_path / "other"), plain)
    for name, value in weights_of(tmp_path / "eight").items():
        assert torch.allclose(value, plain[name], atol=1e-6)


def test_a_killed_run_continues_to_the_same_bits(parent, thoughts, tmp_path, capsys):
    flags = dict(tag_weight=2.5, thought_weight=0.7)
    train(parent, thoughts, tmp_path / "whole", **flags)
    with killed_after(5):
        train(parent, thoughts, tmp_path / "cut", **flags)
    train(parent, thoughts, tmp_path / "cut", **flags)
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    trajectories = [[(entry["step"], entry.get("loss"), entry.get("val_loss")) for entry in map(json.loads, lines)]
                    for lines in ((tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                                  for name in ("whole", "cut"))]
    assert trajectories[0] == trajectories[1]


def test_two_ranks_and_any_micro_batches_are_one(parent, thoughts, tmp_path, monkeypatch):
    """7 rows leave a rank one short, and their weights sum to fractions that differ from rank to rank."""
    monkeypatch.setattr(jsonl, "CACHE", tmp_path / "cache")
    flags = {**TINY, "model": str(parent), "data": str(thoughts), "max_steps": 4, "dtype": "float64",
             "optimizer": "adamw", "tag_weight": 3.3, "thought_weight": 0.7, "save_every": 0}

    def job(name, **changes):
        return {"name": name, "script": "train_reason", "flags": {**flags, "out": str(tmp_path / name), **changes}}

    alone = run_job(tmp_path, **job("alone"))
    split = run_job(tmp_path, **job("split", micro_batch_size=2))
    pair = together(tmp_path, [job("pair", micro_batch_size=2)])["pair"]
    for other in (split, *pair):
        for mine, theirs in zip(alone["gradients"], other["gradients"], strict=True):
            assert (mine - theirs).norm() < 1e-6 * mine.norm()
        assert torch.allclose(alone["weights"], other["weights"], rtol=0, atol=1e-7)
    assert torch.equal(pair[0]["weights"], pair[1]["weights"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for name in ("alone", "pair")]
    for mine, theirs in zip(*lines, strict=True):
        mine, theirs = json.loads(mine), json.loads(theirs)
        assert mine.get("loss", mine.get("val_loss")) == pytest.approx(theirs.get("loss", theirs.get("val_loss")))


def test_bad_input_is_one_line(parent, thoughts, tmp_path, model):
    old = tmp_path / "old"
    save_model(old, model, NANO)
    (old / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", encoding="utf-8")
    for folder, flags, told in ((parent, {"tag_weight": -1.0}, "--tag_weight -1.0"),
                                (parent, dict.fromkeys(("tag_weight", "thought_weight", "answer_weight"), 0.0),
                                 "one of them is more"),
                                (old, {}, "give --chat_template chatml")):
        with pytest.raises(UserError, match=told) as error:
            train(folder, thoughts, tmp_path / "run", **flags)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    train(old, thoughts, tmp_path / "run", chat_template="chatml", max_steps=1)
    without = Tokenizer.load("nano")
    without.special.pop("<think>")
    with pytest.raises(UserError, match="no single tokens"):
        train_reason.check_thinking(without, "out/x")


# --- the built-in traces


def items_of(split):
    return [item for name in traces.TRACED for item in draw_all(random.Random(1), name, split, 60, traces.TRACED)]


def check_steps(lines, answer):
    """Assert every line of worked arithmetic: x+y+c=digit c1, x-y-b=digit b1, 7*6=42, a problem, the final number."""
    carry, product = 0, None
    for line in lines:
        left, _, right = line.partition("=")
        digits = [int(digit) for digit in re.findall(r"\d+", left)]
        if step := re.fullmatch(r"(\d) ([cb])(\d)", right):
            digit, out = int(step[1]), int(step[3])
            value = digits[0] - sum(digits[1:]) if "-" in left else sum(digits)
            assert value == digit + (-10 if step[2] == "b" else 10) * out and digits[-1] == carry, line
            assert product in (None, digits[0]), line
            carry, product = out, None
        elif right:
            product = int(right)
            assert digits[0] * digits[1] == product and "*" in left, line
        else:
            assert line == answer or re.fullmatch(r"\d+[+-]\d+", line), line
            carry = 0


def test_every_trace_is_right_and_every_step_in_it():
    seen = set()
    for item in items_of("train"):
        thought, answer = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", item.reply, re.DOTALL).groups()
        assert answer == item.answer and check(item.checker, item.reply, item.answer)
        seen.add(item.skill)
        check_steps(thought.splitlines(), answer)
        if problem := re.search(r"(\d+) ?([+*-]) ?(\d+)", item.question):
            a, b = int(problem[1]), int(problem[3])
            assert int(answer) == {"+": a + b, "-": a - b, "*": a * b}[problem[2]]
    assert seen == traces.TRACED.keys()


def test_traces_are_apart_from_other_data_and_from_their_held_out_exercises(tmp_path):
    assert not traces.TRACED.keys() & SKILLS.keys()
    for kind, size in (("traces", 800), ("traces_direct", 300)):
        generate.write(kind, tmp_path / kind, size=size)
    asked = {record["conversations"][0]["content"] for kind in ("traces", "traces_direct")
             for record in map(json.loads, open(tmp_path / kind, encoding="utf-8"))}
    for split in ("val", "test"):
        held_out = items_of(split)
        assert all(split_of(item.key) == split for item in held_out)
        assert not asked & {wording for item in held_out for wording in item.wordings}
    replies = [record["conversations"][1]["content"] for record in
               map(json.loads, open(tmp_path / "traces", encoding="utf-8"))]
    direct = sum(reply.startswith("<think>\n\n</think>\n\n") for reply in replies) / len(replies)
    assert abs(direct - traces.DIRECT) < 0.05
    for record in map(json.loads, open(tmp_path / "traces_direct", encoding="utf-8")):
        assert re.fullmatch(r"<think>\n\n</think>\n\n\d+", record["conversations"][1]["content"])


def test_a_trace_fits_into_its_budget_and_into_a_row_of_the_nano_model():
    for item in items_of("test"):
        prompt, _ = NANO.render([{"role": "user", "content": item.question}], add_generation_prompt=True,
                                enable_thinking=True)
        ids, _ = NANO.render([{"role": "user", "content": item.question}, lift_structure(said(item.reply))[0]])
        budget = traces.TRACED[item.skill].max_new_tokens
        assert len(ids) - len(prompt) <= budget and len(prompt) + budget <= 256


# --- evaluation


def test_evaluation_counts_the_thought_and_judges_what_follows_it(monkeypatch):
    items = 4 * [{"skill": "a", "level": 1, "messages": [USER], "answer": "5", "checker": "letters",
                  "max_new_tokens": 9}]
    written = ["2 and 3\n</think>\n\n5", "2 and 3\n</think>\n\n6", "5, I think 5", "5</think>5"]
    prompts_seen = []

    def answers(model, prompts, params, tokenizer, batch_size=0):
        prompts_seen.extend(prompts)
        return [[Completion([7] * len(text), [], "stop", text)] for text in written]

    monkeypatch.setattr(skills, "generate", answers)
    scores = skills.evaluate_skills(None, NANO, items, thinking="on")
    assert [answer["right"] for answer in scores["answers"]] == [True, False, False, True]    # the third never answers
    assert all(prompt[-1] == OPEN for prompt in prompts_seen)
    assert scores["skills"]["a"]["tokens"] == scores["mean_tokens"] == sum(map(len, written)) / 4
    assert f" {scores['mean_tokens']:.1f} " in list(skills.table(scores))[1]
    written[:] = ["5", "6", "5", "5"]
    scores = skills.evaluate_skills(None, NANO, items, thinking="off")
    assert [answer["right"] for answer in scores["answers"]] == [True, False, True, True]
    assert prompts_seen[-1] == NANO.render([USER], add_generation_prompt=True, enable_thinking=False)[0]
    skills.evaluate_skills(None, NANO, items)
    assert prompts_seen[-1] == NANO.render([USER], add_generation_prompt=True)[0]
