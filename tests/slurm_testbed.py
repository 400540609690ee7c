"""A real Slurm of a few nodes on this machine: no systemd, no cgroups, no database, no network.

``python tests/slurm_testbed.py`` brings one up, prints what to set in another shell, and takes it
down at Ctrl-C. Tests use ``testbed()``. Its daemons are children of a keeper process that ends
them, and all that their jobs started, when whoever asked for the cluster is gone, however it died.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from longpretrain.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
CPUS, GPUS = 8, 2
"""Of each node, by its own claim: as many ranks may share the processors that there are."""
OURS = "LONGPRETRAIN_TESTBED"
"""In the environment of every process of a testbed, with its folder."""


def why_no_slurm() -> str:
    """Why a testbed cannot be brought up here; empty if it can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        listed = ", ".join(missing)
        return f"needs Slurm and munge (Debian: slurm-wlm, munge; `make slurm`): no {listed}"
    return ""


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    state: str
    reason: str
    restarts: int
    nodes: str
    exit_code: str


class Testbed:
    """A cluster that is up; ``environment`` is what its commands and jobs need."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            OURS: str(folder),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "MASTER_ADDR": "127.0.0.1",  # its nodes have no names that resolve
        }

    def in_shell(self, environment: Mapping[str, str]) -> dict[str, str]:
        """A shell's environment with what the cluster needs."""
        path = f"{environment['PATH']}:/usr/sbin:/sbin"
        return {**environment, **self.environment, "PATH": path}

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        finished = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | self.environment,
        )
        assert finished.returncode == 0 or not check, (command, finished.stdout, finished.stderr)
        return finished.stdout.strip()

    def job(self, number: str) -> Job:
        """How a job stands."""
        told = dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))
        return Job(
            state=told["JobState"],
            reason=told["Reason"],
            restarts=int(told["Restarts"]),
            nodes=told.get("NodeList", ""),
            exit_code=told["ExitCode"],
        )

    def lose_node(self, node: str) -> None:
        """Takes a node away as a power cut does: all of its processes die, and Slurm is told."""
        for pid in processes(self.folder):
            if f"SLURMD_NODENAME={node}" in _environment(pid) or _is_daemon_of(pid, node):
                _kill(pid)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def return_node(self, node: str) -> None:
        """Brings a lost node back, and waits until Slurm has it."""
        start_node(self.folder, node)
        deadline = time.monotonic() + 60
        while True:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            if self.run("sinfo", "-h", "-n", node, "-o", "%t") in ("idle", "mix", "alloc"):
                return
            assert time.monotonic() < deadline, self.tails()
            time.sleep(0.3)

    def tails(self) -> str:
        """The last lines of the daemons' logs."""
        logs = sorted((self.folder / "log").glob("*"))
        return "\n".join(
            f"{log.name}: {line}"
            for log in logs
            for line in log.read_text(errors="replace").splitlines()[-4:]
        )


@contextlib.contextmanager
def testbed(nodes: int = 2) -> Iterator[Testbed]:
    """A cluster for as long as the block runs."""
    # Not in pytest's folder: the path of a socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    keeper = subprocess.Popen(
        [sys.executable, __file__, "keep", str(folder), str(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is for the tests, not for it
    )
    assert keeper.stdin is not None and keeper.stdout is not None
    try:
        told = keeper.stdout.readline()
        assert told == "up\n", f"the Slurm testbed did not come up: {told}{keeper.stdout.read()}"
        yield Testbed(folder)
    finally:
        keeper.stdin.close()
        keeper.stdout.read()
        keeper.wait()


testbed.__test__ = False  # type: ignore[attr-defined]


def keep(folder: Path, nodes: int) -> None:
    """The keeper: brings a cluster up, and down again when its standard input ends."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    try:
        bring_up(folder, nodes)
        print("up", flush=True)
        sys.stdin.read()
    except AssertionError as error:
        print(error, flush=True)
    finally:
        bring_down(folder)
        shutil.rmtree(folder, ignore_errors=True)


def bring_up(folder: Path, nodes: int) -> None:
    """Starts the daemons, and waits until all nodes are idle."""
    for name in ("log", "state", "spool", "gpu"):
        (folder / name).mkdir()
    for number in range(GPUS):
        (folder / "gpu" / str(number)).touch()  # Slurm only looks whether the file is there
    ports = _free_ports(nodes + 1)
    (folder / "slurm.conf").write_text(_configuration(folder, ports))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu/[0-{GPUS - 1}]\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    # An own key and socket leave the machine's munge alone; --force: /tmp is writable for all.
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    _daemon(folder, "munged", "-F", "--force", f"--socket={folder}/munge", *files)
    _until((folder / "munge").exists, "munged made no socket", folder)
    _daemon(folder, "slurmctld", "-D", "-c")
    for number in range(1, nodes + 1):
        start_node(folder, f"n{number}")
    idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
    cluster = Testbed(folder)
    _until(lambda: cluster.run(*idle, check=False) == str(nodes), "nodes are not idle", folder)


def start_node(folder: Path, node: str) -> None:
    """Starts the daemon of one node."""
    (folder / "spool" / node).mkdir(exist_ok=True)
    _daemon(folder, "slurmd", "-D", "-N", node)


def bring_down(folder: Path) -> None:
    """Ends every process of a testbed, jobs and what they started included."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = processes(folder)
        if not found:
            return
        for pid in found:
            _kill(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def processes(folder: Path) -> list[int]:
    """Processes of a testbed, by the mark in their environment; not this one or its parents."""
    mine = {os.getpid(), os.getppid()}
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    mark = f"{OURS}={folder}"
    return [pid for pid in pids if pid not in mine and mark in _environment(pid)]


def _configuration(folder: Path, ports: list[int]) -> str:
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} "
        f"RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
        for number, port in enumerate(ports[1:], start=1)
    )
    listed = f"n[1-{len(ports) - 1}]"
    first = random.SystemRandom().randrange(
        1000, 60000
    )  # ranks' ports follow from the job's number
    return f"""
ClusterName=testbed
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=1,preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=600
PropagateResourceLimits=NONE
{nodes}
PartitionName=test Nodes={listed} Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={listed} MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


def _daemon(folder: Path, *command: str) -> None:
    with (folder / "log" / command[-1 if command[0] == "slurmd" else 0]).open("a") as log:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | Testbed(folder).environment,
            start_new_session=True,
        )


def _until(is_reached: Callable[[], bool], wanted: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < deadline, f"{wanted}\n{Testbed(folder).tails()}"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has now; drawn anew by each testbed, so that several go side by side."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _environment(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return (
            (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        )
    return []


def _is_daemon_of(pid: int, node: str) -> bool:
    with contextlib.suppress(OSError):
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        return words.startswith("slurmd\0") and node in words.split("\0")
    return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """``keep FOLDER NODES`` is the keeper; without words, a cluster to play with."""
    if sys.argv[1:2] == ["keep"]:
        keep(Path(sys.argv[2]), int(sys.argv[3]))
        return
    if reason := why_no_slurm():
        sys.exit(reason)
    with testbed() as cluster, contextlib.suppress(KeyboardInterrupt):
        for name, value in cluster.environment.items():
            print(f"export {name}={value}")
        print("# Ctrl-C takes it down", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
