"""Print the first line of a command while its modules are imported, which can take a minute.

Also print pages of help to a reader, such as ``head``, that may stop early.
"""

import gc
import os
import signal
import sys
import threading
from typing import NoReturn

_AFTER_S = 0.5  # a command that starts faster prints nothing
_timer: threading.Timer | None = None
_THRESHOLDS = gc.get_threshold()


def announce(module: str) -> None:
    """Print on the first rank, half a second later, that ``module`` is loading, unless `loaded` is called before.

    Returns at once.  Garbage collection is rare until `loaded`: while modules are imported, it takes a sixth of the
    time and finds nothing.
    """
    global _timer  # noqa: PLW0603
    gc.set_threshold(50_000)
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if _timer is None and is_first and not {"-h", "--help"} & set(sys.orig_argv):
        _timer = threading.Timer(_AFTER_S, _print, [module])
        _timer.daemon = True
        _timer.start()


def _print(module: str) -> None:
    print(f"{module}: loading torch and the recipe's modules", file=sys.stderr, flush=True)


def announce_module() -> None:
    """Announce the module that ``python -m`` is about to run.

    Call it while the module's package is imported: only then argv[0] is ``-m``.  At other times it does nothing.
    """
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv[:-1]:
        announce(sys.orig_argv[sys.orig_argv.index("-m") + 1])


def print_page(text: str) -> None:
    """Print ``text``; exit with code 141, a shell's code for SIGPIPE, if the reader has closed the pipe."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        leave_closed_pipe()


def leave_closed_pipe() -> NoReturn:
    """Exit quietly with code 141, because the reader of standard output is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
    sys.exit(128 + signal.SIGPIPE)


def loaded() -> None:
    """Cancel the line of `announce` if it is not printed yet, and collect garbage as usual: the imports are done."""
    gc.set_threshold(*_THRESHOLDS)
    if _timer is not None:
        _timer.cancel()
