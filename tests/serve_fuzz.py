"""Thousands of requests that the server's own description allows or forbids, made by schemathesis: none may end as 5xx.

run     python tests/serve_fuzz.py                 writes tests/results/serve_fuzz.json
        python tests/serve_fuzz.py --examples 1000

For each path of /openapi.json, bodies that fit the description and bodies that do not, the same in every run. Every
second one names a model that exists and has few of the optional fields, and every second of these has a plain message,
so that what lies behind the checks is reached, too. Not collected by pytest: it takes a minute or more.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not tests/

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from model.cli import arg, parse_args

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUIRED = ("messages", "prompt", "input")


@dataclass
class Config:
    examples: int = arg(200, "requests of each kind for each path")
    out: str = arg("tests/results/serve_fuzz.json", "file for the figures; empty: none")


def fuzz(operation, mode, examples, counts, failed):
    from hypothesis import HealthCheck, given, settings

    turns = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        turns.append(case)
        if isinstance(case.body, dict) and len(turns) % 2:
            kept = [key for place, key in enumerate(case.body) if key in REQUIRED or place % 5 == len(turns) % 5]
            case.body = {key: case.body[key] for key in kept} | {"model": "tiny"}
            if "messages" in case.body and len(turns) % 4 == 1:
                case.body["messages"] = [{"role": "user", "content": "Who are you?"}]
        response = case.call(timeout=60)
        counts[response.status_code] += 1
        if response.status_code >= 500:
            failed.append(f"{operation.label} {response.status_code}: {case.as_curl_command()[:2000]}")

    ask()


def main(cfg):
    import schemathesis
    import torch
    from schemathesis.generation import GenerationMode

    from model.checkpoint import save_model
    from model.config import ModelConfig
    from model.tokenizer import Tokenizer
    from model.transformer import CausalLM
    from scripts import serve_openai_api
    from tests.test_serve import running

    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin, failed, paths = time.perf_counter(), [], {}
    with tempfile.TemporaryDirectory() as root:
        folder, tokenizer = pathlib.Path(root) / "tiny", Tokenizer.load("nano")
        save_model(folder, CausalLM(ModelConfig(tokenizer.vocab_size, 16, 32, 1, 2, 1, max_position_embeddings=128)),
                   tokenizer)
        with running(serve_openai_api.Config(model=str(folder), port=0, device="cpu", dtype="float32")) as (url, _, _):
            for operation in (found.ok() for found in schemathesis.openapi.from_url(url + "/openapi.json")
                              .get_all_operations()):
                counts = Counter()
                fuzz(operation, GenerationMode.POSITIVE, cfg.examples, counts, failed)
                if operation.method.upper() == "POST":         # the others take nothing that could be wrong
                    fuzz(operation, GenerationMode.NEGATIVE, cfg.examples, counts, failed)
                paths[operation.label] = {str(status): count for status, count in sorted(counts.items())}
                print(operation.label, paths[operation.label], flush=True)
    figures = {"schemathesis": schemathesis.__version__, "requests": sum(sum(p.values()) for p in paths.values()),
               "status_codes": paths, "server_errors": failed, "seconds": round(time.perf_counter() - begin)}
    if cfg.out:
        (ROOT / cfg.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(*failed, sep="\n")
    assert not failed and figures["requests"] > 4 * cfg.examples


if __name__ == "__main__":
    main(parse_args(Config, description=__doc__))
