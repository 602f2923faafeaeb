"""Models and settings that recipes.spd_adapt refuses, and the text that it reads by default."""

from types import SimpleNamespace

import pytest

from recipes import chat, export, generate, spd_adapt
from recipes.common import cli as recipe_cli
from tests.megatron.kinds import random_model
from tests.recipes.spd.conftest import PROMPT, REPAIR, TEXT
from tests.tiny import tiny_tokenizer


def test_default_settings_find_enough_text_and_hold_some_out(smollm2, tmp_path):
    """The default text, CPython's documentation, by the default model's tokenizer."""
    words = ("mesh.tp=3", "spd.budget=0.5", "data.sources=[{pydoc:train}]", f"out={tmp_path}")
    job = spd_adapt.prepare(recipe_cli.compose_config("spd_adapt", words))
    assert len(job.joint_text) == job.joint.steps * job.joint.batch > 0
    held_out, learned = ({tuple(row) for row in rows.tolist()} for rows in (job.held_out_tokens, job.joint_text.tokens))
    assert len(held_out) == job.repair.held_out and not held_out & learned, (
        "the text starts again without the held-out sequences"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mixtral", "a mixture of experts, in which each rank would choose experts by its own partial sum"),
        ("gemma3", "not tested on models that normalise or scale the outputs of attention"),
    ],
)
def test_models_on_which_repair_is_not_tested_are_refused(refused, tmp_path, capsys, kind, words):
    model = random_model(kind, tmp_path / "model", vocab_size=307, eos_token_id=None)
    tiny_tokenizer().save_pretrained(model)
    settings = (f"model={model}", "mesh.tp=2", "spd.budget=1", f"out={tmp_path / 'out'}", *TEXT, *REPAIR)
    capsys.readouterr()  # the progress bar of saving
    assert words in refused(spd_adapt, spd_adapt.task, *settings)


def test_unfit_settings_are_refused_before_any_rank_starts(refused, tiny, adapted_folder, tmp_path):
    def adapt(*settings: str) -> str:
        return refused(spd_adapt, spd_adapt.task, f"model={tiny}", f"out={tmp_path}", *TEXT, *REPAIR, *settings)

    assert "use mesh.tp=2 or more" in adapt()
    assert "(possible: 1, 3)" in adapt("mesh.tp=2")
    assert "not supported by recipes.spd_adapt: leave out reduce" in adapt("mesh.tp=3", "+reduce=int6")
    assert "has no use for mesh.ring=2" in adapt("mesh.tp=3", "mesh.ring=2")
    assert "repair.batch=30 is more than repair.sequences=24" in adapt("mesh.tp=3", "repair.batch=30")
    assert "spd.budget=None: " in (says := adapt("mesh.tp=3", "spd.budget=null")) and "spd.budget=0.5" in says
    assert "spd.budget=0.2 of 2 blocks drops none: use 0.25 or more" in adapt("mesh.tp=3", "spd.budget=0.2")
    assert "recipes.spd_adapt chooses the blocks" in adapt("mesh.tp=3", "spd.blocks=[1]")
    assert "joint.batch=3 is not a multiple of mesh.dp=2: use joint.batch=4" in adapt(
        "mesh.tp=3", "mesh.dp=2", "joint.batch=3", "spd.budget=1"
    )
    assert "not 99999" in adapt("mesh.tp=3", "sequences=99999")
    assert "recipes.spd_adapt needs model.dtype=float32" in adapt("mesh.tp=3", "model.dtype=bfloat16")
    assert "with other values of sequences" in refused(
        spd_adapt,
        spd_adapt.task,
        f"model={tiny}",
        f"out={adapted_folder}",
        "mesh.tp=3",
        *TEXT,
        *REPAIR,
        "repair.sequences=21",
    )
    says = refused(generate, generate.task, f"model={adapted_folder}", *PROMPT)
    assert "was made for mesh.tp=3, but here 1 rank has the weights: use mesh.tp=3 context.decode=gather_merge" in says
    assert "or mesh.tp=1 mesh.ulysses=1 mesh.ring=3 context.decode=sharded" in says
    says = refused(chat, chat.task, f"model={tiny}", "mesh.tp=3", "spd=ranked", "turns=nowhere.jsonl")
    assert "set spd.budget" in says
    assert "transformers cannot run it" in refused(
        export, export.task, f"checkpoint={adapted_folder}", f"to={tmp_path}/hf"
    )


def test_damaged_settings_of_repaired_blocks_are_named(tmp_path):
    (tmp_path / "000.safetensors").touch()
    (tmp_path / "about.json").touch()
    with pytest.raises(
        ValueError, match=rf"about\.json is damaged .*: use another out=, or remove {tmp_path}; the same"
    ):
        spd_adapt.refuse_other_run(SimpleNamespace(about_file=tmp_path / "about.json"))
