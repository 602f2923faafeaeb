"""The text of tokens that arrive one by one, at a cost per token that does not grow with the text."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the bytes of a character whose last tokens are missing
_MOST_NEW = 32  # tokens to decode again for each token, if no character ends
_CONTEXT = 16  # then these tokens decide how later bytes are read: more than a character has bytes
_OPEN_CHARACTERS = 3  # an incomplete character has at most 3 bytes, thus at most as many replacement characters
_WRONG = 0x80  # a byte that is no character
_LAST, _LONGEST = 8, 4  # tokens that later text is read after; bytes of the longest character
_CLEANED = " 'nvr"  # transformers' clean-up of spaces replaces no text that goes on after another character


class Detokenizer:
    """Decodes tokens that arrive one by one; the texts that `add` returns, then ``tail``, are the whole text so far.

    The whole text is exactly that of ``tokenizer.decode`` for all tokens, without special tokens unless ``special``.
    Later tokens may change ``tail``, but not the texts that `add` has returned.  `tokenizers.decoders.DecodeStream`
    (0.23) keeps this promise for byte-level tokenizers only: with byte tokens of SentencePiece it fails on some
    sequences and sends wrong text for others, and it does not clean up spaces.

    Three kinds of characters are in the tail.  A character's last bytes may be missing.  With the byte tokens of
    SentencePiece, such as <0xE9>, one wrong byte replaces all characters of its run of byte tokens, so a run is final
    when it ends.  If the tokenizer cleans up spaces, such as " ." to ".", a space waits for the characters after it.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._bytes = _byte_tokens(tokenizer)
        self._cleans = _cleans(tokenizer)
        self._context = list[int]()  # the last tokens whose text is final
        self._base = ""  # the final text of the context
        self._new = list[int]()  # the tokens after the context
        self._text = ""  # the text of context and new tokens
        self._run = _ByteRun()
        self._dirty = ""  # text that is final but for the clean-up of spaces
        self._final = 0  # characters that `add` has returned
        self.tail = ""

    @property
    def complete(self) -> int:
        """Number of characters of the text so far, without an incomplete one at the end."""
        return self._final + len(self._clean(self._dirty + self._run.complete))

    def add(self, token: int) -> str:
        """Add ``token``, and return the text that has become final; it may be empty."""
        final = self._add_byte(token) if token in self._bytes else self._add_text(token)
        tail = self._run.text + self._text[len(self._base) :]
        if self._cleans:
            self._dirty += final
            end = len(self._dirty.rstrip(_CLEANED))
            final, self._dirty = self._clean(self._dirty[:end]), self._dirty[end:]
            tail = self._clean(self._dirty + tail)
        self.tail = tail
        self._final += len(final)
        return final

    def _add_text(self, token: int) -> str:
        if self._run.active and self._has_no_text(token):
            return ""  # such as a special token, which does not end a run
        run = self._end_run()
        text = self._decode([*self._context, *self._new, token])
        if text == self._text and self._has_no_text(token):
            return run
        self._new.append(token)
        self._text = text
        if self._bytes or not text.endswith(_INCOMPLETE):
            return run + self._commit()
        return run + (self._shift() if len(self._new) == _MOST_NEW else "")

    def _shift(self) -> str:
        """Return the text of many bytes that are no characters, and let the last of them be the context.

        Later bytes are read after these tokens as after the whole text, since no character is longer.
        """
        final = self._text[len(self._base) : -_OPEN_CHARACTERS]
        self._context, self._new = self._new[-_CONTEXT:], []
        self._text = self._decode(self._context)
        self._base = self._text[:-_OPEN_CHARACTERS]
        return final

    def _add_byte(self, token: int) -> str:
        self._run.add(self._bytes[token])
        if self._run.wrong:
            return self._end_wrong()
        self._new.append(token)
        if not self._run.open:
            self._text = self._decode([*self._context, *self._new])
            self._run.complete += self._commit()
        return ""

    def _commit(self) -> str:
        """Return the text of the new tokens, which are complete, and let them be the context."""
        final = self._text[len(self._base) :]
        if final:  # none if the tokenizer leaves out a space at the beginning
            self._context, self._new = self._new, []
            self._text = self._base = self._decode(self._context)
        return final

    def _end_run(self) -> str:
        """End the run of byte tokens, if there is one, and return its text."""
        final = self._end_wrong() if self._run.open else self._run.complete
        self._run = _ByteRun()
        return final

    def _end_wrong(self) -> str:
        """Return the text of a run that is no UTF-8, and let a wrong byte be the context."""
        final, self._run.size = self._run.text, 0
        self._context, self._new = [next(one for one, byte in self._bytes.items() if byte == _WRONG)], []
        self._text = self._base = self._decode(self._context)
        return final

    def _has_no_text(self, token: int) -> bool:
        return not self._decode([token, token])  # a tokenizer may leave out the first space

    def _decode(self, tokens: Sequence[int]) -> str:
        raw = {"clean_up_tokenization_spaces": False} if self._cleans else {}
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not self._special, **raw)) if tokens else ""

    def _clean(self, text: str) -> str:
        return str(self._tokenizer.clean_up_tokenization(text)) if self._cleans else text


class _ByteRun:
    """Consecutive byte tokens: ``complete`` is the text of the first of them, which end a character.

    ``size`` counts bytes.  ``open`` is True if a character's last bytes are missing, and ``wrong`` if no later byte can
    make the run UTF-8.
    """

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")()
        self.complete, self.size = "", 0
        self.open, self.wrong = False, False

    @property
    def active(self) -> bool:
        """True if the run has a byte."""
        return self.size > 0 or self.wrong

    @property
    def text(self) -> str:
        """Text of the run, if it ended now: one replacement character a byte unless all bytes are UTF-8."""
        return _INCOMPLETE * self.size if self.open or self.wrong else self.complete

    def add(self, byte: int) -> None:
        """Add ``byte``."""
        self.size += 1
        if not self.wrong:
            try:
                self.open = not self._decoder.decode(bytes([byte]))
            except UnicodeDecodeError:
                self.complete, self.open, self.wrong = "", False, True


def last_tokens(tokenizer: Any, tokens: Sequence[int]) -> Sequence[int]:
    """Return the last of ``tokens``, after which a `Detokenizer` reads later tokens as after all of them.

    They do not begin within a character of byte tokens, since its last bytes alone would make the whole run wrong.
    """
    values, begin = _byte_tokens(tokenizer), max(0, len(tokens) - _LAST)
    first = max(0, begin - _LONGEST + 1)
    while begin > first and 0x80 <= values.get(tokens[begin], 0) < 0xC0:  # not the first byte of a character
        begin -= 1
    return tokens[begin:]


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """Return the bytes of ``token``, whose ``text`` has replacement characters.

    They are those of ``text`` if the tokenizer does not say which bytes the token has.
    """
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token in _byte_tokens(tokenizer):
        return bytes([_byte_tokens(tokenizer)[token]])
    try:
        content = bytes(_byte_of_letter()[letter] for letter in name)
    except KeyError:
        return text.encode()
    return content if content.decode(errors="replace") == text else text.encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter stands for in the tokens of a byte-level tokenizer, as in GPT-2's."""
    same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in same)
    return {chr(byte): byte for byte in same} | {chr(256 + i): byte for i, byte in enumerate(others)}


@lru_cache(maxsize=4)
def _byte_tokens(tokenizer: Any) -> Mapping[int, int]:
    """Return the byte of each of SentencePiece's byte tokens, if one wrong byte replaces all characters of its run."""
    tokens = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    values = {token: byte for byte, token in enumerate(tokens) if token is not None}
    is_run = len(values) == 256 and tokenizer.decode([tokens[ord("a")], tokens[_WRONG]]) == 2 * _INCOMPLETE
    return values if is_run else {}


@lru_cache(maxsize=4)
def _cleans(tokenizer: Any) -> bool:
    """Return True if decoding cleans up spaces."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    tokens = tokenizer("a .", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(tokens) != tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
