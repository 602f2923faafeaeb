"""NOTICE: at 16:43 the unit-test helper overwrote this file by mistake; its author must restore it.

It was uncommitted and no copy is on disk.  By its uses it held at least pytest_addoption("--new-tokens") and the
session fixture `smollm2` -> (ModelSource, Path).  Nothing of it has been guessed here.
"""
