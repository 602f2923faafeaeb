"""Train a model further, at a longer context.

    python -m recipes.extend mesh.ring=2 data=text data.sources=[{path:books/}] out=outputs/longer

Starts from Hugging Face or GGUF weights, changes the base or the scale of the rotary embedding, and trains on packed
long documents.  The same command again resumes after the last checkpoint.  recipes.export writes the result as a folder
that transformers loads.
"""

from omegaconf import DictConfig

from recipes.common.cli import main
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_task import train

RECIPE = "recipes.extend"


def prepare(config: DictConfig) -> TrainJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    return resolve_train_job(config, RECIPE, from_scratch=False)


def task(config: DictConfig) -> None:
    """Check the configuration, train on all ranks, and show the last figures."""
    train(config, RECIPE, prepare)


if __name__ == "__main__":
    main("extend", task)
