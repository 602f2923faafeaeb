"""One place that starts and stops process groups."""

import datetime
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from longctx.config import Mesh
from longctx.megatron.cpu_shim import let_training_run
from longctx.parallel.comm import Comm, DistComm, SingleRankComm, name_failed_collectives
from longctx.parallel.launch import Rank

# megatron-core's advice for GPUs, given on CPUs and without gradients too.
_ADVICE = ("When using async grad allreduce it is recommended to set the environment variable",)
# What torch says of the calls that megatron-core's optimizer, recompute and checkpoints make.
_OF_ITS_OWN_CALLS = (
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "When using sequence parallelism it is recommended to set the environment variable",
)

_MEETINGS: dict[str, tuple[dist.Store, Iterator[int]]] = {}


@dataclass(frozen=True)
class Runtime:
    """A rank among its groups.

    ``tp`` shares each layer's weights; ``ulysses`` and ``ring`` share the sequence, ``context`` is both together
    (rank = ring rank * ulysses size + ulysses rank); ``world`` are all ranks.  ``groups`` are megatron-core's,
    ``alone`` the same kind for this rank by itself.
    """

    rank: Rank
    mesh: Mesh
    device: torch.device
    groups: Any
    alone: Any
    tp: Comm
    ulysses: Comm
    ring: Comm
    context: Comm
    world: Comm


@contextmanager
def runtime(
    rank: Rank,
    mesh: Mesh,
    *,
    device: str = "cpu",
    threads: int = 1,
    timeout_minutes: int = 30,
    training: bool = False,
) -> Iterator[Runtime]:
    """Process groups of ``mesh`` while the block runs: gloo for ``device`` cpu, NCCL for cuda.

    ``training`` also makes megatron-core's training machinery run where there is no CUDA.

    A collective that a silent rank keeps waiting for ``timeout_minutes`` raises; a dead rank is noticed at once.  What
    was waited for is in the `LostPeer`.
    An error leaves the groups as they are, for the process to end with: taking them down would wait for others.
    Raises ValueError if the launcher started another number of ranks than ``mesh`` has.
    """
    if rank.world_size != mesh.ranks:
        raise ValueError(f"{rank.world_size} ranks were started, the mesh has {mesh.ranks} ({mesh})")
    torch.set_num_threads(threads)
    if training:
        let_training_run()
    here = torch.device("cpu")
    if device == "cuda":
        here = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(here)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_fresh_store(rank, datetime.timedelta(minutes=timeout_minutes)),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    with warnings.catch_warnings(), name_failed_collectives():
        for message in (*_ADVICE, *(_OF_ITS_OWN_CALLS if training else ())):
            warnings.filterwarnings("ignore", message=message)
        groups = _groups(rank, mesh, here, timeout_minutes)
        if training:
            _track_generators(here)
        yield groups
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _fresh_store(rank: Rank, timeout: datetime.timedelta) -> dist.Store:
    """Where ranks find each other: of ranks that a launcher started, which come here again, each time another part.

    In the same one they would find the addresses of the time before.  The store itself stays: rank 0 serves it.
    """
    if rank.init_method not in _MEETINGS:
        _MEETINGS[rank.init_method] = (
            next(rendezvous(rank.init_method, rank.rank, rank.world_size, timeout=timeout))[0],
            count(),
        )
    store, times = _MEETINGS[rank.init_method]
    store.set_timeout(timeout)
    return dist.PrefixStore(f"longctx/{next(times)}", store)


def _track_generators(device: torch.device) -> None:
    """What megatron-core's tensor-parallel layers ask for, though nothing is drawn here: there is no dropout."""
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    else:
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def _groups(rank: Rank, mesh: Mesh, device: torch.device, timeout_minutes: int) -> Runtime:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        context_parallel_size=mesh.context,
        hierarchical_context_parallel_sizes=[mesh.ulysses, mesh.ring],
        distributed_timeout_minutes=timeout_minutes,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
    everybody = dist.group.WORLD
    assert everybody is not None
    own = dist.new_group([rank.rank], use_local_synchronization=True)
    # A model that runs on this rank by itself asks for these groups only.
    alone = ProcessGroupCollection(tp=own, cp=own, pp=own, embd=own, ep=own, tp_cp=own)
    comms = (_comm(group) for group in (groups.tp, ulysses, ring, groups.cp, everybody))
    return Runtime(rank, mesh, device, groups, alone, *comms)


def _comm(group: dist.ProcessGroup) -> Comm:
    return DistComm(group) if group.size() > 1 else SingleRankComm()
