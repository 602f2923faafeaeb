"""Checkpoints of a training run, in megatron-core's distributed format.

A checkpoint is complete or absent, and a run can resume from it on any mesh.
"""

import os
import pickle
import queue
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from longctx.checkpoint_index import (
    PARTIAL,
    checkpoint_folders,
    content_fault_of,
    fault_of,
    folder_name,
    foreign_content_of,
    latest_whole,
    read_metadata,
    refuse_none_whole,
    write_index,
)
from longctx.checksum import crc32_of_files
from longctx.megatron.model import GPTModel
from longctx.megatron.training.saved_state import (
    METADATA,
    make_loadable,
    match_groups,
    optimizer_states,
    sharded_state,
)
from longctx.megatron.training.state import TrainState, apply_optim_settings

# megatron-core 0.19 lets another package write checkpoints by default.  Such checkpoints have no common.pt.
_IS_0_19 = "async_strategy" in signature(dist_checkpointing.save).parameters


class Checkpoints:
    """Writes checkpoints ``folder``/step-00000020 etc. and keeps the last ``keep``.  Every rank makes the same calls.

    Writing is asynchronous.  Forked processes write a snapshot of the state to a partial folder while training
    continues.  Once all ranks have written, `poll` renames the partial folder to its final name.  Then it removes
    corrupt checkpoints, those beyond the last ``keep``, those of later steps, and those that the run did not resume
    from: ones after step ``resumed`` that existed before (None: there are none).
    The constructor removes partial folders that a killed run left.  ``say`` receives a line for each checkpoint that
    cannot be removed.
    """

    def __init__(
        self, folder: Path, keep: int, resumed: int | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._keep, self._say = folder, keep, say
        existing = [] if resumed is None else checkpoint_folders(folder)
        self._stale = {place for place in existing if place.name > folder_name(resumed or 0)}
        self._queue = AsyncCallsQueue(persistent=False)
        self._attempt = _from_first_rank(uuid.uuid4().hex[:8])
        if _is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            for partial_folder in folder.glob(f"step-*{PARTIAL}*"):
                shutil.rmtree(partial_folder, ignore_errors=True)
        dist.barrier()

    def save(self, train_state: TrainState, step: int, metadata: dict[str, Any]) -> None:
        """Start to write the state after ``step`` steps, with ``metadata`` (JSON) in its run.json.

        Waits until the checkpoint before it is complete.
        """
        self.poll(wait=True)
        # The name contains this attempt's id, because a writer of a killed attempt may still be running.
        partial_folder = self._folder / f"{folder_name(step)}{PARTIAL}-{self._attempt}"
        if _is_first_rank():
            partial_folder.mkdir()
        dist.barrier()
        filesystem_async._results_queue = _ResultFile(partial_folder / f".result-{dist.get_rank()}")
        state = {**sharded_state(train_state, loading=False), "rng": torch.get_rng_state()}
        writer = {"async_strategy": "mcore"} if _IS_0_19 else {}
        request = dist_checkpointing.save(
            state, str(partial_folder), async_sharded_save=True, content_metadata=dict(METADATA), **writer
        )
        request.add_finalize_fn(partial(self._finalize, partial_folder, {"step": step, **metadata}))
        self._queue.schedule_async_request(request)

    @property
    def latest(self) -> Path:
        """The newest complete checkpoint; at least one must exist."""
        checkpoint, _ = latest_whole(self._folder)
        assert checkpoint, "nothing has been saved"
        return checkpoint

    def poll(self, *, wait: bool = False) -> None:
        """Complete checkpoints that all ranks have written; with ``wait``, first wait for those being written."""
        self._queue.maybe_finalize_async_calls(blocking=wait)

    def _finalize(self, partial_folder: Path, metadata: dict[str, Any]) -> None:
        checksums = _compute_checksums(partial_folder)
        if _is_first_rank():
            place = self._folder / folder_name(metadata["step"])
            commit(partial_folder, place, metadata, checksums)
            self._stale.discard(place)
            self._prune(metadata["step"])
        dist.barrier()

    def _prune(self, step: int) -> None:
        """Remove all checkpoints but the last complete ones up to ``step``, as many as the constructor's ``keep``.

        Later checkpoints are stale: the run was resumed from an earlier checkpoint.
        """
        existing = [place for place in checkpoint_folders(self._folder) if place not in self._stale]
        complete = [place for place in existing if not fault_of(place) and place.name <= folder_name(step)]
        for place in sorted({*checkpoint_folders(self._folder)} - set(complete[-self._keep :])):
            try:
                remove(place)
            except OSError as error:
                self._say(
                    f"the run goes on, but cannot remove checkpoint {place} ({error.strerror}): remove it by hand"
                )


def remove(place: Path) -> None:
    """Remove a checkpoint; of a link to a checkpoint, only the link."""
    if place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place)


def _compute_checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of each file of ``folder`` by name.  Every rank calls this and reads its share of the files."""
    names: list[str] = _from_first_rank(sorted(file.name for file in folder.iterdir()) if _is_first_rank() else None)
    own = names[dist.get_rank() :: dist.get_world_size()]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, dict(zip(own, crc32_of_files(folder / name for name in own), strict=True)))
    by_name = {name: crc for share in shares for name, crc in share.items()}
    return {name: by_name[name] for name in names}


def commit(partial_folder: Path, place: Path, metadata: dict[str, Any], checksums: dict[str, int]) -> None:
    """Complete a checkpoint: write its run.json, then rename ``partial_folder`` to ``place``.

    ``checksums`` has the CRC-32 of each file by name.  A folder or link at ``place`` is replaced.
    """
    write_index(partial_folder, metadata, checksums)
    with suppress(OSError):  # there is none; or the next line raises
        remove(place)
    partial_folder.rename(place)


def agreed_on_all_ranks(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of ``folder`` (None if there is none), and a line for each skipped one.

    Every rank gets the first rank's answer, so that all resume from the same checkpoint.  The first rank reads all
    files and compares their checksums.

    Raises ValueError, on every rank, if the first rank sees checkpoints, but none is whole.  Also raises ValueError on
    a rank whose file system lacks the checkpoint: all machines must share the folder.
    """
    answer = _from_first_rank(_latest_or_error(folder) if _is_first_rank() else None)
    if isinstance(answer, ValueError):
        raise answer
    place, skipped = answer
    if place and fault_of(place):
        raise ValueError(f"{place} is incomplete on this machine; set out= to a folder that all machines share")
    return place, skipped


def _latest_or_error(folder: Path) -> tuple[Path | None, list[str]] | ValueError:
    """Return the answer of `agreed_on_all_ranks`, or the error that every rank must raise."""
    place, skipped = latest_whole(folder, content_fault_of)
    try:
        refuse_none_whole(folder, place, skipped)
    except ValueError as error:
        return error
    return place, skipped


def load(place: Path, train_state: TrainState) -> None:
    """Load the checkpoint at ``place`` into ``train_state``, and set torch's random state (CPU) to the saved one.

    The mesh may differ from the mesh that wrote the checkpoint.  This run's optimizer settings replace the saved ones.
    Every rank calls this.
    """
    optimizers = train_state.optimizer.chained_optimizers
    for optimizer in optimizers:
        make_loadable(optimizer)
    state = {**sharded_state(train_state, loading=True), "rng": torch.get_rng_state()}
    result = read_state(state, place)
    train_state.net.load_state_dict(result["model"])
    states = optimizer_states(result["optimizer"])
    for optimizer, of_optimizer in zip(optimizers, states, strict=True):
        match_groups(of_optimizer, train_state.optim)
        optimizer.load_state_dict(of_optimizer)
    train_state.schedule.load_state_dict(result["schedule"])
    apply_optim_settings(train_state)
    torch.set_rng_state(result["rng"])


def load_weights(place: Path, net: GPTModel) -> None:
    """Load only the weights of the checkpoint at ``place`` into ``net``.  Every rank calls this."""
    result = read_state({"model": net.sharded_state_dict(metadata=dict(METADATA))}, place)
    net.load_state_dict(result["model"])


def read_state(state: dict[str, Any], place: Path) -> dict[str, Any]:
    """Return the sharded ``state`` filled with values of the checkpoint at ``place``; run no code in the checkpoint.

    Raises ValueError if the checkpoint has anything but tensors and plain values, or refers to files outside.  Also
    raises it if only a newer megatron-core can read the checkpoint.
    """
    if foreign := foreign_content_of(place, read_metadata(place)):
        raise ValueError(f"{place}: {foreign}; use a checkpoint that longctx wrote")
    if not (_IS_0_19 or (place / "common.pt").exists()):
        raise ValueError(f"{place} was written with megatron-core 0.19; use Python 3.12 or newer, which installs it")
    try:
        with _unpickle_weights_only(), warnings.catch_warnings():
            # torch's, about megatron-core's calls
            warnings.filterwarnings("ignore", "torch.distributed is disabled|The argument order of load has been")
            result: dict[str, Any] = dist_checkpointing.load(state, str(place))
            return result
    except (pickle.UnpicklingError, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        reason = " ".join(str(causes[0]).split())[:200]
        raise ValueError(f"{place} cannot be read as tensors and plain values ({reason}); use another one") from error


@contextmanager
def _unpickle_weights_only() -> Iterator[None]:
    """Make every `torch.load` inside the block refuse code; torch's checkpoint reader would allow it."""
    names = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[1]] = "1"
    try:
        yield
    finally:
        del os.environ[names[1]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _is_first_rank() -> bool:
    return dist.get_rank() == 0


def _from_first_rank(value: Any) -> Any:
    """Return, on every rank, the ``value`` that the first rank has passed."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class _ResultFile:
    """A one-message queue in a file, through which a forked writer reports to the rank that forked it.

    It has the two methods of `queue.Queue` that megatron-core calls; their names must stay.
    megatron-core's own queue spawns a server process, which takes seconds to start and outlives a killed rank.
    A rank without tensors to write makes no file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def put(self, message: Any) -> None:
        self._file.write_bytes(pickle.dumps(message))

    def get_nowait(self) -> Any:
        if not self._file.exists():
            raise queue.Empty
        content = self._file.read_bytes()
        self._file.unlink()
        return pickle.loads(content)
