"""Predictions beside measured times: of a turn, with the strategies that ran."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from longctx.config import Context, Mesh, Reduce
from longctx.cost.forward import Numbers, decode_cost, prefill_cost
from longctx.spd.plan import SPDPlan
from recipes.common.hardware_file import read_machine, read_rates, refuse_more_ranks
from recipes.common.predicted import beside, predict_turn, refuse_unpredicted
from recipes.common.train_report import Measured, TrainedStep, compared, predict_step
from tests.cost.predict import shape_named

MACHINE, SHAPE = read_machine("h200"), shape_named("llama3_8b")


def target(**changes):
    values = {"shape": SHAPE, "mesh": Mesh(tp=2, ring=4), "context": Context(strategy="pass_q", decode="sharded")}
    model = SimpleNamespace(dtype="bfloat16")
    return SimpleNamespace(**{**values, "model": model, "plan": None, "reduce": None, **changes})


@pytest.mark.parametrize("decode", ["sharded", "auto"])
def test_turn_is_predicted_with_its_strategies_and_half_of_its_answer(decode):
    turn = SimpleNamespace(ttit_s=0.1, tokens={0: [1] * 10, 1: [2] * 4})
    session = SimpleNamespace(decode_strategy={2: "gather_merge"}.get)
    one = target(context=Context(strategy="pass_q", decode=decode))
    predicted = predict_turn(one, MACHINE, [1000, 3000], turn, session)
    strategy = "sharded" if decode == "sharded" else "gather_merge"
    assert predicted == {
        "ttft_s": prefill_cost(SHAPE, one.mesh, MACHINE, [1000, 3000], [0, 0], "pass_q", Numbers()).seconds,
        "ttit_s": decode_cost(SHAPE, one.mesh, MACHINE, [1005, 3002], strategy, Numbers()).seconds,
    }
    assert predict_turn(one, MACHINE, [9], SimpleNamespace(ttit_s=None), session)["ttit_s"] is None
    # A prompt whose answer has one token takes no decode step.
    longer = SimpleNamespace(ttit_s=0.1, tokens={**turn.tokens, 2: [3], 3: []})
    assert predict_turn(one, MACHINE, [1000, 3000, 9000, 9000], longer, session)["ttit_s"] == predicted["ttit_s"]


def test_reductions_that_context_ranks_drop_are_predicted():
    """With sharded decoding, a plan for N tensor-parallel ranks is followed by N context ranks."""
    plan = SPDPlan(SHAPE.layers, 8, tuple(range(SHAPE.layers // 2)))
    one = target(mesh=Mesh(ring=8), plan=plan, context=Context(decode="sharded"))
    turn = SimpleNamespace(ttit_s=0.1, tokens={0: [1, 1]})
    predicted = predict_turn(one, MACHINE, [1000], turn, SimpleNamespace())
    half = decode_cost(SHAPE, one.mesh, MACHINE, [1001], "sharded", Numbers(spd_share=0.5)).seconds
    assert predicted["ttit_s"] == half < decode_cost(SHAPE, one.mesh, MACHINE, [1001], "sharded", Numbers()).seconds


def test_words_beside_a_measured_figure():
    assert beside(2.0, {"ttft_s": 2.5}, "ttft_s") == ", predicted 2.5 s (+25%)"
    assert beside(2.0, None, "ttft_s") == beside(None, {"ttft_s": 2.5}, "ttft_s") == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": Context(chunk=64)}, r"context.chunk=64\) is not modelled; use hardware=null"),
        ({"reduce": Reduce("int8", "int8")}, "rounded reductions .* are not modelled"),
        ({"context": Context(layout="contiguous")}, "context.layout=contiguous are not modelled; use hardware=null"),
    ],
)
def test_runs_without_a_model_are_refused(changes, words):
    refuse_unpredicted(target())
    with pytest.raises(ValueError, match=words):
        refuse_unpredicted(target(**changes))


def train_job(mesh, context, length=64):
    settings = SimpleNamespace(recompute="none", loss_rows=512, mlp_rows=None, offload=None)
    one = target(mesh=mesh, context=context, run=SimpleNamespace(device="cpu"))
    data, optim = SimpleNamespace(length=length, batch=2), SimpleNamespace(zero1=False)
    return SimpleNamespace(target=one, settings=settings, machine=MACHINE, data=data, optim=optim)


def test_layouts_without_a_ring_are_predicted_and_steps_of_others_are_not():
    contiguous = Context(strategy="pass_kv", layout="contiguous")
    refuse_unpredicted(target(context=contiguous, mesh=Mesh(tp=2, ulysses=4)))
    for mesh, context, known in ((Mesh(ring=2), contiguous, False), (Mesh(ring=2), Context("pass_kv"), True),
                                 (Mesh(ulysses=2), contiguous, True)):  # fmt: skip
        assert (predict_step(train_job(mesh, context), ()) is not None) == known


def test_every_counted_step_is_predicted_for_its_documents():
    """The measured time is a median over steps, and so is the prediction: it does not depend on the last step."""
    whole, halves, many = ((65536,),) * 2, ((32768, 32768),) * 2, ((4096,) * 16,) * 2
    job = train_job(Mesh(ring=2), Context("pass_kv"), 65536)
    seconds = {documents: predict_step(job, documents) for documents in (whole, halves, many)}
    assert seconds[many] < 0.9 * seconds[halves] < 0.8 * seconds[whole]
    for order in ((whole, halves, many), (many, whole, halves)):
        measured = Measured().after(TrainedStep(1, {"step_s": 900.0}, {}, False, many))  # it warms up
        measured = measured.after(TrainedStep(2, {"step_s": 900.0}, {}, False, many, {"weights": 10**6}))
        for i, documents in enumerate(order):
            measured = measured.after(TrainedStep(3 + i, {"step_s": 2.0}, {}, False, documents))
        (name, text) = next(row for row in compared(job, replace(measured, memory=None)))
        share = seconds[halves] / 2.0 - 1
        assert (name, text) == ("time of a step", f"2 s, predicted {seconds[halves]:.3g} s ({share:+.0%})")
    for step in range(300):
        measured = measured.after(TrainedStep(6 + step, {"step_s": 2.0}, {}, False, whole))
    assert len(measured.seconds) == len(measured.documents) == 100


def test_more_ranks_than_a_machine_has_links_for_are_refused():
    node = read_machine("a100_lbw")
    refuse_more_ranks("a100_lbw", node, 8, "hardware=null")
    refuse_more_ranks("h200", MACHINE, 4096, "hardware=null")
    with pytest.raises(ValueError, match="hardware=a100_lbw describes the links of 8 GPUs, not of 9: use hardware=nul"):
        refuse_more_ranks("a100_lbw", node, 9, "hardware=null")


def test_rates_for_mfu_are_read_from_old_files_and_from_machines(tmp_path):
    file, link = tmp_path / "old.yaml", "{latency_s: 1e-4, bytes_per_s: 1e9}"
    text = f"flops: 1e9\nkv_bytes_per_s: 1e9\nblock_s: 0\noverlap: 1\nhop: {link}\nexchange: {link}\npeak_flops: 2e9\n"
    file.write_text(text)
    assert read_rates(str(file)) == (2e9, None)
    file.write_text(f"{text}layer: {{gemm_flops: 3e9, weight_bytes_per_s: 1e9, layer_s: 0, gather: {link}}}\n")
    peak, machine = read_rates(str(file))
    assert peak == 2e9 and machine.gemm_flops == 3e9 and machine.levels[0].gather_link.latency_s == 1e-4
    assert read_rates("h200") == (MACHINE.peak_flops, MACHINE)
    with pytest.raises(ValueError, match=r"nowhere.yaml cannot be read"):
        read_rates("nowhere.yaml")
