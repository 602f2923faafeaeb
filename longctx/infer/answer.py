"""The text of an answer while its tokens arrive: pieces that can be streamed, and texts that end the answer."""

from collections.abc import Callable, Sequence
from typing import Any

from longctx.infer.detokenize import Detokenizer, last_tokens


class AnswerText:
    """The text of an answer whose tokens arrive one by one, without special tokens.

    ``text`` is the text so far, up to the earliest occurrence of a text in ``stop``.  ``stopped`` says if there is one.
    `add` and `end` return the text in pieces.  ``after`` has the tokens of the text that the answer continues:
    with them, a space before the answer's first word belongs to the answer.  Some tokenizers, such as Llama 2's, leave
    out a space at the beginning of a text.

    Example: with stop "END", the tokens "a ", "E", "x", "END" give the pieces "a ", "", "Ex", "".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self._tokens, self._stop = Detokenizer(tokenizer), stop
        for token in last_tokens(tokenizer, after):
            self._tokens.add(token)
        self._before = self._tokens.tail  # the end of the text before the answer, while it may change
        self._pieces = list[str]()
        self._final = ""  # text after the pieces that no later token can change
        self._rest = ""  # text after the pieces, up to the stop
        self.stopped = False

    @property
    def text(self) -> str:
        """Text so far, up to the earliest occurrence of a text in ``stop``."""
        return "".join(self._pieces) + self._rest

    def add(self, token: int) -> str:
        """Add ``token`` and return the next piece of text that no later token can change; it may be empty.

        Sets ``stopped`` once a text in ``stop`` is complete; later tokens then add nothing.
        """
        if self.stopped:
            return ""
        self._final += self._tokens.add(token)
        whole = self._final + self._tokens.tail
        # The answer may complete the last character of the text before it, which is then part of the answer.
        shared = _shared_length(whole, self._before)
        if len(self._final) >= len(self._before):
            self._final, self._before = self._final[shared:], ""
        self._rest = cut_at_stop(whole[shared:], self._stop)
        self.stopped = len(self._rest) < len(whole) - shared
        if self.stopped:
            return self.end()
        return "" if self._before else self._give(len(self._final) - self._waiting())

    def end(self) -> str:
        """Return the rest of the text, which `add` has not returned yet; call it after the last token."""
        return self._give(len(self._rest))

    def _waiting(self) -> int:
        """Return how many characters at the end of the final text may begin a text in ``stop``."""
        longest = 0
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(self._final)), longest, -1)
            longest = next((n for n in lengths if self._final.endswith(stop[:n])), longest)
        return longest

    def _give(self, length: int) -> str:
        piece, self._rest, self._final = self._rest[:length], self._rest[length:], self._final[length:]
        self._pieces.append(piece)
        return piece


class TokenOffsets:
    """The place of each token in a text that begins at character ``begin``; call `add` with one token after another.

    ``after`` is as for `AnswerText`.  With ``special``, special tokens have a text, as in a prompt.
    """

    def __init__(self, tokenizer: Any, begin: int = 0, after: Sequence[int] = (), *, special: bool = False) -> None:
        self._tokens = Detokenizer(tokenizer, special=special)
        for token in last_tokens(tokenizer, after):
            self._tokens.add(token)
        self._begin = begin - self._tokens.complete

    def add(self, token: int) -> int:
        """Return the number of characters before the text of ``token``, which is the next token.

        The tokens of one character have the same offset.
        """
        offset = self._begin + self._tokens.complete
        self._tokens.add(token)
        return offset


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
