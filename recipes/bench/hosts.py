"""Emulated hosts on one machine: network namespaces whose links have a given rate, with one rank of a recipe in each.

Needs root, and ip and tc of iproute2.  The switch has a namespace too, so the machine's own devices, addresses and
routes do not change.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from longctx.config import Mesh
from longctx.parallel.launch import RankFailed
from longctx.parallel.launcher import current_rank

DEFAULT_RATE = "100mbit"
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_MTU = 9000
# Size of a link's token bucket, in seconds at the link's rate.  It makes up for a late timer; a smaller one loses rate
# at 1 Gbit/s.
_BURST_S = 200e-6
_QUEUE = 2**25  # bytes; more than TCP has in flight, so links delay packets and never drop them
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_PREFIX = "longctx-"
_INSIDE = "LONGCTX_EMULATED_HOST"  # environment variable of a rank: the namespace that it runs in


def refuse_links(hosts: int, rate: str, latency_us: float, mesh: Mesh) -> None:
    """Raise ValueError as `refuse_hosts` does if ``hosts`` is above 0.

    For ``hosts`` = 0, raise it if ``rate`` or ``latency_us`` is set.
    """
    if hosts:
        refuse_hosts(hosts, rate, mesh)
    elif (latency_us, rate) != (0, DEFAULT_RATE):
        links = f"latency_us={latency_us} and rate={rate}"
        raise ValueError(f"{links} are for links between emulated hosts: set hosts={mesh.ranks}, or leave both out")


def refuse_hosts(hosts: int, rate: str, mesh: Mesh) -> None:
    """Raise ValueError unless ``hosts`` emulated hosts with links of ``rate`` can run one rank of ``mesh`` each."""
    local = "or hosts=0, without rate and latency_us, for ranks on loopback"
    if current_rank() and not is_host():
        raise ValueError(
            f"hosts={hosts} starts its ranks itself, but a launcher has started these: use hosts=0, or no launcher"
        )
    if hosts != mesh.ranks:
        raise ValueError(f"hosts={hosts} with mesh {mesh}: each host runs one rank; use hosts={mesh.ranks}, {local}")
    bits_per_s(rate)
    if os.geteuid() != 0:
        raise ValueError(f"hosts={hosts}: network namespaces need root; use sudo, {local}")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ValueError(f"hosts={hosts}: {tool} is not in PATH; install iproute2, {local}")


def bits_per_s(rate: str) -> float:
    """Return the bits per second of ``rate``, written as tc does: "100mbit" is 1e8.  Raises ValueError otherwise."""
    match = _RATE.fullmatch(rate)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"rate={rate} is not a rate: use a number and kbit, mbit or gbit, such as rate=100mbit")
    return float(match[1]) * _UNITS[match[2]]


def is_host() -> bool:
    """Return True in a rank that `run_on_hosts` started."""
    return _INSIDE in os.environ


def run_on_hosts(hosts: int, rate: str, command: Sequence[str], latency_us: float = 0) -> None:
    """Run ``command`` on each of ``hosts`` emulated hosts, with torchrun's environment variables.

    Returns when all have ended.  Only the first rank's output is shown.  ``rate`` and ``latency_us`` are as in
    `emulated_hosts`.  Raises `RankFailed` if a rank fails, after the other ranks have been ended.
    """
    sys.stdout.flush()
    with emulated_hosts(hosts, rate, latency_us) as names, tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        outputs = [Path(folder, f"rank{rank}") for rank in range(hosts)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(names):
                ranks.append(_start_rank(rank, name, hosts, command, outputs[rank]))
            _wait_for_all(ranks, outputs)
        finally:
            _end(ranks)


@contextmanager
def emulated_hosts(hosts: int, rate: str, latency_us: float = 0) -> Iterator[list[str]]:
    """Make ``hosts`` network namespaces for the length of the block; yields their names.

    Host i, counted from 1, has the address 10.77.0.i on eth0.  ``rate`` limits what each host sends, and what it
    receives.  With ``latency_us``, microseconds one way, a process forwards the packets (see `wire`), and ``rate``
    limits only what is sent.  SIGTERM leaves the block as Ctrl-C does.  Namespaces that killed runs left are removed
    first.

    Raises ValueError, with the output of ip or tc, if the kernel or the container does not allow it.
    """
    _remove_stale()
    prefix = f"{_PREFIX}{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-host{host}" for host in range(1, hosts + 1)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wire: subprocess.Popen[str] | None = None
    try:
        if latency_us:
            wire = _connect_by_wire(prefix, names, rate, latency_us)
        else:
            _connect_by_switch(switch, names, rate)
        yield names
    finally:
        if wire:
            wire.communicate()  # closes its input, which ends it
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # it may not exist yet
        signal.signal(signal.SIGTERM, before)


def _connect_by_switch(switch: str, names: Sequence[str], rate: str) -> None:
    """Make the namespaces ``names``, and connect each to a bridge by a pair of devices that limit it to ``rate``."""
    queue = _rate_limit(rate)
    # Segments of at most one MTU: the kernel's 64 KB segments would pass in one burst.
    segments = f"mtu {_MTU} gso_max_size {_MTU} gso_max_segs 1"
    _do(f"ip netns add {switch}")
    _do(f"ip -n {switch} link add bridge mtu {_MTU} type bridge")
    _do(f"ip -n {switch} link set bridge up")
    for i, name in enumerate(names, 1):
        _do(f"ip netns add {name}")
        _do(f"ip -n {switch} link add port{i} {segments} type veth peer name eth0 {segments} netns {name}")
        _do(f"ip -n {switch} link set port{i} master bridge up")
        _do(f"ip -n {name} addr add 10.77.0.{i}/24 dev eth0")
        _do(f"ip -n {name} link set lo up")
        _do(f"ip -n {name} link set eth0 up")
        _do(f"tc -n {name} qdisc add dev eth0 {queue}")
        _do(f"tc -n {switch} qdisc add dev port{i} {queue}")


def _connect_by_wire(prefix: str, names: Sequence[str], rate: str, latency_us: float) -> subprocess.Popen[str]:
    """Make the namespaces ``names``, and start and return the process that forwards their packets (`wire.py`).

    The process delays packets by ``latency_us``.  The namespaces' names begin with ``prefix``.
    """
    for name in names:
        _do(f"ip netns add {name}")
    words = [prefix, str(len(names)), str(latency_us * 1e-6), str(_MTU)]
    # -P: the file imports nothing from its own folder, nor from the working folder.
    command = [sys.executable, "-P", str(Path(__file__).with_name("wire.py")), *words]
    wire = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert wire.stdout
    if not wire.stdout.readline():
        raise ValueError("emulated hosts with latency fail here (is there /dev/net/tun?): use latency_us=0")
    for i, name in enumerate(names, 1):
        _do(f"ip -n {name} addr add 10.77.0.{i}/24 dev eth0")
        _do(f"ip -n {name} link set lo up")
        _do(f"ip -n {name} link set eth0 up")
        _do(f"tc -n {name} qdisc add dev eth0 {_rate_limit(rate)}")
    return wire


def _rate_limit(rate: str) -> str:
    """Return tc's words for a token bucket filter of ``rate``."""
    burst = max(int(1.2 * _MTU), int(bits_per_s(rate) / 8 * _BURST_S))
    return f"root tbf rate {rate} burst {burst} limit {_QUEUE}"


def _do(command: str) -> None:
    result = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(
            f"emulated hosts fail here (`{command}` says {result.stderr.strip()}): use hosts=0, without rate and "
            "latency_us"
        )


def _remove_stale() -> None:
    """Remove the namespaces that killed runs left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(rf"^({_PREFIX}(\d+)-(?:switch|host\d+))\b", listed, re.MULTILINE):
        if int(pid) == os.getpid() or not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _start_rank(rank: int, name: str, world_size: int, command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start ``command`` as ``rank`` in the namespace ``name``; ranks other than the first write to ``output``."""
    ranks = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0", _INSIDE: name}
    # A namespace reaches no hub, and cannot resolve addresses to names, which torch would warn about.
    offline = {"HF_HUB_OFFLINE": 1, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    added = {key: str(value) for key, value in {**ranks, **address, **offline}.items()}
    with output.open("wb") as file:
        stream = None if rank == 0 else file
        # In a separate process session, so that the parent alone handles Ctrl-C.
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command], env={**_without_launchers(os.environ), **added},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip


def _without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without a launcher's variables, which torch and `launch` would follow in the ranks."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}


def _wait_for_all(ranks: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path]) -> None:
    """Wait until all ranks have ended.  Raises `RankFailed` as soon as one has failed."""
    codes: list[int | None] = [None]
    while None in codes:
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
        # A killed rank has a negative code and comes first: the others then failed because they lost it.
        if failed := sorted((code, rank) for rank, code in enumerate(codes) if code):
            code, rank = failed[0]
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise RankFailed(rank, len(ranks), reason, outputs[rank].read_text(errors="replace"))


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to all ranks, and SIGKILL to those that still run after `_GRACE_S` seconds."""
    for rank in ranks:
        rank.terminate()
    until = time.monotonic() + _GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
