"""bench spd_texts: figures of each text are those of transformers, and of the shares of the counted tokens."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import tokenizer_of
from longctx.spd.folder import assemble, write_block
from longctx.spd.guards import GuardFigures
from longctx.spd.plan import SavedPlan, SPDPlan
from recipes.bench import spd_texts

LENGTH = 71
LINES = [
    "It was a dark and stormy night; " * 3,
    "Short.",
    "No two of these texts have the same length, and one is long.",
]


@pytest.fixture(scope="module")
def adapted_folder(tiny, tmp_path_factory):
    """A folder of recipes.spd_adapt whose blocks are the tiny model's own."""
    to = tmp_path_factory.mktemp("adapted")
    weights = {name: x for name, x in load_file(tiny / "model.safetensors").items() if ".layers." in name}
    write_block(to / "blocks", weights, {})
    assemble(tiny, [to / "blocks"], SavedPlan(SPDPlan(2, 3, (0, 1)), (1, 0), (0, 1), fingerprint(tiny)), to)
    return to


def test_beginnings_of_documents_have_the_perplexity_of_transformers(cli, tiny, adapted_folder, tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    texts = f"texts=[{{label:lines,path:{tmp_path}/lines.jsonl,from_start:true}},{{label:packed,pydoc:test}}]"
    words = (f"model={tiny}", f"adapted={adapted_folder}", texts, "shares=[0.5,1]", f"length={LENGTH}", "sequences=3")
    code, _, err = cli(spd_texts, spd_texts.task, *words, "run.threads=1", f"out={tmp_path}/out.json")
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())["texts"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), tokenizer_of(tiny)
    losses = []
    for line in LINES:
        ids = torch.tensor([tokenizer(line).input_ids[: LENGTH + 1]])
        with torch.inference_mode():
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    for share in result["lines"]["shares"]:
        for name, tokens in (("first 8", 8), ("first 64", 64), ("all", LENGTH)):
            expected = torch.cat([one[:tokens] for one in losses]).mean().exp()
            assert share["perplexities"][name]["original"] == pytest.approx(float(expected), rel=1e-5)
    assert result["lines"]["tokens"] == sum(map(len, losses)) and result["packed"]["tokens"] > 2 * LENGTH
    half, whole = (share["perplexities"]["all"] for share in result["packed"]["shares"])
    assert half["original"] == whole["original"] and len({half["repaired"], whole["repaired"], half["original"]}) == 3


def figures(rise: float, first: float, copied: float) -> GuardFigures:
    """Three sequences, the second of which is short; ``rise`` is added to the loss of the last."""
    losses = torch.arange(3 * 70, dtype=torch.float64).reshape(3, 70) / 100
    losses[2] += rise
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[1, 5:] = False
    losses[1, 5:] = 99 + rise
    return GuardFigures(losses, mask, torch.tensor([first, 7.0, 3.0]), copied)


def test_comparison_counts_only_the_tokens_of_the_text():
    result = spd_texts.compare(figures(0.0, 8.0, 0.5), figures(0.3, 2.0, 0.4))
    assert (result.norm, result.copied_original, result.copied) == (0.25, 0.5, 0.4)
    counted = {"first 8": (8, 5, 8), "first 64": (64, 5, 64), "all": (70, 5, 70), "worst sequence": (0, 0, 70)}
    assert result.perplexities.keys() == counted.keys()
    for name, (a, b, c) in counted.items():
        one = result.perplexities[name]
        assert one.increase == pytest.approx(math.exp(0.3 * c / (a + b + c)) - 1)
        assert one.repaired / one.original == pytest.approx(1 + one.increase)
        if name == "worst sequence":
            assert (one.low, one.high) == (None, None)
        else:
            assert one.low < one.increase < one.high
    # Student's interval of a ratio of means, for three sequences with increases 0, 0 and 2.4 and 8, 5 and 8 tokens.
    mean = 2.4 / 21
    residuals = torch.tensor([-8 * mean, -5 * mean, 2.4 - 8 * mean], dtype=torch.float64)
    half = 4.302652729911275 * float(residuals.std()) / 3**0.5 / 7
    assert result.perplexities["first 8"].low == pytest.approx(math.exp(mean - half) - 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["texts=[{path:x}]"], "texts.0.label is missing"),
        (["shares=[0]"], "shares.0=0"),
        (["sequences=1"], "sequences=1"),
        (["texts=[{label:a,pydoc:test},{label:a,pydoc:test}]"], "the label 'a' is used twice"),
        (["mesh.dp=2"], "has no use for mesh.dp=2: use mesh.dp=1"),
        (["texts=[{label:a,path:FILE,from_start:true}]"], "from_start needs sequences=16 documents of two tokens"),
        (["adapted=MODEL"], "is not a folder of recipes.spd_adapt"),
        (["length=9000"], "length=9,000 is more than the model's context of"),
        (["out=/dev"], "out=/dev is a folder: give the name of a file"),
    ],
)
def test_bad_settings_are_refused(refused, tiny, adapted_folder, tmp_path, settings, words):
    (tmp_path / "lines.jsonl").write_text('{"text": "One document."}\n')
    (tmp_path / "out.json").write_text("an earlier result, which may be overwritten")
    settings = [one.replace("FILE", f"{tmp_path}/lines.jsonl").replace("MODEL", str(tiny)) for one in settings]
    command = (f"model={tiny}", f"adapted={adapted_folder}", "length=31", f"out={tmp_path}/out.json", *settings)
    assert words in refused(spd_texts, spd_texts.task, *command)
