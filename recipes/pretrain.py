"""Train a model from scratch, on any mesh.

    python -m recipes.pretrain experiment=pretrain/tiny mesh.ring=2 steps=20 out=outputs/tiny

Writes ``out/metrics.jsonl``, one line per step, and checkpoints; the same command again resumes after the last one.
"""

from omegaconf import DictConfig

from recipes.common.cli import main
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_task import train

RECIPE = "recipes.pretrain"


def prepare(config: DictConfig) -> TrainJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    return resolve_train_job(config, RECIPE, from_scratch=True)


def task(config: DictConfig) -> None:
    """Check the configuration, train on all ranks, and show the last figures."""
    train(config, RECIPE, prepare)


if __name__ == "__main__":
    main("pretrain", task)
