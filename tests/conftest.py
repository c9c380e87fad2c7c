"""What all tests share: one thread, an empty cache, and small data to train on."""

import json
import random
import signal
from contextlib import contextmanager

import pytest
import torch

from dataset import jsonl
from trainer import runtime

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache of tokens and indexes, and each hears every warning anew."""
    jsonl.warn.cache_clear()
    monkeypatch.setattr(jsonl, "CACHE", tmp_path_factory.mktemp("cache"))


class Killed(BaseException):
    """Stands for the process dying at a place: nothing may catch it."""


@contextmanager
def killed_after(step):
    """The training run inside dies after `step`, before that step's save."""
    log = runtime.Run.log

    def dies(self, now, *args):
        log(self, now, *args)
        if now == step:
            raise Killed

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runtime.Run, "log", dies)
        yield
    for number, handler in handlers.items():                    # a new process would have them again
        signal.signal(number, handler)


WORDS = "the a red blue old young cat dog tree river man bird sees likes finds eats and then under over".split()


@pytest.fixture
def documents(tmp_path):
    return write_documents(tmp_path / "documents.jsonl")


def write_documents(path):
    """A jsonl of 60 short documents of 5 to 60 words."""
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))}) for _ in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats.jsonl")


def write_chats(path):
    """A jsonl of 60 one- or two-turn conversations of ragged lengths."""
    rng = random.Random(1)

    def turn(role, most):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, most)))}

    lines = [json.dumps({"conversations": [turn(role, 12) for _ in range(rng.randint(1, 2))
                                           for role in ("user", "assistant")]}) for _ in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
