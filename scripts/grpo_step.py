"""One contender of `benchmark.py grpo`, in a process of its own: GRPO step by step, each when a line comes in on stdin.

    python scripts/grpo_step.py ours SETTINGS        trainer/train_grpo.py
    python scripts/grpo_step.py trl SETTINGS         TRL's GRPOTrainer, with the Python of an environment that has it

SETTINGS, as JSON: folder (checkpoint), data (jsonl of prompts), batch_size (completions of a step), group (completions
of a prompt), new (tokens of a completion), max_len. Both train all weights in fp32 with bf16 products where that is
fast, by AdamW, with the DAPO loss, one update per rollout and no reference.
"""

import json
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not scripts/


def share_of_e(texts, items=()):
    """The reward: which share of each text's characters is an e."""
    return [text.count("e") / max(len(text), 1) for text in texts]


def my_turn():
    """Wait until a step is asked for; the process ends when nobody asks any more."""
    if not sys.stdin.readline():
        sys.exit()


def turn_taken():
    """Say that the step is done, and the peak of this process's memory in bytes."""
    status = pathlib.Path("/proc/self/status")
    peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 if status.exists() else 0
    print("step took its turn,", peak, flush=True)


def ours(folder, data, batch_size, group, new, max_len):
    from trainer import experience, train_grpo
    prompts = experience.prompts

    def one_by_one(*args):
        for step in prompts(*args):
            my_turn()
            yield step
            turn_taken()

    experience.prompts = one_by_one
    train_grpo.main(train_grpo.Config(
        model=folder, data=data, val_data=data, out=str(pathlib.Path(folder) / "run"), overwrite=True, max_len=max_len,
        max_steps=10_000, batch_size=batch_size, num_generations=group, max_new_tokens=new, lr=1e-6, loss="dapo",
        reward=f"{__file__}:share_of_e", min_pass=0, eval_every=0, eval_rows=1, pass_k=0, sample_every=0, save_every=0,
        compile="off"))


def trl(folder, data, batch_size, group, new, max_len):
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            my_turn()

        def on_step_end(self, *args, **kwargs):
            turn_taken()

    with open(data, encoding="utf-8") as file:
        prompts = [{"prompt": json.loads(line)["conversations"]} for line in file]
    has_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if has_gpu else torch.cpu._is_avx512_bf16_supported()
    args = GRPOConfig(
        output_dir=str(pathlib.Path(folder) / "trl"), per_device_train_batch_size=batch_size, num_generations=group,
        max_prompt_length=None, max_completion_length=new, max_steps=10_000, learning_rate=1e-6, bf16=fast,
        use_cpu=not has_gpu, gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=10_000,
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": torch.float32}, disable_tqdm=True)

    def reward(completions, **others):
        return share_of_e([messages[0]["content"] for messages in completions])

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]        # a decoder knows no others
    trainer = GRPOTrainer(folder, reward, args, Dataset.from_list(prompts), processing_class=tokenizer,
                          callbacks=[TakeTurns()])
    trainer.train()


if __name__ == "__main__":
    {"ours": ours, "trl": trl}[sys.argv[1]](**json.loads(sys.argv[2]))
