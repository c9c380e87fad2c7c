"""A checkpoint is a Hugging Face folder: nothing to convert, in either direction.

    config.json               the shape (model/config.py)
    model.safetensors         the weights under their Hugging Face names; never pickled. Above 5 GB: several files
                              model-00001-of-0000N.safetensors, and model.safetensors.index.json says what is where
    generation_config.json    ids that begin, end and pad a text
    tokenizer.json …          written by Tokenizer.save
    README.md                 the model card

**Saving is all or nothing**, although it is many files and the folder may hold a checkpoint already:

    1. every new file is written into  folder/.saving/  and flushed to the disk (fsync)
    2. folder/.saving is renamed to  folder/.saved       <- the one instant at which the new checkpoint exists
    3. its files are moved into the folder, replacing the old ones; old shards are removed; folder/.saved is removed

Interrupted before 2, the old checkpoint is untouched and .saving is rubbish that the next save clears. Interrupted
after 2, whoever loads or saves next here finishes step 3 first (`finish_save`).

**Loading is strict**: every tensor of the model must be in the files with its exact shape, and nothing else may be.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import ModelConfig
from model.errors import UserError
from model.heads import ScalarModel
from model.quantize import packed_weights, quantize_model
from model.tokenizer import Tokenizer
from model.transformer import CausalLM

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt")
CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors")
# Rotation speeds follow from config.json; transformers before 4.32 stored them all the same.
RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


# ------------------------------------------------------------------------------------------------ names


def hf_tensors(state: dict, tied: bool) -> dict:
    """A model's state dict under Hugging Face names. The values are views: writing to them fills the model.

    Two differences only. Stacked experts (E, …) become one tensor per expert,
    `….mlp.experts.gate_proj` -> `….mlp.experts.0.gate_proj.weight` …; and a tied `lm_head.weight` is not stored.
    """
    named = {}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        prefix, experts, projection = name.partition(".mlp.experts.")
        if experts:
            for expert, weight in enumerate(tensor.unbind()):
                named[f"{prefix}.mlp.experts.{expert}.{projection}.weight"] = weight
        else:
            named[name] = tensor
    return named


def hf_config(model) -> dict:
    """config.json of a model; with a scalar head that of transformers' classifier with one label."""
    hf = model.config.to_hf()
    if isinstance(model, ScalarModel):
        names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in hf["architectures"]]
        hf.update(architectures=names, id2label={"0": "reward"}, label2id={"reward": 0})
    return hf


# ----------------------------------------------------------------------------------------------- saving


def save_model(folder, model, tokenizer=None, dtype=None, card="", max_shard_bytes=5_000_000_000, weights=None):
    """Write `model` (a CausalLM or a ScalarModel) as a Hugging Face folder, all or nothing.

    tokenizer  saved along; None leaves the tokenizer files of the folder as they are
    dtype      of the stored weights; None = as they are in memory
    card       text of README.md, the model card; "" leaves the old one
    weights    its state dict, where the tensors in the model itself are not whole (trainer/parallel.py)
    Other files in the folder are not touched. UserError when it cannot be written.
    """
    if packed_weights(model):
        raise UserError(f"{folder}: a quantized model is not saved as a folder; save its adapter, or load it without "
                        "--quantize")
    tensors = hf_tensors(weights or model.state_dict(), model.config.tie_word_embeddings)
    save_folder(folder, hf_config(model), tensors, tokenizer, dtype, card, max_shard_bytes)


def save_folder(folder, hf_config, tensors, tokenizer=None, dtype=None, card="", max_shard_bytes=5_000_000_000):
    """`save_model` for anything that has a Hugging Face config (dict) and tensors under Hugging Face names."""
    folder = Path(folder)
    hf_config = dict(hf_config)
    ends = hf_config.get("eos_token_id")
    if tokenizer is not None:
        check_vocabulary(tokenizer, hf_config["vocab_size"], folder)
        hf_config.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        ends = list(tokenizer.stop_ids)
    generation = {"bos_token_id": hf_config.get("bos_token_id"), "eos_token_id": ends,
                  "pad_token_id": hf_config.get("pad_token_id")}
    stored = {name: stored_copy(name, tensor, dtype) for name, tensor in tensors.items()}
    hf_config["torch_dtype"] = str(dtype or next(iter(stored.values())).dtype).removeprefix("torch.")

    def write(new):
        save_weights(new, stored, max_shard_bytes)
        write_json(new / "config.json", hf_config)
        write_json(new / "generation_config.json", {key: ids for key, ids in generation.items() if ids is not None})

    replace_files(folder, write, tokenizer, card)


def replace_files(folder, write, tokenizer=None, card=""):
    """Put the files that `write(new)` writes into an empty folder, tokenizer and card into `folder`, all or nothing."""
    folder = Path(folder)
    new = folder / ".saving"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_save(folder)
        for left_over in (new, folder / ".saved"):
            shutil.rmtree(left_over, ignore_errors=True)
        new.mkdir()
        write(new)
        if tokenizer is not None:
            tokenizer.save(new)
        if card:
            (new / "README.md").write_text(card, encoding="utf-8")
        write_json(new / "files.json", sorted(path.name for path in new.iterdir()))
        for path in new.iterdir():
            shutil.copymode(new / "files.json", path)       # safetensors lets nobody but its owner read its files
            flush(path)
        flush(new)
        os.replace(new, folder / ".saved")      # from here on the new checkpoint is the one that loads
        finish_save(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save the model to {folder}: {error}; what was there before still loads") from error


def stored_copy(name, tensor, dtype):
    """The tensor as it goes to the file. The router's bias keeps float32, as transformers keeps it."""
    keeps = dtype is None or not tensor.is_floating_point() or name.endswith("e_score_correction_bias")
    return tensor.detach().to("cpu", None if keeps else dtype).contiguous()


def save_weights(folder, tensors, max_shard_bytes):
    """One model.safetensors, or numbered shards of at most `max_shard_bytes` and the index of what is where."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > max_shard_bytes and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def finish_save(folder):
    """Step 3 of saving, also after an interruption: move the files of folder/.saved into the folder. Repeatable."""
    folder = Path(folder)
    done = folder / ".saved"
    listing = done / "files.json"
    if not listing.is_file():
        return
    files = [Path(file).name for file in json.loads(listing.read_text(encoding="utf-8"))]    # never outside the folder
    for file in sorted(files, key=lambda file: file in ("config.json", "adapter_config.json")):     # those last
        with suppress(FileNotFoundError):       # moved already, before an interruption or by another rank just now
            os.replace(done / file, folder / file)
    for path in folder.iterdir():               # what the previous checkpoint had and this one has not
        stale = (WEIGHT_FILE.fullmatch(path.name) or path.name in CONFIG_FILES
                 or (path.name in TOKENIZER_FILES and "tokenizer_config.json" in files))
        if stale and path.name not in files:
            path.unlink(missing_ok=True)
    flush(folder)
    shutil.rmtree(done, ignore_errors=True)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(path):
    """Make sure that a file, or on POSIX the names in a folder, survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- loading


def load_model(folder, device="cpu", dtype=torch.float32, rope_scaling="", quantize="none", adapter=""):
    """Read a Hugging Face folder -> (CausalLM in eval mode, Tokenizer). UserError says what is wrong, and where.

    rope_scaling "yarn:4" or "linear:4" reads a context 4 times as long as trained (`ModelConfig.stretched`).
    quantize "int8", "int4" or "nf4" packs the weights of the blocks (model/quantize.py), from what the files hold.
    adapter: folders of adapters, by commas, to attach under their names; the first is in use (model/adapters/).
    """
    model = load_causal_lm(folder, device, dtype, rope_scaling, quantize)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    if adapter:
        from model.adapters.folder import load_adapters  # here: that module imports this one
        load_adapters(model, adapter)
    return model, tokenizer


def load_causal_lm(folder, device="cpu", dtype=torch.float32, rope_scaling="", quantize="none"):
    """The model of a folder without its tokenizer."""
    hf = read_config(folder)
    for architecture in hf.get("architectures") or []:
        if not architecture.endswith("ForCausalLM"):
            raise UserError(f"{folder}: config.json says {architecture}; needed here is a language model, …ForCausalLM")
    with torch.device("meta"):                  # shapes only: no memory, no random numbers
        model = CausalLM(parse_config(hf, folder).stretched(rope_scaling)).to(dtype)
    fill(model, folder, device, quantize)
    return model.eval()


def load_reward_model(folder, device="cpu", dtype=torch.float32, quantize="none", rope_scaling=""):
    """Read a folder -> (ScalarModel in eval mode, Tokenizer): a reward model, or the beginning of one.

    Of …ForSequenceClassification with one label everything is read; of a language model the decoder, and the head is
    fresh.
    """
    hf = read_config(folder)
    names = hf.get("architectures") or []
    labels = len(hf["id2label"]) if "id2label" in hf else hf.get("num_labels", 2)      # as transformers counts them
    fresh_head = all(name.endswith("ForCausalLM") for name in names)
    if not fresh_head and not all(name.endswith("ForSequenceClassification") for name in names):
        raise UserError(f"{folder}: config.json says {names[0]}; needed here is a reward model, "
                        "…ForSequenceClassification with one label, or a language model, …ForCausalLM, to make one of")
    if not fresh_head and labels != 1:
        raise UserError(f"{folder}: a classifier with {labels} labels (config.json); a reward model has one")
    with torch.device("meta"):
        model = ScalarModel(parse_config(hf, folder).stretched(rope_scaling)).to(dtype)
    fill(model, folder, device, quantize, fresh_head)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    return model.eval(), tokenizer


def load_config(folder) -> ModelConfig:
    """The ModelConfig that folder/config.json describes."""
    return parse_config(read_config(folder), folder)


def read_config(folder) -> dict:
    """folder/config.json as a dict, with a clear line for each way in which a folder is not a checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}: expected a folder with config.json and model.safetensors")
    finish_save(folder)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds an adapter, not a model: give it as --adapter, its base model as --model")
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(hf, dict):
        raise UserError(f"{path} must hold one JSON object")
    return hf


def parse_config(hf, folder):
    try:
        return ModelConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def fill(model, folder, device="cpu", quantize="none", fresh_head=False):
    """Give a model that was built on the meta device memory on `device`, and the weights of the folder, strictly.

    quantize: matrix after matrix is read, packed and dropped, so that memory never holds more than one of them whole.
    fresh_head: the folder holds a language model, whose head is left there; that of `model` is initialised.
    """
    with ExitStack() as files:
        source = {}                             # tensor name -> (open file, its path)
        for path in weight_files(Path(folder)):
            opened = files.enter_context(open_weights(path))
            for name in opened.keys():          # noqa: SIM118 (not a dict)
                source[name] = opened, path
        if fresh_head:
            source.pop("lm_head.weight", None)
        model.fingerprint = fingerprint(source)
        tied = model.config.tie_word_embeddings and not isinstance(model, ScalarModel)
        wanted = hf_tensors(model.state_dict(), tied)
        check_names({name: tensor for name, tensor in wanted.items() if not (fresh_head and name == "score.weight")},
                    source, tied, folder)

        def read(name):
            """A weight of the model as the files have it, experts stacked."""
            parts = hf_tensors({name: model.get_parameter(name)}, tied)
            tensors = [source[part][0].get_tensor(part).to(device) for part in parts]
            return torch.stack(tensors) if ".experts." in name else tensors[0]

        quantize_model(model, quantize, read)
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
        if tied:                                # that has given each module its own memory
            model.lm_head.weight = model.model.embed_tokens.weight
        if fresh_head:
            model.init_head()
        for name, tensor in hf_tensors(model.state_dict(), tied).items():
            if name in source:                  # all but a fresh head
                tensor.copy_(source[name][0].get_tensor(name))
        if tied and "lm_head.weight" in source:
            opened, path = source["lm_head.weight"]
            embedding = opened.get_tensor("lm_head.weight").to(model.lm_head.weight)
            if not torch.equal(embedding, model.lm_head.weight):
                raise UserError(f"{path}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
                                "tie_word_embeddings; set it to false to use both")


def fingerprint(source):
    """A hash that tells the decoders of two folders apart; `source` as in `fill`.

    It is taken of the middle row of each tensor in bfloat16, hence quickly, and the same for a copy in bfloat16. Heads
    are left out: a reward model grows its own on the decoder that an adapter is for.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in source if name.startswith("model.") and not RECOMPUTED.fullmatch(name)):
        tensor = source[name][0].get_slice(name)
        rows = tensor.get_shape()[0]
        digest.update(f"{name} {tensor.get_shape()}".encode())
        digest.update(tensor[rows // 2:rows // 2 + 1].bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def weight_files(folder):
    """The safetensors files of a folder: model.safetensors, or the shards that the index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error!r}); download it again") from error
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            raise UserError(f"{index} names {absent[0]}, which is not in the folder; download the folder again")
        return [folder / file for file in files]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pth"))
    if pickles:
        raise UserError(f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded; convert "
                        "them once, safely, with scripts/convert_model.py")
    raise UserError(f"{folder} has no model.safetensors: it is not a Hugging Face model folder, or not complete")


def open_weights(path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); save or download it again") from error


def check_names(wanted, source, tied, folder):
    """UserError for the first tensor that is missing, of another shape, or not part of the model."""
    for name, tensor in wanted.items():
        if name not in source:
            raise UserError(f"{folder}: tensor {name} {tuple(tensor.shape)} is missing from the weights; config.json "
                            "describes another model, or a file is missing")
        opened, path = source[name]
        shape = tuple(opened.get_slice(name).get_shape())
        if shape != tuple(tensor.shape):
            raise UserError(f"{path}: tensor {name} has shape {shape}; config.json asks for {tuple(tensor.shape)}")
    for name, (_, path) in source.items():
        if name not in wanted and not (tied and name == "lm_head.weight") and not RECOMPUTED.fullmatch(name):
            raise UserError(f"{path}: tensor {name} is no part of the model that config.json describes; loading "
                            "without it would compute something else")


def check_vocabulary(tokenizer, vocab_size, folder):
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds only "
                        f"{vocab_size}; they do not belong together")
