"""Sweeps on the real Slurm and the real Ray, started on this machine alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import ROOT, assert_same_run, driver, environment, small, train

sys.path.append(str(ROOT / "scripts"))
import engines

pytestmark = pytest.mark.slow
LINES = small("rl2", "bandit", "iterations=200", "log_every=20")
LONG = small("rl2", "bandit", "iterations=40000", "log_every=1000", "seed=0")


@contextmanager
def sweep(engine: str, folder: Path, *lines: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`metarl train -m` on an engine, from a relative directory, as users do."""
    if reason := engines.missing(engine):
        pytest.skip(reason)
    words = ["train", "-m", *engines.WORDS[engine].split(), *lines]
    with engines.ENGINES[engine]() as cluster:
        command = driver("", *words, "hydra.sweep.dir=sweep")
        process = subprocess.Popen(
            command, env=cluster | environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process, cluster
        finally:
            process.kill()
            process.communicate()


def ends_well(process: subprocess.Popen[str]) -> None:
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0 and "none failed" in output, output


def runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("sweep/**/config.yaml"))


def wait_for_metrics(folder: Path) -> None:
    for _ in range(2000):
        if any((run / "metrics.jsonl").exists() for run in runs(folder)):
            return
        time.sleep(0.05)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_sweep(engine: str, tmp_path: Path) -> None:
    """Two runs in two places, each as it would have been here."""
    with sweep(engine, tmp_path, *LINES, "seed=0,5") as (process, _):
        ends_well(process)
    assert len(runs(tmp_path)) == 2
    for run, seed in zip(runs(tmp_path), (0, 5), strict=True):
        assert_same_run(run, train(tmp_path / f"here-{seed}", [*LINES, f"seed={seed}"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never interrupted."""
    if reason := engines.missing("slurm"):
        pytest.skip(reason)
    return train(tmp_path_factory.mktemp("whole") / "run", LONG)


SAID = {  # by Slurm and submitit, in the job's own log
    "time": "this job is timed-out",
    "main": "this job is preempted",
    "abrupt": "DUE TO PREEMPTION",
    "requeue": "DUE TO JOB REQUEUE",
}


@pytest.mark.parametrize("why", SAID)
def test_a_run_that_slurm_interrupts_goes_on_in_its_directory(why: str, whole: Path, tmp_path: Path) -> None:
    """The time of a job is up; an urgent job needs its nodes, which Slurm says 30 s before (`main`) or not at all
    (`abrupt`); somebody puts it into the queue again.
    """
    partition = why if why in ("main", "abrupt") else "main"
    limits = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=40"] if why == "time" else []
    with sweep("slurm", tmp_path, *LONG, f"hydra.launcher.partition={partition}", *limits) as (process, cluster):
        wait_for_metrics(tmp_path)
        act = {"requeue": ["scontrol", "requeue", "1"], "time": ["true"]}
        urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        subprocess.run(act.get(why, urgent), env=cluster, check=True, capture_output=True)
        ends_well(process)
    said = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_log.*"))
    assert SAID[why] in said and said.count("Starting with JobEnvironment") >= 2, said
    (run,) = runs(tmp_path)
    shown = [int(done) for done in re.findall(r"iteration +(\d+)/40000", (run / "log.txt").read_text())]
    assert shown == sorted(shown)  # not from the beginning
    assert_same_run(run, whole)


def test_a_cancelled_job_is_an_interrupted_point(tmp_path: Path) -> None:
    with sweep("slurm", tmp_path, *LONG) as (process, cluster):
        wait_for_metrics(tmp_path)
        subprocess.run(["scancel", "1"], env=cluster, check=True)
        output = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "metarl: point: interrupted" in output, output
