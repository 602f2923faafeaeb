"""Emulated hosts on one machine: network namespaces whose links have a given rate, and a rank of a recipe in each.

Needs root, and ip and tc of iproute2.  The switch has a namespace too, so that nothing of this leaves the namespaces:
the machine's own devices, addresses and routes stay as they are.
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
from longctx.parallel.launch import RankFailed, rank_from_environment

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_MTU = 9000
_AT_ONCE_S = 200e-6  # what a link may make up for where its timer comes late; less loses rate at 1 Gbit/s
_QUEUE = 2**25  # bytes; more than TCP has under way, so that links delay and never drop
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_PREFIX = "longctx-"
_INSIDE = "LONGCTX_EMULATED_HOST"  # of a rank's environment: the namespace that it runs in


def refuse_hosts(hosts: int, rate: str, mesh: Mesh) -> None:
    """ValueError unless ``hosts`` emulated hosts, with links of ``rate``, can hold a rank of ``mesh`` each."""
    local = "or hosts=0 for ranks on loopback"
    if rank_from_environment(os.environ) and not is_host():
        raise ValueError(f"hosts={hosts} starts ranks of its own, but a launcher has started these: use hosts=0")
    if hosts != mesh.ranks:
        raise ValueError(f"hosts={hosts}, {mesh}: each host has one rank, use hosts={mesh.ranks}, {local}")
    bits_per_s(rate)
    if os.geteuid() != 0:
        raise ValueError(f"hosts={hosts}: network namespaces need root, use sudo, {local}")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ValueError(f"hosts={hosts}: there is no {tool} in PATH, install iproute2, {local}")


def bits_per_s(rate: str) -> float:
    """The number that ``rate`` means, a word of tc's such as 100mbit.  Raises ValueError for any other."""
    said = _RATE.fullmatch(rate)
    if said is None or float(said[1]) == 0:
        raise ValueError(f"rate={rate}: use a number and kbit, mbit or gbit, such as rate=100mbit")
    return float(said[1]) * _UNITS[said[2]]


def is_host() -> bool:
    """Whether this process is a rank that `run_on_hosts` started."""
    return _INSIDE in os.environ


def run_on_hosts(hosts: int, rate: str, command: Sequence[str], latency_us: float = 0) -> None:
    """Run ``command`` in each of ``hosts`` emulated hosts, with torchrun's variables; only the first's output shows.

    Raises `RankFailed`, after the others have been ended, if one fails.
    """
    sys.stdout.flush()
    with emulated_hosts(hosts, rate, latency_us) as names, tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        said = [Path(folder, f"rank{rank}") for rank in range(hosts)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(names):
                ranks.append(_started(rank, name, hosts, command, said[rank]))
            _wait_for_all(ranks, said)
        finally:
            _end(ranks)


@contextmanager
def emulated_hosts(hosts: int, rate: str, latency_us: float = 0) -> Iterator[list[str]]:
    """The names of ``hosts`` network namespaces, while the block runs: the i-th is 10.77.0.i, counted from 1, on eth0.

    What a host sends passes at ``rate``, and so does what it receives.  With ``latency_us``, microseconds one way, a
    process carries the packets (see `wire`), and what is received has no rate of its own.  SIGTERM leaves the block as
    Ctrl-C does.
    Raises ValueError, with what ip or tc said, where the kernel or the container does not allow it.
    """
    _remove_left_over()
    stem = f"{_PREFIX}{os.getpid()}"
    switch, names = f"{stem}-switch", [f"{stem}-host{host}" for host in range(1, hosts + 1)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wire: subprocess.Popen[str] | None = None
    try:
        if latency_us:
            wire = _wired(stem, names, rate, latency_us)
        else:
            _set_up(switch, names, rate)
        yield names
    finally:
        if wire:
            wire.communicate()  # its input ends, and so does it
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # one may not be there yet
        signal.signal(signal.SIGTERM, before)


def _set_up(switch: str, names: Sequence[str], rate: str) -> None:
    shaped = _shaped(rate)
    # A packet is at most one MTU: the kernel's 64 KB segments would pass in one burst.
    cut = f"mtu {_MTU} gso_max_size {_MTU} gso_max_segs 1"
    _do(f"ip netns add {switch}")
    _do(f"ip -n {switch} link add bridge mtu {_MTU} type bridge")
    _do(f"ip -n {switch} link set bridge up")
    for i, name in enumerate(names, 1):
        _do(f"ip netns add {name}")
        _do(f"ip -n {switch} link add port{i} {cut} type veth peer name eth0 {cut} netns {name}")
        _do(f"ip -n {switch} link set port{i} master bridge up")
        _do(f"ip -n {name} addr add 10.77.0.{i}/24 dev eth0")
        _do(f"ip -n {name} link set lo up")
        _do(f"ip -n {name} link set eth0 up")
        _do(f"tc -n {name} qdisc add dev eth0 {shaped}")
        _do(f"tc -n {switch} qdisc add dev port{i} {shaped}")


def _wired(stem: str, names: Sequence[str], rate: str, latency_us: float) -> subprocess.Popen[str]:
    """The process that carries the packets of hosts ``names``, which are set up."""
    for name in names:
        _do(f"ip netns add {name}")
    words = [stem, str(len(names)), str(latency_us * 1e-6), str(_MTU)]
    wire = subprocess.Popen(
        [sys.executable, "-m", "recipes.bench.wire", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert wire.stdout
    if not wire.stdout.readline():
        raise ValueError("no emulated hosts with latency here (is there /dev/net/tun?): use latency_us=0, or hosts=0")
    for i, name in enumerate(names, 1):
        _do(f"ip -n {name} addr add 10.77.0.{i}/24 dev eth0")
        _do(f"ip -n {name} link set lo up")
        _do(f"ip -n {name} link set eth0 up")
        _do(f"tc -n {name} qdisc add dev eth0 {_shaped(rate)}")
    return wire


def _shaped(rate: str) -> str:
    burst = max(int(1.2 * _MTU), int(bits_per_s(rate) / 8 * _AT_ONCE_S))
    return f"root tbf rate {rate} burst {burst} limit {_QUEUE}"


def _do(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"no emulated hosts here, use hosts=0: `{command}` says {done.stderr.strip()}")


def _remove_left_over() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name, pid in re.findall(rf"^({_PREFIX}(\d+)-(?:switch|host\d+))\b", listed, re.MULTILINE):
        if int(pid) == os.getpid() or not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _started(rank: int, name: str, world: int, command: Sequence[str], said: Path) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    meet = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0", _INSIDE: name}
    # No hub can be reached; nor can addresses be turned into names, of which torch would warn.
    apart = {"HF_HUB_OFFLINE": 1, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = {**_without_launchers(os.environ), **{k: str(v) for k, v in {**place, **meet, **apart}.items()}}
    with said.open("wb") as file:
        where = None if rank == 0 else file
        # A session of its own: Ctrl-C is the parent's to handle.
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            env=environment, stdin=subprocess.DEVNULL, stdout=where, stderr=where, start_new_session=True,
        )  # fmt: skip


def _without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what a launcher of this process alone said, which torch and `launch` would follow."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}


def _wait_for_all(ranks: Sequence[subprocess.Popen[bytes]], said: Sequence[Path]) -> None:
    codes: list[int | None] = [None]
    while None in codes:
        time.sleep(0.05)
        codes = [rank.poll() for rank in ranks]
        # Of several, one that was killed comes before those that then missed it.
        if failed := sorted((code, rank) for rank, code in enumerate(codes) if code):
            code, rank = failed[0]
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise RankFailed(rank, len(ranks), how, said[rank].read_text(errors="replace"))


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.terminate()
    until = time.monotonic() + _GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
