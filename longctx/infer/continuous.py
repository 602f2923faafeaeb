"""A session for a server: sequences join and leave between steps, and each step is one pass."""

from collections.abc import Collection, Mapping

from longctx.attention.layout import Layout, contiguous, documents, shard_balanced
from longctx.infer.cache import BatchCache
from longctx.infer.choose import choose_next
from longctx.infer.prefill import Chunk, pack_tokens, replicated_rows, run_together, sharded_rows
from longctx.infer.score_prompt import score_prompts
from longctx.infer.session import Session
from longctx.parallel.ring import local
from longctx.shapes import Float, Tensor


class ContinuousSession(Session):
    """A session whose prompts are prefilled a few tokens at a time, while other sequences decode.

    `add` a sequence, append its prompt (`Conversation.append_prompt`), then `prefill` it and `decode` it; `drop` it at
    its end.
    """

    def prefill(self, tokens: Mapping[int, int], alone: int | None = None) -> dict[int, int]:
        """Run the next ``tokens[i]`` uncached tokens of each sequence i in one pass.

        Returns, by sequence, the token after each prompt that ends in this pass, and appends it to the sequence.  If a
        sequence has the list `Conversation.prompt_logprobs`, the log-probabilities of its prompt tokens are appended to
        that list.

        If ``alone`` is given, that ring rank runs and caches all rows, without messages over the ring.  No other ring
        rank may cache rows of these sequences.

        Raises ValueError, on every rank, for logits that are not finite.
        """
        new = self._uncached(tokens)
        if alone is None:
            layout, strategies = self._place(new, {})
        else:
            on_one = documents([len(chunk) for chunk in new.values()], 1).place_on(alone, self.engine.ring.size)
            layout, strategies = on_one.split(self.engine.ulysses.size), self.engine.everywhere(local)
        return self._end_prefill(new, self._run_chunk(new, layout, strategies), layout)

    def prefill_and_decode(self, tokens: Mapping[int, int], sequences: Collection[int]) -> dict[int, int]:
        """Prefill and decode in one pass; append the next tokens to their sequences, and return them by sequence.

        As in `prefill`, ``tokens[i]`` is the number of sequence i's uncached tokens to run.  A prompt that does not end
        in this pass gets no next token.  Each of ``sequences`` decodes one token, by ``gather_merge``.  The pass reads
        the weights once for both.
        """
        assert not self.context.check_schedule, "recipes.serve refuses it"
        engine, ring_rank = self.engine, self.engine.ring.rank
        new, latest = self._uncached(tokens), self._latest(sequences)
        layout, strategies = self._place(new, {})
        caches = [BatchCache([self.sequences[i].cache for i in chunk], ring_rank) for chunk in (new, latest)]
        prompt_rows = sharded_rows(engine, pack_tokens(new), layout, caches[0], strategies)
        over_ring = shard_balanced([1] * len(latest), contiguous, self.rows_per_rank)
        decoded_rows = replicated_rows(engine, pack_tokens(latest), over_ring, caches[1])
        prefilled, decoded = run_together(engine, [prompt_rows, decoded_rows])
        following = self._end_prefill(new, prefilled, layout)
        following |= self._choose_replicated(latest, decoded)
        return following

    def _uncached(self, tokens: Mapping[int, int]) -> Chunk:
        """Return the next ``tokens[i]`` uncached tokens of each sequence i."""
        return {
            i: self.sequences[i].tokens[(at := self.sequences[i].cached) : at + count] for i, count in tokens.items()
        }

    def _end_prefill(self, chunk: Chunk, hidden: Float[Tensor, "s b hidden"], layout: Layout) -> dict[int, int]:
        """Choose the tokens after the prompts that end in ``chunk``, append them, and score prompts that ask for it."""
        following = choose_next(self.engine, self.sequences, chunk, hidden, layout)
        score_prompts(self.engine, self.sequences, chunk, hidden, layout)
        self._append(following)
        return following
