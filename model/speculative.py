"""Speculative decoding: a small model guesses some tokens, the large one checks them all in one forward pass.

    draft = load_draft("out/nano", model, tokenizer)
    for text in stream(model, draft, tokenizer, prompt_ids, SamplingParams(temperature=0.7)): …

Reading five tokens takes a model little longer than reading one, as long as the time goes into fetching its weights
from memory. So where the guesses are often right, several tokens come out of one pass. The result is exact (Leviathan
et al. 2023, arXiv:2211.17192, appendix A.1): with p the large model's distribution of the next token and q the draft's,

    draw x ~ q, keep it with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0))

is a draw from p. A token x is drawn from q and kept with probability min(p(x), q(x)); what that lacks to p(x) is
max(p(x) - q(x), 0), and the second draw adds just that. Both distributions are taken after filter_logits. At
temperature 0 each is certain of one token: a guess is kept where the large model would have taken it, and the answer is
that of greedy search. Above, a seed gives other tokens than in generate(), which uses its random numbers otherwise.
"""

import numpy as np
import torch

from model.checkpoint import load_model
from model.errors import UserError
from model.generate import NOT_FINITE, KVCache, Stream, check, draw, filter_logits, inference


def load_draft(folder, model, tokenizer):
    """The checkpoint in `folder` as a draft for model, on its device and in its dtype; UserError where it cannot be."""
    weight = model.lm_head.weight
    draft, own = load_model(folder, weight.device, weight.dtype)
    if own.fingerprint != tokenizer.fingerprint or draft.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{folder} cannot guess for this model: it has another tokenizer ({draft.config.vocab_size} "
                        f"tokens, the model {model.config.vocab_size}); name a smaller model with the same one")
    return draft


def stream(model, draft, tokenizer, prompt_ids, params, guesses=4):
    """As model.generate.stream, in rounds of at most `guesses` tokens of the draft. `.tokens` of the `Stream` that is
    returned is a `Rounds`, which counts how many were right."""
    stop_ids, (steps,), seed = check(model, [prompt_ids], params, tokenizer)
    return Stream(tokenizer, params, stop_ids, Rounds(model, draft, prompt_ids, params, steps, seed, guesses))


class Reader:
    """A model with the cache of one text."""

    def __init__(self, model, slots):
        weight, limit = model.lm_head.weight, model.config.max_position_embeddings
        self.model, self.limit = model, limit
        self.cache = KVCache(model.config, 1, min(slots, limit), weight.device, weight.dtype)

    def read(self, ids, count):
        """The logits behind the last `count` tokens of a text of which the cache has the beginning: (count, V) float64
        on the CPU, where all that follows is decided."""
        new = torch.tensor([ids[self.cache.length:]], device=self.cache.store.device)
        output = self.model(new, cache=self.cache, head=lambda hidden, lm_head: lm_head(hidden[:, -count:]))
        return output.logits[0].cpu().double()

    def forget(self, length):
        """Keep at most the first `length` tokens. What lies behind them is overwritten."""
        self.cache.length = min(self.cache.length, length)


class Rounds:
    """Iterator over `steps` pairs of a token and its logprob. `proposed` guesses so far, of them `accepted`."""

    def __init__(self, model, draft, prompt_ids, params, steps, seed, guesses):
        self.target, self.draft = (Reader(network, len(prompt_ids) + steps) for network in (model, draft))
        self.prompt_ids, self.params, self.steps, self.guesses = list(prompt_ids), params, steps, guesses
        self.random, self.proposed, self.accepted = np.random.default_rng(seed), 0, 0

    def __iter__(self):
        tokens = []
        while len(tokens) < self.steps:
            with inference(self.target.model), inference(self.draft.model):
                new = self.round(tokens)
            tokens += [token for token, _ in new]
            yield from new

    def round(self, tokens):
        """[(token, logprob)] of the tokens behind prompt and `tokens`: the guesses that were right, and one more."""
        text, guesses, q, new = self.prompt_ids + tokens, [], [], []
        for _ in range(min(self.guesses, self.steps - len(tokens) - 1, self.draft.limit - len(text))):
            q.append(self.distribution(self.draft.read(text + guesses, 1)[-1], tokens + guesses)[0])
            guesses.append(self.draw(q[-1]))
        logits = self.target.read(text + guesses, len(guesses) + 1)
        for i in range(len(guesses) + 1):
            p, logprobs = self.distribution(logits[i], tokens + guesses[:i])
            right = i < len(guesses) and self.random.random() * q[i][guesses[i]] < p[guesses[i]]
            x = guesses[i] if right else self.draw(p if i == len(guesses) else (p - q[i]).clamp(min=0))
            new.append((x, logprobs[x].item()))
            if not right:
                break
        self.proposed, self.accepted = self.proposed + len(guesses), self.accepted + len(new) - 1
        for reader in (self.target, self.draft):
            reader.forget(len(text) + len(new) - 1)                        # the last new token was not read yet
        return new

    def distribution(self, logits, tokens):
        """What the token behind prompt and `tokens` is drawn from, (V,), and the logprobs (V,) that are reported."""
        seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, torch.tensor(self.prompt_ids + tokens), True)
        counts = torch.bincount(torch.tensor(tokens, dtype=torch.long), minlength=len(logits))
        z = filter_logits(logits[None], self.params, seen[None], counts[None])[0]
        if self.params.temperature > 0:
            return z.softmax(-1), z.log_softmax(-1)
        return torch.zeros_like(z).index_fill(0, z.argmax(), 1), z.log_softmax(-1)     # certain of one token

    def draw(self, weights):
        """A token, with probabilities in proportion to weights (V,)."""
        token, logprob = draw(weights.log()[None], weights.new_tensor([self.random.random()]))
        if not logprob.isfinite():
            raise UserError(NOT_FINITE)
        return token.item()
