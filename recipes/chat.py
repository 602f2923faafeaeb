"""Hold a conversation whose keys and values stay sharded over ranks from turn to turn.

    python -m recipes.chat mesh.ring=2 turns=turns.jsonl out=turns.json

Without ``turns`` it reads them from the terminal or from piped input.  Prints each answer and the cost of the turn.
``session.save=DIR`` saves the conversation after every turn; ``session.load=DIR`` resumes it, on any mesh.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import PositiveInt

from longctx.config import Sampling
from longctx.cost.hardware import Hardware
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from longctx.parallel.launcher import current_rank, is_requeued
from recipes.common.cli import console, main, on_ranks, say, warm_up_ranks
from recipes.common.conversation import TurnFigures, show_turn, take_turn, typed_turns
from recipes.common.decode_choice import make_decode_chooser
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.lock import hold, lock_beside
from recipes.common.manifest import record, refuse_other_recipe
from recipes.common.places import refuse_unwritable, write_json
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.strategy_choice import make_strategy_chooser, read_constants
from recipes.common.target import Target, resolve_target, say_unapplied

if TYPE_CHECKING:
    from longctx.data.turns import UserTurn
    from longctx.infer.session_index import SessionIndex

RECIPE = "recipes.chat"


@dataclass(frozen=True)
class ChatSettings:
    """Top-level settings of configs/chat.yaml."""

    turns: str | None = None
    max_new_tokens: PositiveInt = 64
    hardware: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class SessionPaths:
    """Folders to save the session to after every turn, and to resume it from."""

    save: str | None = None
    load: str | None = None


@dataclass(frozen=True)
class ChatJob:
    """Inputs of every rank: plain values, checked before any rank starts.

    ``index`` describes the saved session to resume.  ``turns`` is None if a person types them.  ``fingerprint`` names
    the model, its dropped blocks and its rounded reductions; a session resumes only with the same three.  ``origin`` is
    the part of ``out`` that is known before the first turn.  `prepare` collects it, because the process of a local
    rank has another command line.
    """

    target: Target
    sampling: Sampling
    settings: ChatSettings
    session: SessionPaths
    index: SessionIndex | None
    turns: tuple[UserTurn, ...] | None
    hardware: Hardware | None
    fingerprint: str
    origin: Mapping[str, object]


def prepare(config: DictConfig) -> ChatJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    from longctx.infer.store import refuse_place

    target = resolve_target(
        config,
        RECIPE,
        unused_axes=("dp", "pp"),
        strategy_by_turn=True,
        decode_by_batch=True,
        proves_schedule=True,
        fp8=("block",),
    )
    settings, session = top_level(config, ChatSettings), section(config, "session", SessionPaths)
    refuse_unwritable(settings.out)
    refuse_other_recipe(settings.out, RECIPE)
    hardware = read_constants(settings.hardware, target.context.strategy)
    # Cached keys and values depend on the blocks that dropped their reduction, and on rounded reductions.
    plan = target.plan
    session_model = target.fingerprint + (f", spd {list(plan.dropped)} at tp={plan.tp}" if plan else "")
    session_model += f", reduce {target.reduce} at tp={target.mesh.tp}" if target.reduce else ""
    session_model += f", fp8={target.model.fp8}" if target.model.fp8 else ""
    index = resumed_index(session.load, session_model, target) if session.load else None
    if session.save:
        refuse_place(absolute(session.save))
        refuse_saved_conversation(session)
    sampling, turns = section(config, "sampling", Sampling), read_turns(settings)
    tokenizer = tokenizer_of(target.folder)
    target.shape.refuse_unknown_token(max(sampling.stop_tokens, default=0), "sampling.stop_tokens")
    for turn in turns or ():
        ids = tokenizer(turn.text)["input_ids"]
        target.shape.refuse_unknown_token(max(ids, default=0), turn.where or "a turn")
    say_unapplied(target.folder, sampling)
    origin = {"model": target.model.name, "mesh": vars(target.mesh), "context": vars(target.context), **provenance()}
    return ChatJob(target, sampling, settings, session, index, turns, hardware, session_model, origin)


def resumed_index(load: str, session_model: str, target: Target) -> SessionIndex:
    """Return the index of the session that ``session.load`` names.  Raises ValueError if it cannot be resumed."""
    from longctx.infer.session_index import read_index
    from longctx.infer.store import whole_session

    index = read_index(whole_session(absolute(load)), session_model, f"torch.{target.model.dtype}", target.shape)
    if list(index["tokens"]) != ["0"]:
        raise ValueError(
            f"session.load={load} has the sequences {', '.join(index['tokens']) or 'none'}, but a conversation is "
            "sequence 0 alone: give a folder that recipes.chat saved"
        )
    if "crc32" not in index:
        say(f"session.load={load} was saved by version 0.1: its index has no checksum and was not checked")
    return index


def refuse_saved_conversation(session: SessionPaths) -> None:
    """Raise ValueError if ``session.save`` has a conversation that this run neither resumes nor saved itself.

    A Slurm job that was requeued takes its turns again, and replaces what it saved before.
    """
    from longctx.infer.session_index import INDEX
    from longctx.infer.store import whole_session

    save, load = (absolute(folder) if folder else None for folder in (session.save, session.load))
    if save and save != load and (whole_session(save) / INDEX).exists() and not is_requeued():
        raise ValueError(
            f"session.save={session.save} has a conversation, which would be lost: give another folder, or, outside "
            f"of slurm.submit, set session.load={session.save} to go on with it"
        )


def absolute(folder: str) -> Path:
    """Return the absolute path of ``folder``, without symbolic links: a session is replaced where it lies."""
    return Path(folder).expanduser().resolve()


def read_turns(settings: ChatSettings) -> tuple[UserTurn, ...] | None:
    """Return the turns of the file ``settings.turns``, or of piped input, a turn a line; None if a person types them.

    Raises ValueError for a faulty file or input, and if there is neither a file, nor piped input, nor a terminal.
    Under a launcher, it raises ValueError without a file.
    """
    from longctx.data.turns import turns_from

    if settings.turns:
        return turns_from(settings.turns, settings.max_new_tokens)
    if current_rank():
        raise ValueError("under a launcher turns cannot be typed or piped in: give turns=FILE.jsonl")
    if sys.stdin.isatty():
        return None
    return piped_turns(sys.stdin.buffer.read(), settings.max_new_tokens)


def piped_turns(piped: bytes, max_new_tokens: int) -> tuple[UserTurn, ...]:
    """Return a turn for each line of ``piped`` that is not blank; a byte-order mark is not part of the text.

    Raises ValueError if there is none, and for a line that is not UTF-8.
    """
    from longctx.data.turns import UserTurn

    turns = []
    for number, line in enumerate(piped.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of the piped turns is not UTF-8 text (byte {error.start} of the line): convert it"
            ) from error
        turns += [UserTurn(text, max_new_tokens)] if text else []
    if not turns:
        raise ValueError("there are no turns and no terminal to type them in: give turns=FILE.jsonl")
    return tuple(turns)


def run_rank(rank: Rank, job: ChatJob) -> list[TurnFigures]:
    """Hold the conversation on one rank and return the figures of every turn; the caller uses the first rank's.

    After each turn, all ranks save the session if ``session.save`` is set, and the first rank writes ``out`` if it is
    set.  Then the first rank prints the turn's figures.  A refused turn has ``error`` in its figures, and no session is
    saved after it.
    """
    from longctx.infer.session import Session
    from longctx.infer.store import load, save, whole_session

    target, turn_figures = job.target, list[TurnFigures]()
    with target.runtime(rank) as runtime:
        # 1. Load the model, and the session to resume.
        with Progress(shown=rank.rank == 0) as progress:
            progress.start("loading", None)
            engine = target.load_engine(runtime)
            session = Session(
                engine,
                target.context,
                job.sampling,
                make_strategy_chooser(runtime, target, engine, job.hardware),
                choose_decode=make_decode_chooser(runtime, target, engine),
            )
            if job.session.load and job.index:
                load(session, whole_session(absolute(job.session.load)), job.index)
        # 2. Take the turns, one after another.
        turns = job.turns or typed_turns(runtime.world, job.settings.max_new_tokens, runtime.device)
        for number, turn in enumerate(turns, 1):
            turn_figures.append(take_turn(session, turn, tokenizer_of(target.folder), shown=rank.rank == 0))
            # 3. Save after each, because any may be the last one.  Print only then: the reader of stdout may have gone.
            # Print also if it cannot be saved, for example on a full disk.
            try:
                if job.session.save and "error" not in turn_figures[-1]:
                    save(session, absolute(job.session.save), job.fingerprint)
                if job.settings.out and rank.rank == 0:
                    write_json(job.settings.out, {**job.origin, "turns": turn_figures})
            finally:
                if rank.rank == 0:
                    show_turn(number, turn_figures[-1])
    return turn_figures


def task(config: DictConfig) -> None:
    """Check the configuration and run the ranks, which write ``out`` and the session after every turn.

    Exits with code 1 if a turn was refused.
    """
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.store", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    target = job.target
    refuse_other_threads(job.settings.hardware, target.run.threads, target.mesh)
    save = job.session.save and absolute(job.session.save)
    lock = hold(lock_beside(save), f"session.save={job.session.save}") if save else nullcontext()
    with record(config, RECIPE, [target.folder]), lock:
        if places := [place for place in (job.settings.out, job.session.save) if place]:
            say(f"saved after every turn: {' and '.join(places)}")
        turns = on_ranks(target.mesh, run_rank, job)
    if turns is None:
        return
    if refused := [number for number, turn in enumerate(turns, 1) if "error" in turn]:
        console.print(f"refused: turn {', '.join(map(str, refused))} of {len(turns)}")
        sys.exit(1)


if __name__ == "__main__":
    main("chat", task)
