"""Block-to-block distillation: train a block without its reduction to give the output of the block with it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, isfinite, log, pi

import torch
from torch import nn

from longctx.config import PositionWeights
from longctx.shapes import Float, Tensor

_WARMUP = 10  # steps
Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """Training settings: ``epochs`` over the sequences, ``batch`` sequences a step, peak learning rate ``lr``.

    The learning rate is warmed up and then falls along a cosine (`rate_at`).  ``seed`` sets the order of the sequences.
    ``weights`` selects the `position_weights`.
    """

    epochs: int
    batch: int
    lr: float
    seed: int = 0
    weights: PositionWeights = "uniform"


def distill(
    student: Block,
    parameters: Sequence[nn.Parameter],
    inputs: Float[Tensor, "sequences length d_in"],
    outputs: Float[Tensor, "sequences length d_out"],
    settings: Distillation,
) -> Iterator[float]:
    """Train ``parameters`` so that ``student(inputs)`` approximates ``outputs``; yield the loss of each step.

    Training runs only while the caller iterates: one step for each loss.  The student receives [batch length d_in]; in
    a transformer, d_in and d_out are both its hidden size.  An epoch leaves out the sequences that do not fill a batch.

    Source: arXiv 2502.20727, 4.2.3.  The loss is `relative_squared_error` instead of the paper's mean squared error: a
    few tokens of a Llama are a thousand times larger than the others and would dominate the mean squared error.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * (len(inputs) // settings.batch)
    weights = position_weights(inputs.shape[1], settings.weights).to(inputs)
    for step, rows in enumerate(_batches(len(inputs), settings, order)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, settings.lr)
        loss = relative_squared_error(student(inputs[rows]), outputs[rows], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def refuse_diverged(loss: float, place: str, setting: str) -> None:
    """Raise FloatingPointError if ``loss`` is NaN or infinite.

    The message names ``place`` (such as "repair of block 3") and the learning-rate ``setting`` to lower.
    """
    if not isfinite(loss):
        raise FloatingPointError(
            f"{place} has diverged, its loss is {loss}: use a lower {setting}, or model.dtype=float32"
        )


def rate_at(step: int, steps: int, lr: float) -> float:
    """Return the learning rate at ``step`` (from 0) of ``steps``: a linear warmup times a cosine.

    It is lr * min(1, (step + 1) / 10) * (1 + cos(pi * step / steps)) / 2.
    """
    return lr * min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * cos(pi * step / steps))


def _batches(sequences: int, settings: Distillation, order: torch.Generator) -> Iterator[Tensor]:
    for _ in range(settings.epochs):
        shuffled = torch.randperm(sequences, generator=order)
        for begin in range(0, sequences - settings.batch + 1, settings.batch):
            yield shuffled[begin : begin + settings.batch]


def position_weights(length: int, weights: PositionWeights) -> Float[Tensor, " length"]:
    """Return the weight of each of the ``length`` positions of a sequence; the mean is 1.

    With "uniform", all are 1.  With "beginnings", half of the total is equal for all positions.  Position p, from 0,
    gets a share of the other half in proportion to log((p + 2) / (p + 1)).  With 256 tokens, the first 64 have half of
    the total instead of a quarter.  The first token, to whose massive activation others attend (attention sink), has a
    fifteenth.
    """
    edges = torch.arange(1, length + 2, dtype=torch.double).log() / log(length + 1)
    share = 0.5 if weights == "beginnings" else 0.0
    return (1 - share + share * length * edges.diff()).float()


def relative_squared_error(
    predicted: Float[Tensor, "b s hidden"],
    target: Float[Tensor, "b s hidden"],
    weights: Float[Tensor, " s"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of the squared error of a token divided by the squared norm of its target.

    ``weights`` are those of the positions (None: equal); their mean must be 1.
    """
    errors = (predicted - target).square().sum(-1) / target.square().sum(-1)
    return (errors if weights is None else errors * weights).mean()


@torch.no_grad()
def error_of(
    block: Block,
    inputs: Float[Tensor, "sequences length d_in"],
    outputs: Float[Tensor, "sequences length d_out"],
    batch: int,
) -> float:
    """Return the mean `relative_squared_error` of ``block(inputs)`` to ``outputs``.  ``batch`` only bounds memory."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(inputs.split(batch), outputs.split(batch), strict=True)
    return sum(float(relative_squared_error(block(x), y)) * len(x) for x, y in pairs) / len(inputs)
