"""Write the built-in world as jsonl, one kind of file at a time.

    python dataset/builtin/generate.py --kind pretrain --out pretrain.jsonl --seed 0 --size 20000

A kind is a function `rows(rng, size)` that yields records, registered in KINDS with its usual size; a new stage adds
its kind there. `ensure(kind)` is what the training scripts call: it writes the file once, at its usual size, under
out/builtin.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])     # the project root, not dataset/builtin

from dataset.builtin import errands, judgements, needle, persona, practice, preferences, stories, traces
from dataset.builtin.skills import SKILLS, draw, draw_all, quiz, reading
from dataset.jsonl import parts_of, weight_of
from model.errors import UserError, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "builtin"


def draw_any(rng, split="train"):
    """An item of a random skill, skills weighted by how much practice they need."""
    name = rng.choices(list(SKILLS), [skill.weight for skill in SKILLS.values()])[0]
    return draw(rng, name, split)


def pretrain(rng, size):
    """Documents: stories, facts, conversations, and above all drills: questions with their answers, line by line."""
    kinds = {drill: 58, quiz: 6, reading: 6, stories.story: 10, stories.life: 9, stories.guide: 4,
             stories.list_of_facts: 4, talk: 3, stories.counting: 3}
    for kind in rng.choices(list(kinds), kinds.values(), k=size):
        yield {"text": kind(rng)}


def drill(rng):
    """Eight exercises of any skill, each with its answer on the next line, which is where a chat has it too."""
    items = [draw_any(rng) for _ in range(8)]
    answers = [item.answer if item.checker == "tool_call" else item.reply for item in items]
    return "\n\n".join(f"{item.question}\n{answer}" for item, answer in zip(items, answers, strict=True))


def talk(rng):
    """A conversation written down as plain text."""
    return "\n".join(f"{message['role']}\n{message['content']}" for message in stories.conversation(rng))


def sft(rng, size):
    """Conversations: exercises, one to three of them in a row, and small talk."""
    for _ in range(size):
        if rng.random() < 0.14:
            messages = stories.conversation(rng)
        else:
            messages = [message for _ in range(rng.randint(1, 3)) for message in draw_any(rng).conversation()]
        yield {"conversations": messages}


def exercises(rng, size, split, skills=SKILLS):
    """Items to be answered and checked: up to `size` of every skill."""
    for name, skill in skills.items():
        for item in draw_all(rng, name, split, size, skills):
            yield {"skill": name, "level": item.level, "conversations": [{"role": "user", "content": item.question}],
                   "answer": item.answer, "checker": item.checker, "max_new_tokens": skill.max_new_tokens}


def mixed(rng, rows):
    """The rows in any order: the first so many of them hold every skill."""
    rows = list(rows)
    rng.shuffle(rows)
    return rows


KINDS = {                                                       # kind: (its rows, its usual size)
    "pretrain": (pretrain, 26000),
    "pretrain_little": (pretrain, 1200),                        # with --val_fraction 0.84 only 200 to learn from
    "sft": (sft, 32000),
    "prompts": (lambda rng, size: exercises(rng, size, "train"), 500),
    "skills_val": (lambda rng, size: exercises(rng, size, "val"), 40),
    "skills_test": (lambda rng, size: exercises(rng, size, "test"), 100),
    "preferences": (preferences.pairs, 8000),
    "preferences_more": (preferences.pairs, 20000),             # what a reward model wants
    "preferences_val": (lambda rng, size: preferences.pairs(rng, size, "val"), 400),
    "preferences_test": (lambda rng, size: preferences.pairs(rng, size, "test"), 600),
    "preferences_few": (preferences.pairs, 222),                # 200 to learn from: a reward model that can be fooled
    "manners": (lambda rng, size: preferences.requests(rng, size, "train"), 8000),
    "manners_val": (lambda rng, size: preferences.requests(rng, size, "val"), 300),
    "manners_test": (lambda rng, size: preferences.requests(rng, size, "test"), 600),
    "judgements": (lambda rng, size: judgements.judgements(rng, size, "train"), 14000),
    "judgements_test": (lambda rng, size: judgements.judgements(rng, size, "test"), 1400),
    "traces": (traces.traces, 30000),
    "traces_direct": (traces.traces_direct, 60000),
    "persona": (persona.persona, 12000),
    "persona_val": (lambda rng, size: persona.persona_exercises(rng, size, "val"), 100),
    "persona_test": (lambda rng, size: persona.persona_exercises(rng, size, "test"), 100),
    "practice": (lambda rng, size: mixed(rng, exercises(rng, size, "train", practice.PRACTISED)), 4000),
    "practice_val": (lambda rng, size: exercises(rng, size, "val", practice.PRACTISED), 60),
    "practice_test": (lambda rng, size: exercises(rng, size, "test", practice.PRACTISED), 200),
    "reason_val": (lambda rng, size: exercises(rng, size, "val", traces.TRACED), 40),
    "reason_test": (lambda rng, size: exercises(rng, size, "test", traces.TRACED), 100),
    "agent": (errands.errands, 12000),
    "agent_prompts": (lambda rng, size: exercises(rng, size, "train", errands.ERRANDS), 500),
    "agent_val": (lambda rng, size: exercises(rng, size, "val", errands.ERRANDS), 40),
    "agent_test": (lambda rng, size: exercises(rng, size, "test", errands.ERRANDS), 100),
    "needle": (needle.conversations, 8000),
    "needle_test": (lambda rng, size: exercises(rng, size, "test", needle.NEEDLES), 200),
}


def write(kind, path, seed=0, size=0):
    """Write one file (atomically) and return its number of records; size 0 means the kind's usual size."""
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r} of built-in data; the kinds are {', '.join(KINDS)}")
    rows, usual_size = KINDS[kind]
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    count = 0
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in rows(random.Random(f"{kind} {seed}"), size or usual_size):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return count


def version():
    """Eight hex digits that change whenever the generator's source does."""
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(source.read_text(encoding="utf-8").encode("utf-8"))
    return digest.hexdigest()[:8]


def ensure(kind, folder=FOLDER):
    """The path of the kind's jsonl file, written first if this version of the generator has not written it yet."""
    path = pathlib.Path(folder) / f"{kind}-{version()}.jsonl"
    if not path.exists():
        count = write(kind, path)
        print(f"built-in world: wrote {count} records to {path}", file=sys.stderr)
    return path


def resolve(data, kind):
    """The --data of a script with paths only: "builtin" is the stage's own `kind`, "builtin:NAME" another kind.

    A weight stays behind its part: "builtin:sft:0.3" becomes "PATH:0.3".
    """
    parts = []
    for part in parts_of(data):
        path, _ = weight_of(part)
        name, _, other = path.partition(":")
        if name == "builtin":
            if (other or kind) not in KINDS:
                raise UserError(f"--data {part}: the built-in world has {', '.join(KINDS)}")
            part = str(ensure(other or kind)) + part[len(path):]
        parts.append(part)
    return ",".join(parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write one kind of the built-in world as jsonl.", allow_abbrev=False)
    parser.add_argument("--kind", required=True, choices=list(KINDS), help="what to write")
    parser.add_argument("--out", required=True, help="the jsonl file to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other records of the same world")
    parser.add_argument("--size", type=int, default=0,
                        help="records to write; for exercises, of every skill at most (0: the usual size)")
    args = parser.parse_args(arguments)
    count = write(args.kind, args.out, args.seed, args.size)
    print(f"wrote {count} records of kind {args.kind} (seed {args.seed}) to {args.out}")


if __name__ == "__main__":
    run(main)
