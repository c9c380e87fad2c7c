"""Generation: the cache, the filters, what is drawn and recorded, where it ends, and the text that comes out."""

import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from model.config import ModelConfig
from model.errors import UserError
from model.generate import (
    Batch,
    KVCache,
    SamplingParams,
    StopScanner,
    draw,
    filter_logits,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    run_batch,
    stream,
)
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, Output

V = 48
INF = float("inf")


def tiny(vocab_size=V, **changes):
    """A random model sharp enough that its choices matter."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.25)
    return CausalLM(ModelConfig(vocab_size, **{**shape, **changes})).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def ragged(count=7, longest=12, vocab_size=V):
    rng = random.Random(1)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def flat(completions):
    return [c for samples in completions for c in samples]


def ids_of(completions):
    return [c.ids for c in flat(completions)]


@torch.no_grad()
def slow_greedy(model, prompt, steps):
    """No cache, no batch: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


class Scripted(nn.Module):
    """A model that says `script`, whatever the prompt (of one token) was."""

    def __init__(self, script, vocab_size):
        super().__init__()
        self.config = ModelConfig(vocab_size, 32, 32, 1, 1, 1, max_position_embeddings=len(script) + 1)
        self.script, self.lm_head = torch.tensor(script), nn.Linear(1, 1)

    def forward(self, ids, attention_mask=None, positions=None, cache=None, head=None):
        logits = torch.full((len(ids), 1, self.config.vocab_size), -30.0)
        logits[:, 0, self.script[cache.length]] = 30.0
        cache.advance(ids.shape[1])
        return Output(logits, None)


# --- the cache


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_prefill_in_chunks_equals_one_uncached_forward(model, chunk):
    ids = torch.randint(V, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        cache = KVCache(model.config, 2, 20, "cpu", torch.float32)
        got = torch.cat([model(part, cache=cache).logits for part in ids.split(chunk, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cache_rows_expand_and_select(model):
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    cache = KVCache(model.config, 2, 8, "cpu", torch.float32)
    for layer in range(2):
        keys, _ = cache.update(layer, k, v)
        assert keys.data_ptr() == cache.store[layer, 0].data_ptr()         # a view: nothing is copied
    cache.advance(3)
    more = cache.expand(3)
    more.select(torch.tensor([0, 2, 4]))                                   # two copies of row 0, one of row 1
    keys, values = more.update(1, k[[0, 0, 1]], v[[0, 0, 1]])
    torch.testing.assert_close(keys, torch.cat([k, k], dim=2)[[0, 0, 1]])
    torch.testing.assert_close(values, torch.cat([v, v], dim=2)[[0, 0, 1]])
    assert cache.store.shape[2] == 2 and cache.length == more.length == 3


# --- the filters


def allowed(logits):
    return (logits > -INF).tolist()


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(penalize_repetition(logits, seen, 2.0), torch.tensor([[1.0, -4.0, 0.0, 3.0]]))


def test_top_k_top_p_min_p_by_hand():
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    logits = probs.log()
    assert allowed(keep_top_k(logits, 2)) == [[False, True, False, True]]
    assert allowed(keep_top_k(logits, 99)) == [[True] * 4]
    assert allowed(keep_top_p(logits, 0.49)) == [[False, True, False, False]]
    assert allowed(keep_top_p(logits, 0.51)) == [[False, True, False, True]]  # 0.5 is too little, 0.8 enough
    assert allowed(keep_top_p(logits, 0.9)) == [[True, True, False, True]]
    assert sum(allowed(keep_top_p(torch.zeros(1, 2), 0.5))[0]) == 1           # 0.5 is enough for 0.5
    assert allowed(keep_min_p(logits, 0.29)) == [[True, True, False, True]]   # threshold 0.145
    assert allowed(keep_min_p(logits, 1.0)) == [[False, True, False, False]]


def test_steps_run_in_the_documented_order():
    # After the penalty token 0 is no longer the best; ÷ τ then decides how many tokens the nucleus holds.
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    seen = torch.tensor([[True, False, False, False]])
    params = SamplingParams(repetition_penalty=4.0, temperature=0.25, top_p=0.9)
    assert allowed(filter_logits(logits, params, seen)) == [[False, True, False, False]]
    hot = SamplingParams(repetition_penalty=4.0, temperature=10.0, top_p=0.9)
    assert allowed(filter_logits(logits, hot, seen)) == [[True] * 4]
    # top-k first: the nucleus is taken from what it leaves (0.5 / 0.8 is more than 0.6).
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    assert allowed(filter_logits(logits, SamplingParams(top_k=2, top_p=0.6))) == [[True, False, False, False]]


@pytest.mark.parametrize("options", [
    dict(temperature=0.7), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.2), dict(repetition_penalty=1.7),
    dict(repetition_penalty=1.3, temperature=1.4, top_k=30, top_p=0.9, min_p=0.05)])
def test_filters_equal_transformers(options):
    torch.manual_seed(3)
    logits, ids = torch.randn(16, V) * 3, torch.randint(V, (16, 9))
    seen = torch.zeros(16, V, dtype=torch.bool).scatter_(1, ids, True)
    params = SamplingParams(**options)
    chain = [transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
             transformers.TemperatureLogitsWarper(params.temperature), transformers.TopKLogitsWarper(params.top_k or V),
             transformers.TopPLogitsWarper(params.top_p), transformers.MinPLogitsWarper(params.min_p)]
    expected = logits
    for step in chain:
        expected = step(ids, expected)
    torch.testing.assert_close(filter_logits(logits, params, seen), expected)


# --- drawing


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, 5)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.249, 0.251, 0.749, 0.751, 1 - 2**-24]))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]                            # never 1 or 4, whose probability is 0
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))
    assert draw(torch.tensor([[-INF, 0.0]]), torch.zeros(1))[0].tolist() == [1]
    torch.manual_seed(0)
    logits = torch.randn(2000, 64)                                          # sums that round to above and below 1
    logits[:, -9:] = -INF
    assert draw(logits, torch.full((2000,), 1 - 2**-24))[0].max() == 54     # the largest number that is drawn


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=1.5, top_k=12, top_p=0.9, min_p=0.02)])
def test_sampling_frequencies_follow_the_filtered_distribution(model, options):
    prompt, count = [5, 6, 7], 20000
    params = SamplingParams(max_new_tokens=1, seed=11, **options)
    drawn = [c.ids[0] for c in generate(model, [prompt], params, num_samples=count)[0]]
    with torch.no_grad():
        z = model(torch.tensor([prompt])).logits[0, -1].double().numpy() / params.temperature
    order = np.argsort(-z)
    p = np.exp(z - z.max())
    if params.top_k:
        p[order[params.top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    observed = np.bincount(drawn, minlength=V)
    assert not observed[p == 0].any()
    keep = p * count >= 5                                                   # the usual condition of the χ² test
    expected = np.append(p[keep], p[~keep].sum()) * count
    observed = np.append(observed[keep], observed[~keep].sum())[expected > 0]
    expected = expected[expected > 0]
    chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom >= 4
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


# --- many rows, one result


@pytest.mark.parametrize("changes", [
    {}, dict(qk_norm=False, qkv_bias=True), dict(sliding_window=5),
    dict(num_experts=4, num_shared_experts=1, moe_intermediate_size=32, router="sigmoid")])
def test_batched_greedy_equals_uncached_single_rows(changes):
    model, prompts = tiny(**changes), ragged()
    got = generate(model, prompts, SamplingParams(max_new_tokens=15, temperature=0))
    assert ids_of(got) == [slow_greedy(model, prompt, 15) for prompt in prompts]
    assert {c.finish_reason for c in flat(got)} == {"length"}


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_recorded_logprobs_equal_teacher_forced_ones(model, temperature):
    prompts = ragged()
    got = generate(model, prompts, SamplingParams(20, temperature, seed=3, stop_ids=(1, 2, 3)), num_samples=3)
    assert len({len(ids) for ids in ids_of(got)}) > 3                       # rows left at different times
    for prompt, samples in zip(prompts, got, strict=True):
        for c in samples:
            with torch.no_grad():
                logprobs, _ = token_logprobs(model, torch.tensor([prompt + c.ids]), temperature=temperature)
            torch.testing.assert_close(torch.tensor(c.logprobs), logprobs[0, len(prompt):], atol=1e-4, rtol=0)


def test_logprobs_with_truncation_are_renormalised_and_greedy_ones_at_temperature_one(model):
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    top = logits.topk(3)
    renormalised = dict(zip(top.indices.tolist(), (top.values / 0.5).log_softmax(-1).tolist(), strict=True))
    for c in generate(model, [prompt], SamplingParams(1, 0.5, top_k=3, seed=0), num_samples=20)[0]:
        assert c.logprobs[0] == pytest.approx(renormalised[c.ids[0]], abs=1e-4)
    greedy = generate(model, [prompt], SamplingParams(1, 0.0))[0][0]
    assert greedy.logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_autocast_computes_and_caches_in_bfloat16(model):
    prompts = ragged(4)
    with torch.autocast("cpu", torch.bfloat16):
        got = generate(model, prompts, SamplingParams(10, 1.0, seed=3))
        for prompt, c in zip(prompts, flat(got), strict=True):
            with torch.no_grad():
                logprobs, _ = token_logprobs(model, torch.tensor([prompt + c.ids]))
            torch.testing.assert_close(torch.tensor(c.logprobs), logprobs[0, len(prompt):], atol=0.2, rtol=0)
        model(torch.tensor([prompts[-1]])).logits.float().sum().backward()  # weights cast while sampling do not hinder
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_seed_reproduces_and_a_row_depends_on_its_own_place_only(model):
    prompts, params = ragged(), SamplingParams(20, 1.0, seed=5, stop_ids=(1, 2, 3, 4))
    got = generate(model, prompts, params, num_samples=3)
    assert ids_of(got) == ids_of(generate(model, prompts, params, num_samples=3))
    assert ids_of(got) != ids_of(generate(model, prompts, SamplingParams(20, 1.0, seed=6, stop_ids=(1, 2, 3, 4)),
                                          num_samples=3))
    assert len(set(map(tuple, ids_of(got)))) > 15                           # samples of one prompt differ
    assert len(set(map(tuple, ids_of(generate(model, [[5]] * 9, params))))) > 5  # and so do equal prompts
    # other neighbours, other split into batches, fewer samples: the same rows
    other = generate(model, [*prompts[:4], [1] * 30], params, num_samples=3)
    assert ids_of(other[:4]) == ids_of(got[:4])
    assert ids_of(generate(model, prompts, params, num_samples=3, batch_size=6)) == ids_of(got)
    fewer = generate(model, prompts, params)
    assert ids_of(fewer) == [samples[0].ids for samples in got]


def test_without_seed_torch_decides(model):
    params = SamplingParams(10, 1.0)
    torch.manual_seed(1)
    first, second = generate(model, [[5]], params), generate(model, [[5]], params)
    torch.manual_seed(1)
    assert ids_of(generate(model, [[5]], params)) == ids_of(first) != ids_of(second)
    before = torch.get_rng_state()
    generate(model, [[5]], SamplingParams(10, 0.0))
    generate(model, [[5]], SamplingParams(10, 1.0, seed=4))
    assert torch.equal(torch.get_rng_state(), before)                       # a training run that looks is undisturbed


def test_samples_from_one_prefill_equal_separate_prompts(model):
    prompts, params = ragged(4), SamplingParams(12, 0.0, repetition_penalty=1.5)
    assert ids_of(generate(model, prompts, params, num_samples=3)) == \
        ids_of(generate(model, [prompt for prompt in prompts for _ in range(3)], params))


def test_penalty_counts_prompt_and_continuation_but_not_padding(model):
    prompts, params = ragged(), SamplingParams(20, 0.0, repetition_penalty=3.0)
    together = ids_of(generate(model, prompts, params))
    assert together == [ids_of(generate(model, [prompt], params))[0] for prompt in prompts]
    assert together != ids_of(generate(model, prompts, SamplingParams(20, 0.0)))


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers_generate(penalty):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = CausalLM(ModelConfig.from_hf(config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    for prompt in ragged(4):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                   max_new_tokens=20, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0)
        got = generate(ours, [prompt], SamplingParams(20, 0.0, repetition_penalty=penalty))[0][0]
        assert got.ids == expected[0, len(prompt):].tolist()


def test_model_state_comes_back_and_nothing_is_left_behind(model):
    model.train()
    generate(model, [[1]], SamplingParams(2))
    assert model.training and all(block.training for block in model.model.layers)
    text = stream(tiny(768), Tokenizer.load("nano"), [1], SamplingParams(3, seed=0))
    next(text, None)
    assert not torch.is_inference_mode_enabled()                            # not even between two pieces
    model.eval()
    generate(model, [[1]], SamplingParams(2))
    assert not model.training
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    model.zero_grad()


# --- where it ends


def test_finish_reasons_and_the_stop_token(tokenizer):
    script = tokenizer.encode("Hi there") + [tokenizer.end_of_turn_id] + tokenizer.encode("never said")
    model = Scripted(script, tokenizer.vocab_size)
    stopped = generate(model, [[20]], SamplingParams(50, 0.0), tokenizer)[0][0]
    assert (stopped.finish_reason, stopped.text) == ("stop", "Hi there")
    assert stopped.ids == script[:script.index(tokenizer.end_of_turn_id) + 1]
    assert len(stopped.logprobs) == len(stopped.ids)
    short = generate(model, [[20]], SamplingParams(2, 0.0), tokenizer)[0][0]
    assert (short.finish_reason, short.ids) == ("length", script[:2])
    last = generate(model, [[20]], SamplingParams(len(stopped.ids), 0.0), tokenizer)[0][0]
    assert last.finish_reason == "stop"                                    # on the very last token that was allowed
    plain = generate(model, [[20]], SamplingParams(50, 0.0))[0][0]          # no tokenizer: no default stop, no text
    assert (plain.finish_reason, plain.text, plain.ids) == ("length", "", script)
    own = generate(model, [[20]], SamplingParams(50, 0.0, stop_ids=(script[1],)), tokenizer)[0][0]
    assert (own.ids, own.text) == (script[:2], tokenizer.decode(script[:1]))


def test_a_row_that_has_ended_is_not_touched_by_what_follows(tokenizer):
    script = [30, 31, 32, 33, 1, 34]
    params = SamplingParams(6, 0.0, stop_strings=(tokenizer.decode([33]),))
    for chosen in (SamplingParams(6, 0.0), params):
        batch = Batch(Scripted(script, tokenizer.vocab_size), [[20]] * 8, chosen, 1, 6)
        got = run_batch(batch, torch.zeros(8, 6), [2] + [6] * 7, (1,), tokenizer)
        assert (got[0].ids, got[0].finish_reason, got[0].text) == (script[:2], "length", tokenizer.decode(script[:2]))
        assert {c.finish_reason for c in got[1:]} == {"stop"}


def test_rows_end_where_the_positions_of_the_model_do(model):
    got = flat(generate(model, [[1] * 60, [2] * 63, [3] * 5], SamplingParams(10, 0.0)))
    assert [len(c.ids) for c in got] == [4, 1, 10]
    assert {c.finish_reason for c in got} == {"length"}


@pytest.mark.parametrize("stop, text", [("STOP", "a word "), ("word STOP", "a "), ("ST", "a word "), ("xyz", None),
                                        ("after all STOP", None)])
def test_stop_strings_cut_the_text(tokenizer, stop, text):
    whole = "a word STOP after all ST"
    script = tokenizer.encode(whole)
    params = SamplingParams(50, 0.0, stop_strings=(stop, "nowhere"))
    model = Scripted(script, tokenizer.vocab_size)
    got = generate(model, [[20], [21]], params, tokenizer)
    for c in flat(got):
        assert (c.text, c.finish_reason) == ((text, "stop") if text else (whole, "length"))
        said = tokenizer.decode(c.ids)
        assert (stop in said) == bool(text) and whole.startswith(said)
        assert stop not in tokenizer.decode(c.ids[:-1])                     # it ends with the token that completes it
    pieces = stream(model, tokenizer, [20], params)
    assert "".join(pieces) == got[0][0].text and pieces.completion == got[0][0]


def test_stop_scanner_equals_reading_letter_by_letter():
    class Letters:
        def stream_decoder(self):
            return self

        def push(self, piece):
            return piece

        def flush(self):
            return ""

    rng = random.Random(0)
    for _ in range(3000):
        pieces = ["".join(rng.choices("ab", k=rng.randint(0, 4))) for _ in range(6)]
        stops = tuple("".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
        whole = "".join(pieces)
        ends = [(end, end - len(s)) for end in range(len(whole) + 1) for s in stops if whole[:end].endswith(s)]
        expected = whole[:min(ends)[1]] if ends else whole
        scanner, said = StopScanner(Letters(), stops), ""
        for piece in pieces:
            said += scanner.push(piece)
            assert expected.startswith(said)                                # nothing has to be taken back
            if scanner.stopped:
                break
        said += scanner.flush()
        assert said == scanner.text == expected and scanner.stopped == bool(ends)


# --- text as it comes


@pytest.mark.parametrize("text", ["naïve 你好，世界 🌰👩‍👩‍👧 e\u0301 नमस्ते \n\t end", "🌰", ""])
def test_stream_joins_to_the_text_and_never_cuts_a_character(tokenizer, text):
    script = tokenizer.encode(text) + [tokenizer.eos_id]
    model = Scripted(script, tokenizer.vocab_size)
    params = SamplingParams(200, 0.0)
    pieces = list(run := stream(model, tokenizer, [20], params))
    assert "".join(pieces) == text and all(pieces) and "\ufffd" not in text
    assert run.completion == generate(model, [[20]], params, tokenizer)[0][0]
    if len(script) > 9:
        assert len(pieces) > 5                                              # it did come in pieces
    cut = generate(model, [[20]], SamplingParams(1, 0.0), tokenizer)[0][0]  # perhaps inside a character
    run = stream(model, tokenizer, [20], SamplingParams(1, 0.0))
    assert "".join(run) == cut.text and run.completion == cut


@pytest.mark.parametrize("stop_strings", [(), ("e", "th"), ("\ufffd",)])
def test_stream_equals_generate_for_random_text(tokenizer, stop_strings):
    model = tiny(tokenizer.vocab_size)
    for seed in range(12):
        params = SamplingParams(40, 1.2, top_k=200, seed=seed, stop_strings=stop_strings)
        run = stream(model, tokenizer, [20, 30, 40], params)
        text = "".join(run)
        expected = generate(model, [[20, 30, 40]], params, tokenizer)[0][0]
        assert text == run.completion.text == expected.text
        assert (run.completion.ids, run.completion.finish_reason) == (expected.ids, expected.finish_reason)
        np.testing.assert_allclose(run.completion.logprobs, expected.logprobs, atol=1e-5)


# --- mistakes


@pytest.mark.parametrize("prompts, options, words", [
    ([[1], []], {}, "prompt 1 is empty"), ([[1] * 64], {}, "64 tokens and the model 64 positions"),
    ([[1, V]], {}, "outside 0..47"), ([[-1]], {}, "outside"), ([[1]], dict(stop_strings=("x",)), "needs a tokenizer")])
def test_prompts_that_cannot_be_continued(model, prompts, options, words):
    with pytest.raises(UserError, match=words):
        generate(model, prompts, SamplingParams(5, **options))


@pytest.mark.parametrize("options", [
    dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0),
    dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.1), dict(repetition_penalty=0.0), dict(seed=-3),
    dict(stop_strings=("",))])
def test_settings_that_make_no_sense(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingParams(**options)


def test_weights_that_are_not_numbers_are_reported(tokenizer):
    broken = tiny(tokenizer.vocab_size)
    broken.model.norm.weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not finite"):
            generate(broken, [[1, 2]], SamplingParams(3, temperature))
        with pytest.raises(UserError, match="not finite"):
            list(stream(broken, tokenizer, [1, 2], SamplingParams(3, temperature)))


def test_no_prompts_no_completions(model):
    assert generate(model, [], SamplingParams()) == []
