#!/usr/bin/env bash
# MiniMind's classic run on real data, for one GPU with 24 GB or less (a CPU will do for small files): a virtual
# environment in .venv, the packages, 2.9 GB of data, then pretraining, fine-tuning and DPO of a 26M model and a report
# (scripts/minimind.py has the steps and the flags). Run it again and it continues where it stopped.
#
#     bash scripts/minimind.sh
#     PRICE_PER_HOUR=0.2 bash scripts/minimind.sh                          each stage says what it will cost
#     HF_ENDPOINT=https://hf-mirror.com bash scripts/minimind.sh           the data from a mirror
#     bash scripts/minimind.sh --pretrain my.jsonl --sft chats.jsonl --size 4x256 --out out/mine
#     NO_VENV=1 PYTHON=python3 bash scripts/minimind.sh                    with the packages of that Python
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
root=$PWD
if [ -n "${NO_VENV:-}" ]; then
    PY=${PYTHON:-python3}
else
    . scripts/environment.sh
    install requirements.txt
    PY=$root/$PY
fi
cd "$started_in"                                  # files named by flags are looked for from there
exec "$PY" "$root/scripts/minimind.py" ${PRICE_PER_HOUR:+--price_per_hour "$PRICE_PER_HOUR"} "$@"
