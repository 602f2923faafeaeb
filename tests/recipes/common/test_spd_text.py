"""The text of the SPD recipes: exactly the sequences that were asked for, whatever the batch of training."""

from types import SimpleNamespace

import pytest

from longctx.config import DataSettings, TextSource
from longctx.hf.config import shape_of
from recipes.common.spd_text import read_lines, text_of, write_lines


@pytest.mark.parametrize(("last", "available"), [("drop", 6), ("pad", 7)])
def test_sequences_of_an_incomplete_batch_count_and_those_that_only_fill_it_do_not(tiny, tmp_path, last, available):
    """A text of six sequences of seven tokens, a token a byte, and two bytes, which are a sequence if it is padded."""
    (tmp_path / "text.txt").write_text("abcdefg" * 6 + "hi")
    data = DataSettings((TextSource(str(tmp_path / "text.txt")),), 7, batch=4, epochs=1, end_token=False, last=last)
    target = SimpleNamespace(folder=tiny, shape=shape_of(tiny))
    assert (len(text_of(data, target, 5)), len(text_of(data, target, 5, more=9))) == (5, available)
    with pytest.raises(ValueError, match=rf"has {available} sequences of data\.length=7 tokens, not 8"):
        text_of(data, target, 8)


def test_lines_are_read_up_to_a_half_written_one_and_a_damaged_one_is_named(tmp_path):
    file = tmp_path / "new" / "sums.jsonl"
    write_lines(file, [{"model": "tiny"}, [0.5, 2.0]])
    with file.open("a") as lines:
        lines.write("[0.25, ")
    assert read_lines(file, {"model": "tiny"}) == [[0.5, 2.0]]
    with file.open("a") as lines:
        lines.write("\n")
    with pytest.raises(ValueError, match=r"sums\.jsonl is damaged .*: remove it; the same command measures again"):
        read_lines(file, {"model": "tiny"})
