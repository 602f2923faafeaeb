"""A model from scratch, on any mesh.

    python -m recipes.pretrain experiment=pretrain/tiny mesh.ring=2 steps=20 out=outputs/tiny

Writes ``out/metrics.jsonl``, a line a step, and checkpoints; the same command again goes on behind the last one.
"""

from omegaconf import DictConfig

from recipes.common.cli import main, on_ranks, warm_up_ranks
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.manifest import record
from recipes.common.train_job import TrainJob, begin_run, resolve_train_job
from recipes.common.train_loop import run_rank, show

WARM = [
    "longctx.data.batches",
    "longctx.megatron.training.checkpoint",
    "longctx.megatron.hf_io.init",
    "longctx.train.step",
    "longctx.train.track",
    "longctx.train.meter",
    "transformers.models.auto.tokenization_auto",  # seconds, and every rank tokenises
]


def prepare(config: DictConfig) -> TrainJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    return resolve_train_job(config, "recipes.pretrain", from_scratch=True)


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; show what the first one gives."""
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    begin_run(job)
    record(config)
    ended = on_ranks(job.target.mesh, run_rank, job)
    if ended is not None:
        show(job, ended)


if __name__ == "__main__":
    main("pretrain", task)
