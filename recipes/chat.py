"""A conversation with a real model, whose keys and values stay sharded over ranks from turn to turn.

    python -m recipes.chat mesh.ring=2 turns=turns.jsonl out=turns.json

Without ``turns`` it asks for them.  Prints each answer and what the turn took; ``session.save=DIR`` keeps the
conversation, ``session.load=DIR`` goes on with it, on any mesh.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from longctx.attention.backends import kernel_for
from longctx.config import Context, Mesh, ModelSource, Sampling
from longctx.cost.attention import Work
from longctx.cost.choice import RULES, choose
from longctx.cost.hardware import Hardware
from longctx.data.turns import UserTurn, turn_tokens, turns_from
from longctx.hf.checkpoint import fingerprint, tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank, rank_from_environment
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.spd.plan import SPDPlan
from recipes.calibrate import hardware_from, measured, refuse_other_threads
from recipes.common.cli import (
    console,
    main,
    on_ranks,
    refuse_unwritable,
    say,
    section,
    threads_for,
    top_level,
    warm_up_ranks,
    written,
)
from recipes.common.manifest import record
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.spd_plan import plan_of


@dataclass(frozen=True)
class ChatSettings:
    """The settings of configs/chat.yaml that are not a section of their own."""

    turns: str | None
    max_new_tokens: NonNegativeInt
    hardware: str | None
    threads: PositiveInt | None
    device: Literal["cpu", "cuda"]
    timeout_minutes: PositiveInt
    out: str | None


@dataclass(frozen=True)
class SessionPaths:
    """Where a conversation comes from, and where it goes."""

    save: str | None
    load: str | None


@dataclass(frozen=True)
class ChatJob:
    """What every rank needs to know: plain values, checked before any rank starts."""

    model: ModelSource
    folder: Path
    shape: ModelShape
    mesh: Mesh
    context: Context
    sampling: Sampling
    settings: ChatSettings
    kept: SessionPaths
    index: dict[str, Any] | None
    turns: tuple[UserTurn, ...] | None
    hardware: Hardware | None
    fingerprint: str
    plan: SPDPlan | None = None


def prepare(config: DictConfig) -> ChatJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    from longctx.infer.store import read_index, refuse_place

    mesh = section(config, "mesh", Mesh)
    refuse_unused(mesh, "recipes.chat", ("dp", "pp"))
    context, sampling = section(config, "context", Context), section(config, "sampling", Sampling)
    model, kept = section(config, "model", ModelSource), section(config, "session", SessionPaths)
    settings = top_level(config, ChatSettings)
    kernel_for(context.kernel, settings.device, model.dtype)
    refuse_unwritable(settings.out)
    folder = locate(model, say)
    tensor_files(folder)  # refuses a folder without weights
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    plan = plan_of(config, mesh, model, folder, shape)
    hardware = hardware_from(settings.hardware) if settings.hardware else None
    if context.strategy == "empirical" and not (hardware and hardware.empirical):
        raise ValueError(
            "context.strategy=empirical needs a hardware file with fitted constants (recipes.bench crossover "
            "fitted=FILE.yaml): give hardware=FILE.yaml, or use context.strategy=auto"
        )
    # What is cached depends on what was dropped before.
    mark = fingerprint(folder) + (f", spd {list(plan.dropped)} at tp={plan.tp}" if plan else "")
    index = read_index(placed(kept.load), mark, f"torch.{model.dtype}") if kept.load else None
    if kept.save:
        refuse_place(placed(kept.save))
    return ChatJob(
        model=model,
        folder=folder,
        shape=shape,
        mesh=mesh,
        context=context,
        sampling=sampling,
        settings=settings,
        kept=kept,
        index=index,
        turns=given_turns(settings),
        hardware=hardware,
        plan=plan,
        fingerprint=mark,
    )


def placed(folder: str) -> Path:
    """The folder that is meant, whatever it is called."""
    return Path(folder).expanduser().absolute()


def given_turns(settings: ChatSettings) -> tuple[UserTurn, ...] | None:
    """The turns of the file, or of what is piped in, a line each; None where a person types them."""
    if settings.turns:
        return turns_from(settings.turns, settings.max_new_tokens)
    if rank_from_environment(os.environ):
        raise ValueError(
            "under a launcher nobody can be asked, and ranks would share what is piped in: give turns=FILE.jsonl"
        )
    if sys.stdin.isatty():
        return None
    lines = [line.strip() for line in sys.stdin]
    if not any(lines):
        raise ValueError("nobody is there to chat: give turns=FILE.jsonl, or run it in a terminal")
    return tuple(UserTurn(line, settings.max_new_tokens) for line in lines if line)


def typed_turns(world: Any, max_new_tokens: int, device: torch.device) -> Iterator[UserTurn]:
    """What the person at the first rank types, told to all ranks; until an empty line or the end of input."""
    while True:
        text = b""
        if world.rank == 0:
            # A rank's own standard input is closed; the terminal is still there.
            with Path("/dev/tty").open(encoding="utf-8") as terminal:
                console.print("[bold]you[/] ", end="")
                text = terminal.readline().strip().encode()
        mine = torch.tensor(list(text), dtype=torch.uint8, device=device)
        size = world.all_gather(torch.tensor([len(text)], device=device), [(1,)] * world.size)[0]
        if not size:
            return
        told = world.all_gather(mine, [(int(size),), *[(0,)] * (world.size - 1)])[0]
        yield UserTurn(bytes(told.tolist()).decode(), max_new_tokens)


def run_rank(rank: Rank, job: ChatJob) -> list[dict[str, Any]]:
    """One rank's part of the conversation; its figures of every turn: those of the first rank count."""
    from longctx.infer.engine import load_engine
    from longctx.infer.session import Session
    from longctx.infer.store import load, save
    from longctx.megatron.runtime import runtime

    threads = threads_for(job.settings.threads, rank)
    device, minutes = job.settings.device, job.settings.timeout_minutes
    done = []
    with runtime(rank, job.mesh, device=device, threads=threads, timeout_minutes=minutes) as here:
        with Progress(shown=rank.rank == 0) as progress:
            progress.start("loading", None)
            engine = load_engine(here, job.model, job.shape, job.folder, job.context.kernel, job.plan)
            choose = chooser(here, engine, job)
            session = Session(engine, job.context, job.sampling, choose, reserve=job.shape.max_positions)
            if job.kept.load and job.index:
                load(session, placed(job.kept.load), job.index)
        turns = job.turns or typed_turns(here.world, job.settings.max_new_tokens, here.device)
        for number, turn in enumerate(turns, 1):
            done.append(take(session, turn, tokenizer_of(job.folder), talking=rank.rank == 0))
            if rank.rank == 0:
                tell(number, done[-1])
        if job.kept.save:
            save(session, placed(job.kept.save), job.fingerprint)
    return done


def chooser(here: Any, engine: Any, job: ChatJob) -> Any:
    """What chooses each pass' strategy: the one asked for, or a rule over this machine's measured constants."""
    rule = job.context.strategy
    if rule not in RULES:
        return lambda *_: (rule, "as asked")
    on = job.hardware or measured(here, job.shape, job.context.kernel, job.model.dtype)
    share = job.mesh.tp * job.mesh.ulysses
    heads, kv_heads = job.shape.heads // share, max(1, job.shape.kv_heads // share)
    element = getattr(torch, job.model.dtype).itemsize

    def choose_for(new: Sequence[int], cached: Sequence[int], window: int | None) -> tuple[str, str]:
        work = Work(new, cached, engine.ring.size, heads, kv_heads, job.shape.head_dim, element, window)
        choice = choose(rule, work, on)
        layers = f" of window {window:,}" if window else ""
        return choice.strategy, f"{rule}{layers}: {choice.why}"

    return choose_for


def take(session: Any, turn: UserTurn, tokenizer: Any, *, talking: bool) -> dict[str, Any]:
    """One turn of the conversation, and its figures; a turn that is refused leaves it as it was, and says why."""
    from longctx.infer.generate import gather_figures

    before = session.sequences[0].tokens if session.sequences else []
    new = turn_tokens(turn.text, tokenizer, before=before, ends=session.engine.shape.end_tokens)
    pieces = TokenStream(tokenizer)
    try:
        with Progress(shown=talking) as progress:
            progress.start(f"prefill of {len(new):,} tokens, layers", session.engine.shape.layers)

            def heard(tokens: Mapping[int, int]) -> None:
                progress.stop()
                if talking:
                    pieces.add(tokens[0])

            made = session.turn(
                {0: new},
                {0: turn.max_new_tokens},
                layer_done=progress.step,
                token_done=heard,
            )
    except ValueError as error:
        return {"text": turn.text, "error": str(error), "token_ids": []}
    figures = gather_figures(session.engine, [made.prefill_bytes, made.decode_bytes, session.cache_bytes])
    prefill, decode, cache = map(list, zip(*figures, strict=True))
    return {
        "text": turn.text,
        "answer": tokenizer.decode(made.tokens[0], skip_special_tokens=True),
        "new": made.new,
        "cached": made.cached,
        "miss_rate": made.new / (made.new + made.cached),
        "strategy": made.strategy,
        "why": made.why,
        "ttft_s": made.ttft_s,
        "ttit_s": made.ttit_s,
        # Lists are of the context ranks; tensor-parallel ranks beside them have as many heads, and send as much.
        "bytes_sent": (sum(prefill) + sum(decode)) * session.engine.tp.size,
        "prefill_bytes_sent_per_rank": prefill,
        "decode_bytes_sent_per_rank": decode,
        "kv_cache_bytes_per_rank": cache,
        "token_ids": made.tokens[0],
    }


class TokenStream:
    """Prints an answer as it comes: whole characters only, a token may end in the middle of one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens, self._shown = tokenizer, list[int](), 0

    def add(self, token: int) -> None:
        """Print what ``token`` adds to the text."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)


def tell(number: int, took: dict[str, Any]) -> None:
    """The figures of a turn, in two lines."""
    if "error" in took:
        console.print(f"[bold red]turn {number} was refused[/]: {took['error']}")
        return
    print(flush=True)
    between = f", TTIT {took['ttit_s'] * 1e3:.0f} ms" if took["ttit_s"] else ""
    console.print(
        f"[dim]turn {number}: T {took['new']:,} new, P {took['cached']:,} cached (miss rate "
        f"{took['miss_rate']:.1%}), {took['strategy']} ({took['why']})\n"
        f"TTFT {took['ttft_s']:.2f} s{between}, sent {took['bytes_sent'] / 1e6:,.2f} MB[/]"
    )


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; write what the first one gives."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.store", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.settings.threads, job.mesh)
    record(config, [job.folder])
    turns = on_ranks(job.mesh, run_rank, job)
    if turns is None:
        return
    if job.settings.out:
        about = {"model": job.model.name, "mesh": vars(job.mesh), "context": vars(job.context)}
        written(job.settings.out, {**about, **provenance(), "turns": turns})
    if refused := [number for number, turn in enumerate(turns, 1) if "error" in turn]:
        console.print(f"refused: turn {', '.join(map(str, refused))} of {len(turns)}")
        sys.exit(1)


if __name__ == "__main__":
    main("chat", task)
