"""Traces of a session, and the ranks that play them; apart from the tests, so that a rank imports little."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.hf.config import shape_of
from longctx.parallel.launch import Rank


@dataclass(frozen=True)
class Say:
    """A turn of some sequences together: their prompts, and how many tokens each decodes."""

    prompts: dict[int, list[int]]
    max_new_tokens: dict[int, int]


@dataclass(frozen=True)
class Decode:
    """Go on with the answers of some sequences, by so many tokens: those whose last token was decoded."""

    sequences: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Drop:
    """Forget a sequence."""

    sequence: int


@dataclass(frozen=True)
class Save:
    """Write the session to a folder."""

    folder: Path


Step = Say | Decode | Drop | Save


@dataclass(frozen=True)
class Segment:
    """What happens on one mesh, from a start or a restore on."""

    mesh: Mesh
    context: Context
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Seen:
    """What a rank saw: tokens by step; of turns bytes (prefill, decode), and the rows held by each ring rank after."""

    tokens: list[dict[int, list[int]]]
    bytes: list[tuple[int, int]]
    held: list[list[int]]


def play(rank: Rank, folder: Path, segment: Segment, load_from: Path | None) -> Seen:
    """A rank's part of ``segment``."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session
    from longctx.infer.store import load, read_index, save
    from longctx.megatron.runtime import runtime

    seen = Seen([], [], [])
    with runtime(rank, segment.mesh, timeout_minutes=2) as here:
        model = ModelSource("test", str(folder))
        session = Session(load_engine(here, model, shape_of(folder), folder, "auto"), segment.context, Sampling())
        if load_from:
            load(session, load_from, read_index(load_from, "test", "torch.float32"))
        for step in segment.steps:
            if isinstance(step, Drop):
                session.drop(step.sequence)
            elif isinstance(step, Save):
                save(session, step.folder, "test")
            elif isinstance(step, Decode):
                seen.tokens.append(decoded(session, step))
            else:
                made = session.turn(step.prompts, step.max_new_tokens)
                seen.tokens.append(made.tokens)
                seen.bytes.append((made.prefill_bytes, made.decode_bytes))
                seen.held.append(session.rows_per_rank)
    return seen


def decoded(session: Any, step: Decode) -> dict[int, list[int]]:
    """The tokens that ``step`` adds."""
    made: dict[int, list[int]] = {i: [] for i in step.sequences}
    for _ in range(step.steps):
        for i, token in session.decode(step.sequences).items():
            made[i].append(token)
    assert all(session.sequences[i].tokens[-step.steps :] == tokens for i, tokens in made.items())
    return made


def fails_once(rank: Rank, folder: Path, mesh: Mesh, step: Say, fault: str) -> list[Any]:
    """``step``, a turn that fails, ``step`` again: tokens before and after, and what the failed one raised."""
    from longctx.infer import session as loop
    from longctx.infer.engine import load_engine
    from longctx.megatron.runtime import runtime

    with runtime(rank, mesh, timeout_minutes=2) as here:
        engine = load_engine(here, ModelSource("test", str(folder)), shape_of(folder), folder, "auto")
        one, other = (loop.Session(engine, Context(), Sampling()) for _ in range(2))
        for session in (one, other):
            session.turn(step.prompts, step.max_new_tokens)

        def broken(*_: Any) -> int:
            raise ArithmeticError("a fault")

        said = ""
        if fault == "in the middle":
            loop.run_replicated, kept = lambda *_: broken(), loop.run_replicated
        try:
            one.turn({0: [1] * (9999 if fault == "too long" else 5), 7: [2, 3]}, {0: 2, 7: 2})
        except (ValueError, ArithmeticError) as error:
            said = str(error)
        if fault == "in the middle":
            loop.run_replicated = kept
        return [session.turn(step.prompts, step.max_new_tokens).tokens for session in (one, other)] + [said]
