"""Recipes that take a model with dropped reductions: generate, pretrain, export."""

import re

from longctx.spd.plan import saved_plan
from recipes import export, generate, pretrain
from tests.recipes.spd.conftest import PROMPT, tensors


def test_generate_runs_an_adapted_model_with_any_share_dropped(cli, adapted_folder):
    saved = saved_plan(adapted_folder)
    assert saved and saved.plan.dropped == (0, 1) and saved.adapted == (0, 1)
    names = tensors(adapted_folder)
    assert {name for name in names if name.startswith("dropped.")} == {
        f"dropped.{name}" for name in names if name.startswith("model.layers.")
    }
    texts = []
    for more in ([], ["spd=none"], ["spd.budget=0.5"], ["mesh.ring=2"]):
        code, out, err = cli(generate, generate.task, f"model={adapted_folder}", "mesh.tp=3", *PROMPT, *more)
        assert code == 0, err
        texts.append(out)
        dropped = {"spd=none": "", "spd.budget=0.5": "in 1 blocks"}.get("".join(more), "in 2 blocks: 0, 1")
        assert ("reductions dropped" in err) == bool(dropped) and dropped in err
        if more in ([], ["spd.budget=0.5"]):
            assert "nothing to compare with" in err
        else:
            difference = float(re.search(r"largest logit difference +(\S+)", err)[1])
            assert difference < 1e-5, "neither a ring nor, with nothing dropped, tensor parallelism changes logits"
    assert texts[0] == texts[3]


def test_adapted_model_with_nothing_dropped_answers_as_the_original(cli, tiny, adapted_folder):
    answers = [
        cli(generate, generate.task, f"model={folder}", *PROMPT, *more)[1]
        for folder, more in ((tiny, []), (adapted_folder, ["spd=none", "mesh.tp=3"]), (adapted_folder, ["spd=none"]))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_training_drops_blocks_and_refuses_to_resume_without_them(cli, tmp_path):
    command = (
        "experiment=pretrain/tiny",
        "data.length=61",
        "data.batch=2",
        "evaluate.every=0",
        "run.threads=1",
        "mesh.tp=2",
    )
    code, _, err = cli(pretrain, pretrain.task, *command, "spd.blocks=[1,3]", "steps=2", f"out={tmp_path}")
    assert code == 0, err
    code, _, err = cli(pretrain, pretrain.task, *command, "steps=3", f"out={tmp_path}")
    assert code == 2 and "was made with mesh.tp=2 spd.blocks=[1,3]: use that" in err
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}", f"to={tmp_path / 'hf'}")
    assert code == 2 and "drop reductions between 2 tensor-parallel ranks" in err and "blocks [1, 3] of " in err
