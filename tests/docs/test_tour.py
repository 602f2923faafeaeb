"""The Python blocks of docs/tour.md run in order, in one namespace.

Warnings are errors, as in every test (pyproject.toml).
"""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "tour.md"


def python_blocks() -> list[tuple[int, str]]:
    """Return (first line, code) of each Python block of the tour."""
    text = TOUR.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks and len(blocks) * 2 == text.count("```"), "a block is not closed, or is not marked as python"
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in blocks]


def test_blocks_of_the_tour_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "tour"}
    for line, code in python_blocks():
        # Blank lines before the code: tracebacks then show the lines of the page.
        exec(compile("\n" * line + code, str(TOUR), "exec"), names)
