"""Gemma 3 with dropped reductions: how rank r's MLP should estimate its input, by block error and by perplexity.

One process splits the heads and neurons of a transformers model over ``ranks``; KV heads need not be split.

python -m recipes.bench output_norms model=gemma3_270m out=output_norms.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import DataSettings, TextSource
from longctx.hf.config import family_in
from longctx.models import FAMILIES
from longctx.perplexity import perplexity
from longctx.shapes import Float, Tensor
from longctx.spd.plan import within
from longctx.spd.text import PackedText
from recipes.common.cli import console, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.spd_text import text_of
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hidden = Float[Tensor, "b s hidden"]
BATCH = 4  # sequences per pass


@dataclass(frozen=True)
class OutputNormsSettings:
    """Top-level settings of configs/bench/output_norms.yaml, other than the two lists of texts."""

    ranks: Annotated[int, Field(ge=2)] = 2
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.25, 0.5, 0.75, 1)
    length: PositiveInt = 512
    sequences: PositiveInt = 4
    out: str | None = None


@dataclass(frozen=True)
class OutputNormsJob:
    """The inputs of the benchmark; ``fitted_on`` is the text on which factors are fitted and blocks ordered.

    Perplexities are measured on the text ``held_out``.
    """

    settings: OutputNormsSettings
    target: Target
    fitted_on: PackedText
    held_out: PackedText


@dataclass(frozen=True)
class Sums:
    """Attention outputs of a Gemma 3 block after its norm: each rank's own, and that of the sum over ranks.

    P_r is rank r's partial attention output, and N_a the block's norm of the attention output, which comes before the
    residual sum.  ``own[r]`` is N_a(P_r), ``full`` is N_a(sum of P_r), and ``x`` is the block's input.
    """

    x: Hidden
    own: list[Hidden]
    full: Hidden

    def fit(self) -> list[float]:
        """Return each rank's factor c for which c N_a(P_r) is nearest to N_a(sum of P_r), by weighted least squares.

        A token's weight is 1 / |x + N_a(sum)|^2.
        """
        precision = 1 / (self.x + self.full).square().sum(-1, keepdim=True)
        return [float((precision * n * self.full).sum() / (precision * n * n).sum()) for n in self.own]


# Estimates by name: functions of a block's sums and fitted factors; they return, by rank, the term that its MLP reads
# besides x.
ESTIMATES: dict[str, Callable[[Sums, list[float]], list[Hidden]]] = {
    "x + N_a(P_r)": lambda sums, _: sums.own,
    "x + N_a(P_r) times a fitted factor": lambda sums, fitted: [c * n for c, n in zip(fitted, sums.own, strict=True)],
    "x + N_a(P_r) / sqrt(ranks)": lambda sums, _: [n / len(sums.own) ** 0.5 for n in sums.own],
    "x + N_a(P_r) / ranks": lambda sums, _: [n / len(sums.own) for n in sums.own],
    "x": lambda sums, _: [torch.zeros_like(sums.x)] * len(sums.own),
}


def partial_attention(layer: Any, x: Hidden, known: dict[str, Any], ranks: int) -> Sums:
    """Return the `Sums` of a Gemma 3 block with input ``x``, its heads split over ``ranks``.

    ``known`` has the attention's other keyword arguments.
    """
    heads: list[Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    try:
        layer.self_attn(hidden_states=layer.input_layernorm(x), **known)
    finally:
        hook.remove()
    norm, weight = layer.post_attention_layernorm, layer.self_attn.o_proj.weight
    shares = zip(heads[0].tensor_split(ranks, -1), weight.tensor_split(ranks, 1), strict=True)
    partials = [own @ columns.T for own, columns in shares]
    return Sums(x, [norm(p) for p in partials], norm(sum(partials)))


def output(layer: Any, sums: Sums, added: list[Hidden]) -> Hidden:
    """Return the output of block ``layer`` if rank r's MLP reads its input x plus ``added[r]``.

    ``added[r]`` is rank r's estimate of the attention output.  Both output norms apply to the sums over ranks.
    """
    mlp, norm, ranks = layer.mlp, layer.pre_feedforward_layernorm, len(added)
    gates, ups = mlp.gate_proj.weight.tensor_split(ranks), mlp.up_proj.weight.tensor_split(ranks)
    downs = mlp.down_proj.weight.tensor_split(ranks, 1)
    reduced = torch.zeros_like(sums.x)
    for y, gate, up, down in zip(added, gates, ups, downs, strict=True):
        normed = norm(sums.x + y)
        reduced += (mlp.act_fn(normed @ gate.T) * (normed @ up.T)) @ down.T
    changed: Hidden = sums.x + sums.full + layer.post_feedforward_layernorm(reduced)
    return changed


def relative_squared_error(out: Hidden, exact: Hidden) -> float:
    """Return the mean over tokens of |out - exact|^2 / |exact|^2."""
    return float(((out - exact).square().sum(-1) / exact.square().sum(-1)).mean())


@contextmanager
def blocks_replaced(
    net: PreTrainedModel, change: Callable[[int, Any, Hidden, dict[str, Any], Hidden], Any]
) -> Iterator[None]:
    """In the ``with`` block, replace each layer's output by ``change(number, layer, x, keywords, output)``.

    ``x`` is the layer's input, ``keywords`` its other arguments, and ``output`` its unchanged output, which stays if
    ``change`` returns None.  Layers count from 0.
    """

    def hook(i: int, layer: Any, args: Any, kwargs: dict[str, Any], out: Hidden) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return change(i, layer, x, {key: value for key, value in kwargs.items() if key != "hidden_states"}, out)

    layers = net.model.layers
    hooks = [layer.register_forward_hook(partial(hook, i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def block_errors(
    net: PreTrainedModel, text: PackedText, ranks: int
) -> tuple[list[list[float]], dict[str, list[float]]]:
    """Return the fitted factors by block and rank, and the errors by estimate and block.

    An error is for one block that drops its reduction: the mean over tokens of |out - exact|^2 / |exact|^2 of its
    output.

    An estimate (`ESTIMATES`) is what a rank adds to its MLP's input in place of N_a(sum of P_r).  The factors are those
    of `Sums.fit`.
    """
    factors: list[list[float]] = []
    errors: dict[str, list[float]] = {name: [] for name in ESTIMATES}

    def measure(_: int, layer: Any, x: Hidden, known: dict[str, Any], out: Hidden) -> None:
        sums = partial_attention(layer, x, known, ranks)
        factors.append(sums.fit())
        for name, estimate in ESTIMATES.items():
            errors[name].append(relative_squared_error(output(layer, sums, estimate(sums, factors[-1])), out))

    with blocks_replaced(net, measure):
        net.model(text.tokens, use_cache=False)
    return factors, errors


def mean_loss(net: PreTrainedModel, text: PackedText) -> float:
    """Return the mean loss of ``text`` in nats per token."""
    total = 0.0
    for begin in range(0, len(text), BATCH):
        batch = text[slice(begin, begin + BATCH)]
        hidden = net.model(batch.tokens, use_cache=False).last_hidden_state[batch.mask]
        for states, targets in zip(hidden.split(256), batch.targets[batch.mask].split(256), strict=True):
            total += float(torch.nn.functional.cross_entropy(net.lm_head(states), targets, reduction="sum"))
    return total / int(text.mask.sum())


def losses_of(net: PreTrainedModel, job: OutputNormsJob, done: Callable[[], None]) -> dict[str, Any]:
    """Return ``factors`` and ``errors`` of all blocks, as `block_errors` does, and mean losses of the held-out text.

    ``unchanged_loss`` is that of the unchanged model; ``losses`` has, by estimate, a loss for each of the shares of
    dropped blocks.  An estimate (`ESTIMATES`) is what a rank adds to its MLP's input in place of the sum over ranks.
    Blocks drop in the order of its errors, smallest first.  ``done`` is called after each loss.
    """
    settings = job.settings
    factors, errors = block_errors(net, job.fitted_on, settings.ranks)
    losses: dict[str, list[float]] = {}
    base = mean_loss(net, job.held_out)
    done()
    for name, estimate in ESTIMATES.items():
        order = sorted(range(len(factors)), key=errors[name].__getitem__)
        for share in settings.shares:
            dropped = set(within(tuple(order), share))

            def drop(i: int, layer: Any, x: Hidden, known: dict[str, Any], _: Hidden) -> Hidden | None:
                if i not in dropped:  # noqa: B023, the hooks end with this pass
                    return None
                sums = partial_attention(layer, x, known, settings.ranks)
                return output(layer, sums, estimate(sums, factors[i]))  # noqa: B023

            with blocks_replaced(net, drop):
                losses.setdefault(name, []).append(mean_loss(net, job.held_out))
            done()
    return {"factors": factors, "errors": errors, "unchanged_loss": base, "losses": losses}


def prepare(config: DictConfig) -> OutputNormsJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    lists = ("fitted_on", "texts")
    plain = as_config({name: value for name, value in as_dict(config).items() if name not in lists})
    settings = top_level(plain, OutputNormsSettings)
    refuse_unwritable(settings.out, "out", ())
    target = resolve_target(config, "recipes.bench output_norms", spd="refuse")
    heads = target.shape.heads
    if family_in(target.folder) is not FAMILIES["gemma3_text"]:
        raise ValueError(f"{target.model.name} is not a Gemma 3: use model=gemma3_270m")
    if heads % settings.ranks:
        fit = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(f"ranks={settings.ranks} does not divide the model's {heads} query heads: use one of {fit}")
    fitted_on, held_out = (
        text_of(
            DataSettings(sections(config, name, TextSource), settings.length, batch=1, epochs=1, end_token=False),
            target, settings.sequences, length_setting="length",
        )
        for name in lists
    )  # fmt: skip
    return OutputNormsJob(settings, target, fitted_on, held_out)


def show(measured: dict[str, Any], shares: tuple[float, ...]) -> None:
    """Print a table with a row for each estimate: the errors of blocks, and the perplexity at each of ``shares``."""
    columns = ("rank r's MLP reads", "median error", "largest", *(f"{share:.0%} dropped" for share in shares))
    table = Table(*columns, box=None)
    for name, losses in measured["losses"].items():
        errors = measured["errors"][name]
        words = (f"{perplexity(loss):.2f}" for loss in losses)
        table.add_row(name, f"{median(errors):.4f}", f"{max(errors):.4f}", *words)
    console.print(f"perplexity of the unchanged model: {perplexity(measured['unchanged_loss']):.2f}\n", table)


@torch.no_grad()
def task(config: DictConfig) -> None:
    """Measure in this process; show and write the figures."""
    from transformers import AutoModelForCausalLM

    job = prepare(config)
    net = AutoModelForCausalLM.from_pretrained(job.target.folder, dtype=torch.float32)
    with Progress(shown=True) as progress:
        progress.start("perplexities", 1 + len(ESTIMATES) * len(job.settings.shares))
        measured = losses_of(net, job, progress.step)
    show(measured, job.settings.shares)
    if job.settings.out:
        inputs = {"model": job.target.model.name, "ranks": job.settings.ranks, "shares": job.settings.shares}
        write_result(job.settings.out, {**inputs, **measured, **provenance()})
