"""The flags that every gradient-training script shares, and the answer to flags people bring from MiniMind.

A script's own Config inherits TrainConfig and adds or re-defaults only the knobs of its method. 0 and "" mean "off" or
"chosen for you", as each help says.
"""

import time
from dataclasses import dataclass

from model.cli import arg, parse_args  # noqa: F401  (scripts take all three from here)

STARTED = time.perf_counter()      # the first thing a script does: --max_minutes counts from here


@dataclass
class TrainConfig:
    model: str = arg("", "checkpoint folder to start from: size, tokenizer and chat template come from it")
    data: str = arg("builtin", "jsonl, jsonl.gz, txt, a folder or builtin; several by commas, shares as a:0.9,b:0.1")
    val_data: str = arg("", "held-out file; empty: a part of --data that training never sees")
    val_fraction: float = arg(0.1, "share held out: the end of a .txt, a seeded choice of jsonl records (1000 at most)")
    out: str = arg("", "run folder: checkpoint, metrics.jsonl, resume state (default: out/<stage>)")
    overwrite: bool = arg(False, "start over in a run folder that already holds a run")

    epochs: float = arg(0.0, "passes over the data; 0 = one, or as many as fit into --max_minutes")
    max_steps: int = arg(0, "optimizer steps; 0 = as many as --epochs need")
    max_minutes: float = arg(0.0, "wall-clock budget, set-up included; how many steps fit is measured once; 0 = none")
    batch_size: int = arg(8, "sequences per optimizer step, over all ranks: 8 suits nano, 64 and more larger models")
    micro_batch_size: int = arg(0, "sequences per forward pass on one rank; 0 = as many of its share as fit")
    max_len: int = arg(256, "tokens in a row; longer documents are cut, longer conversations lose old turns")

    optimizer: str = arg("muon", "muon (matrices by Muon, the rest by AdamW) or adamw", choices=("muon", "adamw"))
    lr: float = arg(3e-3, "peak learning rate")
    schedule: str = arg("wsd", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    warmup_steps: int = arg(40, "steps of linear warm-up from 0")
    weight_decay: float = arg(0.1, "decay of matrices (never of norm gains and biases)")
    grad_clip: float = arg(1.0, "largest gradient norm; 0 = no clipping")
    optimizer_state: str = arg("device", "where the optimizer's moments lie: device, or cpu, main memory: room on GPUs "
                               "for a larger model, slower steps", choices=("device", "cpu"))

    eval_every: int = arg(100, "steps between held-out evaluations; 0 = only at the end")
    eval_rows: int = arg(128, "held-out rows of the evaluations on the way; the last one takes all")
    early_stop: int = arg(0, "stop after so many evaluations without improvement and keep the best weights; 0 = off")
    on_nonfinite: str = arg("stop", "an infinite or NaN loss or gradient: stop and name the records, or skip the step",
                            choices=("stop", "skip"))
    sample_every: int = arg(200, "steps between printed samples; 0 = none")
    save_every: int = arg(100, "steps between saves; a killed run continues from the last one")
    keep_saves: int = arg(1, "training states kept: the last so many (trainer/state.py says how to go back to one)")
    log_every: int = arg(10, "steps between progress lines")
    tracker: str = arg("none", "show the run in SwanLab or Weights & Biases too (key: swanlab login, wandb login)",
                       choices=("none", "swanlab", "wandb"))
    tracker_mode: str = arg("cloud", "where to: cloud, offline (files to send later), local (SwanLab's own dashboard)",
                            choices=("cloud", "offline", "local", "disabled"))
    tracker_project: str = arg("acorn", "project that the run appears in")

    seed: int = arg(42, "seed of weights, order of data and samples")
    device: str = arg("auto", "auto, cpu, cuda or mps")
    dtype: str = arg("auto", "format of matrix products: auto (what is fast here), float32, bfloat16, float16, float64")
    parallel: str = arg("ddp", "several ranks: ddp (each holds the model) or fsdp (each holds a part of it)",
                        choices=("ddp", "fsdp"))
    compile: str = arg("auto", "torch.compile the model, a minute of waiting and then faster steps: on, off, or auto "
                       "(on if the run is long enough to pay for it)", choices=("auto", "on", "off"))
    activation_checkpointing: bool = arg(False, "keep little of the forward pass and compute it again: less memory, "
                                         "a third more time")
    on_bad_record: str = arg("stop", "a record that cannot be read: stop, or skip and count", choices=("stop", "skip"))
    price_per_hour: float = arg(0.0, "price of the whole machine per hour: what the run will cost is told before it")
    dry_run: bool = arg(False, "say what would be trained and what it costs, print a batch with its mask, and stop")
    overfit_batch: bool = arg(False, "sanity check: train on the first batch only; its loss must go to zero")


@dataclass
class FineTuneConfig(TrainConfig):
    """What every stage after full_sft shares: a parent checkpoint, trained whole or through LoRA."""
    model: str = arg("out/full_sft", "checkpoint folder to start from: size, tokenizer and chat template come from it")
    optimizer: str = arg("adamw", "muon (matrices by Muon, the rest by AdamW) or adamw", choices=("muon", "adamw"))
    schedule: str = arg("cosine", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    lora_rank: int = arg(0, "train low-rank updates (LoRA) of this rank in place of the weights; 0 = the weights")
    lora_alpha: float = arg(0.0, "size of the low-rank updates: they are multiplied by alpha / rank; 0 = 2 · rank")
    lora_targets: str = arg("all", "layers that get one: names by commas, as q_proj,v_proj; all = every linear layer")
    quantize: str = arg("none", "keep the frozen weights in 8 or 4 bits (QLoRA): int8, int4 or nf4; needs --lora_rank",
                        choices=("none", "int8", "int4", "nf4"))
    chat_template: str = arg("", "chatml or a Jinja file in place of the checkpoint's own template")


@dataclass
class RLConfig(FineTuneConfig):
    """What the stages of reinforcement learning share: a policy answers prompts, and learns from how it is judged."""
    lr: float = arg(5e-5, "peak learning rate: 5e-5 suits nano, 1e-6 (LoRA 1e-5) models of a billion parameters")
    schedule: str = arg("constant", "after warm-up: wsd (flat, then down), cosine or constant",
                        choices=("wsd", "cosine", "constant"))
    warmup_steps: int = arg(10, "steps of linear warm-up from 0")
    weight_decay: float = arg(0.0, "decay of matrices (never of norm gains and biases)")
    batch_size: int = arg(256, "completions per step, over all ranks")
    num_generations: int = arg(8, "completions of each prompt")
    max_new_tokens: int = arg(64, "longest completion in tokens, where a prompt does not ask for fewer")
    temperature: float = arg(1.0, "sampling temperature; the loss is taken at the same one")
    minibatches: int = arg(1, "optimizer steps that the completions of a step are dealt to")
    inner_epochs: int = arg(1, "passes over the completions of a step")
    reward: str = arg("checker", "how completions are judged: checker, or several as checker:1,format:0.2, a reward "
                      "model's folder, FILE.py:FUNCTION; random and constant are controls")
    evaluator: str = arg("", "with --reward constitution:FILE: the yes/no evaluator, a folder of train_reward.py")
    calibrate: str = arg("empty", "with a constitution: what is taken off an answer's score: that of an empty one, of "
                         "its words shuffled, or nothing", choices=("empty", "shuffled", "none"))
    replay: float = arg(1.0, "weight of the loss on --replay_data, lest what is not practised be forgotten; 0 = off")
    replay_loss: str = arg("kl", "what that is: kl holds the policy where it was on those rows, ce teaches them",
                           choices=("kl", "ce"))
    replay_data: str = arg("", "conversations or text for that; empty: the built-in world's if the prompts are its own")
    replay_rows: int = arg(8, "rows of them per optimizer step, over all ranks")
    rollout_dtype: str = arg("auto", "weights that sample: auto (bfloat16 where it is fast) or float32",
                             choices=("auto", "float32", "bfloat16"))
    rescore: bool = arg(False, "compute the old log-probabilities again with the model that is trained, in place of "
                        "those of sampling")
    min_pass: float = arg(0.05, "refuse to start where fewer of the start policy's completions are right; 0 = never")
    gate_prompts: int = arg(64, "prompts that are tried before the start")
    canaries: int = arg(3, "where a model or a function of yours judges: stop after so many evaluations in a row in "
                        "which an answer without merit earns more than the median of the policy's; 0 = only log it")
    pass_k: int = arg(8, "completions of each held-out prompt from which pass@k is estimated; 0 = greedy answers only")
    eval_every: int = arg(20, "steps between held-out evaluations; 0 = only at the end")
    eval_rows: int = arg(200, "held-out prompts of the evaluations on the way; the last one takes all")
    sample_every: int = arg(50, "steps between printed samples; 0 = none")
    save_every: int = arg(20, "steps between saves; a killed run continues from the last one")
    log_every: int = arg(5, "steps between progress lines")


MINIMIND_FLAGS = {   # what MiniMind users type: what answers it here
    "from_resume": "the same command again continues an unfinished run by itself",
    "use_wandb": "it is --tracker swanlab or --tracker wandb",
    "wandb_project": "it is --tracker swanlab|wandb with --tracker_project",
    "data_path": "it is --data",
    "learning_rate": "it is --lr",
    "max_seq_len": "it is --max_len",
    "accumulation_steps": "it is --batch_size (whole step) with --micro_batch_size (one forward pass)",
    "save_interval": "it is --save_every",
    "log_interval": "it is --log_every",
    "from_weight": "it is --model FOLDER",
    "save_weight": "it is --out FOLDER",
    "save_dir": "it is --out FOLDER",
    "hidden_size": "it is --size NAME or --size LAYERSxWIDTH, at pretraining only",
    "num_hidden_layers": "it is --size NAME or --size LAYERSxWIDTH, at pretraining only",
    "use_moe": "it is --size moe, at pretraining only",
    "num_workers": "not needed: tokens are read from a memory-mapped cache",
    "tokenizer_path": "it is --tokenizer nano|base|FOLDER, at pretraining only",
    "lora_name": "it is --out FOLDER of train_lora.py",
    "num_generations": "it belongs to the stages that sample (train_grpo.py …), under the same name",
    "update_old_actor_freq": "not needed: what is learnt from is always sampled by the policy of this step",
    "max_gen_len": "it is --max_new_tokens of the stages that sample (train_grpo.py …)",
    "reasoning": "not needed: a stage thinks before it answers where its data and its model do (train_reason.py)",
    "reward_model_path": "it is --reward FOLDER of the stages that sample (train_grpo.py …)",
    "student_hidden_size": "it is --size LAYERSxWIDTH for a new student, or --model FOLDER",
    "student_num_layers": "it is --size LAYERSxWIDTH for a new student, or --model FOLDER",
    "student_use_moe": "it is --size moe for a new student, or --model FOLDER",
    "teacher_hidden_size": "not needed: it comes from --teacher FOLDER",
    "teacher_num_layers": "not needed: it comes from --teacher FOLDER",
    "teacher_use_moe": "not needed: it comes from --teacher FOLDER",
    "from_student_weight": "it is --model FOLDER",
    "from_teacher_weight": "it is --teacher FOLDER",
    "ddp": "start with torchrun --nproc_per_node N and it is distributed",
}
