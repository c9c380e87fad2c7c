"""What shape a model has, and how that is written in a Hugging Face `config.json`.

The letters used in shape comments everywhere in this project:

    B batch   T tokens in a row   P prompt   C completion (T = P + C)   V vocabulary   D width
    H query heads   K key/value heads   d head dimension   F width inside the MLP   E experts
    G generations per prompt   N = B * G completions   S key slots (cached + new)
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError


@dataclass
class ModelConfig:
    vocab_size: int
    hidden_size: int                          # D
    intermediate_size: int                    # F
    num_hidden_layers: int
    num_attention_heads: int                  # H
    num_key_value_heads: int                  # K: each key/value head serves H / K query heads (GQA)
    head_dim: int = 0                         # d; 0 = D / H
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0               # base b of the rotary frequencies b^(-2i/d)
    rope_scaling: dict | None = None          # {"rope_type": "linear" | "yarn" | "llama3", "factor": ..., ...}
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True          # the output head is the embedding matrix
    qk_norm: bool = True                      # RMSNorm on every query and key head
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int = 0                   # a token sees only so many tokens, itself included; 0 = all
    initializer_range: float = 0.02
    # mixture of experts (model/moe.py); num_experts = 0 is a dense model
    num_experts: int = 0                      # E
    num_experts_per_tok: int = 2              # k
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0            # F of one routed expert
    router: str = "softmax"                   # "softmax" (auxiliary loss) or "sigmoid" (bias balancing)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense: int = 0                    # so many layers from the bottom keep a dense MLP
    aux_loss_coef: float = 0.0
    # ids that the tokenizer gives a meaning; -1 = none
    bos_token_id: int = -1
    eos_token_id: int = -1
    pad_token_id: int = -1
    # what a reward model or an evaluator says of itself besides its shape; transformers passes over these keys
    reward_mean: float = 0.0                  # μ and σ of its scores of held-out answers (model/heads.py)
    reward_std: float = 0.0                   # 0 = never measured
    judge_template: str = ""                  # the question that its yes or no answers (dataset/judgements.py)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise UserError(f"model config: {name} is {getattr(self, name)}; it must be at least 1")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}; change one of them")
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embeddings turn pairs of numbers")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(f"model config: num_experts_per_tok {self.num_experts_per_tok} must be between 1 and "
                            f"num_experts {self.num_experts}")
        if self.rope_scaling:
            self.rope_scaling = complete_scaling(self.rope_scaling, self.max_position_embeddings)

    def stretched(self, spec):
        """This shape for a context F times as long, without training: spec is "yarn:F", "linear:F", or "" for as is."""
        if not spec:
            return self
        kind, _, text = spec.partition(":")
        try:
            factor = float(text)
        except ValueError:
            factor = 0.0
        if kind not in ("yarn", "linear") or not 1 <= factor < float("inf"):
            raise UserError(f"rope scaling {spec!r}: expected yarn:F or linear:F with a factor F of at least 1")
        if self.rope_scaling:
            raise UserError(f"rope scaling {spec!r}: this model has one already ({self.rope_scaling['rope_type']})")
        trained = self.max_position_embeddings
        scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": trained}
        return dataclasses.replace(self, rope_scaling=scaling, max_position_embeddings=int(trained * factor))

    # ---------------------------------------------------------------------------------------- Hugging Face

    @classmethod
    def from_hf(cls, hf):
        """Read the dict of a `config.json` of the Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or Dots1 family.

        Raises UserError for a family or a feature that this decoder does not compute: a model that loads but
        computes something else is worse than one that does not load.
        """
        kind = hf.get("model_type")
        if kind not in FAMILIES:
            raise UserError(f"config.json: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
        hf = {**FAMILIES[kind], **{key: value for key, value in hf.items() if value is not None or key in NULLABLE}}
        if kind in MOE_REQUIRED and "num_local_experts" in hf:                    # how transformers 5 spells it
            hf.setdefault(MOE_REQUIRED[kind][0], hf["num_local_experts"])
        for key in REQUIRED + MOE_REQUIRED.get(kind, ()):
            if not isinstance(hf.get(key), int):
                raise UserError(f"config.json: {key} is {'missing' if key not in hf else 'not a whole number'}")
        if "quantization_config" in hf:
            raise UserError("config.json: the weights are quantized (quantization_config); use the original model")
        if hf["hidden_act"] not in ("silu", "swish"):
            raise UserError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported; the MLP here is SwiGLU")
        if hf.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
        bias = hf["attention_bias"] and kind in ("llama", "qwen3", "qwen3_moe", "dots1")
        theta, scaling = read_rope(hf)
        eos = hf.get("eos_token_id", -1)
        fields = dict(
            vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"], num_attention_heads=hf["num_attention_heads"],
            num_key_value_heads=hf["num_key_value_heads"] or hf["num_attention_heads"],
            head_dim=hf["head_dim"] or 0, max_position_embeddings=hf["max_position_embeddings"],
            rope_theta=theta, rope_scaling=scaling, rms_norm_eps=hf["rms_norm_eps"],
            tie_word_embeddings=hf["tie_word_embeddings"], initializer_range=hf["initializer_range"],
            qk_norm=kind in ("qwen3", "qwen3_moe", "dots1"), qkv_bias=bias or kind == "qwen2",
            o_bias=bias, mlp_bias=kind == "llama" and hf["mlp_bias"], sliding_window=read_window(hf),
            bos_token_id=hf.get("bos_token_id", -1), pad_token_id=hf.get("pad_token_id", -1),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
        )
        if kind == "qwen3_moe":
            if hf["decoder_sparse_step"] != 1 or hf["mlp_only_layers"]:
                raise UserError("config.json: decoder_sparse_step and mlp_only_layers are not supported; "
                                "every layer of a Qwen3-MoE must be sparse")
            fields.update(router="softmax", num_experts=hf["num_experts"],
                          num_experts_per_tok=hf["num_experts_per_tok"], norm_topk_prob=hf["norm_topk_prob"],
                          moe_intermediate_size=hf["moe_intermediate_size"], aux_loss_coef=hf["router_aux_loss_coef"])
        if kind == "dots1":
            if hf["n_group"] != 1 or hf["topk_group"] != 1:
                raise UserError("config.json: n_group and topk_group other than 1 (grouped routing) are not supported")
            fields.update(router="sigmoid", num_experts=hf["n_routed_experts"],
                          num_experts_per_tok=hf["num_experts_per_tok"], norm_topk_prob=hf["norm_topk_prob"],
                          num_shared_experts=hf["n_shared_experts"], moe_intermediate_size=hf["moe_intermediate_size"],
                          routed_scaling_factor=hf["routed_scaling_factor"], first_k_dense=hf["first_k_dense_replace"],
                          aux_loss_coef=hf["router_aux_loss_coef"])
        config = cls(**fields, **{name: hf[name] for name in SAID_OF_ITSELF if name in hf})
        if config.num_experts and config.norm_topk_prob and config.num_experts_per_tok == 1:
            raise UserError("config.json: norm_topk_prob with one expert per token makes every gate s/s = 1; "
                            "that is not supported")
        config.family()         # what is read can be written again
        return config

    def to_hf(self):
        """The `config.json` with which stock transformers computes the same model."""
        kind = self.family()
        hf = dict(
            architectures=[ARCHITECTURES[kind]], model_type=kind, vocab_size=self.vocab_size,
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads, head_dim=self.head_dim, hidden_act="silu",
            max_position_embeddings=self.max_position_embeddings, rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps, tie_word_embeddings=self.tie_word_embeddings,
            initializer_range=self.initializer_range, attention_bias=self.o_bias, attention_dropout=0.0,
            use_cache=True, sliding_window=self.sliding_window or None,
        )
        if self.rope_scaling:      # transformers 4 and 5 both read this spelling
            hf["rope_scaling"] = dict(self.rope_scaling)
        normalise = self.norm_topk_prob and self.num_experts_per_tok > 1      # as model/moe.py computes it
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            hf[name] = getattr(self, name) if getattr(self, name) >= 0 else None
        hf.update({name: getattr(self, name) for name in SAID_OF_ITSELF if getattr(self, name)})
        if kind == "llama":
            hf["mlp_bias"] = self.mlp_bias
        if kind in ("qwen2", "qwen3", "qwen3_moe"):
            hf.update(use_sliding_window=self.sliding_window > 0, max_window_layers=0)
        if kind == "qwen3_moe":
            hf.update(num_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok,
                      moe_intermediate_size=self.moe_intermediate_size, norm_topk_prob=normalise,
                      router_aux_loss_coef=self.aux_loss_coef, decoder_sparse_step=1, mlp_only_layers=[],
                      output_router_logits=False)
        if kind == "dots1":
            hf.update(n_routed_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok,
                      n_shared_experts=self.num_shared_experts, moe_intermediate_size=self.moe_intermediate_size,
                      norm_topk_prob=normalise, routed_scaling_factor=self.routed_scaling_factor,
                      first_k_dense_replace=self.first_k_dense, n_group=1, topk_group=1, max_window_layers=0,
                      router_aux_loss_coef=self.aux_loss_coef)      # the last one is ours; transformers ignores it
        return hf

    def family(self):
        """The Hugging Face model_type that computes this shape; UserError when there is none."""
        if self.num_experts:
            attention_fits = self.qk_norm and self.qkv_bias == self.o_bias and not self.mlp_bias
            if self.router == "softmax" and attention_fits and not (self.num_shared_experts or self.first_k_dense):
                return "qwen3_moe"
            if self.router == "sigmoid" and attention_fits and self.num_shared_experts:
                return "dots1"
            raise UserError("model config: these MoE settings fit no Hugging Face class; use router softmax with no "
                            "shared expert and no dense layer (Qwen3-MoE) or router sigmoid with shared experts "
                            "(Dots1), both with QK-norm")
        if self.qk_norm and self.qkv_bias == self.o_bias and not self.mlp_bias:
            return "qwen3"
        if not self.qk_norm and self.qkv_bias and not self.o_bias and not self.mlp_bias:
            return "qwen2"
        if not self.qk_norm and self.qkv_bias == self.o_bias and not self.sliding_window:
            return "llama"
        if not self.qk_norm and not (self.qkv_bias or self.o_bias or self.mlp_bias):
            return "mistral"
        raise UserError("model config: this combination of qk_norm, biases and sliding window fits no Hugging Face "
                        "class (Llama, Mistral, Qwen2, Qwen3)")


def read_rope(hf):
    """(theta, scaling) from either spelling: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json: rope parameters that differ between layers are not supported")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    theta = float(rope.pop("rope_theta", None) or hf["rope_theta"])
    if kind == "default":
        return theta, None
    outside = hf.get("original_max_position_embeddings")       # transformers lets it win over the one inside
    return theta, {**rope, "rope_type": kind, **({"original_max_position_embeddings": outside} if outside else {})}


def complete_scaling(scaling, max_positions):
    """A rope scaling as all code may rely on it: a known type, float values, L0 filled in, no other keys.

    L0 = original_max_position_embeddings, the trained length, is max_position_embeddings where it is left out.
    """
    kind = scaling.get("rope_type")
    if kind not in ROPE_KEYS:
        raise UserError(f"model config: rope type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[kind]
    complete = {"rope_type": kind}
    for key in required + optional:
        value = scaling.get(key)
        if value is None and key in required:
            raise UserError(f"model config: rope scaling {kind!r} needs {key}")
        if value is not None:
            if not isinstance(value, (int, float)):
                raise UserError(f"model config: {key} of the rope scaling is {value!r}; it must be a number")
            complete[key] = value if key == "truncate" else float(value)
    if kind != "linear":
        complete["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings") or max_positions
    return complete


def read_window(hf):
    """The sliding window of all layers, 0 when there is none; UserError when layers differ."""
    window, L = hf["sliding_window"] or 0, hf["num_hidden_layers"]
    if not window or not hf["use_sliding_window"]:
        return 0
    if "max_window_layers" not in FAMILIES[hf["model_type"]]:      # mistral, qwen3_moe: all layers, always
        return window
    full = min(hf["max_window_layers"], L)
    layers = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (L - full)
    if len(set(layers)) > 1:
        raise UserError("config.json: layers with and without a sliding window in one model are not supported")
    return window if layers[0] == "sliding_attention" else 0


SAID_OF_ITSELF = ("reward_mean", "reward_std", "judge_template")

# What must stand in a config.json, and what transformers assumes for the keys that one leaves out.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOE_REQUIRED = {"qwen3_moe": ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
                "dots1": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")}
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")     # null is not the same as left out
COMMON = dict(hidden_act="silu", max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
              initializer_range=0.02, attention_bias=False, use_sliding_window=False, sliding_window=4096,
              num_key_value_heads=32, head_dim=None, rope_theta=10000.0)
FAMILIES = {
    "llama": {**COMMON, "max_position_embeddings": 2048, "num_key_value_heads": None, "mlp_bias": False},
    "mistral": {**COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "use_sliding_window": True},
    "qwen2": {**COMMON, "max_window_layers": 28},
    "qwen3": {**COMMON, "head_dim": 128, "max_window_layers": 28},
    "qwen3_moe": {**COMMON, "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
                  "norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    "dots1": {**COMMON, "max_position_embeddings": 2048, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
              "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "router_aux_loss_coef": 0.0,
              "use_sliding_window": True, "max_window_layers": 62},
}
ROPE_KEYS = {       # type: (required, optional) besides original_max_position_embeddings
    "linear": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "dots1": "Dots1ForCausalLM"}


# -------------------------------------------------------------------------------------------------- sizes

SIZES = {   # name: (layers, width, MLP width, query heads, kv heads); parameters at the shipped vocabularies
    "nano": (6, 128, 352, 4, 2),           # 1.2M, for a CPU, with the small tokenizer
    "small": (8, 512, 1408, 8, 2),         # 26M
    "base": (16, 768, 2048, 12, 3),        # 104M
}


def named_size(size, vocab_size, max_len=0):
    """The ModelConfig of a named size, or of "LAYERSxWIDTH" (for example 8x512), for a vocabulary.

    `max_len` > 0 becomes max_position_embeddings: what is declared is what was trained.
    """
    if size == "moe":                      # 145M: each token uses the shared expert and 2 of the 4 routed ones
        config = ModelConfig(vocab_size, 640, 1728, 8, 10, 2, num_experts=4, num_experts_per_tok=2,
                             num_shared_experts=1, moe_intermediate_size=1728, router="sigmoid")
    elif size in SIZES:
        layers, width, mlp, heads, kv_heads = SIZES[size]
        config = ModelConfig(vocab_size, width, mlp, layers, heads, kv_heads)
    elif size.count("x") == 1 and all(part.isdigit() for part in size.split("x")):
        layers, width = map(int, size.split("x"))
        if width % 32 or not width or not layers:
            raise UserError(f"--size {size}: the width must be a multiple of 32, with at least one layer")
        heads = width // (64 if width % 64 == 0 and width >= 256 else 32)
        config = ModelConfig(vocab_size, width, -(-width * 8 // 3 // 32) * 32, layers, heads,
                             heads // 2 if heads % 2 == 0 else heads)
    else:
        raise UserError(f"--size {size}: expected {', '.join(SIZES)}, moe, LAYERSxWIDTH (8x512) or a config.json")
    return dataclasses.replace(config, max_position_embeddings=max_len or config.max_position_embeddings)


def new_config(size, tokenizer, max_len):
    """The config of a model to be born: a named size, LAYERSxWIDTH or a config.json, fitted to the tokenizer."""
    if size.endswith(".json"):
        try:
            config = ModelConfig.from_hf(json.loads(Path(size).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"--size {size}: cannot be read ({error})") from None
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(f"--size {size}: vocab_size {config.vocab_size} is smaller than the tokenizer's "
                            f"{tokenizer.vocab_size}; raise it")
    else:
        config = named_size(size, tokenizer.vocab_size, max_len)
    return dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                               pad_token_id=tokenizer.pad_id)
