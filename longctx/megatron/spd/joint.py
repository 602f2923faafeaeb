"""Joint distillation of all repaired blocks, from the predictions of the model with nothing dropped.

    teacher   x -> block 0 -> block 1 -> ... -> logits        no block drops, weights frozen
    student   x -> layer 0 -> block 1 -> ... -> logits        a set of blocks replaced by their repaired layers
    loss      KL(teacher || student), mean over tokens (nats)

Repair trains each block by itself and minimises the error of that block's output.  Here the layers train together and
minimise the error of the predictions, so that a layer can compensate for the errors of others.  This step is not in
arXiv 2502.20727.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.checkpoint_index import PARTIAL, folder_name, read_metadata, unchecked_line
from longctx.checksum import crc32_of_files
from longctx.config import JointRepair
from longctx.megatron.spd.blocks import Blocks, Hidden
from longctx.megatron.spd.layer import SPDTransformerLayer
from longctx.megatron.spd.likelihood import kl_divergence, log_prob_shard
from longctx.megatron.training.checkpoint import agreed_on_all_ranks, commit, remove
from longctx.shapes import Float, Tensor, Tokens
from longctx.spd.distill import rate_at
from longctx.text_file import name_in_errors


class JointDistillation:
    """Trains ``layers`` (by block index), repaired layers that drop their reduction, towards the full model.

    ``order`` lists the blocks in the order in which a plan drops them.  Steps 0, 2, 4, ... drop all of them.  Steps 1,
    3, 5, ... drop the first k for a random k, so that the model also improves with fewer blocks dropped.  ``dp`` is the
    data-parallel group; each of its ranks trains on its share of a step's sequences.  ``losses`` has the loss of each
    step so far.  The constructor freezes the model of ``blocks`` and turns its reductions on.
    """

    def __init__(
        self,
        blocks: Blocks,
        layers: Mapping[int, SPDTransformerLayer],
        order: Sequence[int],
        settings: JointRepair,
        dp: dist.ProcessGroup,
    ) -> None:
        self.layers, self.losses = layers, list[float]()
        self._blocks, self._order, self._settings, self._dp = blocks, order, settings, dp
        blocks.model.requires_grad_(False)
        for layer in blocks.model.decoder.layers:
            layer.drop(dropped=False)
        self._parameters = [weight for block in order for weight in layers[block].parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    def step(self, tokens: Tokens) -> float:
        """Take a step on this data-parallel rank's ``tokens``; return the mean divergence (nats per token) before it.

        The mean is that of all data-parallel ranks.  Every rank calls this, with equally many tokens.
        """
        settings = self._settings
        generator = torch.Generator().manual_seed(self.steps)
        fewer = 1 + int(torch.randint(len(self._order), (), generator=generator))
        dropped = self._order[: fewer if self.steps % 2 else None]
        loss = self._mean_divergence(tokens, dropped) / self._dp.size()
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.steps, settings.steps, settings.lr)
        self._optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        # Layers that did not take part have no gradient, on any rank.
        for value in (total, *(p.grad for p in self._parameters if p.grad is not None)):
            dist.all_reduce(value, group=self._dp)
        self._optimizer.step()
        self.losses.append(float(total))
        return self.losses[-1]

    @torch.no_grad()
    def divergence(self, tokens: Tokens) -> float:
        """Return the mean divergence (nats per token) on ``tokens`` with all blocks of ``order`` dropped."""
        batches = tokens.split(self._settings.batch)
        return sum(float(self._mean_divergence(batch, self._order)) * len(batch) for batch in batches) / len(tokens)

    @torch.no_grad()
    def divergences_alone(self, tokens: Tokens, one_done: Callable[[], None]) -> dict[int, float]:
        """Return, for each block of ``order``, the mean divergence (nats per token) with only that block dropped.

        ``one_done`` is called after each of these blocks in each batch of sequences.
        """
        blocks, sums = self._blocks, dict.fromkeys(self._order, 0.0)
        for batch in tokens.split(self._settings.batch):
            x = blocks.embed(batch)
            teacher = self._teacher(x)
            for block, layer in enumerate(blocks.model.decoder.layers):
                if block in sums:
                    out = blocks.run(self.layers[block], x)
                    sums[block] += float(self._mean_divergence_from(teacher, out, (), block + 1)) * len(batch)
                    one_done()
                x = blocks.run(layer, x)
        return {block: total / len(tokens) for block, total in sums.items()}

    def _mean_divergence(self, tokens: Tokens, dropped: Sequence[int]) -> Float[Tensor, ""]:
        embedded = self._blocks.embed(tokens)
        return self._mean_divergence_from(self._teacher(embedded), embedded, dropped)

    @torch.no_grad()
    def _teacher(self, embedded: Hidden) -> Float[Tensor, "rows 1 shard"]:
        """Return the log-probabilities of the model with nothing dropped, for this rank's shard of the vocabulary."""
        blocks = self._blocks
        return log_prob_shard(blocks.model, self._final(embedded, ()), blocks.tp, blocks.shape.vocab_size)

    def _mean_divergence_from(
        self, teacher: Float[Tensor, "rows 1 shard"], x: Hidden, dropped: Sequence[int], first: int = 0
    ) -> Float[Tensor, ""]:
        """Return the mean divergence (nats per token) from ``teacher``, log-probabilities of the original model.

        ``x``, ``dropped`` and ``first`` are those of `_final`.
        """
        blocks, final = self._blocks, self._final(x, dropped, first)
        return kl_divergence(blocks.model, final, teacher, blocks.tp, blocks.shape.vocab_size).mean()

    def _final(self, x: Hidden, dropped: Sequence[int], first: int = 0) -> Float[Tensor, "rows 1 hidden"]:
        """Run the model from block ``first`` on, with input ``x``; return the output of the final norm.

        The blocks ``dropped`` are replaced by their repaired layers.
        """
        for block, layer in enumerate(self._blocks.model.decoder.layers[first:], first):
            x = self._blocks.run(self.layers[block] if block in dropped else layer, x)
        final: Tensor = self._blocks.model.decoder.final_layernorm(x.reshape(-1, 1, x.shape[-1]))
        return final

    def save(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Write the state to ``folder``/step-* with ``metadata``, then remove all other states there.

        Every rank calls this.  The first data-parallel replica writes one file per tensor-parallel rank.
        """
        place, rank = folder / folder_name(self.steps), self._blocks.tp.rank
        partial_folder, first = place.with_name(place.name + PARTIAL), dist.get_rank() == 0
        others = [state for state in folder.glob("step-*") if state != place]
        if first:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
        dist.barrier()  # the folder exists
        if self._dp.rank() == 0:
            state = {"layers": self._weights(), "optimizer": self._optimizer.state_dict()}
            _save(state, partial_folder / f"rank-{rank}.pt")
        dist.barrier()  # all ranks have written
        if first:
            files = sorted(partial_folder.iterdir())
            checksums = dict(zip((file.name for file in files), crc32_of_files(files), strict=True))
            commit(partial_folder, place, {**metadata, "order": list(self._order), "losses": self.losses}, checksums)
            for other in others:
                with suppress(OSError):
                    remove(other)
        dist.barrier()

    def resume(self, folder: Path) -> list[str]:
        """Load the newest complete state in ``folder``, if it has the same blocks in the same order.

        Every rank calls this.  Returns a message for each skipped state, with the reason, and for a loaded state
        without checksums.  If the blocks differ, nothing is loaded, and a message says so.
        """
        place, skipped = agreed_on_all_ranks(folder)
        if place is None:
            return skipped
        metadata = read_metadata(place)
        if metadata["order"] != list(self._order):
            return [
                *skipped,
                f"{place} has blocks {metadata['order']} and this run {list(self._order)}; joint training restarts",
            ]
        state = torch.load(place / f"rank-{self._blocks.tp.rank}.pt", weights_only=True)
        with torch.no_grad():
            for block, layer in self.layers.items():
                for name, weight in layer.named_parameters():
                    weight.copy_(state["layers"][block][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = metadata["losses"]
        return [*skipped, *filter(None, [unchecked_line(place)])]

    def _weights(self) -> dict[int, dict[str, Tensor]]:
        return {
            block: {name: weight.detach() for name, weight in layer.named_parameters()}
            for block, layer in self.layers.items()
        }


def _save(values: Mapping[str, Any], file: Path) -> None:
    """Write ``values`` to ``file``.  Raises OSError, which names ``file``; torch would raise RuntimeError instead."""
    with name_in_errors(file), file.open("wb") as stream:
        try:
            torch.save(dict(values), stream)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from error
