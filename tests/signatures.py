"""Checks of longctx's signatures while tests run: jaxtyping checks some of each function's calls, not all.

A check takes 20 us, which is longer than many of the functions, and some tests make a million calls.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

FIRST = 20  # calls of each function in a test that are checked
EVERY = 41  # then one of so many calls is
calls: Counter[Callable[..., Any]] = Counter()  # calls in this test by function
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped


def check_some_calls() -> None:
    """Let jaxtyping's import hook decorate functions with `jaxtyped`; call it before longctx is imported."""
    vars(jaxtyping)["jaxtyped"] = jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """Decorate a function, or a dataclass's ``__init__``, as jaxtyping does, but check only some of its calls."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not inspect.isclass(function):
        return _some_calls(function, _jaxtyped(function, typechecker=typechecker))
    unchecked = function.__init__
    _jaxtyped(function, typechecker=typechecker)
    if function.__init__ is not unchecked:
        function.__init__ = _some_calls(unchecked, function.__init__)
    return function


def _some_calls(function: Any, checked: Any) -> Any:
    """Return ``function`` with some of its calls made by ``checked``; a property or class method as ``checked``."""
    if not inspect.isfunction(function):
        return checked

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        calls[function] = number = calls[function] + 1
        return (checked if number <= FIRST or number % EVERY == 0 else function)(*args, **kwargs)

    return call
