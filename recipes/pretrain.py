"""Train a model from scratch, on any mesh.

    python -m recipes.pretrain experiment=pretrain/tiny mesh.ring=2 steps=20 out=outputs/tiny

Writes ``out/metrics.jsonl``, one line per step, and checkpoints; the same command again resumes after the last one.
"""

from omegaconf import DictConfig

from recipes.common.cli import main, on_ranks, warm_up_ranks
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.manifest import record
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_loop import run_rank
from recipes.common.train_report import show
from recipes.common.train_resume import begin_run

RECIPE = "recipes.pretrain"
WARM = [
    "longctx.data.batches",
    "longctx.megatron.training.checkpoint",
    "longctx.megatron.hf_io.init",
    "longctx.train.step",
    "longctx.train.track",
    "longctx.train.meter",
    "transformers.models.auto.tokenization_auto",  # takes seconds to import, and every rank tokenizes
]


def prepare(config: DictConfig) -> TrainJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    return resolve_train_job(config, RECIPE, from_scratch=True)


def task(config: DictConfig) -> None:
    """Check the configuration, train on all ranks, and show the last figures."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    with record(config, RECIPE):
        begin_run(job)
        result = on_ranks(job.target.mesh, run_rank, job)
        if result is not None:
            show(job, result)


if __name__ == "__main__":
    main("pretrain", task)
