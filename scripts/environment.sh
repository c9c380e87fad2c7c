# Sourced by quickstart.sh and test.sh: makes .venv once, and `install FILE` brings it to a requirements file once.

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 bash $0)" >&2
    exit 2
fi
if [ ! -e .venv/bin/python ] && [ ! -e .venv/Scripts/python.exe ]; then
    echo "making a virtual environment in .venv"
    "$PYTHON" -m venv .venv || { echo "error: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
fi
PY=.venv/bin/python
[ -e "$PY" ] || PY=.venv/Scripts/python.exe      # Windows, from Git's bash

install() {
    local stamp=".venv/$1.installed"
    if ! cat requirements*.txt | cmp -s - "$stamp"; then
        echo "installing the packages of $1"
        "$PY" -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements*.txt > "$stamp"
    fi
}
