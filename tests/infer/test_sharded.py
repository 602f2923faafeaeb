"""Sharded decoding is exact for every family, and has the expected collectives."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from longctx.attention.layout import contiguous, shard_balanced, zigzag
from longctx.config import Context, Mesh, Sampling
from longctx.cost.decode import exchanges
from longctx.cost.forward import Numbers, decode_work
from longctx.infer.cache import BatchCache, KVCache
from longctx.infer.engine import Engine, next_logits
from longctx.infer.prefill import run_pass, run_replicated
from longctx.infer.session import Session
from longctx.infer.session_index import read_index
from longctx.infer.store import load, save
from longctx.megatron.products import linear
from longctx.megatron.runtime import Runtime
from longctx.model_shape import ModelShape
from longctx.parallel.comm import Comm, Shape
from longctx.parallel.measure import probe
from longctx.parallel.measure.probe import probe_decode
from longctx.parallel.ring import pass_kv
from longctx.parallel.threads import run_threads
from longctx.shapes import AnyShape
from longctx.spd.plan import SPDPlan
from tests import oracle
from tests.float64 import KeepFloat64, float64_model
from tests.infer.talk import Say
from tests.infer.test_session import check
from tests.infer.test_spd import KINDS as DROPPING
from tests.infer.thread_ranks import run_engines, single_rank
from tests.megatron.kinds import SMALL, random_model
from tests.tiny import tiny_model
from tests.train.spd_oracle import drop

PROMPT = [(7 * i * i + 3 * i) % 256 for i in range(23)]
SHARDED = Context(decode="sharded")
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 2, 36, 9, 3, 4, 51, 256  # the model of tests/tiny.py
MESHES = [Mesh(ring=4), Mesh(ulysses=3, ring=2)]  # test_session.py and test_parity.py have others, on processes
# One for each feature of a projection, norm or factor; test_families.py has all kinds, on tp x ring.
ODD_KINDS = (
    "llama with all biases", "qwen2, with biases", "qwen3", "olmo2", "phi3, longrope", "gemma3", "granite",
    "starcoder2", "glm4",
)  # fmt: skip


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with single_rank(tmp_path_factory.mktemp("store")) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", max_positions=499)


@pytest.fixture(scope="module")
def loud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that dropped reductions change the tokens."""
    folder = tmp_path_factory.mktemp("loud")
    net = AutoModelForCausalLM.from_pretrained(tiny)
    for parameter in net.model.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder)
    return folder


def steps_of(lengths: Sequence[dict[int, int]], seed: int = 1) -> list[Say]:
    """Return a turn for each of ``lengths``, by sequence: random prompts, and 3 tokens or more to decode."""
    draw = random.Random(seed)
    return [
        Say({i: [draw.randrange(VOCAB) for _ in range(n)] for i, n in turn.items()}, {i: 3 + i for i in turn})
        for turn in lengths
    ]


TURNS = steps_of([{0: 37, 1: 1, 2: 13}, {1: 29}, {0: 2, 2: 17}])
(CHOICE,) = steps_of([{0: 5, 2: 3}])


def talk(engine: Engine, steps: Sequence[Say], context: Context = SHARDED) -> list[dict[int, list[int]]]:
    session = Session(engine, context, Sampling())
    return [session.turn(step.prompts, step.max_new_tokens).tokens for step in steps]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_three_turns_of_a_ragged_batch_decode_the_tokens_of_transformers(runtime, tiny, mesh):
    results = run_engines(runtime, tiny, mesh, lambda engine: talk(engine, TURNS))
    check(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), {}, TURNS, results[0])
    assert all(result == results[0] for result in results)


def test_ranks_without_heads_take_part(runtime, tmp_path):
    folder = tiny_model(tmp_path / "few", max_positions=499, heads=3, kv_heads=3)
    results = run_engines(runtime, folder, Mesh(ring=5), lambda engine: talk(engine, TURNS[:1]))
    check(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}, TURNS[:1], results[0])


def test_sampled_tokens_do_not_depend_on_the_decode_strategy(runtime, tiny):
    def sampled(engine: Engine) -> list[list[int]]:
        texts = []
        for decode in ("gather_merge", "sharded"):
            session = Session(engine, Context(decode=decode), Sampling(temperature=1.3, top_p=0.9, seed=5))
            texts.append(session.turn({0: [1, 2, 3, 4, 5]}, {0: 17}).tokens[0])
        return texts

    for gathered, sharded in run_engines(runtime, tiny, Mesh(ring=3), sampled):
        assert gathered == sharded
        assert len(set(sharded)) > 5


def test_session_moves_to_another_mesh(runtime, tiny, tmp_path):
    """Save and restore between sharded decodes; the last token of a turn is not cached yet."""

    def begin(engine: Engine) -> list[dict[int, list[int]]]:
        session = Session(engine, SHARDED, Sampling())
        tokens = [session.turn(step.prompts, step.max_new_tokens).tokens for step in TURNS[:2]]
        save(session, tmp_path / "talk", "test")
        return tokens

    def resume(engine: Engine) -> list[dict[int, list[int]]]:
        session = Session(engine, SHARDED, Sampling())
        load(session, tmp_path / "talk", read_index(tmp_path / "talk", "test", "torch.float32", engine.shape))
        return [session.turn(TURNS[2].prompts, TURNS[2].max_new_tokens).tokens]

    first = run_engines(runtime, tiny, Mesh(ring=4), begin)[0]
    second = run_engines(runtime, tiny, Mesh(ring=2, ulysses=3), resume)[0]
    check(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), {}, TURNS, first + second)


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_families_have_the_logits_of_transformers(runtime, tmp_path, kind):
    """Two sequences, longer than the windows, decode one token each, in float64."""
    folder = random_model(kind, tmp_path / "model", eos_token_id=None)
    mesh, draw, lengths = Mesh(ulysses=2, ring=2), random.Random(2), [151, 133]
    texts = [[draw.randrange(SMALL["vocab_size"]) for _ in range(n)] for n in lengths]

    def step(engine: Engine) -> torch.Tensor:
        caches = [KVCache(engine.ring.size, engine.ring.rank) for _ in texts]
        for cache, text in zip(caches, texts, strict=True):
            layout = zigzag(len(text) - 1, engine.ring.size).split(engine.ulysses.size)
            run_pass(engine, torch.tensor(text[:-1]), layout, cache, engine.everywhere(pass_kv))
        layout = shard_balanced([1, 1], contiguous, [0] * engine.ring.size)
        latest, batch = torch.tensor([text[-1] for text in texts]), BatchCache(caches, engine.ring.rank)
        assert engine.share
        with engine.share.in_use():
            hidden = run_replicated(engine, latest, layout, batch, share=engine.share)
            return next_logits(engine, hidden, engine.share)[:, 0]

    net = float64_model(folder)
    with torch.inference_mode(), KeepFloat64():
        exact = torch.stack([net(torch.tensor([text])).logits[0, -1] for text in texts])
    for logits in run_engines(runtime, folder, mesh, step, dtype=torch.float64):
        oracle.assert_close(logits, exact, 1e-12)


class CountingComm:
    """A `Comm` that counts its collectives in ``calls``."""

    def __init__(self, name: str, comm: Comm, calls: Counter[str]) -> None:
        self.name, self.comm, self.calls = name, comm, calls
        self.rank, self.size, self.traffic = comm.rank, comm.size, comm.traffic

    def shift(self, *mine: AnyShape, shapes: Sequence[Shape]) -> Any:
        raise AssertionError(f"{len(mine)} tensors of a decoded token in a ring, {shapes}")

    def all_to_all(self, parts: Sequence[AnyShape], shapes: Sequence[Shape], *, small: bool = False) -> list[AnyShape]:
        self.calls[f"{self.name} all_to_all"] += 1
        return self.comm.all_to_all(parts, shapes, small=small)

    def all_gather(self, mine: AnyShape, shapes: Sequence[Shape]) -> list[AnyShape]:
        self.calls[f"{self.name} all_gather"] += 1
        return self.comm.all_gather(mine, shapes)


@pytest.mark.parametrize("mesh", [Mesh(ring=2), Mesh(ulysses=3, ring=2)], ids=str)
def test_collectives_bytes_and_flops_of_a_token(runtime, tiny, mesh):
    """There are 4 collectives per layer and 2 per token, and only one rank multiplies each weight."""
    n = mesh.context
    by_thread: dict[int, Counter[str]] = {}

    def wrap(name: str, comm: Comm) -> Comm:
        return CountingComm(name, comm, by_thread.setdefault(comm.rank, Counter()))

    def count(engine: Engine) -> tuple[Counter[str], tuple[int, int], float]:
        calls, flops = by_thread[engine.rank], FlopCounterMode(display=False)
        for counted in range(n):  # one thread at a time: torch crashes if several threads count
            session = Session(engine, SHARDED, Sampling())
            session.turn({0: list(range(24))}, {0: 1})
            calls.clear()
            for comm in (engine.context, engine.share.tp_context):
                comm.traffic.__init__()
            before = engine.sent
            with flops if engine.rank == counted else nullcontext():
                session.decode([0])
        total = engine.context.traffic.total + engine.share.tp_context.traffic.total
        return calls, (total, engine.sent - before), flops.get_total_flops()

    results = run_engines(runtime, tiny, mesh, count, wrap=wrap)
    for calls, _, _ in results:
        assert calls == {
            "context all_gather": LAYERS + 2,  # queries, keys and values; logits; tokens
            "context all_to_all": LAYERS,
            "tp_context all_gather": 2 * LAYERS,
        }
    shape = ModelShape(LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, 499, 1e-5, True, False)
    predicted = sum(count * size for count, size in exchanges(decode_work(shape, mesh, 1, Numbers(4, 4)), "sharded"))
    total, sent = (sum(both[i] for _, both, _ in results) / n for i in (0, 1))
    assert sent == pytest.approx(predicted), "attention, linear layers and logits"
    assert 0 <= total - predicted <= 16 * (n - 1), "the rest is the token"
    width = HEADS * HEAD_DIM
    projections = HIDDEN * (2 * width + 2 * KV_HEADS * HEAD_DIM + 3 * FFN)
    scores = 2 * width * 25  # 25 keys, over the ring
    assert sum(flops for *_, flops in results) == 2 * (LAYERS * (projections + scores) + HIDDEN * VOCAB)
    even = 2 * (LAYERS * projections + HIDDEN * VOCAB) / n
    assert max(flops for *_, flops in results) < 1.2 * even + 2 * LAYERS * scores


def test_layers_without_shares_are_refused(runtime, tiny):
    def refuse(engine: Engine) -> str:
        without = Engine(engine.model, engine.shape, engine.kernel, ring=engine.ring, layers="te")
        with pytest.raises(ValueError, match=r"this is model.layers=te mesh.tp=1; use context.decode=gather"):
            Session(without, SHARDED, Sampling())
        return "refused"

    assert run_engines(runtime, tiny, Mesh(ring=2), refuse) == ["refused"] * 2


@pytest.mark.parametrize(("mesh", "dropped"), [(Mesh(ring=3), (1,)), (Mesh(ulysses=3), (0, 1))])
def test_dropped_reductions_match_the_equations(runtime, loud, mesh, dropped):
    """A plan for tp=3 on 3 context ranks gives the equations' tokens; each dropped block saves one collective."""
    by_thread: dict[int, Counter[str]] = {}

    def wrap(name: str, comm: Comm) -> Comm:
        return CountingComm(name, comm, by_thread.setdefault(comm.rank, Counter()))

    def generate(engine: Engine) -> tuple[torch.Tensor, list[int], Counter[str]]:
        session, tokens = Session(engine, SHARDED, Sampling()), list[int]()
        turn = session.turn({0: PROMPT}, {0: 1}, keep_states=True)
        by_thread[engine.rank].clear()
        tokens = turn.tokens[0] + [session.decode([0])[0] for _ in range(3)]
        hidden, layout = turn.passes[0]
        shapes = [(layout.rows(rank), *hidden.shape[1:]) for rank in range(engine.ranks)]
        calls = Counter(by_thread[engine.rank])
        whole = layout.unshard(engine.context.all_gather(hidden, shapes))
        return next_logits(engine, whole)[:, 0], tokens, calls

    net = drop(float64_model(loud), dropped, 3)
    with torch.inference_mode(), KeepFloat64():
        ids = torch.tensor([PROMPT])
        exact = net(ids).logits[0]
        for _ in range(4):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], 1)
    plan = SPDPlan(LAYERS, 3, dropped)
    for logits, tokens, calls in run_engines(runtime, loud, mesh, generate, dtype=torch.float64, wrap=wrap, plan=plan):
        oracle.assert_close(logits, exact, 1e-12)
        assert tokens == ids[0, len(PROMPT) :].tolist()
        assert sum(calls.values()) == 3 * (4 * LAYERS - len(dropped) + 2)
        assert calls["tp_context all_gather"] == 3 * (2 * LAYERS - len(dropped))


@pytest.mark.parametrize("kind", DROPPING)
def test_dropped_reductions_of_every_family_match_the_equations(runtime, tmp_path, kind):
    folder = random_model(kind, tmp_path / "model", eos_token_id=None)
    prompt = [token % SMALL["vocab_size"] for token in PROMPT * 3]

    def generate(engine: Engine) -> list[int]:
        return Session(engine, SHARDED, Sampling()).turn({0: prompt}, {0: 4}).tokens[0]

    net = drop(float64_model(folder), (1,), 2)
    with torch.inference_mode(), KeepFloat64():
        ids = torch.tensor([prompt])
        for _ in range(4):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], 1)
    plan = SPDPlan(LAYERS, 2, (1,))
    for tokens in run_engines(runtime, folder, Mesh(ring=2), generate, dtype=torch.float64, plan=plan):
        assert tokens == ids[0, len(prompt) :].tolist()


def test_strategy_is_chosen_for_each_number_of_sequences(runtime, tiny):
    """One sequence ends first: two sequences decode by sharded, the remaining one by gather_merge."""

    def talk_by_choice(engine: Engine) -> tuple[dict[int, list[int]], dict[int, tuple[str, str]]]:
        names = {1: ("gather_merge", "few"), 2: ("sharded", "many")}
        session = Session(engine, Context(decode="auto"), Sampling(), choose_decode=names.__getitem__)
        return session.turn(CHOICE.prompts, CHOICE.max_new_tokens).tokens, session.decode_choices

    results = run_engines(runtime, tiny, Mesh(ring=2), talk_by_choice)
    check(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), {}, [CHOICE], [results[0][0]])
    assert all(choices == {1: ("gather_merge", "few"), 2: ("sharded", "many")} for _, choices in results)


def test_rates_are_the_same_on_all_ranks(monkeypatch):
    monkeypatch.setitem(probe._SIDE, "cpu", 32)
    cpu = torch.device("cpu")
    first, second = run_threads(2, lambda world, rank: probe_decode(world.group(rank), torch.float32, cpu, linear))
    assert first == second
    assert first.weight_bytes_per_s > 0 and first.flops > 0 and first.exchange.bytes_per_s > 0
