"""The plan of a job: recipe, settings, ranks and folders, checked before anything is written or queued."""

import itertools
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from recipes.common.cli import compose_config, refuse_unknown_sections, say
from recipes.common.overrides import CONFIGS, as_overrides, expand_home, expand_plan, literal, path_word
from recipes.common.places import WRITTEN, is_file_name, numbered_out, refuse_unwritable_folder
from recipes.common.renamed import rename_override, rename_settings
from slurm.ranks import gpus_per_rank, meshes_of, ranks_per_node
from slurm.settings import Launcher, SubmitSettings, absolute, refuse_line_breaks

_EXAMPLE = "prompt.pydoc=assert"
_OUTSIDE_RECIPES = {"eval": ("eval.run", "evaluate")}  # recipe -> module and configuration


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be submitted.

    ``prepare`` raises ValueError for settings that the recipe refuses.  ``pinned`` returns settings to fix when the job
    is queued, such as the folder of benchmark files.
    """

    module: str
    config_name: str
    prepare: Callable[[DictConfig], object]
    pinned: Callable[[DictConfig], Sequence[str]]


@dataclass(frozen=True)
class ArrayTask:
    """One run of the recipe: ``folder`` for its logs, its own ``words``, and its whole ``config``."""

    folder: Path
    words: tuple[str, ...]
    config: DictConfig


@dataclass(frozen=True)
class JobPlan:
    """A checked job: one run, or an array with a task for each run of a sweep.

    ``words`` are the recipe's settings that all tasks share, without ``out``, which is among each task's words, as are
    the settings that the recipe pins (`Recipe`).
    ``folder`` is the job's folder, made by `freeze_job`.
    """

    settings: SubmitSettings
    launcher: Launcher
    module: str
    words: tuple[str, ...]
    folder: Path
    tasks: tuple[ArrayTask, ...]
    ranks_per_node: int
    gpus_per_rank: int

    @property
    def name(self) -> str:
        """Name of the job in Slurm's queue."""
        return self.settings.name or str(self.settings.recipe)

    @property
    def is_array(self) -> bool:
        """Return True if the job is a sweep."""
        return self.tasks[0].folder != self.folder


def plan_job(
    settings: SubmitSettings, launcher: Launcher, words: Sequence[str], taken: Collection[Path] = ()
) -> JobPlan:
    """Return the job that runs ``settings.recipe`` with ``words``, the recipe's own settings; writes nothing.

    ``taken`` are the folders of the other jobs of a pipeline.

    Raises ValueError for settings that the recipe refuses, a mesh that does not fit the nodes, and, without
    ``dry_run``, a folder that cannot be written.  For a job with ``after`` the recipe's refusal is only printed,
    because the jobs before it may make what is missing.
    """
    # 1. The runs of the recipe, and the job's folder.
    recipe = recipe_of(str(settings.recipe))
    words = [rename_override(word, say) for word in _with_example(recipe.config_name, expand_plan(words))]
    shared, sweep = split_sweep(recipe.config_name, words)
    if settings.parallel and not sweep:
        raise ValueError(
            f"parallel={settings.parallel} is for sweeps, but no setting lists several values: leave it out"
        )
    folder = _job_folder(settings, recipe.config_name, shared, taken)
    if folder in taken:
        raise ValueError(f"two jobs of the pipeline have the folder {folder}: give each another folder= in its line")
    refuse_line_breaks("folder", str(folder))
    if "\\" in str(folder):
        raise ValueError(f"folder={folder}: Slurm interprets a backslash in a log's name: use a name without it")
    if os.pathsep in str(folder):
        raise ValueError(
            f"folder={folder}: Python reads {os.pathsep} as the end of a folder's name, and would not find the job's "
            "copy of the source: use a name without it"
        )
    if not settings.dry_run:
        refuse_unwritable_folder(str(folder), "folder")
        _refuse_foreign_files(folder)
    tasks = tuple(_tasks(recipe.config_name, folder, shared, sweep))
    _refuse_shared_out(tasks)
    # 2. Their ranks on the nodes.
    configs = [task.config for task in tasks]
    (ranks,) = {ranks_per_node(mesh, settings) for mesh in meshes_of(configs)}
    gpus = gpus_per_rank(launcher, configs)
    # 3. The recipe's own checks.
    for task in tasks:
        _refuse_unprepared(recipe, task.config, settings)
    return JobPlan(
        settings=settings,
        launcher=launcher,
        module=recipe.module,
        words=tuple(word for word in shared if not word.startswith("out=")),
        folder=folder,
        tasks=tuple(replace(task, words=(*task.words, *recipe.pinned(task.config))) for task in tasks),
        ranks_per_node=ranks,
        gpus_per_rank=gpus,
    )


def recipe_of(name: str) -> Recipe:
    """Return the recipe ``name``.  Raises ValueError if it does not exist or has no ``prepare`` to check it with."""
    module, config_name = _OUTSIDE_RECIPES.get(name, (f"recipes.{name}", name))
    if re.fullmatch(r"[a-z_]+", name) and (CONFIGS / f"{config_name}.yaml").is_file() and _exists(module):
        imported = import_module(module)
        if hasattr(imported, "prepare"):
            return Recipe(module, config_name, imported.prepare, getattr(imported, "pinned", lambda _: ()))
    raise ValueError(f"recipe={name} cannot be submitted: use {', '.join(_recipe_names())}")


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _recipe_names() -> list[str]:
    """Return the names of the recipes that define ``prepare``, found without importing them."""
    sources = Path(str(import_module("recipes").__file__)).parent.glob("*.py")
    return sorted([*_OUTSIDE_RECIPES, *(path.stem for path in sources if "\ndef prepare(" in path.read_text())])


def _with_example(config_name: str, words: Sequence[str]) -> list[str]:
    """Return ``words``; recipe=generate without a prompt gets an example, so that a first job needs no text."""
    if config_name != "generate" or any(re.match(r"prompt|experiment", word) for word in words):
        return list(words)
    say(f"no prompt is given: {_EXAMPLE}")
    return [*words, _EXAMPLE]


def split_sweep(config_name: str, words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split ``words`` into those that all runs share, and a list of words for each run of a sweep ([] without one).

    ``steps=7 optim.lr=1,2`` gives ``["steps=7"]`` and ``[["optim.lr=1"], ["optim.lr=2"]]``.  Several swept settings
    give all combinations, the last one varying fastest.
    """
    shared, values = [], []
    for word in words:
        override = _parse(config_name, word)
        if override.is_sweep_override():
            values.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            shared.append(word)
    return shared, [list(combination) for combination in itertools.product(*values)] if values else []


def _parse(config_name: str, word: str) -> Override:
    """Return the Hydra override of ``word``; the first one for ``model=PATH``, which becomes several."""
    return OverridesParser.create().parse_overrides(as_overrides(config_name, [word], say, sweep=True))[0]


def _job_folder(settings: SubmitSettings, config_name: str, shared: Sequence[str], taken: Collection[Path]) -> Path:
    """Return the job's folder: ``folder``, the recipe's ``out`` if it is one folder, or a new one in outputs/slurm.

    The new one is not among those that are ``taken``.  Its name has this process's number, so that two submissions of
    the same second do not share a folder.
    """
    if settings.folder:
        return absolute(settings.folder)
    for word in shared:
        out = _parse(config_name, word).value() if word.startswith("out=") else None
        if out and not is_file_name(str(out)):
            return absolute(OmegaConf.create([out])[0])  # without the escapes of ${
    name = f"outputs/slurm/{settings.name or settings.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(place for place in map(absolute, names) if place not in taken and not place.exists())


def _refuse_foreign_files(folder: Path) -> None:
    """Raise ValueError if ``folder`` has files that `freeze_job` would replace, and no job wrote them."""
    if (folder / "code" / "COMMIT").is_file():
        return
    if foreign := [name for name in ("code", "job.sbatch", "config.yaml") if (folder / name).exists()]:
        raise ValueError(
            f"folder={folder} has {foreign[0]}, which no job wrote and a job would replace: give another folder, or "
            "move it away"
        )


def _tasks(
    config_name: str, folder: Path, shared: Sequence[str], sweep: Sequence[Sequence[str]]
) -> Iterator[ArrayTask]:
    """Yield every run of the sweep, or the only run.

    ``out`` becomes absolute.  The default is the job's folder, or result.json in it for a recipe that writes a file.
    In a sweep each run's number is added to the paths that a run writes, unless the sweep lists a path for each run.
    """
    for number, own in enumerate(sweep or [[]]):
        config = compose_config(config_name, [*as_overrides(config_name, shared, say), *own])
        rename_settings(config, (lambda _: None) if number else say)  # an experiment's old names, printed once
        refuse_unknown_sections(config_name, config, (*shared, *own))
        words = [word for word in own if not word.startswith("out=")]
        out: str | None = None
        if OmegaConf.is_missing(config, "out"):
            out = str(folder)
        elif "out" in config:
            out = str(folder / "result.json" if config.out is None else config.out and absolute(config.out))
        if out:
            out = numbered_out(out, number) if sweep and len(words) == len(own) else out
            config.out = literal(out)
            words.append(path_word("out", out))
        for name in WRITTEN[1:] if sweep else ():
            place = OmegaConf.select(config, name)
            if place and not any(word.startswith(f"{name}=") for word in own):
                place = numbered_out(place, number)
                OmegaConf.update(config, name, literal(place))
                words.append(path_word(name, place))
        yield ArrayTask(folder / str(number) if sweep else folder, tuple(words), expand_home(config))


def _refuse_shared_out(tasks: Sequence[ArrayTask]) -> None:
    """Raise ValueError if two runs of a sweep would write to the same ``out``."""
    outs = [task.config.out for task in tasks if "out" in task.config]
    if shared := [out for out in outs if outs.count(out) > 1]:
        raise ValueError(
            f"the sweep lists out={shared[0]}, which {outs.count(shared[0])} runs would write to: give a single "
            "out=DIR, in which each run gets a numbered folder, or submit each out separately"
        )


def _refuse_unprepared(recipe: Recipe, config: DictConfig, settings: SubmitSettings) -> None:
    """Raise ValueError if the recipe refuses ``config``; for a job that waits for others, only print the refusal."""
    _refuse_typed_turns(config)
    try:
        recipe.prepare(config)
    except ValueError as refused:
        if not settings.jobs_before:
            raise
        say(f"the recipe refuses this now ({refused}); it checks again when the job starts, after the jobs before it")


def _refuse_typed_turns(config: DictConfig) -> None:
    """Raise ValueError for a chat whose turns would be typed, or would be taken twice by a job that is requeued."""
    if "turns" not in config:
        return
    if config.turns is None:
        raise ValueError("a job has no terminal to type turns at: give turns=FILE.jsonl")
    if (load := config.session.load) and config.session.save and absolute(load) == absolute(config.session.save):
        raise ValueError(
            f"session.load and session.save are both {load}: if the job is requeued, it would take its turns again, "
            "after those that it saved; use another folder for session.save"
        )
