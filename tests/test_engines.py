"""Sweeps on the real Slurm and the real Ray, started on this machine alone."""

from __future__ import annotations

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
LONG = small("rl2", "bandit", "iterations=5000", "log_every=100")


@contextmanager
def sweep(engine: str, folder: Path, *lines: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`metarl train -m` on an engine, from a relative directory, as users do."""
    if reason := engines.missing(engine):
        pytest.skip(reason)
    words = ["train", "-m", *lines, *engines.WORDS[engine].split()]
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


def runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("sweep/**/config.yaml"))


@pytest.mark.parametrize("engine", ["slurm", "ray"])
def test_a_sweep(engine: str, tmp_path: Path) -> None:
    """Two runs on two nodes, each as it would have been here."""
    with sweep(engine, tmp_path, *LINES, "seed=0,5") as (process, _):
        output = process.communicate(timeout=500)[0]
    assert process.returncode == 0 and "none failed" in output, output
    assert len(runs(tmp_path)) == 2
    for run, seed in zip(runs(tmp_path), (0, 5), strict=True):
        assert_same_run(run, train(tmp_path / f"here-{seed}", [*LINES, f"seed={seed}"]))


def test_a_warning_from_slurm_saves_requeues_and_resumes(tmp_path: Path) -> None:
    """As when the time of a job is nearly up."""
    with sweep("slurm", tmp_path, *LONG, "seed=0") as (process, cluster):
        for _ in range(2000):
            if any((run / "metrics.jsonl").exists() for run in runs(tmp_path)):
                break
            time.sleep(0.05)
        subprocess.run(["scancel", "--user=root", "--signal=USR2"], env=cluster, check=True)
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0 and "none failed" in output, output
    (run,) = runs(tmp_path)
    said = "".join(path.read_text() for path in tmp_path.glob("sweep/.submitit/*/*_log.*"))
    assert "Caught signal SIGUSR2" in said and "requeue" in said.lower()
    assert_same_run(run, train(tmp_path / "here", LONG))
