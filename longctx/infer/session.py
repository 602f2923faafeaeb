"""A conversation whose keys and values stay sharded over ranks between turns; of any number of sequences."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from longctx.attention.layout import LAYOUTS, Layout, contiguous, shard_balanced
from longctx.config import Context, Sampling
from longctx.infer.cache import BatchCache, KVCache
from longctx.infer.engine import Engine
from longctx.infer.prefill import LayerDone, run_pass, run_replicated
from longctx.infer.sample import choose_token
from longctx.megatron.model import logits
from longctx.parallel.comm import doing
from longctx.parallel.strategy import STRATEGIES
from longctx.shapes import Tensor

# (new tokens, cached tokens) of each sequence, the layers' window -> (name of the strategy, why it was chosen)
Chooser = Callable[[Sequence[int], Sequence[int], int | None], tuple[str, str]]
Chunk = dict[int, list[int]]  # the tokens that sequences get in one pass


@dataclass
class Conversation:
    """One sequence: all its tokens, and its cache, which may lack the last one that was decoded."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        return self.cache.layout.total


@dataclass
class Turn:
    """What a turn gave, by sequence, and what it took.

    ``new`` and ``cached`` count its T and P tokens; ``passes`` are the hidden states of this rank's rows of the
    prefill, with their layouts, where they were to be kept.  ``ttft_s`` runs from the start of the turn to its first
    tokens, ``decode_s`` from there to the last, in ``steps`` steps.  Bytes are those that this rank sent to others for
    attention.
    """

    tokens: dict[int, list[int]]
    new: int
    cached: int
    strategy: str = ""
    why: str = ""
    ttft_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    passes: list[tuple[Tensor, Layout]] = field(default_factory=list)

    @property
    def ttit_s(self) -> float | None:
        """Seconds from one token to the next; None where there was only one."""
        return self.decode_s / self.steps if self.steps else None


class Session:
    """Sequences by number, all ranks of ``engine`` holding their share of each one's keys and values.

    Each turn's new tokens are sharded on their own, whatever the cached ones look like (arXiv 2411.01783, 3.5.1);
    ``reserve`` tokens of room are made at once for a sequence.  Every rank must make the same calls.
    """

    def __init__(
        self, engine: Engine, context: Context, sampling: Sampling, choose: Chooser | None = None, reserve: int = 0
    ) -> None:
        self.engine, self.context, self.sampling = engine, context, sampling
        self.sequences: dict[int, Conversation] = {}
        self._choose = choose or (lambda *_: (context.strategy, "as asked"))
        self._reserve = reserve

    @property
    def rows_per_rank(self) -> list[int]:
        """Rows of all sequences that each ring rank caches."""
        caches = [one.cache.layout for one in self.sequences.values()]
        return [sum(layout.rows(rank) for layout in caches) for rank in range(self.engine.ring.size)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank holds."""
        return sum(one.cache.bytes for one in self.sequences.values())

    def turn(
        self,
        prompts: Mapping[int, Sequence[int]],
        max_new_tokens: Mapping[int, int],
        *,
        layer_done: LayerDone = lambda: None,
        token_done: Callable[[Mapping[int, int]], None] = lambda _: None,
        keep_states: bool = False,
    ) -> Turn:
        """Add ``prompts`` to their sequences (new ones begin), in one fused prefill, and decode them together.

        A sequence ends at its ``max_new_tokens``, or behind an end token.  If the turn fails, the session is as
        it was before.  Raises ValueError for an empty prompt, a negative number, or more than the model's context.
        """
        self._refuse(prompts, max_new_tokens)
        before = {i: (one.cache.layout, list(one.tokens)) for i, one in self.sequences.items()}
        try:
            barrier(self.engine)
            return self._turn(prompts, max_new_tokens, layer_done, token_done, keep_states)
        except BaseException:
            self._restore(before)
            raise

    def cache_for(self, tokens: int, decoded: int) -> KVCache:
        """An empty cache for so many ``tokens``, and for what is then decoded, all of which one rank may get."""
        return self.engine.cache(max(self._reserve, tokens), decoded)

    def drop(self, sequence: int) -> None:
        """Forget ``sequence`` and free what it cached.  Raises ValueError if there is none."""
        if sequence not in self.sequences:
            raise ValueError(f"there is no sequence {sequence}: the session has {sorted(self.sequences) or 'none'}")
        del self.sequences[sequence]

    def _refuse(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: Mapping[int, int]) -> None:
        if not prompts:
            raise ValueError("a turn needs a prompt: give at least one sequence some tokens")
        most = self.engine.shape.max_positions
        for i, prompt in prompts.items():
            there = len(self.sequences[i].tokens) if i in self.sequences else 0
            if not prompt:
                raise ValueError(f"the prompt of sequence {i} is empty: give it some tokens")
            if max_new_tokens[i] < 0:
                raise ValueError(f"max_new_tokens={max_new_tokens[i]} of sequence {i}: use 0 or more")
            if (total := there + len(prompt) + max_new_tokens[i]) > most:
                raise ValueError(
                    f"sequence {i} would have {total:,} tokens ({there:,} so far, {len(prompt):,} new, "
                    f"max_new_tokens={max_new_tokens[i]}), the model's context is {most:,}: "
                    "ask for less, or begin a new session"
                )

    def _restore(self, before: Mapping[int, tuple[Layout, list[int]]]) -> None:
        for i in list(self.sequences):
            if i not in before:
                del self.sequences[i]
                continue
            layout, tokens = before[i]
            self.sequences[i].cache.rewind(layout)
            self.sequences[i].tokens = tokens

    def _turn(
        self,
        prompts: Mapping[int, Sequence[int]],
        max_new_tokens: Mapping[int, int],
        layer_done: LayerDone,
        token_done: Callable[[Mapping[int, int]], None],
        keep_states: bool,
    ) -> Turn:
        sent, began = self.engine.sent, time.perf_counter()
        for i in prompts:
            if i not in self.sequences:
                self.sequences[i] = Conversation(self.cache_for(len(prompts[i]), max_new_tokens[i]))
        with doing("prefill"):
            turn, latest = self._prefill(prompts, layer_done, keep_states)
        turn.ttft_s, turn.prefill_bytes = time.perf_counter() - began, self.engine.sent - sent
        going = {i: token for i, token in latest.items() if max_new_tokens[i]}
        while going:
            for i, token in going.items():
                turn.tokens[i].append(token)
                self.sequences[i].tokens.append(token)
            token_done(going)
            ends = self.engine.shape.end_tokens
            going = {i: t for i, t in going.items() if t not in ends and len(turn.tokens[i]) < max_new_tokens[i]}
            if going:
                turn.steps += 1
                with doing(f"decode, step {turn.steps}"):
                    going = self.decode(going)
        turn.decode_s = time.perf_counter() - began - turn.ttft_s
        turn.decode_bytes = self.engine.sent - sent - turn.prefill_bytes
        return turn

    def _prefill(
        self, prompts: Mapping[int, Sequence[int]], done: LayerDone, keep_states: bool
    ) -> tuple[Turn, dict[int, int]]:
        """The turn so far, and the token that follows each prompt."""
        for i, prompt in prompts.items():
            self.sequences[i].tokens += prompt
        new = {i: self.sequences[i].tokens[self.sequences[i].cached :] for i in prompts}
        turn = Turn({i: [] for i in prompts}, _total(new), sum(self.sequences[i].cached for i in prompts))
        reasons: dict[str, str] = {}
        following: dict[int, int] = {}
        for chunk in _chunks(new, self.context.chunk):
            lengths = [len(tokens) for tokens in chunk.values()]
            cached, strategies = [self.sequences[i].cached for i in chunk], {}
            for window in sorted(set(self.engine.shape.windows), key=lambda w: w or 0):
                strategy, why = self._choose(lengths, cached, window)
                strategies[window] = STRATEGIES[strategy]
                reasons.setdefault(strategy, why)
            layout = shard_balanced(lengths, LAYOUTS[self.context.layout], self.rows_per_rank).split(
                self.engine.ulysses.size
            )
            hidden = run_pass(self.engine, _packed(chunk), layout, self._batch(chunk), strategies, done)
            if keep_states:
                turn.passes.append((hidden, layout))
            following |= self._following(hidden, layout, chunk)
        turn.strategy, turn.why = " and ".join(reasons), "; ".join(reasons.values())
        return turn, following

    def decode(self, latest: Mapping[int, int]) -> dict[int, int]:
        """The token that follows ``latest``, the last of each sequence's tokens: one step of all together (Alg. 4)."""
        chunk = {i: [token] for i, token in latest.items()}
        ring = shard_balanced([1] * len(chunk), contiguous, self.rows_per_rank)
        if self.context.decode == "gather_merge":
            hidden = run_replicated(self.engine, _packed(chunk), ring, self._batch(chunk))
            layout = ring.on_one_rank().place_on(0, self.engine.ranks)  # all have the rows, the first one speaks
        else:
            layout = ring.split(self.engine.ulysses.size)
            strategies = self.engine.everywhere(STRATEGIES[self.context.decode])
            hidden = run_pass(self.engine, _packed(chunk), layout, self._batch(chunk), strategies)
        return self._following(hidden, layout, chunk)

    def _batch(self, chunk: Chunk) -> BatchCache:
        return BatchCache([self.sequences[i].cache for i in chunk], self.engine.ring.rank)

    def _following(self, hidden: Tensor, layout: Layout, chunk: Chunk) -> dict[int, int]:
        """The token that follows each sequence whose last token was in this pass; its row's rank tells the others."""
        engine, lasts = self.engine, {}
        for i, row in zip(chunk, accumulate(map(len, chunk.values())), strict=True):
            if self.sequences[i].cached == len(self.sequences[i].tokens):
                lasts[row - 1] = (i, self.sequences[i].cached - 1)
        rows = [layout.index(rank).tolist() for rank in range(engine.ranks)]
        rows_per_rank = [[row for row in of_rank if row in lasts] for of_rank in rows]
        chosen = []
        for row in rows_per_rank[engine.rank]:
            at = rows[engine.rank].index(row)
            i, position = lasts[row]
            sampling = replace(self.sampling, seed=(self.sampling.seed + i) % 2**32)
            chosen.append(choose_token(next_logits(engine, hidden[at : at + 1])[0, 0], sampling, position))
        mine = torch.tensor(chosen, dtype=torch.long, device=hidden.device)
        told = torch.cat(engine.context.all_gather(mine, [(len(of_rank),) for of_rank in rows_per_rank])).tolist()
        by_row = dict(zip([row for of_rank in rows_per_rank for row in of_rank], told, strict=True))
        return {i: by_row[row] for row, (i, _) in lasts.items()}


@torch.inference_mode()
def next_logits(engine: Engine, hidden: Tensor) -> Tensor:
    """float32 logits [s b v] of the rows of ``hidden``; every tensor-parallel rank takes part."""
    return logits(engine.model, hidden, engine.tp, engine.shape.vocab_size)


def barrier(engine: Engine) -> None:
    """Wait for the others, so that a clock started next does not count what they did before."""
    engine.context.all_gather(torch.zeros(1, device=engine.device), [(1,)] * engine.ranks)


def _chunks(new: Mapping[int, list[int]], most: int | None) -> Iterator[Chunk]:
    """All new tokens at once, or ``most`` at a time, in order, so that their activations fit."""
    chunk: Chunk = {}
    for i, tokens in new.items():
        left = tokens
        while left:
            room = len(left) if most is None else most - _total(chunk)
            chunk[i], left = left[:room], left[room:]
            if most is not None and _total(chunk) == most:
                yield chunk
                chunk = {}
    if chunk:
        yield chunk


def _total(chunk: Mapping[int, Sequence[int]]) -> int:
    return sum(map(len, chunk.values()))


def _packed(chunk: Chunk) -> Tensor:
    return torch.tensor([token for tokens in chunk.values() for token in tokens])
