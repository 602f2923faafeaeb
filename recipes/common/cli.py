"""How a recipe starts: the command line becomes a typed configuration, an error a line and an exit code.

Exit codes: 0 done; 2 the command line asks for what cannot be done (nothing was started); 1 a rank failed;
3 done, and a gate of eval failed; 75 asked to stop (SIGUSR1), and saved: the same command goes on.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from longctx.config import Mesh
from longctx.parallel.launch import Rank, RankFailed, rank_from_environment, run_ranks, warm_up
from recipes.common.help import help_of
from recipes.common.overrides import CONFIGS, as_overrides
from recipes.common.renamed import rename_settings

GATE_FAILED = 3
STOPPED = 75  # the exit code of a run that goes on later; EX_TEMPFAIL of sysexits.h
# A file has no width: tables are not to be cut there.
console = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else 140)


def main(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line's overrides, and run ``task`` on it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop, which ranks handle (longctx.train.stop)
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(help_of(config_name))
        return
    sys.argv[1:] = reporting(lambda: _checked_overrides(config_name, words))
    run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    run(lambda config: reporting(lambda: task(_with_own_out(rename_settings(config, say), words))))()


def _checked_overrides(config_name: str, words: Sequence[str]) -> list[str]:
    """``words`` as Hydra takes them.  Raises ValueError, in one line, where Hydra would print twenty."""
    overrides = as_overrides(config_name, words, say, sweep=is_multirun(words))
    if not any(word.startswith("-") for word in words):
        composed(config_name, overrides)
    return overrides


def is_multirun(words: Sequence[str]) -> bool:
    """Whether the command line asks for Hydra's multirun."""
    return bool({"-m", "--multirun"} & set(words))


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a recipe with ``overrides``.  Raises ValueError, in one line, if they do not fit."""
    try:
        # Inside a recipe Hydra knows already where configurations are.
        initialized = GlobalHydra.instance().is_initialized()
        with nullcontext() if initialized else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error).partition("Config search path")[0].partition("See https://")[0]
        raise ValueError(" ".join(message.split())) from error


def own_out(out: str, number: int | str) -> str:
    """``out`` of run ``number`` of a sweep: a folder of its own in it, or, of a file, beside it."""
    given = Path(out)
    return str(given.parent / str(number) / given.name) if is_file_name(out) else str(given / str(number))


def is_file_name(out: str) -> bool:
    """Whether ``out`` names a file that recipes write, and not a run's folder."""
    return Path(out).suffix in (".json", ".jsonl", ".yaml", ".yml", ".svg")


def _with_own_out(config: DictConfig, words: Sequence[str]) -> DictConfig:
    """``config``; in a sweep (--multirun) with an ``out`` that no other run of it writes to."""
    hydra_config = HydraConfig.get()
    has_own = any(word.startswith("out=") and "," in word for word in words)
    if hydra_config.mode == RunMode.MULTIRUN and config.get("out") and not has_own:
        config.out = own_out(config.out, hydra_config.job.num)
    return config


def on_ranks(mesh: Mesh, rank_main: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 gives back from ``rank_main(rank, *args)`` on every rank of ``mesh``; None where `is_first` is not.

    ValueError if a launcher started another number of ranks.
    """
    given = on_every_rank(mesh, rank_main, *args)
    return given if is_first() else None


def on_every_rank(mesh: Mesh, rank_main: Callable[..., Any], *args: Any) -> Any:
    """The same, where this process is one of the ranks (under torchrun or srun) giving what its own gives back.

    Otherwise local ranks are started.
    """
    here = rank_from_environment(os.environ)
    if here is None:
        return run_ranks(mesh.ranks, rank_main, *args)[0]
    if here.world_size != mesh.ranks:
        raise ValueError(
            f"the launcher started {here.world_size} ranks, the mesh has {mesh.ranks} ({mesh}): "
            f"set mesh.ring={here.world_size} or another mesh of {here.world_size}"
        )
    try:
        return rank_main(here, *args)
    except ValueError as error:
        # Not the command line's fault any more: let the launcher have the traceback.
        raise RuntimeError(f"rank {here.rank} of {here.world_size} failed") from error


def leave_stopped() -> NoReturn:
    """End as a run that was asked to stop (SIGUSR1), and did."""
    say("stopped, as asked: the same command goes on")
    sys.exit(STOPPED)


def is_first() -> bool:
    """Whether this process speaks for all ranks: it started them, or is the first that a launcher started."""
    here = rank_from_environment(os.environ)
    return here is None or here.rank == 0


def warm_up_ranks(modules: Sequence[str]) -> None:
    """Import ``modules`` ahead for local ranks, unless a launcher has started the ranks already."""
    if rank_from_environment(os.environ) is None:
        warm_up(modules)


def say(line: str) -> None:
    """Print ``line`` for the user, once however many ranks a launcher started."""
    if is_first():
        console.print(line)


def threads_for(asked: int | None, rank: Rank) -> int:
    """Threads of a rank: as asked for, or the cores that this machine's ranks share."""
    return asked or max(1, len(os.sched_getaffinity(0)) // rank.local_world_size)


def threads_here(asked: int | None, mesh: Mesh) -> int:
    """`threads_for` each rank of ``mesh`` that a launcher started on this machine, or that will be started here."""
    return threads_for(asked, rank_from_environment(os.environ) or Rank(0, mesh.ranks, 0, mesh.ranks, ""))


def refuse_unwritable(out: str | None, name: str = "out") -> None:
    """Raise ValueError unless a file can be written at ``out``, the setting ``name``; writes nothing."""
    if out is None:
        return
    parent = nearest_existing(Path(out).expanduser().parent)
    if not parent.is_dir():
        raise ValueError(f"{name}={out} cannot be written: {parent} is a file")
    if Path(out).is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{name}={out} cannot be written: give the name of a file in a folder of yours")


def refuse_unwritable_folder(out: str, name: str = "out") -> None:
    """Raise ValueError unless ``out``, the setting ``name``, is a writable folder or can be made; writes nothing."""
    existing = nearest_existing(Path(out).expanduser())
    if not existing.is_dir():
        raise ValueError(f"{name}={out} cannot be written ({existing} is a file): give a folder of yours")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name}={out} cannot be written ({existing} is read-only): give a folder of yours")


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest of its parents that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def written(out: str, result: Mapping[str, Any]) -> None:
    """Write ``result`` as JSON, a line a key, and say so."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    partial = Path(f"{out}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(out)
    console.print(f"written to {out}")


def reporting(work: Callable[[], Any]) -> Any:
    """What ``work`` gives; its failures become a line and an exit code."""
    try:
        return work()
    except ValueError as error:
        console.print(f"[bold red]error[/]: {_escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except RankFailed as failed:
        console.show_cursor()  # the rank that drew the progress bar did not live to do it
        if failed.details:
            console.print(failed.details, markup=False, soft_wrap=True)
        console.print(f"[bold red]error[/]: {_escaped(failed)}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("interrupted; all ranks have ended")
        sys.exit(130)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
