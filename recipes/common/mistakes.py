"""One-line messages for words of a command line that cannot be read, settings that do not exist, and wrong values."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

# Keys of an item of data.sources or data.test; such items are settings in braces, and may hold paths.
_SOURCE_KEYS = "path|name|subset|split|text_key|pydoc|weight|streaming"
_SOURCE_TEXT = re.compile(rf"\b(path|name|subset|split):(.+?)(?=,(?:{_SOURCE_KEYS}):|\}},\{{|\}}\]?$)")


def is_readable(word: str) -> bool:
    """Return True if ``word`` is an override in Hydra's grammar."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def refuse_unreadable(word: str) -> None:
    """Raise ValueError unless ``word`` is an override in Hydra's grammar.

    The message shows where quotes are missing; for a word without "=", it asks for KEY=VALUE.
    """
    if is_readable(word):
        return
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word} is not a setting: write KEY=VALUE, such as mesh.ring=2")
    quoted = f"{key}={_SOURCE_TEXT.sub(_in_quotes, value)}"
    if quoted == word or not is_readable(quoted):
        quoted = f"{key}=['...','...']" if value.startswith("[") else f"{key}='...'"
    raise ValueError(f'{word} cannot be read: quote the text; in a shell, write "{quoted}"')


def _in_quotes(match: re.Match[str]) -> str:
    key, text = match.groups()
    return match[0] if text[0] in "'\"" else f"{key}:'{text}'"


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """Return the message for a setting ``name`` that does not exist, with the nearest ``known`` one if similar."""
    known = list(known)
    if name.partition(".")[0] == "reduce" and not any(each.partition(".")[0] == "reduce" for each in known):
        return (
            f"there is no setting {name} here: rounded reductions are for generate, chat and eval, and not tested in "
            "training; leave it out"
        )
    near = get_close_matches(name, known, n=1, cutoff=0.75)
    if name.startswith("model.config.") and not any(each.startswith("model.config.") for each in known):
        return f"there is no setting {name}: this model has weights and a config.json; leave it out"
    if name.startswith("model.config."):
        meant = f"did you mean {near[0]}? For" if near else "for"
        return f"the model's file has no {name}: {meant} another field of config.json, write +{name}=VALUE"
    section, _, key = name.rpartition(".")
    if not near and section not in known:  # the section is missing or wrong
        full_names = {each.rpartition(".")[2]: each for each in reversed(known)}
        near = [full_names[each] for each in get_close_matches(key, full_names, n=1, cutoff=0.75)]
    return f"there is no setting {name}: " + (f"did you mean {near[0]}?" if near else "--help lists the settings")


def wrong_value(prefix: str, invalid: ValidationError) -> str:
    """Return the message for the first value that pydantic refused, with what to give instead.

    ``prefix`` begins the setting's name, such as "mesh.".
    """
    errors = invalid.errors()
    first = errors[0]
    # The branches of a union have an error each; their location continues with the name of a type.
    location = [str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z]\w*", part)]
    if len(errors) > 1 and len({str(error["input"]) for error in errors}) == 1:
        location = [part for part in location if part not in _TYPES]
        needs = " or ".join(dict.fromkeys(_needed(error) for error in errors))
    else:
        needs = _needed(first)
    name = f"{prefix}{'.'.join(location)}"
    if first["type"] == "unexpected_keyword_argument":
        return f"there is no setting {name}: --help lists the settings"
    if first["type"].startswith("missing"):
        return f"{name} is missing: give a value"
    return f"{name}={'null' if first['input'] is None else first['input']}: give {needs}"


_TYPES = ("str", "int", "float", "bool", "none", "tuple", "list", "dict")
_NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text; a number or true as text is written in quotes",
    "tuple": "a list: [...]",
    "list": "a list: [...]",
    "mapping": "settings in braces: {...}",
    "dict": "settings in braces: {...}",
    "dataclass": "settings in braces: {...}",
    "none": "null",
}


def _needed(error: ErrorDetails) -> str:
    """Return the values that a setting accepts, after pydantic's ``error``, in the words of a command line."""
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        single = " (one of them, without brackets)" if isinstance(error["input"], list) else ""
        return str(context["expected"]).replace("'", "") + single
    if error["type"].startswith(("greater_than", "less_than")):
        return error["msg"].replace("Input should be", "a number")
    message = error["msg"]
    return _NEEDED.get(error["type"].partition("_")[0], f"another value ({message[0].lower()}{message[1:]})")


def names_of(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings and sections in ``values``."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from names_of(value, f"{prefix}{name}.")
