"""Verdicts, exit codes of the gate, and eval.until=decided, on answers that a function gives in place of ranks."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from eval import run
from eval.answers import responses
from eval.answers.requests import key
from eval.answers.worker import EvalWork
from eval.stats.sequential import sizes_at
from longctx.hf.config import tokenizer_of
from tests.eval.conftest import CHOICES

EXAMPLES = 251
LOST = {"same": 0, "worse": 3, "close": 20}  # a variant loses every so many-th example; 0: none
RunTask = Callable[..., tuple[object, dict]]


def is_right(variant: str, example: int) -> bool:
    """Return True if ``variant`` is right on ``example``.

    The baseline is right on nine of ten examples, and a variant in `LOST` on fewer.
    """
    return example % 10 != 0 and not (LOST.get(variant) and example % LOST[variant] == 1)


@pytest.fixture
def run_task(base_config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunTask:
    """``run_task(*settings)``: exit code and report of the variants in `LOST`, on one task of `EXAMPLES`."""
    data = tmp_path / "sets"
    (data / "arc").mkdir(parents=True)
    lines = [{"query": f"Question: Number {i}?", "choices": CHOICES, "gold": i % 4} for i in range(EXAMPLES)]
    (data / "arc" / "arc_easy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answer(_mesh: object, _function: object, work: EvalWork) -> bool:
        stored = responses.read(work.file).answers
        assert stored.keys().isdisjoint(map(key, work.requests)), "asked twice"
        tokenizer = tokenizer_of(work.variant.target.folder)
        answers = {}
        for request in work.requests:
            example = int(request.question.split()[-1])
            choice = CHOICES.index(tokenizer.decode(request.tokens[request.begin :]).strip())
            wanted = example % 4 if is_right(work.variant.name, example) else (example + 1) % 4
            answers[key(request)] = (-1.0 if choice == wanted else -2.0, False)
        responses.append(work.file, answers, 0, 0.0, "x")
        return False

    monkeypatch.setattr(run, "on_every_rank", answer)
    monkeypatch.setattr(run, "warm_up_ranks", lambda _: None)

    def record(*_: object) -> nullcontext[None]:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "manifest.json").write_text('{"module": "eval.run", "out": "out"}')
        return nullcontext()

    monkeypatch.setattr(run, "record", record)

    def start(*settings: str, variants: tuple[str, ...] = tuple(LOST)) -> tuple[object, dict]:
        # Variants differ in a setting that changes the name of their answers' file.
        items = [{"name": name, "context": {"layout": layout}} for name, layout in zip(variants, LAYOUTS, strict=False)]
        out = tmp_path / "out"
        changes = ["eval.tasks=[arc_easy]", "eval.allowed_drop=0.05", f"eval.data={data}", f"out={out}", *settings]
        config = OmegaConf.merge(base_config, OmegaConf.from_dotlist(changes), {"variants": items})
        code: object = 0
        try:
            run.task(config)
        except SystemExit as leaving:
            code = leaving.code
        return code, json.loads((out / "report.json").read_text())

    return start


LAYOUTS = ("contiguous", "striped", "zigzag")


@pytest.mark.parametrize(
    ("variant", "strict", "code"),
    [
        ("same", True, 0),
        ("close", True, run.GATE_FAILED),
        ("close", False, 0),
        ("worse", True, run.GATE_FAILED),
        ("worse", False, run.GATE_FAILED),
    ],
)
def test_gate_fails_unless_no_worse_and_lets_undecided_pass_if_asked(run_task, variant, strict, code):
    result, report = run_task(f"eval.gate=[{variant}]", f"eval.strict={strict}", variants=(variant,))
    verdicts = {"same": "no worse", "close": "undecided", "worse": "worse"}
    assert (result, report["average"][variant]["verdict"]) == (code, verdicts[variant])


def test_examples_are_added_until_each_variant_is_decided(run_task):
    """A variant with a verdict gets no more requests, and the same command again asks nothing."""
    code, report = run_task("eval.until=decided", "eval.gate=[same]", variants=("same", "worse"))
    average = report["average"]
    sizes = [sizes_at(step, {"": EXAMPLES})[""] for step in range(20)]
    assert code == 0 and report["sequential"]
    assert {name: one["verdict"] for name, one in average.items() if name != "baseline"} == {
        "same": "no worse",
        "worse": "worse",
    }
    assert average["same"]["n"] == 156, "the first size at which an unchanged task excludes a loss of 5 points"
    assert average["worse"]["n"] == 100 and set(sizes) > {100, 156}
    assert average["baseline"]["n"] == 200, "the first 200 decide whether the task counts"
    again, repeated = run_task("eval.until=decided", "eval.gate=[same]", variants=("same", "worse"))
    assert (again, repeated["average"]) == (0, average)


def test_sets_that_end_leave_a_variant_undecided(run_task):
    code, report = run_task("eval.until=decided", "eval.gate=[close]", variants=("close",))
    figures = report["average"]["close"]
    assert code == run.GATE_FAILED
    assert (figures["n"], figures["verdict"], figures["needed"]) == (EXAMPLES, "undecided", None)


def test_margins_are_reported_beside_accuracy(run_task):
    """A right answer is one nat above the others, a wrong one a nat below."""
    _, report = run_task(variants=("worse",))
    figures = report["average"]["worse"]
    assert figures["margin"]["difference"] == pytest.approx(2 * figures["difference"])
