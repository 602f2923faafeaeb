"""Answer a long prompt, or a batch of prompts, sharded over context-parallel ranks.

    python -m recipes.generate mesh.ring=2 prompt.file=book.txt prompt.tokens=4000 max_new_tokens=64
    python -m recipes.generate mesh.ring=2 prompts=prompts.jsonl

Prints the text and a table of figures; ``out=FILE.json`` writes them.  Started plainly, it starts local ranks; under
torchrun or srun, this process is one of the launcher's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import PositiveInt
from rich.table import Table

from longctx.config import PromptSource, Reduce, Sampling
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from recipes.common.answers import Answer, decode_answers, in_megabytes
from recipes.common.cli import console, main, on_ranks, warm_up_ranks, write_result
from recipes.common.decode_choice import make_decode_chooser
from recipes.common.hardware_file import read_machine, refuse_more_ranks, refuse_other_rates, refuse_other_threads
from recipes.common.manifest import record, refuse_other_recipe
from recipes.common.places import refuse_unwritable
from recipes.common.predicted import beside, predict_turn, refuse_unpredicted
from recipes.common.progress import Progress, layers_to_run
from recipes.common.prompts import Prompt, read_prompts
from recipes.common.provenance import provenance
from recipes.common.settings import section, top_level
from recipes.common.target import Target, resolve_target, say_unapplied

if TYPE_CHECKING:
    from longctx.cost.machine import Machine
    from longctx.infer.engine import Engine
    from longctx.infer.sample import TokenLogprob
    from longctx.infer.turn import Turn
    from longctx.megatron.runtime import Runtime

RECIPE = "recipes.generate"


@dataclass(frozen=True)
class GenerateSettings:
    """Top-level settings of configs/generate.yaml."""

    prompts: str | None = None
    max_new_tokens: PositiveInt = 64
    n: PositiveInt = 1
    verify: bool | None = None
    hardware: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class GenerateJob:
    """Inputs of every rank: plain values, checked before any rank starts."""

    target: Target
    sampling: Sampling
    prompts: tuple[Prompt, ...]  # one for each answer
    settings: GenerateSettings
    machine: Machine | None = None  # for predictions

    @property
    def verifies(self) -> bool:
        """True if ``verify`` is set, or is None on CPUs, and there is a smaller run to compare logits with.

        That run has one rank.  With dropped or rounded reductions it has one tensor-parallel group, since one rank
        alone computes another function.
        """
        mesh, asked = self.target.mesh, self.settings.verify
        # A model that needs several GPUs does not fit on one.
        verify = self.target.run.device == "cpu" if asked is None else asked
        return verify and (mesh.context > 1 if self.target.inexact else mesh.ranks > 1)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts together; a prompt counts once for each of its ``n`` answers."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


@dataclass(frozen=True)
class GenerateFigures:
    """Answers and measurements of a run.  Lists per rank are in the order of the context ranks, in bytes.

    ``logprobs`` has the log-probabilities of each answer's tokens (None: not asked for).
    ``ttft_s`` is the time to first token, ``ttit_s`` the time from token to token (None: at most one token).
    ``tokens_per_s`` is the rate of decoding, all answers together, without their first tokens (None: as ``ttit_s``).
    ``max_logit_diff`` is the largest logit difference from the same prompts on fewer ranks (None: not compared).
    ``decode_choices`` has the choices of ``context.decode=auto``: strategy and reason, by number of sequences (None: no
    choice was made).
    ``predicted`` has the cost model's ``ttft_s`` and ``ttit_s`` (None: without ``hardware``).
    """

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprob]] | None
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
    decode_choices: dict[int, tuple[str, str]] | None = None
    predicted: dict[str, float | None] | None = None


def prepare(config: DictConfig) -> GenerateJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    from longctx.parallel.validate import refuse_few_tokens  # here, since it imports torch

    target = resolve_target(
        config, RECIPE, unused_axes=("dp", "pp"), decode_by_batch=True, proves_schedule=True, fp8=("block",)
    )
    settings, source = top_level(config, GenerateSettings), section(config, "prompt", PromptSource)
    refuse_unwritable(settings.out)
    refuse_other_recipe(settings.out, RECIPE)
    tokenizer = tokenizer_of(target.folder)
    prompts = read_prompts(settings.prompts, source, tokenizer, settings.max_new_tokens, target.shape)
    answered = tuple(prompt for prompt in prompts for _ in range(settings.n))
    machine = read_machine(settings.hardware) if settings.hardware else None
    refuse_more_ranks(settings.hardware, machine, target.mesh.ranks, "hardware=null")
    if settings.hardware:
        refuse_other_rates(settings.hardware, target.model.dtype)
        refuse_unpredicted(target)
    job = GenerateJob(target, section(config, "sampling", Sampling), answered, settings, machine)
    if settings.n > 1 and job.sampling.temperature == 0:
        raise ValueError(
            f"all n={settings.n} answers would be equal at sampling.temperature=0: use sampling=ancestral or another "
            "temperature, or n=1"
        )
    target.shape.refuse_unknown_token(max(job.sampling.stop_tokens, default=0), "sampling.stop_tokens")
    say_unapplied(target.folder, job.sampling)
    refuse_few_tokens(target.mesh, job.prompt_tokens)
    return job


def run_rank(rank: Rank, job: GenerateJob) -> GenerateFigures:
    """Prefill, decode and verify on one rank; the caller uses the first rank's figures."""
    from longctx.infer.answer import make_stop_check
    from longctx.infer.generate import gather_figures
    from longctx.infer.session import Session

    target, stop = job.target, job.sampling.stop
    with target.runtime(rank) as runtime, Progress(shown=rank.rank == 0) as progress:
        # 1. Load the model.
        progress.start("loading", None)
        engine = target.load_engine(runtime)
        # 2. Prefill all prompts in one pass, then decode them together.
        layers = layers_to_run(target.shape.layers, job.prompt_tokens, target.context.chunk)
        progress.start(f"prefill of {job.prompt_tokens:,} tokens, layers", layers)
        chooser = make_decode_chooser(runtime, target, engine)
        session = Session(engine, target.context, job.sampling, choose_decode=chooser)
        max_new_tokens = {i: prompt.max_new_tokens for i, prompt in enumerate(job.prompts)}
        turn = session.turn(
            {i: prompt.tokens for i, prompt in enumerate(job.prompts)},
            max_new_tokens,
            layer_done=progress.step,
            token_done=lambda _: progress.step("decode, tokens", max(max_new_tokens.values())),
            stopped=make_stop_check(tokenizer_of(target.folder) if stop else None, stop),
            keep_states=job.verifies,
        )
        # 3. Compare the logits of every prompt token with those of fewer ranks.
        difference = _verify(rank, runtime, engine, job, turn, progress) if job.verifies else None
        figures = gather_figures(engine, [turn.prefill_bytes, turn.decode_bytes, session.cache_bytes])
    prefill_bytes, decode_bytes, cache_bytes = map(list, zip(*figures, strict=True))
    prompt_lengths = [len(prompt.tokens) for prompt in job.prompts]
    decoded = sum(len(tokens) - 1 for tokens in turn.tokens.values() if tokens)  # the prefill gave the first tokens
    return GenerateFigures(
        token_ids=[turn.tokens[i] for i in range(len(job.prompts))],
        logprobs=None if job.sampling.logprobs is None else [one.logprobs for one in session.sequences.values()],
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
        decode_choices=session.decode_choices or None,
        predicted=predict_turn(target, job.machine, prompt_lengths, turn, session) if job.machine else None,
    )


def _verify(
    rank: Rank, runtime: Runtime, engine: Engine, job: GenerateJob, turn: Turn, progress: Progress
) -> float | None:
    """Return the largest logit difference against one rank, or one tensor-parallel group for an `inexact` target.

    All ranks must call it; ranks that are not in this reference return None.  Meanwhile, torch uses the CPU threads of
    all local ranks.
    """
    import torch

    from longctx.infer.engine import load_alone
    from longctx.infer.generate import logit_difference

    target = job.target
    ranks = "tensor-parallel group" if target.inexact and target.mesh.tp > 1 else "rank"
    layers = layers_to_run(target.shape.layers, job.prompt_tokens, target.context.chunk)
    progress.start(f"the same on one {ranks}, layers", layers)
    compares = engine.rank == 0 if target.inexact else rank.rank == 0
    prompts = {i: prompt.tokens for i, prompt in enumerate(job.prompts)}
    threads = torch.get_num_threads()
    torch.set_num_threads(target.threads(rank) * rank.local_world_size)  # the other ranks are waiting
    try:
        alone = load_alone(runtime, engine, target.model, target.folder) if compares else None
        chunk = target.context.chunk
        return logit_difference(engine, alone, prompts, turn, progress.step, chunk, runtime.world)
    finally:
        torch.set_num_threads(threads)


def describe(job: GenerateJob, figures: GenerateFigures, answers: Sequence[Answer]) -> dict[str, object]:
    """Return the result to write: settings, figures, and the fields of the only answer.

    With the setting ``prompts``, or with several answers, the key ``answers`` has a list of them instead.
    """
    target = job.target
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
        "dtype": target.model.precision,
        "spd_blocks": list(target.plan.dropped) if target.plan else [],
        "reduce": vars(target.reduce or Reduce()),
        **{name: value for name, value in vars(figures).items() if name not in ("token_ids", "logprobs")},
        **provenance(),
        **({"answers": answers} if job.settings.prompts or len(answers) > 1 else answers[0]),
    }


def show(job: GenerateJob, figures: GenerateFigures, answers: Sequence[Answer]) -> None:
    """Print the text of each answer, and a table of the figures."""
    for number, answer in enumerate(answers, 1):
        console.rule("answer" if len(answers) == 1 else f"answer {number}")
        print(answer["text"], flush=True)
    console.rule("figures")
    table = Table(show_header=False, box=None)
    for name, value in table_rows(job, figures):
        table.add_row(name, value)
    console.print(table)


def table_rows(job: GenerateJob, figures: GenerateFigures) -> list[tuple[str, str]]:
    """Return the rows of the figures table: a name and its value in words."""
    target, context, prompts = job.target, job.target.context, len(job.prompts)
    axes = " x ".join(f"{axis} {n}" for axis, n in vars(target.mesh).items() if n > 1) or "one rank"
    rate, prefill = figures.tokens_per_s, figures.prefill_tokens_per_s
    dropped = target.plan.dropped if target.plan else ()
    new_tokens = sum(map(len, figures.token_ids))
    other = " to other context ranks" if target.mesh.tp > 1 else ""  # tensor-parallel reductions are not counted
    ttft, ttit = (beside(getattr(figures, name), figures.predicted, name) for name in ("ttft_s", "ttit_s"))
    return [
        ("tokens", f"{job.prompt_tokens:,} in {_count(prompts, 'the prompt')}, {new_tokens} new"),
        ("ranks", f"{target.mesh.ranks} ({axes}), {figures.threads_per_rank} thread(s) each"),
        ("strategy", f"{context.strategy}, {context.layout}; decode {context.decode}"),
        *[(f"decode, {n} sequence(s)", f"{name} ({why})") for n, (name, why) in (figures.decode_choices or {}).items()],
        ("layers, kernel", f"megatron-core {figures.layers}, {figures.kernel}"),
        *([("reductions dropped", f"in {len(dropped)} blocks: {', '.join(map(str, dropped))}")] if dropped else []),
        *([("reductions rounded", str(target.reduce))] if target.reduce else []),
        ("time to first token", f"{figures.ttft_s:.2f} s ({prefill:,.0f} tokens/s){ttft}"),
        ("decode", f"{rate:,.{1 if rate >= 1 else 3}f} tokens/s{ttit}" if rate else "one token at most"),
        ("KV cache per rank", in_megabytes(figures.kv_cache_bytes_per_rank)),
        (f"sent per rank{other}, prefill", in_megabytes(figures.prefill_bytes_sent_per_rank)),
        (f"sent per rank{other}, decode", in_megabytes(figures.decode_bytes_sent_per_rank)),
        ("largest logit difference", _difference_in_words(job, figures.max_logit_diff)),
    ]


def _difference_in_words(job: GenerateJob, difference: float | None) -> str:
    mesh, inexact = job.target.mesh, job.target.inexact
    if difference is not None:
        reference = "tp ranks alone" if inexact and mesh.tp > 1 else "one rank"
        return f"{difference:.1e} against {reference}, over {_count(len(job.prompts), 'the whole prompt')}"
    if mesh.ranks == 1:
        return "nothing to compare with: the mesh is one rank"
    if inexact and mesh.ranks == mesh.tp:
        return "nothing to compare with: the mesh is one tensor-parallel group"
    return "not compared; verify=true compares with one rank, which then needs the memory of all"


def _count(prompts: int, singular: str) -> str:
    return singular if prompts == 1 else f"{'all ' if 'whole' in singular else ''}{prompts} prompts"


def task(config: DictConfig) -> None:
    """Check the configuration, run the ranks, then write and show the first rank's result."""
    warm_up_ranks(["longctx.infer.engine", "longctx.infer.generate", "recipes.common.progress"])
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    with record(config, RECIPE, [job.target.folder]):
        figures = on_ranks(job.target.mesh, run_rank, job)
        if figures is None:
            return
        token_ids, stop = figures.token_ids, job.sampling.stop
        answers = decode_answers(tokenizer_of(job.target.folder), job.prompts, token_ids, figures.logprobs, stop)
        if job.settings.out:  # written before the answer is printed: the reader of stdout may have gone
            write_result(job.settings.out, describe(job, figures, answers))
        show(job, figures, answers)


if __name__ == "__main__":
    main("generate", task)
