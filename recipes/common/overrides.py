"""Words of a command line as Hydra overrides: free text is quoted, a model may be a path, old names are renamed."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipes.common.mistakes import refuse_unreadable
from recipes.common.renamed import Say, rename_override

# In a checkout recipes/configs is a link to configs; an installed copy has the files there.
CONFIGS = (Path(__file__).resolve().parents[1] / "configs").resolve()
# Settings that hold any text, in which Hydra would read commas, parentheses and quotes as its syntax.
FREE_TEXT = ("prompt.text", "prompt.question", "track.name", "track.group", "track.notes", "rate")
# Settings that hold one path. A comma separates the values of a sweep.
PATHS = (
    "prompt.file", "prompts", "out", "to", "checkpoint", "turns", "session.save", "session.load", "spd.sensitivity",
    "sensitivity", "eval.data", "eval.include", "eval.text", "adapted", "hardware", "picture", "fitted", "json",
    "allowed_drop", "markdown", "model.source", "model.cache", "model.chat_template", "folder", "pipeline", "settings",
    "offload", "quality", "report", "api_key_file", "cache.save",
)  # fmt: skip
# A path in the list of a sweep, in quotes or without a comma.
_LISTED = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')(?=,|\Z)|[^,]+""", re.DOTALL)
# Settings that can be removed by a word like ~model.config.head_dim: fields of a mapping without fixed names.
_REMOVABLE = ("~model.config.", "~eval.limits.")
# A file with another configuration's name -> the experiments that fit it.
EXPERIMENTS = {
    "extend": ("extend", "pretrain"),
    "eval_speed": ("evaluate",),
    "bench/convergence": ("pretrain",),
    "bench/train": ("pretrain",),
}


def as_overrides(config_name: str, words: Sequence[str], say: Say, *, sweep: bool = False) -> list[str]:
    """Return ``words`` in Hydra's grammar; in a ``sweep`` a comma in a path separates the values of two runs.

    A word may become several, such as ``model=PATH``, or ``plan=FILE`` (see `expand_plan`).  ``say`` receives a line
    for each old name.

    Raises ValueError for

    * a word without a value, and text that needs quotes or is not UTF-8;
    * an unknown model, and an experiment of a different recipe;
    * a configuration file whose name starts with ``_``, which only other files use;
    * the removal of a setting (``~KEY``) outside model.config and eval.limits;
    * a comma in a path outside a sweep.
    """
    for word in words:
        if re.search("[\ud800-\udfff]", word):  # a byte that Python could not decode
            raise ValueError(f"{word!a} is not UTF-8 text: write the word in UTF-8, or rename the file")
    renamed = [rename_override(word, say) for word in expand_plan(words)]
    return [override for word in renamed for override in _overrides(config_name, word, sweep)]


def expand_plan(words: Sequence[str]) -> list[str]:
    """Return ``words`` with ``plan=FILE`` replaced by the settings in FILE.

    The file's settings come first, so that the other words override them.

    Raises ValueError if the file, which ``recipes.plan settings=FILE.yaml`` writes, has no settings.  It also does so
    for a word such as mesh=NAME, if the file has a setting of that group: Hydra would let the file win.
    """
    files = [word.partition("=")[2] for word in words if word.startswith("plan=")]
    planned = [setting for file in files for setting in _planned(file)]
    others = [word for word in words if not word.startswith("plan=")]
    groups = {setting.partition(".")[0] for setting in planned if "." in setting.partition("=")[0]}
    if both := [word for word in others if word.partition("=")[0] in groups]:
        raise ValueError(
            f"{both[0]} and plan={files[0]} set the same values: leave one of them out, or override single ones, such "
            f"as {next(setting for setting in planned if setting.startswith(both[0].partition('=')[0]))}"
        )
    return [*planned, *others]


def _planned(file: str) -> list[str]:
    """Return the settings in ``file``, written by recipes.plan, as words KEY=VALUE; raise ValueError without any."""
    try:
        values = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
        return [f"{name}={_plain(name, value)}" for name, value in values.items()]
    except (OSError, AttributeError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"plan={file} has no settings ({error}): write it with python -m recipes.plan ... settings=FILE.yaml"
        ) from error


def _plain(name: str, value: object) -> str:
    """Return the ``value`` of setting ``name`` as a user types it.  Raises TypeError unless it is one plain value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        as_typed = name in (*FREE_TEXT, *PATHS) or re.fullmatch(r"\w+", value)  # the former are quoted later
        return value if as_typed else quote(value)
    raise TypeError(f"{name} is not a single value")


def choices(group: str) -> list[str]:
    """Return the names that ``group=NAME`` accepts: the files of its folder, except those that begin with ``_``."""
    files = sorted((CONFIGS / group).rglob("*.yaml"))
    names = [file.relative_to(CONFIGS / group).with_suffix("").as_posix() for file in files]
    return [name for name in names if not name.startswith("_")]


def experiments_of(config_name: str) -> list[str]:
    """Return the experiments that fit the configuration ``config_name``."""
    fitting = EXPERIMENTS.get(config_name, (config_name,))
    return [name for name in choices("experiment") if name.startswith(tuple(f"{folder}/" for folder in fitting))]


def quote(text: str) -> str:
    """Return ``text`` in double quotes, so that Hydra and OmegaConf read exactly ``text``, its own quotes included.

    Backslashes are special only before a quote, at the end, and before ``${``, which begins an interpolation.
    """
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), literal(text)) + '"'


def literal(text: str) -> str:
    """Return ``text`` with its ``${`` escaped, so that OmegaConf reads it as this text, without interpolations."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def expand_home(config: DictConfig) -> DictConfig:
    """Replace a leading ``~`` in the paths of ``config`` by the home folder, in place; return ``config``.

    Shells leave the ``~`` in out=~/x to the command.  ``model.cache`` is not changed: its readers expand it, and
    recipes.compare compares it between users.  Raises ValueError for the home folder of a user who does not exist.
    """
    for name in PATHS:
        section, _, key = name.rpartition(".")
        holder = OmegaConf.select(config, section) if section else config
        path = OmegaConf.select(holder, key) if isinstance(holder, DictConfig) else None
        if name == "model.cache" or not isinstance(path, str) or not path.startswith("~"):
            continue
        try:
            holder[key] = literal(str(Path(path).expanduser()))
        except RuntimeError as error:
            raise ValueError(
                f"{name}={path} is in the home folder of an unknown user: use ~/ for your own, or {name}=./{path} for "
                "a name that begins with ~"
            ) from error
    return config


def path_word(key: str, path: str) -> str:
    """Return the word of a command line that sets ``key`` to one ``path``, quoted if Hydra could read it as a sweep."""
    return f"{key}={quote(path) if ',' in path or is_quoted(path) else path}"


def typed_word(override: str) -> str:
    """Return what a user types for ``override``, a word in Hydra's grammar: free text loses its quotes."""
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT or not is_quoted(value):
        return override
    parsed = OverridesParser.create().parse_override(override).value()
    return f"{key}={OmegaConf.create([str(parsed)])[0]}"


def _overrides(config_name: str, word: str, sweep: bool) -> list[str]:
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    _refuse_nothing(word)
    if word.startswith(("-", "~")) or (equals and value in ("", "null")):
        return [word]
    if name in (*FREE_TEXT, *PATHS) and value == "???":
        raise ValueError(f"{word} means that no value is given: write a value")
    if name in FREE_TEXT:
        return [f"{key}={quote(value)}"]
    if name in PATHS:
        return [f"{key}={_path(key, value, sweep)}"]
    if key == "model":
        return _model(value)
    if key == "experiment":
        return [f"experiment={_experiment(config_name, value)}"]
    if (CONFIGS / key).is_dir() and re.fullmatch(r"[\w/-]+", value) and value not in (names := choices(key)):
        wrong = "only holds defaults for the other choices" if value.startswith("_") else "is unknown"
        raise ValueError(f"{key}={value} {wrong}: use {', '.join(names)}")
    refuse_unreadable(word)
    return [word]


def _refuse_nothing(word: str) -> None:
    """Raise ValueError for a word without a key, one that removes a setting, and a group without a choice."""
    key, equals, value = word.partition("=")
    if not key.lstrip("+") or (word[0] == "~" and not word.startswith(_REMOVABLE)):
        advice = "delete this word" if word.startswith("~") else "write KEY=VALUE, such as mesh.ring=2"
        raise ValueError(f"{word} is not a setting: {advice}")
    if equals and value in ("", "null") and (CONFIGS / key).is_dir() and word != "experiment=null":
        raise ValueError(f"{word} chooses nothing: write {key}=NAME, where NAME is one of {', '.join(choices(key))}")


def is_quoted(text: str) -> bool:
    """Return True if ``text`` is one string in Hydra's quotes: ``"a" and "b"`` is not."""
    return re.fullmatch(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", text, re.DOTALL) is not None


def lists_values(value: str) -> bool:
    """Return True if ``value`` of a path lists the values of a sweep: it has a comma outside quotes."""
    return "," in value and not is_quoted(value)


def _path(key: str, value: str, sweep: bool) -> str:
    if not lists_values(value):
        return value if is_quoted(value) else quote(value)
    if not sweep:
        raise ValueError(
            f"{key}={value} lists several values: add --multirun for a sweep, or quote it: {key}='\"{value}\"'"
        )
    return ",".join(path if path == "null" or is_quoted(path) else quote(path) for path in _LISTED.findall(value))


def _model(value: str) -> list[str]:
    """Return the overrides that choose a model: a name in configs/model, a path (perhaps not made yet), a hub name."""
    known = choices("model")
    if value in known:
        return [f"model={value}"]
    if "/" in value or Path(value).suffix == ".gguf" or Path(value).expanduser().is_dir():
        name = Path(value).expanduser().name
        return ["model=folder", f"model.source={quote(value)}", f"model.name={quote(name)}"]
    raise ValueError(
        f"model={value} is unknown: use {', '.join(sorted({*known} - {'folder'}))}, "
        "the path of a Hugging Face folder or a .gguf file, or a hub name like HuggingFaceTB/SmolLM2-135M"
    )


def _experiment(config_name: str, value: str) -> str:
    fitting = experiments_of(config_name)
    if value not in fitting:
        advice = f"use {', '.join(fitting)}" if fitting else "this recipe has no experiments, leave it out"
        raise ValueError(f"experiment={value} does not fit {config_name}: {advice}")
    return value
