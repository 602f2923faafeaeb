"""A server on ranks that are threads: limits, a tokenizer, and a function that runs it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.config import Context, Mesh, Sampling
from longctx.infer.continuous import ContinuousSession
from longctx.infer.engine import Engine
from longctx.infer.page_files import PageFiles
from longctx.serve.one_rank import ALL_RANKS, OneRank
from longctx.serve.ranks import follow
from longctx.serve.schedule import Limits
from longctx.serve.service import Service
from tests.infer.thread_ranks import run_engines, single_rank
from tests.tiny import tiny_tokenizer

LIMITS = Limits(prefill_tokens=11, sequences=3, cached_tokens=97)
PAGE, PAGES = 5, 13  # tokens of a page, and how many of them all ranks have room for, if each page is shared evenly
TOKENIZER = tiny_tokenizer()


def on_ranks(
    folder: Path,
    tmp_path: Path,
    mesh: Mesh,
    speak: Callable[[Service], object],
    pages: int = 0,
    saved: Path | None = None,
    one_rank: OneRank = ALL_RANKS,
) -> list[object]:
    """Run ``speak(service)`` on the first rank of ``mesh``, while the others follow; return the ranks' results.

    The result of the others is the sequences left, and the bytes of pages.  ``saved`` is a folder for pages.
    """

    def rank_main(engine: Engine) -> object:
        session = ContinuousSession(engine, Context(), Sampling())
        files = PageFiles(saved / f"rank{engine.rank}", pytest.fail) if saved else None
        if engine.context.rank:
            store = follow(session, engine.context, files, one_rank)
            return sorted(session.sequences), store.bytes
        page_bytes = pages * PAGE * engine.row_bytes // mesh.ring
        chunk = 23 if pages else LIMITS.prefill_tokens
        limits = replace(LIMITS, prefill_tokens=chunk, page_bytes=page_bytes, page_tokens=PAGE)
        service = Service(session, engine.context, TOKENIZER, limits, files, one_rank)
        found = speak(service)
        service.stop()
        return found

    with single_rank(tmp_path) as runtime:
        return run_engines(runtime, folder, mesh, rank_main)
