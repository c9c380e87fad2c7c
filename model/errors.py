"""Mistakes of the person at the keyboard, told in one line.

A `UserError` carries what is wrong, where (file and line, flag or field) and what to do about it. Every entry point
runs its main function through `run`, which prints that line and exits with code 2: no traceback for a wrong path.
Anything else that goes wrong is a defect of this project and keeps its traceback.
"""

import errno
import os
import sys


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do."""


def run(main, *args):
    """Call `main(*args)` as a script's entry point; a `UserError` becomes one line on stderr and exit code 2.

    So does a full disk; and a lost rank, whose host or process is gone, becomes one line on every other and code 1.
    """
    try:
        return main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" of {error.filename}" if error.filename else ""
        print(f"error: no space left on the disk{where}; make room and start the same command again: a training run "
              "continues from its last save", file=sys.stderr)
        leave(2)
    except RuntimeError as error:
        from model.device import explain_lost_ranks  # here: it takes a second, and few scripts need it
        told = explain_lost_ranks(error)
        if not told:
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
        os._exit(1)                                        # sys.exit would wait for operations that never end


def leave(code):
    """End the process. One of several ranks ends at once: torch's threads of communication, still at work then, can
    abort an orderly end, and the exit code would be theirs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
