"""The loss that balances the experts of a mixture, over rows that ranks share."""

import torch

from longctx.model_shape import Experts
from longctx.parallel.comm import Comm
from longctx.shapes import Float, Tensor


class RouterLoss:
    """Load-balancing loss of one sequence at a time, over the rows of all layers and all ranks of ``comm``.

        loss = E * sum over experts e of f(e) * P(e)

    With E experts, n tokens and L layers of experts, f(e) is the number of times that a router chose e, divided by L n.
    P(e) is the mean of the probability of e over these L n rows; f has no gradient.  This is `load_balancing_loss_func`
    of transformers (arXiv 2101.03961, equations 4 to 6).

    For each sequence call `begin`, then `watch` with the logits of each router, then `finish`, then run the backward.
    f is known only after the last layer, so the backward adds the loss's gradient to that of the logits.  Layers that
    are recomputed in the backward call `watch` again; their rows count once.
    """

    def __init__(self, experts: Experts, comm: Comm) -> None:
        self._experts, self._comm = experts, comm
        self._rows = 0
        self._sums = torch.empty(0)  # by expert: choices, and probabilities
        self._slope: Tensor | None = None  # derivative of the weighted loss by a row's probabilities
        self.losses: list[Tensor] = []  # float64, one for each sequence since `take_mean`

    def begin(self, rows: int) -> None:
        """Begin a sequence; this rank holds ``rows`` of its rows."""
        self._rows, self._slope = rows, None
        self._sums = torch.zeros(2, self._experts.count, dtype=torch.float64)

    def watch(self, logits: Float[Tensor, "rows ... experts"]) -> None:
        """Add a router's choices and probabilities to the sums, for the rows that `begin` announced.

        Further rows of ``logits`` are padding.  The backward pass adds the gradient of the loss to the gradient of
        ``logits``.
        """
        values = logits.detach()
        if self._slope is None:
            probs = self._probs(values)
            chosen = probs.topk(self._experts.per_token).indices.flatten()
            counts = torch.bincount(chosen, minlength=self._experts.count)
            sums = torch.stack([counts.double(), probs.flatten(0, -2).double().sum(0)])
            self._sums = self._sums.to(sums.device) + sums
        if logits.requires_grad:
            logits.register_hook(lambda grad: grad + self._gradient(values).to(grad.dtype))

    def finish(self, weight: float) -> None:
        """Compute the sequence's loss, for `take_mean`, and its gradient times ``weight``.  Every rank calls this."""
        gathered = self._comm.all_gather(self._sums, [tuple(self._sums.shape)] * self._comm.size)
        chosen, probs = torch.stack(gathered).sum(0).unbind()
        rows = chosen.sum() / self._experts.per_token
        slope = self._experts.count * chosen / rows.square()
        self._slope = weight * slope
        self.losses.append((slope * probs).sum())

    def take_mean(self) -> Tensor:
        """Return the mean loss of the sequences since the last call, without their weights."""
        mean = torch.stack(self.losses).mean()
        self.losses.clear()
        return mean

    def _probs(self, logits: Float[Tensor, "rows ... experts"]) -> Float[Tensor, "own ... experts"]:
        return logits[: self._rows].softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _gradient(self, logits: Float[Tensor, "rows ... experts"]) -> Float[Tensor, "rows ... experts"]:
        """Return the gradient of the weighted loss by ``logits``; 0 for rows of padding."""
        assert self._slope is not None, "finish comes before the backward"
        probs = self._probs(logits)
        slope = self._slope.to(probs.dtype)
        own = probs * (slope - (probs * slope).sum(-1, keepdim=True))
        return torch.cat([own, own.new_zeros(len(logits) - len(own), *own.shape[1:])])
