"""Serve checkpoints over HTTP as OpenAI's interface does: any client for it can talk to them.

reads   checkpoint folders, as scripts/chat.py does, and adapter folders for them
writes  nothing
run     python scripts/serve_openai_api.py                                      out/full_sft, to this machine only
        python scripts/serve_openai_api.py --model out/full_sft,out/grpo --adapter out/lora      three names, one server
        ACORN_API_KEY=secret python scripts/serve_openai_api.py --host 0.0.0.0 --quantize int8   to others, with a key
then    python scripts/chat_openai_api.py                                       or, with the client of OpenAI,
        OpenAI(base_url="http://127.0.0.1:8998/v1", api_key="-").chat.completions.create(model="full_sft", …)

Paths: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health, /metrics (for Prometheus), and
/openapi.json, which describes them. The name of a model is that of its folder. Requests are answered together
(model/engine.py). Ctrl-C or SIGTERM lets running answers finish, refuses new ones and exits; a second one exits at
once. scripts/openai_app.py is the application, scripts/openai_format.py what goes in and out.
"""

import os
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not scripts/

import socket
import time
from dataclasses import dataclass

from model.cli import arg, or_shipped, parse_args
from model.errors import UserError, run

# torch and fastapi take seconds to import: the functions that need them import them, so that --help answers at once.

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT_MODEL = "out/full_sft"
HINTS = {"load_from": "--model FOLDER", "save_dir": "--model FOLDER", "weight": "--model FOLDER",
         "lora_weight": "--adapter FOLDER", "hidden_size": "nothing: the checkpoint knows its size",
         "num_hidden_layers": "nothing: the checkpoint knows its size", "use_moe": "nothing: the checkpoint knows it",
         "max_seq_len": "--max_tokens N", "inference_rope_scaling": "--rope_scaling yarn:4",
         "max_model_len": "--kv_tokens N, or --rope_scaling yarn:4", "max_num_seqs": "--concurrency N"}


@dataclass
class Config:
    model: str = arg(DEFAULT_MODEL, "checkpoint folders, by commas; clients ask for them by the folders' names")
    adapter: str = arg("", "adapter folders, by commas, each a name of its own; for the first model that they fit")
    host: str = arg("127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine's: set a key then")
    port: int = arg(8998, "port to listen at; 0: any free one")
    api_key: str = arg("", "key that clients must send; better in the environment, as ACORN_API_KEY: others see flags")
    cors: str = arg("", "web pages, by commas (https://example.org), or *, whose scripts may ask; empty: none")
    rope_scaling: str = arg("", "yarn:4 or linear:4: read a context 4 times as long as trained")
    quantize: str = arg("none", "keep the weights of the blocks in 8 or 4 bits: less memory, slower on a CPU",
                        choices=("none", "int8", "int4", "nf4"))
    device: str = arg("auto", "where to compute: auto, cpu, cuda or mps")
    dtype: str = arg("auto", "number format: float32, bfloat16, or auto (bfloat16 where the hardware is fast at it)")
    concurrency: int = arg(64, "answers of a model that are written at once; further requests wait")
    queue: int = arg(256, "requests of a model that may wait; further ones are told to come back (429)")
    kv_tokens: int = arg(0, "tokens, of all running answers, that a model keeps in memory; 0 = what 2 GiB hold")
    max_tokens: int = arg(4096, "longest answer that a request may ask for, in tokens")
    max_body_bytes: int = arg(2_000_000, "largest body of a request")
    drain_seconds: float = arg(30.0, "how long running answers may take to finish when the server is to end")


def check(cfg):
    for name in ("concurrency", "queue", "max_tokens", "max_body_bytes"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be 1 or more")
    for name in ("kv_tokens", "drain_seconds"):
        if not getattr(cfg, name) >= 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be 0 or more")
    if not 0 <= cfg.port <= 65535:
        raise UserError(f"--port {cfg.port}: must be between 0 and 65535")


def names_of(folders):
    """A name for each folder: the last part of its path, or the whole path as given where that is not unique."""
    last = [pathlib.Path(folder).resolve().name for folder in folders]
    return [name if last.count(name) == 1 else folder for name, folder in zip(last, folders, strict=True)]


def load(cfg):
    """{name: Served} of all models and adapters, their engines running. UserError for a folder that is none."""
    from model.adapters.adapted import switch
    from model.adapters.folder import load_adapter
    from model.checkpoint import load_model
    from model.constrain import Vocabulary
    from model.device import pick_device, pick_dtype
    from model.engine import Engine
    from scripts.openai_app import Served
    folders = [folder for folder in cfg.model.split(",") if folder]
    adapters = [folder for folder in cfg.adapter.split(",") if folder]
    names = names_of([*folders, *adapters])
    if not folders or len(set(names)) < len(names):
        raise UserError(f"--model {cfg.model} --adapter {cfg.adapter}: expected different folders, by commas")
    device = pick_device(cfg.device)
    loaded, fitting = {}, {}                               # name: (model, tokenizer); adapter's name: model's name
    for name, folder in zip(names[:len(folders)], folders, strict=True):
        path = or_shipped(ROOT / folder) if folder == DEFAULT_MODEL else pathlib.Path(folder)
        if not path.is_dir():
            raise UserError(f"--model {folder}: there is no such folder; train one (python trainer/train_full_sft.py) "
                            "or name another")
        loaded[name] = load_model(path, device, pick_dtype(cfg.dtype, device), cfg.rope_scaling, cfg.quantize)
    for name, folder in zip(names[len(folders):], adapters, strict=True):
        refusals = []
        for base, (model, _) in loaded.items():
            try:
                load_adapter(model, folder, name.replace(".", "_"))
                fitting[name] = base
                break
            except UserError as error:
                refusals.append(error)
        else:
            raise refusals[0]
    served = {}
    for name, (model, tokenizer) in loaded.items():
        if model.adapters:
            switch(model, None)
        engine = Engine(model, tokenizer, cfg.concurrency, cfg.kv_tokens, max_queue=cfg.queue)
        served[name] = Served(name, engine, Vocabulary(tokenizer, model.config.vocab_size))
    for name, base in fitting.items():
        served[name] = Served(name, served[base].engine, served[base].vocabulary, name.replace(".", "_"), base)
    return served


def listen(cfg):
    """A socket that listens at --host and --port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"--host {cfg.host} --port {cfg.port}: cannot listen there ({error}); is another server "
                        "running? --port 0 takes a free one") from error


def make_server(app, gate, cfg):
    """A uvicorn server that ends when it was told to and no answer is on its way any more."""
    import uvicorn

    class Server(uvicorn.Server):
        told = None                                        # when it was told to end

        def handle_exit(self, signum, frame):
            if gate.draining:                              # the second time
                self.should_exit = self.force_exit = True
            self.told, gate.draining = time.monotonic(), True

        async def on_tick(self, counter):                  # ten times a second
            late = gate.draining and time.monotonic() > self.told + cfg.drain_seconds
            return await super().on_tick(counter) or late or gate.draining and gate.inflight == 0

    return Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, ws="none",
                                 lifespan="off", timeout_keep_alive=30, timeout_graceful_shutdown=3))


def main(cfg):
    check(cfg)
    cfg.api_key = cfg.api_key or os.environ.get("ACORN_API_KEY", "")
    sock = listen(cfg)                                     # before the models: a port that is taken is told at once
    served = load(cfg)
    from scripts.openai_app import build_app
    app, gate = build_app(served, cfg)
    address, port = sock.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    if not cfg.api_key and not (address.startswith("127.") or address == "::1"):
        print("warning: others can reach this server, and it asks for no key (ACORN_API_KEY)", file=sys.stderr)
    print(f"{', '.join(served)} at http://{shown}:{port}/v1 (Ctrl-C ends it)", flush=True)
    server = make_server(app, gate, cfg)
    server.run(sockets=[sock])
    for engine in {id(entry.engine): entry.engine for entry in served.values()}.values():
        engine.close(drain=False)                          # what could still finish has


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")      # for terminals that lack a character
    run(main, parse_args(Config, description=__doc__, hints=HINTS))
