"""A Slurm cluster of this machine alone: its own munged, slurmctld and slurmds in a folder, and wholly gone afterwards.

Nothing under /etc or /var is written, and nothing is installed.  Every slurmd runs in mount and UTS namespaces of its
own, so that `hostname` says n1, n2, ... and these names are found inside of jobs.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "unshare", "setpriv")
CPUS = 8  # of a node, as Slurm is told; there are no more than this machine has

CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives before it starts again: 120 seconds, if nobody says so.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=3
CompleteWait=0
SlurmdTimeout=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
# One's own name and hosts; then the daemon, by what follows.
IN_NAMESPACES = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def missing() -> str:
    """Why no cluster can be had here; empty if one can."""
    if os.geteuid():
        return "Slurm's daemons need root here"
    lacking = [name for name in COMMANDS if not shutil.which(name)]
    return f"not installed: {', '.join(lacking)} (make slurm installs them)" if lacking else ""


def wait_until(holds: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """AssertionError, saying ``what``, if it does not hold in time."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not after {seconds} s: {what()}"
        time.sleep(0.1)


class Cluster:
    """A running cluster of ``nodes`` nodes in ``folder``; ``stop`` it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.conf = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("log", "state", "spool"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        self._configure()
        self._start_munged()
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: "UP" in self.says("scontrol", "ping"), 30, lambda: f"slurmctld, see {folder}/log")
        wait_until(lambda: self.idle() == nodes, 60, lambda: f"idle nodes, see {folder}/log")

    def says(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def idle(self) -> int:
        return sum(map(int, self.says("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").split()))

    def start_node(self, node: str) -> None:
        named = [node, str(self.folder / "hosts")]
        self._daemon(
            node, "unshare", "--mount", "--uts", "sh", "-ec", IN_NAMESPACES, "sh", *named, "slurmd", "-D", "-N", node
        )

    def kill_node(self, node: str) -> None:
        """The node is gone at once: its slurmd, and all that runs on it."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for pid in self._of_jobs(f"SLURMD_NODENAME={node}"):
            _kill(pid)

    def stop(self) -> None:
        """No process of the cluster, or of a job of it, is left."""
        self.says("scancel", "--full", "--user=root")
        until = time.monotonic() + 15
        while self.says("squeue", "-h").strip() and time.monotonic() < until:
            time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.left():
            _kill(pid)
        wait_until(lambda: not self.left(), 10, lambda: f"the end of processes {self.left()}")

    def left(self) -> list[int]:
        """Processes whose environment is this cluster's."""
        return self._of_jobs("")

    def _of_jobs(self, variable: str) -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            is_ours = f"SLURM_CONF={self.conf}" in environment and int(process.name) != os.getpid()
            if is_ours and (not variable or variable in environment):
                found.append(int(process.name))
        return found

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],  # not to outlive tests that are killed
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def _start_munged(self) -> None:
        key, own = self.folder / "munge.key", [f"--{name}={self.folder}/munge.{name.split('-')[0]}"
            for name in ("pid-file", "log-file", "seed-file")]  # fmt: skip
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        socket_file = self.folder / "munge.sock"
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *own
        )
        wait_until(socket_file.exists, 30, lambda: "munged")

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        port, *ports = free_ports(1 + len(self.nodes))
        lines = [CONF.format(host=host, port=port, folder=self.folder)]
        hosts = ["127.0.0.1 localhost", f"127.0.0.1 {host}"]
        for number, (node, its_port) in enumerate(zip(self.nodes, ports, strict=True), 1):
            address = f"127.77.0.{number}"
            cores = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=4000"
            lines.append(f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={its_port} {cores}")
            hosts.append(f"{address} {node}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        self.conf.write_text("\n".join(lines) + "\n")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
