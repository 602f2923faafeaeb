"""Tokenize long text in little memory: in pieces, whose tokens together are exactly those of the whole text."""

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from typing import Any

import torch

from longctx.shapes import Positions

WINDOW = 1 << 16  # characters tokenized at once
_OVERLAP = 1 << 11  # at least this many characters are tokenized twice, to check a cut
_TRIES = 12  # cuts to try before the window grows


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens: ``ids``, and the range (first, end) of each token's characters within the piece's text.

    The piece's text starts at character ``begin`` of the whole text.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    begin: int = 0


def tokenize(text: str, tokenizer: Any, *, special_tokens: bool = True) -> Positions:
    """Return the tokens of ``text`` (int32) as the tokenizer gives them for the whole text, in little memory.

    ``special_tokens`` adds the first and last tokens that the tokenizer adds.  If the text already begins with the
    first token (BOS), no second one is added, as in lm-eval's ``hf`` model. transformers would add one.
    """
    return torch.cat(list(token_blocks(StringIO(text).read, tokenizer, special_tokens=special_tokens)))


def token_blocks(read: Callable[[int], str], tokenizer: Any, *, special_tokens: bool = True) -> Iterator[Positions]:
    """Yield the tokens that `tokenize` returns, in blocks: one for each window of text (see `pieces`).

    There is at least one block, which may be empty.  The tokenizer's last special tokens may be a separate block.

    ``read(n)`` must return the next n characters of the text, and fewer only at its end.
    """
    text = read(WINDOW)
    more = read(1)
    if not more:
        whole = list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])
        if not special_tokens or len(whole) < 2 or whole[0] != whole[1]:
            yield torch.tensor(whole, dtype=torch.int32)
            return
    first, last = _special_tokens(tokenizer) if special_tokens else ([], [])
    blocks = (piece.ids for piece in pieces(_read_after(text + more, read), tokenizer, WINDOW))
    ids = next(blocks, [])
    yield torch.tensor(ids if ids[: len(first)] == first else [*first, *ids], dtype=torch.int32)
    for ids in chain(blocks, [last] if last else []):
        yield torch.tensor(ids, dtype=torch.int32)


def _read_after(text: str, read: Callable[[int], str]) -> Callable[[int], str]:
    """Return a function that reads ``text`` first, and then from ``read``."""
    begin = StringIO(text)

    def read_characters(size: int) -> str:
        given = begin.read(size)
        return given if len(given) == size else given + read(size - len(given))

    return read_characters


def first_tokens(
    read: Callable[[int], str], tokenizer: Any, limit: int | None, *, special_tokens: bool = True
) -> tuple[list[int], str]:
    """Return the first ``limit`` tokens (None: all) of the text that ``read(characters)`` gives, and their text.

    Text is read in windows, until there are enough tokens.  If token number ``limit`` ends inside a character, all
    tokens of that character are left out; transformers would cut the character.  Special tokens are those of
    `tokenize`, and count towards ``limit``; a cut text gets none at its end.

    Raises ValueError if the text has to be cut, but a slow tokenizer does not report the characters of its tokens.
    """
    first, last = _special_tokens(tokenizer) if special_tokens else ([], [])
    ids: list[int] = []
    parts: list[Piece] = []
    read_so_far: list[str] = []

    def record(size: int) -> str:
        read_so_far.append(read(size))
        return read_so_far[-1]

    # The first window is small: a cut prompt needs about four characters per token.
    window = WINDOW if limit is None else min(WINDOW, 8 * limit + 2 * _OVERLAP)
    for part in pieces(record, tokenizer, window):
        ids += part.ids
        parts.append(part)
        if limit is not None and len(ids) > limit:
            break
    if ids[: len(first)] == first:
        first = []
    text, room = "".join(read_so_far), len(ids) if limit is None else max(0, limit - len(first))
    if len(ids) <= room:
        return [*first, *ids, *last][:limit], text
    if not tokenizer.is_fast:
        raise ValueError(
            f"prompt.tokens={limit} cannot cut the text, since {type(tokenizer).__name__} does not report the "
            "characters of its tokens: use prompt.tokens=null, or a model folder with tokenizer.json"
        )
    spans = [(part.begin + a, part.begin + b) for part in parts for a, b in part.spans]
    while room and spans[room - 1][1] > spans[room][0]:
        room -= 1
    return [*first, *ids[:room]], text[: spans[room - 1][1]] if room else ""


def pieces(read: Callable[[int], str], tokenizer: Any, window: int = WINDOW) -> Iterator[Piece]:
    """Yield the tokens of the text that ``read(characters)`` gives, without special tokens, a window at a time.

    A window ends between a word and white space, at a place where the rest of the text gets the same tokens if it is
    tokenized separately.  This is checked on at least ``_OVERLAP`` characters.  If there is no such place, the window
    grows, up to the whole text.  Slow tokenizers do not report the characters of their tokens, so they get the whole
    text at once.
    """
    text, begin, at_end = "", 0, False
    size = window
    while not at_end:
        more = read(size)
        text, at_end = text + more, len(more) < size
        tokens = _encode(text, tokenizer)
        cut = None if at_end or not tokenizer.is_fast else _find_cut(text, tokens, tokenizer)
        if cut is None:
            size = len(text)
            continue
        count, end = cut
        yield Piece(tokens.ids[:count], tokens.spans[:count], begin)
        text, begin, size = text[end:], begin + end, window
    if text:
        yield Piece(tokens.ids, tokens.spans, begin)


def _encode(text: str, tokenizer: Any) -> Piece:
    # verbose=False: no warning about text longer than the model's context.
    options = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, **options)["input_ids"])
        return Piece(ids, [(0, len(text))] * len(ids))
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    return Piece(list(encoded["input_ids"]), list(encoded["offset_mapping"]))


def _find_cut(text: str, tokens: Piece, tokenizer: Any) -> tuple[int, int] | None:
    """Return a good place to cut ``text``: the number of tokens, and of characters, before it; or None."""
    tries = 0
    for i in range(bisect(tokens.spans, (len(text) - _OVERLAP,)) - 1, 0, -1):
        (_, before), (first, _) = tokens.spans[i - 1 : i + 1]
        if first < len(text) // 2 or tries >= _TRIES:
            return None
        # Some tokenizers include the space before a word in its token; some do not; some add a space where a text
        # begins.
        for end in sorted({before, first, first + 1}):
            if before <= end < len(text) and text[end - 1].isspace() != text[end].isspace():
                tries += 1
                if _encode(text[end:], tokenizer).ids == tokens.ids[i:]:
                    return i, end
    return None


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that ``tokenizer`` adds before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    added = list(tokenizer("a")["input_ids"])
    begin = next((i for i in range(len(added)) if added[i : i + len(plain)] == plain), 0)
    return added[:begin], added[begin + len(plain) :]
