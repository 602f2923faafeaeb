"""Calibration text of the Sync-Point-Drop recipes, the model and mesh that they measure, and the records of a run.

A record says what saved figures depend on, so that a resumed run refuses figures that other settings gave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig

from longctx.config import DataSettings, Mesh, ModelSource, TextSource
from longctx.hf.checkpoint import same_model
from longctx.hf.config import tokenizer_of
from longctx.spd.plan import FILE as PLAN
from longctx.spd.plan import refuse_unfit_shape
from longctx.spd.text import PackedText
from longctx.text_file import write_text
from recipes.common.manifest import refuse_other_recipe
from recipes.common.places import refuse_unwritable_folder
from recipes.common.settings import section
from recipes.common.target import Target, resolve_target
from recipes.common.train_job import data_of

_RENAMED = {"looked_at": "calibration_sequences"}  # keys of saved records: old name -> new name


def resolve_spd_target(config: DictConfig, recipe: str, *, writes_folder: bool = True) -> Target:
    """Return the target: the model to measure or repair, and its mesh.  Writes nothing but the model cache.

    ``writes_folder`` says that ``out`` is a folder.  Without it, ``out`` is a file and is not checked here.

    Raises ValueError, with what to set instead, where `resolve_target` does, and for

    * ``mesh.tp`` below 2, since one rank has no reduction to drop;
    * Transformer Engine's layers, which need a GPU, and devices other than the CPU, which are not tested;
    * rounded reductions, and a model that already has a plan of dropped reductions;
    * with ``writes_folder``, an ``out`` that is not a writable folder, or that belongs to another recipe.
    """
    mesh, model = section(config, "mesh", Mesh), section(config, "model", ModelSource)
    if mesh.tp < 2:
        raise ValueError(f"mesh.tp={mesh.tp}: one rank has no reduction to drop; use mesh.tp=2 or more with {recipe}")
    if model.layers == "te":
        raise ValueError(f"model.layers=te needs a GPU, and {recipe} runs on the CPU: use model.layers=local")
    if writes_folder:
        refuse_unwritable_folder(config.out)
        refuse_other_recipe(config.out, recipe)
    target = resolve_target(config, recipe, unused_axes=("ulysses", "ring", "pp"), spd="ignore")
    refuse_unfit_shape(target.shape)
    if target.run.device != "cpu":
        raise ValueError(f"run.device={target.run.device} is not tested with {recipe}: use run.device=cpu")
    if target.reduce:
        raise ValueError(f"rounded reductions ({target.reduce}) are not supported by {recipe}: leave out reduce")
    if (target.folder / PLAN).is_file():
        raise ValueError(
            f"model={target.model.name} already has a plan of dropped reductions ({PLAN}): "
            "use the model that it was made from"
        )
    return target


def calibration_of(
    config: DictConfig, target: Target, sequences: int, more: int = 0, length_setting: str = "data.length"
) -> tuple[PackedText, DataSettings]:
    """Return the text of the section ``data`` with ``epochs=1``, and that section.

    The text has ``sequences`` sequences, and ``more`` as in `text_of`.  Raises ValueError as `text_of` does, and if
    data.epochs is set to another number.
    """
    data, test = data_of(config)
    if test and test.sources != (TextSource(pydoc="test"),):  # the default
        raise ValueError(
            f"data.test={list(map(str, test.sources))} is not used here: errors on held-out text are measured on the "
            "text of data.sources that follows; leave data.test out"
        )
    if data.epochs not in (None, 1):
        raise ValueError(
            f"data.epochs={data.epochs}: the text is read once; leave data.epochs out, or add data.sources"
        )
    data = replace(data, epochs=1)
    return text_of(data, target, sequences, more, length_setting), data


def text_of(
    data: DataSettings, target: Target, sequences: int, more: int = 0, length_setting: str = "data.length"
) -> PackedText:
    """Return the first ``sequences`` packed sequences of ``data``, and at most ``more`` that follow them.

    Each sequence has ``data.length`` tokens.  Documents in a sequence attend to each other.

    Raises ValueError if the text has fewer than ``sequences`` or no target that counts, if a sequence is longer than
    the model's context, or if a token is beyond its vocabulary.  Messages on the length name ``length_setting`` as the
    setting to change.
    """
    from longctx.data.batches import training_batches
    from longctx.data.packing import refuse_nothing_to_learn

    if data.length > target.shape.max_positions:
        raise ValueError(
            f"{length_setting}={data.length:,} is more than the model's context of {target.shape.max_positions:,} "
            "tokens: use at most that"
        )
    # Batches of one sequence: a larger last batch that is not full would be dropped or padded.
    stage = training_batches(replace(data, batch=1), tokenizer_of(target.folder))(None)
    batches = [batch for batch, _ in islice(stage, sequences + more)]
    if len(batches) < sequences:
        raise ValueError(
            f"{', '.join(map(str, data.sources))}: the text has {len(batches)} sequences of {length_setting}="
            f"{data.length} tokens, not {sequences}: use fewer or shorter sequences, or more text"
        )
    text = PackedText(
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets", "mask"))
    )
    target.shape.refuse_unknown_token(max(int(text.tokens.max()), int(text.targets.max())))
    refuse_nothing_to_learn(int(text.mask.sum()), ", ".join(map(str, data.sources)))
    return text


def measurement_metadata(target: Target, text: PackedText, data: DataSettings) -> dict[str, object]:
    """Return what a measurement on ``text`` depends on: model, tensor-parallel degree, dtype and the text itself."""
    buffers = (tensor.numpy().tobytes() for tensor in (text.tokens, text.targets, text.mask))
    return {
        "model": target.model.name,
        "fingerprint": target.fingerprint,
        "tp": target.mesh.tp,
        "dtype": target.model.dtype,
        "sequences": len(text),
        "length": text.tokens.shape[1],
        "text": ", ".join(map(str, data.sources)),
        "text_sha256": hashlib.sha256(b"".join(buffers)).hexdigest()[:16],
    }


def changed_keys(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return the keys whose values differ between a saved record and that of this run.

    Old names of keys and old fingerprints are translated.
    """
    before = {_RENAMED.get(key, key): value for key, value in before.items()}
    now = json.loads(json.dumps(now))
    return [key for key in {**before, **now} if not same_model(before.get(key), now.get(key))]


def read_lines(file: Path, about: Mapping[str, object]) -> list[list[float]]:
    """Return the lists of numbers in the JSON lines ``file``; none if it does not exist.

    The first line of the file is the record of the run that wrote it, and is not returned.  Raises ValueError if this
    record differs from ``about``, and for another line that is damaged.  A half-written last line is ignored.
    """
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it; the same command measures again") from error
    if lines and (changed := changed_keys(lines[0], about)):
        raise ValueError(f"{file.parent} has a run with other values of {', '.join(changed)}: use another out=")
    return lines[1:]


def write_lines(file: Path, values: Iterable[object]) -> None:
    """Write ``values`` to ``file`` as JSON lines, and make its folder if needed.

    A run that is killed meanwhile leaves an earlier file unchanged.
    """
    write_text(file, "".join(json.dumps(value) + "\n" for value in values))
