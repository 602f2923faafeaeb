"""For the tests of this room."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Ranks are threads or processes of their own here: more for each would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
