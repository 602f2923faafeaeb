"""Families of models: the table of longctx/models/README.md, refusals, names of tensors."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, Qwen3MoeConfig

from longctx.config import Mesh
from longctx.model_shape import Experts
from longctx.models import FAMILIES, family_of
from longctx.models.family import split_name
from longctx.parallel.validate import refuse_unfit
from recipes.models import FamilyRow, family_rows
from tests.megatron.kinds import EVEN_EXPERTS, KINDS

README = Path(__file__).parents[2] / "longctx" / "models" / "README.md"
BEGIN, END = "<!-- table: pytest tests/models --write-table -->\n", "<!-- end of the table -->\n"


def spd_cell(spd: str) -> str:
    return spd if spd == "exact" else f"refused: {spd.partition(': use')[0].removeprefix('this model has ')}"


def mesh_cell(model_type: str, mesh: Mesh) -> str:
    """Return "exact", or why ``mesh`` is refused, for the small models of ``model_type`` that the tests run."""
    try:
        for config in (config for config in KINDS.values() if config.model_type == model_type):
            refuse_unfit(mesh, FAMILIES[model_type].shape(config, ()))
    except ValueError as error:
        return f"refused: {error}"
    return "exact"


def experts_cell(row: FamilyRow) -> str:
    """Return "exact" for a family whose experts the tests divide among ranks."""
    if "mixture of experts" not in row.features:
        return "no experts"
    return "exact" if row.model_type in {KINDS[kind].model_type for kind in EVEN_EXPERTS} else "not tested"


def table() -> str:
    """A row for each feature, a column for each family; then a row for each family, a column for each use.

    The small models of `KINDS` are what the tests named in the README run, so a family without one has no test.
    """
    rows = family_rows()
    features = sorted({feature for row in rows for feature in row.features})
    names = [row.model_type for row in rows]
    lines = [f"| | {' | '.join(names)} |", f"|---|{':-:|' * len(names)}"]
    lines += [f"| {each} | {' | '.join('x' if each in row.features else '' for row in rows)} |" for each in features]
    tested = {config.model_type for config in KINDS.values()}
    lines += ["", "| model type | models | prefill | decode | train | export | tp | ulysses | ep | Sync-Point-Drop |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        uses = ["exact" if row.model_type in tested else "not tested"] * 4
        meshes = [mesh_cell(row.model_type, mesh) for mesh in (Mesh(tp=2), Mesh(ulysses=2))]
        cells = [*uses, *meshes, experts_cell(row), spd_cell(row.spd)]
        lines += [f"| `{row.model_type}` | {row.examples} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def test_table_of_the_readme_is_that_of_the_registry(pytestconfig: pytest.Config) -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    if pytestconfig.getoption("--write-table"):
        README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
        return
    assert written.strip() == table().strip(), "write it anew: pytest tests/models --write-table"


def test_cells_are_short_and_every_family_is_tested() -> None:
    cells = [cell.strip() for line in table().splitlines() for cell in line.split("|")]
    assert max(map(len, cells)) <= 100 and "not tested" not in cells


def test_every_file_is_short() -> None:
    files = [file for file in README.parent.glob("*.py") if file.name not in ("__init__.py", "family.py")]
    assert len(files) > 8 and all(len(file.read_text().splitlines()) <= 100 for file in files)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("deepseek_v3", "needs multi-head latent attention"),
        ("qwen2_moe", "needs a shared expert.*the nearest is qwen3_moe"),
        ("gemma3", "needs images"),
        ("none_such", "is not implemented: use one of gemma3_text, glm4"),
    ],
)
def test_unknown_model_type_names_what_it_needs_and_the_nearest(model_type: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family_of(model_type)


def test_parts_of_a_fused_tensor_are_in_order() -> None:
    family = FAMILIES["phi3"]
    parts = tuple(f"model.layers.7.self_attn.{name}_proj.weight" for name in "qkv")
    assert family.groups(parts) == {"model.layers.7.self_attn.qkv_proj.weight": [*parts]}
    assert family.stored("lm_head.weight") == "lm_head.weight"


def test_experts_of_a_family_have_their_names() -> None:
    name = "model.layers.7.mlp.experts.12.up_proj.weight"
    assert FAMILIES["mixtral"].stored(name) == "model.layers.7.block_sparse_moe.experts.12.w3.weight"
    assert FAMILIES["qwen3_moe"].stored(name) == name
    assert FAMILIES["gpt_oss"].stored(name) == "model.layers.7.mlp.experts.gate_up_proj"


def test_dense_layers_among_layers_with_experts() -> None:
    """In Qwen3-MoE every third layer has experts, counted from 1, except layers that are listed as dense."""
    config = Qwen3MoeConfig(num_hidden_layers=9, decoder_sparse_step=3, mlp_only_layers=[5], norm_topk_prob=True)
    shape = FAMILIES["qwen3_moe"].shape(config, ())
    assert [layer for layer, experts in enumerate(shape.experts) if experts] == [2, 8]
    assert shape.mixture == Experts(128, 8, 768, renormalised=True) and shape.ffn_sizes == (768, 6144)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is not possible with 8 experts"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with renormalised weights"),
    ],
)
def test_impossible_number_of_experts_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FAMILIES["mixtral"].shape(MixtralConfig(**changed), ())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers.3.", "mlp.up_proj", "weight")),
        ("model.layers.12.input_layernorm.bias", ("model.layers.12.", "input_layernorm", "bias")),
        ("model.norm.weight", ("", "model.norm", "weight")),
    ],
)
def test_name_of_a_tensor_is_split(name: str, fields: tuple[str, str, str]) -> None:
    assert split_name(name) == fields
