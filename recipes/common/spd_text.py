"""What the recipes of Sync-Point-Drop share: a model on tensor-parallel ranks, and text to look at it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from longctx.config import DataSettings, Mesh, ModelSource
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from longctx.spd.plan import FILE as PLAN
from longctx.spd.plan import SPDPlan
from longctx.spd.text import PackedText
from recipes.common.cli import refuse_unwritable_folder
from recipes.common.settings import section
from recipes.common.target import Target, resolve_target
from recipes.common.train_job import data_of

if TYPE_CHECKING:
    from longctx.megatron.runtime import Runtime
    from longctx.megatron.spd.blocks import Blocks


def measurement_metadata(target: Target, text: PackedText, data: DataSettings) -> dict[str, Any]:
    """Return what a measurement on ``text`` depends on: model, degree, dtype, and the text itself."""
    buffers = (part.numpy().tobytes() for part in (text.tokens, text.targets, text.mask))
    digest = hashlib.sha256(b"".join(buffers)).hexdigest()[:16]
    return {
        "model": target.model.name,
        "fingerprint": target.fingerprint,
        "tp": target.mesh.tp,
        "dtype": target.model.dtype,
        "sequences": len(text),
        "length": text.tokens.shape[1],
        "text": ", ".join(map(str, data.sources)),
        "text_sha256": digest,
    }


def resolve_spd_target(config: DictConfig, recipe: str) -> Target:
    """Return the model to measure or repair, on tensor-parallel ranks; raises ValueError as `resolve_target` does.

    Refused as well: a single rank, which has no reduction to drop, and a model that has a plan already.
    """
    mesh, model = section(config, "mesh", Mesh), section(config, "model", ModelSource)
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: {recipe} is about reductions between ranks, use mesh.tp=2 or more")
    if model.layers == "te":
        raise ValueError("model.layers=te with spd has not been tested: use model.layers=local")
    refuse_unwritable_folder(config.out)
    target = resolve_target(config, recipe, unused_axes=("ulysses", "ring", "pp"), spd="ignore")
    if target.run.device != "cpu":
        raise ValueError(f"run.device={target.run.device}: {recipe} has been tested on CPU only, use run.device=cpu")
    if (target.folder / PLAN).is_file():
        raise ValueError(
            f"model={target.model.name} has a plan of dropped reductions already: give the model it was made from"
        )
    return target


def text_of(
    data: DataSettings, target: Target, sequences: int, more: int = 0, length: str = "data.length"
) -> PackedText:
    """The first ``sequences`` of ``data``, packed, and up to so many ``more``; documents of one see each other.

    Raises ValueError if there are fewer, or if they are longer than the model's context; ``length`` is the setting.
    """
    from longctx.data.batches import training_batches

    if data.length > target.shape.max_positions:
        raise ValueError(f"{length}={data.length:,}: the model's context is {target.shape.max_positions:,}")
    found = training_batches(data, tokenizer_of(target.folder))(None)
    batches = [batch for batch, _ in islice(found, -(-(sequences + more) // data.batch))]
    if sum(len(batch.tokens) for batch in batches) < sequences:
        there = sum(len(batch.tokens) for batch in batches)
        raise ValueError(
            f"{', '.join(map(str, data.sources))}: the text has {there} sequences of {length}={data.length}, "
            f"not {sequences}: use fewer or shorter ones, or more text"
        )
    whole = PackedText(*(torch.cat([getattr(b, part) for b in batches]) for part in ("tokens", "targets", "mask")))
    return whole[slice(sequences + more)]


def calibration_of(
    config: DictConfig, target: Target, sequences: int, more: int = 0, length: str = "data.length"
) -> tuple[PackedText, DataSettings]:
    """The text of ``data.sources``, as `text_of` has it, each of them once."""
    data, _ = data_of(config)
    data = DataSettings(**{**vars(data), "epochs": 1})
    return text_of(data, target, sequences, more, length), data


@contextmanager
def load_blocks(rank: Rank, target: Target) -> Iterator[tuple[Runtime, Blocks]]:
    """The ranks' process groups, and the model on them block by block, with no reduction dropped yet."""
    from longctx.megatron.spd.blocks import Blocks

    with target.runtime(rank) as runtime:
        engine = target.load_engine(runtime, SPDPlan(target.shape.layers, target.mesh.tp))
        yield runtime, Blocks(engine.model, target.shape, engine.kernel, engine.tp)


def kept_lines(file: Path, about: dict[str, Any]) -> list[Any]:
    """The whole lines that an interrupted run with the same ``about`` has left in ``file``, which begins with it.

    Raises ValueError if it is of another run.
    """
    if not file.is_file():
        return []
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    lines = [json.loads(line) for line in whole]
    now = json.loads(json.dumps(about))
    if lines and lines[0] != now:
        changed = [name for name in now if lines[0].get(name) != now[name]]
        raise ValueError(f"{file.parent} has a run with another {', '.join(changed)}: give another out=")
    return lines[1:]


def write_lines(file: Path, values: Iterable[Any]) -> None:
    """Lines of JSON, all of them or, if we are killed, those that were there."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(value) + "\n" for value in values))
    partial.replace(file)


def append_line(file: Path, value: Any) -> None:
    """One more line of JSON."""
    with file.open("a") as lines:
        lines.write(json.dumps(value) + "\n")
