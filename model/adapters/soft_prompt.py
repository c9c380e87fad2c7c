"""Virtual tokens before every text: prompt tuning and prefix tuning. Only they are trained, the model stays as it is.

    prompt   k trained embeddings stand before those of the text          (Lester et al. 2021, arXiv:2104.08691)
    prefix   k trained keys and values stand before those of the text, in every layer
                                                                          (Li and Liang 2021, arXiv:2101.00190, eq. 3)

For the model both are the same thing. A virtual token comes before the text and never sees it, so the key and the value
that a layer makes of it are the same for all texts: prompt tuning is prefix tuning whose keys and values the model
itself computes from k embeddings. Hence all that a forward pass needs is

    attention of token t over   [ k virtual slots | the slots that t's mask allows ]   real tokens at positions k, k+1 …

and rows of several packed texts, padding on either side and cached generation work as they do without: every text sees
the k slots, nothing is inserted into a row, and the hidden states are those of the real tokens alone.
"""

import torch
from torch import nn

from model.errors import UserError
from model.kernels import BlockMask


class PromptTuning(nn.Module):
    """k embeddings, table (k, D). Theirs are the positions 0 … k - 1."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())

    def stored(self, tensors):
        """This module's tensors {name: tensor} -> those of a folder."""
        return {"prompt_embeddings": tensors["table"]}

    def keys_values(self, decoder):
        return keys_values_of(decoder, self.table)


class PrefixTuning(nn.Module):
    """k keys and values per layer, those of virtual token i in row i of a table (k, layers · 2 · K · d).

    With `inner` > 0 the table is trained through an MLP, table = W_2 tanh(W_1 e + b_1) + b_2 with e (k, K · d): the
    reparameterisation of section 4.3, which makes training stabler and of which only the table is kept in the end.
    Keys are stored as attention uses them, after norm and rotation.
    """

    def __init__(self, table, inner=0, width=0):
        """table (k, layers · 2 · K · d), where an MLP is to compute it only its shape counts; width = K · d."""
        super().__init__()
        k, size = table.shape
        self.transform = nn.Identity()
        if inner:
            table = torch.randn(k, width)
            self.transform = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, size))
        self.table = nn.Parameter(table.detach().clone())

    @torch.no_grad()
    def stored(self, tensors):
        """This module's tensors {name: tensor} -> those of a folder: the table alone, the MLP folded away."""
        own = {name: tensor.to(self.table.device) for name, tensor in tensors.items()}
        mlp = {name.removeprefix("transform."): tensor for name, tensor in own.items() if name != "table"}
        return {"prompt_embeddings": torch.func.functional_call(self.transform, mlp, own["table"])}

    def keys_values(self, decoder):
        K, d = decoder.config.num_key_value_heads, decoder.config.head_dim
        table = self.transform(self.table).view(len(self.table), -1, 2, K, d)
        return table.permute(1, 2, 3, 0, 4)                                       # (layers, 2, K, k, d)


class SoftPrompt(nn.Module):
    """The virtual tokens attached to a decoder, by name; those named `active` are in force.

    It is `decoder.soft_prompt`, None where nothing is attached.
    """

    merged = None             # never anything else: the model has no weights that do what tokens do

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active = ""

    @property
    def size(self):
        """k, the number of virtual tokens in force; 0 while another adapter, or none, is active."""
        return len(self.adapters[self.active].table) if self.active in self.adapters else 0

    def put_before(self, decoder, cache, mask, positions):
        """Let the virtual tokens stand before the texts of a forward pass: the cache, mask and positions that do it.

        cache: the KVCache of the call; an empty one takes the virtual tokens in, once. None: keys and values are
        joined in each layer. mask: what `attention_mask_for` or `segment_blocks` made. positions (1 or B, T).
        """
        past = cache.length if cache is not None else 0
        if past == 0:
            keys_values = self.adapters[self.active].keys_values(decoder)
            if cache is None:
                cache = Before(keys_values)
            else:
                cache.put_before(keys_values)
        elif cache.virtual != self.size:
            raise ValueError(f"the cache was begun with {cache.virtual} virtual tokens, now {self.size} are in force")
        positions = positions + self.size
        return cache, widened(mask, self.size, past, positions, decoder.config.sliding_window), positions


class Before:
    """Stands where a KVCache stands, and caches nothing: it puts the virtual tokens before the keys and values of each
    layer. keys_values (layers, 2, K, k, d); gradients flow into them."""

    def __init__(self, keys_values):
        self.keys_values = keys_values

    def update(self, layer, k, v):
        """k and v (B, K, T, d) of a layer -> (B, K, k + T, d) each."""
        keys, values = self.keys_values[layer].to(k.dtype).expand(len(k), -1, -1, -1, -1).unbind(1)
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)

    def advance(self, count):
        """Nothing was kept, so nothing has to be counted."""


class Recorder:
    """Stands where a KVCache stands, and remembers what the layers of a model hand over to it."""

    def __init__(self):
        self.seen = []

    def update(self, layer, k, v):
        self.seen.append(torch.stack((k[0], v[0])))                               # (2, K, k, d)
        return k, v


def keys_values_of(decoder, embeddings):
    """Keys and values (layers, 2, K, k, d) that a decoder makes of a text with embeddings (k, D) alone in its row."""
    k, device = len(embeddings), embeddings.device
    cos, sin = decoder.rotation(torch.arange(k, device=device)[None])
    x = embeddings[None].to(decoder.embed_tokens.weight.dtype)                     # (1, k, D)
    uncounted = torch.zeros(1, k, dtype=torch.bool, device=device)                # experts must not count them
    recorder = Recorder()
    for block in decoder.layers:
        x, _ = block(x, cos, sin, None, recorder, uncounted)
    # Nobody reads the last x. But a sharded block gathers its weights again when a gradient comes to what it returned.
    return torch.stack(recorder.seen) + 0 * x[0, 0, 0]


def widened(mask, k, past, positions, window):
    """`mask` over past + T slots with k columns of virtual tokens before them; positions (1 or B, T) count those.

    Everybody sees the virtual tokens, within the sliding window if the model has one. A BlockMask has them already.
    """
    if isinstance(mask, BlockMask):
        return mask
    T, device = positions.shape[1], positions.device
    if mask is None and T == 1 and not window:
        return None                                                                # one new token sees everything
    if mask is None:
        mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)     # (T, S) causal
    slots = torch.arange(k, device=device)
    near = positions[:, None, :, None] - slots < window if window else slots[None] >= 0   # (1 or B, 1, T, k) or (1, k)
    shape = torch.broadcast_shapes(mask.shape[:-1], near.shape[:-1])
    return torch.cat((near.expand(*shape, -1), mask.expand(*shape, -1)), dim=-1)


# --------------------------------------------------------------------------------------------- how they begin


def initial_embeddings(decoder, k, init="vocabulary", text_ids=()):
    """Embeddings (k, D) to begin with: "random", of the size of the model's own; "vocabulary", those of k tokens drawn
    at random; "text", those of text_ids, repeated or cut to k. Section 3.1 of prompt tuning compares them."""
    weight = decoder.embed_tokens.weight.detach().float()
    if init == "random":
        return torch.randn(k, weight.shape[1]).to(weight.device) * weight.std()
    if init == "vocabulary":
        return weight[torch.randint(len(weight), (k,)).to(weight.device)]
    if init == "text":
        if not len(text_ids):
            raise UserError("virtual tokens are to begin as a text, but the text is empty; give some words")
        return weight[torch.tensor([text_ids[i % len(text_ids)] for i in range(k)], device=weight.device)]
    raise UserError(f"virtual tokens begin as random, vocabulary or text, not as {init!r}")


@torch.no_grad()
def initial_table(decoder, k, init="vocabulary", text_ids=()):
    """Keys and values to begin a prefix with, (k, layers · 2 · K · d): those that the model computes for tokens or a
    text (section 4.3: far better than random ones), or "random", N(0, 1)."""
    config = decoder.config
    if init == "random":
        size = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        return torch.randn(k, size).to(decoder.embed_tokens.weight.device)
    computed = keys_values_of(decoder, initial_embeddings(decoder, k, init, text_ids))      # (layers, 2, K, k, d)
    return computed.permute(3, 0, 1, 2, 4).flatten(1).float()


# --------------------------------------------------------------------------------------------- folders of PEFT


def soft_prompt_to_peft(config, model_config):
    """adapter_config.json of an AdapterConfig. A prefix that was trained through an MLP is a plain one by now."""
    hf = {"peft_type": "PROMPT_TUNING", "task_type": config.task_type, "inference_mode": True,
          "num_virtual_tokens": config.rank, "num_transformer_submodules": 1,
          "num_layers": model_config.num_hidden_layers, "num_attention_heads": model_config.num_attention_heads,
          "token_dim": model_config.hidden_size, "prompt_tuning_init": "RANDOM"}
    if config.method == "prefix":
        del hf["prompt_tuning_init"]
        heads = model_config.num_key_value_heads
        hf |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "num_attention_heads": heads,
               "token_dim": heads * model_config.head_dim, "encoder_hidden_size": heads * model_config.head_dim}
    return hf


def soft_prompt_from_peft(hf, tensors, model_config, folder):
    """adapter_config.json and the tensors of a folder -> (fields of an AdapterConfig, table). UserError where the
    folder is damaged or for a model of another shape."""
    if tensors.keys() != {"prompt_embeddings"}:
        raise UserError(f"{folder}: adapter_model.safetensors must hold prompt_embeddings and nothing else; it holds "
                        f"{', '.join(sorted(tensors)) or 'nothing'}")
    table, method = tensors["prompt_embeddings"], "prompt" if hf["peft_type"] == "PROMPT_TUNING" else "prefix"
    per_layer = 2 * model_config.num_key_value_heads * model_config.head_dim
    width = model_config.hidden_size if method == "prompt" else model_config.num_hidden_layers * per_layer
    if table.ndim != 2 or table.shape[1] != width or not len(table):
        raise UserError(f"{folder}: prompt_embeddings has shape {tuple(table.shape)}, and the base model asks for "
                        f"(tokens, {width}): it is for another model")
    task_type = hf.get("task_type") or "CAUSAL_LM"
    return {"method": method, "rank": len(table), "start": "random", "task_type": task_type}, table
