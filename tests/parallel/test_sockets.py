"""`PeerSockets` between threads: what arrives, messages larger than a socket's buffer, and peers that are gone."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from longctx.parallel import sockets
from longctx.parallel.sockets import PeerSockets, connect_peers

Result = TypeVar("Result")
TIMEOUT_S = 30.0


def connect_and_run(size: int, main: Callable[[int, PeerSockets], None], timeout_s: float = TIMEOUT_S) -> None:
    """Connect ``size`` threads and run ``main(rank, sockets)`` on each."""

    def run(rank: int, all_gather: Callable[[Any], list[Any]]) -> None:
        peers = connect_peers(rank, size, all_gather, timeout_s)
        assert peers is not None
        try:
            main(rank, peers)
        finally:
            peers.close()

    run_gathering(size, run)


def run_gathering(size: int, run: Callable[[int, Callable[[Any], list[Any]]], Result]) -> list[Result]:
    """Run ``run(rank, all_gather)`` on ``size`` threads; ``all_gather`` works once."""
    barrier, objects = threading.Barrier(size, timeout=TIMEOUT_S), [None] * size

    def all_gather(rank: int, mine: Any) -> list[Any]:
        objects[rank] = mine
        barrier.wait()
        return objects

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank, lambda mine, rank=rank: all_gather(rank, mine)) for rank in range(size)]
        return [future.result() for future in futures]


def message(source: int, to: int, length: int) -> torch.Tensor:
    """Return different numbers for each pair of ranks, some in bfloat16, some empty."""
    dtype = torch.bfloat16 if (source + to) % 3 else torch.float64
    return torch.arange((source + 2 * to) % 5 * length).mul(7 * source + to + 1).to(dtype)


@pytest.mark.parametrize(("size", "length"), [(2, 13), (3, 7), (5, 1), (3, 400_009)])
def test_messages_arrive(size, length):
    """Messages of 400,009 elements do not fit a socket's buffer: sending them all before receiving would block."""

    def main(rank: int, peers: PeerSockets) -> None:
        others = [other for other in range(size) if other != rank]
        for _ in range(3):
            received = {other: torch.empty_like(message(other, rank, length)) for other in others}
            peers.exchange({other: message(rank, other, length) for other in others}, received)
            for other in others:
                assert torch.equal(received[other], message(other, rank, length)), f"rank {other} to rank {rank}"

    connect_and_run(size, main)


@pytest.mark.parametrize("spin_s", [0.0, 10.0])
def test_peer_that_ended_is_noticed_at_once(monkeypatch, spin_s):
    """Asleep or not.  The other rank's last message still arrives."""
    monkeypatch.setattr(sockets, "_SPIN_S", spin_s)

    def main(rank: int, peers: PeerSockets) -> None:
        x = torch.zeros(5)
        peers.exchange({1 - rank: torch.full((5,), 3.0)}, {1 - rank: x})
        assert x.tolist() == [3.0] * 5
        if rank == 0:
            with pytest.raises(ConnectionError):
                peers.exchange({}, {1: x})
            with pytest.raises(ConnectionError):
                peers.exchange({1: x}, {})

    connect_and_run(2, main)


def test_peer_that_does_not_answer_times_out():
    answered = threading.Event()

    def main(rank: int, peers: PeerSockets) -> None:
        if rank:
            assert answered.wait(TIMEOUT_S)
            return
        with pytest.raises(TimeoutError, match="timed out"):
            peers.exchange({1: torch.zeros(1)}, {1: torch.zeros(1)})
        with pytest.raises(TimeoutError):  # nor does a buffer that the peer never empties block forever
            peers.exchange({1: torch.zeros(1_000_003)}, {})
        answered.set()

    connect_and_run(2, main, timeout_s=0.1)


def test_slow_exchange_that_advances_does_not_time_out():
    """The peer takes twice the timeout for its message, in pieces."""

    def main(rank: int, peers: PeerSockets) -> None:
        if rank == 0:
            received = torch.zeros(11)
            peers.exchange({}, {1: received})
            assert received.tolist() == list(range(11))
            return
        for piece in range(11):
            time.sleep(0.2)
            peers.exchange({0: torch.tensor([float(piece)])}, {})

    connect_and_run(2, main, timeout_s=1.1)


@pytest.mark.parametrize("listens", [False, True])
def test_failed_connection_leaves_no_open_socket(monkeypatch, listens):
    """Rank 1 of 3 cannot connect to rank 0, or it has connected and rank 2 does not call."""
    made: list[socket.socket] = []
    plain = socket.socket

    def make(*arguments: Any) -> socket.socket:
        made.append(plain(*arguments))
        return made[-1]

    with plain(socket.AF_UNIX) as other:
        other.bind("")
        if listens:
            other.listen(1)
        monkeypatch.setattr(sockets.socket, "socket", make)
        with pytest.raises((TimeoutError, ConnectionError)):
            connect_peers(1, 3, lambda mine: [(mine[0], other.getsockname(), mine[2]), mine, mine], 0.05)
    assert len(made) == 2 and all(one.fileno() == -1 for one in made)


@pytest.mark.parametrize("hello", [bytes(16) + (1).to_bytes(4, "big"), b"short", b""])
def test_stranger_is_no_rank(hello):
    """A process that connects without the token, as rank 1, is not taken for it; nor is a silent one waited for."""
    strangers: list[socket.socket] = []

    def run(rank: int, all_gather: Callable[[Any], list[Any]]) -> float:
        def gather(mine: Any) -> list[Any]:
            if rank == 0:
                strangers.append(socket.socket(socket.AF_UNIX))
                strangers[0].connect(mine[1])
                strangers[0].sendall(hello)
            return all_gather(mine)

        peers = connect_peers(rank, 2, gather, TIMEOUT_S)
        assert peers is not None
        x = torch.zeros(1)
        peers.exchange({1 - rank: torch.tensor([1.0 + rank])}, {1 - rank: x})
        peers.close()
        return x.item()

    assert run_gathering(2, run) == [2.0, 1.0]
    with strangers[0] as stranger:
        assert stranger.recv(1) == b"", "its connection is closed"


def test_ranks_of_two_machines_do_not_connect(monkeypatch):
    hosts = iter([("a", "net:1"), ("b", "net:1")])
    monkeypatch.setattr(sockets, "_host", lambda: next(hosts))
    assert run_gathering(2, lambda rank, gather: connect_peers(rank, 2, gather, TIMEOUT_S)) == [None, None]


def test_without_linux_ranks_do_not_connect(monkeypatch):
    monkeypatch.setattr(sockets, "_host", lambda: None)
    assert run_gathering(2, lambda rank, gather: connect_peers(rank, 2, gather, TIMEOUT_S)) == [None, None]
