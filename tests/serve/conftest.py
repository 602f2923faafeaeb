"""The model of the tests of servers."""

from pathlib import Path

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("service") / "tiny", max_positions=97)
