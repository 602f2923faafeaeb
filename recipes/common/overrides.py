"""The command line's words as Hydra overrides: free text quoted, models by path or name, old names renamed."""

import re
from collections.abc import Sequence
from pathlib import Path

from recipes.common.renamed import Say, rename_override

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Settings that hold any text; Hydra would read commas, parentheses and quotes in them as its own syntax.
FREE_TEXT = ("prompt.text", "prompt.question", "track.name", "track.group", "track.notes", "rate")
# Settings that hold one path. A comma separates the values of a sweep.
PATHS = (
    "prompt.file", "prompts", "out", "to", "checkpoint", "turns", "session.save", "session.load", "spd.sensitivity",
    "sensitivity", "eval.data", "eval.include", "eval.text", "adapted", "hardware", "picture", "fitted",
)  # fmt: skip
# A file with another configuration's name -> the experiments that fit it.
EXPERIMENTS = {
    "extend": ("extend", "pretrain"),
    "eval_speed": ("evaluate",),
    "bench/convergence": ("pretrain",),
    "bench/train": ("pretrain",),
}


def as_overrides(config_name: str, words: Sequence[str], say: Say, *, sweep: bool = False) -> list[str]:
    """``words`` of a command line in Hydra's grammar; with ``sweep``, commas in paths separate the runs' values.

    Raises ValueError for an unknown model, an experiment of another recipe, and a comma in a path without a sweep.
    """
    renamed = [rename_override(word, say) for word in words]
    return [override for word in renamed for override in _overrides(config_name, word, sweep)]


def choices(group: str) -> list[str]:
    """The names that ``group=NAME`` takes: the files of its folder, without bases."""
    files = sorted((CONFIGS / group).rglob("*.yaml"))
    names = [file.relative_to(CONFIGS / group).with_suffix("").as_posix() for file in files]
    return [name for name in names if not name.startswith("_")]


def experiments_of(config_name: str) -> list[str]:
    """The experiments that fit the configuration ``config_name``."""
    fitting = EXPERIMENTS.get(config_name, (config_name,))
    return [name for name in choices("experiment") if name.startswith(tuple(f"{folder}/" for folder in fitting))]


def quote(text: str) -> str:
    """``text`` in Hydra's double quotes, where a backslash counts only before a quote; no interpolation."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return '"' + escaped.replace("${", r"\${") + '"'


def _overrides(config_name: str, word: str, sweep: bool) -> list[str]:
    key, equals, value = word.partition("=")
    if not equals or value in ("", "null"):
        return [word]
    if key in FREE_TEXT:
        return [f"{key}={quote(value)}"]
    if key in PATHS:
        return [f"{key}={_path(key, value, sweep)}"]
    if key == "model":
        return _model(value)
    if key == "experiment":
        return [f"experiment={_experiment(config_name, value)}"]
    if (CONFIGS / key).is_dir() and value.startswith("_"):
        raise ValueError(f"{key}={value} is a base of the others: use {', '.join(choices(key))}")
    return [word]


def _path(key: str, value: str, sweep: bool) -> str:
    is_quoted = value[:1] in "'\"" and value[-1:] == value[:1]
    if "," not in value or is_quoted:
        return quote(value)
    if not sweep:
        raise ValueError(
            f"{key}={value} lists several values: add --multirun for a sweep, or quote it: {key}='\"{value}\"'"
        )
    return ",".join(quote(one) for one in value.split(","))


def _model(value: str) -> list[str]:
    """A model of configs/model, a folder (perhaps not made yet) or a hub name."""
    known = choices("model")
    if value in known:
        return [f"model={value}"]
    if "/" in value or Path(value).expanduser().is_dir():
        name = Path(value).expanduser().name
        return ["model=folder", f"model.source={quote(value)}", f"model.name={quote(name)}"]
    raise ValueError(
        f"model={value} is unknown: use {', '.join(sorted({*known} - {'folder'}))}, "
        "the path of a Hugging Face folder, or a hub name like HuggingFaceTB/SmolLM2-135M"
    )


def _experiment(config_name: str, value: str) -> str:
    fitting = experiments_of(config_name)
    if value not in fitting:
        one_of = ", ".join(fitting) or "none: there is no experiment for this recipe"
        raise ValueError(f"experiment={value} does not fit {config_name}: use {one_of}")
    return value
