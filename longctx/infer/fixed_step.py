"""Decode steps of one sequence in tensors of fixed shapes and addresses, which a CUDA graph can replay.

A decode step launches hundreds of short kernels, which can take a CPU longer to launch than a GPU to run.  A graph
launches all of them at once, but only with the shapes and addresses that it was captured with.  Keys and values
therefore have room for the whole sequence from the start, and a mask hides the rows that are not yet written.
"""

import torch
import torch.nn.functional as F

from longctx.infer.cache import KVCache
from longctx.infer.engine import Engine, next_logits
from longctx.megatron.attention import Pass, RotaryTable, rotary_tables
from longctx.megatron.model import hidden_states
from longctx.shapes import Float, Keys, Queries, Tensor


class FixedStep:
    """Decode steps of one sequence after its prefill into ``cache``, which is copied and stays unchanged.

    The sequence may have ``room`` tokens in all, including the cached ones.

    Raises ValueError for several ranks, and for models with windows, attention sinks or experts.
    """

    def __init__(self, engine: Engine, cache: KVCache, room: int) -> None:
        _refuse_untested(engine)
        self.engine, self.room, self.rows = engine, room, cache.rows
        shape, device = engine.shape, engine.device
        self._tables = rotary_tables(shape, torch.arange(room, device=device), engine.dtype)
        self._caches = [tuple(_with_room(x, room) for x in cache.layer(layer)) for layer in range(shape.layers)]
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._position = torch.tensor([self.rows], device=device)
        self._all_rows = torch.arange(room, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, token: int) -> Float[Tensor, " v"]:
        """Append ``token`` to the sequence; return the float32 logits of the next one, valid until the next call.

        Raises ValueError if the room is used up.
        """
        self._refuse_full()
        self._token.fill_(token)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        self.rows += 1
        self._position += 1
        return self._logits

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a step as a CUDA graph, which later calls replay.

        Raises ValueError without a GPU, or if the room is used up.
        """
        self._refuse_full()  # a row beyond the room would be written
        if self.engine.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs device=cuda, not {self.engine.device.type}: use run=gpu")
        # The warm-up that a capture needs.  These steps write one row, which the next call writes again.
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._run()
            self._run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph

    def _refuse_full(self) -> None:
        if self.rows == self.room:
            raise ValueError(f"all {self.room} rows of the sequence are used: make the step with a larger room")

    def _run(self) -> None:
        """Compute the logits that follow the current token, on the device, without reading values back to the CPU."""
        tables = {id(table): _row(table, self._position) for table in self._tables if table}
        one_pass = Pass(attend=self._attend, rotary=tuple(tables.get(id(table)) for table in self._tables))
        self._visible = (self._all_rows <= self._position).unsqueeze(0)
        hidden = hidden_states(self.engine.model, self._token, one_pass)
        self._logits = next_logits(self.engine, hidden)[0, 0]

    def _attend(self, layer: int, q: Queries, k: Keys, v: Keys) -> Queries:
        keys, values = self._caches[layer]
        keys.index_copy_(1, self._position, k)
        values.index_copy_(1, self._position, v)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._visible, enable_gqa=True)
        return out.transpose(1, 2)


def _refuse_untested(engine: Engine) -> None:
    """Raise ValueError for an engine on which steps of fixed shapes are not tested."""
    shape = engine.shape
    reasons = {
        "several ranks": engine.ranks > 1 or engine.tp.size > 1,
        "windows": any(window is not None for window in shape.windows),
        "attention sinks": shape.sinks,
        "a mixture of experts": shape.mixture is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"decode steps of fixed shapes are not tested with {reason}: decode with a Session")


def _with_room(x: Keys, room: int) -> Tensor:
    """Copy ``x`` [b rows hk d] into a tensor of ``room`` rows; further rows are 0, since a mask does not hide NaN."""
    new = x.new_zeros(x.shape[0], x.shape[2], room, x.shape[3]).transpose(1, 2)
    new[:, : x.shape[1]] = x
    return new


def _row(table: RotaryTable, position: Tensor) -> RotaryTable:
    cos, sin = (x.index_select(0, position) for x in (table.cos, table.sin))
    return RotaryTable(cos, sin, table.interleaved)
