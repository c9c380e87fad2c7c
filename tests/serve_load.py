"""64 clients at once against scripts/serve_openai_api.py, and the same requests one after the other.

run     python tests/serve_load.py                out/full_sft; writes tests/results/serve_load.json
        python tests/serve_load.py --clients 16 --model out/pretrain --out ""

Every client streams one answer of up to --tokens tokens at temperature 0 in float32. Asserted: no error, and each
answer equals the one that the same request gets alone. Reported, for each of several rounds: tokens/s of some requests
one at a time and right after that of all together (the same server, the same clients), the time to the first token,
and on Linux the server's CPU time per token, which says more where other programs want the cores, too. The server
computes with one thread, as the clients need the other core of a small machine. Not collected by pytest: figures
depend on what else the machine does.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])         # the project root, not tests/

import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass

from model.cli import arg, parse_args

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = "Mia Tom Ana Ben Lily Max Ruby Omar Iris Leo Ella Paul Nora Sam Zoe Kira".split()
STARTS = ("Once upon a time {} went to the river", "One day {} found a small box", "{} lives in a little house",
          "The best friend of {} is")


@dataclass
class Config:
    model: str = arg("out/full_sft", "checkpoint folder")
    clients: int = arg(64, "how many clients stream at once")
    tokens: int = arg(128, "longest answer")
    serial: int = arg(16, "how many of the requests are timed one at a time (all of them are compared)")
    rounds: int = arg(3, "how often both are timed")
    out: str = arg("tests/results/serve_load.json", "file for the figures; empty: none")


async def ask(port, body):
    """(text, completion tokens, seconds to the first token, seconds) of one streamed completion.

    HTTP by hand, as a client library would take more of the machine than the server does.
    """
    begin, first, text, usage = time.perf_counter(), None, "", None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head + await reader.read(2000)
    while True:
        line = await reader.readline()
        assert line, "the stream ended without [DONE]"
        if not line.startswith(b"data: "):                 # sizes of chunks and empty lines
            continue
        if line.startswith(b"data: [DONE]"):
            break
        chunk = json.loads(line[6:])
        assert "error" not in chunk, chunk
        usage = chunk["usage"]
        for choice in chunk["choices"]:
            if choice["text"] and first is None:
                first = time.perf_counter() - begin
            text += choice["text"]
    writer.close()
    return text, usage["completion_tokens"], first or time.perf_counter() - begin, time.perf_counter() - begin


def cpu_seconds(pid):
    """CPU time that a process has taken so far; NaN where the system does not tell it in this way."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def timed(requests, pid):
    """(answers, tokens/s, the server's CPU milliseconds per token) of requests, an awaitable of a list of answers."""
    begin, cpu = time.perf_counter(), cpu_seconds(pid)
    answers = await requests
    seconds, cpu = time.perf_counter() - begin, cpu_seconds(pid) - cpu
    tokens = sum(tokens for _, tokens, _, _ in answers)
    return answers, tokens / seconds, 1000 * cpu / tokens


async def in_turn(port, bodies):
    return [await ask(port, body) for body in bodies]


async def measure(cfg, port, name, pid):
    bodies = [{"model": name, "prompt": start.format(who), "max_tokens": cfg.tokens, "temperature": 0, "stream": True,
               "stream_options": {"include_usage": True}} for start in STARTS for who in NAMES]
    bodies = [bodies[place % len(bodies)] for place in range(cfg.clients)]
    await ask(port, bodies[0])                             # what the first request of all has to wait for
    texts = [text for text, _, _, _ in await in_turn(port, bodies)]
    some, rounds, different = bodies[::max(1, len(bodies) // cfg.serial)], [], 0
    for _ in range(cfg.rounds):
        alone, serial_rate, serial_cpu = await timed(in_turn(port, some), pid)
        together, rate, cpu = await timed(asyncio.gather(*(ask(port, body) for body in bodies)), pid)
        different += sum(text != answer[0] for text, answer in zip(texts, together, strict=True))
        waits = sorted(answer[2] for answer in together)
        rounds.append({
            "tokens_per_second": round(rate), "serial_tokens_per_second": round(serial_rate),
            "ratio": round(rate / serial_rate, 2),
            "server_cpu_ms_per_token": round(cpu, 3), "serial_server_cpu_ms_per_token": round(serial_cpu, 3),
            "first_token_seconds_p50": round(statistics.median(waits), 3),
            "first_token_seconds_p95": round(waits[min(len(waits) - 1, int(0.95 * len(waits)))], 3),
            "serial_first_token_seconds_p50": round(statistics.median(answer[2] for answer in alone), 4),
            "load_average": round(os.getloadavg()[0], 1) if os.name == "posix" else None})
    return {"clients": cfg.clients, "completion_tokens": sum(tokens for _, tokens, _, _ in together),
            "answers_that_differ_from_serial": different,
            "median_ratio": statistics.median(figures["ratio"] for figures in rounds), "rounds": rounds}


def main(cfg):
    command = [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py"), "--model", cfg.model, "--port", "0",
               "--dtype", "float32", "--device", "cpu", "--concurrency", str(max(cfg.clients, 1))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        line = server.stdout.readline()
        name, port = re.match(r"(\S+) at http://[^ ]*:(\d+)/v1", line).groups()
        figures = {"model": cfg.model, "max_tokens": cfg.tokens, "cores": os.cpu_count(),
                   "python": platform.python_version(), **asyncio.run(measure(cfg, int(port), name, server.pid))}
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    figures["exit_code"] = code
    print(json.dumps(figures, indent=2))
    if cfg.out:
        path = ROOT / cfg.out
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    assert figures["answers_that_differ_from_serial"] == 0 and code == 0


if __name__ == "__main__":
    main(parse_args(Config, description=__doc__))
