"""Train a model further, at a longer context.

    python -m recipes.extend mesh.ring=2 data=text data.sources=[{path:books/}] out=outputs/longer

Starts from Hugging Face or GGUF weights, changes the base or the scale of the rotary embedding, and trains on packed
long documents.  The same command again resumes after the last checkpoint.  recipes.export writes the result as a folder
that transformers loads.
"""

from omegaconf import DictConfig

from recipes.common.cli import main, on_ranks, warm_up_ranks
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.manifest import record
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_loop import run_rank
from recipes.common.train_report import show
from recipes.common.train_resume import begin_run
from recipes.pretrain import WARM

RECIPE = "recipes.extend"


def prepare(config: DictConfig) -> TrainJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    return resolve_train_job(config, RECIPE, from_scratch=False)


def task(config: DictConfig) -> None:
    """Check the configuration, train on all ranks, and show the last figures."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    with record(config, RECIPE, [job.weights] if job.weights else []):
        begin_run(job)
        result = on_ranks(job.target.mesh, run_rank, job)
        if result is not None:
            show(job, result)


if __name__ == "__main__":
    main("extend", task)
