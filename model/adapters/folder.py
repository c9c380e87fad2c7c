"""Adapters as folders in PEFT's format: what is written here loads there, and the other way round.

    adapter_config.json          method, rank, alpha, names of layers …, under PEFT's names
    adapter_model.safetensors    base_model.model.<path of the layer>.lora_A.weight …; modules that were trained whole;
                                 in its header a fingerprint of the base model, so that another one refuses the adapter,
                                 and what a reward model or evaluator says of itself (model/config.py)

Saved all or nothing, like a checkpoint. PiSSA becomes plain LoRA of twice the rank on the way, so that the folder fits
the base model as it is; AdaLoRA loses the directions that its budget has cut.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.adapters.adapted import (  # noqa: F401  (what most callers need, in one place)
    AdapterConfig,
    attach,
    disabled,
    has_adapters,
    has_experts,
    holders,
    linear_layers,
    switch,
)
from model.adapters.soft_prompt import SoftPrompt, soft_prompt_from_peft, soft_prompt_to_peft
from model.checkpoint import finish_save, open_weights, replace_files, stored_copy, write_json
from model.config import SAID_OF_ITSELF
from model.errors import UserError

PREFIX = "base_model.model."
TENSOR_NAMES = ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "ia3_l", "bottleneck_down", "bottleneck_up")
BOTTLENECK_NOTE = ("h + W_up silu(W_down h + b_down) + b_up behind each target module; PEFT has no such method, only "
                   "the project that wrote this folder reads it")
# Fields of PEFT's configurations that change what is computed, in ways that are not built here.
FOREIGN = ("lora_bias", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
           "layer_replication", "fan_in_fan_out", "use_bdlora", "arrow_config", "monteclora_config", "velora_config")
STARTS = (True, False, "gaussian", "orthogonal", "eva", "pissa")     # they leave the base as it is, or can be repeated


# ----------------------------------------------------------------------------------------------- saving


def save_adapter(folder, model, tokenizer=None, base="", name="default", card="", weights=None):
    """Write the adapter `name` of a model, all or nothing.

    tokenizer  saved along; None leaves the tokenizer files of the folder as they are
    base       folder or name of the base model, for whoever wants to load both
    card       text of README.md; "" leaves the old one
    weights    the model's tensors by name (those that are trained suffice), where they are not whole in the model
    Returns nothing. UserError when it cannot be written.
    """
    weights = model.state_dict() if weights is None else weights
    config, tensors, patterns = model.adapters[name], {}, {}
    layers = {path: module.adapters[name] for path, module in holders(model).items() if name in module.adapters}
    for path, adapter in layers.items():
        prefix = f"{path}.adapters.{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        for key, tensor in adapter.stored(own).items():
            full = key if isinstance(model.get_submodule(path), SoftPrompt) else f"{PREFIX}{path}.{key}"
            tensors[full] = stored_copy(key, tensor, None)
        if config.method == "adalora":
            kept = own["kept"].flatten().tolist()
            patterns[f"{path}.lora_E"] = kept + [False] * (config.start_rank - len(kept))
    for key, tensor in weights.items():
        if any(part in config.modules_to_save for part in key.split(".")[:-1]):
            tensors[PREFIX + key] = stored_copy(key, tensor, None)

    hf = to_peft(config, model, list(layers))
    hf["base_model_name_or_path"] = str(base)
    if patterns:
        hf["rank_pattern"] = patterns

    said = {name: json.dumps(getattr(model.config, name)) for name in SAID_OF_ITSELF if getattr(model.config, name)}

    def write(new):
        save_file(tensors, new / "adapter_model.safetensors",
                  metadata={"format": "pt", "base_fingerprint": model.fingerprint, **said})
        write_json(new / "adapter_config.json", hf)

    replace_files(folder, write, tokenizer, card)


def to_peft(config, model, paths):
    """adapter_config.json of a config whose adapters sit on the layers `paths`."""
    if config.method in ("prompt", "prefix"):
        return soft_prompt_to_peft(config, model.config)
    hf = {"task_type": config.task_type, "inference_mode": True, "target_modules": short_names(model, paths),
          "modules_to_save": list(config.modules_to_save) or None}
    if config.method == "ia3":
        feedforward = [name for name in hf["target_modules"] if name.endswith("down_proj")]
        return {"peft_type": "IA3", **hf, "feedforward_modules": feedforward, "init_ia3_weights": True}
    if config.method == "bottleneck":
        return {"peft_type": "BOTTLENECK", **hf, "r": config.rank, "note": BOTTLENECK_NOTE}
    hf |= {"lora_dropout": config.dropout, "bias": "none", "init_lora_weights": True}
    if config.method == "adalora":
        return {"peft_type": "ADALORA", **hf, "target_r": config.rank, "init_r": config.start_rank,
                "lora_alpha": whole(config.alpha), "total_step": 1, "tinit": 0, "tfinal": 0}
    grow = 2 if config.pissa else 1      # of PiSSA the difference from its start is stored; s = alpha / sqrt(r) or / r
    return {"peft_type": "LORA", **hf, "r": grow * config.rank, "use_rslora": config.rslora, "use_dora": config.dora,
            "lora_alpha": whole(config.alpha * (grow ** 0.5 if config.rslora else grow)),
            "rank_pattern": {key: grow * rank for key, rank in config.rank_pattern.items()},
            "alpha_pattern": {key: whole(alpha * (grow ** 0.5 if config.rslora else grow))
                              for key, alpha in config.alpha_pattern.items()}}


def whole(number):
    """16.0 as 16, the way PEFT writes it."""
    return int(number) if number == int(number) else number


def short_names(model, paths):
    """Names for PEFT's target_modules: the last parts of the paths where they say the same, else the paths.

    In a mixture they are the paths: elsewhere each expert may be a layer of its own with the same last part.
    """
    names = sorted({path.rpartition(".")[2] for path in paths})
    called = [path for path in linear_layers(model) if path.rpartition(".")[2] in names]
    return names if sorted(called) == sorted(paths) and not has_experts(model) else sorted(paths)


# ---------------------------------------------------------------------------------------------- loading


def load_adapter(model, folder, name="default"):
    """Attach the adapter of a folder, ours or PEFT's, to `model` under `name`; it becomes the active one.

    Returns its AdapterConfig. UserError when it is for another base model, of a method not built here, or damaged.
    """
    folder = Path(folder)
    hf = read_adapter_config(folder)
    with open_weights(folder / "adapter_model.safetensors") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}      # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    base = metadata.get("base_fingerprint", "")
    if base and model.fingerprint and base != model.fingerprint:
        raise UserError(f"{folder}: the adapter was trained on another base model"
                        + (f" ({hf['base_model_name_or_path']})" if hf.get("base_model_name_or_path") else "")
                        + "; the weights of this one differ, give that one as --model")
    if hf["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING"):
        fields, table = soft_prompt_from_peft(hf, tensors, model.config, folder)
        config = AdapterConfig(**fields)
        attach(model, config, name)
        model.model.soft_prompt.adapters[name].table.data.copy_(table)
        return config
    layers, others = by_layer(tensors)
    known = linear_layers(model)
    for path in layers:
        if path not in known:
            raise UserError(f"{folder}: the adapter changes {path}, which this model does not have as a linear layer")
    config = from_peft(hf, layers, folder)
    attach(model, config, name)
    state = model.state_dict(keep_vars=True)
    wanted = {f"{path}.adapters.{name}.{key}": tensor
              for path, parts in layers.items() for key, tensor in parts.items()} | others
    own = {key for key, tensor in state.items() if isinstance(tensor, torch.nn.Parameter) and (
        f".adapters.{name}." in key or any(part in config.modules_to_save for part in key.split(".")[:-1]))}
    if own != wanted.keys():
        raise UserError(f"{folder}: {min(own ^ wanted.keys())} is missing from adapter_model.safetensors, or too much "
                        "in it; save or download it again")
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise UserError(f"{folder}: {key} has shape {tuple(tensor.shape)}, and the base model asks for "
                            f"{tuple(state[key].shape)}: it is for another model")
        state[key].data.copy_(tensor)
    for key in SAID_OF_ITSELF:
        if key in metadata:
            setattr(model.config, key, json.loads(metadata[key]))
    return config


def load_adapters(model, folders):
    """`load_adapter` for each of several folders, by commas. Each gets the last part of its path as its name; the first
    is the active one (`switch` takes another)."""
    names = []
    for folder in folders.split(","):
        names.append(Path(folder).resolve().name.replace(".", "_"))
        load_adapter(model, folder, names[-1])
    switch(model, names[0])


def read_adapter_config(folder):
    """folder/adapter_config.json as a dict; a clear line for each way in which a folder is no adapter."""
    if not folder.is_dir():
        raise UserError(f"no adapter folder {folder}: expected adapter_config.json and adapter_model.safetensors")
    finish_save(folder)
    path = folder / "adapter_config.json"
    if not path.is_file():
        model = (folder / "config.json").is_file()
        raise UserError(f"{folder} has no adapter_config.json: " + (
            "it is a whole model, give it as --model" if model else "it is not an adapter"))
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(f"{folder} has no adapter_model.safetensors" + (
            ": adapter_model.bin is pickled and can run code when loaded; save it again with PEFT" if pickled else
            "; download it again"))
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(hf, dict) or "peft_type" not in hf:
        raise UserError(f"{path} has no peft_type: it is not an adapter's configuration")
    return hf


def by_layer(tensors):
    """The tensors of a file as {path of the layer: {name: tensor}}, and those of modules trained whole by full name."""
    layers, others = {}, {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX)
        parts = key.split(".")
        cut = next((i for i, part in enumerate(parts) if part in TENSOR_NAMES), None)
        if cut is None:
            others[key] = tensor
        else:
            layers.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = tensor
    return layers, others


def from_peft(hf, layers, folder):
    """The AdapterConfig of PEFT's adapter_config.json. Layers and ranks are those of the tensors that are there."""
    kind = hf["peft_type"]
    if kind not in ("LORA", "ADALORA", "IA3", "BOTTLENECK"):
        raise UserError(f"{folder}: an adapter of type {kind}; known are LORA, ADALORA, IA3, PROMPT_TUNING, "
                        "PREFIX_TUNING and BOTTLENECK")
    foreign = [field for field in FOREIGN if hf.get(field)] + (["bias"] if hf.get("bias", "none") != "none" else [])
    if foreign:
        raise UserError(f"{folder}: adapter_config.json asks for {foreign[0]}={hf[foreign[0]]!r}, which is not built "
                        "here; merge the adapter with PEFT (merge_and_unload) and use the merged model")
    common = dict(targets=",".join(layers), modules_to_save=tuple(hf.get("modules_to_save") or ()),
                  task_type=hf.get("task_type") or "CAUSAL_LM")
    if kind == "IA3":
        return AdapterConfig("ia3", **common)
    if kind == "BOTTLENECK":
        return AdapterConfig("bottleneck", rank=hf["r"], **common)
    common |= dict(alpha=hf.get("lora_alpha", 8), dropout=hf.get("lora_dropout", 0.0))
    first = "lora_A" if kind == "ADALORA" else "lora_A.weight"
    ranks = {path: len(parts[first]) for path, parts in layers.items() if first in parts}
    if kind == "ADALORA":
        start = hf.get("init_r", 12)
        return AdapterConfig("adalora", rank=hf.get("target_r", 8), start_rank=start, **common,
                             rank_pattern={path: rank for path, rank in ranks.items() if rank != start})
    if hf.get("init_lora_weights", True) not in STARTS:
        raise UserError(f"{folder}: init_lora_weights={hf['init_lora_weights']!r} changed the base model in a way that "
                        "cannot be repeated here; save it in PEFT with path_initial_model_for_weight_conversion")
    return AdapterConfig("lora", rank=hf.get("r", 8), **common, rslora=bool(hf.get("use_rslora")),
                         dora=bool(hf.get("use_dora")), pissa=hf.get("init_lora_weights") == "pissa",
                         rank_pattern={path: rank for path, rank in ranks.items() if rank != hf.get("r", 8)},
                         alpha_pattern=hf.get("alpha_pattern") or {})
