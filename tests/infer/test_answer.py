"""Text that is streamed joins to the whole answer, and never shows a part of what ends it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.infer.answer import AnswerText, TokenOffsets, cut_at_stop, make_stop_check
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(eos_token="<end>")  # one token per byte


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


@given(st.text("aböc\U0001f642", max_size=13), st.lists(st.text("abö", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text, stop):
    answer, pieces = AnswerText(TOKENIZER, stop), []
    for token in ids(text):
        pieces.append(answer.add(token))
        assert text.startswith("".join(pieces)), "an incomplete character was shown"
        if answer.stopped:
            break
    pieces.append(answer.end())
    read = next((text[:end] for end in range(len(text) + 1) if any(one in text[:end] for one in stop)), text)
    expected = read[: min((read.index(one) for one in stop if one in read), default=len(read))]
    assert "".join(pieces) == answer.text == cut_at_stop(read, stop) == expected
    assert answer.stopped == any(one in text for one in stop)


def test_text_that_may_begin_a_stop_waits():
    answer = AnswerText(TOKENIZER, ["END", "xy"])
    assert [answer.add(token) for token in ids("a ENEx")] == ["a", " ", "", "", "EN", "E"]
    assert (answer.add(ids("y")[0]), answer.stopped, answer.end(), answer.text) == ("", True, "", "a ENE")


def test_special_tokens_are_no_text():
    answer = AnswerText(TOKENIZER)
    assert answer.add(ids("a")[0]) + answer.add(TOKENIZER.eos_token_id) + answer.end() == "a"


@pytest.mark.parametrize(("stop", "ends"), [(("ab",), [3, 1]), ((), [None, None])])
def test_stop_check_keeps_sequences_apart(stop, ends):
    stopped = make_stop_check(TOKENIZER, stop)
    texts, found = [ids("xaab"), ids("ab")], [None, None]
    for at in range(4):
        for i, text in enumerate(texts):
            if at < len(text) and stopped(i, text[: at + 1]) and found[i] is None:
                found[i] = at
    assert found == ends


class Spaced:
    """A tokenizer that leaves out a space at the beginning of a text, as Llama 2's."""

    WORDS = ("The", " capital", " is", " Paris", ",", " Paris", "Paris")

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.WORDS[token] for token in tokens).removeprefix(" ")

    def convert_tokens_to_ids(self, names: list[str]) -> list[None]:
        return [None] * len(names)


def test_space_before_the_first_word_belongs_to_a_continuation():
    alone, after = AnswerText(Spaced()), AnswerText(Spaced(), after=[1, 2])
    assert [alone.add(3), alone.add(4), alone.text] == ["Paris", ",", "Paris,"]
    assert [after.add(3), after.add(4), after.text] == [" Paris", ",", " Paris,"]
    stopped = AnswerText(Spaced(), [" Paris"], [1, 2])
    assert stopped.add(3) == "" and stopped.stopped


def test_character_that_the_prompt_began_belongs_to_the_answer():
    whole = ids("ö")
    answer = AnswerText(TOKENIZER, after=ids("a") + whole[:1])
    assert answer.add(whole[1]) + answer.add(ids("b")[0]) == "öb"


@given(st.text("aböc\U0001f642", max_size=13), st.integers(0, 3))
def test_offsets_are_those_of_whole_characters(text, begin):
    offsets = TokenOffsets(TOKENIZER, begin)
    expected = [begin + at for at, one in enumerate(text) for _ in one.encode()]
    assert [offsets.add(token) for token in ids(text)] == expected


def test_offsets_after_a_prompt_count_the_space():
    offsets = TokenOffsets(Spaced(), 10, [1, 2])
    assert [offsets.add(token) for token in (3, 4, 5)] == [10, 16, 17]
    alone = TokenOffsets(Spaced())
    assert [alone.add(token) for token in (3, 4, 5)] == [0, 5, 6]


def test_replacement_character_of_a_prompt_is_not_repeated():
    """A prompt may really have this character: then the answer does not begin with it."""
    answer = AnswerText(TOKENIZER, after=ids("abc \ufffd"))
    assert "".join(answer.add(token) for token in ids(" next")) == " next"


def test_special_tokens_of_a_prompt_have_a_text():
    tokens = [*ids("a"), TOKENIZER.eos_token_id, *ids("b")]
    shown, hidden = TokenOffsets(TOKENIZER, special=True), TokenOffsets(TOKENIZER)
    assert [shown.add(token) for token in tokens] == [0, 1, 1 + len("<end>")]
    assert [hidden.add(token) for token in tokens] == [0, 1, 1]
