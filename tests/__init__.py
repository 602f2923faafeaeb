"""Tests of longctx."""

from tests.signatures import check_some_calls

check_some_calls()
