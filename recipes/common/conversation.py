"""Turns of a conversation: read from a terminal, run on the ranks, and shown."""

from __future__ import annotations

import select
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypedDict

from recipes.common.cli import console, print_error
from recipes.common.progress import Progress, TokenStream, layers_to_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from longctx.data.turns import UserTurn
    from longctx.infer.session import Session
    from longctx.infer.turn import Turn
    from longctx.parallel.comm import Comm

_WAIT_S = 2.0  # far below any run.timeout_minutes
_TERMINAL = Path("/dev/tty")


class TurnFigures(TypedDict, total=False):
    """Figures of a turn, as written to ``out``; a turn that failed has its ``text``, the ``error`` and no tokens.

    ``new`` and ``cached`` count tokens, ``miss_rate`` is new / (new + cached).  ``ttit_s`` is None without a decode
    step.  The lists ``..._per_rank`` have the bytes of each context rank; ``bytes_sent`` is the sum over all ranks.
    ``decode_why`` is the reason for the choice of ``context.decode=auto``, and empty for other values.  If
    ``sampling.logprobs`` is set, ``logprobs`` has the fields of a `TokenLogprob` for each of the answer's tokens.
    """

    text: str
    error: str
    answer: str
    new: int
    cached: int
    miss_rate: float
    strategy: str
    why: str
    decode_strategy: str
    decode_why: str
    ttft_s: float
    ttit_s: float | None
    bytes_sent: int
    prefill_bytes_sent_per_rank: list[int]
    decode_bytes_sent_per_rank: list[int]
    kv_cache_bytes_per_rank: list[int]
    token_ids: list[int]
    logprobs: list[dict[str, object]]


def typed_turns(world: Comm, max_new_tokens: int, device: torch.device) -> Iterator[UserTurn]:
    """Yield on every rank the turns typed at the first rank's terminal, until an empty line or the end of input.

    Every rank must iterate.  Each turn gets ``max_new_tokens``.
    """
    import torch

    from longctx.data.turns import UserTurn

    while True:
        if world.rank == 0:
            console.print("you ", style="bold", end="")
        # A rank's own standard input is closed; the terminal is still available.
        with _TERMINAL.open(encoding="utf-8", errors="replace") if world.rank == 0 else nullcontext() as terminal:
            text, size = b"", -1
            while size < 0:  # a message to all ranks after each wait: no rank reaches its time limit
                typed = _typed_line(terminal) if terminal else b""
                text = typed or b""
                length = torch.tensor([-1 if typed is None else len(text)], device=device)
                size = int(world.all_gather(length, [(1,)] * world.size)[0])
        if not size:
            return
        own_bytes = torch.tensor(list(text), dtype=torch.uint8, device=device)
        shared = world.all_gather(own_bytes, [(size,), *[(0,)] * (world.size - 1)])[0]
        yield UserTurn(bytes(shared.tolist()).decode(), max_new_tokens)


def _typed_line(terminal: TextIO) -> bytes | None:
    """Return the line typed at ``terminal``, empty at the end of input, or None if there is none within seconds."""
    if not select.select([terminal], [], [], _WAIT_S)[0]:
        return None
    return terminal.readline().strip().encode()


def take_turn(session: Session, turn: UserTurn, tokenizer: PreTrainedTokenizerBase, *, shown: bool) -> TurnFigures:
    """Run one turn and return its figures; with ``shown``, this rank prints progress and the answer.

    A turn that fails leaves the session unchanged, and its figures have the ``error``.  An error of the computation is
    raised instead if there are several ranks, because the other ranks wait for the one that failed.
    """
    from longctx.data.turns import turn_tokens
    from longctx.infer.answer import make_stop_check

    engine, before = session.engine, session.sequences[0].tokens if session.sequences else []
    stop = session.sampling.stop
    stream, computes = TokenStream(tokenizer, stop), False
    try:
        # 1. Tokenize and check: every rank raises the same errors.
        ends, stops = engine.shape.end_tokens, session.sampling.stop_tokens
        new = turn_tokens(turn.text, tokenizer, before=before, ends=ends, stops=stops)
        session.refuse({0: new}, {0: turn.max_new_tokens})
        # 2. Compute.
        computes = True
        with Progress(shown=shown) as progress:
            tokens = len(new) + (len(before) - session.sequences[0].cached if before else 0)
            layers = layers_to_run(engine.shape.layers, tokens, session.context.chunk)
            progress.start(f"prefill of {tokens:,} tokens, layers", layers)

            def print_token(latest: Mapping[int, int]) -> None:
                progress.stop()
                if shown:
                    stream.add(latest[0])

            result = session.turn(
                {0: new},
                {0: turn.max_new_tokens},
                layer_done=progress.step,
                token_done=print_token,
                stopped=make_stop_check(tokenizer, stop),
            )
            if shown:
                stream.end()
    except Exception as error:
        if computes and engine.ranks * engine.tp.size > 1:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return {"text": turn.text, "error": f"{kind}{' '.join(str(error).split())}", "token_ids": []}
    return _figures_of(session, turn, result, tokenizer)


def _figures_of(session: Session, turn: UserTurn, result: Turn, tokenizer: PreTrainedTokenizerBase) -> TurnFigures:
    """Return the figures of ``turn``, which gave ``result``; every rank calls this."""
    from longctx.infer.answer import cut_at_stop
    from longctx.infer.generate import gather_figures

    engine, stop = session.engine, session.sampling.stop
    figures = gather_figures(engine, [result.prefill_bytes, result.decode_bytes, session.cache_bytes])
    prefill, decode, cache = map(list, zip(*figures, strict=True))
    return {
        "text": turn.text,
        "answer": cut_at_stop(tokenizer.decode(result.tokens[0], skip_special_tokens=True), stop),
        "new": result.new,
        "cached": result.cached,
        "miss_rate": result.new / (result.new + result.cached),
        "strategy": result.strategy,
        "why": result.why,
        "decode_strategy": session.decode_strategy(1),
        "decode_why": session.decode_choices.get(1, ("", ""))[1],
        "ttft_s": result.ttft_s,
        "ttit_s": result.ttit_s,
        # A context rank's tensor-parallel ranks have equal numbers of heads and send equally many bytes.
        "bytes_sent": (sum(prefill) + sum(decode)) * engine.tp.size,
        "prefill_bytes_sent_per_rank": prefill,
        "decode_bytes_sent_per_rank": decode,
        "kv_cache_bytes_per_rank": cache,
        "token_ids": result.tokens[0],
        **(
            {"logprobs": list(map(vars, session.sequences[0].logprobs))}
            if session.sampling.logprobs is not None
            else {}
        ),
    }


def show_turn(number: int, figures: TurnFigures) -> None:
    """Print the ``figures`` of turn ``number`` in two lines, or the reason why the turn failed."""
    if "error" in figures:
        print_error(figures["error"], f"turn {number} was refused")
        return
    print(flush=True)
    ttit = f", TTIT {figures['ttit_s'] * 1e3:.0f} ms" if figures["ttit_s"] else ""
    console.print(
        f"turn {number}: T {figures['new']:,} new, P {figures['cached']:,} cached (miss rate "
        f"{figures['miss_rate']:.1%}), {figures['strategy']} ({figures['why']}), decode {figures['decode_strategy']}\n"
        f"TTFT {figures['ttft_s']:.2f} s{ttit}, sent {figures['bytes_sent'] / 1e6:,.2f} MB between context ranks",
        style="dim",
    )
