"""The text of tokens that arrive one by one is that of decoding them together, at a bounded cost for each."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longctx.config import Sampling
from longctx.infer.answer import AnswerText, TokenOffsets, cut_at_stop
from longctx.infer.detokenize import Detokenizer
from longctx.serve.request import Ask
from tests.tiny import tiny_tokenizer

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
PIECES = [*SPECIAL.values(), "▁", "a", "b", "▁a", "▁▁", "�", "é", ".", "▁.", "'", "▁'", "s", "▁n", "'t", "v", "e", "re"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT = "é\U0001f642 a€."  # characters of one to four bytes


def byte_fallback(*last: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Llama 2's form: a character without a token becomes byte tokens, which are decoded together."""
    pieces = {piece: i for i, piece in enumerate([*PIECES, *BYTES])}
    tokenizer = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def unigram(*, cleans: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], 0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=cleans, **SPECIAL)


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytes": tiny_tokenizer(eos_token="<end>"),
        "llama2": byte_fallback(decoders.Strip(" ", 1, 0)),
        "gemma": byte_fallback(),
        "unigram": unigram(cleans=False),
        "cleaned": unigram(cleans=True),
    }


NAMES = ("bytes", "llama2", "gemma", "unigram", "cleaned")


def sequences(name: str) -> st.SearchStrategy[list[int]]:
    """Random tokens, bytes of characters, and a token repeated more often than a window has tokens."""
    tokenizer = tokenizers()[name]
    if name == "bytes":
        bytes_of_text = list(tokenizer(TEXT)["input_ids"])
    else:
        bytes_of_text = [len(PIECES) + byte for byte in TEXT.encode()] if name in ("llama2", "gemma") else [3]
    token = st.integers(0, len(tokenizer)) | st.sampled_from(bytes_of_text) | st.integers(0, min(20, len(tokenizer)))
    repeated = st.tuples(token, st.integers(1, 70)).map(lambda pair: [pair[0]] * pair[1])
    part = st.lists(token, max_size=9) | repeated | st.just(bytes_of_text)
    return st.lists(part, max_size=4).map(lambda parts: [token for one in parts for token in one])


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), special=st.booleans())
def test_text_is_that_of_all_tokens_together(name, data, special):
    tokenizer, tokens, final = tokenizers()[name], data.draw(sequences(name)), ""
    text = Detokenizer(tokenizer, special=special)
    for i, token in enumerate(tokens):
        final += text.add(token)
        assert final + text.tail == tokenizer.decode(tokens[: i + 1], skip_special_tokens=not special)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), stop=st.lists(st.text("a. é'", min_size=1, max_size=4), max_size=2))
def test_answer_is_the_whole_text_and_its_pieces_join_to_it(name, data, stop):
    tokenizer, tokens = tokenizers()[name], data.draw(sequences(name))
    answer, pieces = AnswerText(tokenizer, stop), ""
    for i, token in enumerate(tokens):
        pieces += answer.add(token)
        whole = tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)
        assert answer.text == cut_at_stop(whole, stop) and answer.text.startswith(pieces)
        assert answer.stopped == any(one in whole for one in stop)
        if answer.stopped:
            break
    assert pieces + answer.end() == answer.text


@pytest.mark.parametrize("name", ["bytes", "llama2", "gemma"])
@pytest.mark.parametrize("prompt", ["", "日", "a日本語", "語" * 7, "\U0001f642" * 4, "aaaaaaa日", "ab\U0001f642aaaaaa"])
def test_answer_after_characters_of_bytes_is_its_own_text(name, prompt):
    """Few of the prompt's last tokens are read, but no character is cut, which would make all bytes after it wrong."""
    tokenizer = tokenizers()[name]

    def ids(text: str) -> list[int]:
        if name == "bytes":
            return list(tokenizer(text)["input_ids"])
        return [len(PIECES) + byte if byte >= 0x80 else PIECES.index(chr(byte)) for byte in text.encode()]

    tokens, after = ids("文字b"), Ask("m", (), (), Sampling()).after(ids(prompt))
    answer = AnswerText(tokenizer, after=after)
    assert "".join(map(answer.add, tokens)) + answer.end() == answer.text == "文字b"
    offsets = TokenOffsets(tokenizer, 5, after)
    assert [*dict.fromkeys(map(offsets.add, tokens))] == [5, 6, 7]


@pytest.mark.parametrize("kind", [AnswerText, TokenOffsets])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_bytes", [False, True])
def test_no_token_decodes_the_whole_answer_again(monkeypatch, kind, name, of_bytes):
    """The tokens that are decoded at once stay few, also if they never end a character or have no text."""
    tokenizer, lengths = tokenizers()[name], []
    decode = tokenizer.decode

    def count(tokens: list[int], **settings: bool) -> str:
        lengths.append(len(tokens))
        return decode(tokens, **settings)

    text = kind(tokenizer)
    monkeypatch.setattr(tokenizer, "decode", count)
    first = next(i for i in range(len(tokenizer)) if decode([i]).strip("�") == "") if of_bytes else 4
    for token in [first] * 300 + [tokenizer.eos_token_id] * 300 + [5] * 300:
        text.add(token)
    assert max(lengths) <= 70


def test_stop_text_much_longer_than_the_answer_is_not_searched_for_its_beginnings():
    class Text(str):
        slices = 0

        def __getitem__(self, place):
            Text.slices += 1
            return super().__getitem__(place)

    answer = AnswerText(tokenizers()["bytes"], [Text("x" * 100_000)])
    for token in tokenizers()["bytes"]("abxxc")["input_ids"]:
        answer.add(token)
    assert Text.slices < 20 and answer.text == "abxxc"
