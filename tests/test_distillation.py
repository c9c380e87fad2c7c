"""Distillation: the divergences against TRL and closed forms, the chunked ones against them, and the script."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dataset import jsonl
from dataset.lm_dataset import SFTDataset, collate
from model import kernels
from model.checkpoint import load_model, save_model
from model.config import named_size, new_config
from model.distill import linear_distill, token_distances
from model.errors import UserError
from model.tokenizer import Tokenizer
from model.transformer import CausalLM
from tests.conftest import killed_after, write_chats
from tests.ranks_worker import run_job
from tests.test_kernels import Largest
from tests.test_ranks import far, together
from trainer import on_policy, train_distillation
from trainer.losses import distillation_loss, forward_kl, generalized_jsd, reverse_kl

NANO = Tokenizer.load("nano")
BETAS = (0, 0.1, 0.5, 0.9, 1)


def plain(student, teacher, beta, temperature=1.0):
    """The divergence of logits that β stands for, as trainer/losses.py spells it out."""
    if 0 < beta < 1:
        return generalized_jsd(student, teacher, beta, temperature)
    return (reverse_kl if beta else forward_kl)(student, teacher, temperature)


def logits(*shape, seed=0, dtype=torch.float64, scale=3):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_divergences_and_gradients_are_trls(beta, temperature):
    golden = load_file(Path(__file__).with_name("goldens") / "gkd.safetensors")
    student = golden["student"].requires_grad_()
    mask = golden["mask"]
    loss = (plain(student, golden["teacher"], beta, temperature) * mask).sum() / mask.sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden[f"loss {beta} {temperature}"])
    torch.testing.assert_close(student.grad, golden[f"grad {beta} {temperature}"])


def test_forward_kl_is_cross_entropy_with_soft_targets_less_the_teachers_entropy():
    student, teacher = logits(4, 7), logits(4, 7, seed=1)
    t = teacher.softmax(-1)
    entropy = -(t * t.log()).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), F.cross_entropy(student, t, reduction="none") - entropy)
    sure = torch.full((4, 7), -200.0, dtype=torch.float64)
    sure[range(4), [0, 3, 6, 2]] = 200.0
    certain = F.cross_entropy(student, torch.tensor([0, 3, 6, 2]), reduction="none")
    torch.testing.assert_close(forward_kl(student, sure), certain)
    torch.testing.assert_close(reverse_kl(teacher, student), forward_kl(student, teacher))


def test_jensen_shannon_is_symmetric_bounded_and_between_the_two():
    student, teacher = logits(50, 7), logits(50, 7, seed=1)
    half = generalized_jsd(student, teacher, 0.5)
    torch.testing.assert_close(half, generalized_jsd(teacher, student, 0.5))
    assert (half > 0).all() and (half <= math.log(2)).all()
    apart = generalized_jsd(torch.tensor([90.0, 0.0]), torch.tensor([0.0, 90.0]), 0.5)
    assert apart.item() == pytest.approx(math.log(2))
    student, teacher, small = logits(50, 7, scale=1), logits(50, 7, seed=1, scale=1), 1e-7
    torch.testing.assert_close(generalized_jsd(student, teacher, small) / small, forward_kl(student, teacher),
                               rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1 - small) / small, reverse_kl(student, teacher),
                               rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta):
    student = logits(6, 9).requires_grad_()
    distance = plain(student, student.detach().clone(), beta, 1.5)
    distance.sum().backward()
    assert distance.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


def test_the_square_of_the_temperature_keeps_the_gradient_in_size():
    """Hinton et al., section 2.1: the gradient of D shrinks by 1/τ², so τ² · D has one of about the same size."""
    def gradient(temperature):
        student = logits(20, 9, scale=1).requires_grad_()
        none = torch.zeros(20, 9)
        loss, _, _ = distillation_loss(none[:, 0], forward_kl(student, logits(20, 9, seed=1, scale=1), temperature),
                                       torch.ones(20), alpha=0, scale=temperature ** 2)
        return torch.autograd.grad(loss, student)[0].norm()

    assert gradient(100).item() == pytest.approx(gradient(1000).item(), rel=0.02)
    assert gradient(1).item() == pytest.approx(gradient(1000).item(), rel=0.5)


def test_sixteen_bit_logits_are_widened_first():
    student, teacher = logits(9, 300, dtype=torch.bfloat16), logits(9, 300, seed=1, dtype=torch.bfloat16)
    for beta in BETAS:
        got = plain(student, teacher, beta, 2.0)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), plain(student.double(), teacher.double(), beta, 2.0), rtol=1e-5,
                                   atol=1e-6)


def test_what_alpha_mixes_and_what_the_mask_leaves_out():
    logprobs = torch.tensor([[0.0, -1.0, -2.0, -4.0]])
    distances = torch.tensor([[0.0, 8.0, 16.0, 32.0]])
    mask = torch.tensor([[0, 1, 0, 1]])
    loss, ce, distance = distillation_loss(logprobs, distances, mask, alpha=0.25, scale=4.0)
    assert (ce, distance) == (5, 40) and loss == 0.25 * 5 + 0.75 * 4 * 40


# ------------------------------------------------------------------------------------------------- chunks of rows


def hidden_states(dtype=torch.float64):
    student, table = logits(9, 6, scale=1), logits(11, 6, seed=1, scale=1)
    teacher, teacher_table = logits(9, 4, seed=2, scale=1), logits(11, 4, seed=3, scale=1)
    targets = torch.tensor([0, 10, 3, 3, 1, 5, 2, 0, 4])
    tensors = [x.to(dtype) for x in (student, table, teacher, teacher_table)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]], targets


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_divergence_is_the_plain_one(beta, temperature, monkeypatch):
    """Nine rows, four at a time: values, and gradients with different weights for both results in every row."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 4 * 11)
    (h, w, teacher_h, teacher_w), targets = hidden_states()
    got = linear_distill(h, w, teacher_h, teacher_w, targets, beta, temperature)
    student, teacher = h @ w.T, teacher_h @ teacher_w.T
    expected = -F.cross_entropy(student, targets, reduction="none"), plain(student, teacher, beta, temperature)
    upstream = logits(9, seed=4), logits(9, seed=5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (h, w), upstream), torch.autograd.grad(expected, (h, w), upstream),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_under_autocast_products_are_rounded_and_the_rest_is_not():
    (h, w, teacher_h, teacher_w), targets = hidden_states(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_distill(h, w, teacher_h, teacher_w, targets, 0.5, 2.0)
    rounded = [x.detach().bfloat16() for x in (h, w, teacher_h, teacher_w)]
    student, teacher = (rounded[0] @ rounded[1].T).double(), (rounded[2] @ rounded[3].T).double()
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(got[1].double(), generalized_jsd(student, teacher, 0.5, 2.0), rtol=1e-5, atol=1e-6)
    dh, dw = torch.autograd.grad(got[1].sum(), (h, w))
    exact = torch.autograd.grad(generalized_jsd(h @ w.T, teacher_h @ teacher_w.T, 0.5, 2.0).sum(), (h, w))
    assert all(far(a, b) < 3e-2 for a, b in zip((dh, dw), exact, strict=True))


def test_neither_models_logits_are_ever_all_there(monkeypatch):
    N, V, D = 640, 50, 4
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 32 * V)
    h, w, teacher_h, teacher_w = (logits(n, D, seed=n, dtype=torch.float32).requires_grad_() for n in (N, V, N, V))
    with Largest() as largest:
        _, distances = linear_distill(h, w, teacher_h.detach(), teacher_w.detach(), torch.arange(N) % V, 0.5)
        distances.sum().backward()
    assert largest.numel == max(32 * V, N * D) < N * V


def models(vocab=50):
    torch.manual_seed(0)
    return [CausalLM(named_size(size, vocab)).double() for size in ("2x32", "1x64")]


IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.6).long()
MASK[:, 0] = 0
SEGMENTS = torch.tensor([[1] * 7 + [2] * 5, [1] * 12, [1] * 4 + [2] * 4 + [0] * 4])


def test_distances_line_up_with_the_tokens_they_speak_of():
    student, teacher = models()
    logprobs, distances, _ = token_distances(student, teacher, IDS, SEGMENTS, None, 0.5, 2.0)
    outputs = [model(IDS, segment_ids=SEGMENTS).logits[:, :-1] for model in (student, teacher)]
    assert (logprobs[:, 0] == 0).all() and (distances[:, 0] == 0).all()
    torch.testing.assert_close(distances[:, 1:], generalized_jsd(*outputs, 0.5, 2.0))
    expected = outputs[0].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[:, 1:], expected)


def test_the_teacher_learns_nothing_and_its_padded_vocabulary_does_not_count():
    student, teacher = models()
    longer = CausalLM(named_size("1x64", 64)).double()
    with torch.no_grad():
        for mine, theirs in zip(longer.parameters(), teacher.parameters(), strict=True):
            mine.fill_(0.1)[:len(theirs)] = theirs
    expected = token_distances(student, teacher, IDS)[1]
    got = token_distances(student, longer, IDS)[1]
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert all(p.grad is None for p in longer.parameters()) and all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_positions_that_predict_no_target_get_no_gradient(beta):
    student, teacher = logits(3, 12, 20).requires_grad_(), logits(3, 12, 20, seed=1)
    distances = F.pad(plain(student[:, :-1], teacher[:, :-1], beta), (1, 0))
    logprobs = -F.pad(F.cross_entropy(student[:, :-1].transpose(1, 2), IDS[:, 1:] % 20, reduction="none"), (1, 0))
    distillation_loss(logprobs, distances, MASK, 0.5)[0].backward()
    predicts = F.pad(MASK[:, 1:], (0, 1)).bool()
    assert (student.grad[~predicts] == 0).all() and (student.grad[predicts].abs().sum(-1) > 0).all()


def test_split_into_micro_batches_gives_the_same_gradient():
    student, teacher = models()
    cfg = train_distillation.Config(divergence="jsd", temperature=2.0)
    batch = {"input_ids": IDS, "segment_ids": SEGMENTS, "positions": None, "loss_mask": MASK * (SEGMENTS > 0)}

    def gradient(parts):
        student.zero_grad()
        for rows in parts:
            some = {name: value if value is None else value[rows] for name, value in batch.items()}
            train_distillation.compute_loss(student, teacher, some, cfg, 0.0)[0].backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    assert far(gradient([slice(0, 1), slice(1, 3)]), gradient([slice(0, 3)])) < 1e-6


# ------------------------------------------------------------------------------------------------- own answers


def fake_run():
    counted = []
    return SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), to_device=lambda batch: batch,
                           count=lambda batch, times: counted.append(int(batch["loss_mask"].sum()) * times),
                           sum_over_ranks=lambda number: number, counted=counted)


def rows_of(chats, *numbers):
    data = SFTDataset(str(chats), NANO, 48)
    return data, collate([{**data[row], "rows": np.int64(row)} for row in numbers])


def conversations_in(batches):
    """{(ids of a conversation): (its mask)} of packed micro-batches; the position of every token is checked."""
    found = {}
    for batch in batches:
        for ids, mask, segments, positions in zip(*(batch[name].tolist() for name in (
                "input_ids", "loss_mask", "segment_ids", "positions")), strict=True):
            for segment in range(1, max(segments) + 1):
                places = [at for at, which in enumerate(segments) if which == segment]
                assert [positions[at] for at in places] == list(range(len(places)))
                assert places == list(range(places[0], places[-1] + 1))
                found[tuple(ids[at] for at in places)] = tuple(mask[at] for at in places)
    return found


def test_the_student_answers_in_place_of_the_last_answer(chats):
    data, batch = rows_of(chats, 0, 1, 2, 3)
    torch.manual_seed(0)
    model = CausalLM(named_size("1x32", NANO.vocab_size))
    run, cfg = fake_run(), train_distillation.Config(max_len=48, max_new_tokens=8)
    (answered,), targets = on_policy.with_own_answers(run, model, NANO, [batch], cfg, step=3)
    assert run.counted == [-int(batch["loss_mask"].sum())] and targets == int(answered["loss_mask"].sum())
    before, after = conversations_in([batch]), conversations_in([answered])
    assert len(before) == len(after)
    replaced = 0
    for ids, mask in before.items():
        last = len(ids) - 1
        while not mask[last]:
            last -= 1
        begin = last
        while mask[begin - 1]:
            begin -= 1
        now, = [(own, m) for own, m in after.items() if own[:begin] == ids[:begin] and sum(m) == len(own) - begin]
        assert now[1] == (0,) * begin + (1,) * (len(now[0]) - begin) and 1 <= sum(now[1]) <= 8
        ended = [at for at, token in enumerate(now[0]) if at >= begin and token in NANO.stop_ids]
        assert ended in ([], [len(now[0]) - 1])                         # the end token is a target, nothing follows it
        replaced += now[0] != ids
    assert replaced == len(before)


def test_answers_do_not_depend_on_how_rows_are_divided_but_on_seed_and_step(chats):
    _, whole = rows_of(chats, 0, 1, 2, 3)
    parts = [rows_of(chats, *rows)[1] for rows in ((0, 2, 3), (1,))]
    torch.manual_seed(0)
    model = CausalLM(named_size("1x32", NANO.vocab_size)).double()

    def said(batches, step=3, seed=42):
        cfg = train_distillation.Config(max_len=48, max_new_tokens=8, seed=seed)
        return conversations_in(on_policy.with_own_answers(fake_run(), model, NANO, batches, cfg, step)[0])

    assert said([whole]) == said(parts)
    assert said([whole]) != said([whole], step=4) and said([whole]) != said([whole], seed=43)


def test_a_rank_without_rows_keeps_its_padding(chats):
    _, batch = rows_of(chats, 0)
    blank = {name: value * 0 for name, value in batch.items()}
    (kept,), targets = on_policy.with_own_answers(fake_run(), models()[0], NANO, [blank],
                                                  train_distillation.Config(max_len=48), 1)
    assert kept is blank and targets == 0


def test_the_share_of_steps_in_which_the_student_answers():
    for share in (0.0, 0.3, 1.0):
        cfg = train_distillation.Config(on_policy=share)
        steps = [on_policy.is_on_policy(cfg, step) for step in range(2000)]
        assert np.mean(steps) == pytest.approx(share, abs=0.04)


# ------------------------------------------------------------------------------------------------- the script


FLAGS = dict(max_len=48, batch_size=8, log_every=1, eval_every=0, sample_every=0, save_every=0, device="cpu",
             warmup_steps=2, max_steps=6, max_new_tokens=8, dtype="float32")


def born(folder, size, tokenizer=NANO, seed=0):
    torch.manual_seed(seed)
    save_model(folder, CausalLM(new_config(size, tokenizer, 48)), tokenizer)
    return folder


@pytest.fixture
def teacher(tmp_path):
    return born(tmp_path / "teacher", "2x64")


@pytest.fixture
def student(tmp_path):
    return born(tmp_path / "student", "1x32", seed=1)


def distill(data, teacher, out, **changes):
    flags = {**FLAGS, "data": str(data), "teacher": str(teacher), "out": str(out), **changes}
    return train_distillation.main(train_distillation.Config(**flags))


def metrics(folder):
    return [entry for entry in map(json.loads, Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "lr" in entry]


def weights(folder):
    return {name: value.clone() for name, value in load_model(folder)[0].state_dict().items()}


def test_a_student_taught_by_itself_stays_what_it_is(teacher, chats, tmp_path):
    distill(chats, teacher, tmp_path / "out", model=str(teacher), alpha=0.0, max_steps=1, divergence="jsd")
    only, = metrics(tmp_path / "out")
    assert abs(only["distance"]) < 1e-6 and abs(only["loss"]) < 1e-6 and only["grad_norm"] < 1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_student_comes_closer_to_its_teacher(divergence, teacher, student, chats, tmp_path, capsys):
    """The teacher's weights are random: only by listening to it, not from the data, can the distance fall."""
    with torch.no_grad():
        model, _ = load_model(teacher)
        model.lm_head.weight.mul_(8)                                     # opinions to be learnt
        save_model(teacher, model, NANO)
    distill(chats, teacher, tmp_path / "out", model=str(student), alpha=0.0, temperature=2.0, divergence=divergence,
            lr=3e-2, max_steps=40, sample_every=20)
    curve = [entry["distance"] for entry in metrics(tmp_path / "out")]
    assert np.mean(curve[-5:]) < 0.85 * np.mean(curve[:3])
    assert "  | " in capsys.readouterr().out


def test_on_its_own_answers_only_the_teacher_counts(teacher, student, chats, tmp_path):
    """No cross-entropy with words that nobody vouches for, and no τ²; on the data both are there."""
    for share in (1.0, 0.0):
        distill(chats, teacher, tmp_path / str(share), model=str(student), on_policy=share, temperature=2.0,
                alpha=0.25, max_steps=2)
        for entry in metrics(tmp_path / str(share)):
            expected = entry["distance"] if share else 0.25 * entry["ce"] + 0.75 * 4 * entry["distance"]
            assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_text_teaches_a_new_student(teacher, documents, tmp_path):
    summary = distill(documents, teacher, tmp_path / "out", size="1x32", alpha=1.0, lr=1e-2, max_steps=30,
                      optimizer="muon")
    assert summary["held_out"]["loss"] < 5.5 and summary["parent"] is None
    model, tokenizer = load_model(tmp_path / "out")
    assert model.config.hidden_size == 32 and tokenizer.fingerprint == NANO.fingerprint


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_killed_run_continues_to_the_same_bits(share, teacher, student, chats, tmp_path):
    options = dict(model=str(student), on_policy=share, max_steps=7, save_every=2, log_every=3)
    distill(chats, teacher, tmp_path / "whole", **options)
    with killed_after(5):
        distill(chats, teacher, tmp_path / "cut", **options)
    distill(chats, teacher, tmp_path / "cut", **options)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = [[(m["step"], m["loss"], m["ce"], m["distance"], m["tokens"]) for m in metrics(tmp_path / name)]
            for name in ("whole", "cut")]
    assert told[0] == told[1]


def test_two_ranks_equal_one(tmp_path):
    """Seven rows, so that the second rank is one short; copied and sharded; with and without answers of its own."""
    chats = write_chats(tmp_path / "chats.jsonl")
    teacher, student = born(tmp_path / "teacher", "2x64"), born(tmp_path / "student", "1x32", seed=1)

    def job(name, **changes):
        flags = {**FLAGS, "data": str(chats), "teacher": str(teacher), "model": str(student), "batch_size": 7,
                 "micro_batch_size": 2, "max_steps": 3, "dtype": "float64", "out": str(tmp_path / name), **changes}
        return {"name": name, "script": "train_distillation", "flags": flags}

    cases = {"data": dict(divergence="jsd", temperature=2.0), "own": dict(on_policy=1.0)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CACHE", tmp_path / "cache")
        alone = {name: run_job(tmp_path, **job(f"{name} alone", **changes)) for name, changes in cases.items()}
        kept = together(tmp_path, [job(f"{name} {how}", parallel=how, **changes) for name, changes in cases.items()
                                   for how in ("ddp", "fsdp")])
    for name in cases:
        for how in ("ddp", "fsdp"):
            one, two = alone[name], kept[f"{name} {how}"]
            assert torch.equal(two[0]["weights"], two[1]["weights"])
            assert all(far(a, b) < 1e-8 for a, b in zip(two[0]["gradients"], one["gradients"], strict=True))
            assert torch.allclose(two[0]["weights"], one["weights"], rtol=0, atol=1e-9)
            told = [[m[key] for m in metrics(tmp_path / f"{name} {run}") for key in ("loss", "distance")]
                    for run in (how, "alone")]
            assert told[0] == pytest.approx(told[1], rel=1e-9)


def test_what_cannot_be_is_one_line(teacher, student, chats, documents, tmp_path):
    other = born(tmp_path / "other", "1x32", Tokenizer.load("base"))
    longer = tmp_path / "longer"
    save_model(longer, CausalLM(replace(new_config("1x32", NANO, 48), vocab_size=NANO.vocab_size + 32)), NANO)
    out, known = tmp_path / "out", dict(model=str(student))
    cases = [("48 positions", dict(teacher=teacher, max_len=64, **known)),
             ("has another tokenizer", dict(teacher=other, **known)),
             ("has another tokenizer", dict(teacher=teacher, model=str(longer))),
             ("--teacher is missing", dict(teacher="", **known)),
             ("no model folder", dict(teacher=tmp_path / "nowhere", **known)),
             ("leave out --model", dict(teacher=teacher, size="1x32", **known)),
             ("--alpha 1.5", dict(teacher=teacher, alpha=1.5, **known)),
             ("--temperature 0", dict(teacher=teacher, temperature=0.0, **known)),
             ("--jsd_beta 1", dict(teacher=teacher, jsd_beta=1.0, **known)),
             ("--on_policy 2", dict(teacher=teacher, on_policy=2.0, **known)),
             ("holds text", dict(teacher=teacher, on_policy=0.5, data=str(documents), **known))]
    for says, changes in cases:
        with pytest.raises(UserError, match=says) as error:
            distill(**{"data": chats, "out": out, **changes})
        assert "\n" not in str(error.value) and not out.exists()
