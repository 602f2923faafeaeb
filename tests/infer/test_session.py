"""Sessions of several sequences, on any mesh, through saves and restores: the tokens of transformers."""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from longctx.config import Context, Mesh
from longctx.parallel.launch import run_ranks
from tests.infer.talk import Decode, Drop, Save, Say, Segment, Step, fails_once, play
from tests.tiny import tiny_model

POSITIONS = 499
LEAST, MOST = 11, 17  # turns between restores
MESHES = [
    Mesh(),
    Mesh(ring=2),
    Mesh(ring=3),
    Mesh(ulysses=3),
    Mesh(ulysses=9),
    Mesh(ring=2, ulysses=3),
    Mesh(tp=3),
    Mesh(tp=3, ring=2),
    Mesh(ring=5),
]
CONTEXTS = [
    Context(strategy=strategy, decode=decode, layout=layout, chunk=chunk)
    for strategy, decode, layout, chunk in [
        ("pass_kv", "gather_merge", "zigzag", None),
        ("pass_q", "pass_q", "zigzag", 7),
        ("all_gather_kv", "pass_kv", "striped", None),
        ("pass_kv", "all_gather_kv", "contiguous", 5),
        ("pass_q", "gather_merge", "striped", 1),
    ]
]


contexts = st.sampled_from(CONTEXTS)
prompts = st.binary(min_size=1, max_size=23)
counts = st.sampled_from([0, 1, 3, 5])


def some(sequences: Iterable[int]) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(sorted(sequences)), min_size=1, max_size=3, unique=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("session") / "tiny", max_positions=POSITIONS)


@pytest.fixture(scope="module")
def lone(model: Path) -> Any:
    """The same model, transformers' own."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@torch.inference_mode()
def check(lone: Any, said: dict[int, list[int]], steps: Sequence[Step], seen: Sequence[dict[int, list[int]]]) -> None:
    """What was ``seen`` decoded is what transformers decodes, greedily, from all tokens of a sequence at once.

    ``said`` are the tokens of each sequence so far; it takes part in the steps.
    """
    told = iter(seen)
    for step in steps:
        if isinstance(step, Drop):
            del said[step.sequence]
        if isinstance(step, Save | Drop):
            continue
        new = step.prompts if isinstance(step, Say) else {i: [] for i in step.sequences}
        most = step.max_new_tokens if isinstance(step, Say) else dict.fromkeys(step.sequences, step.steps)
        made = next(told)
        assert made.keys() == new.keys()
        for i, prompt in new.items():
            before = said.get(i, []) + prompt
            said[i] = before + made[i]
            # Of tokens that are right so far the model gives the next one: a token that is not is the first to differ.
            follows = lone(torch.tensor([said[i]])).logits[0].argmax(-1).tolist()
            assert made[i] == follows[len(before) - 1 :][: most[i]], f"sequence {i}, behind {len(before)} tokens"
    assert next(told, None) is None


def while_not_due(holds: Callable[["Course"], Any]) -> Any:
    return precondition(lambda self: not self.due and holds(self))


class Course(RuleBasedStateMachine):
    """A session's course through turns, saves and restores; rules collect its steps, ranks play them.

    They are played, on one mesh, when the session is restored on another, and at the end.  A restore goes back to
    what was saved last; it is due after ``MOST`` turns, and not to be had before ``LEAST``, as ranks take seconds
    to start.  Hypothesis forbids some rules to each course: one that cannot be restored is given up, and another made.
    """

    def __init__(self, folder: Path, lone: Any, scratch: Path, turns: list[int]) -> None:
        super().__init__()
        self.folder, self.lone, self.kept, self.turns = folder, lone, scratch / "talk", turns
        self.turns.append(0)
        self.steps: list[Step] = []
        self.load_from: Path | None = None
        self.said: dict[int, list[int]] = {}  # before the steps
        self.there: dict[int, tuple[int, bool]] = {}  # after them: length, and whether the last token was decoded
        self.saved: tuple[int, dict[int, tuple[int, bool]]] | None = None  # steps before it, and what was there

    @initialize(order=st.permutations(MESHES), context=contexts)
    def begin(self, order: list[Mesh], context: Context) -> None:
        assume(order != MESHES)  # Hypothesis' first course says the same one byte all the time
        self.meshes, self.context = cycle(order), context
        self.mesh = next(self.meshes)

    def turn(self, prompts: dict[int, bytes], counts: dict[int, int]) -> None:
        lengths = {i: self.there.get(i, (0, False))[0] + len(prompts[i]) + counts[i] for i in prompts}
        fit = [i for i in prompts if lengths[i] <= POSITIONS]
        if fit:
            self.steps.append(Say({i: list(prompts[i]) for i in fit}, {i: counts[i] for i in fit}))
            self.there |= {i: (lengths[i], counts[i] > 0) for i in fit}

    @while_not_due(lambda self: len(self.there) < 4)
    @rule(prompt=prompts, count=counts)
    def add(self, prompt: bytes, count: int) -> None:
        new = next(i for i in range(5) if i not in self.there)
        self.turn({new: prompt}, {new: count})

    @while_not_due(lambda self: self.there)
    @rule(data=st.data())
    def say(self, data: st.DataObject) -> None:
        who = data.draw(some(self.there))
        self.turn({i: data.draw(prompts) for i in who}, {i: data.draw(counts) for i in who})

    @while_not_due(lambda self: self.open)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def decode(self, data: st.DataObject, steps: int) -> None:
        who = data.draw(some(self.open))
        self.steps.append(Decode(tuple(who), steps))
        self.there |= {i: (self.there[i][0] + steps, True) for i in who}

    @property
    def open(self) -> list[int]:
        """Sequences whose answer can go on."""
        return [i for i, (length, open_) in self.there.items() if open_ and length + 3 <= POSITIONS]

    @while_not_due(lambda self: len(self.there) > 2)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.there)))
        self.steps.append(Drop(gone))
        del self.there[gone]

    @precondition(lambda self: self.turns_since(self.cut) >= 3)
    @rule()
    def save(self) -> None:
        self.steps.append(Save(self.kept))
        self.saved = len(self.steps), dict(self.there)

    @property
    def cut(self) -> int:
        """Steps before what was saved last."""
        return self.saved[0] if self.saved else 0

    def turns_since(self, step: int) -> int:
        return sum(isinstance(one, Say) for one in self.steps[step:])

    @property
    def due(self) -> bool:
        return self.turns_since(0) >= MOST

    @precondition(lambda self: self.cut and self.turns_since(0) >= LEAST)
    @rule(context=contexts)
    def restore_elsewhere(self, context: Context) -> None:
        assert self.saved
        self.play()
        self.mesh, self.context, self.load_from = next(self.meshes), context, self.kept
        self.said, self.there, self.saved = self.said_then, dict(self.saved[1]), (0, self.saved[1])

    def play(self) -> None:
        steps, self.steps = tuple(self.steps), []  # whatever comes, they are not played again
        segment = Segment(self.mesh, self.context, steps)
        seen = run_ranks(self.mesh.ranks, play, self.folder, segment, self.load_from)[0]
        first = sum(isinstance(step, Say | Decode) for step in steps[: self.cut])
        check(self.lone, self.said, steps[: self.cut], seen.tokens[:first])
        self.said_then = dict(self.said)
        check(self.lone, self.said, steps[self.cut :], seen.tokens[first:])
        self.turns[-1] += sum(isinstance(step, Say) for step in steps)

    def teardown(self) -> None:
        if self.steps and not self.due:
            self.play()


def test_any_course_of_a_session_is_that_of_transformers(model, lone, tmp_path_factory):
    turns: list[int] = []
    few = settings(
        max_examples=2, stateful_step_count=89, derandomize=True, deadline=None, phases=[Phase.generate], database=None
    )
    run_state_machine_as_test(lambda: Course(model, lone, tmp_path_factory.mktemp("course"), turns), settings=few)
    assert max(turns) >= 40, "no course was long"


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: f"{c.strategy}-{c.decode}-{c.layout}-{c.chunk}")
@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ring=2, ulysses=3)], ids=str)
def test_three_turns_of_a_ragged_batch(model, lone, mesh, context):
    """Every strategy of prefill and decode; cached rows stay even."""
    draw = random.Random(1)
    lengths = [{0: 37, 1: 1, 2: 13}, {1: 29}, {0: 2, 2: 17}]
    steps = [
        Say({i: [draw.randrange(256) for _ in range(n)] for i, n in turn.items()}, {i: 3 + i for i in turn})
        for turn in lengths
    ]
    seen = run_ranks(mesh.ranks, play, model, Segment(mesh, context, tuple(steps)), None)
    check(lone, {}, steps, seen[0].tokens)
    assert all(one.tokens == seen[0].tokens for one in seen)
    if context.chunk is None:
        for held in seen[0].held:
            assert max(held) - min(held) <= 37 // (2 * mesh.ring) + 1, "more than a chunk from even"


@pytest.mark.parametrize(("fault", "words"), [("too long", "the model's context is 499"), ("in the middle", "a fault")])
def test_a_turn_that_fails_leaves_the_session_as_it_was(model, fault, words):
    step = Say({0: [5, 6, 7, 8, 9, 10, 11], 3: [1, 2, 3]}, {0: 3, 3: 4})
    for one, other, said in run_ranks(2, fails_once, model, Mesh(ring=2), step, fault):
        assert one == other
        assert words in said
