"""Training command of recipes.pretrain, recipes.extend and recipes.finetune: check, run on all ranks, show."""

from collections.abc import Callable

from omegaconf import DictConfig

from recipes.common.cli import on_ranks, say, warm_up_ranks
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.manifest import record
from recipes.common.train_job import TrainJob, refuse_offload_folder
from recipes.common.train_loop import run_rank
from recipes.common.train_report import show
from recipes.common.train_resume import begin_run

WARM = [
    "longctx.data.batches",
    "longctx.megatron.training.checkpoint",
    "longctx.megatron.hf_io.init",
    "longctx.train.step",
    "longctx.train.track",
    "longctx.train.meter",
    "torch._dynamo",  # every rank would import it, with its optimizer
    "transformers.models.auto.tokenization_auto",  # takes seconds to import, and every rank tokenizes
]


def train(config: DictConfig, recipe: str, prepare: Callable[[DictConfig], TrainJob]) -> None:
    """Check ``config`` with ``prepare``, which returns the job; train on all ranks, and show the last figures.

    Locks ``out`` and writes the manifest of ``recipe`` there.  Exits with code 75 if the run was asked to stop.
    """
    warm_up_ranks([*WARM, "recipes.common.train_loop"])
    job = prepare(config)
    refuse_offload_folder(job.settings.offload)  # here, since a login node may not have the folder
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    if job.config["dropped"]:
        say("blocks drop a reduction: checkpoints can be trained further, but recipes.export does not support them")
    with record(config, recipe, [job.weights] if job.weights else []):
        begin_run(job)
        result = on_ranks(job.target.mesh, run_rank, job)
        if result is not None:
            show(job, result)
