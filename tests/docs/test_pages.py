"""The pages agree with the project: links lead somewhere, named files exist, and commands use settings that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import longctx
from recipes.common.cli import compose_config
from recipes.common.overrides import as_overrides

ROOT = Path(__file__).parents[2]
# Results quote commands as they were run, with the settings' names of then.
PAGES_WITH_COMMANDS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/tour.md",
    "docs/glossary.md",
    "docs/status.md",
    "eval/README.md",
]
CONFIGURATIONS = {"eval.run": "evaluate", "eval.speed": "eval_speed"}
LONGEST_LINE = 120
# eval.run wrote them, with a paragraph on each line.
REPORTS = ("docs/results/spd/regression.md", "docs/results/spd/repaired.md")


def pages() -> list[Path]:
    folders = ("docs", "longctx", "recipes", "eval", "slurm")
    return [
        *ROOT.glob("*.md"),
        *(ROOT / "tests").rglob("README.md"),
        *(page for folder in folders for page in (ROOT / folder).rglob("*.md")),
    ]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_links_lead_to_files_and_headings(page: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        destination = (page.parent / file).resolve() if file else page
        if not destination.exists():
            broken.append(f"{target}: no such file")
        elif heading:
            headings = re.findall(r"^#+ (.*)$", destination.read_text(), re.MULTILINE)
            if heading not in map(anchor, headings):
                broken.append(f"{target}: no such heading")
    assert not broken, f"{relative(page)}: " + "; ".join(broken)


def is_family(file: Path) -> bool:
    """A family of models is one file that nothing but longctx/models/__init__.py names."""
    return file.parent.name == "models" and file.name not in ("family.py", "features.py", "tensors.py")


def test_architecture_names_every_source_file_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("## Where an addition belongs")]
    named = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", rooms)}
    sources = [
        file
        for folder in ("longctx", "recipes", "eval", "slurm")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "__init__.py" and not is_family(file)
    ]
    missing = sorted(relative(file) for file in sources if file.name not in named)
    assert not missing, f"ARCHITECTURE.md lacks {', '.join(missing)}"
    tests = {file.name for file in (ROOT / "tests").rglob("*.py")}
    stale = sorted(named - {file.name for file in sources} - tests)
    assert not stale, f"ARCHITECTURE.md names {', '.join(stale)}, which are gone"


def test_paths_in_architecture_exist():
    """Files on the measured paths of a prompt, a training batch and a repaired block are named with their folders."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.MULTILINE)
    assert len(paths) == 12 + 13 + 13
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of ``page`` without tables and pictures, and without the commands of a results page."""
    in_code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        in_code ^= line.startswith("```")
        is_quoted = in_code and "docs/results" in page.as_posix()
        if not (is_quoted or line.startswith(("|", "!["))):
            yield number, line


@pytest.mark.parametrize("page", [page for page in pages() if relative(page) not in REPORTS], ids=relative)
def test_lines_are_short(page: Path):
    assert [f"{relative(page)}:{n}" for n, line in prose(page) if len(line) > LONGEST_LINE] == []


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (page, configuration, words) of every command of a recipe in blocks of shell code."""
    for page in PAGES_WITH_COMMANDS:
        text = (ROOT / page).read_text()
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if language != "bash":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "-m" not in words or not words[words.index("-m") + 1].startswith(("recipes.", "eval.")):
                    continue
                module, *settings = words[words.index("-m") + 1 :]
                if module == "recipes.bench":
                    module = f"bench_{settings.pop(0)}"
                yield page, CONFIGURATIONS.get(module, module.removeprefix("recipes.")), settings


@pytest.mark.parametrize(("page", "configuration", "words"), [*commands()], ids=lambda value: str(value)[:60])
def test_commands_use_settings_that_exist_and_have_their_new_names(page: str, configuration: str, words: list[str]):
    if configuration in ("reproduce", "compare"):
        return  # they take folders, not settings
    if configuration.startswith("bench_"):
        configuration = f"bench/{configuration.removeprefix('bench_')}"
    old_names: list[str] = []
    compose_config(configuration, as_overrides(configuration, words, old_names.append))
    assert not old_names, page


def test_version_is_in_the_changelog_and_the_citation():
    assert f"## [{longctx.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {longctx.__version__}\n" in (ROOT / "CITATION.cff").read_text()
