"""Talk to a checkpoint in the terminal.

reads   a checkpoint folder: one of ours (out/full_sft), or any Llama / Mistral / Qwen family folder
writes  nothing
run     python scripts/chat.py                                         the result of train_full_sft.py
        python scripts/chat.py --model out/pretrain --raw              continue text with a model that cannot chat yet
        python scripts/chat.py --adapter out/lora                      … with what train_lora.py added
        python scripts/chat.py --prompts auto                          eight questions, no terminal needed
        python scripts/chat.py --prompts my_questions.txt --temperature 0

Inside: /help lists the commands, Ctrl-C stops an answer, /exit or end of input leaves. What the model writes is shown,
never obeyed: control characters, with which text could take over a terminal, are printed as escapes.
"""

import os
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

import dataclasses
import time
from dataclasses import dataclass

from model.cli import arg, or_shipped, parse_args
from model.errors import UserError, run

# torch takes seconds to import: the functions that need it import it, so that --help and a wrong flag answer at once.

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "out/full_sft"
AUTO_PROMPTS = ("Who are you?", "Repeat: m i l o", "Reverse: t a n e k", "Upper case: b r a v o", "What is 7+5?",
                "Sort the letters: d a c", "Where does Mia live?", "Does the fox live in the forest?")
RAW_PROMPTS = ("Once upon a time", "One day", "Mia lives in", "The fox lives in the", "Tom likes to eat",
               "The best friend of Ana is", "In Stonebay there is a big", "The owl")
HINTS = {"weight": "--model FOLDER", "load_from": "--model FOLDER", "save_dir": "--model FOLDER",
         "historys": "--history N", "hidden_size": "nothing: the checkpoint knows its size",
         "num_hidden_layers": "nothing: the checkpoint knows its size", "use_moe": "nothing: the checkpoint knows it",
         "open_thinking": "--thinking on", "show_speed": "always shown"}


@dataclass
class Config:
    model: str = arg(DEFAULT_MODEL, "checkpoint folder; the default before anything was trained: model/nano")
    adapter: str = arg("", "adapter folder to use on it, as out/lora; several by commas, /adapter switches")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    draft: str = arg("", "checkpoint folder of a smaller model with the same tokenizer: it guesses and --model "
                         "checks, faster where the guesses are often right; the answers are those of --model")
    prompts: str = arg("", "answer these and leave: auto (a built-in list), a text file with one a line, or .jsonl")
    raw: bool = arg(False, "continue the text as it is, without chat template (for base checkpoints)")
    system: str = arg("", "system message, said before everything else")
    history: int = arg(0, "how many earlier exchanges the model sees; 0: only the current message")
    thinking: str = arg("auto", "think first, between <think> and </think>: on, off, or auto (as the model likes)",
                        choices=("auto", "on", "off"))
    temperature: float = arg(0.85, "randomness; 0 always takes the likeliest token")
    top_p: float = arg(0.85, "sample from the likeliest tokens that together have this probability; 1 = all")
    top_k: int = arg(0, "sample from so many likeliest tokens; 0 = all")
    min_p: float = arg(0.0, "drop tokens less likely than this share of the likeliest one; 0 = none")
    repetition_penalty: float = arg(1.0, "above 1 makes tokens that were used already less likely")
    max_new_tokens: int = arg(256, "longest answer, in tokens")
    seed: int = arg(-1, "same seed, same answers; -1 = different every time")
    device: str = arg("auto", "where to compute: auto, cpu, cuda or mps")
    dtype: str = arg("auto", "number format: float32, bfloat16, or auto (bfloat16 where the hardware is fast at it)")


THINKING = {"auto": None, "on": True, "off": False}            # enable_thinking of the chat template
SETTABLE = {name: type(value) for name, value in dataclasses.asdict(Config()).items()
            if name not in ("model", "adapter", "rope_scaling", "quantize", "draft", "prompts", "raw", "seed",
                            "device", "dtype")}
HELP = f"""\
/NAME VALUE   change a setting: {", ".join(SETTABLE)}
              (/temperature 0.7, /thinking on, /system You are a pirate., /system alone for none)
/settings     show them
/adapter NAME use another of the --adapter folders; none: the model itself
/reset        forget the conversation
/retry        answer the last message again
/exit         leave (so does end of input); Ctrl-C stops an answer"""


class Chat:
    """A loaded model, the settings, and the exchanges so far."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.model, self.tokenizer = load(cfg)
        self.draft = None
        if cfg.draft:
            from model.speculative import load_draft
            self.draft = load_draft(cfg.draft, self.model, self.tokenizer)
        self.exchanges = []                                                # [(user message, assistant message)]
        self.answers = self.tokens = self.seconds = 0

    def params(self):
        from model.generate import SamplingParams
        cfg = self.cfg
        return SamplingParams(cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                              cfg.repetition_penalty, None if cfg.seed < 0 else cfg.seed + self.answers)

    def prompt_ids(self, messages):
        """Ids of the prompt: the messages (the last one is what to answer), after as much history as fits.

        The oldest exchanges go first when system message, history and question leave too little room for an answer.
        """
        cfg, tokenizer, limit = self.cfg, self.tokenizer, self.model.config.max_position_embeddings
        if cfg.raw:
            return [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"])]
        if cfg.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": cfg.system}, *messages]
        start = 1 if messages[0]["role"] == "system" else 0
        room = limit - min(cfg.max_new_tokens, limit // 4)
        kept = self.exchanges[-cfg.history:] if cfg.history else []
        while True:
            before = [message for exchange in kept for message in exchange]
            ids, _ = tokenizer.render(messages[:start] + before + messages[start:], add_generation_prompt=True,
                                      enable_thinking=THINKING[cfg.thinking])
            if len(ids) <= room or not kept:
                break
            kept = kept[1:]
        left_out = min(cfg.history, len(self.exchanges)) - len(kept)
        if left_out:
            show(dim(f"[{left_out} of the earlier exchanges left out, the oldest: the model has {limit} positions; "
                     "--rope_scaling yarn:F makes it F times as many as trained]") + "\n")
        return ids

    def answer(self, messages):
        """Print the answer to messages (a list that ends with the user's) as it comes, and remember the exchange."""
        from model import generate, speculative
        from model.tokenizer import lift_structure
        begin = time.perf_counter()
        prompt = self.prompt_ids(messages)
        if self.draft is None:
            pieces = generate.stream(self.model, self.tokenizer, prompt, self.params())
        else:
            pieces = speculative.stream(self.model, self.draft, self.tokenizer, prompt, self.params())
        # The template of a thinking prompt may write <think> itself; the model goes on behind it.
        text = "<think>" if prompt[-1] == self.tokenizer.special.get("<think>") else ""
        show(text)
        try:
            for piece in pieces:
                text += piece
                show(printable(piece))
            reason = pieces.completion.finish_reason
            if reason == "length" and len(prompt) + len(pieces.ids) >= self.model.config.max_position_embeddings:
                reason += ": no positions left in the model; --rope_scaling yarn:F makes it F times as many as trained"
        except KeyboardInterrupt:
            reason = "stopped"
        seconds = time.perf_counter() - begin
        count = len(pieces.ids)
        self.answers, self.tokens, self.seconds = self.answers + 1, self.tokens + count, self.seconds + seconds
        guessed = "" if self.draft is None else f", {pieces.tokens.accepted} of {pieces.tokens.proposed} guesses right"
        show("\n" + dim(f"[{count} tokens, {count / seconds:.0f} tokens/s, {reason}{guessed}]") + "\n")
        reply, _ = lift_structure({"role": "assistant", "content": text})
        self.exchanges.append((messages[-1], reply))

    def command(self, line):
        """Obey a line that starts with '/'; False to leave. Raises UserError for what it cannot obey."""
        name, _, value = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        if name == "help":
            show(HELP + "\n")
        elif name == "settings":
            show("".join(f"{name} {getattr(self.cfg, name)}\n" for name in SETTABLE))
        elif name == "reset":
            self.exchanges = []
        elif name == "retry":
            if not self.exchanges:
                raise UserError("/retry: there is no message to answer again yet")
            question, _ = self.exchanges.pop()
            self.answer([question])
        elif name == "adapter":
            from model.adapters.adapted import active_adapter, switch
            if value.strip():
                switch(self.model, None if value.strip() == "none" else value.strip())
            show(f"adapter {active_adapter(self.model) or 'none'} of {', '.join(self.model.adapters) or 'none'}\n")
        elif name in SETTABLE:
            self.set(name, value.strip())
        else:
            raise UserError(f"unknown command /{name}; /help lists them")
        return True

    def set(self, name, value):
        kind, before = SETTABLE[name], self.cfg
        if kind is bool:
            if value not in ("on", "off"):
                raise UserError(f"/{name} is either on or off")
            value = value == "on"
        try:
            self.cfg = dataclasses.replace(before, **{name: kind(value)})
            check(self.cfg)
            self.params()
        except ValueError as error:
            raise UserError(f"/{name} {value}: expected a number") from error
        except UserError:
            self.cfg = before
            raise


def load(cfg):
    """(model, tokenizer) of cfg.model, on the device and in the dtype asked for."""
    from model.checkpoint import load_model
    from model.device import pick_device, pick_dtype
    folder = or_shipped(ROOT / cfg.model) if cfg.model == DEFAULT_MODEL else pathlib.Path(cfg.model)
    if not folder.is_dir():
        raise UserError(f"--model {cfg.model}: there is no such folder; train one (python trainer/train_full_sft.py) "
                        "or name another")
    device = pick_device(cfg.device)
    return load_model(folder, device, pick_dtype(cfg.dtype, device), cfg.rope_scaling, cfg.quantize, cfg.adapter)


def check(cfg):
    if cfg.thinking not in THINKING:
        raise UserError(f"--thinking {cfg.thinking}: must be one of {', '.join(THINKING)}")
    if cfg.history < 0:
        raise UserError(f"--history {cfg.history}: must be 0 or more")


def read_prompts(cfg):
    """The conversations to answer, each a list of messages that ends with the user's."""
    if cfg.prompts == "auto":
        return [[{"role": "user", "content": text}] for text in (RAW_PROMPTS if cfg.raw else AUTO_PROMPTS)]
    path = pathlib.Path(cfg.prompts)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        from dataset.jsonl import records
        return [record["messages"] for record in records(path, kind="prompt")]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {cfg.prompts}: {error}; give auto, or a UTF-8 file, one prompt a line") from error
    return [[{"role": "user", "content": line}] for line in lines if line.strip()]


def show(text):
    print(text, end="", flush=True)


def printable(text):
    """`text` with what could drive a terminal or reverse the reading direction shown as an escape, '\\x1b'."""
    return "".join(repr(c)[1:-1] if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160
                   or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" else c for c in text)


def dim(text):
    """Grey, where standard output is a terminal that shows it."""
    ansi = sys.stdout.isatty() and "NO_COLOR" not in os.environ and (os.name != "nt" or "WT_SESSION" in os.environ)
    return f"\x1b[2m{text}\x1b[0m" if ansi else text


def talk(chat):
    """The conversation with whoever types, until /exit or end of input."""
    typed = sys.stdin.isatty()
    if typed:
        show(dim(f"{chat.cfg.model}; /help lists the commands") + "\n")
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            show("\n" if typed else "")
            return
        except KeyboardInterrupt:
            show("\n" + dim("/exit leaves") + "\n")
            continue
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.answer([{"role": "user", "content": line}])
        except UserError as error:
            show(f"{error}\n")


def main(cfg):
    check(cfg)
    conversations = read_prompts(cfg) if cfg.prompts else []
    chat = Chat(cfg)
    chat.params()                                                          # a wrong setting is said before any answer
    if not cfg.prompts:
        return talk(chat)
    for messages in conversations:
        show(printable(f"> {messages[-1]['content']}") + "\n")
        chat.answer(messages)
        show("\n")
    show(f"{chat.answers} answers, {chat.tokens} tokens, {chat.tokens / max(chat.seconds, 1e-9):.0f} tokens/s\n")


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")                      # for terminals that lack a character
    run(main, parse_args(Config, description=__doc__, hints=HINTS))
