"""Passes of a session are proved on every mesh to 8 ranks; a faulty strategy is found before its pass runs."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from longctx.config import Context, Mesh, Sampling
from longctx.infer.engine import Engine
from longctx.infer.session import Session
from longctx.megatron.runtime import Runtime
from longctx.parallel.ring import pass_kv
from longctx.parallel.schedule import ScheduleError
from longctx.parallel.strategy import STRATEGIES
from tests.infer.thread_ranks import run_engines, single_rank
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with single_rank(tmp_path_factory.mktemp("store")) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", max_positions=97, heads=6)


def test_every_pass_on_every_mesh_to_eight_ranks():
    """20 meshes x 3 strategies x 4 layouts, and 6 kinds of prefill and 2 of decoding; in under 20 seconds."""
    words = [sys.executable, "-m", "tests.infer.prove_meshes"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    proofs, seconds = done.stdout.split()
    assert int(proofs) == 20 * 12 + 20 * 8 + 8 * 2
    assert float(seconds) < 20


@pytest.mark.parametrize("decode", ["pass_q", "gather_merge", "sharded"])
def test_checked_session_gives_the_same_tokens(runtime, tiny, decode):
    def talk(context: Context, engine: Engine) -> list[int]:
        return Session(engine, context, Sampling()).turn({0: [5, 1, 7]}, {0: 2}).tokens[0]

    contexts = [Context(decode=decode, check_schedule=checks, chunk=2) for checks in (False, True)]
    plain, checked = (run_engines(runtime, tiny, Mesh(ring=2), partial(talk, context)) for context in contexts)
    assert checked == plain and len({tuple(tokens) for tokens in plain}) == 1


def test_faulty_strategy_is_found_before_its_pass(runtime, tiny, monkeypatch):
    """Without the check, the receiver of the missing row would fail in the middle of the pass, or hang."""

    def short_of_a_row(q, k, v, ring, kernel):
        skipped = int(ring.comm.rank == 1)
        return pass_kv(q, k[:, skipped:], v[:, skipped:], ring, kernel)

    monkeypatch.setitem(STRATEGIES, "pass_kv", short_of_a_row)

    def talk(engine: Engine) -> str:
        session = Session(engine, Context(check_schedule=True), Sampling())
        with pytest.raises(ScheduleError) as refused:
            session.turn({0: list(range(11))}, {0: 1})
        assert engine.ring.traffic.total == 0 and not session.sequences
        return str(refused.value)

    messages = run_engines(runtime, tiny, Mesh(ring=3), talk)
    assert len(set(messages)) == 1 and messages[0].startswith("mismatch: in exchange of ring (0, 1, 2), rank 1 sends")
