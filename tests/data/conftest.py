"""What the tests of data share."""

import pytest

from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token a byte; the end of a document is 256."""
    return tiny_tokenizer(eos_token="<end>")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What `datasets` makes of a dataset goes with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
