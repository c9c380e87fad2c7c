"""model/engine.py: each answer is generate()'s, whatever runs beside it; memory, turns, failures and endings."""

import asyncio
import random
import threading
from dataclasses import replace

import pytest
import torch

from model import engine as engine_module
from model.adapters.folder import AdapterConfig, attach, switch
from model.config import ModelConfig
from model.engine import BLOCK, Engine, FairQueue, PrefixCache, QueueFull, Request
from model.errors import UserError
from model.fused import FusedLM
from model.generate import SamplingParams, filter_logits, generate
from model.logprobs import token_logprobs
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

GREEDY = SamplingParams(12, 0.0)
SOON = 60                                                      # seconds after which a test that hangs has failed
NEVER = (10**6,)                                               # stop ids that no model writes


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def tiny(tokenizer, **changes):
    """A random model sharp enough that its choices matter."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3)
    return CausalLM(ModelConfig(tokenizer.vocab_size, **{**shape, **changes})).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(tokenizer)


def ragged(count, longest=40, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(300, 1000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def mixed(model, tokenizer, prompts):
    """Parameters of all kinds, one for each prompt; some with a stop string that its answer has."""
    kinds = [GREEDY, SamplingParams(20, 0.9, seed=3), SamplingParams(7, 0.8, top_p=0.7, seed=4),
             SamplingParams(16, 1.3, top_k=5, min_p=0.05, seed=5), SamplingParams(9, 0.0, repetition_penalty=1.5),
             SamplingParams(24, 1.0, presence_penalty=0.8, frequency_penalty=0.4, seed=6),
             SamplingParams(14, 0.0, frequency_penalty=3.0, logit_bias={500: 4.0, 700: -9.0}),
             SamplingParams(30, 1.0, seed=7)]
    params = [kinds[i % len(kinds)] for i in range(len(prompts))]
    for i in range(0, len(prompts), 3):
        text = generate(model, [prompts[i]], params[i], tokenizer)[0][0].text
        params[i] = replace(params[i], stop_strings=(text[len(text) // 2:][:3] or "x",))
    ids = generate(model, [prompts[1]], params[1])[0][0].ids
    params[1] = replace(params[1], stop_ids=(ids[len(ids) // 2],))
    return params


def check_answer(ticket, model, tokenizer):
    request = ticket.request
    expected = generate(model, [request.prompt_ids], request.params, tokenizer)[0][0]
    answer = ticket.result(SOON)
    assert answer.token_ids == expected.ids
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(request.prompt_ids), len(expected.ids))
    return answer


def parked(engine):
    """Keep the engine's thread busy until the function that is returned is called."""
    inside, go = threading.Event(), threading.Event()
    threading.Thread(target=engine.call, args=(lambda _: (inside.set(), go.wait(SOON)),)).start()
    assert inside.wait(SOON)
    return go.set


def settled(engine):
    """The engine's figures between two steps: an answer is there a moment before its row has left."""
    return engine.call(lambda _: engine.stats())


class Hook:
    """A constraint that allows everything; its function is called on the engine's thread before each token."""

    def __init__(self, tokenizer, function):
        self.everything, self.function = torch.ones(tokenizer.vocab_size, dtype=torch.bool), function

    def allowed(self, generated):
        self.function(generated)
        return self.everything


# --- answers


@pytest.mark.parametrize("prefill_tokens", [7, 512])
def test_concurrent_answers_equal_their_serial_ones(model, tokenizer, monkeypatch, prefill_tokens):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", prefill_tokens)       # 7: most prompts take several turns
    prompts = ragged(16)
    params = mixed(model, tokenizer, prompts)
    with Engine(model, tokenizer, max_batch=6) as engine:                      # rows come and go
        tickets = [engine.submit(Request(*pair)) for pair in zip(prompts, params, strict=True)]
        reasons = []
        for ticket in tickets:
            pieces = list(ticket)
            answer = check_answer(ticket, model, tokenizer)
            assert "".join(piece.text for piece in pieces) == answer.text
            assert [token for piece in pieces for token in piece.token_ids] == answer.token_ids
            reasons.append(answer.finish_reason)
        stats = settled(engine)
    assert {"stop", "length"} == set(reasons)
    assert (stats["requests"], stats["stop"] + stats["length"], stats["running"], stats["kv_tokens"]) == (16, 16, 0, 0)
    assert stats["steps"] < stats["generated_tokens"] / 2                      # rows did share steps


@pytest.mark.parametrize("changes", [dict(sliding_window=9), dict(qk_norm=True, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=64),
                                     dict(num_key_value_heads=4, qkv_bias=True, tie_word_embeddings=False)])
def test_other_architectures(tokenizer, changes):
    model = tiny(tokenizer, **changes)
    prompts = ragged(6, seed=2)
    with Engine(model, tokenizer, max_batch=4) as engine:
        tickets = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts + [prompts[0] + [400, 500]]]
        for ticket in tickets:
            check_answer(ticket, model, tokenizer)


def test_requests_join_at_any_step(model, tokenizer):
    """One joins at each of the first steps of another, some longer than all that runs, so that rows are laid anew."""
    prompts, params, tickets = ragged(8, seed=3), SamplingParams(30, 1.0, seed=1, stop_ids=NEVER), []
    with Engine(model, tokenizer, prefix_cache=0) as engine:
        def join(generated):
            if len(generated) < len(prompts):
                budget = 3 + 5 * len(generated)
                tickets.append(engine.submit(Request(prompts[len(generated)], replace(params, max_new_tokens=budget))))
        first = engine.submit(Request([300, 301], params, constraint=Hook(tokenizer, join)))
        first.result(SOON)
        assert len(tickets) == len(prompts)
        for ticket in [first, *tickets]:
            check_answer(ticket, model, tokenizer)


def test_samples_and_seeds_are_those_of_generate(model, tokenizer):
    params = SamplingParams(10, 1.0, seed=11)
    expected = [sample.ids for sample in generate(model, [[400, 401]], params, tokenizer, num_samples=3)[0]]
    with Engine(model, tokenizer) as engine:
        tickets = [engine.submit(Request([400, 401], params, sample=j)) for j in (2, 0, 1)]
        assert [t.result(SOON).token_ids for t in tickets] == [expected[2], expected[0], expected[1]]
        free = [engine.submit(Request([400, 401], replace(params, seed=None))).result(SOON).token_ids for _ in "ab"]
    assert free[0] != free[1]


def test_an_answer_ends_where_the_positions_end(model, tokenizer):
    prompt = ragged(1)[0] * 20
    with Engine(model, tokenizer) as engine:
        ticket = engine.submit(Request(prompt[:125], SamplingParams(1000, 0.0, stop_ids=NEVER)))
        assert check_answer(ticket, model, tokenizer).completion_tokens == 3
        for bad in ([], prompt[:1] * 128, [tokenizer.vocab_size]):
            with pytest.raises(UserError):
                engine.submit(Request(bad, GREEDY))


def test_bfloat16_on_a_cpu_uses_the_fused_copy(tokenizer):
    model = tiny(tokenizer).bfloat16()
    with Engine(model, tokenizer) as engine:
        ids = engine.submit(Request([400, 401, 402], GREEDY)).result(SOON).token_ids
    assert ids == generate(FusedLM(model, torch.bfloat16), [[400, 401, 402]], GREEDY, tokenizer)[0][0].ids


def test_text_comes_in_whole_characters_and_without_stop_strings(model, tokenizer):
    ids = tokenizer.encode("说 🌰! STOP and more")

    class Dictated:
        def allowed(self, generated):
            return torch.arange(tokenizer.vocab_size) == ids[len(generated)]

    with Engine(model, tokenizer) as engine:
        pieces = list(engine.submit(Request([300], SamplingParams(len(ids), 1.0), constraint=Dictated())))
        assert [token for piece in pieces for token in piece.token_ids] == ids
        assert "".join(piece.text for piece in pieces) == "说 🌰! STOP and more"
        assert len(pieces) > 3 and not any("�" in piece.text for piece in pieces)
        params = SamplingParams(len(ids), 1.0, stop_strings=("STOP",))
        answer = engine.submit(Request([300], params, constraint=Dictated())).result(SOON)
        assert (answer.text, answer.finish_reason) == ("说 🌰! ", "stop")


# --- adapters


def scrambled(model, method, name):
    attach(model, AdapterConfig(method, rank=4), name)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            torch.nn.init.normal_(parameter.data, std=0.2)


def test_adapters_take_turns(tokenizer):
    model = tiny(tokenizer)
    for method, name in (("lora", "a"), ("lora", "b"), ("prefix", "p"), ("prompt", "q")):
        scrambled(model, method, name)
    prompts, names = ragged(10, seed=4), ["", "a", "b", "p", "q"]
    # the same beginning under every adapter: what is cached of one must not be taken for another
    prompts = [prompts[0] * 3 + prompt for prompt in prompts]
    with Engine(model, tokenizer) as engine:
        tickets = [engine.submit(Request(prompt, GREEDY, adapter=names[i % 5])) for i, prompt in enumerate(prompts)]
        for ticket in tickets:
            ticket.result(SOON)
        again = [engine.submit(Request(prompt, GREEDY, adapter=names[i % 5])) for i, prompt in enumerate(prompts)]
        cached = [ticket.result(SOON).cached_tokens for ticket in again]
        assert engine.call(lambda model: model.model.soft_prompt.active, adapter="p") == "p"
        with pytest.raises(UserError, match="no adapter named 'c'"):
            engine.submit(Request([1], adapter="c"))
    assert min(cached) >= BLOCK
    answers = set()
    for ticket in tickets + again:
        switch(model, ticket.request.adapter or None)
        check_answer(ticket, model, tokenizer)
        answers.add((ticket.request.adapter, tuple(ticket.result().token_ids)))
    assert len(answers) == 10


# --- logprobs, constraints


def test_logprobs_are_the_models_own(model, tokenizer):
    prompt = [400, 401, 402]
    params = SamplingParams(9, 0.7, top_k=4, seed=2, presence_penalty=1.0, logit_bias={600: 2.0}, stop_ids=NEVER)
    with Engine(model, tokenizer) as engine:
        tickets = [engine.submit(Request(prompt, params, top_logprobs=most)) for most in (-1, 0, 3)]
        pieces = [list(ticket) for ticket in tickets]
        plain, chosen, top = (ticket.result(SOON) for ticket in tickets)
    assert plain.token_ids == chosen.token_ids == top.token_ids
    ids = torch.tensor([prompt + top.token_ids])
    with torch.no_grad():
        expected = token_logprobs(model, ids)[0][0, len(prompt):]
        likeliest = model(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1).topk(3)
    assert plain.logprobs == plain.top == [] and chosen.top == [[]] * 9
    torch.testing.assert_close(torch.tensor(chosen.logprobs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(top.logprobs), expected, atol=1e-5, rtol=1e-5)
    assert [[token for token, _ in one] for one in top.top] == likeliest.indices.tolist()
    torch.testing.assert_close(torch.tensor([[value for _, value in one] for one in top.top]), likeliest.values,
                               atol=1e-5, rtol=1e-5)
    assert [x for piece in pieces[2] for x in piece.logprobs] == top.logprobs
    assert [x for piece in pieces[2] for x in piece.top] == top.top and not any(piece.top for piece in pieces[0])


def test_a_constraint_leaves_only_what_it_allows(model, tokenizer):
    few = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    few[[350, 360, 370]] = True

    class Few:
        def allowed(self, generated):
            if len(generated) == 6:
                raise ValueError("six are enough")
            return few if len(generated) < 4 else ~few if len(generated) == 4 else few & ~few

    greedy, ids = [], [400]
    while len(greedy) < 4:
        with torch.no_grad():
            logits = model(torch.tensor([ids + greedy])).logits[0, -1]
        greedy.append(max((350, 360, 370), key=lambda token: logits[token].item()))
    with Engine(model, tokenizer) as engine:
        constrained = engine.submit(Request(ids, SamplingParams(4, 0.0), constraint=Few()))
        beside = engine.submit(Request([401, 402], SamplingParams(20, 0.0, stop_ids=NEVER)))
        assert constrained.result(SOON).token_ids == greedy
        sampled = engine.submit(Request(ids, SamplingParams(5, 1.0, top_k=2, seed=0), constraint=Few())).result(SOON)
        assert set(sampled.token_ids[:4]) <= {350, 360, 370} and sampled.token_ids[4] not in (350, 360, 370)
        stuck = engine.submit(Request(ids, SamplingParams(8, 1.0), constraint=Few()))
        with pytest.raises(UserError, match="allows no token"):                # of this request only
            stuck.result(SOON)
        check_answer(beside, model, tokenizer)
        assert settled(engine)["failed"] == 1 and settled(engine)["kv_tokens"] == 0


def test_penalties_and_bias_by_hand():
    logits, counts = torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.tensor([[2, 1, 0, 0]])
    params = SamplingParams(temperature=0.5, presence_penalty=0.4, frequency_penalty=0.25, logit_bias={3: -1.0, 1: 6.0})
    # token 0, written twice: 1 - 0.4 - 2 · 0.25; token 1, once: -2 + 6 - 0.4 - 0.25; token 3: 3 - 1; all / 0.5
    torch.testing.assert_close(filter_logits(logits, params, None, counts), torch.tensor([[0.2, 6.7, 1.0, 4.0]]))


def test_penalties_count_what_was_written_and_not_the_prompt(model, tokenizer):
    params = SamplingParams(40, 0.0, presence_penalty=1e4, stop_ids=NEVER)
    first = generate(model, [[400]], params)[0][0].ids[0]
    with Engine(model, tokenizer) as engine:
        ids = engine.submit(Request([400], params)).result(SOON).token_ids
        again = engine.submit(Request([first, 400], params)).result(SOON).token_ids
    assert len(set(ids)) == 40
    assert again == generate(model, [[first, 400]], params)[0][0].ids and len(set(again)) == 40
    biased = SamplingParams(3, 1.0, logit_bias={first: 1e4})
    assert generate(model, [[first, 400]], biased)[0][0].ids == [first] * 3
    with pytest.raises(UserError, match="logit_bias"):
        generate(model, [[400]], SamplingParams(logit_bias={tokenizer.vocab_size: 1.0}))


# --- memory


def test_what_an_earlier_text_began_with_is_not_read_again(model, tokenizer):
    system = ragged(1, seed=5)[0] * 20
    turns = [system[:50] + tail for tail in ragged(5, longest=20, seed=6)]
    with Engine(model, tokenizer) as engine:
        first = check_answer(engine.submit(Request(turns[0], GREEDY)), model, tokenizer)
        read = settled(engine)["prompt_tokens"]
        assert first.cached_tokens == 0 and read == len(turns[0])
        for turn in turns[1:]:
            answer = check_answer(engine.submit(Request(turn, GREEDY)), model, tokenizer)
            assert answer.cached_tokens == 50 // BLOCK * BLOCK
        follow = turns[0] + first.token_ids + [450] * 9                        # the next turn of that chat
        answer = check_answer(engine.submit(Request(follow, GREEDY)), model, tokenizer)
        assert answer.cached_tokens == (len(turns[0]) + len(first.token_ids) - 1) // BLOCK * BLOCK
        whole = system[:3 * BLOCK]
        assert check_answer(engine.submit(Request(whole, GREEDY)), model, tokenizer).cached_tokens == 2 * BLOCK
        stats = settled(engine)
        asked = sum(map(len, turns)) + len(follow) + len(whole)
        assert stats["cached_tokens"] == asked - stats["prompt_tokens"] > 150 and stats["prefix_hits"] == 6
    with Engine(model, tokenizer, prefix_cache=0) as engine:
        for turn in turns:
            assert check_answer(engine.submit(Request(turn, GREEDY)), model, tokenizer).cached_tokens == 0
        assert settled(engine)["prefix_tokens"] == 0


def test_requests_at_once_read_their_common_beginning_once(model, tokenizer):
    system = (ragged(1, seed=5)[0] * 20)[:2 * BLOCK]
    with Engine(model, tokenizer) as engine:
        go = parked(engine)
        tickets = [engine.submit(Request([*system, 400 + i], GREEDY)) for i in range(8)]
        go()
        assert sorted(check_answer(t, model, tokenizer).cached_tokens for t in tickets) == [0] + [2 * BLOCK] * 7


def test_the_prefix_cache_is_bounded_and_forgets_what_was_not_used_for_longest():
    cache, kv = PrefixCache(4 * BLOCK), torch.arange(3.0 * BLOCK).view(1, 1, 1, -1, 1).expand(2, 2, 1, -1, 3)
    a, b, c = ([start] * (3 * BLOCK) for start in (1, 2, 3))
    cache.put("", a[:2 * BLOCK], kv[:, :, :, :2 * BLOCK])
    cache.put("", b[:2 * BLOCK], kv[:, :, :, :2 * BLOCK])
    assert cache.tokens == 4 * BLOCK and len(cache.find("", a)[0]) == 2       # a was used last now
    cache.put("", c[:BLOCK + 3], kv[:, :, :, :BLOCK + 3])                      # one whole block
    assert cache.tokens == 4 * BLOCK
    assert [len(cache.find("", ids)[0]) for ids in (a, b, c)] == [2, 1, 1]    # the end of b went before its beginning
    assert cache.find("other", a)[0] == []
    found, missing = cache.find("", a[:BLOCK])                                 # its last token has to be read
    assert found == [] and missing is None
    torch.testing.assert_close(torch.cat(cache.find("", a)[0], dim=3), kv[:, :, :, :2 * BLOCK])


def test_memory_is_bounded(model, tokenizer):
    rng, seen = random.Random(0), []
    with Engine(model, tokenizer, max_batch=8, max_tokens=120) as engine:
        hook = Hook(tokenizer, lambda _: seen.append(engine.stats()))
        tickets = [engine.submit(Request(prompt, SamplingParams(rng.randint(2, 30), 1.0, seed=i, stop_ids=NEVER),
                                         constraint=hook)) for i, prompt in enumerate(ragged(24, longest=30, seed=7))]
        for ticket in tickets:
            check_answer(ticket, model, tokenizer)
        with pytest.raises(UserError, match="memory for 121 tokens .91 of the prompt, at most 30 new ones.") as error:
            engine.submit(Request([300] * 91, SamplingParams(30)))
        assert "\n" not in str(error.value)
        assert settled(engine)["kv_peak"] <= 120 and settled(engine)["prefix_tokens"] <= 30
    assert max(stats["kv_tokens"] for stats in seen) <= 120 and max(stats["running"] for stats in seen) >= 4


def test_cancelling_frees_the_memory(model, tokenizer):
    tickets = {}

    def third(generated):
        if len(generated) == 3:
            tickets["long"].cancel()

    with Engine(model, tokenizer, max_tokens=100) as engine:
        go = parked(engine)
        long = SamplingParams(90, 0.0, stop_ids=NEVER)
        tickets["long"] = engine.submit(Request([400], long, constraint=Hook(tokenizer, third)))
        tickets["next"] = engine.submit(Request([401], long))                  # fits only behind the first
        tickets["never"] = engine.submit(Request([402], long))
        tickets["never"].cancel()
        go()
        cut = tickets["long"].result(SOON)
        assert (cut.finish_reason, cut.completion_tokens) == ("cancelled", 4)
        assert "".join(piece.text for piece in tickets["long"]) == cut.text == tokenizer.decode(cut.token_ids)
        assert check_answer(tickets["next"], model, tokenizer).completion_tokens == 90
        never = tickets["never"].result(SOON)
        assert (never.finish_reason, never.token_ids) == ("cancelled", [])
        tickets["next"].cancel()                                               # too late to matter
        assert tickets["next"].result().finish_reason == "length"
        stats = settled(engine)
        assert (stats["running"], stats["kv_tokens"], stats["waiting"], stats["cancelled"]) == (0, 0, 0, 2)


# --- turns, the queue, the end


def test_users_take_turns(model, tokenizer):
    order = []
    with Engine(model, tokenizer, max_batch=1) as engine:
        go = parked(engine)

        def submit(user, number):
            hook = Hook(tokenizer, lambda generated: generated or order.append(f"{user}{number}"))
            return engine.submit(Request([400], SamplingParams(2, 0.0, stop_ids=NEVER), user=user, constraint=hook))

        tickets = [submit(*name) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
        go()
        for ticket in tickets:
            ticket.result(SOON)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(FairQueue()) == 0


def test_a_full_queue_refuses(model, tokenizer):
    with Engine(model, tokenizer, max_batch=1, max_queue=2) as engine:
        go = parked(engine)
        tickets = [engine.submit(Request([400 + i], GREEDY)) for i in range(2)]
        with pytest.raises(QueueFull, match="2 requests are waiting already"):
            engine.submit(Request([403], GREEDY))
        assert engine.stats()["waiting"] == 2
        go()
        for ticket in tickets:
            check_answer(ticket, model, tokenizer)
        check_answer(engine.submit(Request([403], GREEDY)), model, tokenizer)
    for wrong in (dict(max_batch=0), dict(max_queue=0), dict(max_tokens=-1)):
        with pytest.raises(UserError, match="could run nothing"):
            Engine(model, tokenizer, **wrong)


def test_a_failing_step_ends_all_requests_with_the_error(tokenizer):
    model, calls = tiny(tokenizer), []

    def fails(module, args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    handle = model.model.register_forward_pre_hook(fails)
    with Engine(model, tokenizer, max_batch=2) as engine:
        tickets = [engine.submit(Request([400 + i], SamplingParams(20, 0.0, stop_ids=NEVER))) for i in range(4)]
        for ticket in tickets:                                                 # two that ran and two that waited
            with pytest.raises(RuntimeError, match="out of memory"):
                ticket.result(SOON)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(tickets[0])
        handle.remove()
        check_answer(engine.submit(Request([404], GREEDY)), model, tokenizer)  # and it goes on
        assert settled(engine)["failed"] == 4 and settled(engine)["running"] == 0


def test_logits_that_are_not_finite_end_their_row_only(tokenizer):
    model = tiny(tokenizer, tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[999] = float("nan")
    with Engine(model, tokenizer) as engine:
        go = parked(engine)
        bad, good = (engine.submit(Request([400, token], GREEDY)) for token in (999, 401))
        go()
        with pytest.raises(UserError, match="not finite"):
            bad.result(SOON)
        check_answer(good, model, tokenizer)


def test_closing_drains_or_cancels(model, tokenizer):
    endless = SamplingParams(100, 0.0, stop_ids=NEVER)
    engine = Engine(model, tokenizer, max_batch=1)
    tickets = [engine.submit(Request([400 + i], GREEDY)) for i in range(3)]
    engine.close()
    for ticket in tickets:
        check_answer(ticket, model, tokenizer)
    with pytest.raises(QueueFull, match="closing"):
        engine.submit(Request([400], GREEDY))
    with pytest.raises(QueueFull, match="closing"):
        engine.call(lambda model: model)

    engine, started = Engine(model, tokenizer, max_batch=1), threading.Event()
    hook = Hook(tokenizer, lambda generated: started.set())
    tickets = [engine.submit(Request([400 + i], endless, constraint=hook)) for i in range(3)]
    assert started.wait(SOON)
    engine.close(drain=False)
    reasons = [ticket.result(SOON).finish_reason for ticket in tickets]
    assert reasons[1:] == ["cancelled"] * 2 and not engine.thread.is_alive()

    engine, waited = Engine(model, tokenizer), threading.Event()
    ticket = engine.submit(Request([400], endless, constraint=Hook(tokenizer, lambda _: waited.wait(0.01))))
    engine.close(timeout=0.02)                                                 # a hundred tokens take far longer
    assert ticket.result(SOON).finish_reason == "cancelled" and ticket.result().completion_tokens < 100


# --- from other threads and event loops


def test_call_runs_on_the_engines_thread(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        name, needs_grad = engine.call(lambda m: (threading.current_thread().name, torch.is_grad_enabled()))
        assert (name, needs_grad) == ("engine", False) and engine.call(lambda m: m) is model
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda m: 1 // 0)
        check_answer(engine.submit(Request([400], GREEDY)), model, tokenizer)


def test_many_tickets_in_one_event_loop(model, tokenizer):
    prompts = ragged(8, seed=8)

    async def read(ticket):
        return "".join([piece.text async for piece in ticket])

    async def all_of_them(engine):
        tickets = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
        texts = await asyncio.wait_for(asyncio.gather(*map(read, tickets)), SOON)
        broken = engine.submit(Request([400], GREEDY, constraint=Hook(tokenizer, lambda generated: 1 // 0)))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(read(broken), SOON)
        return tickets, texts

    with Engine(model, tokenizer) as engine:
        tickets, texts = asyncio.run(all_of_them(engine))
    assert texts == [check_answer(ticket, model, tokenizer).text for ticket in tickets]


def test_an_event_loop_that_lags_gets_longer_pieces_and_one_that_is_closed_cancels(model, tokenizer):
    params = SamplingParams(20, 0.0, stop_ids=NEVER)

    async def late(engine):
        ticket = engine.submit(Request(ragged(1)[0], params, top_logprobs=1))
        ticket.result(SOON)                                                    # in the way of the loop, on purpose
        return ticket, [piece async for piece in ticket]

    async def begin(engine, hook):
        ticket = engine.submit(Request([400], replace(params, max_new_tokens=100), constraint=hook))
        await anext(aiter(ticket))
        return ticket

    with Engine(model, tokenizer) as engine:
        ticket, (piece,) = asyncio.run(late(engine))
        answer = check_answer(ticket, model, tokenizer)
        assert piece == (answer.text, answer.token_ids, answer.logprobs, answer.top)
        closed = threading.Event()
        hook = Hook(tokenizer, lambda generated: len(generated) < 50 or closed.wait(SOON))
        ticket = asyncio.run(begin(engine, hook))
        closed.set()
        assert ticket.result(SOON).finish_reason == "cancelled"
        check_answer(engine.submit(Request([400], GREEDY)), model, tokenizer)


def test_threads_may_submit_at_once(model, tokenizer):
    tickets = []
    with Engine(model, tokenizer, max_batch=3) as engine:
        def client(prompts):
            for prompt in prompts:
                tickets.append(engine.submit(Request(prompt, GREEDY, user=str(len(prompt)))))
                tickets[-1].result(SOON)
        threads = [threading.Thread(target=client, args=(ragged(4, 9, seed),)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        with pytest.raises(TimeoutError):
            go = parked(engine)
            try:
                engine.submit(Request([400], GREEDY)).result(timeout=0.01)
            finally:
                go()
    assert len(tickets) == 24
    for ticket in tickets:
        check_answer(ticket, model, tokenizer)
