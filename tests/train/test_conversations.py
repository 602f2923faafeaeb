"""A step on conversations equals transformers' with its own labels, in float64: the loss and every gradient."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from longctx.config import DataSettings, Mesh, TextSource
from longctx.parallel.launch import run_ranks
from tests.data.test_conversations import TEMPLATE, chat
from tests.float64 import KeepFloat64, float64_model
from tests.megatron.kinds import random_model
from tests.tiny import tiny_tokenizer
from tests.train.against_transformers import assert_step_equals
from tests.train.ranks import Run, train_each
from tests.train.test_step import tensors

LENGTH = 157
CHATS = {
    # Conversations of one and of two turns, in two sequences.
    "turns": [chat("2 + 3?", "5", "And 7 more?", "It is 12."), chat("Hi!", "Hello."), chat("a" * 71, "b", "c", "d")],
    # The first half of each has no answer, and the second sequence is padding.
    "long prompts": [chat("a" * 41, "bc"), chat("d" * 29, "e")],
}
CASES = [
    ("turns", Mesh(ring=2), {"strategy": "pass_q", "layout": "striped"}),
    ("turns", Mesh(ulysses=2), {}),
    ("turns", Mesh(tp=2), {}),
    ("turns", Mesh(dp=2), {}),
    ("turns", Mesh(pp=2), {}),
    ("long prompts", Mesh(ring=2), {"layout": "contiguous"}),
    ("long prompts", Mesh(dp=2), {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template, and a file for each of `CHATS`."""
    folder = random_model("tied llama", tmp_path_factory.mktemp("chats"), vocab_size=257, eos_token_id=256)
    tiny_tokenizer(eos_token="<end>", chat_template=TEMPLATE).save_pretrained(folder)
    for name, rows in CHATS.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def exact(folder: Path, rows: list[dict], to: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return transformers' loss over the answers of ``rows``, each run alone, and the gradients by name."""
    tokenizer, net = AutoTokenizer.from_pretrained(folder), float64_model(folder)
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    given = [tokenizer.apply_chat_template(row["messages"], **options) for row in rows]
    count = sum(int(one["assistant_masks"].sum()) for one in given)
    with KeepFloat64():
        loss = sum(
            net(
                one["input_ids"],
                labels=one["input_ids"].masked_fill(one["assistant_masks"] == 0, -100),
                num_items_in_batch=count,
            ).loss
            for one in given
        )
    loss.backward()
    for parameter in net.parameters():
        parameter.data = parameter.grad
    net.save_pretrained(to)
    return float(loss.detach()), tensors(to)


def test_loss_and_every_gradient_equal_those_of_transformers_on_every_axis(folder: Path, tmp_path: Path) -> None:
    """On some meshes, a rank has nothing to learn."""
    runs = []
    for i, (name, mesh, settings) in enumerate(CASES):
        source = TextSource(path=str(folder / f"{name}.jsonl"))
        data = DataSettings((source,), LENGTH, 2, epochs=1, end_token=False, last="pad", conversations="whole")
        job = Run(mesh, folder, ((LENGTH,),), data=data, dtype="float64", gradients=tmp_path / str(i))
        runs.append(replace(job, **settings))
    steps = run_ranks(2, train_each, runs)[0]
    right = {name: exact(folder, rows, tmp_path / name) for name, rows in CHATS.items()}
    for i, ((name, mesh, _), (step,)) in enumerate(zip(CASES, steps, strict=True)):
        assert_step_equals(step, tmp_path / str(i), right[name], (name, mesh))
