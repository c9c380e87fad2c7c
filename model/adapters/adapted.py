"""Adapters on a frozen model: attach them, switch between them, switch them off, merge them into the weights.

    attach(model, AdapterConfig("lora", rank=8))    in place: each chosen layer becomes Adapted(layer), with its adapter
    switch(model, "poet")                           of several adapters on one model one is active, or none (None)
    with disabled(model): …                         the base model, bit for bit: a reference policy at no memory
    merge(model); detach(model)                     plain layers again, with the change added to their weights

The base model is never changed: its parameters are frozen, and merged weights stand beside them.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from model.adapters import METHODS
from model.adapters.adalora import AdaLoRA
from model.adapters.bottleneck import Bottleneck
from model.adapters.ia3 import IA3
from model.adapters.lora import LoRA, dense_weight
from model.adapters.soft_prompt import PrefixTuning, PromptTuning, SoftPrompt, initial_embeddings, initial_table
from model.errors import UserError
from model.moe import Experts
from model.quantize import QuantizedExperts

LORA_B_RATIO = 16         # LoRA+: learning rate of B over that of A
IA3_TARGETS = ("k_proj", "v_proj", "down_proj")
# In a mixture PEFT takes every gate_proj, up_proj and down_proj for the experts' (with transformers 5), also those of
# shared experts, and loads their adapters wrongly. Who does not need PEFT can name them.
MIXTURE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BOTTLENECK_TARGETS = ("o_proj", "down_proj")      # the last layers of attention and MLP; down_proj alone: Pfeiffer's


@dataclass
class AdapterConfig:
    """What to attach. 0 and "" mean "chosen for you"."""
    method: str = "lora"            # one of METHODS
    rank: int = 8                   # of an update; of adalora the mean over layers in the end
    alpha: float = 0.0              # an update is multiplied by alpha / rank; 0 = 2 · rank
    dropout: float = 0.0            # share of a layer's inputs that its update does not see, in training
    targets: str = "all"            # last part, or all, of the names of layers, by commas; all = what the method takes
    modules_to_save: tuple = ()     # modules that are trained whole and stored with the adapter, as "score"
    task_type: str = "CAUSAL_LM"    # in PEFT's words; SEQ_CLS for a reward model
    start_rank: int = 0             # adalora: rank of each layer at the start; 0 = 1.5 · rank
    rank_pattern: dict = field(default_factory=dict)      # other ranks and alphas of some layers: {regex of the end
    alpha_pattern: dict = field(default_factory=dict)     # of a path: number}, as in PEFT
    start: str = "vocabulary"       # prompt, prefix: begin as tokens of the vocabulary, as "random", or as a "text",
    start_ids: tuple = ()           # whose token ids these are
    inner: int = 0                  # prefix: width of the MLP through which it is trained; 0 = none
    # lora, rslora, dora, lora+ and pissa are LoRA with one of these; folders of PEFT may combine them
    rslora: bool = False
    dora: bool = False
    pissa: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"adapter method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.rank < 1:
            raise UserError(f"adapter rank {self.rank}: expected 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter dropout {self.dropout}: expected at least 0 and below 1")
        if self.inner and (self.method != "prefix" or self.start == "text"):
            raise UserError(f"--prefix_inner {self.inner}: is for --method prefix, which then begins at random, not as "
                            "--virtual_text; leave one of them out")
        if self.start == "text" and self.method not in ("prompt", "prefix"):
            raise UserError(f"--virtual_text: is for --method prompt and prefix, not for {self.method}")
        self.alpha = self.alpha or 2.0 * self.rank
        self.start_rank = self.start_rank or -(-3 * self.rank // 2)
        self.rslora |= self.method == "rslora"
        self.dora |= self.method == "dora"
        self.pissa |= self.method == "pissa"


class Adapted(nn.Module):
    """A layer of the base model with the adapters that sit on it, by name. `active` is one of them, or "" for none."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active = ""
        self.merged = None                  # base_layer and adapters in one, after `merge`

    def forward(self, *args):
        if self.active and self.merged is not None:
            return self.merged(*args)
        if self.active not in self.adapters:
            return self.base_layer(*args)
        return self.adapters[self.active](self.base_layer, *args)


HOLDERS = (Adapted, SoftPrompt)


# ------------------------------------------------------------------------------------------- attaching


def attach(model, config, name="default"):
    """Freeze `model` (a CausalLM or a ScalarModel) and add a fresh adapter, in place, which becomes the active one.

    UserError for a name that is taken and for targets that the model does not have. Experts of a mixture are no linear
    layers and get no adapter; nor do routers, embeddings and heads.
    """
    if not name or "." in name:
        raise UserError(f"adapter name {name!r}: expected letters, digits, - and _")
    if name in model.adapters:
        raise UserError(f"the model has an adapter named {name!r} already; give another name")
    chosen = choose(model, config)
    whole = [module for path, module in model.named_modules() if path.rpartition(".")[2] in config.modules_to_save]
    if len(whole) < len(config.modules_to_save):
        raise UserError(f"modules to save {', '.join(config.modules_to_save)}: the model does not have them all")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    like = next(model.parameters())         # the embedding: adapters live where it lives, in its format
    for path, module in chosen.items():
        if not isinstance(module, HOLDERS):
            module = Adapted(module).train(module.training)
            model.set_submodule(path, module)
        base = model.model if isinstance(module, SoftPrompt) else module.base_layer
        module.adapters[name] = build(config, path, base).to(like.device, like.dtype).train(model.training)
    for module in whole:
        module.requires_grad_(True)
    model.adapters = {**model.adapters, name: config}
    switch(model, name)


def choose(model, config):
    """{path: layer} that the config's targets name. UserError lists the names there are."""
    if config.method in ("prompt", "prefix"):
        model.model.soft_prompt = model.model.soft_prompt or SoftPrompt()
        return {"model.soft_prompt": model.model.soft_prompt}
    layers = linear_layers(model)
    wanted = [target.strip() for target in config.targets.split(",") if target.strip()]
    if config.targets == "all":
        usual = {"ia3": IA3_TARGETS, "bottleneck": BOTTLENECK_TARGETS}.get(config.method, [*layers])
        if has_experts(model) and usual == [*layers]:      # see MIXTURE_TARGETS
            usual = MIXTURE_TARGETS
        wanted = [target for target in usual if any(named(path, target) for path in layers)]   # a mixture lacks some
    for target in wanted:
        if not any(named(path, target) for path in layers):
            names = sorted({path.rpartition(".")[2] for path in layers})
            raise UserError(f"--lora_targets {target}: no linear layer of the blocks is called that; there are "
                            f"{', '.join(names)}" + (" (the experts of a mixture get no adapter)" if has_experts(model)
                                                     else ""))
    return {path: layer for path, layer in layers.items() if any(named(path, target) for target in wanted)}


def has_experts(model):
    return any(isinstance(module, (Experts, QuantizedExperts)) for module in model.modules())


def named(path, target):
    """Whether a module's path is `target` or ends in it, as PEFT matches them."""
    return path == target or path.endswith("." + target)


def linear_layers(model):
    """{path: layer} of all linear layers of the blocks, quantized ones too; one with adapters is its Adapted."""
    found = {}
    for path, module in model.named_modules():
        inside = ".base_layer" in path or ".adapters." in path or ".merged" in path
        if ".layers." in path and not inside and (isinstance(module, Adapted) or hasattr(module, "in_features")):
            found[path] = module
    return found


def build(config, path, layer):
    """The adapter of one layer; of a method that adds virtual tokens, `layer` is the decoder."""
    if config.method == "prompt":
        return PromptTuning(initial_embeddings(layer, config.rank, config.start, config.start_ids))
    if config.method == "prefix":
        width = layer.config.num_key_value_heads * layer.config.head_dim
        return PrefixTuning(initial_table(layer, config.rank, config.start, config.start_ids), config.inner, width)
    if config.method == "bottleneck":
        return Bottleneck(layer, config.rank)
    if config.method == "ia3":
        return IA3(layer, before=named(path, "down_proj"))
    if config.method == "adalora":
        rank = matching(config.rank_pattern, path, config.start_rank)
        return AdaLoRA(layer, rank, config.alpha / (config.start_rank + 1e-5), config.dropout)
    rank, alpha = matching(config.rank_pattern, path, config.rank), matching(config.alpha_pattern, path, config.alpha)
    ratio = LORA_B_RATIO if config.method == "lora+" else 1
    return LoRA(layer, rank, alpha, config.dropout, config.rslora, config.dora, config.pissa, ratio)


def matching(patterns, path, default):
    """The value of the first pattern that the end of `path` matches."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)


# ------------------------------------------------------------------------------------------- switching


def holders(model):
    """{path: module} of everything in a model that holds `adapters` by name and has an `active` one."""
    return {path: module for path, module in model.named_modules()
            if isinstance(getattr(module, "adapters", None), nn.ModuleDict)}


def has_adapters(model):
    return bool(model.adapters)


def learning_rate_ratios(model):
    """{id(parameter): its learning rate over that of the others} of all parameters of adapters. Not 1 in LoRA+ only."""
    return {id(parameter): adapter.b_lr_ratio if key == "lora_B.weight" else 1.0
            for holder in holders(model).values() for adapter in holder.adapters.values()
            for key, parameter in adapter.named_parameters()}


def active_adapter(model):
    """The name of the adapter in use, "" when there is none."""
    return next((module.active for module in holders(model).values() if module.active), "")


def switch(model, name):
    """Use the adapter `name`, or the base model alone (None)."""
    if name:
        check_name(model, name)
    for module in holders(model).values():
        module.active = name or ""


def check_name(model, name):
    if name not in model.adapters:
        raise UserError(f"no adapter named {name!r}; the model has {', '.join(model.adapters) or 'none'}")


@contextmanager
def disabled(model):
    """Inside, `model` is its base model: what it computed before an adapter was attached."""
    whole = [module for config in model.adapters.values() for module in config.modules_to_save]
    if whole:
        raise ValueError(f"{', '.join(whole)} of the base model was trained whole: it cannot be set aside")
    before = {path: module.active for path, module in holders(model).items()}
    switch(model, None)
    try:
        yield
    finally:
        for path, module in holders(model).items():
            module.active = before[path]


# --------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge(model, adapters="default"):
    """Add adapters to the weights: the model computes the same as with them, at the cost of the base model.

    adapters: a name, or {name: weight} for a weighted sum of several changes. The sum is taken in at least float32 and
    rounded once. The base weights stay beside (`unmerge`), and `detach` drops them. UserError when something is merged
    already, or a method has no change of weights to add.
    """
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    for name in weights:
        check_name(model, name)
    for module in holders(model).values():
        if module.merged is not None:
            raise UserError("the model has a merged adapter already; unmerge it first: twice would add it twice")
        for name in weights:
            if name in module.adapters and not hasattr(module.adapters[name], "delta"):
                raise UserError(f"adapter {name!r} changes more than weights: it cannot be merged")
    for module in holders(model).values():
        if isinstance(module, Adapted):
            module.merged = merged_layer(module, weights)
    switch(model, next(iter(weights)))


def merged_layer(module, weights):
    base = module.base_layer
    start = dense_weight(base)
    weight = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)      # (out, in)
    bias = None if base.bias is None else base.bias.to(weight.dtype, copy=True)
    changes = [(share, module.adapters[name].delta(weight.clone(), bias)) for name, share in weights.items()
               if name in module.adapters]
    for share, (of_weight, of_bias) in changes:
        weight += share * of_weight
        if bias is not None:
            bias += share * of_bias
    like = next(module.parameters())
    new = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(like.device, like.dtype), requires_grad=False)
    return new


def unmerge(model):
    """Undo `merge`, exactly."""
    for module in holders(model).values():
        module.merged = None


def detach(model):
    """Take all adapters off, in place: plain layers again, merged or as they were before."""
    for path, module in holders(model).items():
        if isinstance(module, SoftPrompt):
            model.model.soft_prompt = None
        else:
            model.set_submodule(path, module.base_layer if module.merged is None else module.merged)
    model.adapters = {}
