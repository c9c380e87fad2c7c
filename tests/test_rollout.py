"""Rollouts: what is recorded is what was sampled, whatever the batch, the copy that samples, the way to the loss."""

import dataclasses

import pytest
import torch

from model.adapters.adapted import AdapterConfig, attach, disabled
from model.config import ModelConfig
from model.errors import UserError
from model.fused import FusedLM, attend_once
from model.generate import SamplingParams, generate
from model.logprobs import token_logprobs
from model.moe import routers
from model.quantize import quantize_model
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, slow_attention
from trainer.rollout import Sampler, check_agreement, from_rows, join, micro_batches, put_back, sample, score

V = Tokenizer.load("nano").vocab_size
QUESTIONS = ["Reverse: a b", "What is the capital of that small country by the sea?", "Copy: x", "Say hello", "?"]
ITEMS = [{"messages": [{"role": "user", "content": text}], "answer": text[::-1], "row": row}
         for row, text in enumerate(QUESTIONS)]


def tiny(**changes):
    """A random model sharp enough to end its texts, with 2 key/value heads for 4 query heads."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3)
    return CausalLM(ModelConfig(V, **{**shape, **changes})).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


@pytest.fixture(scope="module")
def stopping(tokenizer):
    """The same vocabulary with a hundred end tokens, so that a random model ends some of its texts."""
    other = Tokenizer.load("nano")
    other.stop_ids = tuple(range(300, 400))
    return other


@pytest.fixture(scope="module")
def model():
    return tiny()


def rolled(model, tokenizer, items=ITEMS, samples=3, new=20, temperature=0.7, seed=5, numbers=None, **options):
    numbers = numbers or [item["row"] for item in items]
    return sample(model, tokenizer, items, samples, new, temperature, seed, numbers, **options)


def rows_of(rollout):
    """Its rows without padding: (ids, sampled) each."""
    return [(ids[mask].tolist(), sampled[mask].tolist()) for ids, mask, sampled in
            zip(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, strict=True)]


# --- the record


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.6])
def test_recorded_logprobs_are_those_of_scoring_at_the_same_temperature(model, stopping, temperature):
    rollout = rolled(model, stopping, temperature=temperature)
    with torch.no_grad():
        for row, size in enumerate(rollout.attention_mask.sum(1).tolist()):
            ids = rollout.input_ids[row:row + 1, :size]                         # alone, without padding
            logits = model(ids).logits.double() / temperature
            expected = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            mask = rollout.completion_mask[row, 1:size]
            torch.testing.assert_close(rollout.old_logprobs[row, 1:size][mask].double(), expected[mask],
                                       atol=1e-4, rtol=0)
    assert not rollout.old_logprobs[~rollout.completion_mask].any()
    assert (rollout.old_logprobs[rollout.completion_mask] < 0).all()
    assert len(set(rollout.lengths.tolist())) > 3


def test_rows_are_prompt_completion_padding(model, stopping):
    rollout = rolled(model, stopping)
    assert len(rollout) == 15 and rollout.groups.tolist() == [group for group in range(5) for _ in range(3)]
    assert [item["row"] for item in rollout.items] == rollout.groups.tolist()
    for row, item in enumerate(rollout.items):
        prompt, _ = stopping.render(item["messages"], add_generation_prompt=True)
        ids, mask, sampled = rollout.input_ids[row], rollout.attention_mask[row], rollout.completion_mask[row]
        size, n = int(mask.sum()), int(sampled.sum())
        assert ids[:len(prompt)].tolist() == prompt and size == len(prompt) + n
        assert mask.tolist() == [True] * size + [False] * (len(ids) - size)
        assert sampled[len(prompt):size].all() and not sampled[:len(prompt)].any() and not sampled[size:].any()
        assert (ids[size:] == stopping.pad_id).all()
        completion = ids[len(prompt):size].tolist()
        ends = [token in stopping.stop_ids for token in completion]
        assert not any(ends[:-1])                                               # the end token is the last one
        assert bool(rollout.finished[row]) == ends[-1] and (ends[-1] or n == 20)
        assert rollout.texts[row] == stopping.decode(completion[:-1] if ends[-1] else completion)
    assert 0 < int(rollout.finished.sum()) < 15
    assert rollout.lengths.tolist() == rollout.completion_mask.sum(1).tolist()


def test_a_row_depends_on_its_prompt_number_and_sample_only(model, stopping):
    rollout = rolled(model, stopping)
    together, sums = rows_of(rollout), rollout.old_logprobs.sum(1)
    assert len({tuple(ids) for ids, _ in together}) == 15
    for items, batch_size in (ITEMS, 3), (ITEMS, 6), (ITEMS[::-1], 0), (ITEMS[2:3], 0), (ITEMS[1::2], 0):
        got = rolled(model, stopping, items, batch_size=batch_size)             # as another rank or batch has them
        places = [3 * item["row"] + n for item in items for n in range(3)]
        assert rows_of(got) == [together[place] for place in places]
        torch.testing.assert_close(got.old_logprobs.sum(1), sums[places], atol=1e-4, rtol=0)
    fewer = rows_of(rolled(model, stopping, samples=1))
    assert fewer == together[::3]
    other = rows_of(rolled(model, stopping, numbers=[7, 8, 9, 10, 11]))
    assert sum(a != b for a, b in zip(other, together, strict=True)) > 12


def test_items_ask_for_fewer_tokens_and_may_bring_rendered_prompts(model, tokenizer):
    ids = [tokenizer.render(item["messages"], add_generation_prompt=True)[0] for item in ITEMS]
    items = [{**item, "prompt_ids": prompt, "max_new_tokens": most}
             for item, prompt, most in zip(ITEMS, ids, (3, 0, 99, 20, 1), strict=True)]
    rollout, free = rolled(model, tokenizer, items), rolled(model, tokenizer)
    assert rollout.lengths.tolist() == [3] * 3 + [20] * 9 + [1] * 3 and not rollout.finished.any()
    for short, long in zip(rows_of(rollout), rows_of(free), strict=True):
        assert short == tuple(part[:len(short[0])] for part in long)            # cut, not drawn differently


def test_positions_of_the_model_are_a_limit(tokenizer):
    rollout = rolled(tiny(max_position_embeddings=40), tokenizer, ITEMS[:1], new=60)
    assert rollout.attention_mask.sum(1).tolist() == [40] * 3 and not rollout.finished.any()


def test_text_of_a_prompt_that_opens_a_thought_opens_it_too(model, tokenizer):
    prompt = tokenizer.render(ITEMS[0]["messages"], add_generation_prompt=True, enable_thinking=True)[0]
    assert prompt[-1] == tokenizer.special["<think>"]
    rollout = rolled(model, tokenizer, [{**ITEMS[0], "prompt_ids": prompt}])
    assert all(text.startswith("<think>") for text in rollout.texts)
    assert not any(text.startswith("<think>") for text in rolled(model, tokenizer, ITEMS[:1]).texts)


def test_temperature_zero_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="--temperature 0: must be above 0"):
        rolled(model, tokenizer, temperature=0)


# --- select, join, several turns


def test_select_and_join_are_inverse_and_number_the_groups_anew(model, stopping):
    rollout = rolled(model, stopping, weights_version=4)
    keep = torch.tensor([3, 4, 5, 12, 13])
    part = rollout.select(keep)
    assert part.groups.tolist() == [0, 0, 0, 1, 1] and part.input_ids.shape == (5, rollout.input_ids.shape[1])
    assert part.input_ids.equal(rollout.input_ids[keep]) and part.finished.equal(rollout.finished[keep])
    assert part.texts == [rollout.texts[row] for row in keep] and part.items[3] is ITEMS[4]
    assert rollout.select(rollout.groups == 1).texts == rollout.texts[3:6]
    assert rollout.select(range(0)).input_ids.shape[0] == 0

    one, two = rolled(model, stopping, ITEMS[:2], weights_version=4), rolled(model, stopping, ITEMS[2:])
    whole = join([one, two], stopping.pad_id)
    for field in dataclasses.fields(rollout):
        a, b = getattr(whole, field.name), getattr(rollout, field.name)
        if field.name == "old_logprobs":
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        elif field.name == "weights_version":
            assert (a, b) == (0, 4)                                             # as old as the oldest
        else:
            assert a.equal(b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_rows_of_several_turns(tokenizer):
    rollout = from_rows([([5, 6, 7, 8, 9], [0, 1, 1, 0, 1], [9.0, -1.0, -2.0, 9.0, -3.0]), ([5, 6], [0, 1], [0, -4.0])],
                        ITEMS[:2], [0, 1], [True, False], ["a", "b"], tokenizer.pad_id, 3)
    assert rollout.completion_mask.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert rollout.old_logprobs.tolist() == [[0, -1, -2, 0, -3], [0, -4, 0, 0, 0]]
    assert rollout.lengths.tolist() == [3, 1] and rollout.weights_version == 3


# --- to the loss and back


def test_micro_batches_hold_every_row_once_trimmed_with_its_columns(model, stopping):
    rollout = rolled(model, stopping)
    N, T = rollout.input_ids.shape
    advantages, values = torch.arange(N).float(), torch.randn(N, T) * rollout.attention_mask
    batches = micro_batches(rollout, 4, advantages=advantages, values=values)
    assert [len(batch["places"]) for batch in batches] == [4, 4, 4, 3]
    assert sorted(torch.cat([batch["places"] for batch in batches]).tolist()) == list(range(N))
    for batch in batches:
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]            # its own longest row
        assert batch["segment_ids"].equal(batch["attention_mask"].long())
        assert batch["advantages"].equal(batch["places"].float())
    lengths = rollout.attention_mask.sum(1).sort().values                                     # like lengths together
    assert [batch["input_ids"].shape[1] for batch in batches] == [int(part[-1]) for part in lengths.split(4)]
    assert put_back(rollout, batches, [batch["values"] for batch in batches]).equal(values)
    assert put_back(rollout, batches, [batch["old_logprobs"] for batch in batches]).equal(rollout.old_logprobs)
    assert [len(batch["places"]) for batch in micro_batches(rollout, 0)] == [N]


def test_missing_micro_batches_are_padding_without_effect(model, stopping):
    rollout = rolled(model, stopping, ITEMS[:1])
    batches = micro_batches(rollout, 2, count=4, advantages=torch.ones(3))
    assert [batch["places"].tolist() for batch in batches[2:]] == [[-1], [-1]]
    for batch in batches[2:]:
        assert not batch["completion_mask"].any() and not batch["segment_ids"].any()
        assert token_logprobs(model, batch["input_ids"], batch["attention_mask"])[0].isfinite().all()
    values = [batch["old_logprobs"] + (batch["places"] < 0)[:, None] for batch in batches]
    assert put_back(rollout, batches, values).equal(rollout.old_logprobs)
    assert len(micro_batches(rollout.select(range(0)), 2, count=1)) == 1


def test_score_is_the_recorded_one_in_any_batches_and_leaves_the_model_alone(stopping):
    model = tiny().train()
    rollout = rolled(model, stopping)
    for size in (0, 1, 4):
        torch.testing.assert_close(score(model, rollout, 0.7, size), rollout.old_logprobs, atol=1e-4, rtol=0)
    assert model.training
    logprobs = score(model, rollout, 0.7).clone().requires_grad_()
    (logprobs * rollout.old_logprobs).sum().backward()                          # both may take part in a loss


# --- one distribution


def test_agreement_is_measured_and_asserted(stopping):
    model = tiny()
    rollout = rolled(model, stopping, weights_version=17)
    mean, largest = check_agreement(rollout, score(model, rollout, 0.7), torch.float32)
    assert 0 <= mean <= largest < 1e-4
    with pytest.raises(UserError, match=r"rollout of weights 17: .*largest .*limit 0.001.*--rescore"):
        check_agreement(rollout, score(model, rollout, 0.72), torch.float32)
    one = rollout.old_logprobs.clone()
    one[rollout.completion_mask.nonzero()[7].unbind()] += 0.1                   # a single token, by far
    with pytest.raises(UserError, match="largest"):
        check_agreement(rollout, one, torch.float32)
    mean, largest = check_agreement(rollout, one, torch.bfloat16)               # in 16 bits that may be rounding
    assert mean == pytest.approx(0.1 / int(rollout.lengths.sum()), rel=1e-3) and largest == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(UserError, match=r"mean .*limit 0.02"):
        check_agreement(rollout, rollout.old_logprobs - 0.03, torch.bfloat16)
    with pytest.raises(UserError, match="nan"):
        check_agreement(rollout, rollout.old_logprobs * float("nan"), torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))                  # the weights went on
    with pytest.raises(UserError, match="disagree"):
        check_agreement(rollout, score(model, rollout, 0.7), torch.float32)
    nothing = rollout.select(range(0))
    assert check_agreement(nothing, nothing.old_logprobs, torch.float32) == (0, 0)


# --- the copy that samples


@pytest.mark.parametrize("changes", [
    {}, dict(tie_word_embeddings=False, qk_norm=False), dict(qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True),
    dict(sliding_window=5), dict(num_key_value_heads=4), dict(num_key_value_heads=1),
    dict(num_experts=4, num_shared_experts=1, moe_intermediate_size=32, router="sigmoid", first_k_dense=1)])
def test_a_copy_in_float32_samples_what_the_model_does(stopping, changes):
    model = tiny(**changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)      # gains and biases count, too
    mine, copy = rolled(model, stopping), rolled(FusedLM(model, torch.float32), stopping)
    assert mine.input_ids.equal(copy.input_ids) and mine.texts == copy.texts
    torch.testing.assert_close(mine.old_logprobs, copy.old_logprobs, atol=2e-5, rtol=0)


def test_a_refreshed_copy_follows_the_weights(stopping):
    model = tiny()
    sampler = Sampler(model, "auto", torch.float32)
    before = rolled(sampler.refresh(), stopping)
    stale = sampler.copy
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    assert not rows_of(rolled(stale, stopping)) == rows_of(rolled(model, stopping))
    after = rolled(sampler.refresh(), stopping)
    assert after.input_ids.equal(rolled(model, stopping).input_ids) and not rows_of(after) == rows_of(before)
    check_agreement(after, score(model, after, 0.7), torch.float32)


def test_a_copy_in_bfloat16_agrees_with_scoring_under_autocast_in_or_out_of_it(stopping):
    model = tiny(initializer_range=0.1)
    copy = Sampler(model, "bfloat16", torch.float32).refresh()
    assert copy.lm_head.weight.dtype == torch.bfloat16
    rollout = rolled(copy, stopping)
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_of(rolled(copy, stopping)) == rows_of(rollout)
        mean, largest = check_agreement(rollout, score(model, rollout, 0.7), torch.bfloat16)
        exact = rolled(FusedLM(model, torch.float32), stopping)                 # float32 stays that under autocast
    assert 0 < mean < 5e-3 and largest < 0.2
    check_agreement(exact, score(model, exact, 0.7), torch.float32)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3", "adalora"])
def test_a_copy_merges_the_adapter_that_is_in_use(stopping, method):
    model = tiny()
    base = rolled(model, stopping)
    attach(model, AdapterConfig(method, rank=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    with_adapter = rolled(model, stopping)
    assert not rows_of(with_adapter) == rows_of(base)
    copy = FusedLM(model, torch.float32)
    rollout = rolled(copy, stopping)
    assert rollout.input_ids.equal(with_adapter.input_ids)
    torch.testing.assert_close(rollout.old_logprobs, with_adapter.old_logprobs, atol=1e-4, rtol=0)
    with disabled(model):
        copy.refresh()
        assert rolled(copy, stopping).input_ids.equal(base.input_ids)


def test_what_cannot_be_copied_samples_itself(stopping):
    model = tiny()
    attach(model, AdapterConfig("prompt", rank=2))
    assert Sampler(model, "auto", torch.bfloat16).refresh() is model
    with pytest.raises(UserError, match="--rollout_dtype float32: .*use --rollout_dtype auto"):
        Sampler(model, "float32", torch.bfloat16).refresh()
    few_bits = tiny(hidden_size=64)
    quantize_model(few_bits, "int8")
    assert Sampler(few_bits, "auto", torch.bfloat16).refresh() is few_bits
    rollout = rolled(few_bits, stopping)
    copied = rolled(Sampler(few_bits, "float32", torch.bfloat16).refresh(), stopping)
    assert copied.input_ids.equal(rollout.input_ids)


def test_a_copy_samples_while_the_model_trains_without_a_trace(stopping):
    model = tiny(num_experts=4, moe_intermediate_size=32, router="softmax").train()
    copy, state = FusedLM(model, torch.float32), {name: t.clone() for name, t in model.state_dict().items()}
    loads = [router.load.clone() for router in routers(model)]
    rolled(copy, stopping)
    assert model.training and all(module.training for module in model.modules())
    assert all(t.equal(state[name]) for name, t in model.state_dict().items())
    assert len(loads) == 2 and all(router.load.equal(load)                      # no choice of an expert was counted
                                   for router, load in zip(routers(model), loads, strict=True))
    token_logprobs(model, torch.randint(V, (2, 5)))[0].sum().backward()       # and it can still learn
    assert not any(parameter.grad is None for name, parameter in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_of_one_token_needs_no_repeated_keys(heads):
    H, K = heads
    q, k, v = torch.randn(3, H, 1, 8), torch.randn(3, K, 6, 8), torch.randn(3, K, 6, 8)
    mask = torch.rand(3, 1, 1, 6) > 0.3
    mask[..., -1] = True
    for seen in (None, mask):
        torch.testing.assert_close(attend_once(q, k, v, seen), slow_attention(q, k, v, seen), atol=1e-5, rtol=1e-5)


def test_greedy_generation_from_a_copy(model, tokenizer):
    prompts = [tokenizer.render(item["messages"], add_generation_prompt=True)[0] for item in ITEMS]
    params = SamplingParams(15, 0.0)
    texts = [[c.text for (c,) in generate(m, prompts, params, tokenizer)]
             for m in (model, FusedLM(model, torch.float32))]
    assert texts[0] == texts[1]
