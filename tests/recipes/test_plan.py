"""recipes.plan: feasible meshes that the recipes take, with published results, limits, files and refusals."""

import csv
import io
import json
import re
import time
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Mesh
from longctx.cost.hardware import Link
from longctx.model_shape import Experts
from recipes import generate, plan
from recipes.common.hardware_file import read_machine, refuse_other_rates
from recipes.common.plan_question import Question, WorkSettings
from recipes.common.planning import plans_of, refusal_of
from tests.cost.predict import shape_named
from tests.megatron.kinds import random_model

LLAMA_405B = shape_named("llama3_405b")
GTT = read_machine("h100_gtt")
MILLION = Question(LLAMA_405B, GTT, 128, WorkSettings("prefill", 10**6))


def feasible(question):
    return [one for one in plans_of(question) if one.refused is None]


def test_million_tokens_of_405b_are_planned_as_they_were_run():
    """arXiv 2411.01783: tp=8 on each of 16 nodes, pass-KV, 77 s, 63 % of 800 TFLOP/s."""
    best = feasible(MILLION)[0]
    assert (best.mesh, best.strategy) == (Mesh(tp=8, ring=16), "pass_kv")
    assert best.seconds == pytest.approx(77, rel=0.02) and best.mfu == pytest.approx(0.63, abs=0.02)
    assert best.error == GTT.errors["prefill"].share and best.bound.startswith("attention (8")
    assert best.memory_gb < 96 < replace(best, question=replace(MILLION, dtype_bytes=4)).question.dtype_bytes * 96
    other = next(one for one in feasible(MILLION) if one.mesh.ulysses > 1)
    assert other.error is None, "no published run of this machine has Ulysses"


def test_error_is_that_of_the_strategies_that_were_compared():
    """The paper's decoded tokens are those of pass_q, and its turns have no answers."""
    turn, token = GTT.errors["chat"].share, GTT.errors["decode"].share
    question = replace(MILLION, gpus=16, work=WorkSettings("decode", 128_000))
    by_strategy = {one.strategy: one.error for one in feasible(question) if one.mesh == Mesh(tp=8, ring=2)}
    assert by_strategy.pop("pass_q") == token and len(by_strategy) == 4 and set(by_strategy.values()) == {None}
    for answer, ring, error in ((0, 2, turn), (1, 2, turn), (200, 2, None), (200, 1, None)):
        work = WorkSettings("chat", 20_000, 50_000, answer)
        plans = plans_of(replace(question, gpus=8 * ring, work=work))
        one = next(one for one in plans if one.mesh == Mesh(tp=8, ring=ring) and one.strategy == "pass_kv")
        assert one.error == (max(turn, token) if ring == 1 else error)


def test_a_thousand_meshes_take_less_than_a_second():
    """They take 0.1 s.  Type checks make tests forty times as slow, so a tenth of the meshes gets 2 s."""
    question = Question(shape_named("llama3_8b"), GTT, 12, WorkSettings("train", 65536, batch=12, zero1=True))
    began = time.process_time()
    assert len(plans_of(question)) > 100
    assert time.process_time() - began < 2


def test_limits_are_kept_and_named():
    plans = plans_of(replace(MILLION, max_memory_gb=60))
    assert all(one.refused for one in plans)
    assert any(one.mesh == Mesh(tp=8, ring=16) and "of the 60.0 GB of a GPU (weights" in one.refused for one in plans)
    hurried = replace(MILLION, max_ttft_s=50)
    assert any("max_ttft_s=50" in one.refused for one in plans_of(hurried))


@given(st.floats(20, 400), st.floats(1, 3))
@settings(max_examples=5)
def test_more_memory_never_makes_a_mesh_infeasible(memory, factor):
    less, more = (
        {(one.mesh, one.strategy) for one in feasible(replace(MILLION, gpus=16, max_memory_gb=limit))}
        for limit in (memory, memory * factor)
    )
    assert less <= more


def test_command_line_writes_and_draws_and_exports(cli, tiny, tmp_path):
    words = (f"model={tiny}", "model.dtype=bfloat16", "hardware=a800", "gpus=6", "work=chat", "work.cached=50")
    words += ("work.context=30",)
    files = (f"out={tmp_path}/p.json", f"picture={tmp_path}/p.svg", f"settings={tmp_path}/best.yaml", "export=csv")
    code, out, err = cli(plan, plan.task, *words, "work.new_tokens=3", *files)
    assert code == 0, err
    plans = json.loads((tmp_path / "p.json").read_text())
    names = {"mesh", "strategy", "seconds", "error", "bound", "memory_gb", "memory_parts", "mfu", "bytes"}
    assert names <= set(plans[0])
    assert [one["seconds"] for one in plans] == sorted(one["seconds"] for one in plans)
    assert plans[0]["seconds"] == pytest.approx(plans[0]["ttft_s"] + 2 * plans[0]["ttit_s"])
    assert plans[0]["memory_gb"] == pytest.approx(sum(plans[0]["memory_parts"].values()))
    table = list(csv.DictReader(io.StringIO(out)))
    assert [float(line["seconds"]) for line in table] == [one["seconds"] for one in plans]
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert best["mesh.ring"] == plans[0]["mesh"]["ring"] and best["context.strategy"] == plans[0]["strategy"]
    assert "tp=" in (tmp_path / "p.svg").read_text() or "ring" in (tmp_path / "p.svg").read_text()
    assert "error" in err and "memory of the best, GB of 80" in err


def test_picture_has_the_memory_of_the_best_plan_of_each_mesh(cli, monkeypatch, tmp_path):
    drawn, best = {}, {}
    monkeypatch.setattr(plan, "draw_plan", lambda *words, **_: drawn.update(words[3]))
    words = ("model=llama3_8b", "hardware=h100_gtt", "gpus=8", "work=prefill", "work.context=100000")
    code, _, err = cli(plan, plan.task, *words, f"out={tmp_path}/p.json", f"picture={tmp_path}/p.svg")
    assert code == 0, err
    for one in json.loads((tmp_path / "p.json").read_text()):
        best.setdefault(str(Mesh(**one["mesh"])), one["memory_gb"])
    assert {mesh: sum(parts.values()) / 1e9 for mesh, parts in drawn.items()} == pytest.approx(
        dict([*best.items()][:4])
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123456, "12.3 ms"),
        (1.0, "1 s"),
        (12.345, "12.3 s"),
        (999.7, "1,000 s"),
        (1234.5, "1,234 s"),
        (1e6, "1,000,000 s"),
    ],
)
def test_seconds_have_no_powers_of_ten(seconds, text):
    assert plan.in_words(seconds) == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("hardware=h100", "gpus=8"), "use a100_hbw, "),
        (("hardware=h200", "gpus=0"), "gpus=0"),
        (("hardware=h200", "gpus=8", "strategy=ring"), "use pass_kv, pass_q, all_gather_kv, or auto"),
        (("hardware=h200", "gpus=8", "work=train", "max_ttft_s=1"), "leave it out"),
        (("hardware=h200", "gpus=8", "work.cached=5"), "use work=chat"),
        (("hardware=h200", "gpus=8", "work.zero1=true"), "use work=train"),
        (("hardware=h200", "gpus=8", "allowed_drop=1.5"), "allowed_drop=1.5 is not a share"),
        (("hardware=h200", "gpus=8", "allowed_drop=nothing.json"), "use 0 to 1, or a report.json"),
        (("hardware=h200", "gpus=5", "max_memory_gb=1e-9"), "no mesh of 5 GPUs is feasible"),
        (("hardware=a100_nvlink", "gpus=256"), "describes the links of 8 GPUs, not of 256: use gpus=8 or fewer"),
        (("hardware=h200", "gpus=4", "allowed_drop=0.01"), "use allowed_drop=0."),
    ],
)
def test_nonsense_is_refused_with_what_to_change(refused, tiny, words, says):
    assert says in refused(plan, plan.task, f"model={tiny}", "model.dtype=bfloat16", *words)


def test_activations_that_recomputation_would_save_are_named(refused):
    words = ("model=llama3_8b", "hardware=h200", "gpus=8", "work=train", "work.context=262144", "work.batch=1")
    config = "model.max_positions=262144"
    assert "use work.recompute=full, more GPUs, or other limits" in refused(plan, plan.task, *words, config)
    message = refused(plan, plan.task, *words, config, "work.recompute=full", "max_memory_gb=1")
    assert "use more GPUs, or other limits" in message


def test_batch_that_ranks_cannot_share_is_refused_with_the_plans_settings():
    question = Question(shape_named("llama3_8b"), GTT, 24, WorkSettings("train", 65536, batch=8))
    assert "use work.batch=24, or another mesh.dp" in refusal_of(question, Mesh(dp=24))
    few = replace(question, work=WorkSettings("prefill", 9))
    assert refusal_of(few, Mesh(ring=24)).endswith("use at most 9 ranks, or a larger work.context")


def test_training_of_a_model_with_dropout_is_refused(cli, refused, tmp_path):
    model = random_model("untied llama", tmp_path / "model", attention_dropout=0.1)
    words = (f"model={model}", "hardware=h200", "gpus=2", "model.dtype=bfloat16", "work.context=64")
    assert "attention_dropout=0.1: longctx trains without dropout" in refused(plan, plan.task, *words, "work=train")
    assert cli(plan, plan.task, *words)[0] == 0, "dropout has no effect in inference"


@pytest.mark.parametrize("work", ["prefill", "train"])
def test_rates_of_fp8_are_said_to_be_faster(cli, work):
    for hardware, is_fp8 in (("h100_gti", True), ("h200", False)):
        words = ("model=llama3_8b", f"hardware={hardware}", "gpus=8", f"work={work}", "work.context=8192")
        said = " ".join(cli(plan, plan.task, *words)[2].split())
        assert ("in bfloat16, products take longer than predicted" in said) == is_fp8


def test_rates_of_16_bit_numbers_are_not_taken_for_float32(refused, tiny):
    message = refused(plan, plan.task, f"model={tiny}", "hardware=h200", "gpus=2")
    assert "hardware=h200 has the rates of 16-bit numbers" in message and "use model.dtype=bfloat16" in message
    assert message == refused(generate, generate.task, f"model={tiny}", "hardware=h200", "prompt.text=Hello")


def test_inference_of_mixtures_is_refused(refused, tmp_path):
    model = random_model("mixtral", tmp_path / "model")
    words = ("hardware=h200", "gpus=8", "model.dtype=bfloat16")
    assert "a mixture of experts, is not modelled: use work=train" in refused(plan, plan.task, f"model={model}", *words)


MIXTURE = replace(shape_named("llama3_8b"), experts=(None, *[Experts(12, 3, 7168)] * 31))


def test_experts_are_divided_where_memory_is_short(tmp_path):
    """A rank has its share of the experts' weights, gradients and optimizer; without ep, every rank has all."""
    question = Question(MIXTURE, read_machine("h200"), 16, WorkSettings("train", 8192, batch=16, zero1=True))
    plans = {(one.mesh, one.strategy): one for one in plans_of(question)}
    assert {mesh.ep for mesh, _ in plans} == {1, 2, 4} and {one.mesh.ep for one in feasible(question)} >= {2, 4}
    whole, divided = (plans[Mesh(tp=2, dp=8, ep=ep), "pass_kv"] for ep in (1, 4))
    experts = 31 * 12 * 3 * 4096 * 7168 / 2
    assert whole.memory_parts["weights"] - divided.memory_parts["weights"] == pytest.approx(2 * experts * 3 / 4)
    assert whole.memory_parts["gradients"] - divided.memory_parts["gradients"] == pytest.approx(4 * experts * 3 / 4)
    assert whole.memory_parts["optimizer"] == pytest.approx(divided.memory_parts["optimizer"]), "ZeRO-1 divides by all"
    assert divided.cost.bytes["ep"] > 0 and not whole.cost.bytes["ep"]
    assert divided.settings()["mesh.ep"] == 4 and divided.error is None
    refused = plans[Mesh(pp=16, ep=1), "pass_kv"].refused
    assert refused is None or "GB" in refused
    first_dense = replace(MIXTURE, experts=(None,) * 16 + MIXTURE.experts[:16])
    staged = [one for one in plans_of(replace(question, shape=first_dense)) if one.mesh.pp == 2 and one.mesh.tp == 1]
    assert all(
        "all layers of a pipeline stage are dense" in one.refused
        for one in staged
        if one.mesh.ep > 1 == one.mesh.ulysses
    )


def test_recipes_take_a_plan_and_the_command_line_wins(tmp_path, config_of):
    file = tmp_path / "best.yaml"
    question = Question(shape_named("tiny"), GTT, 2, WorkSettings("train", 64, batch=2, zero1=True))
    best = feasible(question)[0]
    file.write_text(yaml.safe_dump(best.settings()))
    config = config_of("pretrain", f"plan={file}", "out=x")
    assert (dict(config.mesh), config.optim.zero1, config.recompute) == (vars(best.mesh), True, "none")
    assert config_of("pretrain", "mesh.ring=5", f"plan={file}", "out=x").mesh.ring == 5
    with pytest.raises(ValueError, match=r"mesh=ring_of_two and plan=.* set the same values: .* such as mesh\.\w+="):
        config_of("pretrain", f"plan={file}", "mesh=ring_of_two", "out=x")
    file.write_text("prompt.text: 'Once upon, a time'\nmesh.ring: 1\n")
    assert config_of("generate", f"plan={file}").prompt.text == "Once upon, a time"
    for text in ("a list", "mesh.ring: [1, 2]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"settings=FILE\.yaml"):
            config_of("generate", f"plan={file}")


def test_files_of_others_are_not_replaced(cli, refused, tiny, tmp_path):
    words = (f"model={tiny}", "hardware=h200", "gpus=2", "model.dtype=bfloat16", "work.context=64")
    ours = {name: f"{name}={tmp_path}/{file}" for name, file in {"out": "plans.json", "settings": "best.yaml"}.items()}
    for _ in range(2):
        assert cli(plan, plan.task, *words, *ours.values())[0] == 0
    for name, text in {"out": '{"tokens_per_s": 5}', "settings": "mesh: {ring: 2}"}.items():
        file = tmp_path / f"mine_{name}{'.json' if name == 'out' else '.yaml'}"
        file.write_text(text)
        line = refused(plan, plan.task, *words, f"{name}={file}")
        assert "exists, and was not written by recipes.plan" in line and file.read_text() == text


def test_answers_count_in_a_turn_and_its_bound():
    turn = replace(MILLION, gpus=16, work=WorkSettings("chat", 16, cached=64000, new_tokens=100))
    best = feasible(turn)[0]
    assert best.seconds == pytest.approx(best.ttft_s + 99 * best.ttit_s)
    assert best.bound.startswith("reading the weights")
    assert best.seconds == pytest.approx(sum(best.as_dict()["seconds_by_part"].values()))


def test_long_answer_needs_room_for_its_keys_and_time_for_them():
    """The mean length of the cache gives the time, its length at the end the memory."""
    question = Question(shape_named("llama3_8b"), read_machine("h200"), 8, WorkSettings("chat", 1000))
    works = [WorkSettings("chat", 1000, new_tokens=new) for new in (2, 120_000)]
    short, long = (feasible(replace(question, work=work)) for work in works)
    one, other = (next(plan for plan in plans if plan.mesh == Mesh(ring=8)) for plans in (long, short))
    assert one.memory_parts["kv_cache"] == pytest.approx(121_001 / 1_003 * other.memory_parts["kv_cache"], rel=0.01)
    assert one.ttit_s > 1.05 * other.ttit_s
    decode = replace(one.question, work=WorkSettings("decode", 1000 + 60_000))
    at_mean = next(p for p in feasible(decode) if p.mesh == Mesh(ring=8) and p.strategy == one.decode)
    assert one.ttit_s == pytest.approx(at_mean.ttit_s)


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (
            {"measured": {"dtype": "float32"}},
            "bfloat16",
            "was measured with model.dtype=float32, not bfloat16",
        ),
        ({"levels": []}, "float32", "has the rates of 16-bit numbers, and model.dtype=float32 is slower"),
    ],
)
def test_rates_of_another_dtype_are_refused(refused, tmp_path, values, dtype, message):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    words = ("model=llama3_8b", f"model.dtype={dtype}", f"hardware={tmp_path}/mine.yaml", "gpus=2")
    with pytest.raises(ValueError, match=message):
        refuse_other_rates(str(tmp_path / "mine.yaml"), dtype)
    assert refused(plan, plan.task, *words)


def test_best_mesh_by_length_is_the_first_plan_of_each_length(cli):
    words = ("model=llama3_8b", "hardware=h200", "gpus=8", "lengths=[8192,70001,90000000]")
    code, out, err = cli(plan, plan.task, *words)
    assert code == 0, err
    table = (out + err).partition("the best mesh by length")[2]
    question = Question(shape_named("llama3_8b"), read_machine("h200"), 8, WorkSettings("prefill"), dtype_bytes=2)
    for length in (8192, 70001):
        best = feasible(replace(question, work=WorkSettings("prefill", length)))[0]
        assert re.search(rf"{length:,} +{best.mesh} .* {plan.in_words(best.seconds)} ", table)
    assert re.search("90,000,000 +no mesh is feasible", table)


def test_sharded_decoding_is_planned_where_links_are_fast(tmp_path):
    """Within a node a rank that reads an eighth of the weights is faster; over slow links it is not."""
    shape = shape_named("llama3_70b")
    best = {}
    for machine in ("h100_gtt", "l20_pcie"):
        work = WorkSettings("decode", 131072)
        plans = feasible(Question(shape, read_machine(machine), 8, work, max_memory_gb=500))
        best[machine] = {one.decode: one for one in reversed(plans) if one.mesh == Mesh(ring=8)}
    assert best["h100_gtt"]["sharded"].seconds < best["h100_gtt"]["gather_merge"].seconds / 2
    assert best["h100_gtt"]["sharded"].settings()["context.decode"] == "sharded"
    turn = WorkSettings("chat", 64, cached=64000, new_tokens=100)
    question = Question(shape, read_machine("h100_gtt"), 8, turn, max_memory_gb=500)
    chat = next(one for one in feasible(question) if one.mesh == Mesh(ring=8))
    assert chat.settings()["context.decode"] == "sharded" and chat.settings()["context.strategy"] == chat.strategy
    slow = read_machine("l20_pcie")
    link = Link(1e-2, 1e8)
    slow = replace(slow, levels=[replace(level, hop=link, exchange=link) for level in slow.levels])
    chat = next(one for one in feasible(replace(question, machine=slow)) if one.mesh == Mesh(ring=8))
    assert chat.settings()["context.decode"] == "gather_merge"
