"""A wire with latency between emulated hosts, for kernels without tc's netem: a process that carries every packet.

Started by `hosts`, which ends it by closing its standard input.  A packet read from one host's TUN device is written
to that of its destination ``latency`` seconds later; rates are tc's business, on the devices themselves.
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
_PLAIN_IP = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
_PACKET = 65536


def main(stem: str, hosts: int, latency_s: float, mtu: int) -> None:
    """Make a device for each host, move it into its namespace as eth0, say so, and carry packets until input ends."""
    ports: dict[int, int] = {}
    for host in range(1, hosts + 1):
        name, where = f"lcx{os.getpid()}.{host}", f"{stem}-host{host}"
        ports[host] = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(ports[host], _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _PLAIN_IP))
        for command in (
            f"ip link set {name} netns {where}",
            f"ip -n {where} link set {name} name eth0",
            f"ip -n {where} link set eth0 mtu {mtu} txqueuelen 1000",
        ):
            subprocess.run(command.split(), check=True)
    with suppress(PermissionError):  # else the wire waits behind busy ranks, and its latency is longer than asked for
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    carry(ports, latency_s)


def carry(ports: dict[int, int], latency_s: float) -> None:
    """Packets between ``ports``, devices by the last byte of their address, until standard input ends."""
    on_the_way: deque[tuple[float, int, bytes]] = deque()  # all take as long: first in, first out
    while True:
        wait = max(0.0, on_the_way[0][0] - time.perf_counter()) if on_the_way else None
        readable, _, _ = select.select([sys.stdin, *ports.values()], [], [], wait)
        if sys.stdin in readable:
            return
        for port in (one for one in ports.values() if one in readable):
            with suppress(BlockingIOError):
                while True:
                    packet = os.read(port, _PACKET)
                    if packet[0] >> 4 == 4 and packet[19] in ports:  # IPv4, and the last byte of where it goes
                        on_the_way.append((time.perf_counter() + latency_s, ports[packet[19]], packet))
        while on_the_way and on_the_way[0][0] <= time.perf_counter():
            _, port, packet = on_the_way.popleft()
            with suppress(OSError):  # a full queue drops, as networks do
                os.write(port, packet)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
