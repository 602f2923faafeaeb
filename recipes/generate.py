"""A real model answers from a long prompt that is sharded over context-parallel ranks.

    python -m recipes.generate mesh.ring=2 prompt.file=book.txt prompt.tokens=4000 max_new_tokens=64

Prints the text and a table of figures; ``out=FILE.json`` writes them.  Started plainly it starts its own
local ranks; under torchrun or srun it is one of the ranks that are there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.attention.backends import kernel_for
from longctx.data.prompt import prompt_tokens
from longctx.parallel.launch import Rank
from longctx.parallel.mesh import refuse_unfit, refuse_unused
from longctx.parallel.strategy import STRATEGIES
from longctx.pretrained import locate, shape_of, tensor_files, tokenizer_of
from longctx.schema import Context, Mesh, ModelShape, ModelSource, PromptSource, Sampling
from recipes.machine import provenance
from recipes.progress import Progress
from recipes.start import (
    console,
    main,
    on_ranks,
    refuse_unwritable,
    say,
    section,
    threads_for,
    top_level,
    warm_up_ranks,
    written,
)


@dataclass(frozen=True)
class Settings:
    """The settings of configs/generate.yaml that are not a section of their own."""

    max_new_tokens: PositiveInt
    verify: bool
    threads: PositiveInt | None
    device: Literal["cpu", "cuda"]
    timeout_minutes: PositiveInt
    out: str | None


@dataclass(frozen=True)
class Job:
    """What every rank needs to know: plain values, checked before any rank starts."""

    model: ModelSource
    folder: Path
    shape: ModelShape
    mesh: Mesh
    context: Context
    sampling: Sampling
    prompt: tuple[int, ...]
    settings: Settings


def prepare(config: DictConfig) -> Job:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    mesh = section(config, "mesh", Mesh)
    refuse_unused(mesh, "recipes.generate", ("dp", "pp"))
    context, sampling = section(config, "context", Context), section(config, "sampling", Sampling)
    model, source = section(config, "model", ModelSource), section(config, "prompt", PromptSource)
    settings = top_level(config, Settings)
    if context.strategy not in STRATEGIES:
        raise ValueError(
            f"context.strategy={context.strategy} chooses for every turn of a conversation: "
            f"use recipes.chat, or one of {', '.join(STRATEGIES)}"
        )
    kernel_for(context.kernel, settings.device, model.dtype)
    refuse_unwritable(settings.out)
    folder = locate(model, say)
    tensor_files(folder)  # refuses a folder without weights
    shape = shape_of(folder)
    refuse_unfit(mesh, shape)
    prompt, text = prompt_tokens(source, tokenizer_of(folder))
    refuse_lengths(len(prompt), text, settings.max_new_tokens, mesh, shape)
    return Job(
        model=model,
        folder=folder,
        shape=shape,
        mesh=mesh,
        context=context,
        sampling=sampling,
        prompt=tuple(prompt),
        settings=settings,
    )


def refuse_lengths(prompt: int, text: int, new_tokens: int, mesh: Mesh, shape: ModelShape) -> None:
    """ValueError if the prompt is too long for the model, or too short for the ranks; ``text`` of it can be cut."""
    if new_tokens >= shape.positions:
        raise ValueError(f"max_new_tokens={new_tokens} fills the model's context of {shape.positions:,}: ask for fewer")
    if (over := prompt + new_tokens - shape.positions) > 0:
        raise ValueError(
            f"the prompt has {prompt:,} tokens, and with max_new_tokens={new_tokens} that is {over:,} more than the "
            f"model's context of {shape.positions:,}: cut its text with prompt.tokens={max(1, text - over)}"
        )
    if prompt < mesh.context:
        raise ValueError(
            f"mesh.ulysses x mesh.ring = {mesh.context} ranks for a prompt of {prompt} tokens: "
            f"use at most {prompt} ranks, or a longer prompt"
        )


def run_rank(rank: Rank, job: Job) -> dict[str, Any]:
    """One rank's part of ``job``, and its figures: those of the first rank count."""
    from longctx.infer.engine import load_alone, load_engine
    from longctx.infer.generate import gather_figures, logit_difference
    from longctx.infer.session import Session
    from longctx.megatron.runtime import runtime

    threads = threads_for(job.settings.threads, rank)
    with runtime(
        rank, job.mesh, threads=threads, timeout_minutes=job.settings.timeout_minutes, device=job.settings.device
    ) as here:
        with Progress(shown=rank.rank == 0) as progress:
            progress.start("loading", None)
            engine = load_engine(here, job.model, job.shape, job.folder, job.context.kernel)
            progress.start(f"prefill of {len(job.prompt):,} tokens, layers", job.shape.layers)
            session = Session(engine, job.context, job.sampling)
            made = session.turn(
                {0: job.prompt},
                {0: job.settings.max_new_tokens},
                layer_done=progress.step,
                token_done=lambda _: progress.step("decode, tokens", job.settings.max_new_tokens),
            )
            difference = None
            if job.settings.verify:
                progress.start("the same on one rank, layers", job.shape.layers)
                torch.set_num_threads(threads * rank.neighbours)  # the other ranks are waiting
                alone = load_alone(here, engine, job.model, job.folder) if rank.rank == 0 else None
                difference = logit_difference(engine, alone, torch.tensor(job.prompt), made, layer_done=progress.step)
        figures = gather_figures(engine, [made.prefill_bytes, made.decode_bytes, session.cache_bytes])
    prefill_bytes, decode_bytes, cache_bytes = map(list, zip(*figures, strict=True))
    return {
        "token_ids": made.tokens[0],
        "ttft_s": made.ttft_s,
        "tokens_per_s": 1 / made.ttit_s if made.ttit_s else None,
        "ttit_s": made.ttit_s,
        "prefill_tokens_per_s": len(job.prompt) / made.ttft_s,
        "kv_cache_bytes_per_rank": cache_bytes,
        "prefill_bytes_sent_per_rank": prefill_bytes,
        "decode_bytes_sent_per_rank": decode_bytes,
        "max_logit_diff": difference,
        "layers": engine.layers,
        "kernel": engine.kernel.name,
        "threads_per_rank": threads,
    }


def describe(job: Job, figures: dict[str, Any]) -> dict[str, Any]:
    """The result as it is written: what was asked, what came out, what it cost."""
    return {
        "model": job.model.name,
        "text": tokenizer_of(job.folder).decode(figures["token_ids"], skip_special_tokens=True),
        "tokens": len(job.prompt),
        "new_tokens": len(figures["token_ids"]),
        "ranks": job.mesh.ranks,
        "mesh": vars(job.mesh),
        "strategy": job.context.strategy,
        "decode_strategy": job.context.decode,
        "layout": job.context.layout,
        "sampling": vars(job.sampling),
        "dtype": job.model.dtype,
        **figures,
        **provenance(),
        "prompt_token_ids": list(job.prompt),
    }


def show(result: dict[str, Any]) -> None:
    """The text, and the figures as a table."""
    console.rule("answer")
    print(result["text"], flush=True)
    console.rule("figures")
    table = Table(show_header=False, box=None)
    for name, value in rows(result):
        table.add_row(name, value)
    console.print(table)


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table, in words."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1) or "one rank"
    rate, difference = result["tokens_per_s"], result["max_logit_diff"]
    return [
        ("tokens", f"{result['tokens']:,} in the prompt, {result['new_tokens']} new"),
        ("ranks", f"{result['ranks']} ({mesh}), {result['threads_per_rank']} thread(s) each"),
        ("strategy", f"{result['strategy']}, {result['layout']}; decode {result['decode_strategy']}"),
        ("layers, kernel", f"megatron-core {result['layers']}, {result['kernel']}"),
        ("time to first token", f"{result['ttft_s']:.2f} s ({result['prefill_tokens_per_s']:,.0f} tokens/s)"),
        ("decode", f"{rate:.1f} tokens/s" if rate else "one token only"),
        ("KV cache per rank", in_megabytes(result["kv_cache_bytes_per_rank"])),
        ("sent per rank, prefill", in_megabytes(result["prefill_bytes_sent_per_rank"])),
        ("sent per rank, decode", in_megabytes(result["decode_bytes_sent_per_rank"])),
        (
            "largest logit difference",
            "not asked for" if difference is None else f"{difference:.1e} against one rank, over the whole prompt",
        ),
    ]


def in_megabytes(sizes: list[int]) -> str:
    """Each rank's bytes, in rank order."""
    return " | ".join(f"{size / 1e6:,.2f}" for size in sizes) + " MB"


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; write and show what the first one gives."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.generate", "recipes.progress"])
    job = prepare(config)
    figures = on_ranks(job.mesh, run_rank, job)
    if figures is None:
        return
    result = describe(job, figures)
    show(result)
    if job.settings.out:
        written(job.settings.out, result)


if __name__ == "__main__":
    main("generate", task)
