"""A real Slurm on this machine: munge, one controller, two nodes of two CPUs each, everything in one directory.

Debian's ``slurm-wlm`` and ``munge`` are all that it needs, and root, which munge and slurmd ask for.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("alpha", "beta")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=8000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
MaxArraySize=20
FirstJobId={first_job_id}
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=300
UnkillableStepTimeout=60
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
"""
TWO_NODES = """\
NodeName=alpha NodeHostname={host} NodeAddr=127.0.0.1 Port={alpha_port} CPUs=2 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
NodeName=beta NodeHostname={host} NodeAddr=127.0.0.1 Port={beta_port} CPUs=2 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
PartitionName=short Nodes=ALL MaxTime=60 State=UP
"""
# Devices that no program opens: Slurm gives them out as if they were GPUs.
GPUS = """\
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
"""
# Nodes that are not there: enough to ask the controller whether it would take a job.
BIG = """\
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
Licenses=scratch:1
NodeName=node[1-64] CPUs=96 RealMemory=2000000 Gres=gpu:a100:8 Feature=a100,ib State=CLOUD
PartitionName=gpu Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
PartitionName=cpu Nodes=ALL MaxTime=UNLIMITED State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "needs root: munged and slurmd start tasks as other users"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, outside the ephemeral range."""
    ports: list[int] = []
    for port in range(21000 + os.getpid() % 5000, 32000):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


class LocalSlurm:
    """Its daemons; ``environment`` is what the clients need to find it."""

    def __init__(self, root: Path, nodes: str = TWO_NODES) -> None:
        self.root = root
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.waiting_since: dict[str, float] = {}
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (root / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        # A rendezvous port follows from the job's id, and test sessions beside each other share this machine's ports.
        first_job_id = os.getpid() % 19 * 1000 + 1
        ports = dict(zip(("controller_port", "alpha_port", "beta_port"), free_ports(3), strict=True))
        (root / "slurm.conf").write_text(
            CONFIG.format(root=root, host=host, first_job_id=first_job_id, **ports) + nodes.format(host=host, **ports)
        )
        (root / "gres.conf").write_text(GPUS)

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        self.start_munge()
        self.mend()

    def start_munge(self) -> None:
        """Start what the others prove with who they are."""
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.root.chmod(0o755)
        options = [f"--key-file={key}", f"--socket={self.root}/munge.socket", f"--pid-file={self.root}/munged.pid"]
        options += [f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munged.seed"]
        self._spawn("munged", "munged", "--foreground", "--force", *options)
        _wait(lambda: (self.root / "munge.socket").exists(), 10, "munged")

    def start_controller(self) -> None:
        """Start slurmctld, from its saved state if there is one."""
        self._spawn("slurmctld", "slurmctld", "-D")

    def start_node(self, node: str) -> None:
        """Start one slurmd."""
        self._spawn(node, "slurmd", "-D", "-N", node)

    def kill(self, node: str) -> None:
        """kill -9 of a node's slurmd."""
        self.daemons.pop(node).kill()

    def stop_controller(self) -> None:
        """As for maintenance: it saves its state."""
        daemon = self.daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(timeout=30)

    def states(self) -> dict[str, str]:
        """Node -> its state."""
        text = self.client("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False)
        return dict(line.split() for line in text.splitlines() if len(line.split()) == 2)

    def client(self, *command: str, check: bool = True, extra: Mapping[str, str] | None = None) -> str:
        """What a client program prints."""
        done = subprocess.run(
            command, env=self.environment | (extra or {}), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Job id -> its state, of those in the queue."""
        text = self.client("squeue", "--noheader", "--format=%i %T")
        return dict(line.split() for line in text.splitlines())

    def wait_for_jobs(self, seconds: float) -> None:
        """Wait until the queue is empty; a requeued job starts at once, not after Slurm's two minutes."""
        # Twice, for a job that is being requeued is in no queue for a moment.
        _wait(lambda: self.hurry() == {} == (time.sleep(1) or self.jobs()), seconds, "jobs to end", 0.5)

    def hurry(self) -> dict[str, str]:
        """Start what waits only for its time to come; the queue as it was.

        Not within some seconds of its requeue: the nodes would refuse the old start's credential.
        """
        jobs = self.jobs()
        text = self.client("squeue", "--noheader", "--format=%i %r")
        waiting = {line.split()[0] for line in text.splitlines() if line.endswith(" BeginTime")}
        self.waiting_since = {job: self.waiting_since.get(job, time.monotonic()) for job in waiting}
        for job, since in self.waiting_since.items():
            if time.monotonic() - since > 5:
                self.client("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return jobs

    def mend(self) -> None:
        """Start the daemons that a test has killed, and wait for the nodes."""
        if "slurmctld" not in self.daemons:
            self.start_controller()
        for node in NODES:
            if node not in self.daemons:
                self.start_node(node)
        _wait(lambda: self.states() == dict.fromkeys(NODES, "idle"), 60, f"the nodes: {self.states()}")

    def clear(self) -> None:
        """Cancel every job and wait until none is left."""
        if "slurmctld" not in self.daemons:
            self.start_controller()
            _wait(lambda: bool(self.states()), 60, "the controller")
        if ids := sorted({job.partition("_")[0] for job in self.jobs()}):  # of an array all that is left of it
            self.client("scancel", *ids, check=False)
        _wait(lambda: not self.jobs(), 60, "jobs to end")

    def stop(self) -> None:
        """End all daemons."""
        for name in ("slurmctld", *NODES, "munged"):
            if name in self.daemons:
                self.daemons[name].send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)


def _wait(condition: Callable[[], bool], seconds: float, what: str, every_seconds: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(every_seconds)
