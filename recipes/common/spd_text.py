"""What the recipes of Sync-Point-Drop share: a model on tensor-parallel ranks, and text to look at it with."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from longctx.config import DataSettings, Mesh, ModelSource
from longctx.hf.checkpoint import fingerprint, tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.spd.plan import FILE as PLAN
from longctx.spd.plan import SPDPlan
from longctx.spd.text import PackedText
from recipes.common.cli import say, section, threads_for
from recipes.common.train_job import data_of, refuse_unwritable_folder


@dataclass(frozen=True)
class Subject:
    """A model, where it runs, and the text: plain values, checked before any rank starts."""

    model: ModelSource
    folder: Path
    fingerprint: str
    shape: ModelShape
    mesh: Mesh
    threads: PositiveInt | None
    timeout_minutes: PositiveInt

    def about(self, text: PackedText, data: DataSettings) -> dict[str, Any]:
        """What a measurement depends on."""
        parts = (part.numpy().tobytes() for part in (text.tokens, text.targets, text.mask))
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        return {
            "model": self.model.name,
            "fingerprint": self.fingerprint,
            "tp": self.mesh.tp,
            "dtype": self.model.dtype,
            "sequences": len(text),
            "length": text.tokens.shape[1],
            "text": ", ".join(map(str, data.sources)),
            "text_sha256": digest,
        }


def subject_of(config: DictConfig, recipe: str) -> Subject:
    """The subject that ``config`` names.  Raises ValueError if it is not one, or has no reduction to drop."""
    mesh, model = section(config, "mesh", Mesh), section(config, "model", ModelSource)
    refuse_unused(mesh, recipe, ("ulysses", "ring", "pp"))
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: {recipe} is about reductions between ranks, use mesh.tp=2 or more")
    if model.layers == "te":
        raise ValueError("model.layers=te with spd has not been tested: use model.layers=local")
    refuse_unwritable_folder(config.out)
    folder = locate(model, say)
    tensor_files(folder)  # refuses a folder without weights
    if (folder / PLAN).is_file():
        raise ValueError(
            f"model={model.name} has a plan of dropped reductions already: give the model it was made from"
        )
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    return Subject(model, folder, fingerprint(folder), shape, mesh, config.threads, config.timeout_minutes)


def text_of(
    data: DataSettings, subject: Subject, sequences: int, more: int = 0, length: str = "data.length"
) -> PackedText:
    """The first ``sequences`` of ``data``, packed, and up to so many ``more``; documents of one see each other.

    Raises ValueError if there are fewer, or if they are longer than the model's context; ``length`` is the setting.
    """
    from longctx.data.batches import training_batches

    if data.length > subject.shape.max_positions:
        raise ValueError(f"{length}={data.length:,}: the model's context is {subject.shape.max_positions:,}")
    found = training_batches(data, tokenizer_of(subject.folder))(None)
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
    config: DictConfig, subject: Subject, sequences: int, more: int = 0, length: str = "data.length"
) -> tuple[PackedText, DataSettings]:
    """The text of ``data.sources``, as `text_of` has it, each of them once."""
    data, _ = data_of(config)
    data = DataSettings(**{**vars(data), "epochs": 1})
    return text_of(data, subject, sequences, more, length), data


@contextmanager
def blocks_of(rank: Rank, subject: Subject) -> Iterator[tuple[Any, Any]]:
    """The ranks' groups, and the model on them with nothing dropped yet."""
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime
    from longctx.megatron.spd.blocks import Blocks

    threads = threads_for(subject.threads, rank)
    with runtime(rank, subject.mesh, threads=threads, timeout_minutes=subject.timeout_minutes) as here:
        plan = SPDPlan(subject.shape.layers, subject.mesh.tp)
        engine = load_engine(here, subject.model, subject.shape, subject.folder, "auto", plan)
        yield here, Blocks(engine.model, subject.shape, engine.kernel, engine.tp)


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
