"""recipes.extend and recipes.export: transformers loads the model that two ranks trained at a longer context."""

import json
import math
import re
import shutil
from itertools import islice

import pytest
import torch

from longctx.config import DataSettings, TextSource
from longctx.data.batches import training_batches
from longctx.hf.config import tokenizer_of
from recipes import export, extend, pretrain
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer

DATA = ("data.length=211", "data.batch=2", "data.end_token=false", "run.threads=1")
LONGER = ("model.max_positions=307", "model.rope_theta=77777.0")


def run_extend(cli, tiny, out, *settings: str) -> list[dict]:
    """Train the tiny model at a longer context and return the figures of each step."""
    training = ("steps=7", "evaluate.every=7", "optim.lr=1e-2")
    command = (f"model={tiny}", f"model.cache={out.parent / 'cache'}", f"out={out}", *DATA, *LONGER, *training)
    code, _, err = cli(extend, extend.task, *command, *settings)
    assert code == 0, err
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_by_transformers(folder) -> float:
    """Mean loss over the documents of the held-out batches, each run separately by transformers."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = DataSettings((TextSource(pydoc="test"),), 211, 2, end_token=False)
    total, count = 0.0, 0
    for batch, _ in islice(training_batches(data, tokenizer_of(folder))(None), 2):
        for tokens, targets, mask, lengths in zip(batch.tokens, batch.targets, batch.mask, batch.lengths, strict=True):
            for ids, expected, counts in zip(*(x.split(list(lengths)) for x in (tokens, targets, mask)), strict=True):
                with torch.no_grad():
                    losses = torch.nn.functional.cross_entropy(net(ids[None]).logits[0], expected, reduction="none")
                total, count = total + float((losses * counts).sum()), count + int(counts.sum())
    return total / count


def test_transformers_loads_what_two_ranks_trained(cli, tiny, tmp_path):
    steps = run_extend(cli, tiny, tmp_path / "run", "mesh.ring=2")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'hf'}")
    assert code == 0, err
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_parameters"]["rope_theta"]) == (307, 77777.0)
    assert loss_by_transformers(tmp_path / "hf") == pytest.approx(steps[-1]["eval/loss"], rel=1e-5)
    assert steps[-1]["eval/perplexity"] == pytest.approx(math.exp(steps[-1]["eval/loss"]))


def test_run_that_began_with_other_weights_is_not_resumed(cli, tiny, tmp_path):
    run_extend(cli, tiny, tmp_path / "run", "steps=1")
    other = shutil.copytree(tiny, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    places = (f"model={other}", f"model.cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}")
    code, _, err = cli(extend, extend.task, *places, *DATA, *LONGER)
    assert code == 2
    assert re.search(r"step-00000001 began with weights \S+, but this run with weights .*: give another out=", err), err


def test_linear_scaling_is_trained_with_and_exported(cli, tiny, tmp_path):
    steps = run_extend(cli, tiny, tmp_path / "run", "model.rope_theta=null", "model.rope_factor=3.0")
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'hf'}")
    assert code == 0, err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]["factor"] == 3.0
    assert loss_by_transformers(tmp_path / "hf") == pytest.approx(steps[-1]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.length=307"], r"data\.length=307 is more than the model's context of 97"),
        (["model.max_positions=-1"], r"model\.max_positions=-1: use more than 0"),
        (["model.rope_theta=0"], r"model\.rope_theta=0\.0: use more than 0"),
        (["model.rope_factor=x"], r"model\.rope_factor=x"),
        (
            ["data.conversations=whole", "data.end_token=true"],
            r"data\.conversations=whole does not fit this recipe: use nu",
        ),
    ],
)
def test_wrong_settings_are_refused(refused, tiny, tmp_path, settings, words):
    line = refused(extend, extend.task, f"model={tiny}", f"out={tmp_path}", *DATA, *settings)
    assert re.search(words, line), line


def test_model_without_weights_is_refused(refused, tmp_path):
    line = refused(extend, extend.task, "model=tiny", f"out={tmp_path}", *DATA)
    assert "this model has no weights yet, train it with recipes.pretrain" in line


def test_export_without_a_checkpoint_is_refused(refused, tmp_path):
    line = refused(export, export.task, f"checkpoint={tmp_path}", f"to={tmp_path / 'hf'}")
    assert "is neither a checkpoint nor a run with one: give the out= of a run" in line


def test_export_does_not_overwrite_a_folder(cli, tmp_path):
    settings = (
        "experiment=pretrain/tiny",
        f"out={tmp_path}",
        "data.length=61",
        "steps=1",
        "evaluate.every=0",
        "run.threads=1",
    )
    assert cli(pretrain, pretrain.task, *settings)[0] == 0
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}", f"to={tmp_path / 'model'}")
    assert code == 2
    assert "exists already" in err


def test_tiles_of_a_mixture_of_experts_are_refused(refused, tmp_path):
    model = random_model("mixtral", tmp_path / "model", vocab_size=307, eos_token_id=None)
    tiny_tokenizer().save_pretrained(model)
    command = (f"model={model}", f"out={tmp_path / 'out'}", *DATA, "mlp_rows=7")
    assert "mlp_rows=7 does not support mixtures of experts" in refused(extend, extend.task, *command)
