"""Recipes run in this process on a tiny random model; tests read what they print and their exit codes, as users do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from longctx.parallel.launcher import current_rank
from recipes import generate
from recipes.common import cli as recipe_cli
from recipes.common import overrides
from tests.conftest import Cli
from tests.recipes.chats import TURNS
from tests.tiny import tiny_model

SAVED = Path(__file__).parents[1] / "saved" / "v0_1"  # small models, sessions and runs that version 0.1 wrote


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with 9 query heads, 3 KV heads, 97 positions, one token per byte and no end token."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=97)


@pytest.fixture(scope="session")
def prepared(tiny: Path) -> Callable[..., generate.GenerateJob]:
    """``prepared(*settings)``: the job of recipes.generate on the tiny model; composed once, since Hydra is slow."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(overrides.CONFIGS)):
        config = hydra.compose("generate", ["model=folder", f"model.source={tiny}", "model.name=tiny"])
    return lambda *settings: generate.prepare(OmegaConf.merge(config, OmegaConf.from_dotlist(list(settings))))


@pytest.fixture
def refusal(prepared: Callable[..., generate.GenerateJob]) -> Callable[..., str]:
    """``refusal(*settings)``: the message with which recipes.generate refuses them; faster than `refused`."""

    def run(*settings: str) -> str:
        with pytest.raises(ValueError, match=r"\w") as refused:
            prepared(*settings)
        return str(refused.value)

    return run


@pytest.fixture
def config_of() -> Callable[..., DictConfig]:
    """``config_of(name, *words)``: the configuration that the command line ``words`` of recipe ``name`` composes."""

    def compose(name: str, *words: str) -> DictConfig:
        return recipe_cli.compose_config(name, overrides.as_overrides(name, words, pytest.fail))

    return compose


@pytest.fixture
def snapshot(tmp_path: Path) -> Callable[[], dict[str, tuple[int, bytes]]]:
    """``snapshot()``: each path below ``tmp_path`` with its time of change and content, without the model cache."""

    def read() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in tmp_path.rglob("*") if "cache" not in path.relative_to(tmp_path).parts]
        contents = {path: path.read_bytes() if path.is_file() else b"" for path in paths}
        return {str(path): (path.stat().st_mtime_ns, content) for path, content in contents.items()}

    return read


@pytest.fixture
def no_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a rank fails the test."""
    monkeypatch.setattr(recipe_cli, "run_ranks", lambda *_: pytest.fail("ranks were started"))


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """``under_torchrun(rank, world_size)``: make this process a rank that torchrun started."""

    def launch(rank: int, world_size: int) -> None:
        address = (("MASTER_ADDR", "localhost"), ("MASTER_PORT", 29500))
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), *address):
            monkeypatch.setenv(name, str(value))
        current_rank.cache_clear()

    return launch


@pytest.fixture
def refused(cli: Cli, no_ranks_start: None) -> Callable[..., str]:
    """``refused(recipe, task, *argv)``: the one line that refuses the command line, with exit code 2 and no rank."""

    def run(*command: Any) -> str:
        code, out, err = cli(*command)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    """A file with the three turns of `TURNS`, and an empty line, which is not a turn."""
    file = tmp_path / "turns.jsonl"
    file.write_text("\n".join(map(json.dumps, TURNS)) + "\n\n")
    return file
