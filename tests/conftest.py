"""Settings and fixtures of all tests: one real model, fetched once; ranks forked from one warm process."""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from longctx.config import ModelSource
from longctx.hf.locate import locate
from longctx.parallel.launch import warm_up
from longctx.parallel.launcher import current_rank
from recipes.common import cli as recipe_cli
from tests import signatures
from tests.tracking import wandb_below

# No deadline for an example: other tests share the machine.
settings.register_profile("longctx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longctx")
# Without a GPU, Triton interprets kernels. It reads the variable when it is first imported, and transformers, which the
# conftest.py of other folders may load, imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from torch.utils.flop_counter import register_flop_formula  # noqa: E402  (it imports Triton)


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def count_flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Return the FLOPs of a product of oneDNN (`longctx.onednn`), which torch's counter does not know."""
    return 2 * math.prod(x) * weight[0]


# tests/gpu is collected only on a machine with a GPU.
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
Cli = Callable[..., tuple[Any, str, str]]
CONFIGS = Path(__file__).parents[1] / "configs"
# Modules that ranks import. The server that ranks are forked from imports them once.
WARM = [
    "eval.answers.worker",
    "eval.answers.score",
    "longctx.infer.generate",
    "longctx.infer.store",
    "longctx.megatron.training.checkpoint",
    "longctx.megatron.hf_io.export",
    "longctx.megatron.hf_io.init",
    "longctx.megatron.spd.joint",
    "longctx.megatron.spd.repair",
    "longctx.train.step",
    "longctx.train.track",
    "longctx.train.meter",
    "recipes.common.spd_loop",
    "recipes.common.spd_text",
    "recipes.generate",
    "recipes.common.train_loop",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]

# Files that take minutes, in the order in which they start, before all others: parallel processes then end at about the
# same time.  The first process runs all files of tests/slurm (see `OneSlurmAtATime`).
LONG = (
    "slurm/test_survival.py",
    "slurm/test_jobs.py",
    "slurm/test_readme.py",
    "slurm/test_generate.py",
    "recipes/test_pretrain.py",
    "megatron/spd/test_repair.py",
    "infer/test_parity.py",
    "megatron/hf_io/test_load.py",
    "parallel/test_table.py",
    "train/test_families.py",
)


def pytest_configure() -> None:
    """Set what processes that the tests start inherit.

    * A handler of SIGINT: a shell's background jobs ignore this signal.
    * Byte code on disk, so that not every process compiles the modules again.
    * One torch thread, because several processes run at once.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that start many ranks, other processes or a real model: `make test-fast` leaves them out.
SLOW = (
    *LONG,
    "docs/test_api.py",
    "docs/test_tour.py",
    "eval/answers/test_data_parallel.py",
    "eval/test_parity.py",
    "eval/test_run.py",
    "eval/test_speed.py",
    "eval/harness/test_tasks.py",
    "infer/test_families.py",
    "infer/test_prove.py",
    "infer/test_session.py",
    "infer/test_sharded.py",
    "infer/test_spd.py",
    "megatron/spd/test_guards.py",
    "megatron/spd/test_layer.py",
    "megatron/te/test_cp.py",
    "megatron/te/test_te.py",
    "megatron/test_logits.py",
    "megatron/training/test_checkpoint.py",
    "parallel/test_drift.py",
    "parallel/test_launch.py",
    "recipes/common/test_manifest.py",
    "recipes/test_bad_inputs.py",
    "recipes/test_calibrate.py",
    "recipes/test_chat.py",
    "recipes/test_chat_saved.py",
    "recipes/test_extend.py",
    "recipes/test_finetune.py",
    "recipes/test_generate.py",
    "recipes/test_generate_batch.py",
    "recipes/test_install.py",
    "recipes/test_hostile.py",
    "recipes/test_saved.py",
    "recipes/test_serve.py",
    "recipes/spd/test_adapt.py",
    "recipes/spd/test_refused.py",
    "recipes/spd/test_resume.py",
    "recipes/spd/test_use.py",
    "serve/test_prefix_cache.py",
    "serve/test_service.py",
    "serve/test_sharing.py",
    "slurm/test_submit.py",
    "slurm/test_words.py",
    "train/test_memory.py",
    "train/test_step.py",
    "train/test_wandb.py",
    "train/test_wandb_fails.py",
)


@pytest.hookimpl(trylast=True)  # after pytest-random-order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files of `LONG` to the front, and mark those of `SLOW` and of tests/recipes/bench."""
    items.sort(key=lambda item: [not item.path.as_posix().endswith(file) for file in LONG])
    for item in items:
        path = item.path.as_posix()
        if path.endswith(SLOW) or "/recipes/bench/" in path:
            item.add_marker("slow")


class OneSlurmAtATime(LoadFileScheduling):
    """pytest-xdist's distribution by file, but one process runs all files of tests/slurm.

    A test cluster has daemons and cold ranks, and its tests mostly wait.  Two of them at once slow each other down,
    while a core has nothing to do.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    return OneSlurmAtATime(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_report_header() -> str:
    return "CUDA: " + (torch.cuda.get_device_name() if torch.cuda.is_available() else "none, tests/gpu is left out")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="rewrite the table of longctx/attention/README.md")
    parser.addoption(
        "--prompt-tokens", type=int, default=503, help="prompt tokens in the parity tests (docs/results reports 2003)"
    )
    parser.addoption(
        "--new-tokens", type=int, default=16, help="tokens to decode in the parity tests (docs/results reports 64)"
    )
    parser.addoption("--examples", type=int, default=1, help="examples of each benchmark in eval/test_parity")


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks() -> None:
    warm_up(WARM)


@pytest.fixture(autouse=True)
def _deterministic_numbers() -> Iterator[None]:
    """Seed torch; use one torch thread, since ranks that are threads share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _check_first_calls() -> None:
    """Check the signatures of each function's first calls in this test, too."""
    signatures.calls.clear()


@pytest.fixture(autouse=True)
def _no_launcher() -> Iterator[None]:
    """Forget the rank that a previous test's environment gave this process."""
    current_rank.cache_clear()
    yield
    current_rank.cache_clear()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli(recipe, task, *argv)``: run ``python -m recipe argv`` in this process; exit code, stdout, stderr."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def run(recipe: ModuleType, task: Callable[..., None], *argv: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", [str(recipe.__file__), *argv])
        module = recipe.__name__.replace("recipes.bench.", "recipes.bench ").split()
        monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", *module, *argv])
        name = recipe.__name__.removeprefix("recipes.").replace(".", "/")
        code: Any = 0
        try:
            recipe_cli.main(name, task)
        except SystemExit as exited:
            code = exited.code
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def smollm2() -> tuple[ModelSource, Path]:
    """SmolLM2-135M-Instruct and its folder; the first use on a machine downloads it."""
    values = yaml.safe_load((CONFIGS / "model" / "smollm2_135m.yaml").read_text())
    del values["defaults"]
    model = ModelSource(**values)
    model = replace(model, cache=os.environ.get("LONGCTX_CACHE", model.cache))
    return model, locate(model, say=print)


@pytest.fixture(scope="module")
def wandb_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use W&B without an account; everything that it writes is below one temporary folder."""
    with wandb_below(tmp_path_factory.mktemp("wandb")):
        yield
