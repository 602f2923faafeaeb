"""Process groups of a rank: created, used and destroyed in one context manager."""

import datetime
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from longctx.config import Mesh
from longctx.megatron.cpu_shim import let_training_run
from longctx.parallel.comm import Comm, SingleRankComm
from longctx.parallel.dist_comm import DistComm, name_failed_collectives
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_no_gpu

# megatron-core's advice for GPUs, which it also gives on CPUs and without gradients.
_ADVICE = (
    "When using async grad allreduce it is recommended to set the environment variable",
    "To guarantee overlapping TP and SP collectives with the backward ?GEMMs, set environment variable",
    "fp8_autocast is deprecated",  # Transformer Engine's, about megatron-core's call
    "Cannot quantize input tensor. Performing all-gather in high precision",  # for widths that 128 does not divide
)
# Warnings about calls that megatron-core's optimizer, recomputation and checkpoints make.
_TRAINING_WARNINGS = (
    "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "When using sequence parallelism it is recommended to set the environment variable",
    "MimoModelConfig is experimental",  # megatron-core's, which its optimizer imports for every model
)

# By init method: the ranks' key-value store, and a counter of its uses.
_STORES: dict[str, tuple[dist.Store, Iterator[int]]] = {}


@dataclass(frozen=True)
class Runtime:
    """A rank with its device and its groups.

    The ranks of ``tp`` share each layer's weights.  The ranks of ``ulysses`` and ``ring`` share the sequence.
    ``context`` is the group of both (rank = ring rank * ulysses size + ulysses rank).  ``tp_context`` is the group of
    ``context`` and ``tp``.  The ranks of ``ep`` divide the experts of each layer.  ``world`` is all ranks.  ``groups``
    is megatron-core's `ProcessGroupCollection` of the mesh, and ``alone`` one of this rank only.
    """

    rank: Rank
    mesh: Mesh
    device: torch.device
    groups: ProcessGroupCollection
    alone: ProcessGroupCollection
    tp: Comm
    ulysses: Comm
    ring: Comm
    context: Comm
    tp_context: Comm
    ep: Comm
    world: Comm

    def slowest(self, seconds: list[float]) -> list[float]:
        """Return the element-wise maximum of ``seconds`` over all ranks; each calls this with equally many numbers."""
        mine = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        ranks = self.world.all_gather(mine, [tuple(mine.shape)] * self.world.size)
        return [float(x) for x in torch.stack(ranks).amax(0)]


@contextmanager
def open_runtime(
    rank: Rank,
    mesh: Mesh,
    *,
    device: str = "cpu",
    threads: int = 1,
    timeout_minutes: int = 30,
    training: bool = False,
) -> Iterator[Runtime]:
    """Create the process groups of ``mesh``, yield this rank's `Runtime`, and destroy the groups after the block.

    Every rank enters it.  ``device`` is "cpu" (gloo) or "cuda" (NCCL; local ranks take the GPUs in turn).  ``threads``
    is torch's number of CPU threads per rank.  ``training`` also makes megatron-core's training code run on machines
    without CUDA.

    A collective raises `LostPeer` at once if a rank has died, and after ``timeout_minutes`` if a rank does not answer.
    After an error the groups are not destroyed, because that would wait for the other ranks; the process must end.

    Raises ValueError if the number of started ranks is not the mesh's, and for "cuda" on a machine without a GPU.
    """
    if rank.world_size != mesh.ranks:
        raise ValueError(
            f"{rank.world_size} ranks were started, but the mesh has {mesh.ranks} ({mesh}); "
            f"start {mesh.ranks} ranks, or use a mesh of {rank.world_size}"
        )

    # 1. The device, and megatron-core's training code on CPUs.
    torch.set_num_threads(threads)
    if training:
        let_training_run()
    torch_device = torch.device("cpu")
    if device == "cuda":
        refuse_no_gpu(device)
        torch_device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(torch_device)

    # 2. The group of all ranks.
    _init_world(rank, torch_device, datetime.timedelta(minutes=timeout_minutes))

    # 3. The mesh's groups, for the block.
    with warnings.catch_warnings(), name_failed_collectives():
        for message in (*_ADVICE, *(_TRAINING_WARNINGS if training else ())):
            warnings.filterwarnings("ignore", message=message)
        rank_runtime = _create_groups(rank, mesh, torch_device, timeout_minutes)
        if training:
            _track_generators(torch_device)
        yield rank_runtime
    for comm in vars(rank_runtime).values():
        if isinstance(comm, DistComm):
            comm.close()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _init_world(rank: Rank, device: torch.device, timeout: datetime.timedelta) -> None:
    """Initialise torch.distributed, and with it the group of all ranks."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_fresh_store(rank, timeout),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timeout,
        # NCCL then connects each group when it is created.  Otherwise it would connect a group in its first call, in
        # which all its ranks would have to take part.  The first exchange of a ring may leave out ranks without rows.
        device_id=device if on_gpu else None,
    )


def _fresh_store(rank: Rank, timeout: datetime.timedelta) -> dist.Store:
    """Return a key-value store at which the ranks exchange addresses, with a key prefix that is new at each call.

    Launched ranks create process groups repeatedly.  Under the same keys they would find the addresses of earlier
    groups.  The store itself stays open, because rank 0 serves it.
    """
    if rank.init_method not in _STORES:
        _STORES[rank.init_method] = (
            next(rendezvous(rank.init_method, rank.rank, rank.world_size, timeout=timeout))[0],
            count(),
        )
    store, numbers = _STORES[rank.init_method]
    store.set_timeout(timeout)
    return PrefixStore(f"longctx/{next(numbers)}", store)


def _track_generators(device: torch.device) -> None:
    """Initialise the random states that megatron-core's tensor-parallel layers require.

    Nothing is drawn from them, because there is no dropout.
    """
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    else:
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def _create_groups(rank: Rank, mesh: Mesh, device: torch.device, timeout_minutes: int) -> Runtime:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        context_parallel_size=mesh.context,
        hierarchical_context_parallel_sizes=[mesh.ulysses, mesh.ring],
        expert_model_parallel_size=mesh.ep,
        distributed_timeout_minutes=timeout_minutes,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ulysses, ring = parallel_state.get_hierarchical_context_parallel_groups()
    world = dist.group.WORLD
    assert world is not None
    own = dist.new_group([rank.rank], use_local_synchronization=True)
    # If a rank ended while others still connect a group with it, they would fail.
    dist.barrier()
    # The groups that a model on a single rank uses.
    names = ("tp", "cp", "pp", "embd", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep")
    alone = ProcessGroupCollection(**dict.fromkeys(names, own))

    def comm(group: dist.ProcessGroup) -> Comm:
        return DistComm(group, 60.0 * timeout_minutes) if group.size() > 1 else SingleRankComm()

    comms = (comm(group) for group in (groups.tp, ulysses, ring, groups.cp, groups.tp_cp, groups.ep, world))
    return Runtime(rank, mesh, device, groups, alone, *comms)
