"""Fixture of the W&B tests."""

import pytest

from tests.tracking import tear_down_wandb


@pytest.fixture
def fresh_wandb():
    """Make W&B, which reads its environment once, read it again in the test and after the test."""
    tear_down_wandb()
    yield
    tear_down_wandb()
