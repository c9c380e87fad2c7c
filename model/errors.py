"""Mistakes of the person at the keyboard, told in one line.

A `UserError` carries what is wrong, where (file and line, flag or field) and what to do about it. Every entry point
runs its main function through `run`, which prints that line and exits with code 2: no traceback for a wrong path.
Anything else that goes wrong is a defect of this project and keeps its traceback.
"""

import sys


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do."""


def run(main, *args):
    """Call `main(*args)` as a script's entry point; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        return main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
