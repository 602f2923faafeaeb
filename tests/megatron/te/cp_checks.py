"""Run all checks of Transformer Engine's context parallelism in one process and its ranks; write their results.

``LONGCTX_TE=WHEEL NVTE_TORCH_COMPILE=0 python -m tests.megatron.te.cp_checks FILE``.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longctx.config import Mesh
from longctx.parallel.launch import RankFailed, run_ranks, warm_up
from tests.megatron.te.cp_ranks import Case, compare, noticed, run_bench

PEERS = ("te_p2p", "te_all_gather", "te_a2a", "te_a2a+p2p")
BACKENDS = ("flash", "cudnn")


def cases_of(mesh: Mesh) -> list[Case]:
    """Return the cases of ``mesh``: each peer by each backend, windows, and one KV head where no heads travel."""
    ranks = mesh.context
    shared = [peer for peer in PEERS if peer != "te_a2a+p2p" or min(mesh.ulysses, mesh.ring) > 1]
    cases = [Case(peer, backend, (3 * ranks, ranks)) for peer in shared for backend in BACKENDS]
    cases += [Case(peer, "flash", (5, 1), chunk=1) for peer in PEERS[:2]]
    # A window shorter than a chunk, and one that reaches over several.
    windows = (5, 17)
    return [
        *cases,
        *(
            Case(peer, backend, (3 * ranks, ranks), window)
            for peer in PEERS[1:3]
            for backend in BACKENDS
            for window in windows
        ),
    ]


MESHES = (Mesh(ring=2), Mesh(ring=3), Mesh(ulysses=2, ring=2))


def main(file: Path) -> None:
    """Write ``file``: by check, what each rank returned, or the traceback of the rank that failed."""
    checks: dict[str, tuple[Any, ...]] = {str(mesh): (mesh, compare, cases_of(mesh)) for mesh in MESHES}
    checks["mutations"] = (MESHES[-1], noticed)
    checks["bench"] = (MESHES[-1], run_bench, PEERS)
    torch.save({name: _outcome(*check) for name, check in checks.items()}, file)


def _outcome(mesh: Mesh, function: Callable[..., Any], *args: Any) -> list[Any] | str:
    try:
        return run_ranks(mesh.ranks, function, mesh, *args)
    except RankFailed as error:
        return f"{error}\n{error.details}"


if __name__ == "__main__":
    warnings.simplefilter("error")
    for message in (
        "`torch.jit.script",
        "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    warm_up(["tests.megatron.te.cp_warm"])
    main(Path(sys.argv[1]))
