"""Block-to-block distillation: a block that drops its reduction learns the output of the one that does not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn

from longctx.shapes import Float, Tensor

_WARMUP = 10  # steps
Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """``epochs`` over the sequences, ``batch`` of them a step, at a rate that falls from ``lr`` along a cosine."""

    epochs: int
    batch: int
    lr: float
    seed: int = 0


def distil(
    student: Block, parameters: Sequence[nn.Parameter], inputs: Tensor, outputs: Tensor, how: Distillation
) -> Iterator[float]:
    """Train ``parameters``, step by step, until ``student(inputs)`` is close to ``outputs``; the loss of each step.

    ``inputs`` and ``outputs`` are [sequences length hidden]; the student is given [batch length hidden].
    Source: arXiv 2502.20727, 4.2.3.  The loss is `relative_error`, where the paper has the mean squared error: some
    tokens of a Llama are a thousand times larger than others, and would be all that counts.
    """
    optimizer = torch.optim.AdamW(parameters, lr=how.lr, betas=(0.9, 0.99), weight_decay=0.0)
    order = torch.Generator().manual_seed(how.seed)
    steps = how.epochs * (len(inputs) // how.batch)
    for step, rows in enumerate(_batches(len(inputs), how, order)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, how.lr)
        loss = relative_error(student(inputs[rows]), outputs[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def rate_at(step: int, steps: int, lr: float) -> float:
    """The learning rate of a step: warmed up, then falling along a cosine."""
    return lr * min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * cos(pi * step / steps))


def _batches(sequences: int, how: Distillation, order: torch.Generator) -> Iterator[Tensor]:
    for _ in range(how.epochs):
        shuffled = torch.randperm(sequences, generator=order)
        for begin in range(0, sequences - how.batch + 1, how.batch):
            yield shuffled[begin : begin + how.batch]


def relative_error(got: Float[Tensor, "b s hidden"], wanted: Float[Tensor, "b s hidden"]) -> Float[Tensor, ""]:
    """Mean over tokens of the squared error, relative to the token's own square."""
    return ((got - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


@torch.no_grad()
def error_of(block: Block, inputs: Tensor, outputs: Tensor, batch: int) -> float:
    """`relative_error` over all sequences."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(inputs.split(batch), outputs.split(batch), strict=True)
    return sum(float(relative_error(block(x), y)) * len(x) for x, y in pairs) / len(inputs)
