"""The folder of a training run: made at the start, and checked before a run resumes in it."""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import checkpoint_index
from longctx.data.files import left_out_by_version_0_2
from longctx.hf.checkpoint import same_model
from longctx.model_shape import ModelShape
from longctx.models.tensors import tensor_shapes
from recipes.common.cli import is_first
from recipes.common.places import nearest_existing, read_json
from recipes.common.predicted import ELEMENT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longctx.data.stage import State
    from recipes.common.train_job import TrainJob

_MOMENTS, _COPY = 8, 4  # bytes per weight of the optimizer's two moments, and of its copy of the weight; in float32


def begin_run(job: TrainJob) -> None:
    """Make the run's folder, and in it ``model``: the target's configuration and tokenizer without weights.

    Only the first rank does this.  An existing ``model`` is replaced, unless `is_model_kept` says that it must stay.
    """
    from longctx.hf.scratch import write_folder_like

    if not is_first():
        return
    _ = job.text_digests  # computed here, because the ranks would wait for it
    job.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.out, prefix=".model.") as work:
        write_folder_like(job.target.folder, {}, Path(work, "model"))
        if not is_model_kept(job):
            shutil.rmtree(job.scratch, ignore_errors=True)
        with suppress(OSError):  # made by an earlier start
            Path(work, "model").rename(job.scratch)


def is_model_kept(job: TrainJob) -> bool:
    """Return True if the folder ``model`` must stay: the run has a checkpoint, or ``model`` has weights."""
    has_checkpoint = checkpoint_index.checkpoint_folders(job.out / "checkpoints")
    return bool(has_checkpoint) or any(job.scratch.glob("*.safetensors"))


def refuse_other_model(job: TrainJob) -> None:
    """Raise ValueError if the run's folder has a ``model`` that must stay and differs from the target's.

    Configuration, tokenizer and the other small files are compared.  Files that earlier versions did not copy may be
    missing, and generation_config.json may have gained an eos_token_id, which a run on conversations needs.
    """
    from longctx.hf.scratch import COPIED_LATER, write_folder_like

    if not (job.scratch / "config.json").is_file() or not is_model_kept(job):
        return
    with tempfile.TemporaryDirectory() as work:
        write_folder_like(job.target.folder, {}, Path(work, "model"))
        files, existing = _contents_of(Path(work, "model")), _contents_of(job.scratch)
    # Earlier versions wrote config.json in another format.
    config = read_json(job.scratch / "config.json", "restore the model's file, or give another out=")
    if json.loads(files["config.json"]) != config:
        raise ValueError(
            f"out={job.out} has a run of another model, or of this one with another model.max_positions or rope: "
            "use the same model settings, or give another out="
        )
    missing = [pattern for pattern in COPIED_LATER if not fnmatch.filter(existing, pattern)]
    added = {name for pattern in missing for name in fnmatch.filter(files, pattern)}
    names = (files.keys() | existing.keys()) - {"config.json"} - added
    if changed := sorted(name for name in names if not _is_same(name, files.get(name), existing.get(name))):
        raise ValueError(
            f"out={job.out} has a run whose model has another {changed[0]}: restore the model's file, set "
            "model.chat_template and model.date as before, or give another out="
        )


def _contents_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a model folder by its name, relative to ``folder``."""
    from longctx.hf.scratch import MORE_TEMPLATES

    files = [file for pattern in ("*", MORE_TEMPLATES) for file in folder.glob(pattern) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _is_same(name: str, now: bytes | None, before: bytes | None) -> bool:
    """Return True if the file ``name`` has the same content ``now`` as ``before``, but for an added eos_token_id."""
    if now == before or name != "generation_config.json" or not (now and before):
        return now == before
    with suppress(ValueError):  # not JSON
        settings, existing = json.loads(now), json.loads(before)
        if isinstance(settings, dict) and isinstance(existing, dict) and existing.get("eos_token_id") is None:
            return {**settings, "eos_token_id": None} == {**existing, "eos_token_id": None}
    return False


def checkpoint_bytes(shape: ModelShape, dtype: str, *, zero1: bool, adapters: bool) -> int:
    """Return the bytes of a checkpoint of a model of ``shape``, without its small parts, such as file headers.

    The optimizer has a copy of the weights in float32 if they are not, and with ZeRO-1.  With ``adapters``, its state
    is small.
    """
    per_weight = ELEMENT_BYTES[dtype]
    if not adapters:
        per_weight += _MOMENTS + (_COPY if zero1 or dtype != "float32" else 0)
    return weights_of(shape) * per_weight


def refuse_no_room(job: TrainJob) -> None:
    """Raise ValueError unless the disk has room for the checkpoints that the run will keep at once."""
    existing = len(checkpoint_index.checkpoint_folders(job.out / "checkpoints"))
    target, adapters = job.target, job.lora.rank is not None
    size = checkpoint_bytes(target.shape, target.model.dtype, zero1=job.optim.zero1, adapters=adapters)
    needed = size * max(1, job.saving.keep + 1 - existing)
    # A killed run leaves a partial checkpoint, which this run removes when it starts.
    partial_folders = (job.out / "checkpoints").glob(f"step-*{checkpoint_index.PARTIAL}*")
    removed = sum(file.stat().st_size for folder in partial_folders for file in folder.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(nearest_existing(job.out)).free + removed) < needed:
        raise ValueError(
            f"out={job.out} has {free / 1e9:.2f} GB free, but the checkpoints still to be written take "
            f"{needed / 1e9:.2f} GB at once: use another disk, or a lower checkpoint.keep"
        )


def refuse_other_run(job: TrainJob, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the last whole checkpoint is beyond this run's steps, or was made with other settings.

    These are the text and its order, the initial weights, the dropped blocks, optim.zero1, model.dtype, model.fp8,
    data.conversations and lora.  Also raises ValueError if there are checkpoints, but none is whole.
    """
    from longctx.data.batches import refuse_state

    checkpoints = job.out / "checkpoints"
    place, passed_over = checkpoint_index.latest_whole(checkpoints)
    checkpoint_index.refuse_none_whole(checkpoints, place, passed_over)
    if not place:
        return
    metadata = checkpoint_index.read_metadata(place)
    if metadata["step"] > job.settings.steps:
        raise ValueError(
            f"steps={job.settings.steps}, but {place} is after step {metadata['step']}: use more steps, or "
            "give another out="
        )
    refuse_other_text(job, place, metadata)
    begun = metadata["config"].get("begun")
    if not same_model(str(begun), str(job.config["begun"])):
        raise ValueError(f"{place} began with {begun}, but this run with {job.config['begun']}: give another out=")
    now_dropped, was_dropped = job.config["dropped"], metadata["config"].get("dropped", [])
    if was_dropped != now_dropped:
        was_so = _describe_dropped(was_dropped, metadata["config"]["mesh"]["tp"]) if was_dropped else "spd=none"
        raise ValueError(f"{place} was made with {was_so}: use that, or another out=")
    config = metadata["config"]
    for name, before, now in (
        ("optim.zero1", config["optim"]["zero1"], job.optim.zero1),
        ("model.dtype", config["model"]["dtype"], job.target.model.dtype),
        ("model.fp8", config["model"].get("fp8"), job.target.model.fp8),
        ("data.conversations", config["data"].get("conversations"), job.data.conversations),
        *((f"lora.{name}", before, now) for name, before, now in _lora_settings(config, job)),
    ):
        if before != now:
            raise ValueError(f"{place} was made with {name}={_as_typed(before)}: use that, or another out=")
    if metadata["step"] < job.settings.steps:
        refuse_state(text_state(metadata), job.data, tokenizer, job.target.shape.end_tokens)


def _describe_dropped(dropped: Sequence[int], tp: int) -> str:
    """Return in words of the command line a degree and the blocks that drop, on ``tp`` ranks or on context ranks."""
    degree, *blocks = dropped
    ranks = f"mesh.tp={tp}" if tp > 1 else f"context.decode=sharded on {degree} context ranks"
    return f"{ranks} spd.blocks={_as_typed(blocks)}"


def _as_typed(value: object) -> str:
    """Return ``value`` as a user types it on the command line: null, false, [a,b]."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    return "null" if value is None else str(value).lower()


def _lora_settings(config: Mapping[str, Any], job: TrainJob) -> list[tuple[str, Any, Any]]:
    """Return (name, value in a checkpoint's ``config``, value in ``job``) for each setting of adapters.

    Only the rank is listed unless checkpoint and job both have adapters; checkpoints of version 0.1 have none.
    """
    before, now = config.get("lora") or {"rank": None}, vars(job.lora) | {"targets": list(job.lora.targets)}
    if before["rank"] is None or job.lora.rank is None:
        return [("rank", before["rank"], job.lora.rank)]
    return [(name, before[name], now[name]) for name in now]


def refuse_other_text(job: TrainJob, place: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError, on the first rank, if the text has changed since the checkpoint ``place`` was written.

    ``metadata`` is the checkpoint's.  Version 0.1 wrote no digests; then nothing is compared.
    """
    was: list[list[str]] | None = metadata.get("text")
    if was is None or not is_first() or was == job.text_digests:
        return
    pairs = zip(job.data.sources, was, job.text_digests, strict=False)
    changed = [source for source, before, now in pairs if before != now]
    name = f"the text of {changed[0]} has" if changed else "data.sources have"
    hint = left_out_by_version_0_2(changed[0]) if changed else ""
    raise ValueError(f"{name} changed since {place} was written: restore it, or give another out= for a new run{hint}")


def text_state(metadata: Mapping[str, Any]) -> State:
    """Return the text's resume state in a checkpoint's ``metadata``; add the weights of its sources if it lacks them.

    Version 0.1 saved the weights in the settings only.
    """
    data: State = metadata["data"]
    if not data["documents"]:
        return data
    weights = [source.get("weight", 1.0) for source in metadata["config"]["data"]["sources"]]
    return {**data, "documents": {"weights": weights, **data["documents"]}}


def weights_of(shape: ModelShape) -> int:
    """Return the number of weights of a model of ``shape``."""
    return sum(prod(size) for size in tensor_shapes(shape).values())
