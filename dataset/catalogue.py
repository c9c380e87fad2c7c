"""The public data that `download.py` knows by name: where each file lies, what it is good for, and its licence.

A file that is in our shapes already stays as its publisher made it, byte for byte. Of the others `shape` turns one row
into a record. Sizes are about right; the server says exactly.
"""

import re
from dataclasses import dataclass

HUGGING_FACE, MODELSCOPE = "https://huggingface.co", "https://www.modelscope.cn"
SHAPES = {"text": "plain text", "document": '{"text"}', "chat": '{"conversations"} or {"instruction", "output"}',
          "preference": '{"chosen", "rejected"}', "prompt": '{"question", "answer"}'}


@dataclass(frozen=True)
class PublicFile:
    """One public file and what becomes of it here."""
    holds: str               # a key of SHAPES
    stage: str               # the training that reads it
    use: str
    licence: str
    size: int                # bytes to fetch, about
    urls: tuple              # tried in this order
    max_len: int = 0         # recommended --max_len; 0: none
    sha256: str = ""         # of the file at the first url, where it is known
    shape: object = None     # function: row of the file → record, or None to leave it out; without one it is kept as is
    part: str = "train"      # train, val (for --val_data) or test


def on_hugging_face(repository, path, revision="main"):
    return f"{HUGGING_FACE}/datasets/{repository}/resolve/{revision}/{path}"


# --- MiniMind. In spring 2026 its authors replaced most of its files by new ones under other names (…t2t…); a revision
# on Hugging Face still has those of the tutorials. The recommended lengths are theirs, for a vocabulary like ours.

TUTORIALS, NEW = "6b952cc50427c84eac543d0b38a8066208433847", "312afb4f76391145c6902f765bb51691c09a12f5"


def without_markers(row):
    """MiniMind's tokenizer reads <|im_start|> and <|im_end|> in any text as control tokens. Here they would be spelled,
    a fifth of all tokens, and learned as spelling; each becomes the end of a line."""
    return document({"text": re.sub(r"(\s*(<\|im_start\|>|<\|im_end\|>|</?s>)\s*)+", "\n", row["text"]).strip()})


def minimind(holds, stage, name, use, size, max_len=0, revision=TUTORIALS, sha256="", shape=None):
    """(name, file): at a fixed revision, else whatever bears the name today, else what ModelScope has."""
    repository = "jingyaogong/minimind_dataset"
    urls = (on_hugging_face(repository, f"{name}.jsonl", revision), on_hugging_face(repository, f"{name}.jsonl"),
            f"{MODELSCOPE}/datasets/gongjy/minimind_dataset/resolve/master/{name}.jsonl")
    return name, PublicFile(holds, stage, use, "Apache-2.0, CC-BY-NC-2.0 (its card names both)", size, urls, max_len,
                            sha256, shape)


MINIMIND = dict([
    minimind("document", "pretrain", "pretrain_hq", "text, mostly Chinese questions and answers", 1_620_000_000, 320,
             shape=without_markers),
    minimind("chat", "full_sft", "sft_mini_512", "short conversations, the small choice", 1_230_000_000, 340),
    minimind("chat", "full_sft", "sft_512", "short conversations, all", 7_500_000_000, 350),
    minimind("chat", "full_sft", "sft_1024", "conversations of middling length", 5_600_000_000, 650),
    minimind("chat", "full_sft", "sft_2048", "long conversations", 9_000_000_000, 1400),
    minimind("preference", "dpo", "dpo", "preferences, Chinese and English", 55_000_000),
    minimind("chat", "lora", "lora_identity", "who the model is: another name in minutes", 22_789),
    minimind("chat", "lora", "lora_medical", "medical questions, Chinese: a domain", 34_002_385),
    minimind("chat", "reason", "r1_mix_1024", "answers of DeepSeek-R1 with their thoughts", 340_000_000, 720),
    minimind("chat", "grpo", "rlaif-mini", "10,000 prompts; they need a reward model", 1_000_000),
    minimind("document", "pretrain", "pretrain_t2t_mini", "MiniMind's text since 2026, the small choice", 1_241_043_656,
             768, NEW, "6dd6716c84ab36897bdbfc7f88e04f4441c48c1ab7ecee88ce0b0e7d4685560c"),
    minimind("document", "pretrain", "pretrain_t2t", "MiniMind's text since 2026, all", 8_275_074_893, 380, NEW),
    minimind("chat", "full_sft", "sft_t2t_mini", "conversations with tools and thoughts, the small choice",
             1_739_201_170, 768, NEW, "abb1e76b2056e14728beb78db96b7b3c491a0bef1ed3e34a9b381b28f29fa518"),
    minimind("chat", "full_sft", "sft_t2t", "conversations with tools and thoughts, all", 14_096_018_369, 768, NEW),
    minimind("chat", "grpo", "rlaif", "19,502 prompts; they need a reward model", 23_754_740, 0, NEW,
             "8c6634db971fa34b0217f7db4f7c30684f57d20bbb771eb717f1b5aeacb089ba"),
])


# --- others, and how their rows become records


def document(row):
    return {"text": row["text"]} if row["text"].strip() else None


def instruction(row):
    """Alpaca's keys; Dolly calls the last two context and response."""
    return {"instruction": row["instruction"], "input": row.get("input") or row.get("context") or "",
            "output": row["output"] if "output" in row else row["response"]}


def preference(row):
    """Two replies, alone or as whole conversations; what was said before may stand apart from them."""
    before = {"prompt": row["conversations"]} if "conversations" in row else {}
    return {**before, "chosen": row["chosen"], "rejected": row["rejected"]}


def tiny_stories(split, size, part):
    return PublicFile("document", "pretrain", "stories for children: even 1M parameters learn to tell them",
                      "CDLA-Sharing-1.0", size,
                      (on_hugging_face("roneneldan/TinyStories", f"TinyStoriesV2-GPT4-{split}.txt"),), 512,
                      shape=document, part=part)


def web_pages(number):
    """A shard of FineWeb-Edu in random order, with about 250 million characters."""
    return PublicFile("document", "pretrain", "educational web pages, English", "ODC-By 1.0", 100_000_000,
                      (on_hugging_face("karpathy/fineweb-edu-100b-shuffle", f"shard_{number:05d}.parquet"),), 1024,
                      shape=document)


def alpaca(language, size):
    return PublicFile("chat", "full_sft", f"instructions answered by GPT-4 ({language})",
                      "Apache-2.0 says its card; GPT-4-LLM, where it is from, CC BY-NC 4.0", size,
                      (on_hugging_face(f"llamafactory/alpaca_gpt4_{language}", f"alpaca_gpt4_data_{language}.json"),),
                      512, shape=instruction)


def ultrafeedback(part, size):
    path = f"data/{part}_prefs-00000-of-00001.parquet"
    return PublicFile("preference", "dpo", "preferences as GPT-4 judges, English", "MIT", size,
                      (on_hugging_face("HuggingFaceH4/ultrafeedback_binarized", path),), 1024, shape=preference,
                      part=part)


def mixed_preferences(language, size):
    return PublicFile("preference", "dpo", f"preferences of several origins ({language}), several turns", "Apache-2.0",
                      size, (on_hugging_face("hiyouga/DPO-En-Zh-20k", f"dpo_{language}.json"),), 1024, shape=preference)


def school_problems(part, size, sha256):
    revision = "3101c7d5072418e28b9008a6636bde82a006892c"
    return PublicFile("prompt", "grpo", "word problems with checkable answers", "MIT", size,
                      ("https://raw.githubusercontent.com/openai/grade-school-math/"
                       f"{revision}/grade_school_math/data/{part}.jsonl",), 400, sha256, part=part)


FILES = {
    **MINIMIND,
    "tinyshakespeare": PublicFile(
        "text", "pretrain", "the classic first text: plays", "public domain", 1_115_394,
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",), 256,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": tiny_stories("train", 2_230_000_000, "train"),
    "tinystories_valid": tiny_stories("valid", 22_500_000, "val"),
    **{f"fineweb_edu_{number}": web_pages(number) for number in range(10)},
    "alpaca_gpt4_en": alpaca("en", 43_300_000),
    "alpaca_gpt4_zh": alpaca("zh", 27_900_000),
    "dolly": PublicFile(
        "chat", "full_sft", "instructions and answers written by people", "CC BY-SA 3.0", 13_100_000,
        (on_hugging_face("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"),), 512, shape=instruction),
    "ultrafeedback": ultrafeedback("train", 226_000_000),
    "ultrafeedback_test": ultrafeedback("test", 7_300_000),
    "dpo_en": mixed_preferences("en", 51_200_000),
    "dpo_zh": mixed_preferences("zh", 28_700_000),
    "gsm8k_train": school_problems("train", 4_166_206,
                                   "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k_test": school_problems("test", 749_738,
                                  "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
}

PRESETS = {    # name: (what for, files)
    "mini": ("MiniMind's two-hour run", ("pretrain_hq", "sft_mini_512")),
    "full": ("MiniMind's long run", ("pretrain_hq", "sft_512", "sft_2048", "dpo")),
    "dpo": ("preferences", ("dpo",)),
    "reason": ("reasoning by example", ("r1_mix_1024",)),
    "identity": ("another name by LoRA", ("lora_identity",)),
    "medical": ("a domain by LoRA", ("lora_medical",)),
    "rlaif": ("prompts for reinforcement learning", ("rlaif-mini",)),
    "t2t": ("the two-hour run with MiniMind's files of 2026", ("pretrain_t2t_mini", "sft_t2t_mini")),
    "t2t_full": ("the long run with MiniMind's files of 2026", ("pretrain_t2t", "sft_t2t", "dpo", "rlaif")),
    "shakespeare": ("the first text", ("tinyshakespeare",)),
    "stories": ("stories for small models", ("tinystories", "tinystories_valid")),
    "fineweb": ("a gigabyte of good web pages", tuple(f"fineweb_edu_{number}" for number in range(10))),
    "alpaca": ("instructions, English and Chinese", ("alpaca_gpt4_en", "alpaca_gpt4_zh")),
    "ultrafeedback": ("preferences, English", ("ultrafeedback", "ultrafeedback_test")),
    "gsm8k": ("word problems", ("gsm8k_train", "gsm8k_test")),
}
