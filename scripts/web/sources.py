"""Where answers come from: checkpoint folders and adapters found on the disk, and the engines that run them."""

import json
import os
import pathlib
from dataclasses import dataclass

import streamlit as st

from model.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEEPEST = 6              # folders below the one that is searched
LOADED_AT_ONCE = 3       # models kept in memory; the one that was loaded first leaves


@dataclass(frozen=True)
class Loaded:
    """A model in this process. adapter: the name by which the engine knows the one attached, "" for none."""
    model: object
    tokenizer: object
    engine: object
    adapter: str


def place(path):
    """A path from the command line: as it stands, or, where that does not exist, within the project."""
    path = pathlib.Path(path).expanduser()
    return path if path.exists() or path.is_absolute() else ROOT / path


def shown(path):
    """A path as people write it: relative to the project where it lies inside."""
    path = pathlib.Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def walk(folders):
    """(folder, names of its files) of everything below `folders`, resumable training states left out."""
    for top in folders:
        for folder, inner, files in os.walk(top):
            depth = len(pathlib.Path(folder).relative_to(top).parts)
            inner[:] = sorted(name for name in inner if name != "resume" and not name.startswith(".")) \
                if depth < DEEPEST else []
            yield pathlib.Path(folder), set(files)


@st.cache_data(ttl=10, show_spinner=False)
def find(folders):
    """(checkpoints, adapters) under folders (a tuple of paths): two lists of paths, nearest to the top first.

    Only language models with a tokenizer count as checkpoints: a reward model cannot chat.
    """
    checkpoints, adapters = [], []
    for folder, files in walk(folders):
        if "adapter_config.json" in files and "adapter_model.safetensors" in files:
            adapters.append(str(folder))
        if "config.json" in files and files & {"model.safetensors", "model.safetensors.index.json"} and \
                files & {"tokenizer.json", "tokenizer.model"} and is_language_model(folder / "config.json"):
            checkpoints.append(str(folder))
    order = {"key": lambda path: (len(pathlib.Path(path).parts), path)}
    return sorted(checkpoints, **order), sorted(adapters, **order)


def is_language_model(path):
    """Whether a config.json is readable and names an architecture …ForCausalLM."""
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return all(str(name).endswith("ForCausalLM") for name in names)


def load(folder, adapter, cfg):
    """The `Loaded` of a checkpoint folder and, if not "", an adapter folder, with cfg's device, dtype, quantization.

    Kept between calls and shared by all visitors; loaded anew when its files have changed. UserError as `load_model`.
    """
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; train a model, or name another")
    changed = max((path.stat().st_mtime for name in filter(None, (folder, adapter))
                   for path in pathlib.Path(name).glob("*.safetensors")), default=0)
    return load_once(folder, adapter, changed, cfg.device, cfg.dtype, cfg.quantize, cfg.rope_scaling)


@st.cache_resource(max_entries=LOADED_AT_ONCE, show_spinner=False,
                   on_release=lambda loaded: loaded.engine.close(drain=False))
def load_once(folder, adapter, changed, device, dtype, quantize, rope_scaling):
    from model.checkpoint import load_model
    from model.device import pick_device, pick_dtype
    from model.engine import Engine
    device = pick_device(device)
    model, tokenizer = load_model(folder, device, pick_dtype(dtype, device), rope_scaling, quantize, adapter)
    return Loaded(model, tokenizer, Engine(model, tokenizer), next(iter(model.adapters), ""))
