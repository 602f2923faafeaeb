"""A model goes on learning, at a longer context.

    python -m recipes.extend mesh.ring=2 data=text data.sources=[{path:books/}] out=outputs/longer

Weights from Hugging Face or GGUF, the base or the scale of the rotary embedding changed, packed long documents.
The same command again goes on behind the last checkpoint; recipes.export writes what transformers loads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import PositiveFloat, PositiveInt

from longctx.pretrained import locate, tensor_files
from longctx.schema import ModelSource
from recipes.job import Job, job_of
from recipes.manifest import record
from recipes.pretrain import WARM
from recipes.start import main, on_ranks, say, section, warm_up_ranks
from recipes.training import run_rank, show


@dataclass(frozen=True)
class Extension:
    """What is changed of the model's context; None is as it was."""

    positions: PositiveInt | None
    rope_theta: PositiveFloat | None
    rope_factor: PositiveFloat | None


def changed_fields(source: Path, asked: Extension) -> dict[str, Any]:
    """The fields of ``source``'s config.json that change.

    Raises ValueError for a scale of a rotary embedding that is scaled already.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    fields: dict[str, Any] = {}
    if asked.positions:
        fields["max_position_embeddings"] = asked.positions
    rope = dict(config.rope_parameters)
    if asked.rope_factor and rope["rope_type"] != "default":
        raise ValueError(
            f"extend.rope_factor={asked.rope_factor}: this model's rotary embedding is of type {rope['rope_type']} "
            "already; use extend.rope_theta"
        )
    if asked.rope_theta:
        rope["rope_theta"] = asked.rope_theta
    if asked.rope_factor:
        rope |= {"rope_type": "linear", "factor": asked.rope_factor}
    return {**fields, "rope_parameters": rope} if rope != dict(config.rope_parameters) else fields


def prepare(config: DictConfig) -> Job:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    source = locate(section(config, "model", ModelSource), say)
    tensor_files(source)  # refuses a folder without weights
    changed = changed_fields(source, section(config, "extend", Extension))
    return job_of(config, source, changed, weights=source)


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; show what the first one gives."""
    warm_up_ranks([*WARM, "recipes.training"])
    job = prepare(config)
    record(config, [job.weights] if job.weights else [])
    ended = on_ranks(job.mesh, run_rank, job)
    if ended is not None:
        show(job, ended)


if __name__ == "__main__":
    main("extend", task)
