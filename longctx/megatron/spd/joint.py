"""Repaired blocks learn together, from what the model predicts when nothing drops.  Not in arXiv 2502.20727.

Block-to-block distillation sees a block's own error only, with what enters it exact.  Here the errors of all of them
are seen where they count, in the predictions, and may make up for each other.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.checkpoint_index import PARTIAL, folder_name, read_metadata
from longctx.config import JointRepair
from longctx.megatron.spd.blocks import Blocks, Hidden
from longctx.megatron.spd.likelihood import divergence, log_shares
from longctx.megatron.training.checkpoint import agreed_on_all_ranks, commit
from longctx.shapes import Tensor, Tokens
from longctx.spd.distill import rate_at


class JointDistillation:
    """``layers`` by block, each of which drops its reduction, and how far they have learned.

    ``order`` is that in which they may drop.  Every other step all of them do, and else another number, so that the
    model is good with fewer of them, too.  ``dp`` are data-parallel ranks, each with its part of a step's text.
    """

    def __init__(
        self, blocks: Blocks, layers: Mapping[int, Any], order: Sequence[int], how: JointRepair, dp: dist.ProcessGroup
    ) -> None:
        self.layers, self.losses = layers, list[float]()
        self._blocks, self._order, self._how, self._dp = blocks, order, how, dp
        blocks.model.requires_grad_(False)
        for layer in blocks.model.decoder.layers:
            layer.drop(dropped=False)
        self._parameters = [weight for block in order for weight in layers[block].parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=how.lr, betas=(0.9, 0.99), weight_decay=0.0)

    @property
    def steps(self) -> int:
        """How many have been done."""
        return len(self.losses)

    def step(self, tokens: Tokens) -> float:
        """Learn from this data-parallel rank's ``tokens`` [sequences length]; mean divergence (nats a token)."""
        how = self._how
        draw = torch.Generator().manual_seed(self.steps)
        fewer = 1 + int(torch.randint(len(self._order), (), generator=draw))
        loss = self._divergence(tokens, self._order[: fewer if self.steps % 2 else None]) / self._dp.size()
        for group in self._optimizer.param_groups:
            group["lr"] = rate_at(self.steps, how.steps, how.lr)
        self._optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        # Blocks that did not drop have no gradient, on any rank.
        for value in (total, *(p.grad for p in self._parameters if p.grad is not None)):
            dist.all_reduce(value, group=self._dp)
        self._optimizer.step()
        self.losses.append(float(total))
        return self.losses[-1]

    @torch.no_grad()
    def divergence(self, tokens: Tokens) -> float:
        """Mean divergence (nats a token) on ``tokens`` with all of ``layers`` dropped, some sequences at a time."""
        parts = tokens.split(self._how.batch)
        return sum(float(self._divergence(part, self._order)) * len(part) for part in parts) / len(tokens)

    @torch.no_grad()
    def divergences_alone(self, tokens: Tokens, one_done: Callable[[], None]) -> dict[int, float]:
        """The same where one block drops and no other, by block; ``one_done`` is called with each of some sequences."""
        blocks, sums = self._blocks, dict.fromkeys(self._order, 0.0)
        for part in tokens.split(self._how.batch):
            x = blocks.embedded(part)
            wanted = self._predictions(x)
            for block, layer in enumerate(blocks.model.decoder.layers):
                if block in sums:
                    behind = blocks.run(self.layers[block], x)
                    sums[block] += float(self._from(wanted, behind, (), block + 1)) * len(part)
                    one_done()
                x = blocks.run(layer, x)
        return {block: total / len(tokens) for block, total in sums.items()}

    def _divergence(self, tokens: Tokens, dropped: Sequence[int]) -> Tensor:
        entering = self._blocks.embedded(tokens)
        return self._from(self._predictions(entering), entering, dropped)

    @torch.no_grad()
    def _predictions(self, entering: Hidden) -> Tensor:
        """Of the model with nothing dropped, a share on each rank."""
        blocks = self._blocks
        return log_shares(blocks.model, self._final(entering, ()), blocks.tp, blocks.shape.vocab_size)

    def _from(self, wanted: Tensor, x: Hidden, dropped: Sequence[int], begin: int = 0) -> Tensor:
        """Mean divergence from the predictions ``wanted``, of ``x`` that enters block ``begin``."""
        blocks, final = self._blocks, self._final(x, dropped, begin)
        return divergence(blocks.model, final, wanted, blocks.tp, blocks.shape.vocab_size).mean()

    def _final(self, x: Hidden, dropped: Sequence[int], begin: int = 0) -> Hidden:
        """What enters the output layer, [rows 1 hidden]."""
        for block, layer in enumerate(self._blocks.model.decoder.layers[begin:], begin):
            x = self._blocks.run(self.layers[block] if block in dropped else layer, x)
        return self._blocks.model.decoder.final_layernorm(x.reshape(-1, 1, x.shape[-1]))

    def save(self, folder: Path, told: Mapping[str, Any]) -> None:
        """Put the state into ``folder``, in place of all others, with what is ``told`` of the run."""
        place, rank = folder / folder_name(self.steps), self._blocks.tp.rank
        coming, first = place.with_name(place.name + PARTIAL), dist.get_rank() == 0
        others = [one for one in folder.glob("step-*") if one != place]
        if first:
            shutil.rmtree(coming, ignore_errors=True)
            coming.mkdir(parents=True)
        dist.barrier()
        if self._dp.rank() == 0:
            torch.save(
                {"layers": self._states(), "optimizer": self._optimizer.state_dict()}, coming / f"rank-{rank}.pt"
            )
        dist.barrier()
        if first:
            commit(coming, place, {**told, "order": list(self._order), "losses": self.losses})
            for one in others:
                shutil.rmtree(one, ignore_errors=True)
        dist.barrier()

    def resume(self, folder: Path) -> list[str]:
        """Go on from the state in ``folder``, if there is one; what was passed over, and why."""
        place, passed = agreed_on_all_ranks(folder)
        if place is None:
            return passed
        known = read_metadata(place)
        if known["order"] != list(self._order):
            return [*passed, f"{place} is of blocks {known['order']}, not {list(self._order)}: they begin anew"]
        state = torch.load(place / f"rank-{self._blocks.tp.rank}.pt", weights_only=True)
        with torch.no_grad():
            for block, layer in self.layers.items():
                for name, weight in layer.named_parameters():
                    weight.copy_(state["layers"][block][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = known["losses"]
        return passed

    def _states(self) -> dict[int, Any]:
        return {
            block: {name: weight.detach() for name, weight in layer.named_parameters()}
            for block, layer in self.layers.items()
        }
