"""A prompt is exactly the requested text, or an error that says what to set instead."""

import pytest
from transformers import PreTrainedTokenizerFast

from longctx.config import PromptSource
from longctx.data import prompt
from longctx.hf.config import tokenizer_of
from tests.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
DOCUMENT = "Thé quick brown fox\njumps  over 13 lazy dogs."


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and a chat template."""
    return tiny_tokenizer(chat_template=TEMPLATE)


def prompt_tokens(source, tokenizer):
    return prompt.prompt_tokens(source, tokenizer)[0]


def test_text_is_tokenized_unchanged(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)
    assert len(ids) == len(DOCUMENT.encode())
    assert tokenizer.decode(ids) == DOCUMENT


def test_file_gives_the_same_tokens_as_its_text(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_bytes(DOCUMENT.encode())
    from_file = prompt_tokens(PromptSource(file=str(tmp_path / "book.txt")), tokenizer)
    assert from_file == prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)


@pytest.mark.parametrize(("requested", "expected"), [(1, 1), (17, 17), (1009, len(DOCUMENT.encode()))])
def test_cut_prompt_has_the_requested_number_of_tokens(tokenizer, requested, expected):
    whole = prompt_tokens(PromptSource(text=DOCUMENT), tokenizer)
    assert prompt_tokens(PromptSource(text=DOCUMENT, tokens=requested), tokenizer) == whole[:expected]


def test_byte_order_mark_of_a_file_is_no_text(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + DOCUMENT.encode())
    ids = prompt_tokens(PromptSource(file=str(tmp_path / "book.txt")), tokenizer)
    assert tokenizer.decode(ids) == DOCUMENT


@pytest.mark.parametrize("question", [None, "Who jumps?"])
def test_text_is_cut_between_characters(tokenizer, question):
    ids, counted = prompt.prompt_tokens(PromptSource(text="éééé", tokens=3, question=question), tokenizer)
    assert counted == 2 and "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"prompt\.tokens=1 leaves nothing"):
        prompt_tokens(PromptSource(text="éééé", tokens=1, question=question), tokenizer)


@pytest.mark.parametrize("question", [None, "Who jumps?"])
def test_slow_tokenizer_cannot_cut(tmp_path, question):
    """It takes a whole text, and a limit that the text does not reach."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    slow = tokenizer_of(tmp_path)
    slow.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"prompt\.tokens=2 cannot cut .* ByT5Tokenizer .*use prompt\.tokens=null"):
        prompt_tokens(PromptSource(text="abc", tokens=2, question=question), slow)
    whole = prompt_tokens(PromptSource(text="abc", question=question), slow)
    assert prompt_tokens(PromptSource(text="abc", tokens=5, question=question), slow) == whole


def test_question_and_document_pass_the_chat_template(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT, question="Who jumps?"), tokenizer)
    assert tokenizer.decode(ids) == f"<user>{DOCUMENT}\n\nWho jumps?<bot>"


def test_cutting_a_document_keeps_the_whole_question(tokenizer):
    ids = prompt_tokens(PromptSource(text=DOCUMENT, question="Who jumps?", tokens=17), tokenizer)
    assert tokenizer.decode(ids) == f"<user>{DOCUMENT.encode()[:17].decode()}\n\nWho jumps?<bot>"


@pytest.mark.parametrize(
    ("tokens", "text_tokens"), [(None, len(DOCUMENT.encode())), (17, 17), (1009, len(DOCUMENT.encode()))]
)
@pytest.mark.parametrize("question", [None, "Who jumps?"])
def test_number_of_text_tokens_excludes_the_template(tokenizer, question, tokens, text_tokens):
    source = PromptSource(text=DOCUMENT, question=question, tokens=tokens)
    ids, counted = prompt.prompt_tokens(source, tokenizer)
    template = len(f"<user>\n\n{question}<bot>") if question else 0
    assert (counted, len(ids)) == (text_tokens, text_tokens + template)


def test_pydoc_topic_is_part_of_the_long_documentation(tokenizer):
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
        (PromptSource(pydoc="nosuch"), "prompt.pydoc=nosuch is not a topic: use all, or one of .*assert"),
        (PromptSource(file="a", text="b"), "not file and text"),
        (PromptSource(text=""), "empty"),
        (PromptSource(text=" \n\t "), "empty"),
        (PromptSource(text="a", tokens=0), "prompt.tokens=0.*use 1 or more"),
        (PromptSource(text="a", tokens=-3), "prompt.tokens=-3"),
    ],
)
def test_invalid_settings_are_refused(tokenizer, source, words):
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
def test_invalid_files_are_refused(tokenizer, tmp_path, content, words):
    path = tmp_path / "given"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prompt_tokens(PromptSource(file=str(path)), tokenizer)


def test_question_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chat template.*instruct"):
        prompt_tokens(PromptSource(text=DOCUMENT, question="Who?"), tokenizer)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ tools | length }}"])
def test_question_that_the_chat_template_refuses(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"refuses the prompt \(T\w+Error: .*\): leave out prompt\.question"):
        prompt_tokens(PromptSource(text=DOCUMENT, question="Who?"), tokenizer)
