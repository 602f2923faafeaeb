"""A function called on every rank of emulated hosts; rank 0's result returns to the caller.

The ranks run this file as ``python -m recipes.bench.host_call FOLDER``, which has the pickled call.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from longctx.parallel.launch import Rank
from longctx.parallel.launcher import current_rank
from recipes.bench.hosts import run_on_hosts

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


def call_on_hosts(
    hosts: int, rate: str, latency_us: float, rank_main: Callable[[Rank, *Args], Result], *args: *Args
) -> Result:
    """Run ``rank_main(rank, *args)`` on each of ``hosts`` emulated hosts; return the first rank's result.

    ``rank_main``, ``args`` and the result must be picklable.  ``rate`` and ``latency_us`` are as in `emulated_hosts`,
    whose ValueError passes.  Raises `RankFailed` if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((rank_main, args)))
        run_on_hosts(hosts, rate, [sys.executable, "-m", "recipes.bench.host_call", folder], latency_us)
        result: Result = pickle.loads(Path(folder, "result").read_bytes())
        return result


def main(folder: str) -> None:
    """Make the call in ``folder`` on this rank; the first rank writes its result there."""
    rank = current_rank()
    assert rank, "recipes.bench.hosts starts this"
    rank_main, args = pickle.loads(Path(folder, "call").read_bytes())
    result = rank_main(rank, *args)
    if rank.rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
