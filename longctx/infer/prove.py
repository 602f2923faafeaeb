"""Proof of the messages of a pass before it runs (``context.check_schedule=true``)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.func import functional_call

from longctx.attention.layout import Layout
from longctx.config import Mesh
from longctx.infer.cache import BatchCache, KVCache
from longctx.infer.engine import Engine
from longctx.megatron.attention import Pass
from longctx.megatron.model import GPTModel
from longctx.megatron.sharded import WeightShare
from longctx.parallel.recording import META, SHAPES_ONLY, RecordedGroups, record
from longctx.parallel.schedule import Schedule, refuse_faulty
from longctx.shapes import Float, Int, Tensor


def prove_pass(engine: Engine, cached: Sequence[Layout], run: Callable[..., object]) -> None:
    """Raise ScheduleError unless the messages of ``run(engine, cache=cache)`` match on all ranks without deadlock.

    ``run`` calls `run_pass` or `run_replicated`.  It is called once for each rank, with an engine of that rank that has
    no weights and no data.  ``cached`` are the layouts of the cached sequences.  megatron-core's own tensor-parallel
    collectives are not part of the proof.
    """
    refuse_faulty(pass_schedules(engine, cached, run))


def pass_schedules(
    engine: Engine, cached: Sequence[Layout], run: Callable[..., object], device: torch.device = META
) -> list[Schedule]:
    """Return the messages that each rank of tp x ulysses x ring sends and receives in ``run``, in rank order.

    ``cached`` and ``run`` are those of `prove_pass`.
    ``device`` is where tensors without data are made: "meta" takes no memory, "cpu" is faster for small tensors.
    """

    def rank_main(groups: RecordedGroups) -> None:
        caches = [KVCache(groups.ring.size, groups.ring.rank) for _ in cached]
        for cache, layout in zip(caches, cached, strict=True):
            cache.layout = layout
        with _share_over(engine.share, groups):
            model = _ModelOfShapes(engine, device)
            replica = replace(
                engine,
                model=model,
                kernel=SHAPES_ONLY,
                ulysses=groups.ulysses,
                ring=groups.ring,
                context=groups.context,
            )
            run(replica, cache=BatchCache(caches, groups.ring.rank))

    return record(Mesh(tp=engine.tp.size, ulysses=engine.ulysses.size, ring=engine.ring.size), rank_main)


@contextmanager
def _share_over(share: WeightShare | None, groups: RecordedGroups) -> Iterator[None]:
    """Make the layers of ``share`` communicate over the recording ``groups`` inside the block, not over the real ones.

    Does nothing if ``share`` is None.
    """
    if share is None:
        yield
        return
    before = share.context, share.tp_context
    share.context, share.tp_context = groups.context, groups.tp_context
    try:
        yield
    finally:
        share.context, share.tp_context = before


class _ModelOfShapes(GPTModel):  # type: ignore[misc]
    """A model without weights whose pass sends only the messages between context ranks, to record them."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        torch.nn.Module.__init__(self)
        self.config = engine.model.config
        self._weight = torch.empty(0, dtype=engine.dtype, device=device)
        self.decoder = _DecoderOfShapes(engine, self._weight)

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield one empty tensor, from which callers read the model's dtype and device."""
        del recurse
        yield self._weight

    def embedding(self, tokens: Int[Tensor, "b s"], position_ids: None) -> Float[Tensor, "s b hidden"]:
        """Return hidden states of the shape that the embedding of ``tokens`` has."""
        del position_ids
        return self._weight.new_empty(*tokens.shape[::-1], self.config.hidden_size)


class _DecoderOfShapes:
    """The decoder of `_ModelOfShapes`: a layer runs its attention only, with tensors like ``weight``.

    With a share of the weights in use, the model's own layer runs with empty weights, because its linear layers
    communicate too.
    """

    def __init__(self, engine: Engine, weight: Tensor) -> None:
        self.config, self.layers, self._weight = engine.model.config, list(engine.model.decoder.layers), weight
        self._shared = bool(engine.share and engine.share.active)

    def __call__(
        self, hidden: Float[Tensor, "s b hidden"], attention_mask: None, packed_seq_params: Pass
    ) -> Float[Tensor, "s b hidden"]:
        """Send only the layers' messages between context ranks; return hidden states of the right shape.

        With a share of the weights in use, the layers run whole, since their linear layers send messages, too.
        """
        for number, layer in enumerate(self.layers):
            if self._shared:
                weights = {
                    name: torch.empty_like(x, device=self._weight.device) for name, x in layer.named_parameters()
                }
                inputs = {
                    "hidden_states": hidden,
                    "attention_mask": attention_mask,
                    "packed_seq_params": packed_seq_params,
                }
                functional_call(layer, weights, (), inputs)
            else:
                assert packed_seq_params.attend
                packed_seq_params.attend(number, *self._queries_keys_values(len(hidden)))
        return hidden

    def _queries_keys_values(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        config, tp = self.config, self.config.tensor_model_parallel_size
        q, k = (
            self._weight.new_empty(1, rows, heads // tp, config.kv_channels)
            for heads in (config.num_attention_heads, config.num_query_groups)
        )
        return q, k, k
