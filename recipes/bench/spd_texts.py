"""An adapted model's losses on several texts: first tokens, all tokens, worst sequence, attention sink, copying.

python -m recipes.bench spd_texts adapted=outputs/adapted 'texts=[{label:novel,path:novel.txt}]' out=outputs/texts.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.table import Table

from longctx.config import DataSettings, TextSource
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from longctx.perplexity import difference_interval, perplexity
from longctx.shapes import Float, Tensor
from longctx.spd.guards import FIRST_TOKENS, GuardFigures
from longctx.spd.plan import SavedPlan, SPDPlan, within
from longctx.spd.text import PackedText
from recipes.bench.spd_quality import refuse_bad_labels, saved_plan_of
from recipes.common.cli import console, on_ranks, say, warm_up_ranks, write_result
from recipes.common.places import refuse_unwritable
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import as_config, as_dict, sections, top_level
from recipes.common.spd_loop import load_blocks
from recipes.common.spd_text import resolve_spd_target, text_of
from recipes.common.target import Target


@dataclass(frozen=True, kw_only=True)
class ReportedText(TextSource):
    """An item of the setting ``texts``; with ``from_start``, each sequence is the beginning of a document."""

    label: str
    from_start: bool = False


@dataclass(frozen=True)
class TextsSettings:
    """Top-level settings of configs/bench/spd_texts.yaml, other than ``texts``."""

    adapted: str
    out: str
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.25, 0.5)
    length: PositiveInt = 512
    sequences: Annotated[int, Field(ge=2)] = 16


@dataclass(frozen=True)
class TextsJob:
    """The inputs of every rank; ``texts`` by label, ``saved`` is the plan of the adapted folder."""

    settings: TextsSettings
    target: Target
    saved: SavedPlan
    texts: dict[str, PackedText]


@dataclass(frozen=True)
class Increase:
    """Perplexities, and the relative increase from ``original`` to ``repaired`` (0.1: 10 %) with its 95 % interval.

    The interval is Student's over sequences; one sequence has none.
    """

    original: float
    repaired: float
    increase: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TextFigures:
    """Figures of a share of dropped blocks on one text.

    ``perplexities`` has the keys "first 8" and "first 64" (tokens, if sequences are longer), "all" and "worst
    sequence".  The last one is of the sequence that loses most, without an interval.
    ``norm`` compares the first token's largest norm with the original model's: the smallest ratio of all sequences.
    ``copied`` and ``copied_original`` are the shares of random tokens that are predicted when they are repeated.
    """

    perplexities: dict[str, Increase]
    norm: float
    copied_original: float
    copied: float


def prepare(config: DictConfig) -> TextsJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    settings = top_level(as_config({n: v for n, v in as_dict(config).items() if n != "texts"}), TextsSettings)
    target = resolve_spd_target(config, "recipes.bench spd_texts", writes_folder=False)
    refuse_unwritable(settings.out)
    if target.mesh.dp > 1:
        raise ValueError(f"recipes.bench spd_texts has no use for mesh.dp={target.mesh.dp}: use mesh.dp=1")
    saved = saved_plan_of(f"adapted={settings.adapted}", settings.adapted, target, max(settings.shares))
    texts = sections(config, "texts", ReportedText, say)
    refuse_bad_labels([text.label for text in texts])
    return TextsJob(settings, target, saved, {text.label: read_text(text, target, settings) for text in texts})


def read_text(source: ReportedText, target: Target, settings: TextsSettings) -> PackedText:
    """Return the sequences of the text ``source``: packed (`text_of`), or the beginnings of its documents.

    Raises ValueError as `text_of` and `beginnings_of` do.
    """
    data = DataSettings((source,), settings.length, batch=1, epochs=1, end_token=False)
    if not source.from_start:
        return text_of(data, target, settings.sequences, length_setting="length")
    return beginnings_of(data, target, settings.sequences)


def beginnings_of(data: DataSettings, target: Target, sequences: int) -> PackedText:
    """Return the first data.length tokens and targets of each of the first ``sequences`` documents.

    Only the first source of ``data`` is read.  Shorter documents are padded; the padding does not count in the loss.
    Raises ValueError if there are fewer documents, or if one has a single token.
    """
    from longctx.data.documents import documents

    if data.length > target.shape.max_positions:
        raise ValueError(
            f"length={data.length:,} is more than the model's context of {target.shape.max_positions:,}; use less"
        )
    whole: list[list[int]] = [[]]
    for part, _ in documents(data.sources[0], tokenizer_of(target.folder), data)(None):
        whole[-1] += part.tokens[: data.length + 1].tolist()
        if part.ends and len(whole) == sequences:
            break
        if part.ends:
            whole.append([])
    if len(whole) < sequences or min(map(len, whole)) < 2:
        raise ValueError(
            f"{data.sources[0]}: from_start needs sequences={sequences} documents of two tokens or more: give more text"
        )
    padded = torch.zeros(sequences, data.length + 1, dtype=torch.long)
    mask = torch.zeros(sequences, data.length, dtype=torch.bool)
    for row, counted, tokens in zip(padded, mask, whole, strict=True):
        first = tokens[: data.length + 1]
        row[: len(first)] = torch.tensor(first)
        counted[: len(first) - 1] = True
    target.shape.refuse_unknown_token(int(padded.max()))
    return PackedText(padded[:, :-1], padded[:, 1:], mask)


def run_rank(rank: Rank, job: TextsJob) -> dict[str, list[GuardFigures]]:
    """Return the figures of each text, by its label: of the original model, then of each share."""
    from longctx.megatron.hf_io import load as hf_load
    from longctx.megatron.spd.guards import measure_guards
    from longctx.megatron.spd.layer import follow_plan

    shape, shares = job.target.shape, (0.0, *job.settings.shares)
    figures: dict[str, list[GuardFigures]] = {label: [] for label in job.texts}
    with load_blocks(rank, job.target) as (_, blocks), Progress(shown=rank.rank == 0) as progress, torch.no_grad():
        progress.start("texts", len(shares) * len(job.texts))
        for share in shares:
            plan = SPDPlan(shape.layers, job.target.mesh.tp, within(job.saved.order, share), job.saved.plan.own_norms)
            follow_plan(blocks.model, plan)
            folder = Path(job.settings.adapted).expanduser()
            hf_load.load(blocks.model, hf_load.Weights(folder, plan.dropped), shape)
            for label, text in job.texts.items():
                figures[label].append(measure_guards(blocks, list(blocks.model.decoder.layers), text))
                progress.step()
    return figures


def compare(original: GuardFigures, repaired: GuardFigures) -> TextFigures:
    """Return the figures of a repaired model beside those of the original, on the same sequences."""
    length = original.losses.shape[1]
    names = {f"first {n}": n for n in FIRST_TOKENS if n < length} | {"all": length}
    perplexities = {name: _increase(original, repaired, slice(None), n) for name, n in names.items()}
    lost = ((repaired.losses - original.losses) * original.mask).sum(1) / original.mask.sum(1)
    worst = int(lost.argmax())
    perplexities["worst sequence"] = _increase(original, repaired, slice(worst, worst + 1), length)
    norm = float((repaired.first_norms / original.first_norms).min())
    return TextFigures(perplexities, norm, original.copied, repaired.copied)


def _increase(original: GuardFigures, repaired: GuardFigures, sequences: slice, tokens: int) -> Increase:
    """Return the perplexities of both models on the first ``tokens`` tokens of ``sequences``, and the increase."""
    mask = original.mask[sequences, :tokens]
    sums, sums_after = (_sums(one.losses[sequences, :tokens], mask) for one in (original, repaired))
    added, low, high = difference_interval(sums.numpy(), sums_after.numpy(), mask.sum(1).numpy())
    before, after = (perplexity(float(one.sum()) / int(mask.sum())) for one in (sums, sums_after))
    ends = (None, None) if len(mask) == 1 else (perplexity(low) - 1, perplexity(high) - 1)
    return Increase(before, after, perplexity(added) - 1, *ends)


def _sums(losses: Float[Tensor, "b s"], mask: Tensor) -> Float[Tensor, " b"]:
    return (losses.double() * mask).sum(1)


def show(figures: dict[str, list[TextFigures]], shares: Sequence[float]) -> None:
    """Print one table per share: a line per text."""
    for i, share in enumerate(shares):
        names = list(next(iter(figures.values()))[i].perplexities)
        table = Table(f"{share:.0%} dropped, added perplexity, %", *names, "sink", "copied, %", box=None)
        for label, of_text in figures.items():
            one = of_text[i]
            cells = [_cell(one.perplexities[name]) for name in names]
            copied = f"{100 * one.copied_original:.1f} -> {100 * one.copied:.1f}"
            table.add_row(label, *cells, f"{one.norm:.2f}", copied)
        console.print(table)


def _cell(one: Increase) -> str:
    interval = "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return f"{100 * one.increase:+.1f}{interval}"


def task(config: DictConfig) -> None:
    """Run the ranks, then show and write the figures."""
    warm_up_ranks(("longctx.infer.engine", "longctx.megatron.spd.guards", "recipes.common.spd_loop"))
    job = prepare(config)
    measured = on_ranks(job.target.mesh, run_rank, job)
    if measured is None:
        return
    figures = {label: [compare(first, one) for one in others] for label, (first, *others) in measured.items()}
    show(figures, job.settings.shares)
    inputs = {"model": job.target.model.name, "tp": job.target.mesh.tp, "shares": job.settings.shares}
    tokens = {label: int(text.mask.sum()) for label, text in job.texts.items()}
    texts = {label: {"tokens": tokens[label], "shares": list(map(asdict, each))} for label, each in figures.items()}
    write_result(job.settings.out, {**inputs, "texts": texts, **provenance()})
