"""Before a distillation begins: which settings can be, and which student a teacher can have."""

from dataclasses import replace

from model.errors import UserError


def checked(cfg):
    """The settings of train_distillation.py, --model emptied for a new student; UserError for what cannot be."""
    if not cfg.teacher:
        raise UserError("--teacher is missing: give the folder of a larger model with the student's tokenizer")
    if cfg.size and (cfg.model not in ("", type(cfg).model) or cfg.lora_rank or cfg.quantize != "none"):
        raise UserError(f"--size {cfg.size} makes a new student: leave out --model, --lora_rank and --quantize")
    for name, ok, allowed in [("alpha", 0 <= cfg.alpha <= 1, "lie between 0 and 1"),
                              ("on_policy", 0 <= cfg.on_policy <= 1, "lie between 0 and 1"),
                              ("temperature", cfg.temperature > 0, "be above 0"),
                              ("jsd_beta", 0 < cfg.jsd_beta < 1, "lie between 0 (forward) and 1 (reverse)")]:
        if not ok:
            raise UserError(f"--{name} {getattr(cfg, name)}: must {allowed}")
    return replace(cfg, model="") if cfg.size else cfg


def check_match(cfg, teacher, teacher_tokenizer, student, tokenizer):
    """UserError where the two models do not speak of the same tokens, or the rows are too long for the teacher."""
    own, taught = student.config.vocab_size, teacher.config.vocab_size
    if tokenizer.fingerprint != teacher_tokenizer.fingerprint or own > taught:
        raise UserError(f"--teacher {cfg.teacher} has another tokenizer than --model {cfg.model} (vocabularies of "
                        f"{taught:,} and {own:,} tokens), so their distributions cannot be compared; take a teacher "
                        "with the same one, or learn from its answers (scripts/generate_data.py)")
    if cfg.max_len > teacher.config.max_position_embeddings:
        raise UserError(f"--max_len {cfg.max_len}: --teacher {cfg.teacher} knows "
                        f"{teacher.config.max_position_embeddings} positions, and would teach nonsense behind them")
