"""Which blocks drop: what the command line, a sensitivity.json and a model's folder say, and what is refused."""

import json
from pathlib import Path

import pytest

from longctx.config import SPD, Mesh
from longctx.hf.checkpoint import fingerprint
from longctx.hf.config import shape_of
from longctx.spd.plan import SavedPlan, SPDPlan, ranked, saved_plan, within
from recipes.common.spd_plan import planned
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model of 2 blocks."""
    return tiny_model(tmp_path_factory.mktemp("model"), max_positions=64)


def asked(folder: Path, tp: int = 3, **spd: object) -> tuple[int, ...]:
    return planned(SPD(**spd), Mesh(tp=tp), folder, shape_of(folder), saved_plan(folder)).dropped


def test_a_share_of_blocks_is_the_nearest_whole_number_of_the_least_sensitive() -> None:
    order = ranked([5.0, 0.1, 0.3, 0.1, 7.0])
    assert order == (1, 3, 2, 0, 4)
    assert within(order, 0.5) == (1, 3, 2) and within(order, 0.25) == (1,) and within(order, 0) == ()
    assert [len(within(range(30), share)) for share in (0.25, 0.5, 0.7, 0.75, 1)] == [8, 15, 21, 23, 30]


def test_all_none_or_the_blocks_that_are_named(folder: Path) -> None:
    assert asked(folder) == () and asked(folder, drop="none") == ()
    assert asked(folder, drop="all") == (0, 1) and asked(folder, blocks=(1,)) == (1,)
    assert asked(folder, tp=1) == ()


def test_an_order_is_read_from_a_sensitivity_file_of_this_model_and_degree(folder: Path, tmp_path: Path) -> None:
    told = {"model": "tiny", "fingerprint": fingerprint(folder), "tp": 3, "blocks": [{"score": 2.0}, {"score": 1.0}]}
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(told))
    assert asked(folder, drop="ranked", sensitivity=str(file), budget=0.5) == (1,)
    for key, value, why in (
        ("tp", 2, r"mesh\.tp=2"),
        ("fingerprint", "other", "another model"),
    ):
        file.write_text(json.dumps({**told, key: value}))
        with pytest.raises(ValueError, match=why):
            asked(folder, sensitivity=str(file), budget=0.5)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"not a file of recipes\.spd_sensitivity"):
        asked(folder, sensitivity=str(file), budget=0.5)
    with pytest.raises(ValueError, match="cannot be read"):
        asked(folder, sensitivity=str(tmp_path / "nothing.json"), budget=0.5)


def test_a_model_s_folder_says_what_drops_and_in_which_order(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", max_positions=64)
    saved = SavedPlan(SPDPlan(2, 3, (1,), own_norms=True), (1, 0), (1,), "source")
    saved.write(folder)
    assert saved_plan(folder) == saved
    assert asked(folder) == (1,) and asked(folder, budget=1) == (0, 1) and asked(folder, drop="none") == ()
    with pytest.raises(ValueError, match=r"made for mesh\.tp=3, this is mesh\.tp=1: use that, or spd=none"):
        asked(folder, tp=1)
    (folder / "spd_plan.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a plan"):
        saved_plan(folder)


@pytest.mark.parametrize(
    ("spd", "why"),
    [
        ({"blocks": (2,)}, "no block 2; the model's are 0 to 1"),
        ({"blocks": (0,), "budget": 0.5}, r"leave spd\.budget"),
        ({"budget": 1.5}, "from 0 to 1"),
        ({"budget": 0.5}, r"measure it with .*recipes\.spd_sensitivity mesh\.tp=3"),
        ({"drop": "ranked"}, r"say with spd\.budget"),
        ({"drop": "all", "budget": 0.5}, "use spd=ranked"),
        ({"sensitivity": "x"}, r"say with spd\.budget"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, spd: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        asked(folder, **spd)


def test_one_rank_has_nothing_to_drop(folder: Path) -> None:
    with pytest.raises(ValueError, match="one tensor-parallel rank has no reduction"):
        asked(folder, tp=1, drop="all")
