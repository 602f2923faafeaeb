"""What will be queued: recipe, settings, ranks, folders; all that can be refused is refused here."""

import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from longctx.config import Mesh
from recipes.common.cli import composed, is_file_name, own_out, say
from recipes.common.overrides import CONFIGS, as_overrides
from recipes.common.settings import section
from slurm.settings import Launcher, SubmitSettings, absolute

_EXAMPLE = "prompt.pydoc=assert"
_ELSEWHERE = {"eval": ("eval.run", "evaluate")}  # the recipe that is not in recipes/: its module and configuration


@dataclass(frozen=True)
class ArrayTask:
    """One run of the recipe: the words that are its own (a sweep's values, its ``out``), and all settings."""

    folder: Path
    words: tuple[str, ...]
    config: DictConfig


@dataclass(frozen=True)
class JobPlan:
    """A job, checked: one task, or an array of them.  ``words`` are those that its tasks share."""

    settings: SubmitSettings
    launcher: Launcher
    module: str
    words: tuple[str, ...]
    run: Path
    is_new: bool  # its folder was not there before
    tasks: tuple[ArrayTask, ...]
    ranks_per_node: int
    gpus_per_rank: int

    @property
    def name(self) -> str:
        return self.settings.name or str(self.settings.recipe)

    @property
    def is_array(self) -> bool:
        return self.tasks[0].folder != self.run


def planned(settings: SubmitSettings, launcher: Launcher, words: Sequence[str]) -> JobPlan:
    """The job that the recipe's ``words`` ask for.  Raises ValueError for all that the recipe would refuse, and more.

    Of a job that begins after others what the recipe refuses is said only: what it misses may be what they make.
    """
    module, config_name = recipe_of(str(settings.recipe))
    shared, sweeps = swept(config_name, _with_example(config_name, words))
    given = dict(word.partition("=")[::2] for word in words)
    run = _run_folder(settings, given.get("out"))
    is_new = not run.exists()
    try:
        tasks = tuple(_tasks(config_name, run, shared, sweeps))
        mesh = mesh_of(tasks)
        each = ranks_per_node(mesh, settings)
        for task in tasks:
            _refuse_unprepared(module.prepare, task.config, settings)
        pinned = module.pinned(tasks[0].config) if hasattr(module, "pinned") else ()
    except BaseException:
        forget(run, is_new)
        raise
    if settings.dry_run:
        forget(run, is_new)
    gpus = launcher.gpus_per_rank
    return JobPlan(
        settings=settings,
        launcher=launcher,
        module=module.__name__,
        words=(*(word for word in shared if not word.startswith("out=")), *pinned),
        run=run,
        is_new=is_new,
        tasks=tasks,
        ranks_per_node=each,
        gpus_per_rank=int(tasks[0].config.get("run", {}).get("device") == "cuda") if gpus is None else gpus,
    )


def mesh_of(tasks: Sequence[ArrayTask]) -> Mesh:
    """The mesh that all runs have as many ranks as; one rank where the recipe knows no mesh."""
    meshes = [section(task.config, "mesh", Mesh) if "mesh" in task.config else Mesh() for task in tasks]
    if {mesh.ranks for mesh in meshes} != {meshes[0].ranks}:
        raise ValueError("a sweep's runs have the same number of ranks: submit meshes of other sizes by themselves")
    return max(meshes, key=lambda mesh: mesh.tp)


def recipe_of(name: str) -> tuple[ModuleType, str]:
    """The module of recipe ``name``, and its configuration's name.  ValueError unless it can be checked ahead."""
    module, config_name = _ELSEWHERE.get(name, (f"recipes.{name}", name))
    if re.fullmatch(r"[a-z_]+", name) and (CONFIGS / f"{config_name}.yaml").is_file() and _is_there(module):
        found = import_module(module)
        if hasattr(found, "prepare"):
            return found, config_name
    raise ValueError(f"recipe={name} cannot be submitted: use {', '.join(_recipes())}")


def _with_example(recipe: str, words: Sequence[str]) -> list[str]:
    """``words``; of recipe=generate, where they have no prompt, with one: a first job to try a cluster with."""
    if recipe != "generate" or any(re.match(r"prompt|experiment", word) for word in words):
        return list(words)
    say(f"no prompt is given: {_EXAMPLE}")
    return [*words, _EXAMPLE]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _recipes() -> list[str]:
    """Recipes that say what they would refuse: those with a ``prepare``."""
    sources = Path(str(import_module("recipes").__file__)).parent.glob("*.py")
    return sorted([*_ELSEWHERE, *(path.stem for path in sources if "\ndef prepare(" in path.read_text())])


def swept(config_name: str, words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Those of ``words`` that all runs share; and for each run of the sweep (``lr=1,2``) its own, [] if it is none."""
    shared, values = [], []
    for word in words:
        parsed = OverridesParser.create().parse_overrides(as_overrides(config_name, [word], say, sweep=True))
        if parsed[0].is_sweep_override():
            values.append([f"{parsed[0].key_or_group}={value}" for value in parsed[0].sweep_string_iterator()])
        else:
            shared.append(word)
    return shared, [list(each) for each in itertools.product(*values)] if values else []


def _run_folder(settings: SubmitSettings, out: str | None) -> Path:
    """The job's folder: as asked, or the recipe's ``out`` where that is a folder, or a new one."""
    if settings.run:
        return absolute(settings.run)
    if out and not is_file_name(out):
        return absolute(out)
    return absolute(f"outputs/slurm/{settings.name or settings.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")


def _tasks(config_name: str, run: Path, shared: Sequence[str], sweeps: list[list[str]]) -> Iterator[ArrayTask]:
    """Every run of the sweep, or the one; each with an absolute ``out``, unless the recipe has none."""
    for number, own in enumerate(sweeps or [[]]):
        config = composed(config_name, [*as_overrides(config_name, shared, say), *own])
        where: list[str] = []
        if OmegaConf.is_missing(config, "out"):  # it needs a folder
            where = [f"out={_numbered(str(run), number, sweeps)}"]
        elif "out" in config:
            out = absolute(config.out) if config.out else run / "result.json"
            where = [f"out={_numbered(str(out), number, sweeps)}"]
        if where:
            config.out = where[0].removeprefix("out=")
        yield ArrayTask(run / str(number) if sweeps else run, (*own, *where), config)


def _numbered(out: str, number: int, sweeps: list[list[str]]) -> str:
    return own_out(out, number) if sweeps else out


def _refuse_unprepared(prepare: Callable[[DictConfig], Any], config: DictConfig, settings: SubmitSettings) -> None:
    try:
        prepare(config)
    except ValueError as refused:
        if not settings.jobs_before:
            raise
        say(f"as things are it would be refused ({refused}); it is checked again when the jobs before it have ended")


def ranks_per_node(mesh: Mesh, settings: SubmitSettings) -> int:
    """How many ranks each node starts.  ValueError unless they fill ``mesh``, a tensor-parallel group inside a node."""
    nodes, each = settings.nodes, settings.ranks_per_node or mesh.ranks // settings.nodes
    if nodes * each != mesh.ranks:
        asked = f"ranks_per_node={each}" if settings.ranks_per_node else "an even share of the mesh on each"
        raise ValueError(
            f"nodes={nodes} with {asked} do not make the mesh's {mesh.ranks} ranks ({mesh}): use as many nodes and "
            f"ranks as it has, or a mesh of {nodes * max(1, each)}"
        )
    if each % mesh.tp:
        raise ValueError(
            f"mesh.tp={mesh.tp} does not fit a node of {each} ranks: tensor-parallel ranks talk in every layer, and "
            "stay on one node; use a lower mesh.tp, or more ranks_per_node"
        )
    return each


def forget(run: Path, is_new: bool) -> None:
    """Leave no trace of a job that is not queued, where there was none before."""
    if is_new:
        shutil.rmtree(run, ignore_errors=True)
