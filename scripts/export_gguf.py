"""Write a checkpoint as one GGUF file, for llama.cpp, Ollama, LM Studio and whatever else reads that format.

A GGUF file holds everything: the shape as key-value pairs, the tokenizer (its pieces, merges and special ids), the chat
template and the weights, in float32, in float16, or in 8 bits (q8_0: 32 weights of a row share a float16 scale). The
format is written by the `gguf` package of the llama.cpp project; what is here is what to write:

    names        model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight, by the package's own table
    Llama        rotates neighbours (0,1)(2,3)… where Hugging Face rotates halves (0,d/2)(1,d/2+1)…, so the rows of Q
                 and K change places; Mistral is the same architecture there. The Qwens are left as they are
    Dots1        knows no grouped queries there: each key/value head is repeated for the query heads that it serves
    rope         linear and YaRN as keys; Llama 3's as a tensor of one factor a pair

Only what llama.cpp computes as this project does is written; anything else is refused with the reason. With a chat
template of this project, a Modelfile for Ollama says the same in Go's template language.

reads   a checkpoint folder
writes  OUT/NAME-TYPE.gguf, OUT/NAME-TYPE.Modelfile
run     python scripts/export_gguf.py                                            out/full_sft in float16
        python scripts/export_gguf.py --model out/grpo --type q8_0
        ollama create my-model -f out/gguf/full_sft-f16.Modelfile && ollama run my-model
        llama-cli -m out/gguf/full_sft-f16.gguf
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

import json
import os
import re
from dataclasses import dataclass, replace

from model.cli import arg, parse_args
from model.errors import UserError, run

# torch and gguf take seconds to import: the functions that need them import them, so that --help answers at once.

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT_MODEL, DEFAULT_OUT = "out/full_sft", "out/gguf"


@dataclass
class Config:
    model: str = arg(DEFAULT_MODEL, "checkpoint folder")
    out: str = arg(DEFAULT_OUT, "folder for the files")
    type: str = arg("f16", "number format of the weights: 4, 2 or about 1 byte each", choices=("f32", "f16", "q8_0"))
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    overwrite: bool = arg(False, "replace files of the same name")


ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
                 "dots1": "dots1"}                    # Hugging Face's model_type: llama.cpp's name

# What cuts a text before the merges, in tokenizer.json, and llama.cpp's name for it; whether a word that is in the
# vocabulary is taken whole, without merges (ignore_merges), goes with the name.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {((CONTRACTIONS + r"\p{N}" + REST,), False): "qwen2",
                  ((CONTRACTIONS + r"\p{N}{1,3}" + REST,), True): "llama-bpe",
                  (("GPT-2",), False): "gpt-2",
                  (("each digit", "GPT-2"), False): "smollm"}

# The chat template of this project (model/vocab/chatml.jinja) in Go, for Ollama, which joins all system messages into
# .System. JSON comes without the spaces that Python writes. Ollama asks a model that can think to think unless it is
# told otherwise; thinking here means what enable_thinking=None does, that the model decides.
CHATML = """\
{{- $asked := -1 }}
{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}{{ $asked = $i }}{{ end }}{{ end }}
{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}
{{- if .System }}

{{ end }}Tools:
{{ range .Tools }}{{ . }}
{{ end }}Call one with <tool_call>{"name": ..., "arguments": {...}}</tool_call>
{{- end }}<|im_end|>
{{ end }}
{{- range $i, $m := .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if gt $i $asked }}{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ end }}{{ .Content }}
{{- range $n, $call := .ToolCalls }}{{ if or $m.Content (gt $n 0) }}
{{ end }}<tool_call>{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}</tool_call>
{{- end }}<|im_end|>
{{ else if eq .Role "tool" }}<|im_start|>tool
<tool_response>{{ .Content }}</tool_response><|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
{{ if and $.IsThinkSet (not $.Think) }}<think>

</think>

{{ end }}"""


def main(cfg):
    from model.checkpoint import load_model, read_config

    folder = ROOT / cfg.model if cfg.model == DEFAULT_MODEL else pathlib.Path(cfg.model)
    out = ROOT / cfg.out if cfg.out == DEFAULT_OUT else pathlib.Path(cfg.out)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds an adapter; merge it into its base model first: python scripts/merge_lora.py "
                        f"--model BASE --adapter {folder} --out FOLDER")
    read_config(folder)                                # says what is wrong with a folder, before its name is used
    name = folder.resolve().name
    path = out / f"{name}-{cfg.type}.gguf"
    recipe = path.with_suffix(".Modelfile")
    taken = [file for file in (path, recipe) if file.exists()]
    if taken and not cfg.overwrite:
        raise UserError(f"{taken[0]} exists; --overwrite replaces it, --out names another folder")
    model, tokenizer = load_model(folder, rope_scaling=cfg.rope_scaling)
    out.mkdir(parents=True, exist_ok=True)
    write_gguf(path, model, tokenizer, name, cfg.type)
    recipe.write_text(modelfile(path.name, model.config, tokenizer), encoding="utf-8", newline="\n")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {ARCHITECTURES[model.config.family()]} in {cfg.type}\n"
          f"{recipe}: ollama create {name} -f {recipe}")
    if tokenizer.chat_template and not is_chatml(tokenizer):
        print("The chat template is not this project's: llama.cpp reads it from the file, Ollama recognises the usual "
              "ones. If its answers look wrong, add a TEMPLATE to the Modelfile.")


# ------------------------------------------------------------------------------------------------- the file


def write_gguf(path, model, tokenizer, name, kind="f16"):
    """Write a CausalLM and its Tokenizer as the GGUF file `path`; kind "f32", "f16" or "q8_0".

    UserError, and no file, for what llama.cpp would compute differently.
    """
    import gguf

    config = model.config
    check(config)
    arch = ARCHITECTURES[config.family()]
    unfinished = path.with_name(path.name + ".unfinished")
    # The temporary file keeps converted weights out of memory, which holds the model itself in float32 already.
    writer = gguf.GGUFWriter(unfinished, arch, use_temp_file=True)
    try:
        writer.add_name(name)
        writer.add_file_type({"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                              "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
        if kind == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_shape(writer, config)
        write_tokenizer(writer, tokenizer, config.vocab_size)
        for tensor_name, array in tensors(model):
            add_tensor(writer, tensor_name, array, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)                   # a file under its final name is a whole one
    finally:
        unfinished.unlink(missing_ok=True)


def check(config):
    """UserError for a shape that llama.cpp has no architecture for, or whose architecture computes something else."""
    family = config.family()
    scaling = config.rope_scaling or {}
    if config.o_bias and family != "llama":
        raise UserError(f"llama.cpp's {ARCHITECTURES[family]} has no bias in the attention's output (attention_bias)")
    if family == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError("llama.cpp's qwen2 needs head_dim times num_attention_heads to be hidden_size")
    if family == "qwen3_moe" and not (config.norm_topk_prob and config.num_experts_per_tok > 1):
        raise UserError("llama.cpp's qwen3moe always divides the gates of the chosen experts by their sum; this model "
                        "does not (norm_topk_prob, or one expert per token)")
    if scaling.get("rope_type") == "llama3" and family != "llama":
        raise UserError(f"llama.cpp's {ARCHITECTURES[family]} has no Llama-3 rope scaling; yarn and linear it has")
    if scaling.get("rope_type") == "yarn" and not (
            (scaling.get("beta_fast") or 32) == 32 and (scaling.get("beta_slow") or 1) == 1
            and scaling.get("truncate", True)):
        raise UserError("llama.cpp does YaRN with beta_fast 32, beta_slow 1 and truncate only")


def write_shape(writer, config):
    """The keys that say how to compute."""
    import gguf

    family = config.family()
    context = config.max_position_embeddings
    if config.sliding_window:        # within the window attention is plain, and llama.cpp knows no window here
        context = min(context, config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads if family == "dots1" else config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] != "llama3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling and scaling["rope_type"] == "yarn":
        from model.transformer import rope_frequencies, yarn_temperature
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        temperature = rope_frequencies(config)[1]
        if temperature != yarn_temperature(scaling["factor"]):    # llama.cpp multiplies its own by this one
            writer.add_rope_scaling_attn_factors(temperature / yarn_temperature(scaling["factor"]))
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family == "dots1":
        writer.add_leading_dense_block_count(config.first_k_dense)
        writer.add_expert_shared_count(config.num_shared_experts)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob and config.num_experts_per_tok > 1)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


# -------------------------------------------------------------------------------------------------- weights


def tensors(model):
    """(GGUF name, float32 array in llama.cpp's layout) of each tensor of a CausalLM."""
    import gguf

    from model.transformer import rope_frequencies

    config = model.config
    family = config.family()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[family].upper()), config.num_hidden_layers)
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and family != "dots1":
            continue                                   # llama.cpp takes the embedding then; its dots1 does not
        layer = name.split(".")[-2]
        if ARCHITECTURES[family] == "llama" and layer in ("q_proj", "k_proj"):
            tensor = neighbours(tensor, d)
        if family == "dots1" and layer in ("k_proj", "v_proj"):
            tensor = tensor.view(K, d, -1).repeat_interleave(H // K, dim=0).reshape(H * d, *tensor.shape[1:])
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        if ".mlp.experts." in name:                    # stacked here as there: (E, F, D) and (E, D, F)
            name += ".weight"
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().cpu().numpy()
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain, _ = rope_frequencies(replace(config, rope_scaling=None))                        # (d/2,)
        yield "rope_freqs.weight", (plain / rope_frequencies(config)[0]).numpy()


def neighbours(tensor, d):
    """Rows of Q or K, weight (heads · d, D) or bias (heads · d,), from halves (0, d/2, …) to neighbours (0, 1, …)."""
    heads = len(tensor) // d
    return tensor.view(heads, 2, d // 2, -1).transpose(1, 2).reshape(tensor.shape)


def add_tensor(writer, name, array, kind):
    """Hand a tensor to the writer. Vectors and routers stay float32, as llama.cpp keeps them."""
    import gguf
    import numpy as np

    keep = array.ndim == 1 or "ffn_gate_inp" in name
    to = gguf.GGMLQuantizationType.F32 if keep else gguf.GGMLQuantizationType[kind.upper()]
    if to.name == "F16" and np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(f"{name} has values that float16 cannot hold; use --type f32")
    if to.name == "Q8_0" and array.shape[-1] % 32:
        raise UserError(f"{name} has rows of {array.shape[-1]} numbers and q8_0 needs a multiple of 32; use --type f16")
    writer.add_tensor(name, gguf.quants.quantize(array, to), raw_dtype=to)


# ------------------------------------------------------------------------------------------------ tokenizer


def write_tokenizer(writer, tokenizer, vocab_size):
    """Pieces, their kinds, merges or scores, special ids and chat template."""
    import gguf

    source = tokenizer.rule.source
    spec = json.loads(tokenizer.rule.data) if source.name == "tokenizer.json" else None
    byte_level = spec is not None and not tokenizer.rule.prefix_space and '"ByteLevel"' in json.dumps(spec["decoder"])
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]             # ids of the table that mean nothing
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    scores = [-10000.0] * vocab_size
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(spec, source))
        vocabulary = [(index, text, 0.0, gguf.TokenType.NORMAL) for text, index in spec["model"]["vocab"].items()]
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(tokenizer.rule.prefix_space)
        vocabulary = sentencepiece_file(source) if spec is None else sentencepiece_json(spec, source)
    for index, text, score, kind in vocabulary:
        pieces[index], scores[index], kinds[index] = text, score, kind
    for text, index in tokenizer.special.items():
        if kinds[index] != gguf.TokenType.UNKNOWN:
            hidden = tokenizer.decode([index]) == ""
            kinds[index] = gguf.TokenType.CONTROL if hidden else gguf.TokenType.USER_DEFINED
        pieces[index] = text
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    if not byte_level:
        writer.add_token_scores(scores)

    special = gguf.SpecialVocab(source.parent, load_merges=byte_level, n_vocab=vocab_size)
    special.chat_template = inference_template(tokenizer.chat_template)
    for role in ("bos", "eos", "pad", "unk"):          # the package looks them up in tokenizer.json only
        entry = tokenizer.config.get(f"{role}_token")
        text = entry["content"] if isinstance(entry, dict) else entry
        if text in tokenizer.special:
            special.special_token_ids[role] = tokenizer.special[text]
    special.add_to_gguf(writer, quiet=True)
    writer.add_eot_token_id(tokenizer.end_of_turn_id)


def inference_template(source):
    """A chat template without the marks of what to train on, `{% generation %}`, which not every reader knows."""
    return source and re.sub(r"(\{%-?\s*)(end)?generation(\s*-?%\})",
                             lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", source)


def pre_tokenizer(spec, path):
    """llama.cpp's name for what a byte-level tokenizer.json does to a text before the merges; UserError if it has none.

    NFC is passed over, as it is in Qwen's own files: text in decomposed letters is cut otherwise there.
    """
    normalizer, rule = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    steps = []
    for step in rule.get("pretokenizers", [rule]):
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            steps.append("each digit")
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            steps += ["GPT-2"] if step.get("use_regex", True) else []
        else:
            steps.append(step)
    known = next((name for (cuts, whole), name in PRE_TOKENIZERS.items()
                  if list(cuts) == steps and whole == spec["model"].get("ignore_merges", False)), None)
    if known is None or (normalizer and normalizer["type"] != "NFC"):
        raise UserError(f"{path}: it cuts text in a way that llama.cpp has no name for here (known are those of "
                        f"{', '.join(PRE_TOKENIZERS.values())})")
    return known


def sentencepiece_file(path):
    """(id, piece, score, kind) of the pieces of a tokenizer.model; UserError for one that llama.cpp cuts otherwise."""
    import gguf
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rows = [(index, text.decode(), score, kind)
            for index, (text, score, kind) in enumerate(gguf.SentencePieceVocab(path.parent).sentencepiece_tokens())]
    ranks = [score for _, _, score, kind in rows if kind == gguf.TokenType.NORMAL]
    if any(score != int(score) for score in ranks):
        raise UserError(f"{path}: a unigram model; llama.cpp's own cutting rule fits those of kind BPE only")
    if library.normalize("Ａ  b").strip("▁") != "Ａ▁▁b":
        raise UserError(f"{path}: changes characters or spaces of a text before cutting it, and llama.cpp does not")
    return rows


def sentencepiece_json(spec, path):
    """`sentencepiece_file` for a BPE that became a tokenizer.json (Llama 2, Mistral). The score of a piece: the earlier
    it is merged, the higher."""
    import gguf

    scores = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        scores.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), -float(rank))
    unknown = spec["model"].get("unk_token")
    for text, index in spec["model"]["vocab"].items():
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        kind = gguf.TokenType.BYTE if byte else gguf.TokenType.UNKNOWN if text == unknown else gguf.TokenType.NORMAL
        yield index, text, scores.get(text, -10000.0), kind


# -------------------------------------------------------------------------------------------------- Modelfile


def is_chatml(tokenizer):
    from model.tokenizer import CHATML as ours
    return tokenizer.chat_template == ours.read_text(encoding="utf-8")


def modelfile(gguf_name, config, tokenizer):
    """Text of a Modelfile: the file beside it, our chat template in Go, where to stop, and chat.py's sampling."""
    from scripts.chat import Config as Chat

    texts = {index: text for text, index in tokenizer.special.items()}
    chat = Chat()
    lines = [f"FROM ./{gguf_name}"]
    if not tokenizer.chat_template:
        lines += ['TEMPLATE """{{ .Prompt }}"""']      # it continues text
    elif is_chatml(tokenizer):
        lines += [f'TEMPLATE """{CHATML}"""']
    lines += [f"PARAMETER stop {json.dumps(texts[index], ensure_ascii=False)}" for index in tokenizer.stop_ids]
    settings = {"num_ctx": min(config.max_position_embeddings, 4096), "temperature": chat.temperature,
                "top_p": chat.top_p, "top_k": chat.top_k, "min_p": chat.min_p,
                "repeat_penalty": chat.repetition_penalty}
    lines += [f"PARAMETER {key} {value}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
