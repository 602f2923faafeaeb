"""Entry of every recipe: compose the configuration, run the task on its ranks, turn errors into exit codes.

recipes/README.md lists the exit codes.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import NoReturn, TypeVar, TypeVarTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from longctx.config import Mesh
from longctx.parallel.launch import Rank, RankFailed, run_ranks, warm_up
from longctx.parallel.launcher import current_rank
from recipes.common.help import help_of
from recipes.common.mistakes import names_of, unknown_setting
from recipes.common.overrides import CONFIGS, as_overrides, expand_home
from recipes.common.places import write_json
from recipes.common.provenance import cores
from recipes.common.renamed import rename_settings
from recipes.common.startup import leave_closed_pipe, loaded, print_page
from recipes.common.sweep import is_multirun, refuse_unwritable_sweep, remove_empty_sweep, with_numbered_places

Result = TypeVar("Result")
Args = TypeVarTuple("Args")

# Options of Hydra's command line, without those that choose another recipe's configuration.
_OPTIONS = ("-m", "--multirun", "--cfg", "--resolve", "--info", "--hydra-help", "--version", "--config-dir")
_OF_TARGET = ("mesh", "model", "context", "run", "spd", "reduce")  # sections that every target reads if they are there
GATE_FAILED = 3
STOPPED = 75  # stopped on request, to be resumed; EX_TEMPFAIL of sysexits.h
# Another try may succeed: disk or quota full, disk error, too many files, no memory; or a file system's network fails.
_SHORTAGES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH),
)


def plain_console(*, stderr: bool, width: int) -> Console:
    """Return a console that prints text unchanged: brackets are not markup, and ``:train:`` is not an emoji.

    If its stream is not a terminal, it is ``width`` columns wide, so that tables are not cut.
    """
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    columns = None if is_terminal else width
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False, width=columns)


console = plain_console(stderr=True, width=140)


def main(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line's overrides, and run ``task`` on it.

    With --help, print the help text instead.  A sweep (--multirun) runs ``task`` once for each combination of values.
    An error of the user or of a rank ends the process with an exit code (see `exit_on_error`).
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to stop, which the ranks handle (longctx.train.stop)
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print_page(help_of(config_name))
        return
    sys.argv[1:] = exit_on_error(lambda: _check_overrides(config_name, words))
    run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    run(lambda config: _run(task, config_name, config, words))()


def _run(task: Callable[[DictConfig], None], config_name: str, config: DictConfig, words: Sequence[str]) -> None:
    try:
        exit_on_error(lambda: task(_checked(config_name, config, words)))
    except SystemExit as leaving:
        if leaving.code == 2:
            remove_empty_sweep()
        raise


def _checked(config_name: str, config: DictConfig, words: Sequence[str]) -> DictConfig:
    """Return ``config`` after the checks that all recipes share, with old names of settings and ``~`` replaced.

    In a sweep (--multirun), the paths that a run writes get its number.  Raises ValueError for a section with a
    mistake, for more threads than this machine has cores, and for a missing device.  All checks before the device run
    without torch, whose import takes seconds.
    """
    from recipes.common.settings import check_sections

    config = with_numbered_places(expand_home(rename_settings(config, say)), words)
    refuse_unknown_sections(config_name, config, words)
    check_sections(config)
    threads, limit = OmegaConf.select(config, "run.threads"), cores()
    if isinstance(threads, int | float) and threads > limit:  # 1e6 is a float
        raise ValueError(f"run.threads={threads}: this machine has {limit} cores for all ranks; use at most {limit}")
    if OmegaConf.select(config, "run.device") == "cuda":
        from longctx.parallel.validate import refuse_no_gpu

        refuse_no_gpu("cuda")
    return config


def _exit_on_sigterm(*_: object) -> None:
    """Exit with code 143; as after Ctrl-C, ranks end and temporary folders are removed.

    A rank of a launcher ends at once instead, by SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL if current_rank() else signal.SIG_IGN)
    if current_rank():
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(128 + signal.SIGTERM)


def _check_overrides(config_name: str, words: Sequence[str]) -> list[str]:
    """Return ``words`` in Hydra's grammar.  Raises ValueError, in one line, for an error that Hydra reports in many.

    With an option such as --multirun, the configuration is not composed here: Hydra itself reports what does not fit.
    """
    current_rank()  # raises for a launcher's environment that is incomplete
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if unknown := [option for option in options if option not in _OPTIONS]:
        raise ValueError(f"there is no option {unknown[0]}: use {', '.join(_OPTIONS)} or --help")
    overrides = as_overrides(config_name, words, say, sweep=is_multirun(words))
    if not options:
        compose_config(config_name, overrides)
    elif is_multirun(words):
        refuse_unwritable_sweep(config_name, overrides)
    return overrides


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a recipe with ``overrides``, words in Hydra's grammar (see `as_overrides`).

    Raises ValueError, in one line, if they do not fit.
    """
    try:
        # A running recipe has initialized Hydra already.
        initialized = GlobalHydra.instance().is_initialized()
        with nullcontext() if initialized else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config: DictConfig = hydra.compose(config_name, list(overrides))
            return config
    except (HydraException, OmegaConfBaseException) as error:
        if unknown := re.search(r"Could not override '([^']+)'", str(error)):
            raise ValueError(_unknown_setting(config_name, overrides, unknown[1])) from error
        message = str(error).partition("Config search path")[0].partition("See https://")[0]
        raise ValueError(" ".join(message.split())) from error


def _unknown_setting(config_name: str, overrides: Sequence[str], name: str) -> str:
    """Return the message for ``name``, one of ``overrides``, which the configuration ``config_name`` does not have.

    It names the nearest setting that exists.
    """
    others = [word for word in overrides if word.partition("=")[0] != name]
    known = OmegaConf.to_container(compose_config(config_name, others))
    assert isinstance(known, dict)
    return unknown_setting(name, names_of({str(key): value for key, value in known.items()}))


def refuse_unknown_sections(config_name: str, config: DictConfig, words: Sequence[str]) -> None:
    """Raise ValueError for a section of ``config`` that an experiment or a word with + adds, and no recipe reads."""
    if not any(word.startswith(("+", "experiment=")) for word in words):
        return
    known, values = _defaults_of(config_name), OmegaConf.to_container(config)
    assert isinstance(values, dict)
    for name, value in values.items():
        if name not in known and name not in _OF_TARGET and isinstance(value, dict):
            setting = ".".join([str(name), *map(str, [*value][:1])])
            raise ValueError(unknown_setting(setting, names_of(known)))


@cache
def _defaults_of(config_name: str) -> dict[str, object]:
    """Return the settings of the configuration ``config_name`` without overrides."""
    known = OmegaConf.to_container(compose_config(config_name, []))
    assert isinstance(known, dict)
    return {str(key): value for key, value in known.items()}


def on_ranks(mesh: Mesh, rank_main: Callable[[Rank, *Args], Result], *args: *Args) -> Result | None:
    """Run ``rank_main(rank, *args)`` on every rank of ``mesh``; return the first rank's result, None on other ranks.

    Under torchrun or srun, each process runs its own rank.  Otherwise all ranks are local processes, which this starts;
    ``rank_main`` and ``args`` are pickled for them.

    Raises ValueError if a launcher started another number of ranks than ``mesh`` has, and `RankFailed` if a local rank
    fails.
    """
    result = on_every_rank(mesh, rank_main, *args)
    return result if is_first() else None


def on_every_rank(mesh: Mesh, rank_main: Callable[[Rank, *Args], Result], *args: *Args) -> Result:
    """Run ``rank_main(rank, *args)`` on every rank of ``mesh``, as `on_ranks` does, and return a result.

    Under torchrun or srun, every process returns the result of its own rank; otherwise it is the first rank's.  Under a
    launcher, a ValueError of ``rank_main`` becomes a RuntimeError, since the settings were accepted before.
    """
    rank = current_rank()
    if rank is None:
        return run_ranks(mesh.ranks, rank_main, *args)[0]
    refuse_other_world(mesh)
    try:
        return rank_main(rank, *args)
    except ValueError as error:
        # The command line was accepted, so this is a failure: give the launcher the traceback.
        raise RuntimeError(f"rank {rank.rank} of {rank.world_size} failed: {error}") from error
    except OSError as error:
        reason = f"raised {type(error).__name__}: {error}"
        raise RankFailed(rank.rank, rank.world_size, reason, "", ended_others=False) from error


def refuse_other_world(mesh: Mesh, owner: str = "the mesh") -> None:
    """Raise ValueError, naming ``owner``, if a launcher started another number of ranks than ``mesh`` has."""
    rank = current_rank()
    if rank and rank.world_size != mesh.ranks:
        raise ValueError(
            f"the launcher started {rank.world_size} ranks, but {owner} has {mesh.ranks} ({mesh}): "
            f"set mesh axes whose product is {rank.world_size}, or start without a launcher"
        )


def leave_stopped() -> NoReturn:
    """Print that the run stopped on request (SIGUSR1), and exit with code 75."""
    say("stopped, as asked: the same command resumes")
    sys.exit(STOPPED)


def is_first() -> bool:
    """Return True if this process prints and writes for all ranks: it starts them, or is a launcher's first rank."""
    rank = current_rank()
    return rank is None or rank.rank == 0


def warm_up_ranks(modules: Sequence[str]) -> None:
    """Import torch here.  If this process will start the ranks, their server imports ``modules`` at the same time.

    Calls `loaded` at the end.
    """
    if current_rank() is None:
        warm_up(modules)
    import torch  # noqa: F401  # takes seconds; the server of local ranks imports `modules` at the same time

    loaded()


def say(line: str) -> None:
    """Print ``line`` on standard error, from the first rank only."""
    if is_first():
        console.print(line)


def threads_for(threads: int | None, rank: Rank) -> int:
    """Return the CPU threads of ``rank``: ``threads``, or an even share of this machine's cores."""
    return threads or max(1, cores() // rank.local_world_size)


def threads_here(threads: int | None, mesh: Mesh) -> int:
    """Return the CPU threads of a rank of ``mesh`` on this machine, whether a launcher or a recipe starts it."""
    return threads_for(threads, current_rank() or Rank(0, mesh.ranks, 0, mesh.ranks, ""))


def write_result(out: str, result: Mapping[str, object]) -> None:
    """Write ``result`` to ``out`` as JSON, one line per key, and print where."""
    write_json(out, result)
    console.print(f"written to {out}")


def exit_on_error(work: Callable[[], Result]) -> Result:
    """Return the result of ``work()``; turn its errors into an exit of this process with one printed line.

    The exit code is

    * 2 for a user's mistake: ValueError, or a file that cannot be read or written;
    * 1 for a failed rank (its traceback comes first), a lost rank, and a machine that ran out of something;
    * 130 for Ctrl-C, and 141 for a closed pipe, for which nothing is printed.

    Other exceptions pass.
    """
    try:
        return work()
    except ValueError as error:
        print_error(error)
        sys.exit(2)
    except BrokenPipeError:
        leave_closed_pipe()
    except OSError as error:
        console.show_cursor()
        print_error(error)
        # A `LostPeer`, on a launcher's rank, is a ConnectionError.
        sys.exit(1 if isinstance(error, ConnectionError) or error.errno in _SHORTAGES else 2)
    except RecursionError as error:
        print_error(f"a file that this command reads is nested too deeply ({error}): give another file")
        sys.exit(2)
    except RankFailed as failed:
        console.show_cursor()  # the rank that hid it for its progress bar has died
        if failed.details:
            console.print(failed.details)
        print_error(failed)
        sys.exit(1)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("interrupted; all ranks have ended")
        sys.exit(130)


def print_error(error: Exception | str, title: str = "error") -> None:
    """Print ``error`` in one line, after a red ``title``."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    console.print(Text.assemble((title, "bold red"), ": ", " ".join(text.split())))
