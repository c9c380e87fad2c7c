"""DPO and its relatives: the formulas against closed forms and TRL, and the script as a whole."""

import contextlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset import jsonl
from dataset.lm_dataset import PreferenceDataset, UnpairedDataset, collate
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from tests.conftest import killed_after
from tests.ranks_worker import run_job
from tests.test_ranks import far, together
from trainer import losses, preferences, reference, train_dpo
from trainer.losses import dpo_loss, ipo_loss, kl_baseline, kto_loss, orpo_loss, simpo_loss

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "trl025.json").read_text(encoding="utf-8"))
WORDS = "the a red blue old young cat dog tree river man bird".split()
TINY = dict(max_len=128, batch_size=5, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
            warmup_steps=2, max_steps=4, dtype="float32", lr=3e-3)


def numbers(*shape, low=-30.0, high=-1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low).requires_grad_()


# --- the formulas


@pytest.mark.parametrize("name", GOLDENS)
def test_losses_equal_trl(name):
    case = GOLDENS[name]
    x = {key: torch.tensor(value, dtype=torch.float64) for key, value in case["inputs"].items()}
    if "ref_chosen" in x:
        h_c, h_r = x["chosen"] - x["ref_chosen"], x["rejected"] - x["ref_rejected"]
    if name in ("dpo", "cdpo"):
        ours = dpo_loss(h_c, h_r, case["beta"], case.get("label_smoothing", 0.0))
    elif name == "ipo":
        ours = ipo_loss(h_c, h_r, case["beta"])
    elif name == "simpo":
        ours = simpo_loss(x["chosen"], x["rejected"], case["beta"], case["gamma"])
    elif name == "orpo":
        ours = orpo_loss(x["chosen"], x["rejected"], case["beta"])
    else:
        z0 = kl_baseline(float((x["kl"] - x["ref_kl"]).mean()))
        assert z0 == pytest.approx(case["baseline"]) and z0 > 0
        labels = torch.tensor([1.0] * len(h_c) + [0.0] * len(h_r), dtype=torch.float64)
        ours = kto_loss(torch.cat([h_c, h_r]), labels, z0, case["beta"], case["weight_desirable"],
                        case["weight_undesirable"])
    assert ours.tolist() == pytest.approx(case["losses"], rel=1e-6)


def test_what_they_are_where_the_policy_is_the_reference():
    zero = torch.zeros(3)
    assert torch.allclose(dpo_loss(zero, zero, 0.1), torch.full((3,), math.log(2)))
    assert torch.allclose(dpo_loss(zero, zero, 0.1, 0.3), torch.full((3,), math.log(2)))
    assert torch.allclose(ipo_loss(zero, zero, 0.1), torch.full((3,), 1 / (4 * 0.1**2)))
    assert torch.allclose(kto_loss(zero, torch.tensor([1.0, 0.0, 1.0]), 0.0, 0.1, 1.5, 0.5),
                          torch.tensor([0.75, 0.25, 0.75]))


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_gradients_of_dpo(beta):
    """∂L/∂h_c = -β σ(-β Δ) = -∂L/∂h_r; at Δ = 0 that is β / 2."""
    h_c, h_r = numbers(9, low=-5, high=5), numbers(9, low=-5, high=5, seed=1)
    dpo_loss(h_c, h_r, beta).sum().backward()
    wanted = -beta * torch.sigmoid(-beta * (h_c - h_r)).detach()
    assert torch.allclose(h_c.grad, wanted) and torch.allclose(h_r.grad, -wanted)


def test_turning_a_pair_round():
    """DPO(Δ) - DPO(-Δ) = -β Δ, and smoothing by 1 is turning round."""
    h_c, h_r = numbers(9), numbers(9, seed=1)
    assert torch.allclose(dpo_loss(h_c, h_r, 0.2) - dpo_loss(h_r, h_c, 0.2), -0.2 * (h_c - h_r))
    assert torch.allclose(dpo_loss(h_c, h_r, 0.2, 1.0), dpo_loss(h_r, h_c, 0.2))
    assert torch.allclose(ipo_loss(h_c, h_r, 0.2) - ipo_loss(h_r, h_c, 0.2), -2 * (h_c - h_r) / 0.2)


def test_ipo_and_cdpo_stop_where_dpo_goes_on():
    far_away = torch.tensor([500.0])
    assert ipo_loss(torch.tensor([5.0]), torch.zeros(1), 0.1) == 0                       # 1 / 2β
    assert ipo_loss(far_away, torch.zeros(1), 0.1) > 1e5
    assert dpo_loss(far_away, torch.zeros(1), 0.1) < 1e-6 < dpo_loss(far_away, torch.zeros(1), 0.1, 0.1)


def test_the_gradient_of_kto_is_the_label_s_sign_and_none_goes_through_the_baseline():
    h, good = numbers(6, low=-3, high=3), torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    kto_loss(h, good, kl_baseline(0.7), 0.1).sum().backward()
    sigma = torch.sigmoid(0.1 * (h - 0.7)).detach()
    assert torch.allclose(h.grad, -(2 * good - 1) * 0.1 * sigma * (1 - sigma))
    assert isinstance(kl_baseline(0.7), float) and kl_baseline(-3.0) == 0.0


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-4, -3.0, -60.0, -700.0])
def test_orpo_is_finite_everywhere(mean):
    """Also for an answer of probability 1, and one of probability 0."""
    for pair in ((mean, -1.0), (-1.0, mean), (mean, mean)):
        c, r = (torch.tensor([x], requires_grad=True) for x in pair)
        loss = orpo_loss(c, r, 0.1)
        loss.sum().backward()
        assert all(torch.isfinite(x).all() for x in (loss, c.grad, r.grad))
    p = torch.tensor(0.3)
    assert losses.log_odds(p.log()) == pytest.approx(float((p / (1 - p)).log()), abs=1e-6)


# --- log-probabilities of answers in rows


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tiny_model(**changes):
    torch.manual_seed(0)
    return CausalLM(ModelConfig(Tokenizer.load("nano").vocab_size, 32, 64, 2, 2, 1, head_dim=32, **changes)).eval()


def write_pairs(path, count=24, seed=0, prefix=()):
    """A jsonl of pairs whose chosen answers repeat the prompt's last word and whose rejected ones do not."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        said = rng.choices(WORDS, k=rng.randint(1, 5))
        other = rng.choice([word for word in WORDS if word != said[-1]])
        prompt = [*prefix, {"role": "user", "content": " ".join(said)}]
        rows.append({side: [*prompt, {"role": "assistant", "content": answer}]
                     for side, answer in (("chosen", f"{said[-1]} it is"), ("rejected", f"not {other}"))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scored(model, data):
    """ℓ_c and ℓ_r of all pairs, (2, n)."""
    batch = collate(list(data))
    sums, _, _ = reference.answer_logprobs(model, batch)
    there = batch["pairs"].bool()
    return torch.stack([sums[:, ::2][there], sums[:, 1::2][there]])


@torch.no_grad()
def test_answers_in_a_row_score_as_each_by_itself(tmp_path, tokenizer, model):
    """Packed, side by side and padded = alone: the sum over the answer's tokens and the end of the turn, no prompt."""
    data = PreferenceDataset(str(write_pairs(tmp_path / "p.jsonl")), tokenizer, 128)
    rows = collate(list(data))
    sums, lengths, _ = reference.answer_logprobs(model, rows)
    for r in range(len(data)):
        for side in range(1, int(rows["segment_ids"][r].max()) + 1):
            here = rows["segment_ids"][r] == side
            ids, mask = rows["input_ids"][r][here], rows["loss_mask"][r][here]
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
            alone = logprobs[:-1].gather(1, ids[1:, None])[:, 0] @ mask[1:].float()
            assert sums[r, side - 1] == pytest.approx(float(alone), abs=1e-4)
            assert lengths[r, side - 1] == mask.sum()
        assert not sums[r, side:].any() and not lengths[r, side:].any()


@torch.no_grad()
def test_the_two_sides_have_the_same_prompt_whose_tokens_do_not_count(tmp_path, tokenizer, model):
    """A longer shared prompt changes the answers' log-probabilities, but adds no tokens to the sums or the lengths."""
    shared = [{"role": "user", "content": "the old man"}, {"role": "assistant", "content": "sees a bird"}]
    short, long = (PreferenceDataset(str(write_pairs(tmp_path / f"{len(prefix)}.jsonl", prefix=prefix)), tokenizer, 256)
                   for prefix in ((), shared))
    assert long.report["loss_tokens"] == short.report["loss_tokens"] and long.report["tokens"] > short.report["tokens"]
    uniform = tiny_model()
    uniform.lm_head.weight.data.zero_()
    uniform.model.embed_tokens.weight.data.zero_()
    first, second = (torch.tensor(sorted(scored(uniform, data).T.tolist())) for data in (short, long))
    assert torch.allclose(first, second)                     # every token is equally likely: only answers are summed


def settings(**changes):
    return SimpleNamespace(**{"loss": "dpo", "beta": 0.1, "gamma": 1.0, "label_smoothing": 0.0, "nll": 0.0,
                              "weight_desirable": 1.0, "weight_undesirable": 1.0, "shuffle_labels": False, "seed": 0,
                              **changes})


def loss_of(model, data, cfg, rows=None, z0=0.0):
    batch = collate(rows or list(data))
    return train_dpo.compute_loss(model, {**batch, "rows": torch.arange(len(batch["pairs"]))}, cfg, 0.0, z0)


@pytest.mark.parametrize("name", train_dpo.BETA)
def test_every_objective_by_hand_and_no_gradient_on_prompts(name, tmp_path, tokenizer, model):
    """The script's loss = the sum over pairs of the formula, each pair scored by a forward pass of its own."""
    kind = UnpairedDataset if name == "kto" else PreferenceDataset
    data = kind(str(write_pairs(tmp_path / "p.jsonl", 8)), tokenizer, 256)
    reference.reserve(data)
    cfg = settings(loss=name, beta=train_dpo.BETA[name], nll=0.5)
    loss, parts = loss_of(model, data, cfg, z0=0.3)
    total = 0.0
    for row in data:
        sums, lengths, _ = reference.answer_logprobs(model, collate([row]))
        for k in range(int(row["pairs"].sum())):
            (c, r), (n_c, n_r) = sums[0, 2 * k:2 * k + 2], lengths[0, 2 * k:2 * k + 2]
            good = torch.tensor(float(row["desirable"][k])) if name == "kto" else None
            total += {"dpo": lambda c, r, m, s, _: dpo_loss(c, r, 0.1),
                      "dpo_norm": lambda c, r, m, s, _: dpo_loss(m, s, 5.0),
                      "ipo": lambda c, r, m, s, _: ipo_loss(m, s, 0.1),
                      "simpo": lambda c, r, m, s, _: simpo_loss(m, s, 2.0, 1.0),
                      "orpo": lambda c, r, m, s, _: orpo_loss(m, s, 0.1),
                      "kto": lambda c, r, m, s, good: kto_loss(c, good, 0.3, 0.1)}[name](c, r, c / n_c, r / n_r, good)
            if name != "orpo":                               # which has it built in
                total -= 0.5 * c / n_c * (row["desirable"][k] if name == "kto" else 1)
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert parts["loss"].isfinite() and parts["train_accuracy"] <= sum(row["pairs"].sum() for row in data)


@pytest.mark.parametrize("name", train_dpo.BETA)
def test_a_blank_row_adds_nothing(name, tmp_path, tokenizer, model):
    data = (UnpairedDataset if name == "kto" else PreferenceDataset)(str(write_pairs(tmp_path / "p.jsonl", 8)),
                                                                     tokenizer, 256)
    reference.reserve(data)
    rows = list(data)
    cfg = settings(loss=name, nll=0.5)
    whole, _ = loss_of(model, data, cfg)
    model.zero_grad()
    padded, _ = loss_of(model, data, cfg, [*rows, {key: value * 0 for key, value in rows[0].items()}])
    padded.backward()
    assert float(padded.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_objectives_without_reference_do_not_see_one(name, tmp_path, tokenizer, model):
    data = PreferenceDataset(str(write_pairs(tmp_path / "p.jsonl", 8)), tokenizer, 256)
    rows = list(data)
    cfg = settings(loss=name)
    plain, _ = loss_of(model, data, cfg)
    other, _ = loss_of(model, data, cfg, [{**row, "ref": -7 * torch.rand(2 * len(row["pairs"])).numpy()}
                                          for row in rows])
    assert torch.equal(plain, other)


def test_the_baseline_is_the_log_ratio_of_mismatched_answers(tmp_path, tokenizer, model):
    """Over all micro-batches, never below 0, and with no gradient."""
    data = UnpairedDataset(str(write_pairs(tmp_path / "p.jsonl", 9)), tokenizer, 256)
    run = SimpleNamespace(autocast=contextlib.nullcontext, sum_over_ranks=lambda number: number)
    for real, strange, wanted in ((-1.0, 2.0, 2.0), (3.0, -2.0, 0.0)):
        micro_batches = [collate([row]) for row in data]
        for batch in micro_batches:
            sums, _, _ = reference.answer_logprobs(model, batch)
            batch["ref"] = sums.detach() - torch.tensor([real, strange]).repeat(data.most_pairs)
        z0 = preferences.step_baseline(model, micro_batches, 18, run)
        assert isinstance(z0, float) and z0 == pytest.approx(wanted, abs=1e-4)


def test_shuffled_labels_are_half_right(tmp_path, tokenizer, model):
    """Turned round by a coin that depends on the row only; held-out pairs keep their labels."""
    data = PreferenceDataset(str(write_pairs(tmp_path / "p.jsonl", 400)), tokenizer, 128)
    batch = {**collate(list(data)), "rows": torch.arange(len(data))}
    batch["ref"] = torch.zeros(len(data), 2 * data.most_pairs)
    batch["ref"][:, ::2] = -1e6                              # every chosen side wins
    wins = [train_dpo.compute_loss(model, batch, settings(shuffle_labels=shuffle), 0.0)[1]["train_accuracy"] / 400
            for shuffle in (False, True, True)]
    assert wins[0] == 1 and 0.4 < wins[1] < 0.6 and wins[1] == wins[2]


# --- the script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs, and a parent model."""
    folder = tmp_path_factory.mktemp("dpo")
    write_pairs(folder / "pairs.jsonl", 60)
    save_model(folder / "base", tiny_model(), Tokenizer.load("nano"))
    return folder


def dpo(place, out, **changes):
    cfg = train_dpo.Config(**{**TINY, "model": str(place / "base"), "data": str(place / "pairs.jsonl"),
                              "out": str(out), **changes})
    return train_dpo.main(cfg)


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder):
    return {k: v.clone() for k, v in load_model(folder)[0].state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(("name", "start"), [("dpo", math.log(2)), ("dpo_norm", math.log(2)), ("ipo", 25.0),
                                             ("kto", 0.5), ("simpo", None), ("orpo", None)])
def test_each_objective_starts_where_it_must_and_learns(name, start, place, tmp_path):
    summary = dpo(place, tmp_path / "run", loss=name, max_steps=30, eval_every=15)
    first, last = (entry for entry in metrics(tmp_path / "run") if "val_loss" in entry and entry["step"] in (0, 30))
    if start:
        assert first["val_loss"] == pytest.approx(start, abs=1e-4) and first["val_accuracy"] == 0.5
    assert last["val_loss"] < first["val_loss"] and summary["held_out"]["accuracy"] > 0.85
    low, high = summary["held_out"]["accuracy_interval"]
    assert low <= summary["held_out"]["accuracy"] <= high
    assert {"loss", "train_accuracy", "margin"} <= metrics(tmp_path / "run")[1].keys()
    if name == "dpo":
        logged = metrics(tmp_path / "run")[-2]
        assert logged["h_chosen"] > logged["h_rejected"]
        assert logged["kl"] == pytest.approx(-(logged["h_chosen"] + logged["h_rejected"]) / 2)


def test_control_shuffled_labels_teach_nothing(place, tmp_path):
    summary = dpo(place, tmp_path / "run", max_steps=30, shuffle_labels=True)
    assert summary["held_out"]["accuracy"] < 0.85


@pytest.mark.parametrize("changes", [dict(), dict(loss="kto"), dict(lora_rank=4)])
def test_a_killed_run_continues_exactly(changes, place, tmp_path):
    options = dict(max_steps=5, save_every=2, **changes)
    dpo(place, tmp_path / "whole", **options)
    with killed_after(3):
        dpo(place, tmp_path / "cut", **options)
    dpo(place, tmp_path / "cut", **options)
    load = weights if not changes.get("lora_rank") else adapter_weights
    assert same(load(tmp_path / "whole"), load(tmp_path / "cut"))
    names = ("step", "loss", "train_accuracy", "val_loss")
    assert [[entry.get(name) for name in names] for entry in metrics(tmp_path / "whole")] == [
        [entry.get(name) for name in names] for entry in metrics(tmp_path / "cut")]


def adapter_weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_the_reference_is_computed_once_and_again_for_another_model(place, tmp_path, monkeypatch, capsys):
    calls, compute = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *args: calls.append(args) or compute(*args))
    dpo(place, tmp_path / "one", max_steps=1)
    assert len(calls) == 2                                   # train and held-out rows
    dpo(place, tmp_path / "two", max_steps=2, beta=0.3)
    assert len(calls) == 2 and "from the cache" in capsys.readouterr().out
    assert metrics(tmp_path / "one")[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    dpo(place, tmp_path / "three", max_steps=1, model=str(tmp_path / "two"))
    assert len(calls) == 4
    assert metrics(tmp_path / "three")[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4)   # a reference of its own
    dpo(place, tmp_path / "four", max_steps=1, max_len=96)
    assert len(calls) == 6


def test_an_adapter_s_reference_is_the_model_below_it(place, tmp_path):
    dpo(place, tmp_path / "run", lora_rank=4, max_steps=20, lr=1e-2)
    entries = metrics(tmp_path / "run")
    assert entries[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert entries[-1]["val_accuracy"] > 0.85


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_micro_batches_change_nothing(name, place, tmp_path):
    for micro in (5, 2):
        dpo(place, tmp_path / f"m{micro}", micro_batch_size=micro, dtype="float64", loss=name, max_steps=3)
    whole, parts = (weights(tmp_path / f"m{micro}") for micro in (5, 2))
    assert all(torch.allclose(whole[k], parts[k], rtol=0, atol=1e-7) for k in whole)
    assert [e["loss"] for e in metrics(tmp_path / "m5") if "loss" in e] == pytest.approx(
        [e["loss"] for e in metrics(tmp_path / "m2") if "loss" in e], rel=1e-6)


def test_two_ranks_equal_one(place):
    """Five rows leave the second rank one short, and it takes one that counts nothing."""
    def job(name, **changes):
        flags = {**TINY, "dtype": "float64", "micro_batch_size": 2, "model": str(place / "base"), "max_steps": 2,
                 "data": str(place / "pairs.jsonl"), "out": str(place / name), **changes}
        return {"name": name, "script": "train_dpo", "flags": flags}

    kinds = {"mixture": dict(nll=0.5, model=str(place / "moe")), "kto": dict(loss="kto"),
             "kto, sharded": dict(loss="kto", parallel="fsdp")}
    save_model(place / "moe", tiny_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                         router="softmax", aux_loss_coef=0.01), Tokenizer.load("nano"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", place / "cache")
        alone = {name: run_job(place, **job(f"{name}, alone", **changes)) for name, changes in kinds.items()}
    two = together(place, [job(name, **changes) for name, changes in kinds.items()])
    for name, one in alone.items():
        assert torch.equal(two[name][0]["weights"], two[name][1]["weights"])
        assert all(far(a, b) <= 1e-6 for a, b in zip(two[name][0]["gradients"], one["gradients"], strict=True))
        assert torch.allclose(two[name][0]["weights"], one["weights"], rtol=0, atol=1e-7)
        assert [entry.get("loss", entry.get("val_loss")) for entry in metrics(place / name)] == pytest.approx(
            [entry.get("loss", entry.get("val_loss")) for entry in metrics(place / f"{name}, alone")], rel=1e-5)


def test_bad_input_is_one_line(place, tmp_path):
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    for changes, message in ((dict(data=str(tmp_path / "same.jsonl")), "same.jsonl:1: .*are the same"),
                             (dict(max_len=8), "raise --max_len"),
                             (dict(model=str(tmp_path / "absent")), "absent"),
                             (dict(beta=-1.0), "--beta -1"), (dict(label_smoothing=0.7), "--label_smoothing 0.7")):
        with pytest.raises(UserError, match=message) as error:
            dpo(place, tmp_path / "run", **changes)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()
