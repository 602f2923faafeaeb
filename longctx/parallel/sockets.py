"""Sockets between the ranks of a group on one machine, for small messages: they have a fraction of gloo's latency.

gloo passes each message to another thread, on both sides.  Here the calling thread sends and receives.  Sockets
are Unix-domain sockets with names that Linux chooses; these leave no files, and end with their processes.
"""

import os
import secrets
import select
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from longctx.shapes import AnyShape

# A sleeping thread takes 30 to 80 us to wake up on a virtual machine, and most messages arrive sooner.  Between two
# checks, the thread offers its core to other threads.
_SPIN_S = 200e-6
_TOKEN_BYTES = 16

AllGather = Callable[[Any], list[Any]]  # returns the objects of all ranks of the group, in rank order


class PeerSockets:
    """A connected socket to each other rank of a group, by that rank's number in the group."""

    def __init__(self, sockets: Mapping[int, socket.socket], timeout_s: float) -> None:
        self._sockets, self._timeout_s = dict(sockets), timeout_s
        for each in self._sockets.values():
            each.setblocking(False)
        self.close = weakref.finalize(self, _close, tuple(self._sockets.values()))  # runs once, at the latest at exit

    def exchange(self, sent: Mapping[int, AnyShape], received: Mapping[int, AnyShape]) -> None:
        """Send ``sent[i]`` to rank i and fill ``received[i]`` with what rank i sent: contiguous tensors on the CPU.

        Tensors of any size cannot block each other, because a rank receives while it sends.  Raises `ConnectionError`
        if a rank has ended, and `TimeoutError` if no byte is sent or received for ``timeout_s`` seconds.
        """
        unsent, missing = ({peer: _bytes(x) for peer, x in each.items() if x.numel()} for each in (sent, received))
        latest = time.monotonic()  # when a byte was sent or received
        while unsent or missing:
            if self._progress(unsent, missing):
                latest = time.monotonic()
            elif (waited := time.monotonic() - latest) < _SPIN_S:
                os.sched_yield()
            else:
                self._sleep(unsent, missing, self._timeout_s - waited)

    def _progress(self, unsent: dict[int, memoryview], missing: dict[int, memoryview]) -> bool:
        """Send and receive as much as the sockets allow now; return True if that is anything."""
        progress = False
        for peer, data in tuple(unsent.items()):
            with suppress(BlockingIOError):
                _advance(unsent, peer, self._sockets[peer].send(data))
                progress = True
        for peer, data in tuple(missing.items()):
            with suppress(BlockingIOError):
                count = self._sockets[peer].recv_into(data)
                if not count:
                    raise ConnectionResetError("the peer has closed its socket")
                _advance(missing, peer, count)
                progress = True
        return progress

    def _sleep(self, unsent: Mapping[int, memoryview], missing: Mapping[int, memoryview], timeout_s: float) -> None:
        """Wait until a socket can make progress.  Raises TimeoutError after ``timeout_s``."""
        poll = select.poll()
        for peer in {*unsent, *missing}:
            wanted = (select.POLLOUT if peer in unsent else 0) | (select.POLLIN if peer in missing else 0)
            poll.register(self._sockets[peer], wanted)
        if timeout_s <= 0 or not poll.poll(timeout_s * 1e3):
            raise TimeoutError("timed out")


def _advance(remaining: dict[int, memoryview], peer: int, count: int) -> None:
    """Remove the first ``count`` bytes from what remains for ``peer``."""
    if count == len(remaining[peer]):
        del remaining[peer]
    else:
        remaining[peer] = remaining[peer][count:]


def _bytes(x: AnyShape) -> memoryview:
    """Return the memory of the contiguous tensor ``x`` as bytes."""
    return x.detach().view(-1).view(torch.uint8).numpy().data


def _close(sockets: tuple[socket.socket, ...]) -> None:
    for each in sockets:
        each.close()


def connect_peers(rank: int, size: int, all_gather: AllGather, timeout_s: float) -> PeerSockets | None:
    """Connect the ``size`` ranks of a group; None if they are not all in one network namespace of a Linux machine.

    All ranks must call this; ``rank`` is this rank's number.  ``all_gather(mine)``, called once, returns every rank's
    ``mine`` in rank order.  Each connection proves with a random token, which ``all_gather`` distributes, that it comes
    from a rank.  ``timeout_s`` limits each wait here, and each later exchange.  Raises OSError if a rank has ended or
    does not answer.
    """
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as opened:
        host, token = _host(), secrets.token_bytes(_TOKEN_BYTES)
        if host:
            listener.bind("")  # Linux chooses a name, which is valid within a network namespace
            listener.listen(size)
        peers = all_gather((host, listener.getsockname(), token))
        if host is None or any(other != host for other, _, _ in peers):
            return None
        sockets: dict[int, socket.socket] = {}
        for other, (_, address, secret) in enumerate(peers[:rank]):
            sockets[other] = opened.enter_context(socket.socket(socket.AF_UNIX))
            _call(sockets[other], address, secret + rank.to_bytes(4, "big"), timeout_s)
        sockets |= _answer(listener, size - 1 - rank, token, timeout_s, opened)
        opened.pop_all()  # from here on, `PeerSockets` closes them
    return PeerSockets(sockets, timeout_s)


def _host() -> tuple[str, str] | None:
    """Return two texts that only processes of one machine and network namespace share; None if not on Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return None


def _call(connection: socket.socket, address: bytes, hello: bytes, timeout_s: float) -> None:
    """Connect to the rank that listens at ``address``, and send it ``hello``: its token and this process's rank."""
    connection.settimeout(timeout_s)
    connection.connect(address)
    connection.sendall(hello)


def _answer(
    listener: socket.socket, count: int, token: bytes, timeout_s: float, opened: ExitStack
) -> dict[int, socket.socket]:
    """Accept the connections of ``count`` ranks, and return them by rank; ``opened`` also gets each connection.

    Strangers' connections are closed: those that send anything else than ``token`` and a rank, or nothing.
    """
    answered: dict[int, socket.socket] = {}
    silent: list[socket.socket] = []  # connections that have sent nothing yet
    while len(answered) < count:
        ready: list[Any] = wait([listener, *silent], timeout_s)
        if not ready:
            raise TimeoutError("timed out")
        for connection in ready:
            if connection is listener:
                silent.append(opened.enter_context(listener.accept()[0]))
                continue
            silent.remove(connection)
            hello = connection.recv(_TOKEN_BYTES + 4)  # a Unix-domain socket delivers so few bytes at once
            if hello[:_TOKEN_BYTES] == token and len(hello) == _TOKEN_BYTES + 4:
                answered[int.from_bytes(hello[_TOKEN_BYTES:], "big")] = connection
            else:
                connection.close()
    for stranger in silent:
        stranger.close()
    return answered
