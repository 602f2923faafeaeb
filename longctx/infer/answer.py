"""The text of an answer while its tokens arrive: pieces that can be streamed, and texts that end the answer."""

from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the bytes of a character whose last tokens are missing


class AnswerText:
    """The text of an answer whose tokens arrive one by one, without special tokens.

    ``text`` is the text so far, up to the earliest occurrence of a text in ``stop``.  ``stopped`` says if there is one.
    `add` and `end` return the text in pieces.  ``after`` has the last tokens of the text that the answer continues:
    with them, a space before the answer's first word belongs to the answer.  Some tokenizers, such as Llama 2's, leave
    out a space at the beginning of a text.

    Example: with stop "END", the tokens "a ", "E", "x", "END" give the pieces "a ", "", "Ex", "".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._before = _decode(tokenizer, after)
        self._tokens = [*after]
        self._given = 0  # characters in the pieces so far
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Add ``token`` and return the next piece of text that no later token can change; it may be empty.

        Sets ``stopped`` once a text in ``stop`` is complete.
        """
        self._tokens.append(token)
        whole = _decode(self._tokenizer, self._tokens)
        # The answer may complete the last character of the text before it, which is then part of the answer.
        whole = whole[_shared_length(whole, self._before) :]
        self.text = cut_at_stop(whole, self._stop)
        self.stopped = len(self.text) < len(whole)
        return self._give(len(self.text) if self.stopped else self._certain())

    def end(self) -> str:
        """Return the rest of the text, which `add` has not returned yet; call it after the last token."""
        return self._give(len(self.text))

    def _certain(self) -> int:
        """Return how many characters no later token can change: those before an incomplete character or stop text."""
        text = self.text.rstrip(_INCOMPLETE)
        waiting = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(waiting, default=0)

    def _give(self, end: int) -> str:
        piece, self._given = self.text[self._given : end], max(self._given, end)
        return piece


class TokenOffsets:
    """The place of each token in a text that begins at character ``begin``; call `add` with one token after another.

    ``after`` is as for `AnswerText`.  With ``special``, special tokens have a text, as in a prompt.
    """

    def __init__(self, tokenizer: Any, begin: int = 0, after: Sequence[int] = (), *, special: bool = False) -> None:
        self._tokenizer, self._offset, self._special = tokenizer, 0, special
        self._known, self._new = list[int](), list[int]()  # tokens whose text is complete, and those that follow them
        for token in after:
            self.add(token)
        self._offset = begin

    def add(self, token: int) -> int:
        """Return the number of characters before the text of ``token``, which is the next token.

        The tokens of one character have the same offset.
        """
        offset = self._offset
        self._new.append(token)
        known = _decode(self._tokenizer, self._known, special=self._special)
        text = _decode(self._tokenizer, [*self._known, *self._new], special=self._special)
        if len(text) > len(known) and not text.endswith(_INCOMPLETE):
            self._offset += len(text) - len(known)
            self._known, self._new = self._new, []
        return offset


def _decode(tokenizer: Any, tokens: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=not special)) if tokens else ""


def _shared_length(one: str, other: str) -> int:
    """Return the number of characters at the beginning of ``one`` that ``other`` begins with, too."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return ``text`` before the earliest occurrence of a text in ``stop``, or all of it if none occurs."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


def make_stop_check(tokenizer: Any, stop: Sequence[str]) -> Callable[[int, Sequence[int]], bool]:
    """Return a function that returns True if the text of an answer contains a text in ``stop``.

    The function takes a sequence's id and the tokens of its answer so far.  Call it after every token: each call adds
    the last token to the text.  Make a new function for each turn.  Without ``stop``, ``tokenizer`` may be None.
    """
    texts: dict[int, AnswerText] = {}

    def stopped(sequence: int, tokens: Sequence[int]) -> bool:
        if not stop:
            return False
        text = texts.setdefault(sequence, AnswerText(tokenizer, stop))
        text.add(tokens[-1])
        return text.stopped

    return stopped
