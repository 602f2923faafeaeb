"""A real model answers from a long prompt, or a batch of prompts, that is sharded over context-parallel ranks.

    python -m recipes.generate mesh.ring=2 prompt.file=book.txt prompt.tokens=4000 max_new_tokens=64
    python -m recipes.generate mesh.ring=2 prompts=prompts.jsonl

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
from longctx.config import Context, Mesh, ModelSource, PromptSource, Sampling
from longctx.data.prompt import prompt_tokens
from longctx.data.turns import turns_from
from longctx.hf.checkpoint import tensor_files
from longctx.hf.config import shape_of, tokenizer_of
from longctx.hf.locate import locate
from longctx.model_shape import ModelShape
from longctx.parallel.launch import Rank
from longctx.parallel.strategy import STRATEGIES
from longctx.parallel.validate import refuse_unfit, refuse_unused
from longctx.spd.plan import SPDPlan
from recipes.common.cli import (
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
from recipes.common.manifest import record
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.spd_plan import plan_of


@dataclass(frozen=True)
class GenerateSettings:
    """The settings of configs/generate.yaml that are not a section of their own."""

    prompts: str | None
    max_new_tokens: PositiveInt
    verify: bool
    threads: PositiveInt | None
    device: Literal["cpu", "cuda"]
    timeout_minutes: PositiveInt
    out: str | None


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with, and the most tokens that its answer may have."""

    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class GenerateJob:
    """What every rank needs to know: plain values, checked before any rank starts."""

    model: ModelSource
    folder: Path
    shape: ModelShape
    mesh: Mesh
    context: Context
    sampling: Sampling
    prompts: tuple[Prompt, ...]
    settings: GenerateSettings
    plan: SPDPlan | None = None

    @property
    def verifies(self) -> bool:
        """Whether logits are compared, as asked: there must be ranks that do otherwise than those compared with."""
        return self.settings.verify and (self.mesh.context > 1 if self.plan else self.mesh.ranks > 1)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)


def prepare(config: DictConfig) -> GenerateJob:
    """The job that ``config`` asks for.  Raises ValueError, with what to do instead, if it cannot be done."""
    mesh = section(config, "mesh", Mesh)
    refuse_unused(mesh, "recipes.generate", ("dp", "pp"))
    context, sampling = section(config, "context", Context), section(config, "sampling", Sampling)
    model, source = section(config, "model", ModelSource), section(config, "prompt", PromptSource)
    settings = top_level(config, GenerateSettings)
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
    job = GenerateJob(
        model=model,
        folder=folder,
        shape=shape,
        mesh=mesh,
        plan=plan_of(config, mesh, model, folder, shape),
        context=context,
        sampling=sampling,
        prompts=given_prompts(settings, source, tokenizer_of(folder), shape.max_positions),
        settings=settings,
    )
    if job.prompt_tokens < mesh.context:
        raise ValueError(
            f"mesh.ulysses x mesh.ring = {mesh.context} ranks for a prompt of {job.prompt_tokens} tokens: "
            f"use at most {job.prompt_tokens} ranks, or a longer prompt"
        )
    return job


def given_prompts(settings: GenerateSettings, source: PromptSource, tokenizer: Any, most: int) -> tuple[Prompt, ...]:
    """The prompt that ``source`` describes, or those of the file, a line each, as they stand.

    Raises ValueError if there are none or both, or if one and its answer are longer than ``most``.
    """
    if settings.prompts is None:
        tokens, text = prompt_tokens(source, tokenizer)
        advice = "cut its text with prompt.tokens={}"
        refuse_too_long("", len(tokens), settings.max_new_tokens, most, advice, text)
        return (Prompt(tuple(tokens), settings.max_new_tokens),)
    if also := [name for name, value in vars(source).items() if value is not None]:
        raise ValueError(f"prompts={settings.prompts} and prompt.{also[0]} are both given: use one of them")
    prompts = []
    for turn in turns_from(settings.prompts, settings.max_new_tokens, "prompts"):
        tokens, text = prompt_tokens(PromptSource(text=turn.text), tokenizer)
        advice = "cut its text to {} tokens"
        refuse_too_long(f"{turn.where}: ", len(tokens), turn.max_new_tokens, most, advice, text)
        prompts.append(Prompt(tuple(tokens), turn.max_new_tokens))
    return tuple(prompts)


def refuse_too_long(where: str, prompt: int, new_tokens: int, most: int, advice: str, text: int) -> None:
    """ValueError if prompt and answer are longer than ``most``, with ``advice`` to how many of its ``text`` to cut."""
    if new_tokens >= most:
        raise ValueError(f"{where}max_new_tokens={new_tokens} fills the model's context of {most:,}: ask for fewer")
    if (over := prompt + new_tokens - most) > 0:
        raise ValueError(
            f"{where}the prompt has {prompt:,} tokens, and with max_new_tokens={new_tokens} that is {over:,} more than "
            f"the model's context of {most:,}: {advice.format(max(1, text - over))}"
        )


def run_rank(rank: Rank, job: GenerateJob) -> dict[str, Any]:
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
            engine = load_engine(here, job.model, job.shape, job.folder, job.context.kernel, job.plan)
            progress.start(f"prefill of {job.prompt_tokens:,} tokens, layers", job.shape.layers)
            session = Session(engine, job.context, job.sampling)
            prompts = {i: prompt.tokens for i, prompt in enumerate(job.prompts)}
            most = {i: prompt.max_new_tokens for i, prompt in enumerate(job.prompts)}
            made = session.turn(
                prompts,
                most,
                layer_done=progress.step,
                token_done=lambda _: progress.step("decode, tokens", max(most.values())),
                keep_states=job.verifies,
            )
            difference = None
            if job.verifies:
                progress.start("the same on one rank, layers", job.shape.layers)
                torch.set_num_threads(threads * rank.local_world_size)  # the other ranks are waiting
                # Dropped reductions are no function of one rank: what compares is its tensor-parallel ranks.
                compares = engine.rank == 0 if job.plan else rank.rank == 0
                alone = load_alone(here, engine, job.model, job.folder) if compares else None
                difference = logit_difference(
                    engine, alone, prompts, made, layer_done=progress.step, chunk=job.context.chunk
                )
        figures = gather_figures(engine, [made.prefill_bytes, made.decode_bytes, session.cache_bytes])
    prefill_bytes, decode_bytes, cache_bytes = map(list, zip(*figures, strict=True))
    decoded = sum(len(tokens) - 1 for tokens in made.tokens.values() if tokens)  # the prefill gave the first ones
    return {
        "token_ids": [made.tokens[i] for i in prompts],
        "ttft_s": made.ttft_s,
        "tokens_per_s": decoded / made.decode_s if decoded else None,
        "ttit_s": made.ttit_s,
        "prefill_tokens_per_s": made.new / made.ttft_s,
        "kv_cache_bytes_per_rank": cache_bytes,
        "prefill_bytes_sent_per_rank": prefill_bytes,
        "decode_bytes_sent_per_rank": decode_bytes,
        "max_logit_diff": difference,
        "layers": engine.layers,
        "kernel": engine.kernel.name,
        "threads_per_rank": threads,
    }


def describe(job: GenerateJob, figures: dict[str, Any]) -> dict[str, Any]:
    """The result as it is written: what was asked, what it cost, what came out; of a batch all ``answers``."""
    tokenizer = tokenizer_of(job.folder)
    answers = [
        {
            "text": tokenizer.decode(token_ids, skip_special_tokens=True),
            "prompt_tokens": len(prompt.tokens),
            "token_ids": token_ids,
            "prompt_token_ids": list(prompt.tokens),
        }
        for prompt, token_ids in zip(job.prompts, figures["token_ids"], strict=True)
    ]
    return {
        "model": job.model.name,
        "tokens": job.prompt_tokens,
        "new_tokens": sum(map(len, figures["token_ids"])),
        "ranks": job.mesh.ranks,
        "mesh": vars(job.mesh),
        "strategy": job.context.strategy,
        "decode_strategy": job.context.decode,
        "layout": job.context.layout,
        "sampling": vars(job.sampling),
        "dtype": job.model.dtype,
        "spd_blocks": list(job.plan.dropped) if job.plan else [],
        **{name: value for name, value in figures.items() if name != "token_ids"},
        **provenance(),
        **({"answers": answers} if job.settings.prompts else answers[0]),
    }


def show(result: dict[str, Any]) -> None:
    """The text of each answer, and the figures as a table."""
    answers = result.get("answers", [result])
    for number, answer in enumerate(answers, 1):
        console.rule("answer" if len(answers) == 1 else f"answer {number}")
        print(answer["text"], flush=True)
    console.rule("figures")
    table = Table(show_header=False, box=None)
    for name, value in rows(result):
        table.add_row(name, value)
    console.print(table)


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table, in words."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1) or "one rank"
    rate, difference = result["tokens_per_s"], result["max_logit_diff"]
    nothing = "not asked for"
    if result["ranks"] == 1:
        nothing = "nothing to compare with: this is one rank"
    elif result["spd_blocks"] and mesh == f"tp {result['mesh']['tp']}":
        nothing = "nothing to compare with: the tensor-parallel ranks are alone"
    count, dropped = len(result.get("answers", [result])), result["spd_blocks"]
    prompts, whole = ("the prompt", "the whole prompt") if count == 1 else (f"{count} prompts", f"all {count} prompts")
    return [
        ("tokens", f"{result['tokens']:,} in {prompts}, {result['new_tokens']} new"),
        ("ranks", f"{result['ranks']} ({mesh}), {result['threads_per_rank']} thread(s) each"),
        ("strategy", f"{result['strategy']}, {result['layout']}; decode {result['decode_strategy']}"),
        ("layers, kernel", f"megatron-core {result['layers']}, {result['kernel']}"),
        *([("reductions dropped", f"in {len(dropped)} blocks: {', '.join(map(str, dropped))}")] if dropped else []),
        ("time to first token", f"{result['ttft_s']:.2f} s ({result['prefill_tokens_per_s']:,.0f} tokens/s)"),
        ("decode", f"{rate:.1f} tokens/s" if rate else "one token at most"),
        ("KV cache per rank", in_megabytes(result["kv_cache_bytes_per_rank"])),
        ("sent per rank, prefill", in_megabytes(result["prefill_bytes_sent_per_rank"])),
        ("sent per rank, decode", in_megabytes(result["decode_bytes_sent_per_rank"])),
        (
            "largest logit difference",
            nothing
            if difference is None
            else f"{difference:.1e} against {'tp ranks alone' if dropped else 'one rank'}, over {whole}",
        ),
    ]


def in_megabytes(sizes: list[int]) -> str:
    """Each rank's bytes, in rank order."""
    return " | ".join(f"{size / 1e6:,.2f}" for size in sizes) + " MB"


def task(config: DictConfig) -> None:
    """Refuse what cannot be done; run the ranks; write and show what the first one gives."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    record(config, [job.folder])
    figures = on_ranks(job.mesh, run_rank, job)
    if figures is None:
        return
    result = describe(job, figures)
    show(result)
    if job.settings.out:
        written(job.settings.out, result)


if __name__ == "__main__":
    main("generate", task)
