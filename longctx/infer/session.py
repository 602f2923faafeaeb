"""A session: conversations of several sequences, whose keys and values stay sharded over ranks between turns."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from longctx.attention.layout import LAYOUTS, Layout, contiguous, documents, shard_balanced
from longctx.config import Context, Sampling
from longctx.infer.cache import BatchCache
from longctx.infer.choose import choose_next
from longctx.infer.engine import Engine, barrier
from longctx.infer.prefill import (
    Chunk,
    LayerDone,
    pack_tokens,
    run_pass,
    run_replicated,
    split_into_chunks,
)
from longctx.infer.prove import prove_pass
from longctx.infer.refuse import refuse_prompts
from longctx.infer.turn import Conversation, Turn
from longctx.megatron.sharded import WeightShare
from longctx.parallel.comm import doing
from longctx.parallel.ring import Strategy
from longctx.parallel.strategy import STRATEGIES
from longctx.shapes import Float, Tensor

# (new tokens by sequence, cached tokens by sequence, the layers' window) -> (strategy's name, reason for the choice)
Chooser = Callable[[Sequence[int], Sequence[int], int | None], tuple[str, str]]
DecodeChooser = Callable[[int], tuple[str, str]]  # number of sequences -> (strategy's name, reason for the choice)
Stopped = Callable[[int, Sequence[int]], bool]  # (sequence, tokens of its answer so far) -> whether the answer ends


class Session:
    """Sequences by id, whose keys and values are sharded over the ranks of ``engine``.

    Each turn's new tokens are sharded without moving earlier ones (arXiv 2411.01783, 3.5.1); see `shard_balanced`.
    ``choose`` picks the strategy of each prefill; without it, all use ``context.strategy``.  With
    ``context.decode=auto``, ``choose_decode`` picks the strategy of each `decode` by its number of sequences;
    ``decode_choices`` has the (strategy, reason) for each number of sequences so far.  Before each turn, a sequence's
    cache gets room for the turn's tokens.  Sequence i samples with the seed ``sampling.seed`` + i, unless `add` got
    other settings for it.  All ranks must make the same calls in the same order.

    Raises ValueError for ``context.decode=sharded`` on several context ranks if ``engine`` has no share of the weights.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        sampling: Sampling,
        choose: Chooser | None = None,
        choose_decode: DecodeChooser | None = None,
    ) -> None:
        if context.decode == "sharded" and engine.ranks > 1 and not engine.share:
            raise ValueError(
                "context.decode=sharded supports model.layers=local only, and dropped reductions with mesh.tp=1 only; "
                f"this is model.layers={engine.layers} mesh.tp={engine.tp.size}; use context.decode=gather_merge"
            )
        self.engine, self.context, self.sampling = engine, context, sampling
        self.sequences: dict[int, Conversation] = {}
        self._choose = choose or (lambda *_: (context.strategy, "as asked"))
        assert choose_decode or context.decode != "auto", "recipes refuse auto, or measure and choose"
        self._choose_decode = choose_decode
        self.decode_choices: dict[int, tuple[str, str]] = {}

    @property
    def rows_per_rank(self) -> list[int]:
        """Rows of all sequences that each ring rank caches."""
        layouts = [sequence.cache.layout for sequence in self.sequences.values()]
        return [sum(layout.rows(rank) for layout in layouts) for rank in range(self.engine.ring.size)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values in this rank's caches, over all sequences and layers, without room for more."""
        return sum(sequence.cache.bytes for sequence in self.sequences.values())

    def turn(
        self,
        prompts: Mapping[int, Sequence[int]],
        max_new_tokens: Mapping[int, int],
        *,
        layer_done: LayerDone = lambda: None,
        token_done: Callable[[Mapping[int, int]], None] = lambda _: None,
        stopped: Stopped = lambda *_: False,
        keep_states: bool = False,
    ) -> Turn:
        """Append ``prompts`` to their sequences and prefill them together; then decode these sequences together.

        A prompt whose sequence id is new starts a sequence.  With ``context.chunk``, the prefill takes several passes.
        A sequence decodes up to its ``max_new_tokens`` (0: prefill only), an end token, or a True from ``stopped``.
        The turn calls ``stopped`` after each token that is no end token.  It calls ``token_done`` with each step's
        tokens by sequence, and ``layer_done`` after each layer's attention in the prefill.  ``keep_states`` fills
        `Turn.passes`.

        If the turn fails, new sequences are removed, and earlier sequences get back the caches, tokens and
        log-probabilities that they had before the turn.

        Raises ValueError for no prompts, an empty prompt, a token beyond the vocabulary, negative ``max_new_tokens``,
        more tokens than the model's maximum, and logits that are not finite.
        """
        self.refuse(prompts, max_new_tokens)
        before = {
            i: (
                sequence.cache.layout,
                replace(sequence, tokens=list(sequence.tokens), logprobs=list(sequence.logprobs)),
            )
            for i, sequence in self.sequences.items()
        }
        try:
            barrier(self.engine)
            return self._turn(prompts, max_new_tokens, layer_done, token_done, stopped, keep_states)
        except BaseException:
            self._restore(before)
            raise

    def add(self, sequence: int, tokens: int, decoded: int, sampling: Sampling | None = None) -> Conversation:
        """Add and return the new ``sequence``, empty, with room for ``tokens`` prefilled and ``decoded`` more tokens.

        ``sampling`` replaces the session's settings for this sequence; its seed is used unchanged.
        """
        settings = sampling or self.sampling.for_answer(sequence)
        self.sequences[sequence] = Conversation(self.engine.cache(0), sampling=settings)
        self._make_room(sequence, tokens, decoded, alone=False)
        return self.sequences[sequence]

    def _make_room(self, sequence: int, tokens: int, decoded: int, *, alone: bool) -> None:
        """Make room for this rank's share of ``tokens`` and ``decoded`` more tokens of ``sequence``.

        The ranks share decoded rows evenly over all sequences, so that one rank may get all of a sequence's, unless
        the sequence is ``alone``.
        """
        share = self.engine.share_of
        self.sequences[sequence].cache.make_room(share(tokens + decoded) if alone else share(tokens) + decoded)

    def drop(self, sequence: int) -> None:
        """Remove ``sequence`` and free its cache.  Raises ValueError for an unknown number."""
        if sequence not in self.sequences:
            raise ValueError(f"sequence {sequence} is not in the session; it has {sorted(self.sequences) or 'none'}")
        del self.sequences[sequence]

    def refuse(self, prompts: Mapping[int, Sequence[int]], max_new_tokens: Mapping[int, int]) -> None:
        """Raise the ValueError that `turn` would raise for these arguments before it computes anything."""
        so_far = {i: len(sequence.tokens) for i, sequence in self.sequences.items()}
        refuse_prompts(self.engine.shape, so_far, prompts, max_new_tokens)

    def _restore(self, before: Mapping[int, tuple[Layout, Conversation]]) -> None:
        """Set the sequences back to ``before``: by sequence, the layout of its cache and a copy from before a turn."""
        self.sequences = {i: sequence for i, (_, sequence) in before.items()}
        for layout, sequence in before.values():
            sequence.cache.rewind(layout)

    def _turn(
        self,
        prompts: Mapping[int, Sequence[int]],
        max_new_tokens: Mapping[int, int],
        layer_done: LayerDone,
        token_done: Callable[[Mapping[int, int]], None],
        stopped: Stopped,
        keep_states: bool,
    ) -> Turn:
        # 1. Prefill, which gives the first tokens.
        sent, began = self.engine.sent, time.perf_counter()
        for i, prompt in prompts.items():
            if i not in self.sequences:
                self.add(i, len(prompt), max_new_tokens[i])
            alone = len({*self.sequences, *prompts}) == 1
            self._make_room(i, len(prompt) + 1, max_new_tokens[i], alone=alone)
        with doing("prefill"):
            turn, latest = self._prefill(prompts, layer_done, keep_states)
        turn.ttft_s, turn.prefill_bytes = time.perf_counter() - began, self.engine.sent - sent

        # 2. Decode, until every sequence has reached its limit or an end token.
        for i in [i for i in latest if not max_new_tokens[i]]:
            del latest[i]  # and its log-probabilities
            self.sequences[i].logprobs.clear()
        self._append(latest)
        while latest:
            for i, token in latest.items():
                turn.tokens[i].append(token)
            token_done(latest)
            going_on = [i for i in latest if not (self.is_at_end(i) or stopped(i, turn.tokens[i]))]
            active = [i for i in going_on if len(turn.tokens[i]) < max_new_tokens[i]]
            if not active:
                break
            turn.steps += 1
            with doing(f"decode, step {turn.steps}"):
                latest = self.decode(active)
        turn.decode_s = time.perf_counter() - began - turn.ttft_s
        turn.decode_bytes = self.engine.sent - sent - turn.prefill_bytes
        return turn

    def _prefill(
        self, prompts: Mapping[int, Sequence[int]], done: LayerDone, keep_states: bool
    ) -> tuple[Turn, dict[int, int]]:
        """Prefill the prompts in chunks; return the turn so far, and the token that follows each prompt, by sequence.

        ``done`` is called after each layer's attention.  With ``keep_states``, the turn keeps the rows' hidden states.
        """
        # 1. The new tokens: the prompt, and before it the last decoded token if it is not cached.
        for i, prompt in prompts.items():
            self.sequences[i].append_prompt(prompt)
        new = {i: self.sequences[i].tokens[self.sequences[i].cached :] for i in prompts}
        turn = Turn(
            {i: [] for i in prompts}, sum(map(len, new.values())), sum(self.sequences[i].cached for i in prompts)
        )
        reasons: dict[str, str] = {}  # by strategy
        following: dict[int, int] = {}

        # 2. A pass for each chunk, with strategies chosen for its numbers of tokens.
        for chunk in split_into_chunks(new, self.context.chunk):
            layout, strategies = self._place(chunk, reasons)
            hidden = self._run_chunk(chunk, layout, strategies, done)
            if keep_states:
                turn.passes.append((hidden, layout))
            following |= choose_next(self.engine, self.sequences, chunk, hidden, layout)
        turn.strategy, turn.why = " and ".join(reasons), "; ".join(reasons.values())
        return turn, following

    def _run_chunk(
        self, chunk: Chunk, layout: Layout, strategies: Mapping[int | None, Strategy], done: LayerDone = lambda: None
    ) -> Float[Tensor, "s b hidden"]:
        """Run one pass over ``chunk``, sharded by ``layout``; return the hidden states of this rank's rows."""
        return self._run_pass(
            chunk, partial(run_pass, tokens=pack_tokens(chunk), layout=layout, strategies=strategies), done
        )

    def _place(self, chunk: Chunk, reasons: dict[str, str]) -> tuple[Layout, dict[int | None, Strategy]]:
        """Return the layout of the rows of ``chunk``, and the strategies for them.

        The name of each chosen strategy is added to ``reasons``, with the reason for the choice.
        """
        lengths = [len(tokens) for tokens in chunk.values()]
        strategies = self._choose_strategies(lengths, [self.sequences[i].cached for i in chunk], reasons)
        over_ring = shard_balanced(lengths, LAYOUTS[self.context.layout], self.rows_per_rank)
        return over_ring.split(self.engine.ulysses.size), strategies

    def _choose_strategies(
        self, lengths: Sequence[int], cached: Sequence[int], reasons: dict[str, str]
    ) -> dict[int | None, Strategy]:
        """Return a strategy for the layers of each window; add each new name and its reason to ``reasons``."""
        strategies = {}
        for window in sorted(set(self.engine.shape.windows), key=lambda w: w or 0):
            strategy, why = self._choose(lengths, cached, window)
            strategies[window] = STRATEGIES[strategy]
            reasons.setdefault(strategy, why)
        return strategies

    def decode(self, sequences: Collection[int]) -> dict[int, int]:
        """Decode the next token of each of ``sequences`` in one step, append it and return it by sequence.

        The step feeds each sequence's last token, which must not be cached yet: the one that a turn or the previous
        call appended.  Decoding by pass-Q is arXiv 2411.01783, Alg. 4.

        Raises ValueError, on every rank, for logits that are not finite.
        """
        chunk = self._latest(sequences)
        over_ring = shard_balanced([1] * len(chunk), contiguous, self.rows_per_rank)
        engine, tokens = self.engine, pack_tokens(chunk)
        strategy = self.decode_strategy(len(chunk))
        if strategy in STRATEGIES:
            layout = over_ring.split(engine.ulysses.size)
            hidden = self._run_chunk(chunk, layout, engine.everywhere(STRATEGIES[strategy]))
            following = choose_next(engine, self.sequences, chunk, hidden, layout)
            self._append(following)
            return following
        share = engine.share if strategy == "sharded" else None
        with share.in_use() if share else nullcontext():
            run = partial(run_replicated, tokens=tokens, layout=over_ring, share=share)
            return self._choose_replicated(chunk, self._run_pass(chunk, run), share)

    def _latest(self, sequences: Collection[int]) -> Chunk:
        """Return the last token of each of ``sequences``, the only one that is not cached."""
        chunk = {i: self.sequences[i].tokens[-1:] for i in sequences}
        assert all(len(self.sequences[i].tokens) == self.sequences[i].cached + 1 for i in chunk), "nothing to feed"
        return chunk

    def _choose_replicated(
        self, chunk: Chunk, hidden: Float[Tensor, "s b hidden"], share: WeightShare | None = None
    ) -> dict[int, int]:
        """Choose the next tokens after a pass whose rows ``hidden`` all ranks have, and append them.

        With a ``share``, the ranks compute the logits of all rows together, and the first one samples.  Otherwise each
        rank computes and samples some of the rows.
        """
        engine = self.engine
        if share:
            layout = documents([1] * len(chunk), 1).place_on(0, engine.ranks)
        else:
            layout = shard_balanced([1] * len(chunk), contiguous, [0] * engine.ranks)
            hidden = hidden[layout.index(engine.rank).to(hidden.device)]
        following = choose_next(engine, self.sequences, chunk, hidden, layout, share)
        self._append(following)
        return following

    def decode_strategy(self, sequences: int) -> str:
        """Return the name of the strategy for a decode step of ``sequences`` sequences.

        It is ``context.decode``.  For ``auto``, the first call for a number of sequences chooses; later calls return
        the same.
        """
        if self._choose_decode is None or self.context.decode != "auto":
            return self.context.decode
        if sequences not in self.decode_choices:
            self.decode_choices[sequences] = self._choose_decode(sequences)
        return self.decode_choices[sequences][0]

    def is_at_end(self, sequence: int) -> bool:
        """Return True if the last token of ``sequence`` is the model's end token or one of ``sampling.stop_tokens``."""
        last, sampling = self.sequences[sequence].tokens[-1], self.sequences[sequence].sampling
        return last in self.engine.shape.end_tokens or last in sampling.stop_tokens

    def _append(self, tokens: Mapping[int, int]) -> None:
        for i, token in tokens.items():
            self.sequences[i].tokens.append(token)

    def _run_pass(
        self, chunk: Chunk, run: Callable[..., Tensor], done: LayerDone = lambda: None
    ) -> Float[Tensor, "s b hidden"]:
        """Call ``run`` (`run_pass` or `run_replicated`) on the caches of ``chunk``'s sequences; return its result.

        The caches grow by the new tokens.  ``done`` is called after each layer's attention.  With
        ``context.check_schedule``, first prove that the pass's messages match on all ranks.
        """
        caches = [self.sequences[i].cache for i in chunk]
        if self.context.check_schedule:
            prove_pass(self.engine, [cache.layout for cache in caches], run)
        return run(self.engine, cache=BatchCache(caches, self.engine.ring.rank), done=done)
