"""Emulated hosts: links have the requested rate and latency, bad settings are refused, and nothing is left over."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from longctx.parallel.launch import RankFailed
from recipes.bench import crossover, hosts


def output(command):
    return subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout


def state():
    """This process's namespaces, and the machine's own links and queueing disciplines."""
    own = [name for name in output("ip netns list").split() if name.startswith(f"longctx-{os.getpid()}-")]
    return own, output("ip -brief link"), output("tc qdisc show")


@pytest.fixture(scope="module")
def namespaces():
    """Skip the test on a machine without network namespaces, or without rate limits in them."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("emulated hosts need root, and ip and tc (iproute2)")
    name = f"longctx-test{os.getpid()}"
    commands = [
        f"ip netns add {name}",
        f"ip -n {name} link add bridge type bridge",
        f"ip -n {name} link add one type veth peer name two",
        f"tc -n {name} qdisc add dev one root tbf rate 1mbit burst 10000 limit 10000",
    ]
    try:
        for command in commands:
            output(command)
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"no emulated hosts here: `{command}` says {refused.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def no_leftovers(namespaces, monkeypatch):
    """Check after the test that it left no namespace, link or running rank."""
    before, start_rank, ranks = state(), hosts._start_rank, []
    monkeypatch.setattr(hosts, "_start_rank", lambda *args: ranks.append(start_rank(*args)) or ranks[-1])
    yield
    assert state() == before
    assert all(rank.returncode is not None for rank in ranks), "a rank still runs"


def on_hosts(count, rate, program, latency_us=0):
    """Run a Python ``program`` on emulated hosts; RANK is defined in it."""
    begin = "import os, signal, socket, sys, time\nRANK = int(os.environ['RANK'])\n"
    hosts.run_on_hosts(count, rate, [sys.executable, "-c", begin + program], latency_us)


def test_crossover_is_measured_over_links_of_the_requested_rate(cli, tiny, tmp_path, no_leftovers):
    out = tmp_path / "crossover.json"
    words = [f"model={tiny}", "hosts=2", "rate=80mbit", "total=61", "miss_rates=[0.3]", "rounds=1", f"out={out}"]
    code, _, err = cli(crossover, crossover.task, *words)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert (result["hosts"], result["rate"], result["mesh"]) == (2, "80mbit", "ring=2")
    assert "hosts=2 rate=80mbit" in result["command"]
    assert 0.6 * 10e6 < result["hardware"]["hop"]["bytes_per_s"] < 1.05 * 10e6


def test_links_have_the_requested_latency(no_leftovers, capfd):
    """A round trip over links of 3 ms one way takes 6 ms to 12 ms."""
    program = """
port = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if RANK == 0:
    with socket.create_server(port) as server:
        peer = server.accept()[0]
        for _ in range(12):
            peer.sendall(peer.recv(1))
else:
    while True:
        try:
            peer = socket.create_connection(port)
            break
        except OSError:
            time.sleep(0.05)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        seconds.append(time.perf_counter() - began)
    if not 0.006 <= min(seconds) < 0.012:
        sys.exit(f"a round trip took {min(seconds)} s")
"""
    on_hosts(2, "80mbit", program, latency_us=3000)


TALK = """
port = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if RANK == 0:
    with socket.create_server(port) as server:
        peers = [server.accept()[0] for _ in range(2)]
    began = time.monotonic()
    for peer in peers:
        peer.sendall(bytes(SENT))
        peer.shutdown(socket.SHUT_WR)
    for peer in peers:
        while peer.recv(2**16): pass
    print("seconds", time.monotonic() - began)
else:
    while True:
        try: peer = socket.create_connection(port)
        except ConnectionRefusedError: time.sleep(0.01)
        else: break
    while peer.recv(2**16): pass
    peer.sendall(bytes(RETURNED))
"""


@pytest.mark.parametrize(("sent", "returned"), [(500_000, 1), (1, 500_000)], ids=["sends", "receives"])
def test_traffic_with_two_other_hosts_shares_one_link(no_leftovers, capfd, sent, returned):
    on_hosts(3, "20mbit", TALK.replace("SENT", str(sent)).replace("RETURNED", str(returned)))
    seconds = float(capfd.readouterr().out.removeprefix("seconds"))
    assert seconds > 0.9 * 2 * 500_000 * 8 / 20e6


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("print('its last words'); sys.exit(3)", "exited with 3"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")],
)
def test_a_rank_that_fails_ends_the_others(no_leftovers, capfd, ending, reason):
    began = time.monotonic()
    with pytest.raises(RankFailed, match=f"rank 1 of 2 {reason}; the other ranks were ended") as failed:
        on_hosts(2, "10mbit", f"print('of', RANK, flush=True)\nif RANK: {ending}\ntime.sleep(60)")
    assert time.monotonic() - began < 30
    assert ("its last words" in failed.value.details) == ("last" in ending)
    assert capfd.readouterr().out in ("", "of 0\n"), "the first rank's output only"


@pytest.mark.parametrize(("number", "error"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_an_interrupted_run_ends_its_ranks(no_leftovers, number, error):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        on_hosts(2, "10mbit", f"if RANK: os.kill(os.getppid(), signal.{number})\ntime.sleep(60)")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failing_ip_command_is_reported_and_undone(no_leftovers, monkeypatch):
    monkeypatch.setattr(hosts, "_MTU", -1)
    with pytest.raises(ValueError, match=r"fail here \(`ip -n \S+ link add .*` says .*mtu.*\): use hosts=0"):
        hosts.run_on_hosts(2, "10mbit", [sys.executable, "-c", "raise SystemExit"])


def test_the_next_run_removes_the_namespaces_of_a_killed_one(no_leftovers):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = [f"longctx-{ended.pid}-switch", f"longctx-{ended.pid}-host2"], f"longctx-{os.getppid()}-host1"
    for name in (*dead, alive):
        output(f"ip netns add {name}")
    try:
        with hosts.emulated_hosts(1, "10mbit") as names:
            existing = set(output("ip netns list").split())
    finally:
        output(f"ip netns del {alive}")
    assert existing >= {alive, *names} and not existing & set(dead)


@pytest.fixture
def says(refused, tiny, monkeypatch):
    """``says(*settings)``: the message with which crossover refuses ``settings``, before any host starts."""
    monkeypatch.setattr(crossover, "run_on_hosts", lambda *_: pytest.fail("hosts were started"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/sbin/{name}")
    return lambda *settings: refused(crossover, crossover.task, f"model={tiny}", *settings)


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TORCHELASTIC_RUN_ID": "7"}]
)
def test_ranks_do_not_inherit_the_variables_of_a_launcher(environment):
    inherited = hosts._without_launchers({"HOME": "/root", **environment})
    assert inherited.pop("HOME") == "/root" and inherited in ({}, {"WORLD_SIZE": "1"})


@pytest.mark.parametrize(("rate", "bits"), [("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("7kbit", 7e3)])
def test_rates_are_read_in_units_of_tc(rate, bits):
    assert hosts.bits_per_s(rate) == bits


@pytest.mark.parametrize("rate", ["100", "100 mbit", "100Mb/s", "0mbit", "-1mbit", "1e9bit", "50%", "mbit", "10mbit 5"])
def test_a_malformed_rate_is_refused(rate):
    with pytest.raises(ValueError, match=re.escape(f"rate={rate} is not a rate: use a number and kbit, mbit or gbit")):
        hosts.bits_per_s(rate)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hosts=3"], "hosts=3 with mesh ring=2: each host runs one rank; use hosts=2, or hosts=0"),
        (["hosts=1", "mesh.ring=1"], "mesh.ring=1: one rank has no transfers to time"),
        (["hosts=-1"], "hosts=-1"),
        (["hosts=2", "rate=100"], "rate=100 is not a rate: use a number and kbit, mbit or gbit, such as rate=100mbit"),
        (["hosts=2", "rate=10 mbit"], "rate=10 mbit is not a rate: use a number"),
    ],
)
def test_bad_hosts_and_rates_are_refused(says, settings, words):
    assert words in says(*settings)


def test_a_user_who_is_not_root_is_refused(says, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "hosts=2: network namespaces need root; use sudo, or hosts=0" in says("hosts=2")


@pytest.mark.parametrize("tool", ["ip", "tc"])
def test_a_machine_without_ip_or_tc_is_refused(says, monkeypatch, tool):
    monkeypatch.setattr("shutil.which", lambda name: None if name == tool else f"/sbin/{name}")
    assert f"{tool} is not in PATH; install iproute2" in says("hosts=2")


def test_ranks_of_a_launcher_are_refused(says, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "a launcher has started these: use hosts=0" in says("hosts=2")
