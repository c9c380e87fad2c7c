"""Answering many requests at once with one model: continuous batching, on a thread of its own.

    engine = Engine(model, tokenizer)
    ticket = engine.submit(Request(prompt_ids, SamplingParams(max_new_tokens=100, temperature=0.7, seed=1)))
    for piece in ticket: print(piece.text, end="")        or   async for piece in ticket: …
    ticket.result().finish_reason

Computing the next token of 64 answers costs little more than that of one: the weights are read once for all. So all
running requests advance together, one token in each step, and between two steps requests leave (finished, cancelled)
and others join (Orca, Yu et al. 2022, section 3). One turn of the thread:

  admit     waiting requests for which there is a row and memory, users in turns
  prefill   read new prompts, a bounded number of tokens in each turn, so that running answers do not wait for long;
            what an earlier prompt or answer began with, too, is not computed again (PrefixCache)
  step      draw the next token of every row, hand it out, let finished rows leave, and compute the next logits (Rows)

An answer does not depend on its neighbours: it is the one that model.generate.generate() gives for the same prompt,
params and seed. (Products of matrices of another size round differently in the last bits. In 16-bit formats near ties
are frequent enough for a token to differ now and then; in float32 they are not.)
"""

import asyncio
import queue
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from model.adapters.adapted import check_name, switch
from model.errors import UserError
from model.fused import FusedLM, can_fuse
from model.generate import (
    NOT_FINITE,
    KVCache,
    SamplingParams,
    StopScanner,
    check,
    draw,
    filter_logits,
    row_draws,
)
from model.quantize import packed_weights

PREFILL_TOKENS = 512        # of new prompts that are read in one turn, padding included
BLOCK = 16                  # tokens of a block of the prefix cache
KV_BYTES = 2**31            # what keys and values may take where nobody says: 2 GiB


# --- requests and what comes back


@dataclass
class Request:
    prompt_ids: list                                   # token ids
    params: SamplingParams = field(default_factory=SamplingParams)
    top_logprobs: int = -1                             # -1 none, 0 of each chosen token, k also of the k likeliest
    adapter: str = ""                                  # one of the model's adapters, "" = none
    constraint: object = None                          # .allowed(generated_ids) -> (V,) bool, what may come next
    user: str = ""                                     # whose turn it takes while waiting
    sample: int = 0                                    # which of generate()'s num_samples this one is


class Piece(NamedTuple):
    """What became certain since the last piece. Its tokens may say less than its text or more: an incomplete character
    and what may begin a stop string are held back. The last piece may have no text; its last token may be a stop id."""
    text: str
    token_ids: list
    logprobs: list             # of token_ids, [] unless asked for
    top: list                  # per token, the k likeliest as [(id, logprob), …], likeliest first


class Answer(NamedTuple):
    """A finished request. `token_ids` includes the token that ended it, `text` does not.

    `logprobs` and `top` (empty unless asked for) are of the model's own distribution, log softmax(logits), before
    bias, penalties, temperature, filters and constraint: they say what the model thinks, not how it was sampled.
    """
    text: str
    token_ids: list
    logprobs: list
    top: list
    finish_reason: str         # "stop", "length" or "cancelled"
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int         # of the prompt, found in the prefix cache


class QueueFull(Exception):
    """The engine takes no request now: too many are waiting, or it is closing. The same request may pass later."""


class Ticket:
    """A request on its way. Iterate over it (`for` in a thread or `async for` in an event loop, one of them) for
    `Piece`s as they come; both raise what went wrong in the engine. `result` waits for all of it."""

    def __init__(self, request, news):
        self.request, self.answer, self.error, self.cancelled = request, None, None, False
        self.pieces = queue.SimpleQueue()              # of Piece, None behind the last one
        self.ended = threading.Event()
        self.loop, self.arrived, self.news = None, None, news      # who is to be told, and the engine's list of such

    def cancel(self):
        """Stop; the request's row and memory are free at the next step. Does nothing to a finished one."""
        self.cancelled = True

    def result(self, timeout=None):
        """The Answer; raises what went wrong, or TimeoutError after `timeout` seconds."""
        if not self.ended.wait(timeout):
            raise TimeoutError("the answer is not finished yet")
        if self.error is not None:
            raise self.error
        return self.answer

    def __iter__(self):
        while (piece := self.pieces.get()) is not None:
            yield piece
        self.result()

    async def __aiter__(self):
        self.arrived, self.loop = asyncio.Event(), asyncio.get_running_loop()
        over = False
        while not over:
            self.arrived.clear()
            pieces = []
            while not self.pieces.empty():
                pieces.append(self.pieces.get())
            if over := bool(pieces) and pieces[-1] is None:
                pieces.pop()
            if pieces:                                 # in one, so that who lags behind has less to do, not more
                texts, *lists = zip(*pieces, strict=True)
                yield Piece("".join(texts), *(sum(each, []) for each in lists))
            if not over:
                await self.arrived.wait()
        self.result()

    # what follows is called by the engine's thread

    def put(self, piece):
        self.pieces.put(piece)
        if self.loop is not None:
            self.news.append(self)

    def end(self, answer, error=None):
        if not self.ended.is_set():                    # an answer that was given stays, whatever fails behind it
            self.answer, self.error = answer, error
            self.ended.set()
            self.put(None)


class FairQueue:
    """Requests that wait: first come, first served within a user, and users take turns."""

    def __init__(self):
        self.users = {}                                # user: deque, in the order of their turns

    def __len__(self):
        return sum(map(len, self.users.values()))

    def push(self, sequence):
        self.users.setdefault(sequence.request.user, deque()).append(sequence)

    def first(self):
        return next(iter(self.users.values()))[0]

    def pop(self):
        user = next(iter(self.users))
        line = self.users.pop(user)
        sequence = line.popleft()
        if line:
            self.users[user] = line                    # behind all others
        return sequence

    def take_all(self, wanted):
        """Remove and return the waiting ones of which wanted(sequence) is true."""
        taken = [sequence for line in self.users.values() for sequence in line if wanted(sequence)]
        kept = {user: deque(s for s in line if s not in taken) for user, line in self.users.items()}
        self.users = {user: line for user, line in kept.items() if line}
        return taken


class Sequence:
    """A request that the engine works on: its tokens, what it may still write, and what was not handed out yet."""

    def __init__(self, request, model, tokenizer, news):
        params = request.params
        stop_ids, (self.budget,), seed = check(model, [request.prompt_ids], params, tokenizer)
        self.request, self.params, self.adapter = request, params, request.adapter
        self.ticket, self.stop_ids = Ticket(request, news), frozenset(stop_ids)
        self.ids, self.prompt_length = list(request.prompt_ids), len(request.prompt_ids)
        self.need = self.prompt_length + self.budget           # slots of memory, at most
        self.done, self.cached, self.kv = 0, 0, None           # tokens read, of them found; (layers, 2, K, done, d)
        self.uniform = row_draws(seed, 0, request.sample, self.budget) if params.temperature > 0 else None
        self.scanner, self.logprobs, self.top = StopScanner(tokenizer, params.stop_strings), [], []
        self.handed_out = 0                                    # generated tokens that are in a piece
        self.seen = self.counts = None
        vocab = model.config.vocab_size
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab, dtype=torch.bool)
            self.seen[self.ids] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab)
        # rows whose distribution is made in the same way are filtered together
        filters = (params.top_k, params.top_p, params.min_p) if params.temperature > 0 else ()
        self.kind = (params.temperature, filters, params.repetition_penalty, params.presence_penalty,
                     params.frequency_penalty, tuple(params.logit_bias.items()))

    @property
    def generated(self):
        return self.ids[self.prompt_length:]

    def append(self, token):
        """Write a token and hand out what is certain now; False where the answer ends with it."""
        self.ids.append(token)
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        text = "" if token in self.stop_ids else self.scanner.push(token)
        reason = ("stop" if token in self.stop_ids or self.scanner.stopped else
                  "length" if len(self.ids) == self.need else "")
        if reason:
            self.end(reason, text)
        elif text:
            self.hand_out(text)
        return not reason

    def hand_out(self, text):
        begin, self.handed_out = self.handed_out, len(self.ids) - self.prompt_length
        self.ticket.put(Piece(text, self.ids[self.prompt_length + begin:], self.logprobs[begin:], self.top[begin:]))

    def end(self, reason, text=""):
        text += self.scanner.flush()
        if text or self.handed_out < len(self.ids) - self.prompt_length:
            self.hand_out(text)
        tokens = self.generated
        self.ticket.end(Answer(self.scanner.text, tokens, self.logprobs, self.top, reason, self.prompt_length,
                               len(tokens), self.cached))


# --- what need not be computed twice


class PrefixCache:
    """Keys and values of the beginnings of earlier texts, in blocks of BLOCK tokens; the least recently used go first.

    A block's values depend on all tokens before it. It is found by (the number of the block before it, its own
    tokens), so texts that begin alike share their blocks: a tree, as in vLLM (Kwon et al. 2023, section 4.4).
    """

    def __init__(self, max_tokens):
        self.most, self.count = max_tokens // BLOCK, 0
        self.blocks = OrderedDict()                    # (number of the parent or adapter, tokens): (number, kv)

    @property
    def tokens(self):
        return BLOCK * len(self.blocks)

    def find(self, adapter, ids):
        """([kv (layers, 2, K, BLOCK, d) of each block that is here], the key of the first that is not or None).

        The last token is never among them: its logits are needed, so it has to be read.
        """
        parent, path, found = adapter, [], []
        for start in range(0, len(ids) - BLOCK, BLOCK) if self.most else ():
            key = (parent, tuple(ids[start:start + BLOCK]))
            if key not in self.blocks:
                self.touch(path)
                return found, key
            parent, kv = self.blocks[key]
            path.append(key)
            found.append(kv)
        self.touch(path)
        return found, None

    def put(self, adapter, ids, kv):
        """Keep the whole blocks of ids, whose keys and values are kv (layers, 2, K, len(ids), d)."""
        parent, path = adapter, []
        for start in range(0, kv.shape[3] - BLOCK + 1, BLOCK) if self.most else ():
            key = (parent, tuple(ids[start:start + BLOCK]))
            if key not in self.blocks:
                self.count += 1
                self.blocks[key] = self.count, kv[:, :, :, start:start + BLOCK].clone()    # a view would keep it all
            parent = self.blocks[key][0]
            path.append(key)
        self.touch(path)
        while len(self.blocks) > self.most:
            self.blocks.popitem(last=False)

    def touch(self, path):
        """Parents last: a block is always older than the one before it, without which nobody would find it."""
        for key in reversed(path):
            self.blocks.move_to_end(key)


# --- the running requests


class Rows:
    """Running requests of one adapter, a row each, and their keys and values. To the model it is a KVCache.

    All rows end at the same slot, however long they are, so that a step writes one column and reads one rectangle:

        slot    0 1 2 3 4 5 6 7 8 9      start = 2, end = 8: a step reads slots 2 … 8 and writes slot 8;
        row 0   . . a a a a a a . .      what stands left of a row's beginning is masked
        row 1   . . . . . b b b . .

    A row that joins is laid down so that it ends there, too; one that leaves gives its place to the last row. Which
    slot a token has does not matter to the model: its position is in its key already. Masked slots hold zeros, since
    attention multiplies them by 0 and what happens to be in fresh memory may be NaN.
    """

    def __init__(self, model):
        config, weight = model.config, model.lm_head.weight
        self.shape = (config.num_key_value_heads, config.head_dim)
        self.device, self.dtype = weight.device, weight.dtype
        self.layers = [torch.empty(0)] * config.num_hidden_layers      # (2, rows, K, slots, d) each: keys, values
        self.rows = self.slots = self.start = self.end = 0
        self.sequences, self.starts, self.logits = [], [], None        # logits (n, V) of the next tokens
        self.before = None                                             # virtual tokens (layers, 2, K, k, d), if any

    # what the model asks of a cache

    @property
    def length(self):
        return self.end - self.start

    @property
    def virtual(self):
        return 0 if self.before is None else self.before.shape[3]

    def update(self, layer, k, v):
        """Append k and v (n, K, 1, d) of one layer; returns all its keys and values in use, (n, K, length + 1, d)."""
        keys, values = self.layers[layer][:, :len(k), :, self.start:self.end + 1]
        keys[:, :, -1:] = k
        values[:, :, -1:] = v
        if self.before is not None:
            more_keys, more_values = self.before[layer][:, None].expand(-1, len(k), -1, -1, -1)
            keys, values = torch.cat((more_keys, keys), dim=2), torch.cat((more_values, values), dim=2)
        return keys, values

    def advance(self, count):
        self.end += count

    # who is in it

    def arrange(self, rows, slots, end=0):
        """Make room for rows x slots, with the rows there are ending at slot `end` (0: as far left as they can)."""
        n, width = len(self.sequences), self.length
        end = max(end, width)
        for layer, old in enumerate(self.layers):                      # one by one, so that little exists twice
            new = torch.zeros(2, rows, self.shape[0], slots, self.shape[1], device=self.device, dtype=self.dtype)
            if n:
                new[:, :n, :, end - width:end] = old[:, :n, :, self.start:self.end]
            self.layers[layer] = new
        self.starts = [start + end - self.end for start in self.starts]
        self.rows, self.slots, self.start, self.end = rows, slots, end - width, end

    def join(self, sequence, logits):
        """A row more, of a sequence whose prompt was read; logits (V,) are those of its first new token."""
        size = sequence.kv.shape[3]
        if size > self.end:
            self.arrange(self.rows, self.slots, size)
        for layer, kv in zip(self.layers, sequence.kv, strict=True):
            layer[:, len(self.sequences), :, :self.end - size] = 0
            layer[:, len(self.sequences), :, self.end - size:self.end] = kv
        sequence.kv = None
        self.sequences.append(sequence)
        self.starts.append(self.end - size)
        self.start = min(self.starts)
        self.logits = logits[None] if self.logits is None else torch.cat((self.logits, logits[None]))

    def kv(self, place):
        """Keys and values of the row at `place`, (layers, 2, K, its length, d)."""
        return torch.stack([layer[:, place, :, self.starts[place]:self.end] for layer in self.layers])

    def leave(self, places):
        """Take the rows at `places` out. Without rows it holds no memory."""
        for place in sorted(places, reverse=True):
            last = len(self.sequences) - 1
            if place < last:
                for layer in self.layers:
                    layer[:, place, :, :self.end] = layer[:, last, :, :self.end]
                self.logits[place] = self.logits[last]
                self.sequences[place], self.starts[place] = self.sequences[last], self.starts[last]
            self.sequences.pop()
            self.starts.pop()
        if not self.sequences:
            self.layers = [torch.empty(0)] * len(self.layers)
            self.rows = self.slots = self.start = self.end = 0
            self.logits = self.before = None
        elif places:
            self.logits, self.start = self.logits[:len(self.sequences)], min(self.starts)

    # one step

    def choose(self):
        """The next token of every row, n ids, and {place: error} of rows that cannot go on. Logprobs that were asked
        for go to their sequences."""
        failed = {}
        finite = self.logits.amax(-1).isfinite().tolist()              # NaN is its row's largest number
        for place, ok in enumerate(finite):
            if not ok:
                failed[place] = UserError(NOT_FINITE)
        logits = self.constrained(failed)
        tokens = torch.zeros(len(self.sequences), dtype=torch.long, device=self.device)
        kinds = {}
        for place, sequence in enumerate(self.sequences):
            kinds.setdefault(sequence.kind, []).append(place)
        for places in kinds.values():
            some = [self.sequences[place] for place in places]
            lines = slice(None) if len(kinds) == 1 else places
            seen, counts = (None if getattr(some[0], name) is None else
                            torch.stack([getattr(s, name) for s in some]).to(self.device)
                            for name in ("seen", "counts"))
            params = some[0].params
            z = filter_logits(logits[lines], params, seen, counts)
            if params.temperature == 0:
                tokens[lines] = z.argmax(-1)
            else:
                uniform = torch.tensor([s.uniform[len(s.ids) - s.prompt_length] for s in some], device=self.device)
                tokens[lines] = draw(z, uniform)[0]
        self.record_logprobs(tokens)
        return tokens.tolist(), failed

    def constrained(self, failed):
        """The logits with -inf for what constraints forbid."""
        places = [place for place, s in enumerate(self.sequences) if s.request.constraint is not None]
        logits = self.logits.clone() if places else self.logits        # logprobs are of the unconstrained ones
        for place in places:
            sequence = self.sequences[place]
            try:
                allowed = sequence.request.constraint.allowed(sequence.generated).to(self.device)
                if not allowed.any():
                    raise UserError("the constraint allows no token: nothing can follow what was written")
                logits[place].masked_fill_(~allowed, -torch.inf)
            except Exception as error:                                 # foreign code: its request ends, others do not
                failed[place] = error
        return logits

    def record_logprobs(self, tokens):
        places = [place for place, s in enumerate(self.sequences) if s.request.top_logprobs >= 0]
        if not places:
            return
        logprobs = self.logits[places].float().log_softmax(-1)         # (m, V)
        chosen = logprobs.gather(1, tokens[places][:, None])[:, 0].tolist()
        most = min(max(self.sequences[place].request.top_logprobs for place in places), logprobs.shape[1])
        values, ids = logprobs.topk(most)                              # (m, most), likeliest first
        for place, logprob, *top in zip(places, chosen, ids.tolist(), values.tolist(), strict=True):
            sequence = self.sequences[place]
            sequence.logprobs.append(logprob)
            sequence.top.append(list(zip(*top, strict=True))[:sequence.request.top_logprobs])

    def forward(self, network):
        """Read the last token of every row: the logits of the next ones."""
        if self.end == self.slots:                                     # then the longest row began at a later slot
            self.arrange(self.rows, self.slots)
        ids, positions = torch.tensor([[s.ids[-1] for s in self.sequences], [len(s.ids) - 1 for s in self.sequences]],
                                      device=self.device)              # (n,) each
        mask = None
        if max(self.starts) > self.start:
            slots = torch.arange(self.start, self.end + 1, device=self.device)
            mask = slots >= torch.tensor(self.starts, device=self.device)[:, None]         # (n, S)
        self.logits = network(ids[:, None], attention_mask=mask, positions=positions[:, None], cache=self,
                              head=last_logits).logits[:, -1]


def last_logits(hidden, lm_head):
    return lm_head(hidden[:, -1:])


# --- the engine


class Engine:
    """One thread that owns `model` and advances all requests together.

    max_batch     rows of a step: so many answers are written at once, over all adapters
    max_tokens    bound on the tokens (prompts and answers, each at its longest) whose keys and values running requests
                  hold, rows x longest row, summed over adapters; 0 = what 2 GiB hold, at least one longest request.
                  Prompts that are being read and the prefix cache come on top
    prefix_cache  most tokens of earlier texts to keep; -1 = a quarter of max_tokens, 0 = none
    max_queue     requests that may wait

    Requests of different adapters share no step, since a step computes with one of them; they take turns. Nobody else
    may use the model while the engine lives, but through `call`.
    """

    def __init__(self, model, tokenizer, max_batch=32, max_tokens=0, prefix_cache=-1, max_queue=256):
        if max_batch < 1 or max_queue < 1 or max_tokens < 0:
            raise UserError(f"an engine with max_batch {max_batch}, max_queue {max_queue} and max_tokens {max_tokens} "
                            "could run nothing: the first two must be 1 or more, the last 0 (chosen) or more")
        config, weight = model.config, model.lm_head.weight
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
        longest = config.max_position_embeddings
        self.max_tokens = max_tokens or max(min(max_batch * longest, KV_BYTES // per_token), longest)
        self.model, self.tokenizer, self.max_batch, self.max_queue = model.eval(), tokenizer, max_batch, max_queue
        self.prefixes = PrefixCache(self.max_tokens // 4 if prefix_cache < 0 else prefix_cache)
        self.waiting, self.joining, self.rows, self.calls = FairQueue(), deque(), {}, deque()
        self.active = []                               # sequences that hold memory: those in joining and in rows
        self.news = []                                 # tickets with something new, whose event loops do not know yet
        self.closing = self.abandoned = False
        self.counts = dict.fromkeys(("requests", "stop", "length", "cancelled", "failed", "prompt_tokens",
                                     "cached_tokens", "prefix_hits", "generated_tokens", "steps", "kv_peak"), 0)
        # On a CPU in bfloat16 a copy with packed weights is about twice as fast (model/fused.py); elsewhere, and for
        # weights that were packed to save memory, the model itself computes.
        self.fused, self.adapter = None, ""
        switch(model, None)
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_fuse(model) and (
                not packed_weights(model)):
            self.fused = FusedLM(model, weight.dtype)
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(drain=error is None)

    # called by anyone

    def submit(self, request):
        """A Ticket. UserError for a request that could never run, QueueFull where it cannot be taken now."""
        if request.adapter:
            check_name(self.model, request.adapter)
        sequence = Sequence(request, self.model, self.tokenizer, self.news)
        if sequence.need > self.max_tokens:
            raise UserError(f"the request needs memory for {sequence.need} tokens ({sequence.prompt_length} of the "
                            f"prompt, at most {sequence.budget} new ones) and there is some for {self.max_tokens} in "
                            "all: shorten the prompt or ask for fewer tokens")
        with self.changed:
            if self.closing:
                raise QueueFull("the engine is closing and takes no new requests")
            if len(self.waiting) >= self.max_queue:
                raise QueueFull(f"{len(self.waiting)} requests are waiting already: try again later")
            self.counts["requests"] += 1
            self.waiting.push(sequence)
            self.changed.notify()
        return sequence.ticket

    def call(self, function, adapter=""):
        """function(model), on the engine's thread between two steps, with `adapter` in use and without gradients."""
        if adapter:
            check_name(self.model, adapter)
        box, ended = {}, threading.Event()

        def run():
            try:
                self.use(adapter)
                box["result"] = function(self.model)
            except BaseException as error:                             # of the caller, who gets it
                box["error"] = error
            ended.set()

        with self.changed:
            if self.closing:
                raise QueueFull("the engine is closing and takes no new requests")
            self.calls.append(run)
            self.changed.notify()
        ended.wait()
        if "error" in box:
            raise box["error"]
        return box["result"]

    def stats(self):
        """Figures of this moment and sums since the start, a dict of numbers."""
        rows = list(self.rows.values())
        with self.changed:
            waiting = len(self.waiting)
        return {"running": sum(len(r.sequences) for r in rows), "joining": len(self.joining),
                "waiting": waiting, "kv_tokens": sum(r.rows * r.slots for r in rows),
                "kv_capacity": self.max_tokens, "prefix_tokens": self.prefixes.tokens, **self.counts}

    def close(self, drain=True, timeout=None):
        """Take no more requests, finish (drain) or cancel those there are, and end the thread.

        timeout: after so many seconds what is still unfinished is cancelled, too.
        """
        with self.changed:
            self.closing, self.abandoned = True, self.abandoned or not drain
            self.changed.notify()
        self.thread.join(timeout)
        self.abandoned = True
        self.thread.join()

    # the thread

    def run(self):
        with torch.inference_mode():
            while True:
                with self.changed:
                    while not (self.waiting.users or self.joining or self.rows or self.calls or self.closing):
                        self.changed.wait()
                if not (self.waiting.users or self.joining or self.rows or self.calls):
                    return
                try:
                    self.turn()
                except Exception as error:                             # every request ends with it; new ones may pass
                    self.fail(error)
                self.tell()

    def turn(self):
        while self.calls:
            self.calls.popleft()()
        self.drop_cancelled()
        self.admit()
        if self.joining:
            self.prefill()
        for adapter, rows in list(self.rows.items()):
            self.step(adapter, rows)

    def fail(self, error):
        """End every request with an error, and begin anew."""
        with self.changed:
            sequences = self.active + self.waiting.take_all(lambda sequence: True)
        self.active, self.joining, self.rows = [], deque(), {}
        for sequence in sequences:
            self.end(sequence, error=error)

    def end(self, sequence, reason="", error=None):
        """A request is over: with an error, with a reason, or (neither) its answer ended by itself."""
        if sequence in self.active:
            self.active.remove(sequence)
        if error is not None:
            sequence.ticket.end(None, error)
        elif reason:
            sequence.end(reason)
        self.counts["failed" if error is not None else sequence.ticket.answer.finish_reason] += 1

    def tell(self):
        """Wake the event loops in which somebody waits for news, each once: it costs more than a token does."""
        tickets, loops = self.news.copy(), {}
        self.news.clear()
        for ticket in tickets:
            loops.setdefault(ticket.loop, []).append(ticket)
        for loop, some in loops.items():
            try:
                loop.call_soon_threadsafe(lambda some=some: [ticket.arrived.set() for ticket in some])
            except RuntimeError:                                       # it was closed: nobody listens any more
                for ticket in some:
                    ticket.cancel()

    def demand(self, more=()):
        """{adapter: (rows, slots)} that all admitted sequences need at most, and `more` with them."""
        found = {}
        for sequence in (*self.active, *more):
            count, longest = found.get(sequence.adapter, (0, 0))
            found[sequence.adapter] = (count + 1, max(longest, sequence.need))
        return found

    def admit(self):
        """Let waiting requests in, in their order: one that has to wait for memory holds up those behind it, or it
        might wait forever."""
        while len(self.active) < self.max_batch:
            with self.changed:
                if not self.waiting.users:
                    return
                demand = self.demand([self.waiting.first()])
                if sum(rows * slots for rows, slots in demand.values()) > self.max_tokens:
                    return
                sequence = self.waiting.pop()
            self.active.append(sequence)
            self.joining.append(sequence)

    def drop_cancelled(self):
        def gone(sequence):
            return self.abandoned or sequence.ticket.cancelled

        with self.changed:
            dropped = self.waiting.take_all(gone)
        dropped += [sequence for sequence in self.joining if gone(sequence)]
        self.joining = deque(sequence for sequence in self.joining if not gone(sequence))
        for adapter, rows in list(self.rows.items()):
            places = [place for place, sequence in enumerate(rows.sequences) if gone(sequence)]
            dropped += [rows.sequences[place] for place in places]
            self.leave(adapter, rows, places)
        for sequence in dropped:
            self.end(sequence, "cancelled")

    def use(self, adapter):
        if self.adapter != adapter:
            switch(self.model, adapter or None)
            self.adapter = adapter
        return self.fused if self.fused is not None and not adapter else self.model

    def prefill(self):
        """Read prompts, together as many as PREFILL_TOKENS allows; a longer one takes several turns."""
        group, width, promised = [], 0, set()
        for sequence in self.joining:
            if group and sequence.adapter != group[0].adapter:
                continue
            found, missing = ([], None) if sequence.done else self.prefixes.find(sequence.adapter, sequence.ids)
            if missing in promised:
                continue                               # one of the group computes what it can take over next turn
            left = min(sequence.prompt_length - sequence.done - BLOCK * len(found), PREFILL_TOKENS)
            if group and (len(group) + 1) * max(width, left) > PREFILL_TOKENS:
                break
            self.take_over(sequence, found)
            group.append(sequence)
            width = max(width, left)
            promised |= {missing} - {None}
        logits = self.read(self.use(group[0].adapter), group)
        for sequence, row in zip(group, logits, strict=True):
            self.joining.remove(sequence)
            if sequence.done < sequence.prompt_length:
                self.joining.append(sequence)          # others first, then the rest of it
                continue
            self.prefixes.put(sequence.adapter, sequence.ids, sequence.kv)
            self.join(sequence, row)

    def take_over(self, sequence, blocks):
        """Begin a prompt with what the prefix cache has of it."""
        if blocks:
            sequence.kv = torch.cat(blocks, dim=3)     # (layers, 2, K, cached, d)
            sequence.done = sequence.cached = sequence.kv.shape[3]
            self.counts["prefix_hits"] += 1
            self.counts["cached_tokens"] += sequence.cached

    def read(self, network, group):
        """Read on in the prompts of a group, PREFILL_TOKENS of each at most; returns the logits (n, V) behind them.

        Rows are padded on the left twice, before what they hold already and before what is new.
        """
        config, weight = self.model.config, self.model.lm_head.weight
        counts = [min(s.prompt_length - s.done, PREFILL_TOKENS) for s in group]
        past, new = max(s.done for s in group), max(counts)
        cache = KVCache(config, len(group), past + new, weight.device, weight.dtype)
        cache.store.zero_()
        ids, positions = np.zeros((2, len(group), new), dtype=np.int64)
        mask = np.zeros((len(group), past + new), dtype=bool)          # 1 = real token
        for row, (sequence, count) in enumerate(zip(group, counts, strict=True)):
            done = sequence.done
            ids[row, new - count:] = sequence.ids[done:done + count]
            positions[row, new - count:] = np.arange(done, done + count)
            mask[row, past - done:past] = mask[row, past + new - count:] = True
        if past and (virtual := self.virtual_tokens()) is not None:    # the model puts them before an empty cache only
            cache.put_before(virtual)
        for row, sequence in enumerate(group):
            if sequence.done:
                begin, end = cache.virtual + past - sequence.done, cache.virtual + past
                cache.store[:, :, row, :, begin:end] = sequence.kv
        cache.length = past
        ids, positions, mask = (torch.from_numpy(array).to(weight.device) for array in (ids, positions, mask))
        logits = network(ids, attention_mask=None if mask.all() else mask, positions=positions, cache=cache,
                         head=last_logits).logits[:, -1]               # (n, V)
        for row, (sequence, count) in enumerate(zip(group, counts, strict=True)):
            kv = cache.store[:, :, row, :, cache.virtual + past + new - count:]
            sequence.kv = kv if sequence.kv is None else torch.cat((sequence.kv, kv), dim=3)
            sequence.done += count
            self.counts["prompt_tokens"] += count
        return logits

    def virtual_tokens(self):
        """Their keys and values (layers, 2, K, k, d), if the adapter in use consists of such (soft_prompt.py); None."""
        decoder = self.model.model
        if decoder.soft_prompt is None or not decoder.soft_prompt.size:
            return None
        return decoder.soft_prompt.adapters[decoder.soft_prompt.active].keys_values(decoder)

    def join(self, sequence, logits):
        """A prompt was read: its row joins those that are running. All rows are laid out for all admitted requests
        at once, so that one after the other can join without copying what is there."""
        rows = self.rows.setdefault(sequence.adapter, Rows(self.model))
        demand = self.demand()
        if rows.rows == len(rows.sequences) or rows.slots < demand[sequence.adapter][1]:
            for name in sorted(self.rows, key=lambda name: name == sequence.adapter):      # this one last, it grows
                self.rows[name].arrange(*demand[name])
        if rows.before is None and (virtual := self.virtual_tokens()) is not None:
            rows.before = virtual.to(rows.dtype)
        rows.join(sequence, logits)
        self.counts["kv_peak"] = max(self.counts["kv_peak"], sum(r.rows * r.slots for r in self.rows.values()))

    def leave(self, adapter, rows, places):
        rows.leave(places)
        if not rows.sequences:
            del self.rows[adapter]

    def step(self, adapter, rows):
        """One token more for every row."""
        tokens, failed = rows.choose()
        leaving = []
        for place, (sequence, token) in enumerate(zip(rows.sequences, tokens, strict=True)):
            if place in failed:
                self.end(sequence, error=failed[place])
            elif sequence.append(token):
                continue
            else:
                self.prefixes.put(adapter, sequence.ids, rows.kv(place))
                self.end(sequence)
            leaving.append(place)
        self.counts["generated_tokens"] += len(tokens) - len(failed)
        self.counts["steps"] += 1
        self.leave(adapter, rows, leaving)
        self.tell()
        if rows.sequences:
            rows.forward(self.use(adapter))
