"""Plans: the predicted time and memory of every mesh, for a model, a machine and a kind of work; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from longctx.config import DataSettings, Mesh, TextSource
from longctx.cost.decode import SHARED_ROWS
from longctx.cost.forward import PassCost, decode_cost, forward_flops, prefill_cost
from longctx.cost.machine import strategies_differ
from longctx.cost.memory import inference_bytes, step_bytes
from longctx.cost.numerals import three_digits
from longctx.cost.step import StepWork, step_cost
from longctx.cost.training import mfu, train_flops
from longctx.parallel.validate import refuse_few_tokens, refuse_unfit
from longctx.spd.plan import refuse_unfit_shape
from recipes.common.plan_question import Question
from recipes.common.spd_plan import refuse_shared_over_tp
from recipes.common.spd_report import NO_DROP

# Words of the recipes' refusals, and those of recipes.plan in their place.
SETTINGS = {"data.batch": "work.batch", "data.length": "work.context", "more text": "a larger work.context"}

# Parts of a pass, in words for the user.
WORDS = {
    "products": "matrix products",
    "weights": "reading the weights",
    "attention": "attention",
    "ring": "communication of the ring",
    "ulysses": "all-to-alls of Ulysses",
    "merge": "exchanges of decoding",
    "tp": "tensor-parallel reductions",
    "experts": "exchanges of expert parallelism",
    "gradients": "reduction of gradients",
    "optimizer": "the optimizer",
    "pipeline": "the pipeline's bubble",
    "overhead": "launches and other overhead",
}


@dataclass(frozen=True)
class Plan:
    """A mesh and a strategy, with what they cost.

    ``seconds`` is the time to first token (prefill), per token (decode), of a turn with its answer (chat) or of a step
    (train).  ``memory_parts`` has a GPU's bytes by part.  ``decode`` is the strategy of decoding, ``answer`` the cost
    of a token of the answer; they are None for work without them.  ``refused`` says why the mesh is not feasible, or
    None.  ``over_limit`` is True if only a limit of the question refuses it.
    """

    question: Question
    mesh: Mesh
    strategy: str
    cost: PassCost
    memory_parts: dict[str, float]
    refused: str | None
    decode: str | None = None
    answer: PassCost | None = None
    over_limit: bool = False

    @property
    def ttit_s(self) -> float | None:
        """Seconds from token to token, None for work without decoded tokens."""
        if self.question.work.kind == "decode":
            return self.cost.seconds
        return self.answer.seconds if self.answer else None

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of the work by part, those of an answer's tokens included."""
        parts = dict(self.cost.parts)
        for name, seconds in self.answer.parts.items() if self.answer else ():
            # The prefill gives an answer's first token.
            parts[name] = parts.get(name, 0.0) + (self.question.work.new_tokens - 1) * seconds
        return parts

    @cached_property
    def seconds(self) -> float:
        """Predicted seconds of the work: the sum of `parts`."""
        return sum(self.parts.values())

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token, None for decode and train."""
        return self.cost.seconds if self.question.work.kind in ("prefill", "chat") else None

    @property
    def memory_gb(self) -> float:
        """Memory of a GPU in GB."""
        return sum(self.memory_parts.values()) / 1e9

    @property
    def error(self) -> float | None:
        """Relative error that 80 % of comparable predictions were within (0.1: 10 %); None without comparable runs.

        Plans with dropped reductions have no comparable runs.  For a turn with its answer, it is the larger one of the
        errors of turns and of decoding.
        """
        question, kinds = self.question, [(self.question.work.kind, self.strategy)]
        if question.numbers(self.mesh).spd_share:
            return None
        if self.decode and question.work.new_tokens > 1:  # the prefill gives an answer's first token
            kinds.append(("decode", self.decode))
        shares = [
            question.machine.expected_error(kind, self.mesh, strategy, question.dtype_bytes) for kind, strategy in kinds
        ]
        known = [share for share in shares if share is not None]
        return max(known) if len(known) == len(kinds) else None

    @property
    def bound(self) -> str:
        """The part that takes most of the time, and its share, in words."""
        name, seconds = max(self.parts.items(), key=lambda part: part[1])
        return f"{WORDS[name]} ({seconds / self.seconds:.0%} of the time)"

    @cached_property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences per second; in a chat, those of answers count too."""
        work = self.question.work
        tokens = {"decode": 1, "chat": work.context + work.new_tokens}.get(work.kind, work.context)
        return work.batch * tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation with causal halving; None if the machine's peak is not known, and for decode.

        For a chat it is that of the prefill.
        """
        work, shape = self.question.work, self.question.shape
        if work.kind == "decode":
            return None
        if work.kind == "train":
            flops: float = train_flops(shape, [work.context] * work.batch, causal=True)
        else:
            flops = forward_flops(shape, [work.context] * work.batch, [work.cached] * work.batch)
        return mfu(flops, self.cost.seconds, self.mesh.ranks, self.question.machine.peak_flops)

    def as_dict(self) -> dict[str, object]:
        """Return the plan as written to ``out``: times in seconds, memory in GB, bytes that a rank sends by axis."""
        strides = {"tp": 1, "ulysses": self.mesh.tp, "ring": self.mesh.tp * self.mesh.ulysses}
        level = self.question.machine.shared_by(self.mesh).level
        return {
            "mesh": vars(self.mesh),
            "strategy": self.strategy,
            "decode": self.decode,
            "seconds": self.seconds,
            "ttft_s": self.ttft_s,
            "ttit_s": self.ttit_s,
            "tokens_per_s": self.tokens_per_s,
            "error": self.error if self.error is not None else "extrapolated",
            "bound": self.bound,
            "seconds_by_part": {WORDS[name]: seconds for name, seconds in self.parts.items() if seconds},
            "memory_gb": self.memory_gb,
            "memory_parts": {name: size / 1e9 for name, size in self.memory_parts.items()},
            "mfu": self.mfu,
            "dropped": self.question.numbers(self.mesh).spd_share,
            "bytes": {axis: size for axis, size in self.cost.bytes.items() if size},
            "links": {axis: level(getattr(self.mesh, axis), stride).name for axis, stride in strides.items()},
        }

    def settings(self) -> dict[str, object]:
        """Return the plan as settings of a recipe: values by dotted name, such as ``mesh.tp``."""
        work = self.question.work
        chosen: dict[str, object] = {f"mesh.{axis}": ranks for axis, ranks in vars(self.mesh).items()}
        if self.decode:
            chosen["context.decode"] = self.decode
        if work.kind != "decode":
            chosen["context.strategy"] = self.strategy
        if work.kind == "train":
            chosen |= {"optim.zero1": work.zero1, "recompute": work.recompute}
        return chosen


def plans_of(question: Question) -> list[Plan]:
    """Return a plan for each strategy on each mesh of all GPUs: feasible plans first, each group fastest first.

    A mesh on which all strategies are equal has a plan for the first one only.
    """
    strategies = question.strategies
    plans = [
        _plan_with_or_without_drops(question, mesh, strategy)
        for mesh in meshes_of(question.gpus, trains=question.work.kind == "train", experts=question.experts)
        for strategy in (strategies if strategies_differ(question.work.kind, mesh) else strategies[:1])
    ]
    return sorted(plans, key=lambda plan: (plan.refused is not None, plan.seconds, plan.memory_gb))


def meshes_of(gpus: int, *, trains: bool, experts: int = 1) -> Iterator[Mesh]:
    """Yield every mesh of ``gpus`` ranks.

    In training (``trains``), ep divides the number of ``experts``.  Otherwise dp, pp and ep are 1, as recipes require.
    """
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, ulysses, dp, pp in product(divisors, divisors, *([divisors] * 2 if trains else [[1]] * 2)):
        if gpus % (taken := tp * ulysses * dp * pp) == 0:
            shared = gpus // tp // pp
            for ep in range(1, (experts if trains else 1) + 1):
                if shared % ep == 0 and experts % ep == 0:
                    yield Mesh(tp=tp, ulysses=ulysses, ring=gpus // taken, dp=dp, pp=pp, ep=ep)


def _plan_with_or_without_drops(question: Question, mesh: Mesh, strategy: str) -> Plan:
    """Return the faster feasible plan of two: blocks drop a reduction as far as they are allowed to, or none does."""
    plans = [_plan(question, mesh, strategy)]
    if question.numbers(mesh).spd_share:
        plans.append(_plan(replace(question, allowed_drop=NO_DROP), mesh, strategy))
    return min(plans, key=lambda plan: (plan.refused is not None, plan.seconds))


def _plan(question: Question, mesh: Mesh, strategy: str) -> Plan:
    work, shape, machine, numbers = question.work, question.shape, question.machine, question.numbers(mesh)
    answer, decode = None, strategy if work.kind == "decode" else None
    if work.kind == "train":
        step = StepWork(
            work.context, work.batch, 1, work.zero1, work.recompute, loss_rows=192, operations=question.operations
        )
        cost = step_cost(shape, mesh, machine, step, strategy, numbers)
        memory = step_bytes(shape, mesh, step, strategy, numbers)
    elif work.kind == "decode":
        cached = [work.context] * work.batch
        cost = decode_cost(shape, mesh, machine, cached, strategy, numbers)
        memory = inference_bytes(shape, mesh, [1] * work.batch, cached, strategy, numbers)
    else:
        new, cached = [work.context] * work.batch, [work.cached] * work.batch
        cost = prefill_cost(shape, mesh, machine, new, cached, strategy, numbers, in_session=work.kind == "chat")
        memory = inference_bytes(shape, mesh, new, cached, strategy, numbers)
        if work.new_tokens:
            decode, answer = _answer_of(question, mesh)
            last = [work.cached + work.context + work.new_tokens] * work.batch  # cached at the end of the answer
            at_end = inference_bytes(shape, mesh, [1] * work.batch, last, decode, numbers)
            memory = max(memory, at_end, key=lambda parts: sum(parts.values()))
    plan = Plan(question, mesh, strategy, cost, memory, None, decode, answer)
    refused = refusal_of(question, mesh, decode)
    limit = None if refused else broken_limit(question, plan)
    return replace(plan, refused=refused or limit, over_limit=limit is not None)


def _answer_of(question: Question, mesh: Mesh) -> tuple[str, PassCost]:
    """Return the faster of the decode strategies that ``context.decode=auto`` chooses from, and its cost per token.

    The cost is that of the token in the middle of the answer.
    """
    work, numbers = question.work, question.numbers(mesh)
    totals = [work.cached + work.context + work.new_tokens // 2] * work.batch  # on average
    names = [name for name in SHARED_ROWS if name == "gather_merge" or (mesh.context > 1 and not numbers.spd_share)]
    costs = {name: decode_cost(question.shape, mesh, question.machine, totals, name, numbers) for name in names}
    return min(costs.items(), key=lambda item: item[1].seconds)


def refusal_of(question: Question, mesh: Mesh, decode: str | None = None) -> str | None:
    """Return the message with which the recipes refuse ``mesh`` for this model and work; None if they accept it.

    It names settings of recipes.plan in place of those of a run (`SETTINGS`).  ``decode`` is the strategy of decoding,
    if any.
    """
    work = question.work
    try:
        refuse_unfit(mesh, question.shape)
        if question.numbers(mesh).spd_share:
            refuse_unfit_shape(question.shape)
            if decode == "sharded" and mesh.context > 1:
                refuse_shared_over_tp(mesh)
        if work.kind == "train":
            _refuse_untrainable(mesh, question)
        elif work.kind != "decode":
            refuse_few_tokens(mesh, work.context * work.batch)
    except ValueError as error:
        message = str(error)
        for of_run, of_plan in SETTINGS.items():
            message = message.replace(of_run, of_plan)
        return message
    return None


def _refuse_untrainable(mesh: Mesh, question: Question) -> None:
    from longctx.data.batches import refuse_uneven_batch
    from recipes.common.train_job import refuse_unsplit

    work = question.work
    refuse_uneven_batch(work.batch, mesh.dp)
    length = min(work.context, question.shape.max_positions)  # beyond it, no mesh helps: the model must change
    refuse_unsplit(mesh, question.shape, DataSettings((TextSource(pydoc="train"),), length, work.batch))


def broken_limit(question: Question, plan: Plan) -> str | None:
    """Return a message on the limit of ``question``, memory or time, that ``plan`` breaks; None if there is none."""
    limit = question.memory_gb
    if limit and plan.memory_gb > limit:
        part, size = max(plan.memory_parts.items(), key=lambda item: item[1])
        name = part.replace("_", " ")
        return f"needs {plan.memory_gb:,.1f} GB of the {limit:,.1f} GB of a GPU ({name} {size / 1e9:,.1f} GB)"
    if question.max_ttft_s and plan.ttft_s and plan.ttft_s > question.max_ttft_s:
        return f"takes {three_digits(plan.ttft_s)} s to the first token, max_ttft_s={question.max_ttft_s:g}"
    return None


def best_by_strategy(question: Question, lengths: Sequence[int]) -> dict[str, list[float | None]]:
    """Return, by strategy, the seconds of the fastest feasible mesh at each of ``lengths`` (values of work.context).

    None: no mesh is feasible, or ``question.strategy`` leaves the strategy out.  A mesh on which all strategies are
    equal, such as one rank, counts for the first strategy only.
    """
    seconds_of: dict[str, list[float | None]] = {name: [] for name in question.work.strategies}
    for length in lengths:
        plans = plans_of(replace(question, work=replace(question.work, context=length)))
        for name, seconds in seconds_of.items():
            seconds.append(next((p.seconds for p in plans if p.strategy == name and p.refused is None), None))
    return seconds_of
