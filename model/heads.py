"""The decoder with a scalar head: a reward model, and the critic of reinforcement learning.

    r_t = w · h_t       h_t (D,): the final hidden state of token t, after the last norm;   w (D,): `score`, no bias

A reward model is read at one place, the last real token of a text, which has seen all of it (`at_last_token`); a critic
is read at every token. It has the names and the arithmetic of transformers' …ForSequenceClassification with one label,
so its folder loads there and such a folder loads here (model/checkpoint.py: `load_reward_model`).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.transformer import Decoder, Output


class ScalarModel(nn.Module):
    """`ScalarModel(config)(ids).logits` is one number per token, (B, T), in place of V. The head is fresh."""

    fingerprint, adapters = "", {}           # as in CausalLM

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.init_head()

    @torch.no_grad()
    def init_head(self):
        """N(0, 1 / sqrt(D + 1)) (Stiennon et al. 2020, arXiv:2009.01325): the norm before it makes h of length sqrt(D),
        so the first scores are of size 1."""
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.config.hidden_size + 1))

    def forward(self, ids, attention_mask=None, segment_ids=None, positions=None, cache=None):
        """Token ids (B, T) to `Output(values (B, T), aux_loss (B,))`; arguments as in `CausalLM.forward`."""
        hidden, aux_loss = self.model(ids, attention_mask, segment_ids, positions, cache)
        with torch.autocast(ids.device.type, enabled=False):           # in 16 bits scores that are close become equal
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            values = F.linear(wide, self.score.weight.to(wide.dtype))  # (B, T, 1)
        return Output(values[:, :, 0], aux_loss)


def at_last_token(values, attention_mask):
    """values (B, T) at the last real token of each row, (B,); attention_mask (B, T) 1 = real, padding left or right."""
    places = torch.arange(values.shape[1], device=values.device)                  # (T,)
    last = (places * attention_mask).amax(1, keepdim=True)                        # (B, 1)
    return values.gather(1, last.long())[:, 0]


def at_segment_ends(values, segment_ids, num_segments):
    """values (B, T) of packed rows at the last token of their segments 1 … num_segments: (B, num_segments).

    A segment that a row does not have gets the value of the row's first token: it must count nothing.
    """
    places = torch.arange(values.shape[1], device=values.device).expand_as(segment_ids)     # (B, T)
    ends = places.new_zeros(len(values), num_segments + 1).scatter_reduce(1, segment_ids, places, "amax")
    return values.gather(1, ends[:, 1:])                                          # (B, num_segments)


def normalize(scores, config):
    """(r - μ) / σ with the mean and standard deviation of held-out answers that training left in config.json.

    scores: a number, a tensor or an array. As they are where the folder has none (a reward model made elsewhere).
    """
    return (scores - config.reward_mean) / config.reward_std if config.reward_std else scores
