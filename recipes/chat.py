"""Hold a conversation whose keys and values stay sharded over ranks from turn to turn.

    python -m recipes.chat mesh.ring=2 turns=turns.jsonl out=turns.json

Without ``turns`` it reads them from the terminal or from piped input.  Prints each answer and the cost of the turn.
``session.save=DIR`` saves the conversation; ``session.load=DIR`` resumes it, on any mesh.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from longctx.config import Sampling
from longctx.cost.attention import Work
from longctx.cost.choice import RULES, choose
from longctx.cost.hardware import Hardware
from longctx.data.turns import UserTurn, turn_tokens, turns_from
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank, current_rank
from recipes.calibrate import measure_ring
from recipes.common.cli import console, main, on_ranks, print_error, refuse_unwritable, warm_up_ranks, write_result
from recipes.common.hardware_file import read_hardware, refuse_other_threads
from recipes.common.manifest import record
from recipes.common.progress import Progress, TokenStream
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longctx.infer.engine import Engine
    from longctx.infer.session import Chooser, Session
    from longctx.infer.store import SessionIndex
    from longctx.megatron.runtime import Runtime
    from longctx.parallel.comm import Comm


@dataclass(frozen=True)
class ChatSettings:
    """Settings of configs/chat.yaml outside any section."""

    turns: str | None = None
    max_new_tokens: PositiveInt = 64
    hardware: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class SessionPaths:
    """Folders to save the session to after the last turn, and to resume it from."""

    save: str | None = None
    load: str | None = None


@dataclass(frozen=True)
class ChatJob:
    """Inputs of every rank: plain values, checked before any rank starts.

    ``index`` describes the saved session to resume.  ``turns`` is None if a person types them.  ``fingerprint`` ties a
    session to the model and its dropped blocks.
    """

    target: Target
    sampling: Sampling
    settings: ChatSettings
    session: SessionPaths
    index: SessionIndex | None
    turns: tuple[UserTurn, ...] | None
    hardware: Hardware | None
    fingerprint: str


class TurnFigures(TypedDict, total=False):
    """Figures of a turn, as written to ``out``; a refused turn has its ``text``, the ``error`` and no tokens.

    ``new`` and ``cached`` count tokens, ``miss_rate`` is new / (new + cached).  ``ttit_s`` is None without a decode
    step.  Lists are over the context ranks, in bytes; ``bytes_sent`` is the sum over all ranks.
    """

    text: str
    error: str
    answer: str
    new: int
    cached: int
    miss_rate: float
    strategy: str
    why: str
    ttft_s: float
    ttit_s: float | None
    bytes_sent: int
    prefill_bytes_sent_per_rank: list[int]
    decode_bytes_sent_per_rank: list[int]
    kv_cache_bytes_per_rank: list[int]
    token_ids: list[int]


def prepare(config: DictConfig) -> ChatJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    from longctx.infer.store import read_index, refuse_place

    target = resolve_target(config, "recipes.chat", unused_axes=("dp", "pp"), strategy_by_turn=True)
    settings, session = top_level(config, ChatSettings), section(config, "session", SessionPaths)
    refuse_unwritable(settings.out)
    hardware = read_hardware(settings.hardware) if settings.hardware else None
    if target.context.strategy == "empirical" and not (hardware and hardware.empirical):
        raise ValueError(
            "context.strategy=empirical needs a hardware file with fitted constants (recipes.bench crossover "
            "fitted=FILE.yaml): give hardware=FILE.yaml, or use context.strategy=auto"
        )
    # Cached keys and values depend on the blocks that dropped their reduction.
    plan = target.plan
    session_model = target.fingerprint + (f", spd {list(plan.dropped)} at tp={plan.tp}" if plan else "")
    index = read_index(absolute(session.load), session_model, f"torch.{target.model.dtype}") if session.load else None
    if session.save:
        refuse_place(absolute(session.save))
    sampling = section(config, "sampling", Sampling)
    return ChatJob(target, sampling, settings, session, index, read_turns(settings), hardware, session_model)


def absolute(folder: str) -> Path:
    """Return the absolute path of ``folder``."""
    return Path(folder).expanduser().absolute()


def read_turns(settings: ChatSettings) -> tuple[UserTurn, ...] | None:
    """Return the turns of the file, or of piped input, one per line; None if a person types them.

    Raises ValueError if there is neither a file, nor piped input, nor a terminal.
    """
    if settings.turns:
        return turns_from(settings.turns, settings.max_new_tokens)
    if current_rank():
        raise ValueError("under a launcher turns cannot be typed or piped in: give turns=FILE.jsonl")
    if sys.stdin.isatty():
        return None
    lines = [line.strip() for line in sys.stdin]
    if not any(lines):
        raise ValueError("there are no turns and no terminal to type them in: give turns=FILE.jsonl")
    return tuple(UserTurn(line, settings.max_new_tokens) for line in lines if line)


def typed_turns(world: Comm, max_new_tokens: int, device: torch.device) -> Iterator[UserTurn]:
    """Yield on every rank the turns typed at the first rank, until an empty line or the end of input."""
    while True:
        text = b""
        if world.rank == 0:
            # A rank's own standard input is closed; the terminal is still available.
            with Path("/dev/tty").open(encoding="utf-8") as terminal:
                console.print("you ", style="bold", end="")
                text = terminal.readline().strip().encode()
        own_bytes = torch.tensor(list(text), dtype=torch.uint8, device=device)
        size = world.all_gather(torch.tensor([len(text)], device=device), [(1,)] * world.size)[0]
        if not size:
            return
        typed = world.all_gather(own_bytes, [(int(size),), *[(0,)] * (world.size - 1)])[0]
        yield UserTurn(bytes(typed.tolist()).decode(), max_new_tokens)


def run_rank(rank: Rank, job: ChatJob) -> list[TurnFigures]:
    """Hold the conversation on one rank and return the figures of every turn.

    The caller uses those of the first rank.
    """
    from longctx.infer.session import Session
    from longctx.infer.store import load, save

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
                make_chooser(runtime, engine, job),
                reserve=target.shape.max_positions,
            )
            if job.session.load and job.index:
                load(session, absolute(job.session.load), job.index)
        # 2. Take the turns, one after another.
        turns = job.turns or typed_turns(runtime.world, job.settings.max_new_tokens, runtime.device)
        for number, turn in enumerate(turns, 1):
            turn_figures.append(take_turn(session, turn, tokenizer_of(target.folder), shown=rank.rank == 0))
            if rank.rank == 0:
                show_turn(number, turn_figures[-1])
        # 3. Save the session.
        if job.session.save:
            save(session, absolute(job.session.save), job.fingerprint)
    return turn_figures


def make_chooser(runtime: Runtime, engine: Engine, job: ChatJob) -> Chooser:
    """Return a function that chooses the strategy of each pass: a fixed one, or a rule over measured constants."""
    target = job.target
    rule = target.context.strategy
    if rule not in RULES:
        return lambda *_: (rule, "as asked")
    hardware = job.hardware or measure_ring(runtime, target)
    share = target.mesh.tp * target.mesh.ulysses
    heads, kv_heads = target.shape.heads // share, max(1, target.shape.kv_heads // share)
    element_bytes = getattr(torch, target.model.dtype).itemsize

    def choose_for(new: Sequence[int], cached: Sequence[int], window: int | None) -> tuple[str, str]:
        work = Work(new, cached, engine.ring.size, heads, kv_heads, target.shape.head_dim, element_bytes, window)
        choice = choose(rule, work, hardware)
        layers = f" of window {window:,}" if window else ""
        return choice.strategy, f"{rule}{layers}: {choice.why}"

    return choose_for


def take_turn(session: Session, turn: UserTurn, tokenizer: PreTrainedTokenizerBase, *, shown: bool) -> TurnFigures:
    """Take one turn and return its figures; a refused turn leaves the session unchanged and states why."""
    from longctx.infer.generate import gather_figures

    before = session.sequences[0].tokens if session.sequences else []
    new = turn_tokens(turn.text, tokenizer, before=before, ends=session.engine.shape.end_tokens)
    stream = TokenStream(tokenizer)
    try:
        with Progress(shown=shown) as progress:
            progress.start(f"prefill of {len(new):,} tokens, layers", session.engine.shape.layers)

            def print_token(tokens: Mapping[int, int]) -> None:
                progress.stop()
                if shown:
                    stream.add(tokens[0])

            result = session.turn({0: new}, {0: turn.max_new_tokens}, layer_done=progress.step, token_done=print_token)
    except ValueError as error:
        return {"text": turn.text, "error": str(error), "token_ids": []}
    figures = gather_figures(session.engine, [result.prefill_bytes, result.decode_bytes, session.cache_bytes])
    prefill, decode, cache = map(list, zip(*figures, strict=True))
    return {
        "text": turn.text,
        "answer": tokenizer.decode(result.tokens[0], skip_special_tokens=True),
        "new": result.new,
        "cached": result.cached,
        "miss_rate": result.new / (result.new + result.cached),
        "strategy": result.strategy,
        "why": result.why,
        "ttft_s": result.ttft_s,
        "ttit_s": result.ttit_s,
        # All tensor-parallel ranks of a context rank have as many heads and send as many bytes.
        "bytes_sent": (sum(prefill) + sum(decode)) * session.engine.tp.size,
        "prefill_bytes_sent_per_rank": prefill,
        "decode_bytes_sent_per_rank": decode,
        "kv_cache_bytes_per_rank": cache,
        "token_ids": result.tokens[0],
    }


def show_turn(number: int, figures: TurnFigures) -> None:
    """Print the figures of a turn in two lines, or the reason why it was refused."""
    if "error" in figures:
        print_error(figures["error"], f"turn {number} was refused")
        return
    print(flush=True)
    ttit = f", TTIT {figures['ttit_s'] * 1e3:.0f} ms" if figures["ttit_s"] else ""
    console.print(
        f"turn {number}: T {figures['new']:,} new, P {figures['cached']:,} cached (miss rate "
        f"{figures['miss_rate']:.1%}), {figures['strategy']} ({figures['why']})\n"
        f"TTFT {figures['ttft_s']:.2f} s{ttit}, sent {figures['bytes_sent'] / 1e6:,.2f} MB",
        style="dim",
    )


def task(config: DictConfig) -> None:
    """Check the configuration, run the ranks, then write the first rank's figures."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.store", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    target = job.target
    refuse_other_threads(job.settings.hardware, target.run.threads, target.mesh)
    record(config, [target.folder])
    turns = on_ranks(target.mesh, run_rank, job)
    if turns is None:
        return
    if job.settings.out:
        metadata = {"model": target.model.name, "mesh": vars(target.mesh), "context": vars(target.context)}
        write_result(job.settings.out, {**metadata, **provenance(), "turns": turns})
    if refused := [number for number, turn in enumerate(turns, 1) if "error" in turn]:
        console.print(f"refused: turn {', '.join(map(str, refused))} of {len(turns)}")
        sys.exit(1)


if __name__ == "__main__":
    main("chat", task)
