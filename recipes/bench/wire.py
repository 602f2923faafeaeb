"""Latency between emulated hosts on kernels without tc's netem: a process that forwards every packet with a delay.

`hosts` starts the process and ends it by closing its standard input.  A packet read from one host's TUN device is
written to the TUN device of its destination ``latency_s`` seconds later.  tc limits the rate, on the devices.
"""

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_PLAIN_IP = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI: IP packets without a header from the driver
_MAX_PACKET = 65536  # bytes


def main(prefix: str, hosts: int, latency_s: float, mtu: int) -> None:
    """Make a TUN device for each host, move it into the host's namespace as eth0, and forward packets.

    The namespaces are ``prefix``-host1, -host2 and so on.  Prints "ready" before the first packet; returns when
    standard input ends.
    """
    ports: dict[int, int] = {}
    for host in range(1, hosts + 1):
        name, namespace = f"lcx{os.getpid()}.{host}", f"{prefix}-host{host}"
        ports[host] = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(ports[host], _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _PLAIN_IP))
        for command in (
            f"ip link set {name} netns {namespace}",
            f"ip -n {namespace} link set {name} name eth0",
            f"ip -n {namespace} link set eth0 mtu {mtu} txqueuelen 1000",
        ):
            subprocess.run(command.split(), check=True)
    # With a real-time priority, busy ranks cannot delay the packets beyond the latency.
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    forward_packets(ports, latency_s)


def forward_packets(ports: dict[int, int], latency_s: float) -> None:
    """Forward packets between hosts until standard input ends.

    ``ports`` has the file descriptor of each host's TUN device, by the last byte of the host's address.
    """
    # (due time, destination, packet); all packets have the same delay, so they leave in the order of their arrival.
    pending: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, pending[0][0] - time.perf_counter()) if pending else None
        readable, _, _ = select.select([sys.stdin, *ports.values()], [], [], wait)
        if sys.stdin in readable:
            return
        for port in (port for port in ports.values() if port in readable):
            with suppress(BlockingIOError):
                while True:
                    packet = os.read(port, _MAX_PACKET)
                    if packet[0] >> 4 == 4 and packet[19] in ports:  # IPv4; the last byte of its destination
                        pending.append((time.perf_counter() + latency_s, ports[packet[19]], packet))
        while pending and pending[0][0] <= time.perf_counter():
            _, port, packet = pending.popleft()
            with suppress(OSError):  # a full queue drops the packet, as a network would
                os.write(port, packet)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
