"""Scripts of a session, and the rank functions that run them.

They are in a separate module so that ranks do not import the tests' dependencies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank


@dataclass(frozen=True)
class Say:
    """A turn of several sequences: their prompts, and how many tokens each decodes."""

    prompts: dict[int, list[int]]
    max_new_tokens: dict[int, int]


@dataclass(frozen=True)
class Decode:
    """Decode ``steps`` more tokens of ``sequences``, whose last tokens were decoded."""

    sequences: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Drop:
    """Remove a sequence."""

    sequence: int


@dataclass(frozen=True)
class Save:
    """Save the session to a folder."""

    folder: Path


Step = Say | Decode | Drop | Save


@dataclass(frozen=True)
class Segment:
    """Steps on one mesh, after a start or a restore."""

    mesh: Mesh
    context: Context
    steps: tuple[Step, ...]
    choose: Any = None  # the session's choice of a strategy; by default it is the context's


@dataclass(frozen=True)
class Record:
    """Results on one rank: tokens by step; by turn, (prefill, decode) bytes and the ring ranks' rows after it."""

    tokens: list[dict[int, list[int]]]
    bytes: list[tuple[int, int]]
    rows: list[list[int]]


def play(rank: Rank, folder: Path, segment: Segment, load_from: Path | None) -> Record:
    """Run ``segment`` on one rank, from the session saved in ``load_from`` if given."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session
    from longctx.infer.session_index import read_index
    from longctx.infer.store import load
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, segment.mesh, timeout_minutes=2) as runtime:
        model = ModelSource("test", str(folder))
        session = Session(load_engine(runtime, model, shape_of(folder), folder, "auto"), segment.context, Sampling())
        if load_from:
            load(session, load_from, read_index(load_from, "test", "torch.float32", session.engine.shape))
        return run_steps(session, segment.steps)


def run_steps(session: Any, steps: Sequence[Step]) -> Record:
    """Run ``steps`` in ``session`` on this rank."""
    from longctx.infer.store import save

    record = Record([], [], [])
    for step in steps:
        if isinstance(step, Drop):
            session.drop(step.sequence)
        elif isinstance(step, Save):
            save(session, step.folder, "test")
        elif isinstance(step, Decode):
            record.tokens.append(decode_step(session, step))
        else:
            turn = session.turn(step.prompts, step.max_new_tokens)
            record.tokens.append(turn.tokens)
            record.bytes.append((turn.prefill_bytes, turn.decode_bytes))
            record.rows.append(session.rows_per_rank)
    return record


def decode_step(session: Any, step: Decode) -> dict[int, list[int]]:
    """Run ``step`` and return the tokens that it adds to each sequence."""
    made: dict[int, list[int]] = {i: [] for i in step.sequences}
    for _ in range(step.steps):
        for i, token in session.decode(step.sequences).items():
            made[i].append(token)
    assert all(session.sequences[i].tokens[-step.steps :] == tokens for i, tokens in made.items())
    return made


def run_failing_turn(rank: Rank, folder: Path, mesh: Mesh, step: Say, fault: str) -> list[Any]:
    """Run ``step`` in two sessions, a failing turn in the first one, then ``step`` again in both.

    Returns the tokens of the second ``step`` by session, and the message of the failed turn.
    """
    import torch

    from longctx.infer import session as session_module
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import open_runtime

    with open_runtime(rank, mesh, timeout_minutes=2) as runtime:
        engine = load_engine(runtime, ModelSource("test", str(folder)), shape_of(folder), folder, "auto")
        failing, control = (session_module.Session(engine, Context(), Sampling()) for _ in range(2))
        for session in (failing, control):
            session.turn(step.prompts, step.max_new_tokens)

        def fail(*_: Any, **__: Any) -> int:
            raise ArithmeticError("a fault")

        message, weight = "", engine.model.decoder.layers[1].self_attention.linear_qkv.weight.data
        before = weight.clone()
        if fault == "not finite" and rank.rank == 0:  # one rank knows, all must refuse
            weight.fill_(torch.nan)
        if fault == "in the middle":
            session_module.run_replicated, original = fail, session_module.run_replicated
        try:
            failing.turn({0: [1] * (9999 if fault == "too long" else 5), 7: [2, 3]}, {0: 2, 7: 2})
        except (ValueError, ArithmeticError) as error:
            message = str(error)
        if fault == "in the middle":
            session_module.run_replicated = original
        weight.copy_(before)
        return [session.turn(step.prompts, step.max_new_tokens).tokens for session in (failing, control)] + [message]


def play_each(rank: Rank, jobs: list[tuple[Path, Segment, Path | None]]) -> list[Record]:
    """Run a segment of each model on one rank, one after the other."""
    return [play(rank, *job) for job in jobs]
