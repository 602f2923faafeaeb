"""Recipes run in this process on a tiny random model; what they print, and how they leave, is what a user sees."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from recipes import generate
from recipes.common import cli as recipe_cli
from recipes.common import overrides
from tests.tiny import tiny_model

Cli = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 9 query and 3 KV heads, 97 positions, no end token; a token a byte."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=97)


@pytest.fixture(scope="session")
def prepared(tiny: Path) -> Callable[..., generate.GenerateJob]:
    """``prepared(*settings)``: the job of recipes.generate on the tiny model; composed once, since Hydra is slow."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(overrides.CONFIGS)):
        config = hydra.compose("generate", ["model=folder", f"model.source={tiny}", "model.name=tiny"])
    return lambda *settings: generate.prepare(OmegaConf.merge(config, OmegaConf.from_dotlist(list(settings))))


@pytest.fixture
def refusal(prepared: Callable[..., generate.GenerateJob]) -> Callable[..., str]:
    """What recipes.generate refuses a job with those settings with; `refused` is the same from the command line on."""

    def run(*settings: str) -> str:
        with pytest.raises(ValueError, match=r"\w") as refused:
            prepared(*settings)
        return str(refused.value)

    return run


@pytest.fixture
def nobody_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a rank fails the test."""
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli(recipe, task, *argv)``: run ``python -m recipe argv``; exit code, stdout, stderr."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def run(recipe: ModuleType, task: Callable[..., None], *argv: str) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", [str(recipe.__file__), *argv])
        module = recipe.__name__.replace("recipes.bench.", "recipes.bench ").split()
        monkeypatch.setattr("sys.orig_argv", [sys.executable, "-m", *module, *argv])
        name = recipe.__name__.removeprefix("recipes.").replace(".", "/")
        code = 0
        try:
            recipe_cli.main(name, task)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(cli: Cli, nobody_starts: None) -> Callable[..., str]:
    """What a recipe says when it refuses its command line: one line, with exit code 2 and no rank started."""

    def run(*command: Any) -> str:
        code, out, err = cli(*command)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run
