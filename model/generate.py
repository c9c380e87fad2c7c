"""Writing with a decoder: one token at a time, many rows at a time.

In lecture order:
  1. KVCache         keys and values of the tokens so far, so that each new token costs one position and not all of them
  2. filter_logits   which tokens may come next: penalties, temperature, top-k, top-p, min-p, in this order
  3. draw            one token per row from that distribution, and its log-probability
  4. Batch           prompts of different lengths being continued together
  5. StopScanner     text that is certain: whole characters, and never the beginning of a stop string
  6. generate        many prompts, several samples of each;   stream: one prompt, text as it comes

Sampling and scoring use one distribution: the recorded logprob of a token is that of the distribution which it was
drawn from, log softmax(filter_logits(logits)). For reinforcement learning (top_k=0, top_p=1, min_p=0, no penalty) that
is log softmax(logits / τ), which a trainer recomputes from the ids. At temperature 0 nothing is drawn; the logprob is
then taken at τ = 1.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from model.errors import UserError

# --- 1. the cache


class KVCache:
    """Keys and values of every layer, allocated once for at most `max_len` tokens per row.

    The decoder calls `update` in each layer and `advance` once per forward; `length` tokens are filled. What `update`
    returns is a view of the store, so a step copies one position and nothing else. Virtual tokens, if the decoder has
    some (model/adapters/soft_prompt.py), stand before the tokens of every row and are not counted by `length`.
    """

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, max_len, config.head_dim)
        self.store = torch.empty(shape, device=device, dtype=dtype)        # (layers, 2, B, K, S, d): keys, values
        self.length = self.virtual = 0

    def put_before(self, keys_values):
        """Let virtual tokens, keys_values (layers, 2, K, k, d), stand before every row of an empty cache."""
        layers, two, rows, heads, slots, width = self.store.shape
        slots, self.virtual = slots - self.virtual, keys_values.shape[3]
        self.store = self.store.new_empty(layers, two, rows, heads, self.virtual + slots, width)
        self.store[:, :, :, :, :self.virtual] = keys_values[:, :, None]

    def update(self, layer, k, v):
        """Append k and v (B, K, T, d) of one layer; returns all of its keys and values, (B, K, length + T, d) each."""
        start = self.virtual + self.length
        keys, values = self.store[layer, :, :, :, :start + k.shape[2]]     # (B, K, length + T, d), virtual ones besides
        keys[:, :, start:] = k
        values[:, :, start:] = v
        return keys, values

    def advance(self, count):
        """Every layer has appended `count` tokens."""
        self.length += count

    def expand(self, n):
        """A cache with every row n times in a row (B·n rows): n continuations of one prompt from one prefill."""
        copy = KVCache.__new__(KVCache)
        layers, two, rows, heads, slots, width = self.store.shape
        copy.store = self.store.new_empty(layers, two, rows * n, heads, slots, width)
        copy.length, copy.virtual = self.length, self.virtual
        filled = self.virtual + self.length
        copy.store[:, :, :, :, :filled] = self.store[:, :, :, :, :filled].repeat_interleave(n, dim=2)
        return copy

    def select(self, rows):
        """Keep only `rows` (ascending indices), in place: finished rows leave the batch."""
        filled = self.virtual + self.length
        kept = self.store[:, :, rows, :, :filled]
        self.store = self.store[:, :, :len(rows)]
        self.store[:, :, :, :, :filled] = kept


# --- 2. from logits to the distribution that is sampled


@dataclass
class SamplingParams:
    """How to continue a prompt. The defaults sample from the model's own distribution, which is what RL needs.

    `temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1, the other two
    penalties 0 and an empty `logit_bias` ({token id: what is added to its logit}) are off.
    `seed` None takes the seed from torch's global generator. Generation ends at a token of `stop_ids` (default: the
    tokenizer's, where one is given), before a string of `stop_strings`, or after `max_new_tokens`.
    """
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple = ()
    stop_strings: tuple = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict = field(default_factory=dict)

    def __post_init__(self):
        limits = [("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                  ("temperature", 0 <= self.temperature < float("inf"), "0 (likeliest token) or more"),
                  ("top_k", self.top_k >= 0, "0 (off) or more"),
                  ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
                  ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
                  ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
                  ("presence_penalty", abs(self.presence_penalty) < float("inf"), "a number (0 is off)"),
                  ("frequency_penalty", abs(self.frequency_penalty) < float("inf"), "a number (0 is off)"),
                  ("seed", self.seed is None or self.seed >= 0, "0 or more"),
                  ("stop_strings", all(self.stop_strings), "non-empty strings")]
        for name, ok, allowed in limits:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")


def penalize_repetition(logits, seen, penalty):
    """z_v ← z_v / θ if z_v > 0 else z_v · θ, for each token v that its row holds (CTRL, arXiv:1909.05858, §4.1).

    Both branches lower the logit when θ > 1 (the paper divides always, which would raise negative ones).
    logits (B, V); seen (B, V) bool, True = in the row's prompt or continuation. Returns (B, V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits, counts, presence, frequency):
    """z_v ← z_v - presence · [c_v > 0] - frequency · c_v, where token v was written c_v times (OpenAI's definition).

    logits (B, V); counts (B, V), of the continuation only: the prompt does not count. Returns (B, V).
    """
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits, k):
    """z_v ← -inf unless z_v >= the k-th largest of its row (Fan et al. 2018, arXiv:1805.04833). (B, V) → (B, V)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]        # (B, 1)
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits, p):
    """Keep the fewest likeliest tokens with Σ softmax(z)_v >= p: the nucleus (Holtzman 2019, arXiv:1904.09751, eq. 2).

    A token stays if the mass of those before it is below p, so the first always does. (B, V) → (B, V).
    """
    ordered, index = logits.sort(descending=True)                          # (B, V)
    probs = ordered.softmax(-1)
    drop = probs.cumsum(-1) - probs >= p                                   # (B, V)  mass of the likelier ones
    return logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))  # back in the order of the vocabulary


def keep_min_p(logits, p):
    """Keep tokens with softmax(z)_v >= p · max_u softmax(z)_u (Nguyen et al. 2024, arXiv:2407.01082). (B, V) → (B, V).

    The normaliser cancels: the rule is z_v >= max z + ln p.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + np.log(p), float("-inf"))


def filter_logits(logits, params, seen=None, counts=None):
    """The logits of the distribution sampled from: bias → penalties → ÷ τ → top-k → top-p → min-p.

    (B, V) → (B, V), >= fp32. seen (B, V) bool is read only with a repetition penalty, counts (B, V) only with a
    presence or frequency penalty. At temperature 0 only bias and penalties apply.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.logit_bias:
        ids = torch.tensor([*params.logit_bias], device=logits.device)
        logits = logits.index_add(1, ids, logits.new_tensor([*params.logit_bias.values()]).expand(len(logits), -1))
    if params.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        logits = penalize_counts(logits, counts, params.presence_penalty, params.frequency_penalty)
    if params.temperature == 0:
        return logits
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p:
        logits = keep_min_p(logits, params.min_p)
    return logits


# --- 3. drawing a token


def draw(logits, uniform=None):
    """One token per row: the first whose cumulative probability exceeds the row's uniform number; argmax without one.

    logits (B, V) already filtered; uniform (B,) in [0, 1). Returns tokens (B,) and log softmax(logits)[tokens] (B,).
    """
    probs = logits.softmax(-1)                                             # (B, V)
    if uniform is None:
        tokens = logits.argmax(-1)
    else:
        total = probs.cumsum(-1)                                           # (B, V)
        # Scaled by the actual sum, the mark stays strictly below it, so it falls on a token of non-zero probability.
        mark = uniform[:, None] * total[:, -1:]                            # (B, 1)
        tokens = torch.searchsorted(total, mark, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # V only for NaN
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()           # a drawn token's p is never rounded to 0


def uniform_draws(seed, prompts, num_samples, steps, device):
    """Uniform numbers (len(prompts)·num_samples, steps), each row from its own generator.

    A row depends on (seed, its prompt's index, its sample's index) and on nothing else: not on its neighbours in the
    batch, nor on when they finish.
    """
    rows = [row_draws(seed, i, j, steps) for i in prompts for j in range(num_samples)]
    return torch.from_numpy(np.stack(rows)).to(device)


def row_draws(seed, prompt, sample, steps):
    """The (steps,) uniform numbers of one row."""
    return np.random.default_rng((seed, prompt, sample)).random(steps, dtype=np.float32)


# --- 4. rows that are continued together


class Batch:
    """Left-padded prompts in a cache, and the logits (N, V) of each row's next token. N = len(prompts)·num_samples."""

    def __init__(self, model, prompts, params, num_samples, steps):
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        if torch.is_autocast_enabled(device.type):                         # what attention will compute in
            dtype = torch.get_autocast_dtype(device.type)
        self.model, self.params = model, params
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)            # what stands in the padding is never read
        mask = np.zeros((len(prompts), longest + steps), dtype=bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt):] = prompt
            mask[row, longest - len(prompt):] = True
        ids, mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        padded = min(lengths) < longest

        self.cache = KVCache(model.config, len(prompts), longest + steps, device, dtype)
        self.mask = mask if padded else None                               # (N, P + C), 1 = real token
        self.logits = self.next_logits(ids, None)                          # (B, V)
        self.positions = torch.tensor(lengths, device=device)              # (N,)  position of the next token
        self.seen = None                                                   # (N, V), 1 = the row holds this token
        if params.repetition_penalty != 1:
            self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
            row, column = mask[:, :longest].nonzero(as_tuple=True)
            self.seen[row, ids[row, column]] = True
        self.counts = None                                                 # (N, V), how often the row wrote this token
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros_like(self.logits, dtype=torch.float32)
        if num_samples > 1:
            self.cache = self.cache.expand(num_samples)
            self.each_row(lambda tensor: tensor.repeat_interleave(num_samples, dim=0))

    def each_row(self, change):
        self.logits, self.positions = change(self.logits), change(self.positions)
        self.mask = None if self.mask is None else change(self.mask)
        self.seen = None if self.seen is None else change(self.seen)
        self.counts = None if self.counts is None else change(self.counts)

    def next_logits(self, ids, positions):
        mask = None if self.mask is None else self.mask[:, :self.cache.length + ids.shape[1]]
        output = self.model(ids, attention_mask=mask, positions=positions, cache=self.cache,
                            head=lambda hidden, lm_head: lm_head(hidden[:, -1:]))
        return output.logits[:, -1]                                        # (N, V)

    def draw(self, uniform):
        """The next token of every row and its logprob, (N,) each; uniform (N,) is not read at temperature 0."""
        logits = filter_logits(self.logits, self.params, self.seen, self.counts)
        return draw(logits, uniform if self.params.temperature > 0 else None)

    def append(self, tokens):
        """Continue every row with its token (N,)."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts[torch.arange(len(tokens), device=tokens.device), tokens] += 1
        self.logits = self.next_logits(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1

    def select(self, rows):
        """Keep only `rows` (ascending indices)."""
        self.cache.select(rows)
        self.each_row(lambda tensor: tensor[rows])


# --- 5. text that is certain


class StopScanner:
    """Turns tokens into text up to the first stop string. `push` and `flush` return text that nothing can take back."""

    def __init__(self, tokenizer, stop_strings):
        self.decoder, self.stop_strings = tokenizer.stream_decoder(), stop_strings
        self.text, self.pending, self.stopped = "", "", False              # pending: may begin a stop string

    def push(self, token):
        """The text that became certain with this token."""
        return self.scan(self.decoder.push(token))

    def flush(self):
        """No more tokens: what was pending is text after all."""
        piece = "" if self.stopped else self.scan(self.decoder.flush()) + self.pending
        self.text, self.pending = self.text + self.pending, ""
        return piece

    def scan(self, piece):
        piece = self.pending + piece
        # The first stop string to be complete counts, however the text was cut into tokens: (its end, its beginning).
        found = [(piece.index(stop) + len(stop), piece.index(stop)) for stop in self.stop_strings if stop in piece]
        held = max((size for stop in self.stop_strings for size in range(1, len(stop))
                    if piece.endswith(stop[:size])), default=0)
        cut = min(found)[1] if found else len(piece) - held
        self.stopped, self.pending = bool(found), "" if found else piece[cut:]
        self.text += piece[:cut]
        return piece[:cut]


# --- 6. generate and stream


@dataclass
class Completion:
    """One continuation. `ids` includes the token that ended it (a loss mask runs through it), `text` does not.

    `logprobs` has one entry per id. `finish_reason` is "stop" (a stop id or stop string) or "length" (max_new_tokens,
    or no positions left in the model). `text` is "" where no tokenizer was given.
    """
    ids: list
    logprobs: list
    finish_reason: str
    text: str = ""


def generate(model, prompts, params, tokenizer=None, num_samples=1, batch_size=0, numbers=None, limits=None):
    """Continue every prompt `num_samples` times; returns a list, per prompt, of lists of Completion.

    prompts: lists of ids, of any lengths. batch_size: rows computed together (0 = all); it changes speed and memory,
    not the result. numbers: what stands for each prompt in its random draws, default its place in the list; where the
    prompts are shared between calls or ranks, numbers that do not depend on how give every prompt the same draws.
    limits: most new tokens of each prompt, where some are to get fewer than params.max_new_tokens.
    Prompt and completion together never exceed config.max_position_embeddings: a row that reaches it ends with
    "length". Raises UserError for an empty prompt, or one that leaves no room.
    """
    stop_ids, budgets, seed = check(model, prompts, params, tokenizer)
    if limits is not None:
        budgets = [min(pair) for pair in zip(budgets, limits, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))     # neighbours of like length: little padding
    size = max(1, batch_size // num_samples) if batch_size else max(1, len(prompts))
    completions = [[] for _ in prompts]
    for start in range(0, len(order), size):
        chunk = order[start:start + size]
        steps = max(budgets[i] for i in chunk)
        names = [numbers[i] for i in chunk] if numbers else chunk
        uniform = uniform_draws(seed, names, num_samples, steps, model.lm_head.weight.device)
        most = [budgets[i] for i in chunk for _ in range(num_samples)]
        with inference(model):
            batch = Batch(model, [prompts[i] for i in chunk], params, num_samples, steps)
            rows = run_batch(batch, uniform, most, stop_ids, tokenizer)
        for place, i in enumerate(chunk):
            completions[i] = rows[place * num_samples:(place + 1) * num_samples]
    return completions


def run_batch(batch, uniform, limits, stop_ids, tokenizer):
    """Draw until every row has ended. uniform (N, steps); limits: most new tokens per row. Returns N Completions."""
    strings, device = batch.params.stop_strings, uniform.device
    N, steps = uniform.shape
    ids = torch.zeros(N, steps, dtype=torch.long, device=device)
    logprobs = torch.zeros(N, steps, device=device, dtype=torch.promote_types(batch.logits.dtype, torch.float32))
    length = torch.tensor(limits, device=device)                           # (N,) shortened where a row stops
    stopped = torch.zeros(N, dtype=torch.bool, device=device)              # (N,) ended by a stop id or stop string
    stop_table = torch.tensor(stop_ids, dtype=torch.long, device=device)
    scanners = [StopScanner(tokenizer, strings) for _ in limits] if strings else None

    live = torch.arange(N, device=device)                                  # which of the N rows each line continues
    for step in range(steps):
        tokens, token_logprobs = batch.draw(uniform[live, step])           # (live,)
        ids[live, step], logprobs[live, step] = tokens, token_logprobs     # what falls behind a row's end is cut below

        going = length[live] > step                                        # False: ended, but still in the batch
        hit = torch.isin(tokens, stop_table)
        if scanners:
            for line, (row, token) in enumerate(zip(live.tolist(), tokens.tolist(), strict=True)):
                if going[line] and not hit[line]:
                    scanners[row].push(token)
                    hit[line] = scanners[row].stopped
        stopped[live] |= hit & going
        length[live] = torch.where(hit & going, step + 1, length[live])

        going = length[live] > step + 1
        left = int(going.sum())
        if left == 0:
            break
        if left <= 0.75 * len(live):                                       # copying the cache is worth it
            lines = going.nonzero()[:, 0]
            live, tokens = live[lines], tokens[lines]
            batch.select(lines)
        batch.append(tokens)

    if not logprobs[torch.arange(steps, device=device) < length[:, None]].isfinite().all():
        raise UserError(NOT_FINITE)
    completions = []
    for row, (n, stop) in enumerate(zip(length.tolist(), stopped.tolist(), strict=True)):
        completion = Completion(ids[row, :n].tolist(), logprobs[row, :n].tolist(), "stop" if stop else "length")
        if scanners:
            scanners[row].flush()
            completion.text = scanners[row].text
        elif tokenizer is not None:
            completion.text = tokenizer.decode(completion.ids[:-1] if stop else completion.ids)
        completions.append(completion)
    return completions


class Stream:
    """Iterator over the text of one completion, piece by piece, as it becomes certain.

    The pieces join to exactly `completion.text`; `completion` is None until the last of them. `ids` and `logprobs`
    grow with every token. The text is that of generate(model, [prompt_ids], params, tokenizer).
    """

    def __init__(self, tokenizer, params, stop_ids, tokens):
        self.scanner, self.stop_ids, self.tokens = StopScanner(tokenizer, params.stop_strings), stop_ids, tokens
        self.ids, self.logprobs, self.completion = [], [], None
        self.pieces = self.run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.pieces)

    def run(self):
        scanner, stopped = self.scanner, False
        for token, logprob in self.tokens:
            self.ids.append(token)
            self.logprobs.append(logprob)
            if not np.isfinite(logprob):
                raise UserError(NOT_FINITE)
            piece = "" if token in self.stop_ids else scanner.push(token)
            if piece:
                yield piece
            stopped = token in self.stop_ids or scanner.stopped
            if stopped:
                break
        piece = scanner.flush()
        self.completion = Completion(self.ids, self.logprobs, "stop" if stopped else "length", scanner.text)
        if piece:
            yield piece


def stream(model, tokenizer, prompt_ids, params):
    """Continue one prompt, a list of ids; returns a `Stream` of text. Raises UserError as `generate` does."""
    stop_ids, (steps,), seed = check(model, [prompt_ids], params, tokenizer)
    return Stream(tokenizer, params, stop_ids, token_by_token(model, prompt_ids, params, steps, seed))


def token_by_token(model, prompt_ids, params, steps, seed):
    """The next `steps` tokens and their logprobs, one pair after the other."""
    uniform = uniform_draws(seed, [0], 1, steps, model.lm_head.weight.device)
    batch = tokens = None
    for step in range(steps):
        with inference(model):                                             # closed again before each yield
            if batch is None:
                batch = Batch(model, [prompt_ids], params, 1, steps)
            else:
                batch.append(tokens)
            tokens, logprobs = batch.draw(uniform[:, step])
        yield tokens.item(), logprobs.item()


NOT_FINITE = ("the model's logits are not finite: its weights are damaged (a training run that diverged), or float16 "
              "overflowed; look at the checkpoint, or use --dtype float32")


def check(model, prompts, params, tokenizer):
    """(stop ids, new tokens that fit after each prompt, seed), or UserError for what cannot be continued."""
    if params.stop_strings and tokenizer is None:
        raise UserError("stop_strings needs a tokenizer: text is what they are looked for in")
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: begin with at least one token (bos, for free text)")
        if len(prompt) >= limit:
            raise UserError(f"prompt {i} has {len(prompt)} tokens and the model {limit} positions "
                            "(max_position_embeddings): nothing can follow; shorten the prompt, or give the script "
                            "that reads it a longer context (--rope_scaling yarn:F, F times as long as trained)")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(f"prompt {i} holds an id outside 0..{vocab - 1}: is this the model's own tokenizer?")
    if not all(0 <= token < vocab for token in params.logit_bias):
        raise UserError(f"logit_bias holds an id outside 0..{vocab - 1}")
    stop_ids = params.stop_ids or (tokenizer.stop_ids if tokenizer is not None else ())
    seed = params.seed
    if seed is None:                                                       # greedy search leaves the generator alone
        seed = int(torch.randint(2**62, ())) if params.temperature > 0 else 0
    return tuple(stop_ids), [min(params.max_new_tokens, limit - len(prompt)) for prompt in prompts], seed


@contextmanager
def inference(model):
    """No gradients and no dropout inside; the model's train/eval state comes back afterwards."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
