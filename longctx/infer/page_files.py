"""Pages of one rank on disk, which outlive their process: a file for each page, with its checksum in its name."""

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from longctx.attention.layout import Layout
from longctx.attention.spans import Span
from longctx.infer.pages import Page

_NEW = ".coming"  # ending of a file that is not complete
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SavedPage:
    """A page on disk: its ``tokens``, and their ``layout`` over the ring ranks.

    ``before`` is the name of the page before it (empty for the first page of a text).
    """

    before: str
    tokens: tuple[int, ...]
    layout: Layout


def page_name(before: str, tokens: Sequence[int]) -> str:
    """Return the name of a page: the SHA-256 of the name of the page ``before`` it and of its own ``tokens``."""
    return hashlib.sha256(before.encode() + array("q", tokens).tobytes()).hexdigest()


class PageFiles:
    """The files of this rank's pages in ``folder``, which is made when the first page is written.

    A file is called ``NAME.CRC32.safetensors``.  It appears under this name when it is complete.  If a file cannot be
    written or deleted, ``say`` gets one line, and no further pages are written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._files: dict[str, Path] = {}
        self._full = False

    def read(self) -> dict[str, SavedPage | None]:
        """Return this rank's pages by name, without their rows; None for a file whose content does not fit its name.

        It also deletes files that a process left incomplete, and all but one file of a page.  Call it before `load`,
        `write` and `delete`, which know only the files that were read or written here.
        """
        pages: dict[str, SavedPage | None] = {}
        self._files.clear()  # or a page's only file would look like a second one
        for file in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if file.name.endswith(_NEW):
                file.unlink()  # its process ended while it wrote
            elif file.suffix == _SUFFIX:
                name = file.name.partition(".")[0]
                tensors = _read(file)
                pages[name] = _describe(tensors) if tensors else None
                if name in self._files:
                    self._files[name].unlink()
                self._files[name] = file
        return pages

    def load(self, name: str, device: torch.device) -> Page:
        """Return this rank's rows of the page ``name``, which `read` has found to be valid, on ``device``."""
        tensors = load(self._files[name].read_bytes())
        layers = zip(tensors["keys"].to(device), tensors["values"].to(device), strict=True)
        return Page(_describe(tensors).layout, tuple(layers))

    def write(self, before: str, tokens: Sequence[int], page: Page) -> str:
        """Write ``page`` to a file, and return the page's name.

        The page holds ``tokens``, after the page named ``before``.  Nothing is written if the page has a file already,
        or if an earlier page could not be written.
        """
        name = page_name(before, tokens)
        if self._full or name in self._files:
            return name
        content = save(_as_tensors(before, tokens, page))
        file = self.folder / f"{name}.{zlib.crc32(content):08x}{_SUFFIX}"
        new = file.with_name(file.name + _NEW)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new.write_bytes(content)
            new.replace(file)
            self._files[name] = file
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            self._give_up(f"{file} cannot be written", error)
        return name

    def _give_up(self, fault: str, error: OSError) -> None:
        """Write no more pages, and say so once."""
        if not self._full:
            self._say(
                f"{fault} ({error.strerror}): no more pages are saved until the next start; free the disk, or give "
                "another cache.save"
            )
        self._full = True

    def delete(self, names: Iterable[str]) -> None:
        """Delete the files of the pages ``names``; names of pages without a file are ignored."""
        for name in names:
            if file := self._files.pop(name, None):
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    self._give_up(f"{file} cannot be deleted", error)


def _as_tensors(before: str, tokens: Sequence[int], page: Page) -> dict[str, torch.Tensor]:
    keys, values = zip(*page.layers, strict=True)
    spans = [(rank, s.start, s.length, s.step) for rank, of_rank in enumerate(page.layout.ranks) for s in of_rank]
    return {
        "before": torch.tensor(list(before.encode()), dtype=torch.uint8),
        "tokens": torch.tensor(list(tokens)),
        "begin": torch.tensor([page.layout.begins[0], page.layout.size]),
        "spans": torch.tensor(spans),
        "keys": torch.stack(keys).contiguous(),
        "values": torch.stack(values).contiguous(),
    }


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors in ``file``; None unless its content has the checksum and the page name in the file's name."""
    name, crc, *_ = file.name.split(".")
    try:
        content = file.read_bytes()
        if f"{zlib.crc32(content):08x}" != crc:
            return None
        tensors = load(content)
    except (OSError, SafetensorError):
        return None
    one = _describe(tensors)
    return tensors if page_name(one.before, one.tokens) == name else None


def _describe(tensors: dict[str, torch.Tensor]) -> SavedPage:
    """Return the page whose file has ``tensors``, without its rows."""
    before, tokens = bytes(tensors["before"].tolist()).decode(), tuple(tensors["tokens"].tolist())
    begin, size = tensors["begin"].tolist()
    spans: list[list[Span]] = [[] for _ in range(size)]
    for rank, *numbers in tensors["spans"].tolist():
        spans[rank].append(Span(*numbers))
    return SavedPage(before, tokens, Layout((len(tokens),), tuple(map(tuple, spans)), (begin,)))
