"""`resolve_target`: a model, its mesh and how it runs are checked once; refusals name the setting and the fix."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from longctx.config import Context, Mesh, Reduce, Run, Sampling
from longctx.hf.checkpoint import fingerprint
from longctx.model_shape import Experts
from longctx.parallel.launch import Rank
from longctx.spd.plan import SPDPlan
from recipes.common.spd_plan import refuse_unshared
from recipes.common.target import (
    refuse_fp8,
    refuse_rounded,
    refuse_strategy_by_turn,
    refuse_unproved,
    resolve_target,
    say_unapplied,
)
from tests.recipes.conftest import SAVED


@pytest.fixture
def models(tmp_path, tiny, monkeypatch):
    """The current folder, with models of three kinds: plain, adapted for two tensor-parallel ranks, without weights."""
    shutil.copytree(tiny, tmp_path / "models" / "plain")
    shutil.copytree(SAVED / "spd_adapted", tmp_path / "models" / "adapted")
    shutil.copytree(tiny, tmp_path / "models" / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "models" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGCTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "models"


@pytest.fixture
def resolve(models, config_of, snapshot):
    """``resolve(*words, **rules)``: the target that recipes.generate's ``words`` name; nothing may be written."""

    def resolve(*words, **rules):
        config = config_of("generate", *words)
        before = snapshot()
        try:
            return resolve_target(config, "recipes.test", **{"decode_by_batch": True, **rules})
        finally:
            assert snapshot() == before, "resolving wrote a file, or made a folder"

    return resolve


PLAIN, ADAPTED = "model=models/plain", "model=models/adapted"


def test_target_has_the_settings_that_were_resolved(resolve, models):
    target = resolve(PLAIN, "mesh.tp=3", "mesh.ring=2", "context.strategy=pass_q", "run.threads=5")
    assert (target.model.name, target.folder.resolve()) == ("plain", models / "plain")
    assert (target.shape.heads, target.shape.kv_heads, target.shape.max_positions) == (9, 3, 97)
    assert (target.mesh, target.context.strategy, target.run) == (Mesh(tp=3, ring=2), "pass_q", Run(threads=5))
    assert target.plan is None and target.fingerprint == fingerprint(models / "plain")
    assert target.threads(Rank(4, 6, 1, 3, "env://")) == 5


def test_ranks_share_the_cores_unless_threads_are_set(resolve, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7))
    assert resolve(PLAIN).threads(Rank(4, 6, 1, 3, "env://")) == 2


def test_changed_context_is_in_the_shape(resolve):
    assert resolve(PLAIN, "model.max_positions=307", "model.rope_theta=5e4").shape.max_positions == 307


def test_model_without_weights_resolves_where_none_are_needed(resolve):
    assert resolve("model=models/weightless", needs_weights=False).shape.heads == 9
    assert resolve("model=tiny", needs_weights=False).shape.vocab_size == 257


def test_rule_for_turns_resolves_where_it_is_allowed(resolve):
    assert resolve(PLAIN, "context.strategy=auto", strategy_by_turn=True).context.strategy == "auto"


@pytest.mark.parametrize(
    ("words", "spd", "dropped"),
    [
        (["spd.blocks=[1]"], "follow", (1,)),
        (["spd=all"], "follow", (0, 1)),
        (["spd=all"], "ignore", None),
        (["spd=none"], "follow", None),
        ([], "refuse", None),
    ],
)
def test_plan_follows_the_settings_unless_it_is_ignored(resolve, words, spd, dropped):
    plan = resolve(PLAIN, "mesh.tp=3", *words, spd=spd).plan
    assert (plan.dropped if plan else None) == dropped
    assert plan is None or (plan.tp, plan.layers) == (3, 2)


def test_reductions_are_exact_unless_they_are_rounded(resolve):
    exact = resolve(PLAIN, "mesh.tp=3", "spd=none")
    assert exact.reduce is None and not exact.inexact
    assert resolve(PLAIN, "mesh.tp=3", "reduce=int8", "reduce.attention=float32", "reduce.group=32").reduce == Reduce(
        "float32", "int8", 32
    )
    both = resolve(PLAIN, "mesh.tp=3", "mesh.ring=2", "reduce=bfloat16", "spd=all", "context.decode=auto")
    assert (both.reduce, both.plan.dropped, both.inexact) == (Reduce("bfloat16", "bfloat16"), (0, 1), True)


def test_rounded_reductions_are_refused_with_other_layers_and_experts(resolve):
    target, int8 = resolve(PLAIN, "mesh.tp=3"), Reduce("int8", "int8")
    routed = replace(target.shape, experts=(Experts(4, 2, 7),) * target.shape.layers)
    with pytest.raises(ValueError, match=r"model.layers=te is not tested with rounded .* use model.layers=local"):
        refuse_rounded(int8, target.mesh, replace(target.model, layers="te"), target.context, target.shape)
    with pytest.raises(ValueError, match=r"mixtures of experts: use reduce=float32"):
        refuse_rounded(int8, target.mesh, target.model, target.context, routed)


@pytest.mark.parametrize(
    ("changes", "hardware", "fix"),
    [
        ({}, None, "model.dtype=bfloat16"),
        ({"dtype": "bfloat16"}, "h200", "hardware=null"),
        (
            {"dtype": "bfloat16"},
            None,
            "the width of the queries of a rank with mesh.tp=3 is 24: use a smaller mesh.tp or",
        ),
    ],
)
def test_products_in_8_bits_need_16_bit_weights_and_even_widths(resolve, changes, hardware, fix):
    target = resolve(PLAIN, "mesh.tp=3")
    shape = replace(target.shape, hidden=64, head_dim=8)
    target = replace(target, shape=shape, model=replace(target.model, layers="te", fp8="block", **changes))
    with pytest.raises(ValueError, match=re.escape(fix)):
        refuse_fp8(target, "recipes.test", ("block",), hardware)


def test_products_in_8_bits_are_refused_with_dropped_reductions(resolve):
    target = resolve(PLAIN, "mesh.tp=3", "spd=all")
    target = replace(target, model=replace(target.model, layers="te", fp8="block", dtype="bfloat16"))
    with pytest.raises(ValueError, match="only with spd=none"):
        refuse_fp8(target, "recipes.test", ("block",), None)


def test_plan_of_an_adapted_folder_is_followed(resolve):
    assert resolve(ADAPTED, "mesh.tp=2").plan.dropped == (1,)
    assert resolve(ADAPTED, "mesh.tp=2", "spd=none").plan is None
    on_context_ranks = resolve(ADAPTED, "mesh.ring=2", "context.decode=sharded").plan
    assert (on_context_ranks.dropped, on_context_ranks.tp) == ((1,), 2)


def test_norms_per_rank_are_refused_on_context_ranks():
    with pytest.raises(ValueError, match=r"norms per rank .* use mesh.tp=3 mesh.ring=1"):
        refuse_unshared(Mesh(ring=3), Mesh(tp=3), SPDPlan(2, 3, (1,), own_norms=True), None)


def test_config_without_groups_of_context_run_and_plan_resolves(models, config_of):
    """Some recipes have no choices of context or of blocks."""
    config = config_of("generate", PLAIN)
    sections = {name: config[name] for name in ("model", "mesh")}
    target = resolve_target(OmegaConf.create(sections), "recipes.test")
    assert (target.context.strategy, target.run.device, target.plan) == ("pass_kv", "cpu", None)


@pytest.mark.parametrize(
    ("words", "rules", "key", "fix"),
    [
        # The mesh.
        (["mesh.ring=0"], {}, "mesh.ring=0", "use at least one rank"),
        (["mesh.dp=2"], {"unused_axes": ("dp", "pp")}, "recipes.test has no use for mesh.dp=2", "use mesh.dp=1"),
        (["mesh.pp=3"], {"unused_axes": ("dp", "pp")}, "recipes.test has no use for mesh.pp=3", "use mesh.pp=1"),
        (["mesh.ring=2", "mesh.ep=2"], {"unused_axes": ("dp", "pp")}, "has no use for mesh.ep=2", "use mesh.ep=1, and"),
        (["mesh.ring=2", "mesh.ep=2"], {}, "mesh.ep=2 divides experts", "use mesh.ep=1"),
        (["mesh.ep=2"], {}, "mesh.ep=2 does not divide mesh.ulysses x mesh.ring x mesh.dp = 1", "use mesh.ep=1"),
        (["mesh.tp=2"], {}, "mesh.tp=2", "use mesh.tp=3"),
        (["mesh.ulysses=2"], {}, "mesh.ulysses=2", "use mesh.ulysses=1"),
        # The model and its context.
        (["model=models/empty"], {}, "model=models/empty", "give a Hugging Face folder"),
        (["model=models/none"], {}, "model=models/none", "give a Hugging Face folder"),
        (["model=models/weightless"], {}, "models/weightless", "train it with recipes.pretrain"),
        (["model=tiny"], {}, "has no weights yet", "train it with recipes.pretrain"),
        (["model.max_positions=0"], {}, "model.max_positions=0", "use more than 0, or null"),
        (["model.rope_factor=-1"], {}, "model.rope_factor=-1.0", "use more than 0, or null"),
        (["model.dtype=float16"], {}, "model.dtype=float16", "float32 or bfloat16"),
        # How it runs.
        (["context.strategy=auto"], {}, "context.strategy=auto", "one of pass_kv, pass_q, all_gather_kv"),
        (["context.strategy=alg1"], {}, "context.strategy=alg1", "recipes.chat and recipes.serve take alg1"),
        (["context.kernel=flash_cuda"], {}, "context.kernel=flash_cuda", "use context.kernel=reference or flash_cpu"),
        (["run.device=cuda"], {}, "context.kernel=auto", "use context.kernel=auto model.dtype=bfloat16"),
        (["context.chunk=0"], {}, "context.chunk=0", "or null to prefill all"),
        (["context.check_schedule=true", "mesh.ring=2"], {}, "recipes.test takes", "context.check_schedule=false"),
        (["context.check_schedule=true"], {"proves_schedule": True}, "one context rank", "use mesh.ring=2 or more"),
        (["run.threads=0"], {}, "run.threads=0", "use 1 or more"),
        (["run.timeout_minutes=0"], {}, "run.timeout_minutes=0", "use 1 or more"),
        # Products in 8 bits.
        (["model.fp8=block"], {}, "model.fp8=block is not supported in recipes.test", "use model.fp8=null"),
        (["model.fp8=current"], {"fp8": ("block",)}, "model.fp8=current is not supported", "use model.fp8=block, or"),
        (["model.fp8=block"], {"fp8": ("block",)}, "model.fp8=block", "only with model.layers=te"),
        (["model.fp8=delayed"], {}, "model.fp8=delayed", "current or block"),
        # Rounded reductions.
        (["reduce=int8"], {}, "(attention int8, mlp int8, groups of 64): one tensor-parallel rank", "use mesh.tp=2"),
        (["reduce=int9", "mesh.tp=3"], {}, "reduce", "int9"),
        (["reduce.mlp=int4", "mesh.tp=3"], {}, "reduce.mlp=int4", "give float32, bfloat16, int8 or int6"),
        (["reduce=int6", "reduce.group=30", "mesh.tp=3"], {}, "reduce.group=30", "use a multiple of 4"),
        (["reduce.group=32", "mesh.tp=3"], {}, "reduce.group=32 is used by int8 and int6 only", "use reduce=int8"),
        (
            ["reduce=int8", "mesh.tp=3", "mesh.ring=2", "context.decode=sharded"],
            {},
            "context.decode=sharded is not tested with rounded reductions",
            "use context.decode=gather_merge",
        ),
        # Blocks that drop a reduction.
        (["spd.blocks=[2]", "mesh.tp=3"], {}, "has no block 2", "0 to 1"),
        (["spd=ranked", "mesh.tp=3"], {}, "spd=ranked", "such as spd.budget=0.5"),
        (["spd=ranked", "spd.budget=0.5", "mesh.tp=3"], {}, "spd.budget=0.5", "spd.sensitivity=DIR/sensitivity.json"),
        (["spd.budget=0.5"], {}, "spd.budget=0.5: one tensor-parallel rank", "use mesh.tp=2 or more"),
        (["spd=ranked"], {}, "spd=ranked: one tensor-parallel rank", "use mesh.tp=2 or more"),
        (["spd.budget=2"], {}, "spd.budget=2", "0"),
        (["spd=all", "spd.budget=0.5"], {}, "spd=all", "use spd=ranked"),
        (["context.decode=auto"], {"decode_by_batch": False}, "context.decode=auto", "takes one of gather_merge"),
        (["context.decode=sharded", "model.layers=te"], {}, "context.decode=sharded", "use model.layers=local"),
        (["spd=all", "mesh.tp=3", "model.layers=te"], {}, "model.layers=te", "use model.layers=local"),
        ([ADAPTED], {}, "made for mesh.tp=2, but here 1 rank has the weights", "spd=none"),
        (
            [ADAPTED, "mesh.ring=3", "context.decode=sharded"],
            {},
            "here 3 ranks share",
            "mesh.tp=1 mesh.ulysses=1 mesh.ring=2",
        ),
        (
            ["spd=all", "mesh.tp=3", "mesh.ring=2", "context.decode=sharded"],
            {},
            "context.decode=sharded drops reductions over context ranks only, but this is mesh.tp=3",
            "use context.decode=gather_merge, or mesh.tp=1",
        ),
        (["spd=all", "mesh.ring=2", "context.decode=sharded"], {}, "over 2 context ranks", "use 3 context ranks"),
        (
            [ADAPTED, "mesh.tp=2"],
            {"spd": "refuse"},
            "models/adapted drops reductions",
            "use the model that it was made from",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_refusals_name_the_setting_and_the_fix(resolve, words, rules, key, fix):
    words = words if any(word.startswith("model=") for word in words) else [PLAIN, *words]
    with pytest.raises(ValueError, match=re.escape(key)) as refusal:
        resolve(*words, **rules)
    assert fix in str(refusal.value), refusal.value


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "all_gather_kv"])
def test_named_strategies_are_not_refused(resolve, strategy):
    refuse_strategy_by_turn(resolve(PLAIN, f"context.strategy={strategy}").context, "recipes.test")


@pytest.mark.parametrize(
    ("mesh", "changes", "kind"),
    [
        (Mesh(ring=2), {"experts": (Experts(4, 2, 7),) * 2}, "mixtures of experts"),
        (Mesh(tp=3, ring=2), {"qk_norm": "width"}, "norms over all heads with mesh.tp=3"),
        (Mesh(ring=2), {"qk_norm": "width"}, None),
    ],
)
def test_sharded_decoding_is_proved_if_its_messages_can_be_recorded(resolve, mesh, changes, kind):
    shape, context = replace(resolve(PLAIN).shape, **changes), Context(decode="sharded", check_schedule=True)
    if kind is None:
        refuse_unproved(context, mesh, shape, "recipes.test", proves=True)
        return
    with pytest.raises(ValueError, match=f"decode=sharded of {kind}: use context.decode=gather_merge"):
        refuse_unproved(context, mesh, shape, "recipes.test", proves=True)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"config": {"eos_token_id": 7}}, ""),
        ({"config": {"repetition_penalty": 5.0}}, "config.json has repetition_penalty=5.0: not applied here"),
        ({"config": {"repetition_penalty": 5.0}, "generation_config": {"eos_token_id": 7}}, ""),
        (
            {"config": {"eos_token_id": 7}, "generation_config": {"num_beams": 3}},
            "add eos_token_id=7 to generation_config",
        ),
    ],
    ids=str,
)
def test_settings_of_generation_that_change_the_text_are_printed(tmp_path, capsys, files, line):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    say_unapplied(tmp_path, Sampling())
    printed = " ".join(capsys.readouterr().err.split())
    assert line in printed and bool(line) == bool(printed)
