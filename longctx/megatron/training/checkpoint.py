"""A training run on disk: megatron-core's distributed checkpoints, whole or not there, for any mesh to go on from."""

import json
import os
import pickle
import queue
import shutil
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from longctx.checkpoint_index import PARTIAL, RUN, fault_of, latest, name_of, places
from longctx.megatron.model import GPTModel
from longctx.megatron.training.optimizer import TrainState, follow
from longctx.shapes import Tensor

# Optimizer state by parameter, not by bucket: only then may the mesh change in between.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class Checkpoints:
    """``folder/step-00000020`` and so on, of which the last ``keep`` stay.  Every rank makes the same calls.

    A checkpoint is written beside its place by forked processes, which have the weights as they were, while training
    goes on; `poll` moves it to its place once all ranks have written.  What a killed run left half-written is removed.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._writing = AsyncCallsQueue(persistent=False)
        self._attempt = _told(uuid.uuid4().hex[:8])
        if _first():
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"step-*{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()

    def save(self, trained: TrainState, step: int, about: dict[str, Any]) -> None:
        """Begin to write the state after ``step`` steps, and ``about`` (JSON) with it."""
        self.poll(wait=True)
        filesystem_async._results_queue = _Mailbox()
        # Its own name: a writer of a killed attempt may be at work still.
        partial_folder = self._folder / f"{name_of(step)}{PARTIAL}-{self._attempt}"
        if _first():
            partial_folder.mkdir()
        dist.barrier()
        state = {**_state(trained, loading=False), "rng": torch.get_rng_state()}
        request = dist_checkpointing.save(
            state, str(partial_folder), async_sharded_save=True, content_metadata=dict(_METADATA)
        )
        request.add_finalize_fn(partial(self._settle, partial_folder, {"step": step, **about}))
        self._writing.schedule_async_request(request)

    @property
    def latest(self) -> Path:
        """The newest that is in its place; ask when there is one."""
        place, _ = latest(self._folder)
        assert place, "nothing has been saved"
        return place

    def poll(self, *, wait: bool = False) -> None:
        """Put in its place what has been written; with ``wait``, all that is being written."""
        self._writing.maybe_finalize_async_calls(blocking=wait)

    def _settle(self, written: Path, about: dict[str, Any]) -> None:
        if _first():
            commit(written, self._folder / name_of(about["step"]), about)
            self._prune(about["step"])
        dist.barrier()

    def _prune(self, step: int) -> None:
        """Keep the last whole ones; what lies ahead of ``step`` is of a course that was not taken."""
        there = places(self._folder)
        whole = [place for place in there if not fault_of(place) and place.name <= name_of(step)]
        for place in set(there) - set(whole[-self._keep :]):
            shutil.rmtree(place)


def commit(written: Path, place: Path, about: dict[str, Any]) -> None:
    """Move what has been ``written`` to its ``place``, with what is known ``about`` it; a torn one there goes."""
    sizes = {file.name: file.stat().st_size for file in sorted(written.iterdir())}
    (written / RUN).write_text(json.dumps({**about, "files": sizes}, indent=1))
    shutil.rmtree(place, ignore_errors=True)
    written.rename(place)


def agreed_on_all_ranks(folder: Path) -> tuple[Path | None, list[str]]:
    """`latest` as the first rank sees it, on every rank, so that none goes another way.

    Raises ValueError on a rank that cannot see it: the folder must be of all machines.
    """
    place, passed = _told(latest(folder) if _first() else None)
    if place and fault_of(place):
        raise ValueError(f"{place} is not whole on this machine: out= must be a folder that all machines share")
    return place, passed


def load(place: Path, trained: TrainState) -> None:
    """Weights, optimizer and schedule of the checkpoint, whatever mesh it was written on.  Every rank calls this."""
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        _make_loadable(optimizer)
    state = {**_state(trained, loading=True), "rng": torch.get_rng_state()}
    found = dist_checkpointing.load(state, str(place))
    trained.net.load_state_dict(found["model"])
    trained.optimizer.load_state_dict(found["optimizer"])
    trained.schedule.load_state_dict(found["schedule"])
    follow(trained)
    torch.set_rng_state(found["rng"])


def load_weights(place: Path, net: GPTModel) -> None:
    """The weights alone."""
    found = dist_checkpointing.load({"model": net.sharded_state_dict(metadata=dict(_METADATA))}, str(place))
    net.load_state_dict(found["model"])


def _state(trained: TrainState, *, loading: bool) -> dict[str, Any]:
    model = {"model": trained.net.sharded_state_dict(metadata=dict(_METADATA))}
    optimizer = trained.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(_METADATA))
    return {**model, "optimizer": optimizer, "schedule": trained.schedule.state_dict()}


def _first() -> bool:
    return dist.get_rank() == 0


def _told(said: Any) -> Any:
    """What the first rank has ``said``."""
    words = [said]
    dist.broadcast_object_list(words, src=0)
    return words[0]


def _make_loadable(optimizer: Any) -> None:
    """Mend what keeps megatron-core's distributed optimizer from loading into torch's own AdamW.

    It expects a state where there has been no step, has no place for AdamW's ``step``, and would give all
    parameters one and the same tensor of it, which each of them then counts up.
    """
    inner = optimizer.optimizer
    if not hasattr(optimizer, "model_param_group_index_map") or not isinstance(inner, torch.optim.AdamW):
        return
    for parameter in (p for group in inner.param_groups for p in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
    theirs: Callable[[Any, dict[str, Tensor]], None] = optimizer._set_main_param_and_optimizer_states

    def with_own_step(parameter: Any, tensors: dict[str, Tensor]) -> None:
        group, at = optimizer.model_param_group_index_map[parameter]
        state = inner.state[inner.param_groups[group]["params"][at]]
        state["step"] = state["step"].clone()
        theirs(parameter, {**tensors, "step": state["step"]})

    optimizer._set_main_param_and_optimizer_states = with_own_step


class _Mailbox:
    """What the forked writer tells the rank that forked it, by a file.

    megatron-core's own spawns a server process, which takes seconds and outlives a rank that is killed.
    """

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="longctx-")
        self._file = Path(name)
        os.close(handle)

    def put(self, message: Any) -> None:
        self._file.write_bytes(pickle.dumps(message))

    def get_nowait(self) -> Any:
        told = self._file.read_bytes()
        self._file.unlink()
        if not told:
            raise queue.Empty
        return pickle.loads(told)
