"""recipes.extend and recipes.export: a model at a longer context, trained by two ranks, is what transformers loads."""

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

DATA = ("data.length=211", "data.batch=2", "data.end_token=false", "run.threads=1")
LONGER = ("model.max_positions=307", "model.rope_theta=77777.0")


def extended(cli, tiny, out, *settings: str) -> list[dict]:
    learning = ("steps=7", "evaluate.every=7", "optim.lr=1e-2")
    command = (f"model={tiny}", f"model.cache={out.parent / 'cache'}", f"out={out}", *DATA, *LONGER, *learning)
    code, _, err = cli(extend, extend.task, *command, *settings)
    assert code == 0, err
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def loss_by_transformers(folder) -> float:
    """Mean over the documents of the held-out batches, each by itself."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = DataSettings((TextSource(pydoc="test"),), 211, 2, end_token=False)
    total, count = 0.0, 0
    for batch, _ in islice(training_batches(data, tokenizer_of(folder))(None), 2):
        for tokens, targets, mask, lengths in zip(batch.tokens, batch.targets, batch.mask, batch.lengths, strict=True):
            for ids, wanted, counts in zip(*(x.split(list(lengths)) for x in (tokens, targets, mask)), strict=True):
                with torch.no_grad():
                    losses = torch.nn.functional.cross_entropy(net(ids[None]).logits[0], wanted, reduction="none")
                total, count = total + float((losses * counts).sum()), count + int(counts.sum())
    return total / count


def test_what_two_ranks_learned_is_what_transformers_loads(cli, tiny, tmp_path):
    told = extended(cli, tiny, tmp_path / "run", "mesh.ring=2")
    assert told[-1]["loss"] < told[0]["loss"] - 0.1
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'hf'}")
    assert code == 0, err
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_parameters"]["rope_theta"]) == (307, 77777.0)
    assert loss_by_transformers(tmp_path / "hf") == pytest.approx(told[-1]["eval/loss"], rel=1e-5)
    assert told[-1]["eval/perplexity"] == pytest.approx(math.exp(told[-1]["eval/loss"]))


def test_a_run_that_began_with_other_weights_is_not_gone_on_from(cli, tiny, tmp_path):
    extended(cli, tiny, tmp_path / "run", "steps=1")
    other = shutil.copytree(tiny, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    places = (f"model={other}", f"model.cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}")
    code, _, err = cli(extend, extend.task, *places, *DATA, *LONGER)
    assert code == 2
    assert re.search(r"step-00000001 began with weights \w+, this is weights \w+: give another out=", err), err


def test_linear_scaling_is_written_and_trained_with(cli, tiny, tmp_path):
    told = extended(cli, tiny, tmp_path / "run", "model.rope_theta=null", "model.rope_factor=3.0")
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path / 'run'}", f"to={tmp_path / 'hf'}")
    assert code == 0, err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]["factor"] == 3.0
    assert loss_by_transformers(tmp_path / "hf") == pytest.approx(told[-1]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.length=307"], r"data\.length=307 is more than the model's context of 97"),
        (["model.max_positions=-1"], r"model\.max_positions=-1: use more than 0"),
        (["model.rope_theta=0"], r"model\.rope_theta=0\.0: use more than 0"),
        (["model.rope_factor=x"], r"model\.rope_factor=x"),
    ],
)
def test_refusals(refused, tiny, tmp_path, settings, words):
    says = refused(extend, extend.task, f"model={tiny}", f"out={tmp_path}", *DATA, *settings)
    assert re.search(words, says), says


def test_a_model_without_weights_is_for_pretraining(refused, tmp_path):
    says = refused(extend, extend.task, "model=tiny", f"out={tmp_path}", *DATA)
    assert "this model has no weights yet, train it with recipes.pretrain" in says


def test_an_export_needs_a_checkpoint(refused, tmp_path):
    says = refused(export, export.task, f"checkpoint={tmp_path}", f"to={tmp_path / 'hf'}")
    assert "is neither a checkpoint nor a run with one: give the out= of a run" in says


def test_an_export_does_not_write_over_a_folder(cli, tmp_path):
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
