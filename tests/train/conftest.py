"""What the tests of W&B share."""

import os
import sys

import pytest


@pytest.fixture(scope="module")
def wandb_at_home(tmp_path_factory):
    """W&B without an account, with all that it writes under one folder."""
    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(home / "none"))
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name))
        yield
        torn_down()


@pytest.fixture
def fresh_wandb():
    """W&B reads its environment once: here anew, before the test and after it."""
    torn_down()
    yield
    torn_down()


def torn_down() -> None:
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
