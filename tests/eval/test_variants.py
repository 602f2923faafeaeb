"""Variants: which stored answers are theirs, which settings they may change, and which models they may be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from eval.sensitivity import make_order_jobs
from eval.variants import Variant, compose_variants
from longctx.config import Context, Mesh, ModelSource, Reduce, Run
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.model_shape import ModelShape, Rotary
from longctx.spd.plan import SavedPlan, SPDPlan
from recipes.common.target import Target
from tests.tiny import tiny_model

SHAPE = ModelShape(2, 6, 3, 3, 2, 7, 11, 13, 1e-5, False, False, (Rotary((1.0,)),) * 2, end_tokens=(7, 9))
# Digests that commit ef86d62, the first release, gives to the same settings of `fixed_folder`.
FIRST_RELEASE = [
    (Mesh(), Context(), None, "4500018c5677"),
    (Mesh(ring=2, ulysses=3), Context(strategy="pass_q", layout="striped"), None, "f092fe779999"),
    (Mesh(ring=2), Context(decode="pass_q"), None, "a08d4e93c408"),
    (Mesh(tp=3), Context(), SPDPlan(2, 3, (1,), own_norms=True), "5ecd823302b3"),
]


def fixed_folder(folder: Path) -> Path:
    """Write a folder of fixed bytes: a configuration, one tensor, a tokenizer."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(12)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("mesh", "context", "plan", "digest"), FIRST_RELEASE)
def test_digest_is_that_of_the_first_release(mesh, context, plan, digest, tmp_path):
    """With another digest, every answer that a user has stored would be computed again."""
    folder = fixed_folder(tmp_path)
    target = Target(ModelSource("fixed", str(folder)), folder, SHAPE, mesh, context, Run(threads=3), plan)
    assert Variant("any name", target).first_digest == digest


def test_answers_of_an_edited_model_are_not_served(prepared, tiny, tmp_path):
    """The edit is in the middle of a tensor, where version 0.1 did not look."""
    folder = shutil.copytree(tiny, tmp_path / "edited")
    job = replace(prepared("eval.limit=1"), settings=replace(prepared("eval.limit=1").settings, out=str(tmp_path)))
    variant = Variant("edited", replace(job.variants[0].target, folder=folder))
    served = job.file(variant)
    served.parent.mkdir()
    first = served.with_name(f"{variant.first_digest}.jsonl")
    first.touch()
    assert job.file(variant) == first != served, "version 0.1 wrote it"
    served.touch()
    assert job.file(variant) == served
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][60:120] *= -3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edited = Variant("edited", replace(job.variants[0].target, folder=folder))
    assert edited.digest != variant.digest and not (served.parent / f"{edited.digest}.jsonl").exists()


def test_digest_depends_on_end_tokens_and_tokenizer(prepared, tiny, tmp_path):
    def moved(target: Target, **changes: object) -> Variant:
        return Variant("other", replace(target, folder=other, **changes))

    base = prepared("eval.limit=1").variants[0]
    other = shutil.copytree(tiny, tmp_path / "other")
    assert moved(base.target).digest == base.digest
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert moved(base.target, shape=shape_of(other)).digest != base.digest
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert moved(base.target).digest != base.digest


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("variants=[{mesh: {ring: 2}}]", "has no name"),
        ("variants=[{name: a}, {name: a}]", "variants: the name a is used twice"),
        ("variants=[{name: a, eval: {limit: 3}}]", "variants: a: eval is not one of model, mesh, context, spd, reduce"),
        ("variants=[{name: a, mesh: {tp: 2}}]", "use mesh.tp=3"),
        ("variants=[{name: a, reduce: {mlp: int8}}]", "one tensor-parallel rank has nothing to reduce"),
        ("variants=[{name: a, spd: {drop: all}}]", "spd=all: one tensor-parallel rank has no reduction to drop"),
        ("variants=[{name: a, spd: {budget: 0.5}}]", "use mesh.tp=2 or more, or leave spd.budget and spd.blocks out"),
        (
            "mesh.tp=3 variants=[{name: a, spd: {drop: ranked, budget: 50}}]",
            "spd.budget=50.0: use a share of the blocks",
        ),
        ("mesh.tp=3 variants=[{name: a, spd: {blocks: [1], budget: 0.5}}]", "spd.blocks lists the blocks that drop"),
        ("variants=[{name: a, spd: {drop: ranked, budget: 0.5}}]", "spd.budget=0.5: one tensor-parallel rank has no"),
        (
            "variants=[{name: a, spd: {blocks: [1]}}]",
            "spd.blocks=[1]: one tensor-parallel rank has no reduction to drop; use mesh.tp=2",
        ),
    ],
)
def test_variant_that_cannot_run_is_refused(prepared, setting, words):
    with pytest.raises(ValueError, match=r"\w") as refused:
        prepared(*setting.split(" ", 1) if setting.startswith("mesh") else [setting])
    assert words in str(refused.value)


def test_variant_of_another_model_is_refused(prepared, tmp_path):
    other = tiny_model(tmp_path / "other", max_positions=397, heads=6)
    with pytest.raises(ValueError, match=r"variant a: .*other has hidden=24, but the baseline has 36"):
        prepared(f"variants=[{{name: a, model: {other}}}]")


def test_model_repaired_for_another_is_refused(prepared, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "adapted")
    SavedPlan(SPDPlan(2, 3, (0,)), (0, 1), (0,), "of another").write(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"variant a repaired: .*adapted was made from another model than tiny"):
        prepared(
            f"adapted={tmp_path / 'adapted'}", "mesh.tp=3", "spd.drop=none", "variants=[{name: a, spd: {drop: all}}]"
        )


def test_variant_that_drops_an_unrepaired_block_is_refused(prepared, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "adapted")
    source = prepared("eval.limit=1").variants[0].target.fingerprint
    SavedPlan(SPDPlan(2, 3, (0,)), (0, 1), (0,), source).write(tmp_path / "adapted")
    with pytest.raises(ValueError, match=r"variant a repaired: block 1 of .*adapted has not been repaired: .*budget"):
        prepared(
            f"adapted={tmp_path / 'adapted'}", "mesh.tp=3", "spd.drop=none", "variants=[{name: a, spd: {drop: all}}]"
        )


def test_variant_in_another_folder_has_its_own_context(prepared, tiny, tmp_path):
    words = (f"model.cache={tmp_path}", "model.rope_theta=70000", f"variants=[{{name: plain, model: {tiny}}}]")
    base, other = prepared(*words).variants
    assert other.target.folder == tiny and base.target.shape.rotaries != other.target.shape.rotaries


def test_repaired_variant_has_the_dtype_of_the_variant(base_config, tiny, tmp_path):
    composed = lambda *words: OmegaConf.merge(base_config, OmegaConf.from_dotlist(list(words)))  # noqa: E731
    adapted = tmp_path / "adapted"
    shutil.copytree(tiny, adapted)
    SavedPlan(SPDPlan(2, 3, (0, 1)), (0, 1), (0, 1), fingerprint(tiny)).write(adapted)
    variant = "variants=[{name: a, model: {dtype: bfloat16}, spd: {blocks: [0]}}]"
    _, plain, repaired = compose_variants(composed("mesh.tp=3", f"adapted={adapted}", variant))
    assert plain[1].model.dtype == repaired[1].model.dtype == "bfloat16"
    assert repaired[1].model.source == str(adapted)
    for model in (tiny, f"{{source: {tiny}}}"):
        other = f"variants=[{{name: a, model: {model}, spd: {{blocks: [0]}}}}]"
        with pytest.raises(ValueError, match=r"a has a model, and adapted=.* is another one: leave one of them out"):
            compose_variants(composed("mesh.tp=3", f"adapted={adapted}", other))


def test_order_is_measured_for_the_ranks_that_share_a_block(prepared):
    ranked = "variants=[{name: a, spd: {drop: ranked, budget: 0.5}}]"
    job = prepared("mesh.ring=3", "context.decode=sharded", ranked, "run.timeout_minutes=7")
    ((degree, order_job),) = make_order_jobs(job.configs, job.variants[0], 1, job.out).items()
    assert degree == order_job.target.mesh.tp == 3 and order_job.target.run.timeout_minutes == 7


def test_variant_may_have_a_longer_context(prepared, tmp_path):
    job = prepared(f"model.cache={tmp_path}", "variants=[{name: interpolated, model: {rope_factor: 2}}]")
    base, longer = job.variants
    assert (base.target.shape.max_positions, longer.target.shape.max_positions) == (397, 794)
    assert longer.digest != base.digest, "the two have different answers"


def test_variant_may_round_reductions(prepared):
    base, int8, small = prepared(
        "mesh.tp=3", "variants=[{name: int8, reduce: {attention: int8, mlp: int8}}, {name: a, reduce: {mlp: int8}}]"
    ).variants
    assert (base.target.reduce, int8.target.reduce) == (None, Reduce("int8", "int8"))
    assert (int8.target.reduce.name, Reduce(mlp="int8").name) == ("int8", "attention float32, mlp int8, groups of 64")
    assert len({base.digest, int8.digest, small.digest}) == 3, "they have different answers"


def test_variant_takes_old_names_of_settings(prepared, tmp_path):
    """``positions`` was the name of ``max_positions``, ``one_exchange`` that of ``gather_merge``."""
    variants = "variants=[{name: a, model: {positions: 794, rope_theta: 7e4}, context: {decode: one_exchange}}]"
    target = prepared(f"model.cache={tmp_path}", variants).variants[1].target
    assert (target.shape.max_positions, target.context.decode) == (794, "gather_merge")


@pytest.mark.parametrize("ranks", ["mesh.tp=3", "mesh.tp=1"])
def test_share_of_0_needs_no_order(prepared, ranks):
    job = prepared(ranks, "variants=[{name: a, spd: {drop: ranked, budget: 0}}]")
    assert not job.variants[1].target.plan and not make_order_jobs(job.configs, job.variants[0], 1, job.out)
