"""Each wrong command line ends in one line and exit code 2, without a rank, a traceback or a file."""

import gzip
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

import eval.run
import eval.speed
import recipes.bench.__main__ as bench
import slurm.submit
from recipes import calibrate, chat, doctor, export, extend, generate, models, pretrain, spd_adapt, spd_sensitivity
from recipes.common import cli
from recipes.compare import compare
from recipes.reproduce import reproduce
from tests.conftest import LAUNCHERS
from tests.recipes.conftest import SAVED

Words = tuple[str, ...]
TASKS = {
    "generate": ("generate", generate.task),
    "chat": ("chat", chat.task),
    "pretrain": ("pretrain", pretrain.task),
    "extend": ("extend", extend.task),
    "export": ("export", export.task),
    "calibrate": ("calibrate", calibrate.task),
    "models": ("models", models.task),
    "doctor": ("doctor", doctor.task),
    "spd_sensitivity": ("spd_sensitivity", spd_sensitivity.task),
    "spd_adapt": ("spd_adapt", spd_adapt.task),
    "eval.run": ("evaluate", eval.run.task),
    "eval.speed": ("eval_speed", eval.speed.task),
}
MANIFEST = json.loads((SAVED / "generate" / "manifest.json").read_text())
# Files of the working folder, most of them bad ones.
FILES: dict[str, str | bytes] = {
    "not_json/config.json": "{",
    "torn/session.json": '{"tokens": [',
    "empty/notes": "",
    "convergent/one_rank/notes": "",
    "theirs/manifest.json": json.dumps({"module": "recipes.other", "out": "theirs"}),
    "mine.json": "{}",
    "empty.txt": "",
    "latin1.txt": "süß\n".encode("latin1") * 20,
    "binary.txt": bytes(range(256)),
    "short.txt": "a",
    "torn.txt.gz": gzip.compress(b"text " * 999, mtime=0)[:-9],
    "deep.jsonl": "[" * 99_999,
    "digits.jsonl": f'{{"text": "a", "max_new_tokens": {"9" * 9999}}}',
    "numbers.jsonl": '{"text": 3}',
    "huge.jsonl": '{"text": "a", "max_new_tokens": 99999999999999999999}',
    "nan.jsonl": '{"text": "a", "max_new_tokens": NaN}',
    "surrogate.jsonl": '{"text": "\\ud800"}',
    "nan.yaml": "flops: .nan",
    "nan.json": '{"order": [NaN, 0], "blocks": [{"score": NaN}]}',
    "pipeline.yaml": "recipe=generate",
    "broken_run/manifest.json": '{"module": "recipes.generate"',
    "empty_run/manifest.json": "{}",
    "list_run/manifest.json": "[]",
    "foreign_run/manifest.json": json.dumps({**MANIFEST, "module": "os", "overrides": ["x"]}),
    "session_run/manifest.json": json.dumps({**MANIFEST, "config": {"session": 3}}),
    "nothing_run/manifest.json": json.dumps({**MANIFEST, "data": None, "packages": 3}),
}
COPIES = {"talk": "chat", "spd_talk": "chat_spd", "adapted": "spd_adapted", "torn_run": "train_ring",
          "sensitivity": "spd_sensitivity"}  # fmt: skip


def read_cases() -> Iterator[tuple[str, Words, list[Words]]]:
    """Yield each recipe of bad_inputs.txt, its first words, and the wrong words of each line."""
    sections = re.split(r"(?m)^\[([^\]]+)\] ?(.*)$", Path(__file__).with_name("bad_inputs.txt").read_text())
    for recipe, first, lines in zip(sections[1::3], sections[2::3], sections[3::3], strict=True):
        yield recipe, shell_words(first), [shell_words(line) for line in lines.splitlines() if line]


def shell_words(line: str) -> Words:
    """Split ``line`` as bash does, with $'...' and $LONG, a name that no file can have."""
    line = re.sub(r"\$'([^']*)'", lambda match: shlex.quote(match[1].encode().decode("unicode_escape")), line)
    return tuple(word.replace("$LONG", "n" * 300) for word in shlex.split(line))


CASES = list(read_cases())


class Started(BaseException):
    """Raised when a command line was accepted and ranks are about to start."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("model", "inputs", "train_ring", "hardware", "generate"):
        shutil.copytree(SAVED / name, folder / name)
    for name, source in COPIES.items():
        shutil.copytree(SAVED / source, folder / name)
    for file in (folder / "torn_run").rglob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if name.endswith("_run/manifest.json"):
            (folder / name).with_name("result.json").write_text('{"a": 1}')
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def scratch(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files.  The test runs in the working folder, and starts no rank."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LONGCTX_CACHE", str(cache))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def start(*_: object) -> None:
        raise Started

    for module in (cli, export, eval.speed):
        monkeypatch.setattr(module, "run_ranks", start)
    monkeypatch.setattr(cli, "warm_up", lambda _: None)
    monkeypatch.setattr(slurm.submit, "submit", start)
    compose_once(monkeypatch)
    return tmp_path


def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe with the configuration that its check has composed; Hydra composes it twice more, which is slow."""
    composed: list[DictConfig] = []
    compose, main = hydra.compose, hydra.main

    def remember(name: str, words: list[str]) -> DictConfig:
        composed.append(compose(name, words, return_hydra_config=True))
        return OmegaConf.masked_copy(composed[-1], [key for key in composed[-1] if key != "hydra"])

    def run_composed(task: Callable[[DictConfig], None]) -> None:
        config = composed[-1]
        config.hydra.mode = RunMode.RUN
        HydraConfig.instance().set_config(config)
        with flag_override(config, ["struct", "readonly"], False):
            del config["hydra"]
        task(config)

    def reuse(**settings: Any) -> Callable[..., Any]:
        has_option = any(word.startswith("-") for word in sys.argv[1:])
        return main(**settings) if has_option else lambda task: lambda: run_composed(task)

    monkeypatch.setattr(hydra, "compose", remember)
    monkeypatch.setattr(hydra, "main", reuse)


def run(recipe: str, words: Sequence[str]) -> int | str:
    """Run a command line in this process, as the recipe's module does; return its exit code."""
    sys.argv[:] = ["recipe", *words]
    runs: dict[str, Callable[[], None]] = {
        "compare": lambda: cli.exit_on_error(lambda: compare(words)),
        "reproduce": lambda: cli.exit_on_error(lambda: reproduce(words)),
        "slurm.submit": lambda: slurm.submit.main(words),
    }
    name, _, subject = recipe.partition(" ")
    try:
        if name == "bench":
            bench.run_benchmark([*filter(None, [subject]), *words])
        else:
            runs.get(name, lambda: cli.main(*TASKS[name]))()
    except SystemExit as leaving:
        return str(leaving.code) if isinstance(leaving.code, str) else leaving.code or 0
    finally:
        GlobalHydra.instance().clear()
    return 0


def snapshot(*folders: Path) -> dict[str, int]:
    """Each path below ``folders`` with its time of change."""
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def remove_new(folder: Path, names: set[Path]) -> None:
    """Remove what is in ``folder`` but not among ``names``."""
    for path in {*folder.iterdir()} - names:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("recipe", "first", "lines"), CASES, ids=[recipe for recipe, *_ in CASES])
def test_wrong_command_line_is_refused_in_one_line(folder, scratch, monkeypatch, capsys, recipe, first, lines):
    monkeypatch.setattr("sys.argv", [])
    before, names, faults = snapshot(folder, scratch), {*folder.iterdir()}, {}
    for words in lines:
        try:
            code = run(recipe, (*first, *words))
        except Exception as error:  # all faults are listed together
            code = f"{type(error).__name__}: {error}"
        except Started:
            code = "accepted"
        out, err = capsys.readouterr()
        after = snapshot(folder, scratch)
        if (code, out) != (2, "") or not err.startswith("error: ") or err.count("\n") != 1 or after != before:
            faults[" ".join(words)] = (code, out, err, sorted(after.items() - before.items()))
            remove_new(folder, names)  # a run's folder would be the reason to refuse the lines that follow
            before = snapshot(folder, scratch)
    assert not faults, "".join(f"\n{words}: {fault}" for words, fault in faults.items())


@pytest.mark.parametrize(("recipe", "first"), [(recipe, first) for recipe, first, _ in CASES if first])
def test_first_words_are_accepted(folder, scratch, monkeypatch, recipe, first):
    """The first words are accepted, so the refusals above are due to the words that follow."""
    monkeypatch.setattr("sys.argv", [])
    names = {*folder.iterdir()}
    with pytest.raises(Started):
        run(recipe, first)
    remove_new(folder, names)


def test_there_are_many_cases():
    assert sum(len(lines) for *_, lines in CASES) >= 200
