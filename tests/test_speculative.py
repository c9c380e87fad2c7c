"""model/speculative.py: the distribution of the large model, its greedy answers, and chat with --draft."""

import io
import re
import sys

import pytest
import torch
from torch import nn

from model.checkpoint import save_model
from model.config import ModelConfig
from model.errors import UserError
from model.generate import SamplingParams, filter_logits, generate
from model.speculative import Rounds, load_draft, stream
from model.tokenizer import Tokenizer
from model.transformer import CausalLM, Output
from scripts import chat

NEVER = (10**6,)                                               # stop ids that no model writes


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("nano")


def tiny(tokenizer, seed, **changes):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3)
    return CausalLM(ModelConfig(tokenizer.vocab_size, **{**shape, **changes})).eval()


def near(model, noise):
    """A draft that is often right: the model itself with noise on its weights."""
    draft = CausalLM(model.config).eval()
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    for parameter in draft.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return draft


class Bigrams(nn.Module):
    """A model whose next token depends on the last one only: its logits are a row of a table (V, V)."""

    def __init__(self, table):
        super().__init__()
        self.table, self.lm_head = table, nn.Linear(1, 1)
        self.config = ModelConfig(len(table), 32, 32, 1, 1, 1, max_position_embeddings=32)

    def forward(self, ids, attention_mask=None, positions=None, cache=None, head=None):
        cache.advance(ids.shape[1])
        return Output(head(self.table[ids], lambda logits: logits), None)


# --- exactness


@pytest.mark.parametrize("params", [
    dict(), dict(temperature=0.7, top_p=0.8), dict(temperature=1.5, top_k=3), dict(min_p=0.2, presence_penalty=0.7)])
def test_tokens_are_distributed_as_the_large_models(params):
    """Chi-square of the third token behind a prompt, after rounds that accept some guesses and refuse others."""
    V, runs = 6, 1500
    torch.manual_seed(1)
    table = torch.randn(V, V)
    model, draft = Bigrams(table), Bigrams(table + torch.randn(V, V))
    params = SamplingParams(3, stop_ids=NEVER, **params)

    def distribution(logits, tokens):
        counts = torch.bincount(torch.tensor(tokens, dtype=torch.long), minlength=V)
        return filter_logits(logits[None], params, None, counts[None])[0].softmax(-1)

    expected = torch.zeros(V, V, V)                             # of all continuations of three tokens
    for a, first in enumerate(distribution(model.table[2], [])):
        for b, second in enumerate(distribution(model.table[a], [a])):
            expected[a, b] = first * second * distribution(model.table[b], [a, b])
    seen, accepted, proposed = torch.zeros(V, V, V), 0, 0
    for seed in range(runs):
        rounds = Rounds(model, draft, [2], params, 3, seed, guesses=2)
        seen[tuple(token for token, _ in rounds)] += 1
        accepted, proposed = accepted + rounds.accepted, proposed + rounds.proposed
    assert 0.1 < accepted / proposed < 0.9
    assert seen[expected == 0].sum() == 0                       # nothing that the filters forbid
    likely = expected * runs >= 5                               # the rest is one cell
    cells = [(seen[likely], expected[likely] * runs)]
    cells.append((seen[~likely].sum()[None], expected[~likely].sum()[None] * runs))
    chi2 = sum((((o - e) ** 2) / e.clamp(min=1)).sum().item() for o, e in cells)
    freedom = int(likely.sum())
    assert freedom > 10 and chi2 < freedom + 4 * (2 * freedom) ** 0.5        # 4 standard deviations above its mean


@pytest.mark.parametrize("noise, guesses", [(0.0, 4), (0.05, 4), (0.05, 1), (1.0, 3)])
@pytest.mark.parametrize("params", [dict(), dict(repetition_penalty=1.4, frequency_penalty=0.5, logit_bias={500: 3.0})])
def test_at_temperature_0_the_answer_is_that_of_greedy_search(tokenizer, noise, guesses, params):
    model = tiny(tokenizer, 0)
    draft, params = near(model, noise), SamplingParams(30, 0.0, stop_ids=NEVER, **params)
    for prompt in ([400], [500, 600, 700, 401]):
        pieces = stream(model, draft, tokenizer, prompt, params, guesses)
        expected = generate(model, [prompt], params, tokenizer)[0][0]
        assert "".join(pieces) == expected.text
        assert (pieces.ids, pieces.completion.finish_reason) == (expected.ids, expected.finish_reason)
        torch.testing.assert_close(torch.tensor(pieces.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=1e-5)
        rounds = pieces.tokens
        if noise == 0:
            assert rounds.accepted == rounds.proposed == 30 * guesses // (guesses + 1)
        if noise == 1:
            assert rounds.accepted < rounds.proposed / 2


def test_stop_strings_stop_ids_and_seeds(tokenizer):
    model = tiny(tokenizer, 0)
    draft, params = near(model, 0.05), SamplingParams(20, 0.0)
    whole = generate(model, [[400]], SamplingParams(20, 0.0, stop_ids=NEVER), tokenizer)[0][0]
    for stops in (dict(stop_ids=(whole.ids[7],)), dict(stop_ids=NEVER, stop_strings=(whole.text[8:11],))):
        params = SamplingParams(20, 0.0, **stops)
        expected = generate(model, [[400]], params, tokenizer)[0][0]
        pieces = stream(model, draft, tokenizer, [400], params)
        assert "".join(pieces) == expected.text == pieces.completion.text
        assert pieces.ids == expected.ids and pieces.completion.finish_reason == "stop"

    def sampled(seed):
        pieces = stream(model, draft, tokenizer, [400], SamplingParams(20, 1.0, seed=seed, stop_ids=NEVER))
        list(pieces)
        return pieces.ids

    assert sampled(3) == sampled(3) != sampled(4)


def test_a_draft_with_fewer_positions_stops_guessing(tokenizer):
    model, draft = tiny(tokenizer, 0), tiny(tokenizer, 0, max_position_embeddings=16)
    params = SamplingParams(100, 0.0, stop_ids=NEVER)
    for prompt in ([400, 401], list(range(400, 430))):
        pieces = stream(model, draft, tokenizer, prompt, params)
        list(pieces)
        assert pieces.ids == generate(model, [prompt], params)[0][0].ids and len(pieces.ids) == 64 - len(prompt)
        assert pieces.tokens.proposed == (0 if len(prompt) > 16 else pieces.tokens.accepted) < 16


@pytest.mark.parametrize("damaged", ["model", "draft"])
def test_damaged_weights_are_an_error(tokenizer, damaged):
    model = tiny(tokenizer, 0)
    draft = near(model, 0.0)
    {"model": model, "draft": draft}[damaged].model.norm.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        list(stream(model, draft, tokenizer, [400], SamplingParams(20, 1.0, seed=0)))


# --- the draft's folder


def test_chat_with_a_draft(tokenizer, tmp_path, monkeypatch, capsys):
    model = tiny(tokenizer, 0)
    save_model(tmp_path / "model", model, tokenizer)
    save_model(tmp_path / "draft", near(model, 0.02), tokenizer)

    def shown(**options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        chat.main(chat.Config(model=str(tmp_path / "model"), temperature=0, max_new_tokens=20, dtype="float32",
                              **options))
        return capsys.readouterr().out

    text, speed = shown(draft=str(tmp_path / "draft")).rsplit("\n[", 1)
    assert shown().rsplit("\n[", 1)[0] == text
    right, proposed = map(int, re.search(r"tokens/s, \w+, (\d+) of (\d+) guesses right\]", speed).groups())
    assert 0 < right <= proposed


def test_a_draft_that_cannot_guess_is_refused(tokenizer, tmp_path):
    other = Tokenizer.load("base")
    save_model(tmp_path / "other", CausalLM(ModelConfig(other.vocab_size, 32, 64, 1, 1, 1)), other)
    with pytest.raises(UserError, match="has another tokenizer") as error:
        load_draft(tmp_path / "other", tiny(tokenizer, 0), tokenizer)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no model folder"):
        load_draft(tmp_path / "nowhere", tiny(tokenizer, 0), tokenizer)
