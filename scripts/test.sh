#!/usr/bin/env bash
# Set up everything the tests need, check the style, and run the whole suite: two workers of one thread each.
#
#     bash scripts/test.sh                    all
#     bash scripts/test.sh tests/test_moe.py  some
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements-dev.txt
"$PY" -m ruff check .
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false exec "$PY" -m pytest -n 2 --dist worksteal --durations 15 "$@"
