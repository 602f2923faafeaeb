"""Scores by depth and length: the right cells, the page, the picture."""

import json
from dataclasses import replace

import pytest

from eval.stats.depths import score_depths
from eval.stats.outcomes import Outcomes
from eval.stats.publish import write
from eval.stats.report import make_report
from tests.eval.stats.test_report import ORIGIN, RULES, VARIANTS, outcomes

DEPTHS = (0.0, 0.19, 0.2, 0.61, 1.0)
NEEDLE = Outcomes("needle_509", (1.0, 0.0, 1.0, 1.0, 0.0), depths=DEPTHS)
OTHER = Outcomes("association_509", (1.0, 1.0), depths=(0.1, 0.99))
LONGER = Outcomes("needle_4096", (0.0, 1.0), depths=(0.05, 0.5))
TASKS = {one.task: one for one in (LONGER, NEEDLE, OTHER)}


def test_every_example_is_in_its_cell():
    depths = score_depths(TASKS | {"good": outcomes(9), "ruler_vt_509": replace(outcomes(9), available=None)})
    assert (depths.tasks, depths.lengths) == (["needle", "association"], [509, 4096])
    assert depths.scores == [[pytest.approx(2 / 3), 0.0], [1.0, None], [None, 1.0], [1.0, None], [0.5, None]]
    assert depths.counts == [[3, 1], [1, 0], [0, 1], [1, 0], [2, 0]]


def test_first_examples_have_their_depths():
    assert NEEDLE.first(2).depths == DEPTHS[:2]


def test_no_depths_without_needles():
    assert score_depths({"good": outcomes(9)}) is None


def test_page_and_picture(tmp_path):
    base, half = (replace(one, outcomes=TASKS) for one in VARIANTS[:2])
    write(make_report([base, half], replace(RULES, gate=()), ORIGIN), tmp_path)
    page = (tmp_path / "report.md").read_text()
    section = page.partition("## By depth")[2].partition("## By task")[0]
    assert "The average score of needle, association by the place" in section
    assert "| variant | depth | 509 | 4,096 |" in section
    assert "| half | 0% to 20% | 0.67 (3) | 0.00 (1) |" in section and "| half | 40% to 60% |  | 1.00 (1) |" in section
    assert "![depths](depths.svg)" in page
    picture = (tmp_path / "depths.svg").read_text()
    assert picture.count("<!-- 0.67 -->") == 2 and "<!-- 4,096 -->" in picture and "<!-- half -->" in picture
    assert json.loads((tmp_path / "report.json").read_text())["depths"]["half"]["counts"][0] == [3, 1]
