"""A model goes on learning, at a longer context.

    python -m recipes.extend mesh.ring=2 data=text data.sources=[{path:books/}] out=outputs/longer

Weights from Hugging Face or GGUF, the base or the scale of the rotary embedding changed, packed long documents.
The same command again goes on behind the last checkpoint; recipes.export writes what transformers loads.
"""

from omegaconf import DictConfig

from recipes.common.cli import main, on_ranks, warm_up_ranks
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.manifest import record
from recipes.common.train_job import TrainJob, begin_run, resolve_train_job
from recipes.common.train_loop import run_rank, show
from recipes.pretrain import WARM


def prepare(config: DictConfig) -> TrainJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    return resolve_train_job(config, "recipes.extend", from_scratch=False)


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; show what the first one gives."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    begin_run(job)
    record(config, [job.weights] if job.weights else [])
    ended = on_ranks(job.target.mesh, run_rank, job)
    if ended is not None:
        show(job, ended)


if __name__ == "__main__":
    main("extend", task)
