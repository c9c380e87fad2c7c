"""Convert MiniMind's weights to the folders of this project, and back.

    full_sft_512.pth, rlhf_768.pth …   a state dict, of which nothing but names and shapes says what model it is
    MiniMind2/                         a folder whose weights are pickled (pytorch_model.bin)
    lora_identity_512.pth              factors A and B beside the square layers of a model

MiniMind's dense models are Llama's architecture, or Qwen3's where they have q_norm and k_norm, under the same names and
with the same rotary embedding, so that their tensors are taken as they are. Layers, widths and vocabulary follow from
the shapes; heads, rope and epsilon from config.json, or where there is none, from what MiniMind writes in its code:
8 heads, rope_theta 1e6, 32768 positions. Its mixtures of experts fit Qwen3-MoE when they have no shared expert and use
two experts a token or more; the others, such as full_sft_640_moe.pth, are no class of Hugging Face and are refused.

Pickled files are read with weights_only: one that holds anything but tensors and plain values is refused, not run.

reads   a .pth, .bin or .safetensors file, or a folder; with --to minimind a checkpoint or adapter folder of ours
writes  a checkpoint folder, or an adapter folder in PEFT's format; with --to minimind a .pth file, beside it
        for a model the same name with .json: the arguments of MiniMindConfig
run     python scripts/convert_model.py --model full_sft_512.pth --tokenizer minimind/model --out out/minimind2-small
        python scripts/convert_model.py --model ./MiniMind2 --out out/minimind2
        python scripts/convert_model.py --model lora_identity_512.pth --base out/minimind2-small --out out/identity
        python scripts/convert_model.py --to minimind --model out/minimind2-small --out full_sft_512.pth --dtype float16
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

import json
import os
import re
from dataclasses import dataclass

from model.cli import arg, parse_args
from model.errors import UserError, run

# torch takes seconds to import: the functions that need it import it, so that --help and a wrong flag answer at once.


@dataclass
class Config:
    model: str = arg("", "what to convert: a .pth, .bin or .safetensors file, or a folder")
    out: str = arg("", "folder for the result; with --to minimind the .pth file")
    to: str = arg("folder", "folder: from MiniMind to a folder of this project; minimind: the other way",
                  choices=("folder", "minimind"))
    tokenizer: str = arg("", "folder of the tokenizer.json (or that file) that the model was trained with")
    config: str = arg("", "config.json of the model, where it is not in its folder and the file not MiniMind's usual")
    base: str = arg("", "of a LoRA file or adapter folder: the folder of the model that it is for")
    dtype: str = arg("float32", "format of the weights that are written", choices=("float32", "bfloat16", "float16"))


# What MiniMind's configuration class assumes and its weights do not tell; without and with q_norm.
MINIMIND = {"num_attention_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2, "norm_topk_prob": True}
MINIMIND_WITH_NORM = MINIMIND | {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1}
COMPUTED = re.compile(r"(model\.)?(freqs_cos|freqs_sin|pos_cis)|.*rotary_emb\.inv_freq")    # follows from the config
LORA = re.compile(r"(.+)\.lora\.(A|B)\.weight")


def main(cfg):
    if not cfg.model or not cfg.out:
        raise UserError("--model and --out are needed: what to convert, and where the result goes")
    source, out = pathlib.Path(cfg.model), pathlib.Path(cfg.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; name a new one")
    if not source.exists():
        raise UserError(f"--model {source}: there is no such file or folder")
    if cfg.to == "minimind":
        if not out.suffix:
            raise UserError(f"--out {out}: MiniMind's format is one file; give a name that ends in .pth")
        adapter = (source / "adapter_config.json").is_file()
        print(adapter_to_minimind(source, out, cfg) if adapter else model_to_minimind(source, out, cfg))
        return
    state = read_weights(source)
    if any(LORA.fullmatch(name) for name in state):
        print(adapter_to_folder(state, source, out, cfg))
    else:
        print(model_to_folder(state, source, out, cfg))


# --------------------------------------------------------------------------------------------------- reading


def read_weights(source):
    """{name: tensor} of a file, or of all weight files of a folder. Names lose what wrappers put before them."""
    from model.checkpoint import weight_files

    if source.is_dir():
        pickles = sorted(source.glob("pytorch_model*.bin")) + sorted(source.glob("*.pth"))
        safe = any((source / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
        files = weight_files(source) if safe or not pickles else pickles
        if not safe and len(files) > 1 and not all(re.search(r"-\d+-of-\d+\.bin$", file.name) for file in files):
            raise UserError(f"{source} holds several files with weights ({files[0].name}, {files[1].name}); name one")
    else:
        files = [source]
    state = {}
    for file in files:
        state |= read_file(file)
    return {name.removeprefix("_orig_mod.").removeprefix("module."): tensor for name, tensor in state.items()
            if not COMPUTED.fullmatch(name)}


def read_file(path):
    """{name: tensor} of one file. UserError for a pickle that holds more than tensors, and for a damaged file."""
    import pickle
    import warnings

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")      # its error says the same
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wants = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.[\w.]+)", str(error))
        if wants:
            raise UserError(f"{path}: refused, nothing was run: beside tensors it asks for {wants[1]}, and such a "
                            "pickle can run code when loaded; get safetensors, or a file with the state dict only"
                            ) from None
        raise UserError(f"{path} is no file of weights that can be read safely, or it is damaged") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, cut short or no file of weights ({one_line(error)})") from None
    for key in ("model", "state_dict"):                 # what training saves to continue holds the weights as one entry
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dict, names with their tensors")
    return state


def one_line(error):
    return str(error).split("\n")[0][:200]


# ------------------------------------------------------------------------------------------ MiniMind → folder


def model_to_folder(state, source, out, cfg):
    """Write the weights as a checkpoint folder. Returns what to tell."""
    import torch

    from model.checkpoint import hf_tensors, save_folder
    from model.config import ModelConfig
    from model.tokenizer import Tokenizer
    from model.transformer import CausalLM

    tokenizer = Tokenizer.load(tokenizer_folder(source, cfg))
    described = read_config(source, cfg)
    try:
        config = ModelConfig.from_hf(hf_config(state, described, source))
        with torch.device("meta"):                      # shapes only
            wanted = hf_tensors(CausalLM(config).state_dict(), config.tie_word_embeddings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    head = state.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise UserError(f"{source}: lm_head.weight differs from model.embed_tokens.weight, but the model ties them")
    for name in wanted.keys() | state.keys():
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            found, asked = (tuple(side[name].shape) if name in side else "nothing" for side in (state, wanted))
            raise UserError(f"{source}: tensor {name} is {found}, the model that the others make has {asked} there; it "
                            "is another architecture, or --config is needed")
    save_folder(out, config.to_hf(), state, tokenizer, getattr(torch, cfg.dtype),
                card=f"# {out.name}\n\nConverted from {source.name}, weights of MiniMind's format.\n")
    count = sum(tensor.numel() for tensor in state.values())
    return (f"{out}: {config.to_hf()['architectures'][0]}, {count / 1e6:.1f}M parameters, {cfg.dtype}\n"
            f"Talk to it:  python scripts/chat.py --model {out}")


def tokenizer_folder(source, cfg):
    """The folder of the tokenizer: --tokenizer (tokenizer.json stands for its folder), or the folder of the weights."""
    if cfg.tokenizer:
        path = pathlib.Path(cfg.tokenizer)
        return path.parent if path.is_file() else path
    if source.is_dir() and any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return source
    raise UserError(f"{source} comes without a tokenizer; give --tokenizer, the folder with the tokenizer.json that "
                    "the model was trained with (in MiniMind's repository: model)")


def read_config(source, cfg):
    """What describes the weights, as a dict: --config, config.json in the folder, NAME.json beside a file, or {}."""
    path = pathlib.Path(cfg.config) if cfg.config else (
        source / "config.json" if source.is_dir() else source.with_suffix(".json"))
    if not path.is_file() and not cfg.config:
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} must hold one JSON object")
    return described


def hf_config(state, described, source):
    """config.json for these weights: `described` where it names a class of Hugging Face, else made of the shapes and
    of what MiniMind's own config.json, or its code, says."""
    if described.get("model_type", "minimind") != "minimind":
        return described
    if "tok_embeddings.weight" in state:
        raise UserError("the names are those of MiniMind before April 2025 (tok_embeddings, attention.wq), with "
                        "another rotary embedding; later weights are called model.embed_tokens …")
    first = "model.layers.0."
    missing = [name for name in ("model.embed_tokens.weight", first + "self_attn.q_proj.weight",
                                 first + "self_attn.k_proj.weight") if name not in state]
    if missing:
        raise UserError(f"there is no tensor {missing[0]}: these are not the weights of a language model of MiniMind")
    norm, sparse = first + "self_attn.q_norm.weight" in state, first + "mlp.gate.weight" in state
    if any(".shared_experts." in name for name in state):
        raise UserError("a mixture with shared experts behind a softmax router. No class of Hugging Face computes "
                        "that: Qwen3-MoE has no shared experts and Dots1 routes by sigmoid")
    told = (MINIMIND_WITH_NORM if norm else MINIMIND) | described
    wrong = [key for key in MINIMIND if not isinstance(told[key], (int, float)) or told[key] < 0]
    if wrong:
        raise UserError(f"config.json: {wrong[0]} is {told[wrong[0]]!r}; it must be a number")
    V, D = state["model.embed_tokens.weight"].shape
    queries, keys = (len(state[f"{first}self_attn.{name}_proj.weight"]) for name in "qk")
    d = len(state[first + "self_attn.q_norm.weight"]) if norm else queries // told["num_attention_heads"]
    if queries % d or keys % d:
        raise UserError(f"{queries} rows of queries and {keys} of keys do not fit {told['num_attention_heads']} heads; "
                        "give --config, the model's config.json")
    if sparse and told["num_experts_per_tok"] == 1 and told["norm_topk_prob"]:
        raise UserError("a mixture that uses one expert a token, with its gate divided by itself, so that it is always "
                        "1; the routers here do not compute that (another number of experts a token: --config FILE "
                        'with {"num_experts_per_tok": 2})')
    mlp = first + ("mlp.experts.0." if sparse else "mlp.") + "gate_proj.weight"
    hf = {"model_type": "qwen3_moe" if sparse else "qwen3" if norm else "llama", "vocab_size": V, "hidden_size": D,
          "intermediate_size": len(state[mlp]) if mlp in state else 0,
          "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers.")),
          "num_attention_heads": queries // d, "num_key_value_heads": keys // d, "head_dim": d,
          "hidden_act": told.get("hidden_act", "silu"), "rope_scaling": told.get("rope_scaling"),
          "rope_theta": float(told["rope_theta"]), "rms_norm_eps": told["rms_norm_eps"],
          "max_position_embeddings": told["max_position_embeddings"],
          "tie_word_embeddings": told.get("tie_word_embeddings", True)}
    if sparse:
        hf |= {"num_experts": len(state[first + "mlp.gate.weight"]), "moe_intermediate_size": hf["intermediate_size"],
               "num_experts_per_tok": told["num_experts_per_tok"], "norm_topk_prob": told["norm_topk_prob"]}
    return hf


def adapter_to_folder(state, source, out, cfg):
    """Write MiniMind's LoRA, which adds B A x to W x, as an adapter folder. Returns what to tell."""
    import torch

    from model.adapters.adapted import AdapterConfig, attach, holders, linear_layers
    from model.adapters.folder import save_adapter
    from model.checkpoint import load_causal_lm

    base = base_folder(source, cfg)
    layers = {}                                         # {path of the layer: {"A": (r, in), "B": (out, r)}}
    for name, tensor in state.items():
        match = LORA.fullmatch(name)
        if not match:
            raise UserError(f"{source}: {name} is no part of a LoRA; a file holds either a model or a LoRA")
        layers.setdefault(match[1], {})[match[2]] = tensor
    ranks = {len(parts["A"]) for parts in layers.values() if "A" in parts}
    model = load_causal_lm(base)
    known = linear_layers(model)
    for path, parts in layers.items():
        weight = known[path].weight if path in known else None
        fits = weight is not None and parts.keys() == {"A", "B"} and len(ranks) == 1 and (
            len(parts["B"]), parts["A"].shape[1]) == weight.shape and parts["B"].shape[1] == len(parts["A"])
        if not fits:
            raise UserError(f"{source}: its factors for {path} do not fit {base}; it is for another model")
    rank = ranks.pop()
    attach(model, AdapterConfig("lora", rank=rank, alpha=rank, targets=",".join(layers)))
    for path, module in holders(model).items():
        for factor in "AB":
            getattr(module.adapters["default"], f"lora_{factor}").weight.data = layers[path][factor].to(
                getattr(torch, cfg.dtype))
    save_adapter(out, model, base=base, card=f"# {out.name}\n\nConverted from {source.name}, a LoRA of MiniMind's.\n")
    return (f"{out}: LoRA of rank {rank} on {len(layers)} layers, {cfg.dtype}\n"
            f"Talk to it:  python scripts/chat.py --model {base} --adapter {out}")


def base_folder(source, cfg):
    """--base, or the folder that an adapter names as its base."""
    named = cfg.base
    if not named and (source / "adapter_config.json").is_file():
        from model.adapters.folder import read_adapter_config
        named = read_adapter_config(source).get("base_model_name_or_path") or ""
    if not named or not pathlib.Path(named).is_dir():
        raise UserError(f"--base {named or '?'}: {source} is a LoRA; give the checkpoint folder of the model that "
                        "it is for (weights of MiniMind are converted first)")
    return named


# ------------------------------------------------------------------------------------------ folder → MiniMind


def model_to_minimind(source, out, cfg):
    """Write a checkpoint folder as MiniMind's state dict. Returns what to tell."""
    import torch

    from model.checkpoint import hf_tensors, load_causal_lm

    model = load_causal_lm(source)
    config = model.config
    family = config.family()
    reason = (f"MiniMind has no {family}" if family not in ("llama", "qwen3", "qwen3_moe")
              else "MiniMind's layers have no biases" if config.qkv_bias or config.o_bias or config.mlp_bias
              else "MiniMind knows no sliding window" if config.sliding_window
              else "MiniMind's rope scaling is a fixed one" if config.rope_scaling else "")
    if reason:
        raise UserError(f"{source}: {reason}; it would compute something else there")
    arguments = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
                 "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
                 "head_dim": config.head_dim, "intermediate_size": config.intermediate_size,
                 "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings,
                 "rope_theta": config.rope_theta, "rms_norm_eps": config.rms_norm_eps,
                 "tie_word_embeddings": config.tie_word_embeddings, "use_moe": bool(config.num_experts)}
    if config.num_experts:
        arguments |= {"num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
                      "moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob}
    dtype = getattr(torch, cfg.dtype)
    tensors = hf_tensors(model.state_dict(), tied=False)                   # MiniMind stores the tied head, too
    save_pth(out, {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()})
    beside = out.with_suffix(".json")
    beside.write_text(json.dumps({"model_type": "minimind", **arguments}, indent=2) + "\n", encoding="utf-8")
    return (f"{out}: {cfg.dtype}, names and layout of MiniMind's {'minimind-3' if config.qk_norm else 'MiniMind2'}\n"
            f"{beside}: the arguments of MiniMindConfig; those that differ from its defaults must be given to it")


def adapter_to_minimind(source, out, cfg):
    """Write an adapter folder as MiniMind's LoRA: for every square layer A and B, with the scale inside B."""
    import torch

    from model.adapters.adapted import holders, linear_layers
    from model.adapters.folder import load_adapter
    from model.adapters.lora import LoRA as Factors
    from model.checkpoint import load_causal_lm

    base = base_folder(source, cfg)
    model = load_causal_lm(base)
    square = {path: layer.weight.shape[0] for path, layer in linear_layers(model).items()
              if layer.weight.shape[0] == layer.weight.shape[1]}
    config = load_adapter(model, source)
    held = {path: module.adapters["default"] for path, module in holders(model).items()}
    merge = f"merge it (scripts/merge_lora.py --model {base} --adapter {source}) and convert the model"
    if config.modules_to_save or not all(isinstance(part, Factors) and part.lora_magnitude_vector is None
                                         for part in held.values()):
        raise UserError(f"{source}: MiniMind has plain LoRA only, and this is more than that; {merge}")
    outside = sorted(held.keys() - square.keys())
    if outside or len({part.rank for part in held.values()}) > 1:
        why = f"{outside[0]} is not square" if outside else "its layers have different ranks"
        raise UserError(f"{source}: MiniMind puts LoRA of one rank on its square layers only, and {why}; {merge}")
    rank, dtype, state = next(iter(held.values())).rank, getattr(torch, cfg.dtype), {}
    for path, width in square.items():                  # a layer without an adapter gets one that adds nothing
        part = held.get(path)
        A = part.lora_A.weight.data if part else torch.zeros(rank, width)
        B = part.scale * part.lora_B.weight.data if part else torch.zeros(width, rank)
        state |= {f"{path}.lora.A.weight": A.to(dtype), f"{path}.lora.B.weight": B.to(dtype)}
    save_pth(out, state)
    return f"{out}: LoRA of rank {rank}, which must be given to MiniMind's apply_lora, {cfg.dtype}"


def save_pth(path, state):
    """Write a state dict in PyTorch's own format, the file whole or not at all."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        torch.save(state, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
