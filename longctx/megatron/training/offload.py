"""Activation offload: what the backward needs waits outside the device's memory, in files (CPU) or on the host (GPU).

`Offload.active` is a pair of autograd's hooks, so it sees whatever any operation saves, on every mesh, with and without
recomputation.  Copies are bit for bit: losses and gradients are those of a step without it.
"""

import ctypes
import errno
import os
import platform
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from longctx.attention.partial import Partial
from longctx.shapes import AnyShape, Tensor, UInt8

Bytes = UInt8[Tensor, " n"]

HOST = "host"
_SMALLEST = 1 << 16  # bytes; smaller tensors stay, since each offloaded one costs a call
_UNWRITTEN = 1 << 29  # bytes per rank
_MOVED = 1 << 30  # bytes that are written or read before the memory of freed tensors returns to the system
_LARGEST_FILE = 1 << 40  # bytes, which all usual file systems and address spaces allow
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@runtime_checkable  # so that tests can check signatures
class Store(Protocol):
    """Where bytes of ``device`` wait: `write` makes a copy of them, and `read` returns such a copy to the device."""

    device: torch.device

    def write(self, data: Bytes) -> Bytes: ...

    def read(self, copy: Bytes) -> Bytes: ...


class Files:
    """A `Store` for CPU tensors: a file in ``folder`` that is mapped into memory.  A missing folder is created.

    When the system needs memory, it frees pages that are written to the disk.  Pages are written at once, and `write`
    waits when more than `_UNWRITTEN` bytes are not written yet: a container that limits memory may otherwise end the
    process before its pages are written.  Space is used again once no tensor refers to it.  The file has no name, so
    that nothing is left when the process ends, however it ends.

    Raises OSError if the folder cannot hold such a file.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self._folder, self._end, self._unwritten, self._moved = folder, 0, 0, 0
        self._unused: defaultdict[int, list[int]] = defaultdict(list)  # offsets by size
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                # As long as the disk has room for, and empty: `_grow` reserves what is used.
                size = min(shutil.disk_usage(folder).free, _LARGEST_FILE)
                file.truncate(max(size, 1))
                self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
                self._bytes = np.frombuffer(mmap(self._file, 0), np.uint8)

    def write(self, data: Bytes) -> Bytes:
        """Return a copy of the CPU tensor ``data`` in the file; raise OSError if the disk has no room for it."""
        size = _rounded_up(len(data))
        # Experts get another number of rows in each step: space of up to twice the size will do.
        fits = min((one for one, free in self._unused.items() if free and size <= one <= 2 * size), default=size)
        unused = self._unused[fits]
        with self._explained():
            offset = unused.pop() if unused else self._grow(size)
            try:
                self._write_at(data, offset)
            except BaseException:
                unused.append(offset)
                raise
        copy = torch.from_numpy(self._bytes[offset : offset + len(data)])
        weakref.finalize(copy.untyped_storage(), unused.append, offset).atexit = False
        self._count(len(data))
        return copy

    def read(self, copy: Bytes) -> Bytes:
        """Return ``copy`` itself: its pages are read from the disk when they are touched."""
        self._count(len(copy))
        return copy

    def _count(self, moved: int) -> None:
        self._moved += moved
        if self._moved > _MOVED:
            _return_freed_memory()
            self._moved = 0

    def _grow(self, size: int) -> int:
        """Reserve ``size`` bytes of the disk at the end; return their offset."""
        begin = self._end
        if begin + size > len(self._bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(self._file, begin, size)  # else, a full disk would be noticed later, when pages are written
        self._end += size
        return begin

    def _write_at(self, data: Bytes, offset: int) -> None:
        rest = data.numpy().data
        while rest:  # through the file: writing through memory would first read the pages that it replaces
            done = os.pwrite(self._file, rest, offset)
            os.posix_fadvise(self._file, offset, done, os.POSIX_FADV_DONTNEED)  # starts to write them to the disk
            self._unwritten += done
            offset, rest = offset + done, rest[done:]
        if self._unwritten > _UNWRITTEN:
            os.fdatasync(self._file)
            self._unwritten = 0

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the setting in an OSError of the block."""
        try:
            yield
        except OSError as error:
            what = "has no room for the activations of a step" if error.errno in _FULL else "cannot hold activations"
            raise OSError(
                error.errno,
                f"offload={self._folder} {what} ({error.strerror}): give a folder on another disk, or use offload=null "
                "and recompute=full",
            ) from error


def _rounded_up(size: int) -> int:
    """Return ``size`` rounded up to pages, and to eighths of a power of two, so that nearly equal sizes share space."""
    grain = max(1 << 12, 1 << max(0, size.bit_length() - 4))
    return -(-size // grain) * grain


def _return_freed_memory() -> None:
    """Let the C library return the memory of freed tensors to the system, rather than keep it for later.

    Small tensors that stay lie between freed ones, so that glibc's heap would grow by about a layer's activations per
    layer.  Other C libraries have no such call.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class Host:
    """A `Store` for tensors of the GPU ``device``, in pinned memory of its host.

    Copies are made in order with the computation, on its stream; `write` and `read` may return before they are done.

    torch rounds the size of each pinned block up to a power of two, so the host needs up to twice the offloaded bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def write(self, data: Bytes) -> Bytes:
        """Return a copy of ``data`` in the host's memory."""
        with _disable_current_modes():  # a `MemoryMeter` does not count it
            copy = torch.empty(len(data), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return copy.copy_(data, non_blocking=True)

    def read(self, copy: Bytes) -> Bytes:
        """Return a copy of ``copy`` on the GPU."""
        return copy.to(self.device, non_blocking=True, copy=True)


@dataclass
class _Stored:
    """Bytes of a storage in a `Store`, and the copy of them that was fetched last, while it exists."""

    data: Bytes
    fetched: "weakref.ref[torch.UntypedStorage] | None" = None


class _View(NamedTuple):
    """A saved tensor: how it views the bytes of a storage."""

    stored: _Stored
    dtype: torch.dtype
    size: torch.Size
    stride: Sequence[int | torch.SymInt]
    offset: int | torch.SymInt


class Offload:
    """Moves what autograd saves inside `active` to ``store``, and brings it back when the backward asks for it.

    A storage that several operations save is moved once.  Storages of ``weights``, storages on another kind of device,
    and those of fewer than ``smallest`` bytes stay.  ``peak`` is the largest number of bytes in the store at once.
    """

    def __init__(self, store: Store, weights: Iterable[AnyShape], smallest: int = _SMALLEST) -> None:
        self._store, self._smallest = store, smallest
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._moved: dict[int, tuple[int, _Stored]] = {}
        self._size = self.peak = 0

    def active(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context in which operations offload what they save."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    @torch.no_grad()
    def pack(self, x: AnyShape) -> AnyShape | _View:
        """Move the storage of ``x`` to the store, unless it is there unchanged; return a view for `unpack`.

        Weights, small storages and those of other devices stay.  The result is then ``x``, detached from the graph.
        """
        storage = x.untyped_storage()
        stays = storage.nbytes() < self._smallest or storage._cdata in self._weights
        if stays or x.device.type != self._store.device.type:
            return x if x.is_leaf else x.detach()  # an output that is saved as it is would keep itself alive
        return _View(self._stored(x, storage), x.dtype, x.size(), x.stride(), x.storage_offset())

    @torch.no_grad()
    def unpack(self, packed: AnyShape | _View) -> AnyShape:
        """Return the tensor that `pack` was given, on its device, bit for bit."""
        if not isinstance(packed, _View):
            return packed
        stored, dtype, size, stride, offset = packed
        storage = stored.fetched() if stored.fetched else None
        if storage is None:
            storage = self._store.read(stored.data).untyped_storage()
            stored.fetched = weakref.ref(storage)
        whole = _bytes_of(storage)
        return whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype).as_strided(size, stride, offset)

    def _stored(self, x: AnyShape, storage: torch.UntypedStorage) -> _Stored:
        """Return the bytes of ``storage`` in the store; copy them if it is new, or ``x`` was written to since."""
        key = storage._cdata
        version, stored = self._moved.get(key, (-1, None))
        if stored is None or version != x._version:
            if stored is None:
                weakref.finalize(storage, self._moved.pop, key, None).atexit = False
            stored = _Stored(self._store.write(_bytes_of(storage)))
            self._moved[key] = (x._version, stored)
            self._count(storage.nbytes())
            weakref.finalize(stored, self._count, -storage.nbytes()).atexit = False
        return stored

    def _count(self, size: int) -> None:
        self._size += size
        self.peak = max(self.peak, self._size)


def open_offload(where: str | None, weights: Iterable[AnyShape], device: torch.device) -> Offload | None:
    """Return an `Offload` to ``where``: `HOST` for tensors of ``device``, or a folder for CPU tensors; None for None.

    ``weights`` stay.  `Files` says when a folder raises OSError.
    """
    if where is None:
        return None
    return Offload(Host(device) if where == HOST else Files(Path(where).expanduser()), weights)


class OffloadedPartials:
    """A stack of attention results, which recomputation pops, in the store of ``offload``."""

    def __init__(self, offload: Offload) -> None:
        self._offload, self._packed = offload, list[tuple[AnyShape | _View, AnyShape | _View]]()

    def append(self, partial: Partial) -> None:
        """Move ``partial`` to the store."""
        self._packed.append((self._offload.pack(partial.out), self._offload.pack(partial.lse)))

    def pop(self) -> Partial:
        """Return the newest partial, and forget it."""
        return Partial(*map(self._offload.unpack, self._packed.pop()))

    def __len__(self) -> int:
        return len(self._packed)


def _bytes_of(storage: torch.UntypedStorage) -> Bytes:
    with _disable_current_modes():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
