#!/usr/bin/env bash
# From nothing to a trained chat model: a virtual environment in .venv, the packages, then every stage on the built-in
# world (scripts/quickstart.py). Run it again and it continues where it stopped, or says that it is done.
#
#     bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt
exec "$PY" scripts/quickstart.py "$@"
