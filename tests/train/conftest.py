"""What the tests of W&B share."""

import pytest

from tests.tracking import torn_down


@pytest.fixture
def fresh_wandb():
    """W&B reads its environment once: here anew, before the test and after it."""
    torn_down()
    yield
    torn_down()
