"""Reward model and yes/no evaluator: losses in closed form, scores, figures, and the script as a whole."""

import json
import math
import random

import numpy as np
import peft
import pytest
import torch
import transformers

from dataset import jsonl
from dataset.builtin import judgements
from dataset.lm_dataset import PreferenceDataset, SFTDataset, collate
from eval import reward_model
from eval.calibration import brier_score, calibration_error, reliability
from eval.judge import answer_ids, measure_judgements, score_yesno
from eval.reward_model import load_scorer, measure_pairs, reduced, report_pairs, score_conversations
from model import device as devices
from model.checkpoint import load_model, load_reward_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel, normalize
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from tests.conftest import killed_after
from tests.ranks_worker import run_job
from tests.test_ranks import far, together
from trainer import curves, train_reward
from trainer.losses import bradley_terry_loss, centering_loss

TOKENIZER = Tokenizer.load("nano")
WORDS = "the a red blue old young dog tree river man bird sees likes finds eats and then under over".split()
TINY = dict(max_len=96, batch_size=8, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
            warmup_steps=2, max_steps=4)


def planted_pairs(path, count=400, seed=0):
    """Preferences for the answer with the word cat in it, of any length."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        chosen, rejected = (rng.choices(WORDS, k=rng.randint(1, 7)) for _ in range(2))
        chosen.insert(rng.randint(0, len(chosen)), "cat")
        lines.append(json.dumps({"prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 4))),
                                 "chosen": " ".join(chosen), "rejected": " ".join(rejected)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def planted_judgements(path, count=400, seed=0):
    """Is there a cat, is there none? Two words, a cat or a dog among them."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        cat, negated = rng.random() < 0.5, rng.random() < 0.5
        words = rng.sample(["cat" if cat else "dog", rng.choice(WORDS[:5])], 2)
        lines.append(json.dumps({"principle": "no cat?" if negated else "a cat?", "text": " ".join(words),
                                 "answer": "yes" if cat != negated else "no", "name": "cat", "good": cat}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs, judgements and an untrained language model."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    save_model(folder / "base", CausalLM(ModelConfig(TOKENIZER.vocab_size, 64, 96, 2, 2, 1, head_dim=32)), TOKENIZER)
    planted_pairs(folder / "pairs.jsonl")
    planted_judgements(folder / "judgements.jsonl", 800)
    return folder


@pytest.fixture(autouse=True)
def no_frills(monkeypatch):
    """Neither curves are drawn nor the machine's speed is measured: they take longer than what is tested here."""
    monkeypatch.setattr(curves, "report", lambda *_: None)
    monkeypatch.setattr(devices, "matmul_peak", lambda *_: 1e12)


def train(place, out, **changes):
    data = "judgements" if changes.get("head") == "yesno" else "pairs"
    cfg = {**TINY, "model": str(place / "base"), "data": str(place / f"{data}.jsonl"), "out": str(out), **changes}
    return train_reward.main(train_reward.Config(**cfg))


def weights(folder):
    return {name: tensor.clone() for name, tensor in load_reward_model(folder)[0].state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pairs_of(path, max_len=96):
    return PreferenceDataset(path, TOKENIZER, max_len)


def scalar_model(place, seed=1):
    torch.manual_seed(seed)
    return load_reward_model(place / "base")[0]


# ---------------------------------------------------------------------------------------------------- losses


def test_bradley_terry_in_closed_form():
    d = torch.linspace(-30, 30, 61, dtype=torch.float64)
    zero = torch.zeros_like(d)
    assert torch.allclose(bradley_terry_loss(d, zero), torch.log1p(torch.exp(-d)), atol=1e-12)
    assert bradley_terry_loss(zero, zero).allclose(torch.tensor(math.log(2), dtype=torch.float64))
    assert torch.allclose(bradley_terry_loss(d, zero) - bradley_terry_loss(zero, d), -d, atol=1e-12)      # swapped
    assert torch.equal(bradley_terry_loss(d + 7, zero + 7), bradley_terry_loss(d, zero))
    assert torch.allclose(bradley_terry_loss(d, zero, margin=2.0), bradley_terry_loss(d - 2, zero))
    assert bradley_terry_loss(torch.tensor(-1e4), torch.tensor(0.0)).isfinite()


def test_opposite_gradients_and_what_a_constant_changes():
    chosen, rejected = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    of_chosen, of_rejected = torch.autograd.grad(bradley_terry_loss(chosen, rejected).sum(), (chosen, rejected))
    assert torch.allclose(of_chosen, -of_rejected) and (of_chosen < 0).all()
    assert torch.allclose(of_chosen, -torch.sigmoid(rejected - chosen))
    assert torch.allclose(centering_loss(chosen, rejected), (chosen + rejected) ** 2)
    assert torch.allclose(centering_loss(chosen + 1, rejected + 1), (chosen + rejected + 2) ** 2)


def test_the_loss_of_a_batch_is_that_of_its_pairs(place):
    """Against the formula over conversations scored one by one; a row without pairs counts nothing."""
    model, data = scalar_model(place).double(), pairs_of(place / "pairs.jsonl")
    batch = collate([{**data[row], "rows": np.int64(row)} for row in range(3)])
    cfg = train_reward.Config(margin=0.5, centering=0.01)
    loss, parts = train_reward.compute_loss(model, batch, cfg, 0.0)
    lines = [data.where(row) for row in range(3)]
    records = (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    expected, right = 0.0, 0
    for line in sum(lines, []):
        record = json.loads(records[int(line.rpartition(":")[2]) - 1])
        c, r = score_conversations(model, TOKENIZER, [
            [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[side]}]
            for side in ("chosen", "rejected")])
        expected += math.log1p(math.exp(-(c - r - 0.5))) + 0.01 * (c + r) ** 2
        right += c > r
    assert loss.item() == pytest.approx(expected, rel=1e-9) and parts["train_accuracy"] == right
    assert parts["loss"].item() == loss.item() and data.count(batch) == len(sum(lines, []))
    blank = {name: np.zeros_like(value) for name, value in data[0].items()} | {"rows": np.int64(0)}
    more = collate([{**data[row], "rows": np.int64(row)} for row in range(3)] + [blank])
    assert train_reward.compute_loss(model, more, cfg, 0.0)[0].item() == pytest.approx(expected, rel=1e-9)
    empty, _ = train_reward.compute_loss(model, collate([blank]), cfg, 0.0)
    gradients = torch.autograd.grad(empty, list(model.parameters()))
    assert empty.item() == 0 and not any(gradient.any() for gradient in gradients)


def test_a_head_of_zeros_starts_at_ln_2(place):
    model, data = scalar_model(place), pairs_of(place / "pairs.jsonl")
    torch.nn.init.zeros_(model.score.weight)
    batch = collate([{**data[0], "rows": np.int64(0)}])
    loss, _ = train_reward.compute_loss(model, batch, train_reward.Config(), 0.0)
    assert loss.item() / data.count(batch) == pytest.approx(math.log(2), rel=1e-6)


def test_the_coins_of_the_control_are_fair_and_fixed():
    rows = torch.arange(2000)
    tossed = train_reward.coins(rows, 8, 42)
    assert torch.equal(tossed, train_reward.coins(rows, 8, 42))
    assert torch.equal(tossed[7:9], train_reward.coins(rows[7:9], 8, 42))
    assert abs(tossed.float().mean() - 0.5) < 0.02 and (abs(tossed.float().mean(0) - 0.5) < 0.05).all()
    assert abs((train_reward.coins(rows, 8, 43) == tossed).float().mean() - 0.5) < 0.02
    neighbours = (tossed[:, 1:] == tossed[:, :-1]).float().mean()
    assert abs(neighbours - 0.5) < 0.02 and abs((tossed[1:] == tossed[:-1]).float().mean() - 0.5) < 0.02


# --------------------------------------------------------------------------------------------------- figures


def test_calibration_by_hand():
    """Two bins of 15: (0.6, 0.667] says 0.65 and is right half of the time, (0.933, 1] says 0.95 and always is."""
    p, y = [0.65, 0.65, 0.95, 0.95], [1, 0, 1, 1]
    assert calibration_error(p, y) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert [(row["n"], row["share"]) for row in reliability(p, y)] == [(2, 0.5), (2, 1.0)]
    assert brier_score(p, y) == pytest.approx((0.35**2 + 0.65**2 + 2 * 0.05**2) / 4)
    assert calibration_error([0.0, 1.0], [0, 1]) == 0 and calibration_error([0.0, 1.0], [1, 0]) == 1
    assert calibration_error([], []) == 0
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    assert calibration_error(p, rng.random(20000) < p) < 0.02
    assert calibration_error(p, rng.random(20000) < p**2) == pytest.approx(np.mean(p - p**2), abs=0.01)


def test_calibration_against_a_plain_loop():
    rng = np.random.default_rng(1)
    p, y = np.round(rng.random(500), 2), rng.random(500) < 0.5            # rounded: some lie on the edge 0.2, 0.4 …
    expected = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = (p > low) & (p <= high) | ((p == 0) & (b == 0))
        if inside.any():
            expected += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert calibration_error(p, y) == pytest.approx(expected, abs=0.004)


def test_figures_of_pairs():
    chosen, rejected = np.array([2.0, 1, 0, 3, -1]), np.array([1.0, 2, 0, 0, -2])
    lengths = np.array([10.0, 5, 7, 20, 20]), np.array([5.0, 5, 9, 19, 30])
    figures = report_pairs(chosen, rejected, *lengths)
    assert figures["accuracy"] == pytest.approx(3.5 / 5) and figures["longer_wins"] == pytest.approx(2.5 / 5)
    assert figures["matched_pairs"] == 2 and figures["accuracy_matched"] == 0.5             # (5, 5) and (20, 19)
    assert figures["accuracy_balanced"] == pytest.approx((1 + (0.5 + 1) / 2) / 2)           # longer: 2 of 2
    difference = chosen - rejected
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean())
    assert figures["brier"] == pytest.approx(((1 - 1 / (1 + np.exp(-difference))) ** 2).mean())
    assert figures["reward_mean"] == pytest.approx(np.concatenate([chosen, rejected]).mean())
    with_terms = report_pairs(chosen, rejected, *lengths, margin=0.5, centering=0.1)["loss"]
    expected = np.log1p(np.exp(0.5 - difference)).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert with_terms == pytest.approx(expected)


def test_who_only_measures_length_is_found_out():
    rng = np.random.default_rng(0)
    chosen_length, rejected_length = rng.integers(5, 40, 3000), rng.integers(1, 30, 3000)
    figures = report_pairs(chosen_length / 10, rejected_length / 10, chosen_length, rejected_length)
    assert figures["accuracy"] == figures["longer_wins"] > 0.6
    assert figures["accuracy_balanced"] < 0.52 and figures["length_correlation"] == pytest.approx(1)
    everything_shorter = report_pairs(chosen_length, rejected_length, np.ones(3000), np.full(3000, 5.0))
    assert everything_shorter["accuracy_balanced"] is None and everything_shorter["accuracy_matched"] is None
    assert json.loads(json.dumps(everything_shorter)) and list(reward_model.table(everything_shorter))


def test_packed_rows_and_conversations_score_alike(place):
    """And in float32 rows packed with others, in batches, as in stock transformers on its own chat template."""
    model, data = scalar_model(place), pairs_of(place / "pairs.jsonl")
    chosen, rejected, chosen_length, rejected_length, there = reward_model.score_rows(model, data, "cpu")
    places = [place for row in range(len(data)) for place in data.where(row)]
    assert len(chosen) == len(places) == 400 == there.sum()
    records = (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(records[int(line.rpartition(":")[2]) - 1]) for line in places]
    sides = [[[{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[side]}]
              for record in records] for side in ("chosen", "rejected")]
    assert np.allclose(score_conversations(model, TOKENIZER, sides[0], batch_size=7), chosen, atol=1e-5)
    assert np.allclose(score_conversations(model, TOKENIZER, sides[1]), rejected, atol=1e-5)
    assert chosen_length.tolist() == [len(TOKENIZER.encode(record["chosen"])) + 1 for record in records]
    assert rejected_length.sum() == sum(len(TOKENIZER.encode(record["rejected"])) + 1 for record in records)
    figures = measure_pairs(model, data, TOKENIZER, "cpu")
    assert figures["accuracy"] == np.mean(chosen > rejected) and figures["pairs"] == 400

    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    save_model(place / "stock", model, TOKENIZER)
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(place / "stock").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "stock")
    batch = tokenizer.apply_chat_template(sides[0][:20], padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        theirs = oracle(**batch).logits[:, 0].double().numpy()
    assert np.allclose(theirs, chosen[:20], atol=1e-5)
    scores = score_conversations(load_reward_model(place / "stock")[0], TOKENIZER, sides[0][:20])
    assert np.allclose(scores, (theirs - 0.25) / 2, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the script


def test_it_learns_a_planted_rule_and_knows_its_scale(place, tmp_path):
    summary = train(place, tmp_path / "run", max_steps=40, lr=3e-3, eval_every=20)
    figures = summary["held_out"]
    assert figures["accuracy"] > 0.95 and figures["accuracy_matched"] > 0.9 and figures["pairs"] == 40
    assert abs(figures["length_correlation"]) < 0.6 and figures["ece"] < 0.2
    entries = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    assert entries[0]["val_accuracy"] < 0.8 and entries[-2]["train_accuracy"] > 0.9
    model, tokenizer = load_scorer(tmp_path / "run")
    assert (model.config.reward_mean, model.config.reward_std) == (figures["reward_mean"], figures["reward_std"])
    good, bad = score_conversations(model, tokenizer, [
        [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": text}]
        for text in ("a red cat sees the river", "a red dog sees the river")])
    assert good > bad and good == normalize(good * model.config.reward_std + model.config.reward_mean, model.config)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "held-out accuracy" in card and "pipeline_tag: text-classification" in card


def test_control_shuffled_labels_teach_nothing(place, tmp_path):
    planted_pairs(tmp_path / "held_out.jsonl", 300, seed=5)
    summary = train(place, tmp_path / "run", max_steps=40, lr=3e-3, shuffle_labels=True,
                    val_data=str(tmp_path / "held_out.jsonl"))
    assert 0.3 < summary["held_out"]["accuracy"] < 0.7


@pytest.mark.parametrize("head", ["scalar", "yesno"])
def test_a_killed_run_continues_to_the_same_bits(head, place, tmp_path):
    options = dict(head=head, max_steps=6, save_every=2)
    train(place, tmp_path / "whole", **options)
    with killed_after(3):
        train(place, tmp_path / "cut", **options)
    train(place, tmp_path / "cut", **options)
    load = load_reward_model if head == "scalar" else load_model
    whole, cut = (load(tmp_path / name)[0] for name in ("whole", "cut"))
    assert same(whole.state_dict(), cut.state_dict()) and whole.config == cut.config
    lines = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for name in ("whole", "cut")]
    losses = [[entry.get("loss", entry.get("val_loss")) for entry in map(json.loads, part)] for part in lines]
    assert losses[0] == losses[1]


def test_two_ranks_and_any_split_equal_one(place, monkeypatch):
    monkeypatch.setattr(jsonl, "CACHE", place / "cache")
    flags = {**TINY, "batch_size": 7, "model": str(place / "base"), "data": str(place / "pairs.jsonl"), "max_steps": 3,
             "dtype": "float64", "eval_every": 2, "eval_rows": 5, "save_every": 2}

    def job(name, **changes):
        return {"name": name, "script": "train_reward", "flags": {**flags, "out": str(place / name), **changes}}

    one = run_job(place, **job("alone", micro_batch_size=7))
    split = run_job(place, **job("split", micro_batch_size=2))
    two = together(place, [job("ddp", micro_batch_size=2), job("fsdp", micro_batch_size=2, parallel="fsdp")])
    for other in (split, *two["ddp"], *two["fsdp"]):
        assert all(far(a, b) <= 1e-8 for a, b in zip(other["gradients"], one["gradients"], strict=True))
        assert torch.allclose(other["weights"], one["weights"], rtol=0, atol=1e-9)
    means = [load_reward_model(place / name)[0].config.reward_mean for name in ("alone", "ddp", "fsdp")]
    assert means == pytest.approx([means[0]] * 3, abs=1e-9) and means[0] != 0


def test_lora_is_an_adapter_with_a_head_that_peft_loads(place, tmp_path):
    before = (place / "base" / "model.safetensors").read_bytes()
    summary = train(place, tmp_path / "run", lora_rank=8, max_steps=40, lr=1e-2)
    assert summary["held_out"]["accuracy"] > 0.9
    assert summary["trained_parameters"] < 0.3 * summary["parameters"]
    assert (place / "base" / "model.safetensors").read_bytes() == before
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    model, tokenizer = load_scorer(tmp_path / "run")
    assert isinstance(model, ScalarModel) and model.config.reward_std == summary["held_out"]["reward_std"]
    chats = [[{"role": "user", "content": "the dog"}, {"role": "assistant", "content": text}]
             for text in ("a cat", "then the old river")]
    ours = score_conversations(model, tokenizer, chats)
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "run").eval()
    with torch.no_grad():
        raw = [theirs(torch.tensor([tokenizer.render(chat)[0]])).logits.item() for chat in chats]
    assert ours == pytest.approx([normalize(score, model.config) for score in raw], abs=1e-4)


def test_one_batch_can_be_learnt_by_heart(place, tmp_path, capsys):
    train(place, tmp_path / "run", overfit_batch=True, max_steps=60, lr=1e-2, batch_size=2, centering=0.0)
    assert "learnt by heart, as it should be" in capsys.readouterr().out


def test_bad_input_is_one_line(place, tmp_path):
    for data, head, message in [
        ('{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "scalar",
         'no "chosen" here'),
        ('{"principle": "a?", "text": "b", "answer": "maybe"}', "yesno", "must be \"yes\" or \"no\""),
        ('{"principle": "a?", "answer": "yes"}', "yesno", 'no "text" here'),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "scalar", "are the same"),
    ]:
        (tmp_path / "bad.jsonl").write_text(data + "\n", encoding="utf-8")
        with pytest.raises(UserError) as error:
            train(place, tmp_path / "run", data=str(tmp_path / "bad.jsonl"), head=head)
        assert message in str(error.value) and "bad.jsonl:1" in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- yes/no evaluator


def test_a_score_is_the_log_odds_of_the_two_answers(place):
    torch.manual_seed(2)
    model = CausalLM(ModelConfig(TOKENIZER.vocab_size, 64, 96, 2, 2, 1, head_dim=32)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    texts = ["a red bird", "the young man sees the river {principle} and <|im_end|>", "x"]
    log_odds, mass = score_yesno(model, TOKENIZER, "Is it {text}?", texts, batch_size=2)
    yes, no = answer_ids(TOKENIZER)
    assert TOKENIZER.decode([yes]) == "yes"[:len(TOKENIZER.decode([yes]))] and yes != no
    for text, score, share in zip(texts, log_odds, mass, strict=True):
        asked = f"Text:\n{text}\n\nQuestion: Is it {{text}}? Answer yes or no."
        ids, _ = TOKENIZER.render([{"role": "user", "content": asked}], add_generation_prompt=True)
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert score == pytest.approx((p[yes].log() - p[no].log()).item(), abs=1e-4)
        assert share == pytest.approx((p[yes] + p[no]).item(), abs=1e-6)
    both = score_yesno(model, TOKENIZER, ["a?", "b?"], texts[:2])[0]
    assert both[1] == pytest.approx(score_yesno(model, TOKENIZER, "b?", texts[1:2])[0][0], abs=1e-4)
    model.config.judge_template = "{principle} {text}"
    assert abs(score_yesno(model, TOKENIZER, "a?", texts[:1])[0] - both[0]) > 1e-4


def test_figures_of_packed_judgements_are_those_of_single_ones(place, tmp_path):
    planted_judgements(tmp_path / "few.jsonl", 30, seed=3)
    model, _ = load_model(place / "base")
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    data = SFTDataset(tmp_path / "few.jsonl", TOKENIZER, 96)
    packed = measure_judgements(model, data, TOKENIZER, "cpu")
    cfg = reward_model.Config(model="", data="")
    save_model(tmp_path / "judge", model, TOKENIZER)
    single = reward_model.evaluate_judgements([tmp_path / "judge"], cfg, tmp_path / "few.jsonl", "cpu")
    assert packed["judgements"] == single["judgements"] == 30 and set(single["principles"]) == {"cat"}
    for name in ("accuracy", "accuracy_yes", "accuracy_no", "yes_no_mass", "ece", "brier"):
        assert packed[name] == pytest.approx(single[name], abs=1e-5), name
    from eval.eval_loss import evaluate_loss
    assert packed["loss"] == pytest.approx(evaluate_loss(model, data, TOKENIZER, "cpu")["loss"], rel=1e-5)


def test_an_evaluator_learns_both_polarities(place, tmp_path):
    summary = train(place, tmp_path / "run", head="yesno", max_steps=50, batch_size=16, lr=1e-2, optimizer="muon")
    figures = summary["held_out"]
    assert figures["accuracy"] > 0.9 and figures["yes_no_mass"] > 0.9
    assert min(figures["accuracy_yes"], figures["accuracy_no"]) > 0.85
    assert "{principle}" in json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["judge_template"]
    model, tokenizer = load_scorer(tmp_path / "run")
    assert "{text}" in model.config.judge_template
    (with_cat, without), _ = score_yesno(model, tokenizer, "a cat?", ["old cat", "old dog"])
    assert with_cat > 0 > without
    pairs = [json.dumps({"prompt": "which?", "chosen": f"{word} cat", "rejected": f"{word} dog"}) for word in WORDS[:5]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    common = dict(model=str(tmp_path / "run"), data=str(tmp_path / "pairs.jsonl"), device="cpu")
    assert reward_model.main(reward_model.Config(**common, principle="a cat?"))["accuracy"] == 1
    assert reward_model.main(reward_model.Config(**common, principle="no cat?"))["accuracy"] == 0
    train(place, tmp_path / "adapter", head="yesno", lora_rank=4, max_steps=2)
    adapted, _ = load_scorer(tmp_path / "adapter")
    assert isinstance(adapted, CausalLM) and adapted.config.judge_template == model.config.judge_template
    with pytest.raises(UserError, match="give --principle"):
        reward_model.pairs_by_question(tmp_path / "run", reward_model.Config(**common), common["data"], "cpu")


# ------------------------------------------------------------------------------------------------ ensembles


def test_the_command_on_one_and_several_models(place, tmp_path, capsys):
    for seed in (1, 2):
        model = scalar_model(place, seed)
        model.config.reward_mean, model.config.reward_std = 0.1 * seed, 0.5 * seed
        save_model(tmp_path / str(seed), model, TOKENIZER)
    common = dict(data=str(place / "pairs.jsonl"), max_len=96, device="cpu", dtype="float32")
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    one = reward_model.main(reward_model.Config(model=first, **common, out=str(tmp_path / "one.json")))
    told = capsys.readouterr().out
    assert f"accuracy             {one['accuracy']:>9.4g}" in told and "longer_wins" in told
    written = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert written["accuracy"] == one["accuracy"] and written["model"] == first
    twice = reward_model.main(reward_model.Config(model=f"{first},{first}", **common))
    assert twice["accuracy"] == one["accuracy"] and twice["brier"] == pytest.approx(one["brier"])
    both = {how: reward_model.main(reward_model.Config(model=f"{first},{second}", reduce=how, **common))
            for how in ("mean", "min")}
    data = pairs_of(place / "pairs.jsonl")
    scores = []
    for folder in (first, second):
        model, _ = load_reward_model(folder)
        scores.append([normalize(side, model.config) for side in reward_model.score_rows(model, data, "cpu")[:2]])
    for how, function in (("mean", np.mean), ("min", np.min)):
        chosen, rejected = function(np.array(scores), axis=0)
        assert both[how]["accuracy"] == pytest.approx(np.mean(chosen > rejected))
        assert both[how]["reward_mean"] == pytest.approx(np.mean([chosen, rejected]), abs=1e-6)
    assert reduced(np.array([[1.0, 4], [3, 2]]), "min").tolist() == [1, 2]


# ----------------------------------------------------------------------------------------- built-in judgements


def test_built_in_judgements_are_balanced_and_apart():
    train_rows, test_rows = (list(judgements.judgements(random.Random(0), 2800, split)) for split in ("train", "test"))
    for rows in (train_rows, test_rows):
        for name in judgements.PRINCIPLES:
            for good in (True, False):
                answers = [row["answer"] for row in rows if row["name"] == name and row["good"] == good]
                assert 0.35 < answers.count("yes") / len(answers) < 0.65, (name, good)
        assert all(jsonl.parse_record(row)[0]["messages"][-1]["content"] == row["answer"] for row in rows)
    for name in ("true", "calm", "ordered", "animal", "complete"):
        seen = {row["text"] for row in train_rows if row["name"] == name}
        assert not any(row["text"] in seen for row in test_rows if row["name"] == name), name
    again = list(judgements.judgements(random.Random(0), 50, "train"))
    assert again == train_rows[:50]
