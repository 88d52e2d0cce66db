"""Slurm and Ray on this machine alone, to try a sweep on the real thing.

    .venv/bin/python scripts/engines.py slurm [COMMAND ...]
    .venv/bin/python scripts/engines.py ray [COMMAND ...]

starts munge, slurmctld and two slurmd on the loopback interface, or a Ray cluster of two nodes, runs the command there (by
default a small sweep) and stops them again. Slurm: Debian's `slurm-wlm` and `munge`, as root. Ray: `pip install ray`.
Slurm has three partitions: jobs of `urgent` pre-empt those of `main`, which are told 30 s before, and of `abrupt`, which are
not. `submitit_local` and `ray_local` are launchers that need nothing to be started.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

METARL = [sys.executable, "-m", "metarl_cli"]
SWEEP = "train -m algo=rl2 env=bandit algo.meta_batch=64 iterations=20 eval.tasks=1000 seed=0,1,2,3"
WORDS = {
    "slurm": "hydra/launcher=slurm_cpu hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=3",
    "ray": "hydra/launcher=ray_cluster",
    "submitit_local": "hydra/launcher=submitit_local",
    "ray_local": "hydra/launcher=ray",
}

SLURM_CONF = """\
ClusterName=metarl
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=abrupt Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing(engine: str) -> str:
    """Why the engine cannot be started here; empty if it can."""
    if engine == "slurm":
        names = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
        if lacking := [name for name in names if shutil.which(name) is None]:
            return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge"
        if os.geteuid():
            return "slurmd has to be run by root"
    packages = {"hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher"}
    if engine.startswith("ray"):
        packages = {"ray": "ray", "hydra_plugins.hydra_ray_launcher": "hydra-ray-launcher"}
    for module, package in packages.items():
        if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
            return f"{package} not installed: pip install {package}"
    return ""


@contextlib.contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Two nodes of one core each. Yields the environment in which sbatch and squeue find them."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        conf = folder / "slurm.conf"
        conf.write_text(SLURM_CONF.format(folder=folder, host=socket.gethostname(), ports=free_ports(3)))
        for directory in ("state", "spool-n1", "spool-n2"):
            (folder / directory).mkdir()
        munge = [f"--{option}={folder}/munge.{option.split('-')[0]}" for option in ("socket", "key-file", "seed-file")]
        daemons = [["munged", "--force", "--foreground", *munge, f"--pid-file={folder}/munged.pid"]]
        daemons[0].append(f"--log-file={folder}/munged.log")
        daemons.append(["slurmctld", "-D", "-i", "-f", str(conf)])
        daemons += [["slurmd", "-D", "-N", node, "-f", str(conf)] for node in ("n1", "n2")]
        for daemon in daemons:
            output = stack.enter_context((folder / f"{daemon[0]}.out").open("a"))
            stack.enter_context(running(subprocess.Popen(daemon, stdout=output, stderr=output)))
            time.sleep(0.5)
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        for _ in range(60):
            states = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"], env=environment, capture_output=True, text=True
            ).stdout
            if states.split() == ["idle", "idle"]:
                break
            time.sleep(0.5)
        else:
            raise RuntimeError("\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.out"))))
        yield environment
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)


@contextlib.contextmanager
def ray() -> Iterator[dict[str, str]]:
    """A head and one more node, of one core each. Yields the environment in which `ray.init("auto")` finds them."""
    cluster = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield {**os.environ, "RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def alone() -> Iterator[dict[str, str]]:
    """For launchers that bring what they need."""
    yield {**os.environ}


ENGINES = {"slurm": slurm, "ray": ray, "submitit_local": alone, "ray_local": alone}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ENGINES:
        print(__doc__)
        return 2
    engine, *command = sys.argv[1:]
    if reason := missing(engine):
        print(f"{engine} cannot be started here: {reason}", file=sys.stderr)
        return 1
    if not command:
        command = [*METARL, *SWEEP.split(), *WORDS[engine].split()]
        print("$ metarl", " ".join(command[len(METARL) :]), flush=True)
    with ENGINES[engine]() as environment:
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
