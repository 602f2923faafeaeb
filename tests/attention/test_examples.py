"""The examples in the docstrings of layouts and tiles give the results that they show."""

import doctest
import sys

import pytest

from longctx.attention.layout import Layout, contiguous, documents, shard_balanced, striped, zigzag
from longctx.attention.tiles import visible_tiles

SUBJECTS = (Layout, contiguous, documents, shard_balanced, striped, zigzag, visible_tiles)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.__name__)
def test_docstring_example_gives_its_result(subject):
    names = dict(vars(sys.modules[subject.__module__]))
    example = doctest.DocTestParser().get_doctest(subject.__doc__, names, subject.__name__, None, None)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
