"""Pieces join to the tokens of the whole text, with every kind of tokenizer; a cut prompt reads what it needs."""

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longctx.data import tokenize as module
from longctx.data.tokenize import first_tokens, pieces, tokenize
from longctx.hf.config import tokenizer_of
from tests.data.texts import pages
from tests.tiny import tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
PREPEND = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def metaspace(model: Any, trainer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    """Return a trained tokenizer in the manner of SentencePiece, which adds ``<s>``."""
    made = Tokenizer(model)
    for name, value in parts.items():
        setattr(made, name, value)
    made.train_from_iterator(pages(61), trainer)
    first = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def legacy_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's form: no pre-tokenizer, a normalizer writes spaces as U+2581 and puts one first."""
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    by_word = metaspace(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.Metaspace())
    by_word.backend_tokenizer.pre_tokenizer = None
    by_word.backend_tokenizer.normalizer = PREPEND
    return by_word


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return metaspace(models.Unigram(), trainer, normalizer=normalizer, pre_tokenizer=pre_tokenizers.Metaspace())


def prefixed_bytes() -> PreTrainedTokenizerFast:
    """GPT-2's form with a space before the first word, and offsets without spaces."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    made.train_from_iterator(pages(61), trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: tiny_tokenizer(eos_token="<end>"),
    "legacy BPE": legacy_bpe,
    "unigram": unigram,
    "prefixed bytes": prefixed_bytes,
}


@pytest.fixture(scope="module", params=[*KINDS, "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "smollm2":
        return tokenizer_of(request.getfixturevalue("smollm2")[1])
    return KINDS[request.param]()


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(module, "_OVERLAP", 32)


def whole(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


words = st.sampled_from(
    ["the", " value", "\n", "\n\n", "  ", "\t", "\r\n", "object's", "éééé", "e\u0301", "日本語", "🙂", ".", "...",
     "((", "123456", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " " * 40, "\u2581", "\u00a0", "\u3000",
     "</s>", "<end>",
     "<|im_end|>", "<", "|", "__init__", "-----------------------------"]
)  # fmt: skip
texts = st.lists(st.one_of(words, st.sampled_from(pages(5)), st.text(max_size=7)), max_size=80).map("".join)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(text=texts, window=st.sampled_from([67, 131, 509]))
def test_pieces_join_to_the_tokens_of_the_whole_text(tokenizer, text, window):
    parts = list(pieces(StringIO(text).read, tokenizer, window))
    assert [token for piece in parts for token in piece.ids] == whole(tokenizer, text, add_special_tokens=False)


def test_long_text_is_tokenized_in_many_pieces(tokenizer):
    text = " ".join(pages(31))
    assert len(list(pieces(StringIO(text).read, tokenizer, 1009))) > len(text) / 1009
    assert tokenize(text, tokenizer).tolist() == whole(tokenizer, text)


@pytest.mark.parametrize("text", ["ab", "<s>ab", "<s>", ""])
def test_first_token_of_the_text_is_not_doubled(text):
    """transformers gives [bos, bos, a, b] for "<s>ab"."""
    adds_first = legacy_bpe()
    expected = [adds_first.bos_token_id, *whole(adds_first, text.removeprefix("<s>"), add_special_tokens=False)]
    if text == "<s>ab":
        expected = whole(adds_first, text, add_special_tokens=False)
    assert tokenize(text, adds_first).tolist() == first_tokens(StringIO(text).read, adds_first, None)[0] == expected


@pytest.mark.parametrize(("limit", "prefix"), [(1, ""), (3, "é"), (4, "éé"), (7, "ééé"), (9, "éééé")])
def test_cut_text_ends_between_characters(limit, prefix):
    """Two tokens a character."""
    ids, text = first_tokens(StringIO("éééé").read, tiny_tokenizer(), limit)
    assert (ids, text) == (whole(tiny_tokenizer(), prefix), prefix)


def test_cut_text_is_read_no_further_than_needed(tokenizer):
    text, characters = "\n".join(pages(97)), 0
    stream = StringIO(text)

    def read(size: int) -> str:
        nonlocal characters
        characters += size
        return stream.read(size)

    ids, prefix = first_tokens(read, tokenizer, 101)
    assert ids == whole(tokenizer, text)[:101] and text.startswith(prefix)
    assert characters < 8 * 101 + 300 < len(text) / 10
