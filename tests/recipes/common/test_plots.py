"""recipes.common.plots: a picture shows every line, bar and part that it is given, each in a style of its own."""

import re

import pytest

from recipes.common.plots import draw_bars, draw_lines, draw_plan, draw_shares

NAMES = [f"name {chr(ord('a') + i)}" for i in range(13)]
LABELS = {"title": "t", "x": "x", "y": "y"}


def lines(out):
    draw_lines(out, [1, 2], {name: [i + 1, i + 2] for i, name in enumerate(NAMES)}, **LABELS)


def bars(out):
    draw_bars(out, [i + 1 for i in range(13)], NAMES, **LABELS)


def shares(out):
    left = {name: [(0.0, 1.0, 0.5, 1.5), (1.0, 2.0, 2.0, 2.5)] for name in NAMES[:6]}
    right = {name: [(0.0, 1.0), (1.0, 2.0)] for name in NAMES[6:]}
    draw_shares(out, left, right, title="t", x="x", y=("left", "right"))


def plan(out):
    memory = {"tp=1": dict.fromkeys(NAMES[6:], 1e9)}
    draw_plan(out, [1, 2], {name: [1.0, 2.0] for name in NAMES[:6]}, memory, limit=None, title="t")


def test_lines_run_from_the_smallest_to_the_largest_value(tmp_path):
    """Settings such as shares and ranks may have any order."""
    pictures = [tmp_path / "sorted.svg", tmp_path / "mixed.svg"]
    draw_lines(str(pictures[0]), [1, 2, 4], {"a": [5.0, 3.0, 7.0]}, **LABELS)
    draw_lines(str(pictures[1]), [4, 1, 2], {"a": [7.0, 5.0, 3.0]}, **LABELS)
    assert pictures[0].read_text() == pictures[1].read_text()


def test_ticks_have_all_their_digits(tmp_path):
    draw_lines(str(tmp_path / "x.svg"), [4096, 2**20], {"a": [0.9, 0.8]}, ticks=[4096, 2**20], **LABELS)
    assert "<!-- 1,048,576 -->" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("draw", [lines, bars, shares, plan])
def test_every_name_is_drawn(tmp_path, draw):
    draw(str(tmp_path / "picture.svg"))
    shown = re.findall(r"<!-- (name [a-m]) -->|>(name [a-m])<", (tmp_path / "picture.svg").read_text())
    assert sorted(a or b for a, b in shown) == NAMES
