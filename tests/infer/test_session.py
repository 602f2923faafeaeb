"""Sessions of several sequences decode the tokens of transformers, on any mesh and through saves and restores."""

import random
import re
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
from tests.infer.talk import Decode, Drop, Save, Say, Segment, Step, play, run_failing_turn
from tests.tiny import tiny_model

POSITIONS = 499
LAYERS, HEADS, HEAD_DIM = 2, 9, 4  # the model of tests/tiny.py
MIN_TURNS, MAX_TURNS = 11, 17  # between restores
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
        ("pass_q", "sharded", "striped", 1),
    ]
]


contexts = st.sampled_from(CONTEXTS)
prompts = st.binary(min_size=1, max_size=23)
counts = st.sampled_from([0, 1, 3, 5])


def some(sequences: Iterable[int]) -> st.SearchStrategy[list[int]]:
    """Draw one to three of ``sequences``."""
    return st.lists(st.sampled_from(sorted(sequences)), min_size=1, max_size=3, unique=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("session") / "tiny", max_positions=POSITIONS)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@torch.inference_mode()
def check(
    reference: Any, tokens: dict[int, list[int]], steps: Sequence[Step], decoded: Sequence[dict[int, list[int]]]
) -> None:
    """Assert that the tokens ``decoded`` in ``steps`` are those of transformers' greedy decoding.

    ``tokens`` are the tokens of each sequence before the steps; they are updated by the steps.
    """
    results = iter(decoded)
    for step in steps:
        if isinstance(step, Drop):
            del tokens[step.sequence]
        if isinstance(step, Save | Drop):
            continue
        new = step.prompts if isinstance(step, Say) else {i: [] for i in step.sequences}
        limits = step.max_new_tokens if isinstance(step, Say) else dict.fromkeys(step.sequences, step.steps)
        result = next(results)
        assert result.keys() == new.keys()
        for i, prompt in new.items():
            before = tokens.get(i, []) + prompt
            tokens[i] = before + result[i]
            # One forward pass predicts the token after each prefix, so the first wrong token is the first difference.
            following = reference(torch.tensor([tokens[i]])).logits[0].argmax(-1).tolist()
            assert result[i] == following[len(before) - 1 :][: limits[i]], f"sequence {i}, after {len(before)} tokens"
    assert next(results, None) is None


def while_not_due(holds: Callable[["Course"], Any]) -> Any:
    """Precondition of a rule: ``holds``, and the segment has fewer than `MAX_TURNS` turns."""
    return precondition(lambda self: not self.due and holds(self))


class Course(RuleBasedStateMachine):
    """A random course of turns, saves and restores of a session.  Rules collect steps, and ranks then run them.

    The steps of a segment run on one mesh, when the session is restored on another mesh and at the end.  A restore
    returns to the last save.  It can happen after `MIN_TURNS` turns, and no other rule applies after `MAX_TURNS`,
    because ranks take seconds to start.  Hypothesis disables some rules in each course; a course that therefore cannot
    be restored ends early, and another one starts.
    """

    def __init__(self, folder: Path, reference: Any, scratch: Path, turns: list[int]) -> None:
        super().__init__()
        self.folder, self.reference, self.saved_to, self.turns = folder, reference, scratch / "talk", turns
        self.turns.append(0)
        self.steps: list[Step] = []
        self.load_from: Path | None = None
        self.tokens: dict[int, list[int]] = {}  # by sequence, before the steps
        # By sequence, after the steps: length, and whether the last token was decoded.
        self.existing: dict[int, tuple[int, bool]] = {}
        # At the last save: number of steps before it, and `existing`.
        self.saved: tuple[int, dict[int, tuple[int, bool]]] | None = None

    @initialize(order=st.permutations(MESHES), context=contexts)
    def begin(self, order: list[Mesh], context: Context) -> None:
        assume(order != MESHES)  # Hypothesis' first course repeats one byte in all prompts
        self.meshes, self.context = cycle(order), context
        self.mesh = next(self.meshes)

    def turn(self, prompts: dict[int, bytes], counts: dict[int, int]) -> None:
        lengths = {i: self.existing.get(i, (0, False))[0] + len(prompts[i]) + counts[i] for i in prompts}
        fit = [i for i in prompts if lengths[i] <= POSITIONS]
        if fit:
            self.steps.append(Say({i: list(prompts[i]) for i in fit}, {i: counts[i] for i in fit}))
            self.existing |= {i: (lengths[i], counts[i] > 0) for i in fit}

    @while_not_due(lambda self: len(self.existing) < 4)
    @rule(prompt=prompts, count=counts)
    def add(self, prompt: bytes, count: int) -> None:
        new = next(i for i in range(5) if i not in self.existing)
        self.turn({new: prompt}, {new: count})

    @while_not_due(lambda self: self.existing)
    @rule(data=st.data())
    def say(self, data: st.DataObject) -> None:
        drawn = data.draw(some(self.existing))
        self.turn({i: data.draw(prompts) for i in drawn}, {i: data.draw(counts) for i in drawn})

    @while_not_due(lambda self: self.decodable)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def decode(self, data: st.DataObject, steps: int) -> None:
        drawn = data.draw(some(self.decodable))
        self.steps.append(Decode(tuple(drawn), steps))
        self.existing |= {i: (self.existing[i][0] + steps, True) for i in drawn}

    @property
    def decodable(self) -> list[int]:
        """Sequences whose last token was decoded and that have room for three more."""
        return [i for i, (length, was_decoded) in self.existing.items() if was_decoded and length + 3 <= POSITIONS]

    @while_not_due(lambda self: len(self.existing) > 2)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.existing)))
        self.steps.append(Drop(sequence))
        del self.existing[sequence]

    @precondition(lambda self: self.turns_since(self.cut) >= 3)
    @rule()
    def save(self) -> None:
        self.steps.append(Save(self.saved_to))
        self.saved = len(self.steps), dict(self.existing)

    @property
    def cut(self) -> int:
        """Number of steps before the last save."""
        return self.saved[0] if self.saved else 0

    def turns_since(self, step: int) -> int:
        return sum(isinstance(one, Say) for one in self.steps[step:])

    @property
    def due(self) -> bool:
        return self.turns_since(0) >= MAX_TURNS

    @precondition(lambda self: self.cut and self.turns_since(0) >= MIN_TURNS)
    @rule(context=contexts)
    def restore_elsewhere(self, context: Context) -> None:
        assert self.saved
        self.play()
        self.mesh, self.context, self.load_from = next(self.meshes), context, self.saved_to
        self.tokens, self.existing, self.saved = self.tokens_at_save, dict(self.saved[1]), (0, self.saved[1])

    def play(self) -> None:
        """Run the collected steps on ranks, and check their tokens up to the last save and after it."""
        steps, self.steps = tuple(self.steps), []  # after a failure they must not run again
        segment = Segment(self.mesh, self.context, steps)
        record = run_ranks(self.mesh.ranks, play, self.folder, segment, self.load_from)[0]
        first = sum(isinstance(step, Say | Decode) for step in steps[: self.cut])
        check(self.reference, self.tokens, steps[: self.cut], record.tokens[:first])
        self.tokens_at_save = dict(self.tokens)
        check(self.reference, self.tokens, steps[self.cut :], record.tokens[first:])
        self.turns[-1] += sum(isinstance(step, Say) for step in steps)

    def teardown(self) -> None:
        if self.steps and not self.due:
            self.play()


def test_random_courses_decode_the_tokens_of_transformers(model, reference, tmp_path_factory):
    turns: list[int] = []
    few = settings(
        max_examples=2, stateful_step_count=89, derandomize=True, deadline=None, phases=[Phase.generate], database=None
    )
    run_state_machine_as_test(lambda: Course(model, reference, tmp_path_factory.mktemp("course"), turns), settings=few)
    assert max(turns) >= 40, "all courses were short"


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda c: f"{c.strategy}-{c.decode}-{c.layout}-{c.chunk}")
@pytest.mark.parametrize("mesh", [Mesh(ring=3), Mesh(ring=2, ulysses=3)], ids=str)
def test_three_turns_of_a_ragged_batch(model, reference, mesh, context):
    """Every strategy of prefill and decode: exact tokens, balanced cached rows, and the bytes of `gather_merge`."""
    draw = random.Random(1)
    lengths = [{0: 37, 1: 1, 2: 13}, {1: 29}, {0: 2, 2: 17}]
    steps = [
        Say({i: [draw.randrange(256) for _ in range(n)] for i, n in turn.items()}, {i: 3 + i for i in turn})
        for turn in lengths
    ]
    records = run_ranks(mesh.ranks, play, model, Segment(mesh, context, tuple(steps)), None)
    check(reference, {}, steps, records[0].tokens)
    assert all(record.tokens == records[0].tokens for record in records)
    if context.chunk is None:
        for rows in records[0].rows:
            assert max(rows) - min(rows) <= 37 // (2 * mesh.ring) + 1, "ranks differ by more than a chunk"
    if context.decode == "gather_merge":
        for turn, (_, decode_bytes) in zip(records[0].tokens, records[0].bytes, strict=True):
            rows = sum(len(tokens) - 1 for tokens in turn.values())  # the prefill gives each first token
            row_bytes = HEADS // mesh.ulysses * (HEAD_DIM + 1) * 4
            assert decode_bytes == (mesh.ranks - 1) * LAYERS * rows * row_bytes


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("too long", "the model's context is 499"),
        ("in the middle", "a fault"),
        ("not finite", "no token can be chosen.* layer 1 is the first with such keys or values"),
    ],
)
def test_failed_turn_restores_the_session(model, fault, message):
    step = Say({0: [5, 6, 7, 8, 9, 10, 11], 3: [1, 2, 3]}, {0: 3, 3: 4})
    for failing, control, error in run_ranks(2, run_failing_turn, model, Mesh(ring=2), step, fault):
        assert failing == control
        assert re.search(message, error)
