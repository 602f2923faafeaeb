"""Dropped blocks as chosen by settings, a sensitivity.json and a model's folder; and the errors of each."""

import json
from pathlib import Path

import pytest

from longctx.config import SPD, Mesh
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.spd.plan import SavedPlan, SPDPlan, least_budget, rank_blocks, saved_plan, within
from recipes.common.spd_plan import choose_plan
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 2 blocks."""
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=64)


def dropped_blocks(folder: Path, tp: int = 3, **spd: object) -> tuple[int, ...]:
    return choose_plan(SPD(**spd), Mesh(tp=tp), folder, shape_of(folder), saved_plan(folder)).dropped


def test_share_of_blocks_rounds_to_the_nearest_whole_number() -> None:
    order = rank_blocks([5.0, 0.1, 0.3, 0.1, 7.0])
    assert order == (1, 3, 2, 0, 4)
    assert within(order, 0.5) == (1, 3, 2) and within(order, 0.25) == (1,) and within(order, 0) == ()
    for layers in range(1, 200):
        assert within(range(layers), least_budget(layers)) and not within(range(layers), least_budget(layers) - 0.001)
    assert [len(within(range(30), share)) for share in (0.25, 0.5, 0.7, 0.75, 1)] == [8, 15, 21, 23, 30]


def test_settings_drop_all_no_or_named_blocks(folder: Path) -> None:
    assert dropped_blocks(folder) == () and dropped_blocks(folder, drop="none") == ()
    assert dropped_blocks(folder, drop="all") == (0, 1) and dropped_blocks(folder, blocks=(1,)) == (1,)
    assert dropped_blocks(folder, tp=1) == ()


def test_sensitivity_file_gives_the_order_for_its_model_and_degree_only(folder: Path, tmp_path: Path) -> None:
    blocks = [{"score": 2.0}, {"score": 1.0}]
    measured = {"model": "tiny", "fingerprint": fingerprint(folder), "tp": 3, "blocks": blocks}
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(measured))
    assert dropped_blocks(folder, drop="ranked", sensitivity=str(file), budget=0.5) == (1,)
    file.write_text(json.dumps({**measured, "blocks": [{"score": "inf"}, {"score": 10.0}]}))  # beyond a float
    assert dropped_blocks(folder, drop="ranked", sensitivity=str(file), budget=0.5) == (1,)
    for key, value, words in (
        ("tp", 2, r"mesh\.tp=2"),
        ("fingerprint", "other", "another model"),
    ):
        file.write_text(json.dumps({**measured, key: value}))
        with pytest.raises(ValueError, match=words):
            dropped_blocks(folder, sensitivity=str(file), budget=0.5)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"not a file of recipes\.spd_sensitivity"):
        dropped_blocks(folder, sensitivity=str(file), budget=0.5)
    with pytest.raises(ValueError, match="cannot be read"):
        dropped_blocks(folder, sensitivity=str(tmp_path / "nothing.json"), budget=0.5)


def test_adapted_folder_gives_dropped_blocks_and_their_order(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", max_positions=64)
    saved = SavedPlan(SPDPlan(2, 3, (1,), own_norms=True), (1, 0), (1,), "source")
    saved.write(folder)
    assert saved_plan(folder) == saved
    assert dropped_blocks(folder) == (1,) and dropped_blocks(folder, budget=1) == (0, 1)
    assert dropped_blocks(folder, drop="none") == ()
    with pytest.raises(ValueError, match=r"made for mesh\.tp=3, but here 1 rank .*: use mesh\.tp=3 .*, or spd=none"):
        dropped_blocks(folder, tp=1)
    (folder / "spd_plan.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a plan"):
        saved_plan(folder)


@pytest.mark.parametrize(
    ("spd", "words"),
    [
        ({"blocks": (2,)}, "no block 2; use blocks 0 to 1"),
        ({"blocks": (0,), "budget": 0.5}, r"leave out spd\.budget"),
        ({"budget": 1.5}, "from 0 to 1"),
        ({"budget": 0.5}, r"measure it with .*recipes\.spd_sensitivity mesh\.tp=3"),
        ({"drop": "ranked"}, r"set spd\.budget"),
        ({"drop": "all", "budget": 0.5}, "use spd=ranked"),
        ({"sensitivity": "x"}, r"set spd\.budget"),
    ],
)
def test_contradictory_settings_are_refused(folder: Path, spd: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dropped_blocks(folder, **spd)


def test_one_rank_has_no_reduction_to_drop(folder: Path) -> None:
    with pytest.raises(ValueError, match="one tensor-parallel rank has no reduction"):
        dropped_blocks(folder, tp=1, drop="all")
