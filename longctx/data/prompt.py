"""Tokenize a prompt: text from a file, from the command line, or from the documentation that CPython ships."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO, TextIOBase
from pathlib import Path
from typing import Any

from longctx.config import PromptSource
from longctx.data.records import error_line
from longctx.data.tokenize import first_tokens

_NO_TEXT = "the prompt is empty: give some text with prompt.file, prompt.text or prompt.pydoc"


def prompt_tokens(source: PromptSource, tokenizer: Any) -> tuple[list[int], int]:
    """Return the token ids of the prompt ``source``, and the number of tokens of its text without the template.

    ``source.tokens`` cuts the text, but not the question.  It cuts only between characters, and no more of the text is
    read than needed.  A file's byte-order mark is not part of the text.  Without a question, special tokens are added
    as in `longctx.data.tokenize.tokenize`, and count.

    Raises ValueError for a file that is missing, empty or not UTF-8, for an unknown topic, and for an empty prompt.
    Raises ValueError unless there is exactly one source, for a question to a model without a chat template or with one
    that refuses it, and for a text that a slow tokenizer cannot cut.
    """
    if source.question is not None and not tokenizer.chat_template:
        _refuse_other_than_one(source)
        raise ValueError(
            "prompt.question needs a chat template: set model.chat_template=FILE, or use an instruct model"
        )
    ids, text = _read_first_tokens(source, tokenizer, special_tokens=source.question is None)
    if not text.strip():
        raise ValueError(_too_few_tokens(source) if source.tokens and not text else _NO_TEXT)
    if source.question is None:
        return ids, len(ids)
    message = {"role": "user", "content": f"{text}\n\n{source.question}"}
    try:
        chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template can raise any error
        raise ValueError(
            f"the model's chat template refuses the prompt ({error_line(error)}): leave out prompt.question, or set "
            "model.chat_template=FILE to another template"
        ) from error
    return list(chat["input_ids"]), len(ids)


def _read_first_tokens(source: PromptSource, tokenizer: Any, *, special_tokens: bool) -> tuple[list[int], str]:
    with _refusing_no_text(str(source.file), "prompt.file"), _open(source) as text:
        return first_tokens(text.read, tokenizer, source.tokens, special_tokens=special_tokens)


def text_in(file: str, setting: str) -> str:
    """Return the text of ``file``, without the byte-order mark that it may begin with.

    Raises ValueError, naming ``setting``, for a file that is missing, empty or not UTF-8.
    """
    with _refusing_no_text(file, setting):
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(f"{setting}={file} is empty: give a text file")
    return text


@contextmanager
def _refusing_no_text(file: str, setting: str) -> Iterator[None]:
    """Turn an error of reading ``file`` in the block into a ValueError that names ``setting``."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = _first_fault(Path(file).expanduser(), error.start)
        raise ValueError(f"{setting}={file} is not UTF-8 text (byte {byte}): give a text file") from error
    except OSError as error:
        raise ValueError(f"{setting}={file} cannot be read: {error.strerror}; give a text file") from error


def _open(source: PromptSource) -> TextIOBase:
    _refuse_other_than_one(source)
    if source.tokens is not None and source.tokens < 1:
        raise ValueError(f"prompt.tokens={source.tokens}: use 1 or more, or null for the whole text")
    if source.file is not None:
        return Path(source.file).expanduser().open(encoding="utf-8-sig")
    return StringIO(source.text if source.pydoc is None else _pydoc(source.pydoc))


def _refuse_other_than_one(source: PromptSource) -> None:
    given = [name for name in ("file", "text", "pydoc") if getattr(source, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"the prompt comes from one source, not {' and '.join(given) or 'none'}: "
            "give prompt.file=FILE, prompt.text='...' or prompt.pydoc=all"
        )


def _first_fault(file: Path, byte: int) -> int:
    """Return the position of the first byte of ``file`` that is not part of UTF-8 text.

    ``byte`` is the position that a decoding error reports, counted from the beginning of a block of the file.  It is
    returned for a file that is not regular, such as a pipe, which cannot be read again.
    """
    try:
        if file.is_file():
            file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return byte


def _too_few_tokens(source: PromptSource) -> str:
    return (
        f"prompt.tokens={source.tokens} leaves nothing of the prompt, whose first character takes more tokens: "
        "use a larger prompt.tokens, or give some text"
    )


def _pydoc(topic: str) -> str:
    """Return a topic of the language reference that ships with CPython, or ``all`` topics, about 460 KB of prose."""
    from pydoc_data.topics import topics

    if topic == "all":
        return "\n\n".join(topics[name] for name in sorted(topics))
    if topic not in topics:
        raise ValueError(f"prompt.pydoc={topic} is not a topic: use all, or one of {', '.join(sorted(topics))}")
    return topics[topic]
