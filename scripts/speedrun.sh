#!/usr/bin/env bash
# From nothing to a fixed goal, as fast as possible (scripts/speedrun.py; records in EXPERIMENTS.md).
#
#     bash scripts/speedrun.sh          two CPU cores: 70 % of the built-in exercises
#     bash scripts/speedrun.sh gpu      one GPU: a fixed number of bits per byte on TinyStories
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt
exec "$PY" scripts/speedrun.py "$@"
