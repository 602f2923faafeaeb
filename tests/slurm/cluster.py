"""A Slurm cluster on this machine for tests: munged, slurmctld and slurmds in one folder, all ended afterwards.

Nothing under /etc or /var is written, and nothing is installed.  Every slurmd has separate mount and UTS namespaces, so
that `hostname` prints n1, n2, ... and jobs can resolve these names.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "unshare", "setpriv")
CPUS = 8  # per node in slurm.conf, whatever this machine has

CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only after the lifetime of a credential, which is 120 seconds by default.
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
# Ports follow from job ids, and the nodes of all clusters on this machine share its ports.
FirstJobId={first_job}
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
# Shell script for a namespace: set the host name $1, mount $2 as /etc/hosts, then run the remaining arguments.
IN_NAMESPACES = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def why_unavailable() -> str:
    """Return why no cluster can run on this machine, or an empty string."""
    if os.geteuid():
        return "Slurm's daemons need root"
    missing = [name for name in COMMANDS if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (make slurm installs them)" if missing else ""


def wait_until(holds: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Wait until ``holds()``; raises AssertionError with the message ``what()`` after ``seconds``."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not after {seconds} s: {what()}"
        time.sleep(0.1)


class Cluster:
    """A running cluster of ``nodes`` nodes, n1, n2, ..., with its files in ``folder``; end it with `stop`."""

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
        wait_until(lambda: "UP" in self.output("scontrol", "ping"), 30, lambda: f"slurmctld, see {folder}/log")
        wait_until(lambda: self.idle() == nodes, 60, lambda: f"idle nodes, see {folder}/log")

    def output(self, *command: str) -> str:
        """Return what a Slurm command prints.  It is repeated for a minute while slurmctld does not answer."""
        until = time.monotonic() + 60
        while True:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if not done.returncode or not re.search("Unable to contact|timed out", done.stderr):
                return done.stdout
            assert time.monotonic() < until, f"{command}: {done.stderr}"
            time.sleep(0.5)

    def idle(self) -> int:
        """Return the number of idle nodes."""
        return sum(map(int, self.output("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").split()))

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node``."""
        named = [node, str(self.folder / "hosts")]
        self._daemon(
            node, "unshare", "--mount", "--uts", "sh", "-ec", IN_NAMESPACES, "sh", *named, "slurmd", "-D", "-N", node
        )

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of ``node`` and all processes of jobs on it."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for pid in self.processes(f"SLURMD_NODENAME={node}"):
            _kill(pid)

    def stop(self) -> None:
        """Cancel all jobs, then end all daemons and remaining processes of jobs."""
        self.output("scancel", "--full", "--user=root")
        until = time.monotonic() + 15
        while self.output("squeue", "-h").strip() and time.monotonic() < until:
            time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            _kill(pid)
        wait_until(lambda: not self.processes(), 10, lambda: f"the end of processes {self.processes()}")

    def processes(self, variable: str = "") -> list[int]:
        """Return the ids of the cluster's processes; only those with ``variable`` (NAME=VALUE) in their environment."""
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            is_ours = f"SLURM_CONF={self.conf}" in environment and int(process.name) != os.getpid()
            if is_ours and (not variable or variable in environment):
                pids.append(int(process.name))
        return pids

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],  # ends with the tests, also if they are killed
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def _start_munged(self) -> None:
        key, names = self.folder / "munge.key", ("pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in names]
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        socket_file = self.folder / "munge.sock"
        self._daemon(
            "munged", "munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *files
        )
        wait_until(socket_file.exists, 30, lambda: "munged")

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        port, *ports = free_ports(1 + len(self.nodes))
        lines = [CONF.format(host=host, port=port, folder=self.folder, first_job=1 + 50 * (os.getpid() % 200))]
        hosts = ["127.0.0.1 localhost", f"127.0.0.1 {host}"]
        for number, (node, node_port) in enumerate(zip(self.nodes, ports, strict=True), 1):
            address = f"127.77.0.{number}"
            cores = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=4000"
            lines.append(f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={node_port} {cores}")
            hosts.append(f"{address} {node}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        self.conf.write_text("\n".join(lines) + "\n")


def free_ports(count: int) -> list[int]:
    """Return ``count`` free TCP ports."""
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
