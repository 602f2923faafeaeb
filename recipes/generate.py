"""Answer a long prompt, or a batch of prompts, sharded over context-parallel ranks.

    python -m recipes.generate mesh.ring=2 prompt.file=book.txt prompt.tokens=4000 max_new_tokens=64
    python -m recipes.generate mesh.ring=2 prompts=prompts.jsonl

Prints the text and a table of figures; ``out=FILE.json`` writes them.  Started plainly, it starts local ranks; under
torchrun or srun, this process is one of the launcher's ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.config import PromptSource, Sampling
from longctx.data.prompt import prompt_tokens
from longctx.data.turns import turns_from
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from recipes.common.cli import console, main, on_ranks, refuse_unwritable, warm_up_ranks, write_result
from recipes.common.manifest import record
from recipes.common.progress import Progress
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.target import Target, resolve_target

if TYPE_CHECKING:
    from longctx.infer.engine import Engine
    from longctx.infer.session import Turn
    from longctx.megatron.runtime import Runtime


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of configs/generate.yaml outside any section."""

    prompts: str | None = None
    max_new_tokens: PositiveInt = 64
    verify: bool = True
    out: str | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and the largest number of tokens of its answer."""

    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class GenerateJob:
    """Inputs of every rank: plain values, checked before any rank starts."""

    target: Target
    sampling: Sampling
    prompts: tuple[Prompt, ...]
    settings: GenerateSettings

    @property
    def verifies(self) -> bool:
        """True if logits are compared with those of fewer ranks: ``verify`` is set and there are ranks to leave out.

        With dropped reductions the tensor-parallel ranks stay, since one rank alone computes another function.
        """
        mesh = self.target.mesh
        return self.settings.verify and (mesh.context > 1 if self.target.plan else mesh.ranks > 1)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts together."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


@dataclass(frozen=True)
class GenerateFigures:
    """Answers and measurements of a run.  Lists per rank are in the order of the context ranks, in bytes.

    ``ttft_s`` is the time to first token, ``ttit_s`` the time from token to token (None: at most one token).
    ``max_logit_diff`` is the largest difference from fewer ranks (None: not compared).
    """

    token_ids: list[list[int]]
    ttft_s: float
    tokens_per_s: float | None
    ttit_s: float | None
    prefill_tokens_per_s: float
    kv_cache_bytes_per_rank: list[int]
    prefill_bytes_sent_per_rank: list[int]
    decode_bytes_sent_per_rank: list[int]
    max_logit_diff: float | None
    layers: str
    kernel: str
    threads_per_rank: int


def prepare(config: DictConfig) -> GenerateJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    target = resolve_target(config, "recipes.generate", unused_axes=("dp", "pp"))
    settings, source = top_level(config, GenerateSettings), section(config, "prompt", PromptSource)
    refuse_unwritable(settings.out)
    prompts = read_prompts(settings, source, tokenizer_of(target.folder), target.shape.max_positions)
    job = GenerateJob(target, section(config, "sampling", Sampling), prompts, settings)
    if job.prompt_tokens < target.mesh.context:
        raise ValueError(
            f"mesh.ulysses x mesh.ring = {target.mesh.context} ranks for a prompt of {job.prompt_tokens} tokens: "
            f"use at most {job.prompt_tokens} ranks, or a longer prompt"
        )
    return job


def read_prompts(
    settings: GenerateSettings, source: PromptSource, tokenizer: Any, max_positions: int
) -> tuple[Prompt, ...]:
    """Return the prompt that ``source`` describes, or one per line of the file ``prompts``.

    Raises ValueError if both or neither are given, or if a prompt and its answer exceed ``max_positions`` tokens.
    """
    if settings.prompts is None:
        tokens, text = prompt_tokens(source, tokenizer)
        advice = "cut its text with prompt.tokens={}"
        refuse_too_long("", len(tokens), settings.max_new_tokens, max_positions, advice, text)
        return (Prompt(tuple(tokens), settings.max_new_tokens),)
    if also := [name for name, value in vars(source).items() if value is not None]:
        raise ValueError(f"prompts={settings.prompts} and prompt.{also[0]} are both given: use one of them")
    prompts = []
    for turn in turns_from(settings.prompts, settings.max_new_tokens, "prompts"):
        tokens, text = prompt_tokens(PromptSource(text=turn.text), tokenizer)
        advice = "cut its text to {} tokens"
        refuse_too_long(f"{turn.where}: ", len(tokens), turn.max_new_tokens, max_positions, advice, text)
        prompts.append(Prompt(tuple(tokens), turn.max_new_tokens))
    return tuple(prompts)


def refuse_too_long(name: str, prompt: int, new_tokens: int, max_positions: int, advice: str, text_tokens: int) -> None:
    """Raise ValueError if ``prompt`` and ``new_tokens`` exceed ``max_positions``; ``advice`` says how to shorten it.

    ``text_tokens`` of the prompt are text that may be cut; the rest is the chat template and the question.
    """
    if new_tokens >= max_positions:
        raise ValueError(
            f"{name}max_new_tokens={new_tokens} fills the model's context of {max_positions:,}: ask for fewer"
        )
    if (over := prompt + new_tokens - max_positions) > 0:
        raise ValueError(
            f"{name}the prompt has {prompt:,} tokens, and with max_new_tokens={new_tokens} that is {over:,} more than "
            f"the model's context of {max_positions:,}: {advice.format(max(1, text_tokens - over))}"
        )


def run_rank(rank: Rank, job: GenerateJob) -> GenerateFigures:
    """Prefill, decode and verify on one rank; the first rank's figures count."""
    from longctx.infer.generate import gather_figures
    from longctx.infer.session import Session

    target = job.target
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        # 1. Load the model.
        progress.start("loading", None)
        engine = target.load_engine(runtime)
        # 2. Prefill all prompts in one pass, then decode them together.
        progress.start(f"prefill of {job.prompt_tokens:,} tokens, layers", target.shape.layers)
        session = Session(engine, target.context, job.sampling)
        max_new_tokens = {i: prompt.max_new_tokens for i, prompt in enumerate(job.prompts)}
        turn = session.turn(
            {i: prompt.tokens for i, prompt in enumerate(job.prompts)},
            max_new_tokens,
            layer_done=progress.step,
            token_done=lambda _: progress.step("decode, tokens", max(max_new_tokens.values())),
            keep_states=job.verifies,
        )
        # 3. Compare the logits of every prompt token with those of fewer ranks.
        difference = _verify(rank, runtime, engine, job, turn, progress) if job.verifies else None
        figures = gather_figures(engine, [turn.prefill_bytes, turn.decode_bytes, session.cache_bytes])
    prefill_bytes, decode_bytes, cache_bytes = map(list, zip(*figures, strict=True))
    decoded = sum(len(tokens) - 1 for tokens in turn.tokens.values() if tokens)  # the prefill gave the first tokens
    return GenerateFigures(
        token_ids=[turn.tokens[i] for i in range(len(job.prompts))],
        ttft_s=turn.ttft_s,
        tokens_per_s=decoded / turn.decode_s if decoded else None,
        ttit_s=turn.ttit_s,
        prefill_tokens_per_s=turn.new / turn.ttft_s,
        kv_cache_bytes_per_rank=cache_bytes,
        prefill_bytes_sent_per_rank=prefill_bytes,
        decode_bytes_sent_per_rank=decode_bytes,
        max_logit_diff=difference,
        layers=engine.layers,
        kernel=engine.kernel.name,
        threads_per_rank=target.threads(rank),
    )


def _verify(
    rank: Rank, runtime: Runtime, engine: Engine, job: GenerateJob, turn: Turn, progress: Progress
) -> float | None:
    """Return the largest logit difference from one rank, or with dropped reductions from one tensor-parallel group."""
    from longctx.infer.engine import load_alone
    from longctx.infer.generate import logit_difference

    target = job.target
    progress.start("the same on one rank, layers", target.shape.layers)
    torch.set_num_threads(target.threads(rank) * rank.local_world_size)  # the other ranks are waiting
    compares = engine.rank == 0 if target.plan else rank.rank == 0
    alone = load_alone(runtime, engine, target.model, target.folder) if compares else None
    prompts = {i: prompt.tokens for i, prompt in enumerate(job.prompts)}
    return logit_difference(engine, alone, prompts, turn, layer_done=progress.step, chunk=target.context.chunk)


def describe(job: GenerateJob, figures: GenerateFigures) -> dict[str, Any]:
    """Return the result to write: settings, figures, and the answer; for a batch, the list ``answers``."""
    target = job.target
    tokenizer = tokenizer_of(target.folder)
    answers = [
        {
            "text": tokenizer.decode(token_ids, skip_special_tokens=True),
            "prompt_tokens": len(prompt.tokens),
            "token_ids": token_ids,
            "prompt_token_ids": list(prompt.tokens),
        }
        for prompt, token_ids in zip(job.prompts, figures.token_ids, strict=True)
    ]
    return {
        "model": target.model.name,
        "tokens": job.prompt_tokens,
        "new_tokens": sum(map(len, figures.token_ids)),
        "ranks": target.mesh.ranks,
        "mesh": vars(target.mesh),
        "strategy": target.context.strategy,
        "decode_strategy": target.context.decode,
        "layout": target.context.layout,
        "sampling": vars(job.sampling),
        "dtype": target.model.dtype,
        "spd_blocks": list(target.plan.dropped) if target.plan else [],
        **{name: value for name, value in vars(figures).items() if name != "token_ids"},
        **provenance(),
        **({"answers": answers} if job.settings.prompts else answers[0]),
    }


def show(result: dict[str, Any]) -> None:
    """Print the text of each answer, and a table of the figures."""
    answers = result.get("answers", [result])
    for number, answer in enumerate(answers, 1):
        console.rule("answer" if len(answers) == 1 else f"answer {number}")
        print(answer["text"], flush=True)
    console.rule("figures")
    table = Table(show_header=False, box=None)
    for name, value in table_rows(result):
        table.add_row(name, value)
    console.print(table)


def table_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the figures table: a name and its value in words."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1) or "one rank"
    prompts = len(result.get("answers", [result]))
    rate, dropped = result["tokens_per_s"], result["spd_blocks"]
    return [
        ("tokens", f"{result['tokens']:,} in {_count(prompts, 'the prompt')}, {result['new_tokens']} new"),
        ("ranks", f"{result['ranks']} ({mesh}), {result['threads_per_rank']} thread(s) each"),
        ("strategy", f"{result['strategy']}, {result['layout']}; decode {result['decode_strategy']}"),
        ("layers, kernel", f"megatron-core {result['layers']}, {result['kernel']}"),
        *([("reductions dropped", f"in {len(dropped)} blocks: {', '.join(map(str, dropped))}")] if dropped else []),
        ("time to first token", f"{result['ttft_s']:.2f} s ({result['prefill_tokens_per_s']:,.0f} tokens/s)"),
        ("decode", f"{rate:.1f} tokens/s" if rate else "one token at most"),
        ("KV cache per rank", in_megabytes(result["kv_cache_bytes_per_rank"])),
        ("sent per rank, prefill", in_megabytes(result["prefill_bytes_sent_per_rank"])),
        ("sent per rank, decode", in_megabytes(result["decode_bytes_sent_per_rank"])),
        ("largest logit difference", _difference_in_words(result, mesh, prompts)),
    ]


def _difference_in_words(result: dict[str, Any], mesh: str, prompts: int) -> str:
    if result["max_logit_diff"] is not None:
        reference = "tp ranks alone" if result["spd_blocks"] else "one rank"
        return f"{result['max_logit_diff']:.1e} against {reference}, over {_count(prompts, 'the whole prompt')}"
    if result["ranks"] == 1:
        return "nothing to compare with: the mesh is one rank"
    if result["spd_blocks"] and mesh == f"tp {result['mesh']['tp']}":
        return "nothing to compare with: the mesh is one tensor-parallel group"
    return "not compared (verify=false)"


def _count(prompts: int, singular: str) -> str:
    return singular if prompts == 1 else f"{'all ' if 'whole' in singular else ''}{prompts} prompts"


def in_megabytes(sizes: list[int]) -> str:
    """Return the bytes of each rank, in rank order, as text in MB."""
    return " | ".join(f"{size / 1e6:,.2f}" for size in sizes) + " MB"


def task(config: DictConfig) -> None:
    """Check the configuration, run the ranks, then write and show the first rank's result."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    record(config, [job.target.folder])
    figures = on_ranks(job.target.mesh, run_rank, job)
    if figures is None:
        return
    result = describe(job, figures)
    show(result)
    if job.settings.out:
        write_result(job.settings.out, result)


if __name__ == "__main__":
    main("generate", task)
