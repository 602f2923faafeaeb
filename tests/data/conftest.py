"""Fixtures of the data tests: a byte tokenizer, and a dataset cache per test."""

import pytest

from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer whose token n is byte n; token 256 ends a document."""
    return tiny_tokenizer(eos_token="<end>")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Give the files that `datasets` caches to the test's own temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
