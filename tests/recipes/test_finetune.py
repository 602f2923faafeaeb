"""recipes.finetune: a run on two ranks, resumed and exported, equals transformers on the same conversations."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import export, extend, finetune
from tests.data.test_conversations import TEMPLATE, chat
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer
from tests.train.test_step import tensors

RUN = ("data.length=157", "data.batch=2", "run.threads=1", "optim.lr=1e-2", "optim.decay=constant", "optim.warmup=0")


def write_chats(file, seed: int) -> None:
    """Write conversations of one to three turns, more than a run of four steps reads."""
    words = [f"{n * seed % 89}" for n in range(400)]
    rows = [chat(*(" ".join(words[n : n + 7 - m]) for m in range(2 * (n % 3 + 1)))) for n in range(60)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model that has a chat template, one without, and conversations."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, template in (("model", TEMPLATE), ("plain", None)):
        random_model("tied llama", folder / name, vocab_size=257, eos_token_id=256, num_hidden_layers=1)
        tiny_tokenizer(eos_token="<end>", chat_template=template).save_pretrained(folder / name)
    write_chats(folder / "chats.jsonl", 7)
    write_chats(folder / "test.jsonl", 11)
    return folder


@pytest.fixture
def words(folder, tmp_path):
    """The words of a run's command line, with its output in ``out``."""
    text = (f"data.sources=[{{path:{folder}/chats.jsonl}}]", f"data.test=[{{path:{folder}/test.jsonl}}]")
    return (f"model={folder}/model", f"out={tmp_path}/out", *text, *RUN)


@pytest.fixture
def run(cli, words, tmp_path):
    """``run(*settings)``: the figures of each step of a run with ``settings``."""

    def tuned(*settings: str) -> list[dict]:
        code, _, err = cli(finetune, finetune.task, *words, *settings)
        assert code == 0, err
        return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    return tuned


def loss_by_transformers(model, file, conversations: int) -> float:
    """Mean loss over the answers of the first ``conversations`` of ``file``, each alone, with transformers' labels."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for line in file.read_text().splitlines()[:conversations]:
        given = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        learned = given["assistant_masks"].bool()
        labels = given["input_ids"].masked_fill(~learned, -100)
        with torch.no_grad():
            total += float(net(given["input_ids"], labels=labels, num_items_in_batch=1).loss)
        count += int(learned.sum())
    return total / count


def test_run_resumes_on_other_ranks_and_transformers_loads_the_result(cli, run, words, config_of, folder, tmp_path):
    run("mesh.ring=2", "steps=2", "evaluate.every=0")
    with pytest.raises(ValueError, match=r"was made with data\.conversations=whole: use that, or another out="):
        finetune.prepare(config_of("finetune", *words, "data.conversations=split"))
    with pytest.raises(ValueError, match=r"was made with lora\.rank=null: use that, or another out="):
        finetune.prepare(config_of("finetune", *words, "lora.rank=3"))
    resumed = run("mesh.dp=2", "steps=4", "evaluate.every=4", "evaluate.batches=1")
    (tmp_path / "out").rename(tmp_path / "resumed")
    whole = run("steps=4", "evaluate.every=4", "evaluate.batches=1")
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.1
    for name in ("loss", "grad_norm", "tokens"):
        assert [step[name] for step in resumed] == pytest.approx([step[name] for step in whole], rel=1e-5), name
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}/resumed", f"to={tmp_path}/hf")
    assert code == 0, err
    loss = loss_by_transformers(tmp_path / "hf", folder / "test.jsonl", held_out_conversations(folder))
    assert resumed[-1]["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_adapters_are_merged_into_their_weights_alone(cli, run, words, config_of, folder, tmp_path):
    lora = ("lora.rank=3", "lora.alpha=6", "lora.targets=[linear_proj,linear_fc1]")
    steps = run("mesh.tp=2", "steps=4", "evaluate.every=4", "evaluate.batches=1", *lora)
    assert steps[-1]["loss"] < steps[0]["loss"]
    with pytest.raises(ValueError, match=r"was made with lora\.rank=3: use that, or another out="):
        finetune.prepare(config_of("finetune", *words, "steps=4"))
    with pytest.raises(ValueError, match=r"was made with lora\.targets=\[linear_proj,linear_fc1\]: use that"):
        finetune.prepare(config_of("finetune", *words, "steps=4", *lora[:2]))
    with pytest.raises(ValueError, match=r"was made with lora\.alpha=6: use that, or another out="):
        finetune.prepare(config_of("finetune", *words, "steps=4", *lora, "lora.alpha=7"))
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}/out", f"to={tmp_path}/hf")
    assert code == 0, err
    loss = loss_by_transformers(tmp_path / "hf", folder / "test.jsonl", held_out_conversations(folder))
    assert steps[-1]["eval/loss"] == pytest.approx(loss, rel=1e-5)
    before, after = (tensors(at) for at in (folder / "model", tmp_path / "hf"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"o_proj", "gate_proj", "up_proj"}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-4) == 3, name


def test_adapters_of_a_bfloat16_run_are_merged_without_rounding(cli, run, folder, tmp_path):
    """A rounded sum would differ from the weight by a matrix of full rank."""
    run("model.dtype=bfloat16", "steps=2", "evaluate.every=0", "lora.rank=3", "lora.targets=[linear_proj]")
    code, _, err = cli(export, export.task, f"checkpoint={tmp_path}/out", f"to={tmp_path}/hf")
    assert code == 0, err
    share = int(re.search(r"rounding would change the weights by (\d+)% of what the adapters add", err)[1]) / 100
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    before, after = (tensors(at) for at in (folder / "model", tmp_path / "hf"))
    error = size = 0.0
    for name, weight in after.items():
        delta = weight.double() - before[name].bfloat16().double()
        if "o_proj" in name:
            assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 3, name
            error += float((weight.bfloat16().double() - weight.double()).square().sum())
            size += float(delta.square().sum())
        else:
            assert not delta.any(), name
    assert share == pytest.approx((error / size) ** 0.5, abs=0.01) and share > 0.01
    loaded, name = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict(), "model.layers.0.self_attn.o_proj"
    assert torch.equal(loaded[f"{name}.weight"], after[f"{name}.weight"])


def held_out_conversations(folder) -> int:
    """Return the number of conversations in the first two held-out sequences of 157 tokens, packed here in order."""
    tokenizer, counts, room = AutoTokenizer.from_pretrained(folder / "model"), [0], 157
    for line in (folder / "test.jsonl").read_text().splitlines():
        tokens = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)["input_ids"]
        if len(tokens) - 1 > room:  # the newline after the last answer is left out
            counts, room = [*counts, 0], 157
        counts[-1], room = counts[-1] + 1, room - (len(tokens) - 1)
    return sum(counts[:2])


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        (finetune, ["model={folder}/plain"], "has no chat template: set model.chat_template=FILE"),
        (finetune, ["data.conversations=null"], r"data\.conversations=null does not fit this recipe: use whole or spl"),
        (finetune, ["data.length=31"], r"chats\.jsonl, line \d+ has \d+ tokens, more than data\.length=31"),
        (finetune, ["data.end_token=true"], r"data\.end_token=true: the chat template ends a conversation; use false"),
        (finetune, ["data=pydoc", "data.sources=[{pydoc:train}]"], "pydoc:train has no lines of conversations"),
        (finetune, ["lora.rank=0"], r"lora\.rank=0: use 1 or more, or null to train all weights"),
        (
            finetune,
            ["lora.rank=2", "hardware=h100_gtt", "model.dtype=bfloat16"],
            r"lora\.rank=2 is not supported with hardware=.*; use",
        ),
        (finetune, ["lora.targets=[q_proj]"], r"lora\.targets\.0"),
        (finetune, ["data.batch=3", "mesh.dp=2"], r"data\.batch=3 sequences do not divide over 2"),
        (
            extend,
            ["data.conversations=split", "data.end_token=false"],
            r"data\.conversations=split does not fit .* null",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused(refused, folder, tmp_path, recipe, settings, words):
    command = (f"model={folder}/model", f"data.sources=[{{path:{folder}/chats.jsonl}}]", "evaluate.every=0", *RUN)
    data = ["data=text"] * (recipe is extend)
    line = refused(
        recipe,
        recipe.task,
        *data,
        *command,
        f"out={tmp_path}/o",
        *(x.replace("{folder}", str(folder)) for x in settings),
    )
    assert re.search(words, line), line
    assert not (tmp_path / "o").exists()
