"""The language of the project: beginnings of docstrings, the field's names, and short table cells.

Each rule lists all offenders as ``file:line``.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("longctx", "recipes", "eval", "slurm", "tests")
SOURCE_FOLDERS = ("longctx", "recipes", "eval", "slurm")
BEGINNINGS = re.compile(r"(of|what|who|whether)\b", re.IGNORECASE)
MAX_CELL = 100


@dataclass(frozen=True)
class Definition:
    """A name that a source file defines: its ``kind`` is module, class, function, parameter, field or variable."""

    file: str
    line: int
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind} {self.name}"


def sources(*folders: str) -> Iterator[Path]:
    """Yield the Python files of ``folders``."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# Beginnings of docstrings and comments.


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment; of several full-line comments in a row, the first."""
    previous_full_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        full_line = not token.line[:column].strip()
        if not (full_line and previous_full_line == line - 1):
            yield line, token.string.lstrip("#: ")
        previous_full_line = line if full_line else -1


def test_no_docstring_or_comment_begins_with_of_what_who_or_whether():
    offenders = []
    for file in sources(*FOLDERS):
        source = file.read_text()
        for line, text in [*docstrings(ast.parse(source)), *comments(source)]:
            if BEGINNINGS.match(text):
                offenders.append(f"{relative(file)}:{line}: {text.splitlines()[0]}")
    assert not offenders, f"{len(offenders)} docstrings and comments:\n" + "\n".join(offenders)


# The field's names.


@dataclass(frozen=True)
class Rule:
    """Names that must not be defined, each with the name to use instead.

    The rule is limited to ``kinds`` of definitions and to files below ``within``.  ``exceptions`` are allowed
    definitions, as "file name", with the reason.
    """

    names: dict[str, str]
    kinds: tuple[str, ...] = ("module", "class", "function", "parameter", "field", "variable")
    within: tuple[str, ...] = FOLDERS
    exceptions: dict[str, str] | None = None

    def broken_by(self, one: Definition) -> bool:
        return (
            one.name in self.names
            and one.kind in self.kinds
            and one.file.startswith(tuple(f"{folder}/" if "." not in folder else folder for folder in self.within))
            and f"{one.file} {one.name}" not in (self.exceptions or {})
        )


LOCAL = ("parameter", "variable")
RULES = [
    Rule(
        {
            "deal": "shard_balanced",
            "held": "rows_per_rank",
            "nothing": "empty_partial",
            "absorb": "merge_",
            "joined": "concat_rows",
            "one_exchange": "gather_merge",
            "stem": "prefix",
            "Branch": "PrefixView",
            "Tree": "prefix group",
            "Alone": "SingleRankComm",
            "Arrived": "CompletedPending",
            "Silent": "NullComm",
            "Waiting": "ExposedCommTimer",
            "neighbours": "local_world_size",
            "meet": "init_method, or barrier",
            "head_width": "head_dim",
            "vocabulary": "vocab_size",
            "deviation": "init_std",
            "look": "update",
            "looked_at": "calibration_sequences",
            "Together": "JointDistillation",
            "Drawn": "RandomInit",
            "LinearGuess": "LeastSquares",
            "agreed": "agreed_on_all_ranks",
            "put": "commit",
            "torn": "corrupt",
            "kept": "checkpoint_index, or the name of what it is",
            "described": "scratch",
            "pretrained": "locate, or config",
            "ways": "variants",
            "things": "the name of what they are",
        },
        exceptions={
            "longctx/megatron/training/checkpoint.py put": "a queue's method, which megatron-core's writer calls",
        },
    ),
    # In tests these are plain words.
    Rule(
        {
            "here": "runtime",
            "how": "settings",
            "told": "metadata, reply, or the name of what it is",
            "found": "result",
            "behind": "resume_state",
        },
        kinds=LOCAL,
        within=SOURCE_FOLDERS,
    ),
    # A variable may count what is waiting; a module of that name is gone.
    Rule({"waiting": "comm_timer"}, kinds=("module",)),
    # A participle hides what a function does.  `adapted` is also a setting of eval, and stays one.
    Rule(
        {
            "built": "build",
            "measured": "measure_...",
            "answered": "answer_...",
            "adapted": "adapt",
            "swept": "sweep",
        },
        kinds=("function",),
    ),
    # Names of settings; elsewhere they are plain words.
    Rule(
        {"together": "max_batch_tokens", "longest": "max_length", "called": "label", "looked_at": "calibration_..."},
        kinds=("field",),
        within=SOURCE_FOLDERS,
    ),
    # A model's length.  Positions of rows, elsewhere, are positions.
    Rule(
        {"positions": "max_positions"},
        kinds=("field",),
        within=("longctx/config.py", "longctx/model_shape.py"),
    ),
    # The ranks of a launch.  `local` and `world` are plain words elsewhere.
    Rule(
        {"local": "local_rank", "world": "world_size"},
        kinds=("field",),
        within=("longctx/parallel/launch.py",),
    ),
    # The share of a data-parallel rank.  In other files of the room, a source consists of parts: its files.
    Rule({"part": "dp_rank", "parts": "dp_size"}, kinds=LOCAL, within=("longctx/data/batches.py",)),
    # Rows of a printed table.  In longctx, and where eval packs texts, a row is a token on a rank.
    Rule(
        {"rows": "table_rows, or the name of what they are"},
        kinds=LOCAL,
        within=("recipes", "eval/stats", "eval/run.py", "eval/speed.py", "slurm"),
        exceptions={
            "recipes/bench/million.py rows": "tokens on a rank",
            "recipes/bench/train.py rows": "tokens on a rank",
            "recipes/common/spd_loop.py rows": "sequences of a batch",
            "recipes/common/train_job.py rows": "sequences of a batch",
        },
    ),
]


def definitions(file: Path) -> Iterator[Definition]:
    """Yield the names that ``file`` defines; imported names without an alias belong to another file."""
    name = relative(file)
    yield Definition(name, 1, "module", file.stem)
    fields: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ClassDef():
                yield Definition(name, node.lineno, "class", node.name)
                targets = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
                targets += [target for one in node.body if isinstance(one, ast.Assign) for target in one.targets]
                fields.update(targets)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield Definition(name, node.lineno, "function", node.name)
            case ast.arg():
                yield Definition(name, node.lineno, "parameter", node.arg)
            case ast.Name(ctx=ast.Store()):
                yield Definition(name, node.lineno, "field" if node in fields else "variable", node.id)
            case ast.Attribute(ctx=ast.Store()):
                yield Definition(name, node.lineno, "field", node.attr)
            case ast.alias(asname=str(alias)):
                yield Definition(name, node.lineno, "variable", alias)


@cache
def all_definitions() -> list[Definition]:
    return [one for file in sources(*FOLDERS) for one in definitions(file)]


def test_names_are_those_of_the_field():
    offenders = [
        f"{one}; use {rule.names[one.name]}" for one in all_definitions() for rule in RULES if rule.broken_by(one)
    ]
    assert not offenders, f"{len(offenders)} names:\n" + "\n".join(offenders)


def test_every_exception_is_still_needed():
    defined = {f"{one.file} {one.name}" for one in all_definitions()}
    unused = [exception for rule in RULES for exception in rule.exceptions or {} if exception not in defined]
    assert not unused, "\n".join(unused)


# Tables.


def pages() -> list[Path]:
    """Return the pages whose tables have short cells."""
    top = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    rooms = [page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")]
    return [*top, *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "results").glob("*.md"), *rooms]


def cells(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, cell) of every Markdown table outside blocks of code."""
    in_code = False
    for line, row in enumerate(text.splitlines(), 1):
        if row.startswith("```"):
            in_code = not in_code
        if not in_code and row.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", row.strip().strip("|")):
                yield line, cell.strip()


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_table_cells_are_short(page: Path):
    offenders = [
        f"{relative(page)}:{line}: {len(cell)} characters: {cell}"
        for line, cell in cells(page.read_text())
        if len(cell) > MAX_CELL
    ]
    assert not offenders, f"{len(offenders)} cells over {MAX_CELL} characters:\n" + "\n".join(offenders)


# Lists in Markdown.


def broken_lists(text: str) -> Iterator[int]:
    """Yield the lines at which a renderer sees a list that is not meant, or misses one that is.

    A line of a paragraph that happens to begin with "1." begins a list (CommonMark, section 5.3).  A list that was
    filled into one paragraph is no list any more: "1. One. 2. Two."
    """
    code, before = False, ""
    for number, line in enumerate(text.splitlines(), start=1):
        code ^= line.lstrip().startswith("```")
        if not code:
            if line.startswith("1. ") and before.strip():
                yield number
            if re.search(r"[a-z\"`)][.:;] [2-9]\. [A-Z]", line):
                yield number
        before = line


def test_a_list_is_a_list_for_markdown():
    assert list(broken_lists("rank r -\n1. Rank r")) == [2]
    assert list(broken_lists("1. One.\n2. Two,\n   three.\n3. Four.\n\n1. Five. 2. Six.")) == [6]
    offenders = [f"{relative(page)}:{line}" for page in pages() for line in broken_lists(page.read_text())]
    assert not offenders, "\n".join(offenders)
