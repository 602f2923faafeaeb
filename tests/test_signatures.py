"""Signatures are checked in a function's first calls of each test, and in some of the later ones."""

from dataclasses import dataclass

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from longctx.attention.partial import sink
from tests.signatures import EVERY, FIRST, calls, jaxtyped


@jaxtyped(typechecker=beartype)
def repeat(x: Float[Tensor, "n d"], times: int) -> Float[Tensor, " d"]:
    return x[0] if times else x


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class _Name:
    text: str


GOOD, WRONG = torch.ones(3, 5), torch.ones(3)


@pytest.mark.parametrize(("x", "times"), [(WRONG, 1), (GOOD, "a"), (GOOD, 0)])
def test_arguments_and_results_of_the_first_calls_are_checked(x, times):
    for _ in range(FIRST - 1):
        repeat(GOOD, 1)
    with pytest.raises(TypeCheckError):
        repeat(x, times)


def test_one_of_many_later_calls_is_checked_and_all_first_ones_of_the_next_test():
    for _ in range(FIRST):
        repeat(GOOD, 1)
    for _ in range(FIRST + 1, EVERY):
        repeat(WRONG, 1)
    with pytest.raises(TypeCheckError):
        repeat(WRONG, 1)
    calls.clear()  # as tests/conftest.py does
    with pytest.raises(TypeCheckError):
        repeat(WRONG, 1)


def test_fields_of_dataclasses_are_checked():
    assert _Name("a").text == "a"
    with pytest.raises(TypeCheckError):
        _Name(3)


def test_functions_of_longctx_are_checked():
    with pytest.raises(TypeCheckError, match=r"longctx\.attention\.partial\.sink"):
        sink(WRONG, None)
