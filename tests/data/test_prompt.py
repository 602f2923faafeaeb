"""A prompt is exactly the text that was asked for, or refused with what to do instead."""

import pytest
from transformers import PreTrainedTokenizerFast

from longctx.config import PromptSource
from longctx.data import prompt
from tests.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
DOCUMENT = "Thé quick brown fox\njumps  over 13 lazy dogs."


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    return tiny_tokenizer(chat_template=TEMPLATE)


def prompt_tokens(source, tokenizer):
    return prompt.prompt_tokens(source, tokenizer)[0]


def test_text_is_tokenized_as_it_stands(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)
    assert len(ids) == len(DOCUMENT.encode())
    assert tokenizer.decode(ids) == DOCUMENT


def test_a_file_gives_the_same_as_its_text(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_bytes(DOCUMENT.encode())
    from_file = prompt_tokens(PromptSource(file=str(tmp_path / "book.txt")), tokenizer)
    assert from_file == prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)


@pytest.mark.parametrize(("asked", "kept"), [(1, 1), (17, 17), (1009, len(DOCUMENT.encode()))])
def test_cutting_keeps_that_many_tokens(tokenizer, asked, kept):
    whole = prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)
    assert prompt_tokens(PromptSource(text=DOCUMENT, tokens=asked), tokenizer) == whole[:kept]


def test_a_question_and_its_document_go_through_the_chat_template(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT, question="Who jumps?"), tokenizer)
    assert tokenizer.decode(ids) == f"<user>{DOCUMENT}\n\nWho jumps?<bot>"


def test_cutting_a_document_leaves_the_question_whole(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT, question="Who jumps?", tokens=17), tokenizer)
    assert tokenizer.decode(ids) == f"<user>{DOCUMENT.encode()[:17].decode()}\n\nWho jumps?<bot>"


@pytest.mark.parametrize(
    ("tokens", "of_text"), [(None, len(DOCUMENT.encode())), (17, 17), (1009, len(DOCUMENT.encode()))]
)
@pytest.mark.parametrize("question", [None, "Who jumps?"])
def test_how_much_of_a_prompt_is_its_text(tokenizer, question, tokens, of_text):
    source = PromptSource(text=DOCUMENT, question=question, tokens=tokens)
    ids, text = prompt.prompt_tokens(source, tokenizer)
    template = len(f"<user>\n\n{question}<bot>") if question else 0
    assert (text, len(ids)) == (of_text, of_text + template)


def test_the_documentation_of_python_is_long_and_a_topic_part_of_it(tokenizer):
    ids = prompt_tokens(PromptSource(pydoc="all"), tokenizer)
    assert len(ids) > 300_000, "bytes"
    assert prompt_tokens(PromptSource(pydoc="all", tokens=101), tokenizer) == ids[:101]
    topic = tokenizer.decode(prompt_tokens(PromptSource(pydoc="assert"), tokenizer))
    assert '"assert" statement' in topic and len(topic) < len(ids) / 100
    assert topic in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (PromptSource(), "one source, not none.*prompt.file=FILE"),
        (PromptSource(text="a", pydoc="assert"), "not text and pydoc"),
        (PromptSource(pydoc="nosuch"), "prompt.pydoc=nosuch is no topic: use all, or one of .*assert"),
        (PromptSource(file="a", text="b"), "not file and text"),
        (PromptSource(text=""), "empty"),
        (PromptSource(text=" \n\t "), "empty"),
        (PromptSource(text="a", tokens=0), "prompt.tokens=0.*at least one"),
        (PromptSource(text="a", tokens=-3), "prompt.tokens=-3"),
    ],
)
def test_refused_settings(tokenizer, source, words):
    with pytest.raises(ValueError, match=words):
        prompt_tokens(source, tokenizer)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("directory", "directory"),
        (b"th\xe9 vert", r"not UTF-8 text \(byte 2\)"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8 text"),
        (b"", "empty"),
        (b" \n\n", "empty"),
    ],
)
def test_refused_files(tokenizer, tmp_path, content, words):
    path = tmp_path / "given"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prompt_tokens(PromptSource(file=str(path)), tokenizer)


def test_a_question_to_a_model_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chat template.*instruct"):
        prompt_tokens(PromptSource(text=DOCUMENT, question="Who?"), tokenizer)
