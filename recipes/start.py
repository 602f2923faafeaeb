"""How a recipe starts: the command line becomes a typed configuration, an error a line and an exit code.

Exit codes: 0 done; 2 the command line asks for what cannot be done (nothing was started); 1 a rank failed.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from longctx.parallel.launch import RankFailed, rank_from_environment, run_ranks
from longctx.schema import Mesh

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Section = TypeVar("Section")
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the command line's overrides, and run ``task`` on it."""
    entered = False

    def enter(config: DictConfig) -> None:
        nonlocal entered
        entered = True
        _reporting(lambda: task(config))

    try:
        sys.argv[1:] = _reporting(lambda: [word for given in sys.argv[1:] for word in _expanded(given)])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(enter)()
    except SystemExit as leaving:
        # Hydra leaves with 1 when it cannot compose the configuration: to us that is the command line's fault.
        if leaving.code == 1 and not entered:
            sys.exit(2)
        raise


def section(config: DictConfig, name: str, kind: type[Section], **more: Any) -> Section:
    """Section ``name`` of the configuration as a ``kind`` (a dataclass), every value checked for its type."""
    values: Any = OmegaConf.to_container(config[name], resolve=True)
    return checked(kind, {**values, **more}, name)


def checked(kind: type[Section], values: Mapping[str, Any], name: str) -> Section:
    """``values`` as a ``kind``.  Raises ValueError naming the setting at fault."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        if "error" in first.get("ctx", {}):
            raise ValueError(str(first["ctx"]["error"])) from None
        where = ".".join([name, *map(str, first["loc"])])
        raise ValueError(f"{where}={first['input']}: {first['msg'].lower()}") from None


def on_ranks(mesh: Mesh, rank_main: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 gives back from ``rank_main(rank, *args)`` on every rank of ``mesh``.

    Under torchrun or srun this process is one of the ranks, and gets None unless it is the first; otherwise
    local ranks are started.  ValueError if a launcher started another number of ranks.
    """
    here = rank_from_environment(os.environ)
    if here is None:
        return run_ranks(mesh.ranks, rank_main, *args)[0]
    if here.world != mesh.ranks:
        raise ValueError(
            f"the launcher started {here.world} ranks, the mesh has {mesh.ranks} ({mesh}): "
            f"set mesh.ring={here.world} or another mesh of {here.world}"
        )
    return rank_main(here, *args)


def threads_for(threads: int | None, ranks: int) -> int:
    """Threads of a rank: as asked for, or this machine's cores shared by ``ranks``."""
    return threads or max(1, len(os.sched_getaffinity(0)) // ranks)


def _reporting(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ValueError as error:
        console.print(f"[bold red]error[/]: {_escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except RankFailed as failed:
        if failed.details:
            console.print(failed.details, markup=False, soft_wrap=True)
        console.print(f"[bold red]error[/]: {_escaped(failed)}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; all ranks have ended")
        sys.exit(130)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _expanded(word: str) -> list[str]:
    """``model=FOLDER`` and ``model=org/name`` next to the models that configs/model names."""
    key, _, value = word.partition("=")
    if key != "model" or not value:
        return [word]
    known = sorted({path.stem for path in (CONFIGS / "model").glob("*.yaml")} - {"folder", "settings"})
    if value in known:
        return [word]
    if Path(value).expanduser().is_dir() or value.count("/") == 1:
        name = Path(value).expanduser().name
        return ["model=folder", f"model.source='{value}'", f"model.name='{name}'"]
    raise ValueError(
        f"model={value} is unknown: use {', '.join(known)}, "
        "the path of a Hugging Face folder, or a hub name like HuggingFaceTB/SmolLM2-135M"
    )
