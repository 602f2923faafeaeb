"""How a recipe starts: the command line becomes a typed configuration, an error a line and an exit code.

Exit codes: 0 done; 2 the command line asks for what cannot be done (nothing was started); 1 a rank failed;
3 done, and a gate of eval failed; 75 asked to stop (SIGUSR1), and saved: the same command goes on.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from longctx.config import Mesh
from longctx.parallel.launch import Rank, RankFailed, rank_from_environment, run_ranks, warm_up

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Settings that take any text, which Hydra would read as its own syntax: commas, parentheses, quotes.
FREE_TEXT = (
    "prompt.text",
    "prompt.question",
    "prompt.file",
    "prompts",
    "out",
    "to",
    "checkpoint",
    "turns",
    "session.save",
    "session.load",
    "spd.sensitivity",
    "sensitivity",
    "eval.data",
    "eval.include",
    "eval.text",
    "adapted",
    "track.name",
    "track.group",
    "track.notes",
    "hardware",
    "picture",
    "fitted",
    "rate",
)
GATE_FAILED = 3
STOPPED = 75  # the exit code of a run that goes on later; EX_TEMPFAIL of sysexits.h
Section = TypeVar("Section")
# A file has no width: tables are not to be cut there.
console = Console(stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else 140)


def main(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line's overrides, and run ``task`` on it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks ranks to stop (longctx.train.stop); nobody is to die of it
    sys.argv[1:] = reporting(lambda: _composable(config_name, sys.argv[1:]))
    run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    run(lambda config: reporting(lambda: task(_with_own_out(config))))()


def _composable(config_name: str, words: Sequence[str]) -> list[str]:
    """``words`` as Hydra takes them.  Raises ValueError, in a line, for what it would answer in twenty."""
    overrides = as_overrides(words)
    if not any(word.startswith("-") for word in words):
        composed(config_name, overrides)
    return overrides


def as_overrides(words: Sequence[str]) -> list[str]:
    """``words`` of a command line in Hydra's grammar.  Raises ValueError for a model that is not known."""
    return [override for word in words for override in _overrides(word)]


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What a recipe with these ``overrides`` is given.  Raises ValueError, in a line, if they do not fit it."""
    try:
        # Inside a recipe Hydra has been told where configurations are.
        there = GlobalHydra.instance().is_initialized()
        with nullcontext() if there else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return hydra.compose(config_name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        says = str(error).partition("Config search path")[0].partition("See https://")[0]
        raise ValueError(" ".join(says.split())) from error


def own_out(out: str, number: int | str) -> str:
    """``out`` of run ``number`` of a sweep: a folder of its own in it, or, of a file, beside it."""
    given = Path(out)
    return str(given.parent / str(number) / given.name) if is_file_name(out) else str(given / str(number))


def is_file_name(out: str) -> bool:
    """Whether ``out`` names a file that recipes write, and not a run's folder."""
    return Path(out).suffix in (".json", ".jsonl", ".yaml", ".yml", ".svg")


def _with_own_out(config: DictConfig) -> DictConfig:
    """``config``; in a sweep (--multirun) with an ``out`` that no other run of it writes to."""
    here = HydraConfig.get()
    if here.mode == RunMode.MULTIRUN and config.get("out"):
        config.out = own_out(config.out, here.job.num)
    return config


def section(config: DictConfig, name: str, kind: type[Section]) -> Section:
    """Section ``name`` of the configuration as a ``kind`` (a dataclass), every value checked for its type."""
    values: Any = OmegaConf.to_container(config[name], resolve=True)
    return _known(kind, values, f"{name}.")


def sections(config: DictConfig, name: str, kind: type[Section]) -> tuple[Section, ...]:
    """Each item of the list ``name`` of the configuration as a ``kind``, as `section` has one."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    items = values[name]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name}={items}: give a list, an item's settings in braces: {name}=[{{...}}]")
    return tuple(_known(kind, item, f"{name}.{i}.") for i, item in enumerate(items))


def top_level(config: DictConfig, kind: type[Section]) -> Section:
    """The settings outside of any section, all of which the dataclass ``kind`` names."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    return _known(kind, {name: value for name, value in values.items() if not isinstance(value, dict)}, "")


def _known(kind: type[Section], values: Any, prefix: str) -> Section:
    if unknown := set(values) - {field.name for field in fields(cast(Any, kind))}:
        raise ValueError(f"there is no setting {prefix}{min(unknown)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        if "error" in first.get("ctx", {}):
            raise ValueError(str(first["ctx"]["error"])) from None  # what __post_init__ of ``kind`` refused
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{prefix}{where}={first['input']}: {first['msg'].lower()}") from None


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
    """ValueError unless a file can be written at ``out``, the setting ``name``; its folder is made."""
    if out is None:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}={out} cannot be written: {error.strerror}") from error
    if Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK):
        raise ValueError(f"{name}={out} cannot be written: give the name of a file in a folder of yours")


def written(out: str, result: Mapping[str, Any]) -> None:
    """Write ``result`` as JSON, a line a key, and say so."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    partial = Path(f"{out}.partial")
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


def _overrides(word: str) -> list[str]:
    """What Hydra's grammar would not take as it stands: free text, and ``model=`` a folder or a hub name."""
    key, equals, value = word.partition("=")
    if key in FREE_TEXT and value not in ("", "null"):
        return [f"{key}={_quoted(value)}"]
    if key != "model" or not equals:
        return [word]
    known = sorted({path.stem for path in (CONFIGS / "model").glob("*.yaml")} - {"folder", "settings"})
    if value in (*known, "folder"):  # a folder's name is in its own setting then
        return [word]
    if (
        "/" in value or Path(value).expanduser().is_dir()
    ):  # a folder, perhaps one that is still to be made, or a hub name
        name = Path(value).expanduser().name
        return ["model=folder", f"model.source={_quoted(value)}", f"model.name={_quoted(name)}"]
    raise ValueError(
        f"model={value} is unknown: use {', '.join(known)}, "
        "the path of a Hugging Face folder, or a hub name like HuggingFaceTB/SmolLM2-135M"
    )


def _quoted(text: str) -> str:
    """``text`` in Hydra's double quotes, where a backslash counts only before a quote; no interpolation."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return '"' + escaped.replace("${", r"\${") + '"'
