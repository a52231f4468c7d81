"""A real SLURM cluster on this machine: slurmctld, one slurmd per node and munged, with all files in one directory.

python -m tests.launch.cluster [nodes]     starts a cluster until Enter is pressed, and prints how to use it

Nodes are daemons with their own host names (UTS namespaces) and loopback addresses; their CPUs and GPUs are only
declared. Needs root; installs Debian's packages if they are missing.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "shellcheck")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "shellcheck")
# Sets the host name to $0 and /etc/hosts to the cluster's file $1, then becomes the daemon.
ON_NODE = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def why_not() -> str | None:
    """Install missing packages; return the reason why SLURM cannot run here, or None."""
    if os.geteuid() != 0:
        return "a private SLURM needs root, because its nodes have their own host names"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return f"{', '.join(PROGRAMS)} are missing, and there is no apt-get to install them"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"apt-get did not install {', '.join(missing)}: {done.stderr.strip()[-200:]}" if missing else None


class Cluster:
    """A running SLURM cluster.

    Attributes:
        environment: environment variables for sbatch and the other commands.
    """

    def __init__(self, folder: Path, num_nodes: int, gpus: int, cpus: int) -> None:
        """Write the configuration and start the daemons."""
        self.folder, self.num_nodes = folder, num_nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        # Ports and job ids are random, because another cluster may run here; jobs derive their ports from their ids.
        self._first_port = random.SystemRandom().randrange(11000, 19000, 20)
        self._first_job = random.SystemRandom().randrange(1, 10000)
        for name in ("state", "spool", "munge", "log"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o600)
        nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        hosts = ["127.0.0.1 localhost ctl", *(f"127.0.2.{number} {node}" for number, node in enumerate(nodes, 1))]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "slurm.conf").write_text(self._configuration(gpus, cpus))
        (folder / "gres.conf").write_text(self._gpus(gpus))
        self._start_munge()
        self._start("ctl", "slurmctld", "-D")
        for node in nodes:
            (folder / "spool" / node).mkdir()
            self._start(node, "slurmd", "-D", "-N", node)
        self._wait_until_idle()

    def _gpus(self, count: int) -> str:
        """Declare GPUs; SLURM needs devices, so each GPU is a device node with the numbers of /dev/null."""
        for number in range(count):
            os.mknod(self.folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        devices = f"{self.folder}/gpu[0-{count - 1}]"
        return f"AutoDetect=off\nNodeName=n[1-{self.num_nodes}] Name=gpu File={devices}\n" if count else ""

    def _configuration(self, gpus: int, cpus: int) -> str:
        n, folder, port = self.num_nodes, self.folder, self._first_port
        settings = {
            "ClusterName": "test", "SlurmctldHost": "ctl(127.0.0.1)", "SlurmctldPort": port, "SlurmUser": "root",
            "SlurmdUser": "root", "AuthType": "auth/munge", "CredType": "cred/munge",
            # A requeued job waits until its old credential expires: two minutes by default, five seconds at least.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/ctl.pid", "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmctldLogFile": f"{folder}/log/ctl.log", "SlurmdLogFile": f"{folder}/log/%n.log",
            # A container has no cgroups, no accounting and no interconnect.
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none", "AccountingStorageType": "accounting_storage/none",
            "SwitchType": "switch/none", "MpiDefault": "none", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0", "ReturnToService": 2,
            "SlurmdParameters": "config_overrides", "KillWait": 5, "JobRequeue": 1, "MailProg": "/bin/true",
            "FirstJobId": self._first_job,
        }  # fmt: skip
        if gpus:
            settings["GresTypes"] = "gpu"
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines.append(
            f"NodeName=n[1-{n}] NodeAddr=127.0.2.[1-{n}] Port=[{port + 1}-{port + n}] CPUs={cpus} "
            f"RealMemory=4000 State=UNKNOWN {f'Gres=gpu:{gpus}' if gpus else ''}"
        )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        files = {"key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        socket = self.folder / "munge.socket"
        self._spawn("munged", ["munged", "--force", "--foreground", f"--socket={socket}", "--num-threads=1", *options])
        self._wait(socket.exists, "munged did not open its socket")

    def _start(self, host: str, *command: str) -> None:
        hosts = str(self.folder / "hosts")
        self._spawn(host, ["unshare", "--uts", "--mount", "sh", "-c", ON_NODE, host, hosts, *command])

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("w") as screen:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=screen, stderr=subprocess.STDOUT)
            )

    def _wait_until_idle(self) -> None:
        def are_idle() -> bool:
            return self.call("sinfo", "-h", "-o", "%D %t").stdout.strip() == f"{self.num_nodes} idle"

        self._wait(are_idle, "the nodes did not become idle")

    def _wait(self, condition, failure: str, timeout_s: float = 300.0) -> None:
        """Return when a condition holds; stop everything and fail if it does not before the timeout."""
        for _ in range(int(timeout_s * 20)):
            if condition():
                return
            self.pause()
        logs = "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in (self.folder / "log").iterdir())
        self.stop()
        raise AssertionError(f"{failure} within {timeout_s:.0f} s\n{logs}")

    def pause(self) -> None:
        """Wait for a twentieth of a second, or less if a daemon ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._daemons[-1].wait(timeout=0.05)

    def call(self, *command: str, **options) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands."""
        environment = {**self.environment, **options.pop("env", {})}
        return subprocess.run(command, env=environment, capture_output=True, text=True, **options)

    def stop(self) -> None:
        """End all jobs and then all daemons; further calls do nothing."""
        daemons, self._daemons = self._daemons, []
        if not daemons:
            return
        self.call("scancel", "--user=root")
        self.call("scancel", "--signal=KILL", "--full", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextlib.contextmanager
def running_cluster(num_nodes: int, gpus: int = 0, cpus: int = 4) -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        cluster = Cluster(Path(name) / "cluster", num_nodes, gpus, cpus)
        try:
            yield cluster
        finally:
            cluster.stop()


def main() -> None:
    """Start a cluster for interactive use."""
    if (reason := why_not()) is not None:
        sys.exit(reason)
    with running_cluster(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}\n{cluster.call('sinfo', '-N', '-l').stdout}")
        input("Enter ends it. ")


if __name__ == "__main__":
    main()
