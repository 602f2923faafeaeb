"""Tokenize a prompt: text from a file, from the command line, or from the documentation that CPython ships."""

from pathlib import Path
from typing import Any

from longctx.config import PromptSource


def prompt_tokens(source: PromptSource, tokenizer: Any) -> tuple[list[int], int]:
    """Token ids of the prompt that ``source`` describes, and the number of tokens of its text without the template.

    ``source.tokens`` cuts the text, not the question.  Raises ValueError for a file that is missing, empty or not
    UTF-8, and for an empty prompt.  Raises ValueError unless there is exactly one source, and for a question to a model
    without a chat template.
    """
    text = _text(source)
    if source.question is None:
        ids = list(tokenizer(text)["input_ids"])[: source.tokens]
        return ids, len(ids)
    if not tokenizer.chat_template:
        raise ValueError("prompt.question needs a model with a chat template: drop it, or use an instruct model")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if source.tokens is not None and source.tokens < len(ids):
        ids = ids[: source.tokens]
        text = tokenizer.decode(ids)
    message = {"role": "user", "content": f"{text}\n\n{source.question}"}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
    return list(chat["input_ids"]), len(ids)


def _text(source: PromptSource) -> str:
    given = [name for name in ("file", "text", "pydoc") if getattr(source, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"the prompt comes from one source, not {' and '.join(given) or 'none'}: "
            "give prompt.file=FILE, prompt.text='...' or prompt.pydoc=all"
        )
    if source.tokens is not None and source.tokens < 1:
        raise ValueError(f"prompt.tokens={source.tokens}: keep at least one token, use 1 or more")
    text = source.text
    if source.file is not None:
        text = _read(source.file)
    if source.pydoc is not None:
        text = _pydoc(source.pydoc)
    if not text or not text.strip():
        raise ValueError("the prompt is empty: give some text with prompt.file, prompt.text or prompt.pydoc")
    return text


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt.file={name} is not UTF-8 text (byte {error.start}): give a text file") from error
    except OSError as error:
        raise ValueError(f"prompt.file={name} cannot be read: {error.strerror}; give a text file") from error


def _pydoc(topic: str) -> str:
    """A topic of the language reference that ships with CPython; ``all`` topics together are about 460 KB of prose."""
    from pydoc_data.topics import topics

    if topic == "all":
        return "\n\n".join(topics[name] for name in sorted(topics))
    if topic not in topics:
        raise ValueError(f"prompt.pydoc={topic} is no topic: use all, or one of {', '.join(sorted(topics))}")
    return topics[topic]
