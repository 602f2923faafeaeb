"""Train a model further on conversations: the loss counts the answers' tokens only.

    python -m recipes.finetune mesh.ring=2 data.sources=[{path:chats.jsonl}] steps=20 out=outputs/tuned

A line of the files is a conversation: ``messages`` in OpenAI's form, or ``prompt`` and ``completion``.  The model's own
chat template turns it into tokens.  The same command again resumes; recipes.export writes the result.
"""

from omegaconf import DictConfig

from recipes.common.cli import main
from recipes.common.train_job import TrainJob, resolve_train_job
from recipes.common.train_task import train

RECIPE = "recipes.finetune"


def prepare(config: DictConfig) -> TrainJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    return resolve_train_job(config, RECIPE, from_scratch=False, conversations=True)


def task(config: DictConfig) -> None:
    """Check the configuration, train on all ranks, and show the last figures."""
    train(config, RECIPE, prepare)


if __name__ == "__main__":
    main("finetune", task)
